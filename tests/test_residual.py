"""Residual flows: what the contract does not ask of every bijection."""

import copy
import math

import pytest
import torch
from helpers import check_beside_another_device, noise, shaken
from torch.func import functional_call, hessian, jacrev, vmap
from torch.testing import assert_close

from flowcourse.contractions import rounds
from flowcourse.core import Compose, Flow, Inverse
from flowcourse.kernels_residual import gathered, reached, root, trace_series
from flowcourse.lipschitz import (
    ACTIVATIONS,
    folded,
    shrinkage,
    shrunk,
    shrunk_filters,
)
from flowcourse.planar import Planar
from flowcourse.quadrature import total_mass
from flowcourse.residual import ResidualFlow


def trained(dim=4, layers=3, steps=60, **options):
    """A flow in float64 that has learnt to squeeze and to stretch."""
    torch.manual_seed(0)
    f = Flow(ResidualFlow(dim, layers, hidden=(16, 16), **options)).double()
    x = noise(256, dim).sinh() / 2
    optimizer = torch.optim.Adam(f.parameters(), 2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-f.log_prob(x).mean()).backward()
        optimizer.step()
    return f.bijection.eval()


def shrunk_one(w, bound=0.9):
    return shrunk(w, bound=bound)[0]


def test_the_norm_is_below_its_bound_whatever_the_weights_are():
    for shape in ((64, 8), (8, 64), (32, 32), (1, 5)):
        for dtype in (torch.float64, torch.float32):
            for scale in (0.0, 1e-20, 1e-3, 0.1, 1.0, 1e3, 1e10):
                w = scale * noise(7, *shape).to(dtype)
                found = torch.linalg.matrix_norm(shrunk_one(w).double(), 2)
                slack = 1e-12 if dtype == torch.float64 else 1e-5
                assert (found < 0.9 * (1 + slack)).all()
                given = torch.linalg.matrix_norm(w.double(), 2)
                close = given.clamp(max=0.9) * min(shape) ** (-1 / 128)
                assert (found >= close * 2 ** (-1 / 128) - 1e-6).all()
                below = given < 0.8
                assert_close(shrunk_one(w)[below], w[below])


def test_the_norm_has_derivatives_everywhere():
    for w in (noise(1, 3, 4), 0 * noise(1, 3, 4), torch.eye(3)[None].double()):
        w.requires_grad_()
        assert torch.autograd.gradcheck(shrunk_one, w)
        assert torch.autograd.gradgradcheck(shrunk_one, w)


def test_the_gradient_of_the_norm_by_hand():
    """Several shapes at once, small, large and orthogonal matrices among them."""
    scale = torch.tensor([0.0, 1e-3, 0.9, 1.0, 1e5]).double()[:, None, None]
    given = [scale * noise(5, *s) for s in ((6, 3), (3, 6), (6, 6), (2, 3))]
    given.append(torch.linalg.qr(given[2]).Q)
    g = [noise(*w.shape, seed=3) for w in given]
    found = []
    for run in (
        lambda ws: shrunk(*ws, bound=0.9),
        lambda ws: [w * shrinkage(w, 0.9) for w in ws],
    ):
        leaves = [w.detach().requires_grad_() for w in given]
        out = run(leaves)
        found.append([*out, *torch.autograd.grad(out, leaves, g)])
    for quick, slow in zip(*found):
        assert_close(quick, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ACTIVATIONS.values())
def test_no_activation_is_steeper_than_one(kind):
    u = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    u.requires_grad_()
    value, slope = kind.both(u)
    assert slope.abs().max() <= kind.steepest
    assert_close(torch.autograd.grad(value.sum(), u)[0], slope)
    with torch.no_grad():
        filled = kind.fill(u, out=torch.empty_like(u))
        for quick, slow in ((filled, value), (kind.slope(u), slope)):
            assert_close(quick, slow, rtol=1e-12, atol=1e-12)
    if slope.requires_grad:
        (wanted,) = torch.autograd.grad(slope.sum(), u)
        found = kind.bend(*(t.detach() for t in (u, value, slope)))
        off = u.detach() != 0
        assert_close(found[off], wanted[off], rtol=1e-12, atol=1e-12)


def test_betas_are_folded_into_the_matrices():
    for kind in ACTIVATIONS.values():
        betas = noise(1, 2).exp()
        w1, w2, w3 = noise(1, 5, 3), noise(1, 4, 5), noise(1, 3, 4)
        biases = [noise(1, 5), noise(1, 4), noise(1, 3)]
        x, shift = noise(7, 3), noise(1, 7, 5)
        h = x @ w1[0].mT + biases[0] + shift[0]
        for beta, w, b in zip(betas[0], (w2, w3), biases[1:]):
            h = kind.value(beta * h) / (beta * kind.steepest) @ w[0].mT + b
        shift, *weights = folded(kind, betas, shift, (w1, w2, w3), biases)
        (branch,) = gathered(shift, kind, *weights[0], *weights[1])
        assert_close(branch.image(x), h)
        assert_close(branch(x)[0], h)


@pytest.mark.parametrize("cheap", ["inverse", "forward"])
def test_the_bound_holds_and_is_nearly_reached(cheap):
    f = shaken(ResidualFlow(3, 2, cheap=cheap, hidden=(8, 8)).double(), 3.0)
    z = 3 * noise(200, 3)
    for branch in f.branches():
        jacobian = branch.jacobian(branch(z)[1])
        found = torch.linalg.matrix_norm(jacobian, 2)
        assert found.max() < f.lipschitz
        assert_close(jacobian, vmap(jacrev(lambda t: branch(t)[0]))(z))
        v = noise(5, 200, 3)
        rows = torch.einsum("pni,nij->pnj", v, jacobian)
        assert_close(branch.pull(v, branch(z)[1]), rows)


@pytest.mark.parametrize("cheap", ["inverse", "forward"])
def test_trained_blocks_invert_with_right_derivatives(cheap):
    f = trained(cheap="inverse")
    f.cheap = cheap
    x = 4 * noise(64, 4)
    z, ladj = f.inverse(x)
    back, other = f(z)
    assert_close(back, x, rtol=1e-12, atol=1e-12)
    assert_close(ladj, -other, rtol=1e-10, atol=1e-10)
    for way in (f.forward, f.inverse):
        jacobian = vmap(jacrev(lambda t: way(t)[0]))(x)
        want = torch.linalg.slogdet(jacobian).logabsdet
        assert_close(way(x)[1], want, rtol=1e-8, atol=1e-8)


def test_second_derivatives_of_the_root():
    f = trained(2)

    def value(x):
        z, ladj = f(x)
        return z.sin().sum() + ladj

    x = noise(2)
    found = hessian(value)(x)
    assert_close(found, jacrev(jacrev(value))(x), rtol=1e-8, atol=1e-8)
    step = 1e-5
    for i in range(2):
        e = step * torch.eye(2).double()[i]
        slopes = [jacrev(value)(x + s * e) for s in (1, -1)]
        assert_close(
            found[i], (slopes[0] - slopes[1]) / 2 / step, rtol=1e-5, atol=1e-5
        )


def test_steep_blocks_that_newton_alone_does_not_solve():
    """Wild biases and sharp units: the guard keeps the contraction."""
    f = ResidualFlow(2, 1, hidden=(16, 16), lipschitz=0.99).double()
    shaken(f, 3.0, seed=3)
    with torch.no_grad():
        f.raw_betas.fill_(200.0)
        branch = f.branches()[0]
        y = 5 * noise(2000, 2)
        x = root(y, branch, f.lipschitz)
        assert_close(x + branch(x)[0], y, rtol=0, atol=1e-12)


def test_a_row_is_solved_alike_in_any_company():
    f = trained()
    x = 3 * noise(64, 4)
    together = f(x)
    for i in range(8):
        for a, b in zip(f(x[i]), together):
            assert_close(a, b[i], rtol=1e-12, atol=1e-12)


def test_fixed_steps_find_what_chosen_ones_find():
    f = trained()
    x = 3 * noise(64, 4)
    for a, b in zip(vmap(f)(x), f(x)):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_mass_in_the_plane_and_with_a_context():
    torch.manual_seed(0)
    f = Flow(ResidualFlow(2, 2, hidden=(8, 8), context_dim=2)).double()
    shaken(f, 1.0)
    c = noise(2)
    mass = total_mass(lambda x: f.log_prob(x, c), dim=2, dtype=torch.float64)
    assert abs(mass - 1) < 1e-3
    x = noise(4, 2)
    assert not torch.allclose(f.log_prob(x, c), f.log_prob(x, -c))


def test_a_chain_says_whether_it_is_estimated():
    exact, guess = ResidualFlow(3), ResidualFlow(3, ladj="roulette")
    assert guess.estimated and not exact.estimated
    assert not Planar(3).estimated
    assert Compose(Planar(3), guess).estimated
    assert Inverse(guess).estimated and not Compose(exact).estimated
    assert ResidualFlow(65, hidden=(4,)).ladj == "roulette"
    assert exact.bias_bound() == guess.bias_bound() == 0


def series(f, terms):
    """The same flow, estimated by a series."""
    g = copy.deepcopy(f)
    g.ladj, g.terms = "series", terms
    return g


def test_the_series_is_off_by_no_more_than_its_bound():
    f = trained(2, lipschitz=0.8)
    x = 2 * noise(32, 2)
    for terms in (1, 2, 4, 8, 16):
        g = series(f, terms)
        # +-1 for both coordinates, and for one of them: the trace exactly
        probes = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
        g.probes, g.fixed_probes = 2, probes
        off = (g.inverse(x)[1] - f.inverse(x)[1]).abs().max()
        assert off <= g.bias_bound()
    assert off < 1e-3


def test_roulette_is_unbiased_in_value_and_gradient():
    """Means of 10,000 draws within three standard errors, in four dimensions."""
    f = trained(4, 1, lipschitz=0.8)
    g = torch.Generator().manual_seed(0)
    x, n, chunk = noise(1, 4)[0], 10_000, 100
    branch, stop = f.branches()[0], f.stop
    slopes = branch(x[None])[1]
    values, gradients = [], []
    weight = f.matrices[1]
    for _ in range(n // chunk):
        # each draw has an end and a probe of its own
        chances = torch.rand(chunk, generator=g).double()
        ends = (chances.log() / math.log(1 - stop)).long()
        v = 1 - 2.0 * torch.randint(0, 2, (chunk, 1, 4), generator=g).double()
        total = sum(
            trace_series(
                branch,
                slopes,
                v[ends == extra],
                reached(2, int(extra), stop),
                True,
            ).sum()
            for extra in ends.unique()
        )
        mean = total / chunk
        values.append(mean.detach())
        (gradient,) = torch.autograd.grad(mean, weight, retain_graph=True)
        gradients.append(gradient.flatten())
    exact = f.inverse(x)[1]
    (want,) = torch.autograd.grad(exact, weight)
    found = []
    for draws, truth in (
        (torch.stack(values)[:, None], exact.detach()[None]),
        (torch.stack(gradients), want.flatten()),
    ):
        error = draws.std(0) / len(draws) ** 0.5
        found.append((draws.mean(0) - truth) / error.clamp(min=1e-12))
    value, gradient = found
    assert value.abs() < 3
    # of hundreds of numbers, no more leave three errors than chance has
    assert (gradient.abs() < 3).double().mean() > 0.98
    assert gradient.square().mean() < 2


def test_the_variance_of_roulette_is_finite():
    """For any bound: the weights of the terms grow more slowly than the terms shrink."""
    for c in (0.1, 0.5, 0.9, 0.97, 0.999):
        f = ResidualFlow(40, 1, hidden=(4,), lipschitz=c)
        assert f.ladj == "roulette"
        assert c**2 < 1 - f.stop
        # of the worst Jacobian, c times the identity: sum over the ends
        second = reach = total = 0.0
        for k in range(1, 200_000):
            weight = (1 - f.stop) ** -max(k - f.terms, 0)
            total += (-1) ** (k + 1) * c**k / k * weight
            if k >= f.terms:
                chance = f.stop * (1 - f.stop) ** (k - f.terms)
                second, reach = second + chance * total**2, reach + chance
            if reach > 1 - 1e-13:
                break
        assert abs(second**0.5 / math.log1p(c) - 1) < 0.2


@pytest.mark.parametrize("shape", [40, (1, 6, 6)])
def test_in_eval_mode_roulette_is_exact_where_that_is_cheaper(shape):
    f = ResidualFlow(shape, 2, hidden=(6,), ladj="roulette").double()
    f = shaken(f, 1.0)
    x = noise(5, *f.event_shape)
    assert f.train().estimated and not f.eval().estimated
    z, ladj = f.inverse(x)
    assert f.bias_bound() == 0
    f.ladj = "exact"
    want = f.inverse(x)
    assert torch.equal(z, want[0]) and torch.equal(ladj, want[1])
    back = f.forward(z)[1]
    f.ladj = "roulette"
    assert_close(f.forward(z)[1], back)
    # a generator asks for the estimate
    one, other = (
        f.inverse(x, generator=torch.Generator().manual_seed(seed))[1]
        for seed in (1, 2)
    )
    assert not torch.equal(one, other) and not torch.equal(one, ladj)
    assert f.with_error(x)[2].min() > 0


def test_in_eval_mode_a_random_series_is_a_long_one_in_many_dimensions():
    options = {"terms": 2, "lipschitz": 0.2, "hidden": (4,)}
    f = ResidualFlow(12, 2, ladj="roulette", **options)
    f = shaken(f.double(), 1.0).eval()
    x, length = noise(16, 12), 2 + rounds(0.2, 1e-4)
    assert length < 12 and f.estimated
    found, same = f.inverse(x)[1], f.inverse(x)[1]
    assert torch.equal(found, same)
    t, want = x, 0.0
    for branch in f.branches():
        image, slopes = branch(t)
        v = f.fixed_probes.unsqueeze(1).expand(1, 16, 12)
        want = want + trace_series(branch, slopes, v, [1.0] * length)[0]
        t = t + image
    assert_close(found, want)
    assert 0 < f.bias_bound() < 1e-4 and f.train().bias_bound() == 0


def test_tangents_of_images_in_parts(monkeypatch):
    f = shaken(ResidualFlow((2, 4, 3), 2, hidden=(4, 4)).double(), 1.0)
    x = noise(5, 2, 4, 3)
    whole = f.inverse(x)[1]
    for at_once in (1, 1000):
        monkeypatch.setattr("flowcourse.branches.AT_ONCE", at_once)
        assert_close(f.inverse(x)[1], whole)
        assert f.inverse(x[:0])[1].shape == (0,)


def saved_bytes(call):
    """What autograd keeps for the way back, each storage once."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return sum(held.values()), result


def test_a_neumann_gradient_keeps_little():
    """It does not grow with the number of terms, and the value is the same."""
    f = ResidualFlow(64, 1, hidden=(32, 32), ladj="series")
    branch, x = shaken(f, 0.3).branches()[0], torch.randn(128, 64)
    slopes, v = branch(x)[1], torch.randn(1, 128, 64).sign()
    kept = {}
    for terms in (5, 20):
        for neumann in (True, False):
            kept[terms, neumann], _alive = saved_bytes(
                lambda t=terms, n=neumann: trace_series(
                    branch, slopes, v, [1.0] * t, n
                )
            )
    assert kept[20, True] == kept[5, True]
    assert kept[20, False] > 3 * kept[5, False]
    assert kept[20, False] > 10 * kept[20, True]


def test_estimates_follow_the_generator_and_say_their_error():
    f = trained(4)
    f.ladj, f.terms = "roulette", 4
    f.fixed_probes = torch.ones(1, 4).double()
    x = noise(16, 4)
    one, two = (
        f.inverse(x, generator=torch.Generator().manual_seed(1))[1]
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, f.inverse(x, generator=torch.Generator())[1])
    assert torch.equal(f.inverse(x)[1], f.inverse(x)[1])
    z, mean, error = f.with_error(
        x, probes=200, generator=torch.Generator().manual_seed(2)
    )
    f.ladj = "exact"
    assert_close(z, f.inverse(x)[0])
    off = (mean - f.inverse(x)[1]) / error
    assert off.abs().max() < 5 and off.square().mean() < 3
    assert f.with_error(x)[2].abs().max() == 0


def test_an_estimated_flow_trains():
    torch.manual_seed(0)
    f = Flow(ResidualFlow(3, 2, hidden=(16, 16), ladj="roulette"))
    x = torch.randn(512, 3) * torch.tensor([0.5, 1.0, 1.8])
    optimizer = torch.optim.Adam(f.parameters(), 1e-2)
    before = -f.log_prob(x).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        (-f.log_prob(x).mean()).backward()
        optimizer.step()
    f.bijection.ladj = "exact"
    entropy = 1.5 * math.log(2 * math.pi * math.e) + math.log(0.9)
    loss = -f.log_prob(x).mean().item()
    assert loss < entropy + 0.12 < before


def test_gradients_of_parameters_under_functional_call():
    f = trained(2, 1)
    theta = dict(f.named_parameters())
    x = noise(5, 2)

    def loss(theta):
        z, ladj = functional_call(f, theta, (x,))
        return (z.square().sum(-1) - ladj).mean()

    found = torch.func.grad(loss)(theta)
    want = torch.autograd.grad(loss(theta), list(theta.values()))
    for a, b in zip(found.values(), want):
        assert_close(a, b, rtol=1e-8, atol=1e-10)


def dense(filters, height, width):
    """The matrix of a convolution with zeros around the image."""
    n = filters.shape[1]
    one = torch.eye(n * height * width).to(filters)
    one = one.view(-1, n, height, width)
    padding = filters.shape[-1] // 2
    return torch.conv2d(one, filters, padding=padding).flatten(1).mT


@pytest.mark.parametrize("width", [1, 3, 5])
def test_the_norm_of_filters_is_below_its_bound(width):
    """Small images, one narrower than the filter, and one that takes the coarse grid."""
    for size in ((1, 4), (2, 3), (6, 5), (21, 17)):
        for scale in (0.0, 1e-3, 0.3, 1e4):
            w = scale * noise(2, 3, 2, width, width)
            small = shrunk_filters(w, size, 0.9)
            norms = [
                torch.linalg.matrix_norm(dense(t, *size), 2) for t in small
            ]
            given = [torch.linalg.matrix_norm(dense(t, *size), 2) for t in w]
            for found, norm in zip(norms, given):
                assert found < 0.9 * (1 + 1e-12)
                # no more is taken than the slack says, and the borders
                assert found >= min(norm, 0.9) * 0.3
            if scale == 1e-3:
                assert_close(small, w)


def image_flow(**options):
    options = {"hidden": (4, 5), "lipschitz": 0.9} | options
    return shaken(ResidualFlow((2, 3, 4), 2, **options).double(), 1.0).eval()


@pytest.mark.parametrize("cheap", ["inverse", "forward"])
def test_images(cheap):
    f = image_flow(cheap=cheap, context_dim=2)
    x, c = noise(3, 5, 2, 3, 4), noise(5, 2)
    for branch in f.branches(c):
        jacobian = branch.jacobian(branch(x[0].flatten(1))[1])
        assert torch.linalg.matrix_norm(jacobian, 2).max() < f.lipschitz
    z, ladj = f.inverse(x, c)
    back, other = f(z, c)
    assert z.shape == x.shape and ladj.shape == (3, 5)
    assert_close(back, x, rtol=1e-12, atol=1e-12)
    assert_close(ladj, -other, rtol=1e-10, atol=1e-10)
    jacobian = vmap(jacrev(lambda x, c: f.inverse(x, c)[0].flatten()))
    want = torch.linalg.slogdet(jacobian(x[0], c).flatten(2)).logabsdet
    assert_close(ladj[0], want, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(ladj, f.inverse(x, -c)[1])


def test_the_root_of_large_events_and_its_derivatives():
    """Anderson's search and Newton's, with the same first and second derivatives."""
    f = image_flow(hidden=(4,))
    branch, y = f.branches()[0], noise(6, 24)
    found = []
    for newton in (True, False):
        t = y.clone().requires_grad_()
        x = root(t, branch, f.lipschitz, newton)
        leaves = [t, branch.matrices[0]]
        g = torch.autograd.grad(x.sin().sum(), leaves, create_graph=True)
        gg = torch.autograd.grad(sum(p.square().sum() for p in g), leaves)
        found.append((x, *g, *gg))
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-9, atol=1e-9)
    still = branch.detached()
    many = vmap(lambda y: root(y[None], still, f.lipschitz, False)[0])(y)
    assert_close(many, found[0][0].detach(), rtol=1e-9, atol=1e-12)
    (alone,) = root(y[2:3], still, f.lipschitz, False)
    assert_close(alone, found[1][0][2].detach(), rtol=0, atol=1e-13)


def test_large_events_train_and_come_back():
    torch.manual_seed(0)
    f = Flow(ResidualFlow((1, 6, 6), 2, hidden=(4,), lipschitz=0.9))
    assert f.bijection.ladj == "roulette"
    x = torch.randn(64, 1, 6, 6).cumsum(-1) / 2
    optimizer = torch.optim.Adam(f.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (-f.log_prob(x).mean()).backward()
        optimizer.step()
    z, ladj = f.bijection.inverse(x)
    assert_close(f.bijection(z)[0], x, rtol=1e-5, atol=1e-5)
    z, ladj, error = f.bijection.with_error(x, probes=64)
    f.bijection.ladj = "exact"
    off = (ladj - f.bijection.inverse(x)[1]) / error
    assert off.abs().max() < 5 and off.square().mean() < 3
    assert f.eval().sample((3,)).shape == (3, 1, 6, 6)


@pytest.mark.parametrize("cheap", ["inverse", "forward"])
def test_it_runs_beside_another_default_device(cheap):
    check_beside_another_device(
        lambda: ResidualFlow(3, 2, context_dim=2, cheap=cheap, hidden=(8,)), 2
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lipschitz": 1.0}, "lipschitz: expected a number below 1, got 1.0"),
        ({"lipschitz": 0.0}, "lipschitz: expected a finite number above 0"),
        ({"activation": "relu"}, "activation: expected one of 'lipswish'"),
        ({"cheap": "both"}, "cheap: expected one of 'inverse', 'forward'"),
        ({"ladj": "guess"}, "ladj: expected one of 'exact'"),
        ({"layers": 0}, "layers: expected a whole number of at least 1"),
        ({"hidden": ()}, "hidden: expected positive integers"),
        ({"kernel_size": 2}, "kernel_size: expected an odd number, got 2"),
        ({"event_shape": (2, 3)}, r"event_shape: expected a size or \(chan"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualFlow(**{"event_shape": 2, **options})
