"""Residual flows that contract in other norms than the 2-norm."""

import itertools
import math

import pytest
import torch
from helpers import noise, shaken
from torch.func import hessian, jacrev, vmap
from torch.testing import assert_close

from flowcourse.branches import Branch, eliminate, pivots
from flowcourse.contractions import contract
from flowcourse.core import Flow
from flowcourse.kernels_residual import root
from flowcourse.lipschitz import ACTIVATIONS, conjugate, shrunk_between
from flowcourse.residual import ResidualFlow

INF = math.inf
PAIRS = [
    (1.0, 1.0), (INF, INF), (1.0, INF), (INF, 1.0), (1.0, 2.0),
    (2.0, INF), (2.0, 1.0), (INF, 2.0), (1.5, 3.0), (3.0, 3.0), (2.0, 2.0),
]  # fmt: skip
FLOWS = [INF, 1.0, 3.0, (INF, 2.0, 2.0, INF), (1.0, 1.5, INF, 1.0)]


def length(t, p, dim):
    """The p-norm, without overflow."""
    size = t.abs().amax(dim, keepdim=True).clamp(min=1e-300)
    found = torch.linalg.vector_norm(t / size, p, dim, keepdim=True)
    return (size * found).squeeze(dim)


def largest(w, p, q):
    """The norm of matrices from p to q: exact for p = 1 and p = inf, else from below."""
    n = w.shape[-1]
    signs = [*itertools.product((1.0, -1.0), repeat=n)]
    x = torch.cat(
        [
            torch.tensor(signs).double().mT,
            torch.eye(n).double(),
            noise(n, 500),
            torch.linalg.svd(w.flatten(0, -2).double()).Vh.mT,
        ],
        1,
    )
    # for each row the direction in which Hoelder's inequality is one
    rows = w.double().mT
    if p > 1 and p < INF:
        size = rows.abs().amax(-2, keepdim=True).clamp(min=1e-300)
        rows = rows.sign() * (rows / size).abs() ** (conjugate(p) - 1)
    x = torch.cat([x.expand(len(w), *x.shape), rows], -1)
    x = x / length(x, p, -2).clamp(min=1e-300).unsqueeze(-2)
    return length(w.double() @ x, q, -2).amax(-1)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_norm_is_below_its_bound_whatever_the_weights_are(p, q):
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for scale in (0.0, 1e-20, 1e-3, 0.1, 1.0, 1e3, 1e6, 1e20):
            w = (scale * noise(5, 4, 6)).to(dtype)
            w[1, 2], w[2, :, 3] = 0.0, 0.0
            found = shrunk_between(w, p, q, 0.9)
            assert (largest(found, p, q) < 0.9 * (1 + slack)).all()
            if scale <= 1e-3:
                assert_close(found, w, rtol=1e-6, atol=0)
            # these have a formula, and no more than need be is taken
            if scale >= 1e3 and (p == 1 or q == INF):
                assert (largest(found, p, q) > 0.9 * 0.98).all()


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_norm_has_derivatives_everywhere(p, q):
    zero = torch.zeros(1, 3, 4).double()
    for w in (zero, noise(1, 3, 4) / 9, noise(1, 3, 4), 30 * noise(1, 3, 4)):
        w.requires_grad_()
        shrink = lambda w: shrunk_between(w, p, q, 0.9)
        assert torch.autograd.gradcheck(shrink, w)
        assert torch.autograd.gradgradcheck(shrink, w)
    many = noise(5, 3, 4)
    assert_close(vmap(shrink)(many), shrink(many))
    w = noise(3, 4).float()
    w[1] = 0.0
    for scale in (0.0, 1e-30, 1.0, 1e6):
        at = scale * w
        assert jacrev(shrink)(at).isfinite().all()
        assert hessian(lambda w: shrink(w).sum())(at).isfinite().all()


def test_the_bound_comes_close_to_norms_without_a_formula():
    """Of one row, or of one column, both bounds are exact for any norms."""
    for p, q in PAIRS:
        for shape in ((4, 1, 6), (4, 6, 1)):
            w = 100 * noise(*shape)
            found = shrunk_between(w, p, q, 0.9)
            assert (largest(found, p, q) > 0.9 * 0.98).all()


def row_or_column_sums(jacobian, p):
    return jacobian.abs().sum(-1 if p == INF else -2).amax(-1)


@pytest.mark.parametrize("norms", FLOWS)
@pytest.mark.parametrize("cheap", ["inverse", "forward"])
def test_flows_contract_in_their_norm_and_invert(norms, cheap):
    for sd in (0.0, 0.3, 3.0):
        f = ResidualFlow(4, 2, hidden=(6, 5), norms=norms, cheap=cheap)
        f = shaken(f.double(), sd)
        x = 3 * noise(50, 4)
        p = f.norms[0]
        for branch in f.branches():
            j = vmap(jacrev(lambda t: branch.image(t[None])[0]))(x).detach()
            assert (largest(j, p, p) < f.lipschitz).all()
            if p in (1, INF):
                assert (row_or_column_sums(j, p) < f.lipschitz).all()
        z, ladj = f.inverse(x)
        back, other = f(z)
        assert_close(back, x, rtol=1e-12, atol=1e-12)
        assert_close(ladj, -other, rtol=1e-10, atol=1e-10)
        for way in (f.forward, f.inverse):
            j = vmap(jacrev(lambda t: way(t)[0]))(x)
            sign, want = torch.linalg.slogdet(j)
            assert (sign > 0).all()
            assert_close(way(x)[1], want, rtol=1e-9, atol=1e-9)
        if sd == 0:
            assert_close(z, x, rtol=0, atol=0)
            assert_close(ladj, torch.zeros(50).double(), rtol=0, atol=0)
        (ladj.sum() + z.square().sum()).backward()
        assert all(w.grad.isfinite().all() for w in f.parameters())


@pytest.mark.parametrize(
    "norms", [INF, (INF, 1, 1, INF), (1, INF, 1, 1), (1, 2, INF, 1)]
)
def test_each_layer_leads_from_its_norm_to_the_next(norms):
    """Where all units are straight lines, a network of equal weights reaches the bound."""
    f = ResidualFlow(4, 1, hidden=(6, 5), activation="elu", norms=norms)
    with torch.no_grad():
        for w, b in zip(f.matrices, f.biases):
            w.fill_(100.0)
            b.fill_(1e3)
    (branch,) = f.branches()
    x = torch.randn(3, 4)
    sums = row_or_column_sums(branch.jacobian(branch(x)[1]), f.norms[0])
    # from 2 to inf the bound of a matrix of equal numbers is not its norm
    assert (sums > 0.4).all() and (sums < f.lipschitz * (1 + 1e-5)).all()
    if 2 not in f.norms:
        assert (sums > 0.96).all()


def test_a_flow_trains_in_another_norm():
    torch.manual_seed(0)
    for norms in (INF, (1.0, 2.0, 1.0)):
        hidden = (16, 16) if norms == INF else (16,)
        f = Flow(ResidualFlow(2, 3, hidden=hidden, norms=norms))
        x = noise(256, 2).float().sinh() / 2
        optimizer = torch.optim.Adam(f.parameters(), 2e-2)
        before = -f.log_prob(x).mean().item()
        for _ in range(80):
            optimizer.zero_grad()
            (-f.log_prob(x).mean()).backward()
            optimizer.step()
        assert -f.log_prob(x).mean().item() < before - 0.3


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, INF])
def test_elimination_needs_no_pivoting_in_any_norm(p):
    """Random, sparse and negative Jacobians at the bound."""
    for d in (2, 8, 24):
        one, dense = torch.eye(d).double(), noise(100, d, d)
        sparse = dense * (noise(100, d, d, seed=1) > 1.3)
        for j in (dense, sparse, 0.1 * dense - 5 * one):
            # a huge matrix is brought to the bound
            j = shrunk_between(1e4 * j, p, p, 0.97)
            a = (one + j).permute(1, 2, 0).contiguous()
            want = torch.linalg.slogdet(one + j)
            assert (want.sign > 0).all()
            assert_close(pivots(a.clone()), want.logabsdet, atol=1e-12, rtol=0)
            assert_close(eliminate(a), want.logabsdet, atol=1e-12, rtol=0)
            inverse = torch.linalg.inv(one + j).permute(1, 2, 0)
            assert_close(a, inverse, atol=1e-11, rtol=0)


def hubs(d, seed, c, sharp):
    """Units that all look at a few coordinates: contracts in the inf-norm, not in the 2-norm."""
    g = torch.Generator().manual_seed(seed)
    n, kind = 4 * d, ACTIVATIONS["elu"]
    first, last = torch.zeros(n, d).double(), torch.randn(d, n, generator=g)
    hub = torch.randint(0, d // 4, (n,), generator=g)
    signs = 1 - 2 * torch.randint(0, 2, (n,), generator=g).double()
    first[torch.arange(n), hub] = signs
    last = last.double() * (torch.rand(d, n, generator=g) < 1.5 / n)
    last[last.abs().sum(1) == 0, 0] = 1.0
    last = c * last / last.abs().sum(1, keepdim=True)
    shift = 2 * sharp * torch.randn(n, generator=g).double()
    biases = [shift, torch.zeros(d).double()]
    return Branch([first * sharp, last / sharp], biases, kind)


def test_roots_where_only_the_own_norm_shrinks():
    stretched = 0.0
    for d, sharp in ((8, 1.0), (8, 5.0), (24, 100.0), (64, 5.0)):
        for seed in range(2):
            branch = hubs(d, seed, 0.97, sharp)
            y = 5 * noise(50, d, seed=seed)
            for newton in (True, False):
                x = root(y, branch, 0.97, newton, INF)
                assert_close(x + branch.image(x), y, rtol=0, atol=1e-12)
            x = contract(y, branch.image, 0.97, INF)
            assert_close(x + branch.image(x), y, rtol=0, atol=1e-12)
            j = branch.jacobian(branch(x)[1])
            assert row_or_column_sums(j, INF).max() < 0.97 + 1e-12
            found = torch.linalg.matrix_norm(j, 2).max().item()
            stretched = max(stretched, found)
    assert stretched > 2


@pytest.mark.parametrize("norms", [INF, 1.0])
def test_large_events_solve_in_their_norm_with_derivatives(norms):
    """Anderson's search and products, whose transposes contract in the dual norm."""
    f = ResidualFlow(40, 1, hidden=(8,), norms=norms).double().eval()
    shaken(f, 2.0)
    assert f.ladj == "roulette"
    branch, p, found = f.branches()[0], f.norms[0], []
    for newton in (True, False):
        y = noise(5, 40).requires_grad_()
        x = root(y, branch, f.lipschitz, newton, p)
        (g,) = torch.autograd.grad(x.sin().sum(), y)
        found.append((x.detach(), g))
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-10, atol=1e-10)
    many = vmap(lambda y: f.forward(y)[0])(noise(5, 40))
    assert_close(many, f.forward(noise(5, 40))[0], rtol=1e-10, atol=1e-10)


def test_two_everywhere_is_the_default():
    plain = shaken(ResidualFlow(3, hidden=(4, 4)))
    same = ResidualFlow(3, hidden=(4, 4), norms=(2, 2.0, 2, 2))
    same.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3)
    for a, b in zip(same.inverse(x), plain.inverse(x)):
        assert torch.equal(a, b)
    assert "norms" not in repr(same) and same.norms == plain.norms
    assert "norms=inf" in repr(ResidualFlow(2, norms=INF))
    f = ResidualFlow(2, hidden=(4,), norms=(1, 2, 1))
    assert "norms=(1.0, 2.0, 1.0)" in repr(f)


@pytest.mark.parametrize(
    "norms",
    [
        0.5,
        math.nan,
        "2",
        None,
        True,
        -INF,
        (1, 2, 2, INF),
        (2, 2, 2),
        (),
        [],
        (2, 0, 2, 2),
        torch.ones(4),
    ],
)
def test_mistakes_are_named(norms):
    message = "norms: expected a number from 1 to inf, or 4 of them, the first"
    with pytest.raises(ValueError, match=message):
        ResidualFlow(2, norms=norms)


def test_images_take_the_2_norm():
    ResidualFlow((1, 2, 2), hidden=(2,), norms=(2, 2, 2))
    with pytest.raises(ValueError, match="norms: expected 2 for an image"):
        ResidualFlow((1, 2, 2), hidden=(2,), norms=INF)
