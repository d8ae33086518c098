"""Convolutions: which pixels they see, what they commute with, and what they refuse."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import shaken as shaken_as_it_is
from torch.testing import assert_close

from flowcourse.convolutions import (
    EmergingConv,
    MaskedConv,
    PeriodicConv,
    diagonally_dominant,
)


def shaken(f, sd=1.0):
    """The map in float64, with noise on its parameters."""
    return shaken_as_it_is(f.double(), sd)


def matrix(f):
    """`A`, of an image flattened."""
    start = torch.zeros(f.event_shape, dtype=next(f.parameters()).dtype)
    n = start.numel()
    return torch.func.jacrev(lambda z: f(z)[0])(start).reshape(n, n).detach()


def test_an_emerging_convolution_hands_its_options_on():
    f = EmergingConv((2, 5, 5), 5, context_dim=3)
    one, other = f.bijections
    assert (one.reach, other.reach) == (2, 2)
    assert (one.reverse, other.reverse) == (False, True)
    assert (one.context_dim, other.context_dim) == (3, 3)
    # one shift for both
    extra = [len(g.raw(torch.zeros(3))) - g.n_params for g in (one, other)]
    assert extra == [0, 2]


def test_diagonally_dominant_rows_are_smooth_and_add_up_to_less_than_one():
    raw = torch.zeros(2, 5, requires_grad=True)
    diagonally_dominant(raw).sum().backward()
    assert_close(raw.grad, torch.full((2, 5), 0.5))
    total = diagonally_dominant(1e6 * torch.randn(9, 5)).abs().sum(-1)
    assert (total < 1).all() and (total > 0.99).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_masked_convolution_is_triangular(kernel_size, reverse):
    f = shaken(MaskedConv((2, 3, 4), kernel_size, reverse=reverse, bias=False))
    # pixel, then channel
    a = matrix(f).view(2, 12, 2, 12).permute(1, 0, 3, 2).reshape(24, 24)
    a = a.flip(0, 1) if reverse else a
    assert not a.triu(1).any()
    assert (
        a.diagonal().log().sum().sub(f(torch.zeros(2, 3, 4).double())[1]).abs()
        < 1e-10
    )


def test_an_emerging_convolution_sees_all_around():
    f = shaken(EmergingConv((1, 5, 5), bias=False))
    seen = matrix(f).view(25, 5, 5)[12]
    assert (seen != 0)[1:4, 1:4].all()


@pytest.mark.parametrize("width", [4, 5])
def test_a_periodic_convolution_commutes_with_shifts(width):
    f = shaken(PeriodicConv((2, 4, width)))
    z = torch.randn(3, 2, 4, width, dtype=torch.float64)
    x, ladj = f(z)
    moved, same = f(z.roll((1, 2), (-2, -1)))
    assert_close(moved, x.roll((1, 2), (-2, -1)))
    assert_close(same, ladj)
    assert_close(ladj, torch.linalg.slogdet(matrix(f)).logabsdet.expand(3))


def test_filters_of_any_size_leave_a_convolution_invertible():
    for sd in (10.0, 1e4):
        f = shaken(PeriodicConv((2, 4, 4), bias=False), sd)
        a = matrix(f) / f.raw()[:2].asinh().exp().repeat_interleave(16)[:, None]
        assert (2 * a.diagonal().abs() > a.abs().sum(1)).all()


KINDS = (MaskedConv, EmergingConv, PeriodicConv)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: MaskedConv((2, 4, 4), 4), "kernel_size: .* odd"),
        (lambda: PeriodicConv((2, 4, 4), -3), "kernel_size: "),
        (lambda: PeriodicConv(4), "event_shape: .*channels, height, width"),
    ],
)
def test_constructors_name_what_is_wrong(make, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        make()


@pytest.mark.parametrize("kind", KINDS)
def test_filters_have_a_whole_odd_width(kind):
    make = partial(kind, (2, 3, 3))
    for bad in ("a", 3.0, True, -1, 1, torch.zeros(2, 2), object()):
        with pytest.raises(ValueError, match="^kernel_size: "):
            make(kernel_size=bad)
    for good in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert repr(make(kernel_size=good)) == repr(make(kernel_size=3))


def test_a_reversed_order_is_asked_for_by_a_truth_value():
    for bad in ("no", 2, 0, None, torch.zeros(3)):
        with pytest.raises(
            ValueError, match="^reverse: expected True or False"
        ):
            MaskedConv((2, 3, 3), reverse=bad)
