"""The mass of a density, weighed where it is narrow, heavy or ends in a jump, and refused where it is none."""

import math

import numpy as np
import pytest
import torch

from flowcourse.core import StandardNormal
from flowcourse.quadrature import standardized, total_mass


def one(x):
    """The log-density of the unit interval, and of the unit square."""
    return x.new_zeros(len(x))


@pytest.mark.parametrize(
    "log_prob, options, message",
    [
        ("normal", {}, "log_prob: expected a function of points, got str"),
        (
            StandardNormal(1),
            {},
            "log_prob: expected a function of points, got StandardNormal; give its log_prob",
        ),
        (
            lambda x: 0.0,
            {},
            "log_prob: expected a tensor of log-densities, got float",
        ),
        (lambda x: x.sum(), {}, r"log_prob: expected shape \(\d+,\) .* \(\)"),
        (one, {"dim": 3}, "dim: total_mass integrates in 1 or 2 .* got 3"),
        (one, {"dim": True}, "dim: expected a whole number"),
        (one, {"dim": 1.0}, "dim: expected a whole number"),
        (one, {"tol": 0.0}, "tol: expected a finite number above 0"),
        (one, {"tol": math.inf}, "tol: expected a finite number above 0"),
        (one, {"tol": math.nan}, "tol: expected a finite number above 0"),
        (one, {"chunk": 0}, "chunk: expected a whole number of at least 1"),
        (one, {"max_evals": -1}, "max_evals: expected a whole number"),
        (
            one,
            {"dtype": torch.int64},
            "dtype: expected a floating-point format",
        ),
        (one, {"dtype": "float32"}, "dtype: expected a floating-point format"),
        (one, {"device": "meta"}, "device: expected one that holds numbers"),
        (one, {"low": "zero"}, "low: expected a number or 1 of them"),
        (one, {"low": (0, 0)}, "low: expected a number or 1 of them"),
        (one, {"low": math.nan}, "low: expected a number or 1 of them"),
        (one, {"low": 1, "high": 0}, "low, high: expected low below high"),
    ],
)
def test_bad_arguments_of_total_mass_are_named(log_prob, options, message):
    with pytest.raises(ValueError, match=message):
        total_mass(log_prob, **options)


def test_total_mass_takes_numbers_of_numpy():
    options = {"low": np.float64(0), "high": np.int64(1)}
    mass = total_mass(
        one, np.int64(1), **options, tol=np.float32(1e-3), chunk=np.int32(100)
    )
    assert float(mass) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("log_prob", "dim", "low", "high"),
    [
        (lambda x: -torch.full_like(x[:, 0], 4.0).log(), 1, -1, 3),
        (lambda x: x[:, 0] - 2, 1, None, 2),
        (lambda x: 1 - x[:, 0], 1, 1, None),
        (lambda x: -(x.sum(-1)), 2, 0, None),
        (
            lambda x: (
                -0.5 * ((x[:, 0] - 0.3) / 1e-4).square()
                - math.log(1e-4 * math.sqrt(2 * math.pi))
            ),
            1,
            None,
            None,
        ),
    ],
    ids=["a box", "to the left", "to the right", "a quadrant", "a needle"],
)
def test_total_mass_weighs(log_prob, dim, low, high):
    mass = total_mass(log_prob, dim, low=low, high=high, dtype=torch.float64)
    assert float(mass) == pytest.approx(1, abs=1e-3)


def test_total_mass_refines_until_it_is_right_to_the_tolerance():
    def stairs(x):
        return torch.where((7 * x[:, 0]).sin() > 0.3, 0.0, -4.0)

    fine = total_mass(stairs, low=0, high=10, tol=1e-6, dtype=torch.float64)
    # the steps by hand: a share of arccos(0.3) / pi of the whole periods
    x = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 200_000
    share = float(stairs(x[:, None]).exp().mean()) * 10
    assert float(fine) == pytest.approx(share, abs=2e-5)
    rough = total_mass(stairs, low=0, high=10, tol=1e-3, dtype=torch.float64)
    assert float(rough) == pytest.approx(share, abs=1e-3)


def test_total_mass_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="log_prob: nan at"):
        total_mass(lambda x: x[:, 0] * math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total_mass_weighs_a_density_that_is_infinite_at_an_end(dtype):
    at_zero = total_mass(
        lambda x: -math.log(2) - 0.5 * x[:, 0].log(), low=0, high=1, dtype=dtype
    )
    at_one = total_mass(
        lambda x: -math.log(2) - 0.5 * (-x[:, 0]).log1p(),
        low=0,
        high=1,
        dtype=dtype,
    )
    for mass in (at_zero, at_one):
        torch.testing.assert_close(
            mass, torch.ones((), dtype=dtype), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("dim", [1, 2])
def test_a_density_far_away_is_weighed_where_its_points_lie(dim):
    far = torch.distributions.Normal(
        torch.tensor(1e6, dtype=torch.float64), 1e-3
    )
    sample = far.sample((4096, dim))
    density = standardized(lambda x: far.log_prob(x).sum(-1), sample)
    mass = total_mass(density, dim, max_evals=50_000, dtype=torch.float64)
    assert float(mass) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2])
def test_a_thin_ridge_keeps_its_mass_when_its_axes_are_turned(angle):
    turn = torch.tensor(
        [
            [math.cos(angle), -math.sin(angle)],
            [math.sin(angle), math.cos(angle)],
        ],
        dtype=torch.float64,
    )
    spread = turn * torch.tensor([2.0, 1e-4], dtype=torch.float64)
    ridge = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64), spread @ spread.mT
    )
    density = standardized(ridge.log_prob, ridge.sample((4096,)))
    mass = total_mass(density, 2, max_evals=100_000, dtype=torch.float64)
    assert float(mass) == pytest.approx(1, abs=1e-3)
