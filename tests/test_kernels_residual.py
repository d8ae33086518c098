"""The quick form of a chain of residual blocks equals the plain one, in values and derivatives."""

import pytest
import torch
from helpers import noise, shaken
from torch.testing import assert_close

from flowcourse.branches import eliminate, log_det, pivots
from flowcourse.kernels_residual import gathered, plain_chain, run_chain
from flowcourse.lipschitz import ACTIVATIONS
from flowcourse.residual import ResidualFlow


def inputs(activation, hidden, context_dim=2, dim=4, n=7):
    """Of `run_chain`, each with a gradient."""
    f = ResidualFlow(
        dim, 3, hidden=hidden, activation=activation, context_dim=context_dim
    )
    f = shaken(f.double(), 0.7)
    context = noise(n, context_dim, seed=5) if context_dim else None
    shift, weights = f._weights(context)
    given = [2 * noise(n, dim), shift, *weights]
    given = [t if t is None else t.detach().requires_grad_() for t in given]
    return given[:2] + [ACTIVATIONS[activation]] + given[2:]


def plain(x, shift, kind, *weights):
    return plain_chain(x, gathered(shift, kind, *weights))


CASES = [
    (activation, hidden, context_dim)
    for activation in ACTIVATIONS
    for hidden in ((5,), (5, 6), (5, 6, 7))
    for context_dim in (0, 2)
]


@pytest.mark.parametrize(("activation", "hidden", "context_dim"), CASES)
def test_values_and_gradients_are_those_of_the_plain_form(
    activation, hidden, context_dim
):
    given = inputs(activation, hidden, context_dim)
    leaves = [t for t in given if isinstance(t, torch.Tensor)]
    weights = noise(7, 4, seed=8), noise(7, seed=9)
    found = []
    for run in (run_chain, plain):
        out = run(*given)
        loss = sum((a * b).sum() for a, b in zip(out, weights))
        found.append((*out, *torch.autograd.grad(loss, leaves)))
    for quick, slow in zip(*found):
        assert_close(quick, slow, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_those_of_the_plain_form():
    given = inputs("lipswish", (5, 6))
    leaves = [t for t in given if isinstance(t, torch.Tensor)]
    found = []
    for run in (run_chain, plain):
        z, ladj = run(*given)
        loss = z.sin().sum() + ladj.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        twice = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(twice, leaves))
    for quick, slow in zip(*found):
        assert_close(quick, slow, rtol=1e-8, atol=1e-8)


def test_some_gradients_alone():
    given = inputs("lipswish", (5, 6))
    for keep in (0, 1, 3, 6):
        leaves = [
            t.detach().requires_grad_(i == keep)
            if isinstance(t, torch.Tensor)
            else t
            for i, t in enumerate(given)
        ]
        a, b = (
            torch.autograd.grad(run(*leaves)[1].sum(), leaves[keep])
            for run in (run_chain, plain)
        )
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_elimination_without_pivoting(dtype):
    """For Jacobians of norm 0.97, the worst that there are among them."""
    for d in (1, 2, 8, 24):
        j = noise(200, d, d)
        rotation = torch.linalg.qr(j).Q
        j = torch.cat(
            [j / torch.linalg.matrix_norm(j, 2)[:, None, None], rotation]
        )
        j = (0.97 * j).to(dtype)
        matrices = torch.eye(d, dtype=dtype) + j
        a = matrices.permute(1, 2, 0).clone(
            memory_format=torch.contiguous_format
        )
        eps = torch.finfo(dtype).eps
        assert_close(eliminate(a), log_det(j), rtol=1e3 * eps, atol=1e4 * eps)
        assert_close(
            matrices @ a.permute(2, 0, 1),
            torch.eye(d, dtype=dtype).expand(400, d, d),
            rtol=0,
            atol=1e4 * eps,
        )
        a = matrices.permute(1, 2, 0).clone()
        assert_close(pivots(a), log_det(j), rtol=1e3 * eps, atol=1e4 * eps)


def test_memory_that_is_used_again_is_free():
    """Not while a graph needs it, nor when it was made in inference mode."""
    f = ResidualFlow(3, 2, hidden=(5, 6))
    x, weight = noise(4, 3).float(), f.matrices[1]
    with torch.inference_mode():
        f.inverse(x)
    a, b = f.inverse(x)[1].sum(), f.inverse(2 * x)[1].sum()
    first = torch.autograd.grad(a, weight, retain_graph=True)
    torch.autograd.grad(b, weight)
    with torch.no_grad():
        f.inverse(3 * x)
    assert torch.equal(torch.autograd.grad(a, weight)[0], first[0])
