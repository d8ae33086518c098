"""A whole solve with its gradient written out, beside the plain form that it must equal."""

import math
from functools import partial

import pytest
import torch
from helpers import noise
from torch.testing import assert_close

from flowcourse.continuous import MLPVelocity
from flowcourse.kernels_continuous import (
    bounded,
    mlp_field,
    solve_mlp,
)
from flowcourse.solver import (
    ERROR,
    STAGES,
    TIMES,
    equal_steps,
    run_steps,
    solve,
    worst,
)


def weights(size, widths, context_dim=0, scale=1.0):
    sizes = [size + 1 + context_dim, *widths, size]
    found = []
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        found.append(scale * noise(b, a, seed=2 * i) / a**0.5)
        found.append(scale * noise(b, seed=2 * i + 1))
    return [t.requires_grad_() for t in found]


def plain(x, context, w, times, tolerance, lengths=None):
    field = mlp_field(tuple(w), context, x.shape[-1])
    state = x, x.new_zeros(len(x))
    if lengths is not None:
        return run_steps(field, state, times[0], lengths)
    return solve(field, state, *times, tolerance)[0]


def test_the_tableau_keeps_its_conditions():
    for c, row in zip(TIMES, STAGES):
        assert math.isclose(sum(row), c, abs_tol=1e-14)
    assert abs(sum(ERROR)) < 1e-14
    b = STAGES[-1]
    for power in range(5):
        moment = sum(w * c**power for w, c in zip(b, TIMES))
        assert math.isclose(moment, 1 / (power + 1), abs_tol=1e-13)


@pytest.mark.parametrize("widths", [(7,), (7, 5)])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7)])
@pytest.mark.parametrize("equal", [True, False])
def test_values_and_gradients_are_those_of_the_plain_form(
    widths, context_dim, times, equal
):
    w = weights(3, widths, context_dim, 1.5)
    x = noise(6, 3, seed=9).requires_grad_()
    context = noise(6, 2, seed=8).requires_grad_() if context_dim else None
    lengths = equal_steps(*times, 5) if equal else None
    leaves = [x, *w] + ([context] if context_dim else [])
    found = []
    for way in (
        lambda: solve_mlp(tuple(w), x, context, *times, 1e-7, lengths)[:2],
        lambda: plain(x, context, w, times, 1e-7, lengths),
    ):
        point, total = way()
        value = (point * noise(6, 3, seed=5)).sum() + (
            total * noise(6, seed=4)
        ).sum()
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        graph = torch.autograd.grad(value, leaves, create_graph=True)
        mixed = sum(
            (t * noise(*t.shape, seed=i)).sum() for i, t in enumerate(graph)
        )
        # the last bias has none
        second = torch.autograd.grad(mixed, leaves, materialize_grads=True)
        found.append([point, total, *first, *graph, *second])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_without_gradients_it_is_the_same():
    w, x = weights(3, (8, 8)), noise(6, 3)
    with_graph = solve_mlp(tuple(w), x, None, 0.0, 1.0, 1e-6)
    with torch.no_grad():
        without = solve_mlp(tuple(w), x, None, 0.0, 1.0, 1e-6)
    assert torch.equal(with_graph[0], without[0])
    assert torch.equal(with_graph[1], without[1])
    assert with_graph[2] == without[2]


@pytest.mark.parametrize("widths", [(7,), (7, 5)])
def test_points_alone_are_those_of_a_field_without_a_divergence(widths):
    w, x = weights(3, widths, 2), noise(6, 3).requires_grad_()
    context = noise(6, 2)
    field = mlp_field(tuple(w), context, 3)
    (want,), pace = solve(lambda t, y: field(t, y)[:1], (x,), 0.0, 1.0, 1e-7)
    point, total, count = solve_mlp(
        tuple(w), x, context, 0.0, 1.0, 1e-7, rated=False
    )
    assert total is None and count == pace.evaluations
    assert_close(point, want, rtol=1e-10, atol=1e-10)
    ways = [
        torch.autograd.grad(
            end.square().sum(), [x, *w], retain_graph=True, create_graph=True
        )
        for end in (point, want)
    ]
    for way in [
        torch.autograd.grad(end.square().sum(), [x, *w], retain_graph=True)
        for end in (point, want)
    ] + ways:
        for a, b in zip(way, ways[1], strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_part_of_the_leaves_may_need_no_gradient():
    w, x = weights(3, (8, 8)), noise(6, 3)
    w = [t.detach() for t in w]
    w[2].requires_grad_()
    point, _, _ = solve_mlp(tuple(w), x, None, 0.0, 1.0, 1e-6)
    grads = torch.autograd.grad(point.sum(), w[2])  # nothing asks for the sum
    ends = plain(x, None, w, (0.0, 1.0), 1e-6)
    assert_close(grads, torch.autograd.grad(ends[0].sum(), w[2]))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_an_error_is_about_the_tolerance(tolerance):
    w = [t.detach() for t in weights(3, (8, 8), scale=2.0)]
    x = 2 * noise(40, 3)
    true = solve_mlp(tuple(w), x, None, 0.0, 1.0, 1e-12)
    found = solve_mlp(tuple(w), x, None, 0.0, 1.0, tolerance)
    for a, b in zip(found[:2], true[:2]):
        assert ((a - b).abs() / (1 + b.abs())).max() < 30 * tolerance
    assert found[2] < true[2]


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("seed", range(4))
def test_an_easy_row_is_as_right_in_bad_company(seed, tolerance):
    """A row alone, and among 63 that need shorter steps."""
    w = tuple(t.detach() for t in weights(2, (16, 16), scale=2.0))
    run = partial(solve_mlp, w, context=None, start=0.0, end=1.0)
    easy = noise(1, 2, seed=seed)
    hard = 3 * noise(63, 2, seed=seed + 1)
    true = run(x=easy, tolerance=1e-10)[0]
    alone = run(x=easy, tolerance=tolerance)[0]
    among = run(x=torch.cat([easy, hard]), tolerance=tolerance)[0][:1]
    own = (alone - true).abs().max()
    assert (among - alone).abs().max() <= 10 * own


def test_the_steps_agree_with_torchdiffeq():
    from torchdiffeq import odeint

    w = tuple(t.detach() for t in weights(3, (8, 8), scale=1.5))
    x = noise(6, 3)
    field = mlp_field(w, None, 3)
    theirs = odeint(
        lambda t, state: field(t, state[0]),
        (x, x.new_zeros(6)),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        rtol=1e-10,
        atol=1e-10,
    )
    ours = solve_mlp(w, x, None, 0.0, 1.0, 1e-10)
    for a, b in zip(ours[:2], theirs):
        assert_close(a, b[-1], rtol=1e-8, atol=1e-8)


def test_rows_that_are_not_finite_are_not_judged():
    x = torch.tensor([[1.0], [math.nan]], dtype=torch.float64)
    assert worst([x], (x,), 0.5) == 1.0
    assert worst([x / 0], (torch.ones_like(x),), 1.0) == math.inf
    w = tuple(t.detach() for t in weights(2, (8, 8)))
    rows = torch.cat([noise(3, 2), torch.full((1, 2), math.nan).double()])
    found, _, count = solve_mlp(w, rows, None, 0.0, 1.0, 1e-6)
    alone, _, same = solve_mlp(w, rows[:3], None, 0.0, 1.0, 1e-6)
    assert count == same
    assert_close(found[:3], alone)
    assert found[3].isnan().all()


def test_a_solve_that_never_ends_is_given_up():
    with pytest.raises(RuntimeError, match="too stiff"):
        solve(
            lambda t, x: ((1e6 * x).sin() * 1e5,),
            (torch.ones(2, 1),),
            0.0,
            1.0,
        )


def of_norm(n):
    """A matrix of a Frobenius norm."""
    matrix = noise(3, 4)
    return (matrix * n / matrix.norm()).requires_grad_()


def in_a_transform(matrix, bound):
    """The bounded matrix where no branch may follow the data."""
    return torch.func.vmap(bounded, (0, None))(matrix[None], bound)[0]


def test_a_matrix_of_half_the_bound_stays_as_it_is():
    small = of_norm(0.999)
    assert bounded(small, 2.0) is small
    assert_close(in_a_transform(small, 2.0), small)
    nothing = torch.zeros(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(in_a_transform(nothing, 2.0).sum(), nothing)
    assert_close(g, torch.ones(3, 4))


@pytest.mark.parametrize("n", [1.001, 1.5, 4.0, 1e4])
def test_a_larger_matrix_comes_below_the_bound(n):
    matrix = of_norm(n)
    found = bounded(matrix, 2.0)
    assert 1 < found.norm() <= 2
    assert_close(found / found.norm(), matrix / n)
    assert_close(in_a_transform(matrix, 2.0), found)
    look = dict(atol=1e-5 / n, rtol=1e-4) if n > 100 else {}
    assert torch.autograd.gradcheck(lambda m: bounded(m, 2.0), matrix, **look)


def test_the_parts_of_the_bound_meet_with_their_slope_and_curvature():
    n = torch.tensor([1 - 1e-7, 1 + 1e-7], dtype=torch.float64)
    n.requires_grad_()
    values = torch.stack([bounded(each, 2.0) for each in n])
    (slope,) = torch.autograd.grad(values.sum(), n, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), n)
    assert_close(values, n.detach(), rtol=0, atol=1e-12)
    assert_close(slope, torch.ones_like(n), rtol=0, atol=1e-10)
    assert_close(curvature, torch.zeros_like(n), rtol=0, atol=1e-5)


def test_a_matrix_that_is_not_finite_says_so():
    assert bounded(torch.full((2, 2), math.nan), 2.0).isnan().all()


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_velocity_alone_is_that_beside_its_divergence(context_dim):
    torch.manual_seed(0)
    v = MLPVelocity(3, hidden=(7, 5), context_dim=context_dim, bound=1.5)
    v = v.double()
    for p in v.parameters():
        torch.nn.init.normal_(p)
    x, context = noise(6, 3), noise(6, 2) if context_dim else None
    assert_close(v(0.3, x, context), v.with_divergence(0.3, x, context)[0])
    each = torch.linspace(0, 1, 6, dtype=x.dtype)[:, None]
    for i, row in enumerate(v(each, x, context)):
        c = None if context is None else context[i : i + 1]
        assert_close(row, v(each[i, 0], x[i : i + 1], c)[0])
