"""Fixed points of contractions: never slower than repetition, and mostly much faster."""

import math

import pytest
import torch
from helpers import noise
from torch.func import vmap
from torch.testing import assert_close

from flowcourse.contractions import PAST, apply_inverse, contract, rounds


class Counted:
    """A function that counts its evaluations."""

    def __init__(self, branch):
        self.branch, self.calls = branch, 0

    def __call__(self, x):
        self.calls += 1
        return self.branch(x)


def rotation(d):
    return torch.linalg.qr(noise(d, d)).Q


def zigzag(x):
    """Slopes of 0.9 with a sign that changes every hundredth: no line fits."""
    x = 100 * (x @ rotation(x.shape[-1]).to(x))
    return 0.9 * (x - 2 * (x / 2).round()).abs() / 100


def smooth(x):
    return 0.9 * torch.sin(x @ rotation(x.shape[-1]).to(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("branch", [zigzag, smooth])
def test_it_keeps_what_a_contraction_promises(branch, dtype):
    eps, f = torch.finfo(dtype).eps, Counted(branch)
    y = 3 * noise(100, 40).to(dtype)
    x = contract(y, f, 0.9)
    left = (x + branch(x) - y).norm(dim=-1)
    assert (left <= 32 * eps * (1 + y.norm(dim=-1))).all()
    # a round has at most two evaluations
    assert f.calls <= 1 + 2 * rounds(0.9, eps)
    if branch is smooth:
        assert f.calls < rounds(0.9, eps) / 3


def test_a_linear_map_of_few_dimensions_takes_as_many_steps():
    j, y = 0.99 * rotation(PAST - 1), noise(20, PAST - 1)
    f = Counted(lambda x: x @ j.mT)
    x = contract(y, f, 0.99)
    assert_close(x @ (torch.eye(len(j)) + j).mT, y, rtol=0, atol=1e-12)
    assert f.calls < 40 < rounds(0.99, 2e-16) / 80


def test_the_number_of_plain_steps():
    """Under transforms: as many as the bound and the format ask."""
    for c in (0.5, 0.97):
        n = rounds(c, 1e-7)
        assert c**n <= 1e-7 < c ** (n - 1)
    f, y = Counted(lambda x: 0.5 * x.sin()), noise(7, 3)
    many = vmap(lambda y: contract(y[None], f, 0.5)[0])(y)
    assert f.calls == math.ceil(math.log(2**-52) / math.log(0.5)) == 52
    assert_close(many, contract(y, f, 0.5), rtol=0, atol=1e-14)


def test_a_row_is_solved_alike_in_any_company():
    y = 3 * noise(30, 8)
    together = contract(y, smooth, 0.9)
    for i in range(5):
        assert_close(contract(y[i : i + 1], smooth, 0.9)[0], together[i])
    assert contract(y[:0], smooth, 0.9).shape == (0, 8)
    assert_close(contract(0 * y, lambda x: 0 * x, 0.9), 0 * y)


def test_a_product_with_an_inverse_has_derivatives_of_every_order():
    j = 0.9 * rotation(6)
    inverse = torch.linalg.inv(torch.eye(6) + j)

    def run(r):
        return apply_inverse(r, lambda v: v @ j.mT, lambda v: v @ j, 0.9)

    r = noise(3, 6).requires_grad_()
    assert_close(run(r), r @ inverse.mT)
    assert torch.autograd.gradcheck(run, r)
    assert torch.autograd.gradgradcheck(lambda r: run(r).sin(), r)
    assert_close(vmap(lambda r: run(r[None])[0])(r), r @ inverse.mT)
