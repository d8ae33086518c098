"""Numerics: digits, gradients and roots at the ends of what a format can hold."""

import math

import mpmath
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

from flowcourse.numerics import (
    above_minus_one,
    bounded,
    in_double,
    interior,
    log_add_square,
    log_softplus,
    monotone_root,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.5, 3.0, 16.0, 17.0, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_bounded_is_a_hyperbolic_tangent(bound, sign, dtype):
    raw = torch.linspace(-30, 30, 1001, dtype=dtype)
    want = (sign * bound * torch.tanh(raw.double() / bound)).to(dtype)
    assert_close(
        bounded(raw, bound, sign),
        want,
        rtol=1e-6,
        atol=4 * torch.finfo(dtype).eps * min(bound, 16),
    )
    ends = bounded(torch.tensor([0.0, 1e9, -1e9], dtype=dtype), bound, sign)
    assert ends.tolist() == [0, sign * bound, -sign * bound]
    raw = raw.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda raw: bounded(raw, bound, sign), raw[::100]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_end_that_is_open_is_left_for_the_next_number(dtype):
    """Moved by one rounding and no further, at zero by the smallest normal number."""
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    unit = constraints.unit_interval
    below = torch.nextafter(one, zero)
    tiny = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype)
    assert torch.equal(interior(one, unit), below)
    assert torch.equal(interior(below, unit), below)
    assert torch.equal(interior(zero, unit), tiny)
    assert torch.equal(interior(-one, constraints.interval(-1.0, 1.0)), -below)
    for outside in (-tiny, 1.5 * one, zero + math.nan):
        assert_close(interior(outside, unit), outside, equal_nan=True)


ENDS = [*(0.1, 1e-6, 0.3, 0.5, 7.0, 1000.1), 1 - 2.0**-26, 3.3e-5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("end", [*ENDS, *(-end for end in ENDS)])
def test_an_end_that_no_format_holds_is_left_for_the_next_number(end, dtype):
    own = torch.tensor(end, dtype=dtype)
    above = torch.nextafter(own, own + 1)
    below = torch.nextafter(own, own - 1)
    low, high = constraints.greater_than(end), constraints.less_than(end)
    assert torch.equal(interior(own, low), above)
    assert torch.equal(interior(own, high), below)
    for inside in (above, own + 1):
        assert torch.equal(interior(inside, low), inside)
    for inside in (below, own - 1):
        assert torch.equal(interior(inside, high), inside)


def test_numbers_in_double_are_float64():
    assert in_double(torch.zeros(2)).dtype == torch.float64


def wavy(raw, x):
    """The root of `t + raw tanh(t) = x`."""
    return monotone_root(
        lambda t: t + raw * t.tanh() - x,
        lambda t: (raw / t.cosh().square()).log1p(),
        x - 1,
        x + 1,
    )


def test_a_root_has_right_first_and_second_derivatives():
    raw = torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    x = torch.tensor([5.0, -0.3, 0.01], dtype=torch.float64)
    t = wavy(raw, x)
    assert_close(t + raw * t.tanh(), x, rtol=0, atol=1e-14)
    inputs = [each.requires_grad_() for each in (raw, x)]
    assert torch.autograd.gradcheck(wavy, inputs)
    assert torch.autograd.gradgradcheck(wavy, inputs)


def test_a_root_at_the_end_of_its_bracket_is_found():
    ends = torch.tensor([-2.0, 0.0, 7.0])
    for low, high in ((ends, ends + 1), (ends - 1, ends), (ends, ends)):
        root = monotone_root(lambda t: t - ends, torch.zeros_like, low, high)
        assert_close(root, ends, rtol=1e-6, atol=1e-6)


def test_a_root_of_what_is_almost_flat_stays_in_its_bracket():
    root = torch.linspace(0.1, 1.9, 50)
    low, high = torch.zeros(50), torch.full((50,), 2.0)
    for log_slope in (-14.0, -200.0):  # which float32 rounds to steps, to zero

        def excess(t, slope=math.exp(log_slope)):
            return (1 + slope * (t - root)) - 1

        got = monotone_root(
            excess, lambda t, s=log_slope: torch.full_like(t, s), low, high
        )
        assert ((got > low - 1e-5) & (got < high + 1e-5)).all()
        # where the rounded function changes its sign, and no step beyond
        first = got < 1e-3
        assert ((excess(got - 1e-4) < 0) | first).all()
        assert (excess(got + 1e-4) >= 0).all()


def test_log_add_square_is_smooth_at_zero():
    for v in (-3.0, 0.5):
        t, v = (
            torch.zeros((), dtype=torch.float64),
            torch.tensor(v, dtype=torch.float64),
        )
        slope = torch.func.grad(log_add_square)
        assert_close(log_add_square(t, v), v)
        assert slope(t, v) == 0
        assert_close(torch.func.grad(slope)(t, v), 2 * (-v).exp())


def test_softplus_and_m_keep_their_digits():
    for s in (
        -1e4,
        -200.0,
        -18.0001,
        -17.9999,
        -1.0,
        0.0,
        19.0,
        21.0,
        39.0,
        41.0,
        1e4,
    ):
        s = torch.tensor(s, dtype=torch.float64)
        with mpmath.workdps(60):
            want = float(
                mpmath.log(mpmath.log1p(mpmath.exp(mpmath.mpf(float(s)))))
            )
        assert_close(
            log_softplus(s),
            torch.tensor(want, dtype=torch.float64),
            rtol=1e-14,
            atol=0,
        )
    small = torch.tensor([1e-12, -1e-30], dtype=torch.float64)
    assert_close(
        above_minus_one(small)[0],
        small * (1 - math.exp(-1)),
        rtol=1e-11,
        atol=0,
    )


def test_two_newton_steps_are_needed_for_second_derivatives():
    """t^3 + t = raw: t'' = -6 t t'^2 / (3 t^2 + 1) with t' = 1 / (3 t^2 + 1)."""
    level = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    t = monotone_root(
        lambda t: t**3 + t - level,
        lambda t: (3 * t**2 + 1).log(),
        torch.tensor(-9.0, dtype=torch.float64),
        torch.tensor(9.0, dtype=torch.float64),
    )
    (first,) = torch.autograd.grad(t, level, create_graph=True)
    (second,) = torch.autograd.grad(first, level)
    slope = 3 * t.detach() ** 2 + 1
    assert_close(first.detach(), 1 / slope)
    assert_close(second, -6 * t.detach() / slope**3, rtol=1e-9, atol=1e-9)


def test_newton_stays_where_halving_left_it():
    """A staircase so flat between its steps that a Newton step from rounding would leave the map."""
    t = monotone_root(
        lambda t: (40 * t).tanh() + 1e-12 * t - 1e-6,
        lambda t: torch.full_like(t, -60.0),  # a slope that is far too small
        torch.tensor(-5.0),
        torch.tensor(5.0),
    )
    assert abs(t) < 1e-5
