"""Continuous flows: what the contract does not ask of every bijection."""

import copy
import math
import sys

import pytest
import torch
from helpers import check_beside_another_device, noise, shaken
from torch import nn
from torch.testing import assert_close

from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.objectives import MaximumLikelihood
from flowcourse.quadrature import total_mass
from flowcourse.trainer import fit


def flow_of(dim=3, hidden=(8, 8), context_dim=0, sd=0.7, **options):
    """A continuous flow in float64 with noise on its parameters."""
    v = MLPVelocity(dim, hidden=hidden, context_dim=context_dim)
    return shaken(Continuous(v, **options).double(), sd)


class Linear(nn.Module):
    """The velocity `A x`."""

    dim, context_dim = 3, 0

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(0.7 * noise(3, 3))

    def forward(self, t, x):
        return x @ self.A.mT


class Net(nn.Module):
    """A network of one's own."""

    def __init__(self, size=3, context_dim=0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(size + 1 + context_dim, 8), nn.SiLU(), nn.Linear(8, size)
        )

    def forward(self, t, x, *context):
        return self.net(torch.cat([x, t.expand(len(x), 1), *context], -1))


def test_a_linear_velocity_is_the_matrix_exponential():
    f = Continuous(Linear(), tolerance=1e-11)
    z = noise(5, 3)
    x, ladj = f(z)
    assert_close(x, z @ torch.matrix_exp(f.velocity.A).mT, rtol=1e-9, atol=1e-9)
    assert_close(ladj, f.velocity.A.trace().expand(5), rtol=1e-9, atol=1e-9)
    back, lost = f.inverse(x)
    assert_close(back, z, rtol=1e-9, atol=1e-9)
    assert_close(lost, -ladj, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden", [(8,), (8, 5)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_divergence_is_the_trace_of_autograds_jacobian(hidden, context_dim):
    v = shaken(
        MLPVelocity(4, hidden=hidden, context_dim=context_dim).double(), 2.0
    )
    x = noise(6, 4)
    context = noise(6, 2) if context_dim else None
    _, divergence = v.with_divergence(0.3, x, context)
    for i in range(6):
        c = None if context is None else context[i : i + 1]
        J = torch.autograd.functional.jacobian(
            lambda y, c=c: v(0.3, y[None], c)[0], x[i]
        )
        assert_close(divergence[i], J.trace(), rtol=1e-12, atol=1e-12)


def test_no_matrix_is_larger_than_the_bound():
    v = shaken(MLPVelocity(3, hidden=(8, 8), bound=2.0).double(), 50.0)
    assert all(matrix.norm() <= 2 for matrix in v.weights()[::2])
    small = shaken(MLPVelocity(3, hidden=(8, 8), bound=1e6).double(), 1.0)
    assert_close(small.weights()[2], small.layers[1].weight)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_the_ladj_is_that_of_autograd(way, context_dim):
    f = flow_of(context_dim=context_dim, tolerance=1e-11)
    x, context = noise(4, 3), noise(4, 2) if context_dim else None
    _, ladj = getattr(f, way)(x, context)
    for i in range(4):
        c = None if context is None else context[i]
        J = torch.autograd.functional.jacobian(
            lambda y, c=c: getattr(f, way)(y, c)[0], x[i]
        )
        assert_close(ladj[i], J.slogdet().logabsdet, rtol=1e-8, atol=1e-8)


def test_both_ways_to_a_divergence_agree():
    closed = flow_of(context_dim=2, adaptive=False, steps=12)

    class Hidden(nn.Module):
        """The same velocity, which does not tell its divergence."""

        def __init__(self):
            super().__init__()
            self.inner = closed.velocity

        def forward(self, t, x, context):
            return self.inner(t, x, context)

    tangents = Continuous(Hidden(), 3, 2, adaptive=False, steps=12)
    z, context = noise(4, 3).requires_grad_(), noise(4, 2)
    found = []
    for f in (closed, tangents):
        x, ladj = f(z, context)
        value = x.square().sum() + ladj.square().sum()
        grads = torch.autograd.grad(
            value, [z, *closed.parameters()], create_graph=True
        )
        total = sum(g.square().sum() for g in grads)
        found.append([x, ladj, *grads, *torch.autograd.grad(total, z)])
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "own"])
def test_transforms_compile_and_forward_mode_take_equal_steps(kind):
    if kind == "mlp":
        f = flow_of(steps=6)
    else:
        f = Continuous(Net().double(), 3, steps=6)
    equal = copy.deepcopy(f)
    equal.adaptive = False
    z = noise(4, 3)
    want, ladj = equal(z)
    vmapped = torch.vmap(f)(z)
    assert_close(vmapped, (want, ladj), rtol=1e-9, atol=1e-9)
    J = torch.func.vmap(torch.func.jacrev(lambda y: f(y)[0]))(z)
    for row, slope in zip(z, J):
        plain = torch.autograd.functional.jacobian(lambda y: equal(y)[0], row)
        assert_close(slope, plain, rtol=1e-9, atol=1e-9)
    H = torch.func.hessian(lambda y: f(y)[1])(z[0])
    assert_close(H, H.mT, rtol=1e-9, atol=1e-9)
    _, carried = torch.func.jvp(lambda y: f(y)[1], (z[0],), (z[1],))
    slope = torch.func.grad(lambda y: f(y)[1])(z[0])
    assert_close(carried, slope @ z[1], rtol=1e-9, atol=1e-9)


def test_it_compiles():
    f = flow_of(2, (4,), steps=2)
    equal = copy.deepcopy(f)
    equal.adaptive = False
    z = noise(3, 2)
    torch._dynamo.reset()
    run = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(z), equal(z)):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise_of", ["rademacher", "gaussian"])
def test_an_estimate_is_unbiased_and_knows_its_error(noise_of):
    f = flow_of(4, divergence="hutchinson", noise=noise_of, tolerance=1e-7)
    exact = Continuous(f.velocity, tolerance=1e-7)
    x = noise(1, 4).expand(2000, 4)
    g = torch.Generator().manual_seed(3)
    _, ladj = f.inverse(x, generator=g)
    _, true = exact.inverse(x[:1])
    error = ladj.std() / len(x) ** 0.5
    assert error > 0 and (ladj.mean() - true).abs() < 4 * error
    # and of a gradient
    p = f.velocity.layers[-1].weight
    (estimate,) = torch.autograd.grad(ladj.mean(), p)
    (slope,) = torch.autograd.grad(true.sum(), p)
    assert_close(
        estimate, slope, rtol=0, atol=0.1 * float(slope.abs().max() + 1)
    )
    points, mean, stated = f.with_error(x[:200], probes=8, generator=g)
    assert_close(points, exact.inverse(x[:200])[0], rtol=1e-5, atol=1e-5)
    pull = (mean - true) / stated
    assert 0.7 < pull.std() < 1.6
    assert exact.with_error(x[:2])[2].abs().max() == 0
    assert f.estimated and not exact.estimated


def test_a_generator_decides_and_eval_mode_repeats_itself():
    f = flow_of(4, divergence="hutchinson")
    x = noise(5, 4)
    a, b = (
        f.inverse(x, generator=torch.Generator().manual_seed(s))[1]
        for s in (1, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, f.inverse(x)[1])
    f.eval()
    assert torch.equal(f.inverse(x)[1], f.inverse(x)[1])


def test_the_density_has_mass_one():
    f = flow_of(2, (8, 8), sd=0.3, tolerance=1e-6)
    flow = Flow(f).double()
    with torch.no_grad():
        mass = total_mass(
            flow.log_prob, 2, max_evals=300_000, dtype=torch.float64
        )
    assert_close(float(mass), 1.0, rtol=0, atol=1e-3)


def test_a_path_starts_and_ends_where_the_map_does():
    f = flow_of(2, context_dim=2, tolerance=1e-9)
    z, c = noise(5, 2), noise(2)
    points, ladjs = f.path(z, c, times=(0, 0.3, 0.3, 1))
    assert points.shape == (4, 5, 2) and ladjs.shape == (4, 5)
    x, ladj = f(z, c)
    assert_close(points[0], z)
    assert_close(points[1], points[2])
    assert_close(points[-1], x, rtol=1e-7, atol=1e-7)
    assert_close(ladjs[-1], ladj, rtol=1e-7, atol=1e-7)


def test_energy_of_a_straight_and_of_a_linear_path():
    class Drift(nn.Module):
        """The same velocity everywhere."""

        def forward(self, t, x):
            return torch.full_like(x, 2.0) + 0 * x

    x = noise(4, 3)
    z, ladj, kinetic, slopes = Continuous(Drift(), 3).with_energy(x)
    assert_close(z, x - 2)
    assert_close(kinetic, torch.full((4,), 12.0).double())
    assert_close(slopes, torch.zeros(4).double())
    f = Continuous(Linear())
    g = torch.Generator().manual_seed(0)
    _, ladj, _, slopes = f.with_energy(noise(3000, 3), generator=g)
    norm = f.velocity.A.square().sum()
    assert_close(slopes.mean(), norm, rtol=0.1, atol=0)
    assert_close(ladj, f.inverse(noise(3000, 3))[1], rtol=1e-6, atol=1e-6)


def test_the_energy_of_a_perceptron_is_that_of_any_network():
    f = flow_of(context_dim=2, adaptive=False, steps=6)

    class Hidden(nn.Module):
        """The same velocity, which does not tell its divergence."""

        def __init__(self):
            super().__init__()
            self.inner = f.velocity

        def forward(self, t, x, context):
            return self.inner(t, x, context)

    other = Continuous(Hidden(), 3, 2, adaptive=False, steps=6)
    x, context = noise(4, 3), noise(4, 2)
    found = []
    for each in (f, other):
        g = torch.Generator().manual_seed(0)
        found.append(each.with_energy(x, context, generator=g))
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "own"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_sample_needs_no_divergence(kind, gradients, monkeypatch):
    if kind == "mlp":
        f = flow_of(tolerance=1e-9)
    else:
        f = Continuous(Net().double(), 3, tolerance=1e-9)
    z = noise(20, 3)
    x, _ = f(z)
    count = f.evaluations
    monkeypatch.setattr(f, "_field", None)
    with torch.set_grad_enabled(gradients):
        assert_close(f.push(z), x, rtol=1e-7, atol=1e-7)
    assert 0 < f.evaluations <= count
    assert Flow(f).double().sample(5).shape == (5, 3)


@pytest.mark.parametrize("kind", ["mlp", "own", "hutchinson"])
def test_the_other_solver_agrees(kind):
    if kind == "own":
        f = Continuous(Net(context_dim=2).double(), 3, 2, tolerance=1e-9)
    else:
        how = {} if kind == "mlp" else {"divergence": kind}
        f = flow_of(context_dim=2, tolerance=1e-9, **how).eval()
    z, context = noise(5, 3).requires_grad_(), noise(5, 2)
    found = []
    for f.solver in ("own", "torchdiffeq"):
        f.evaluations = 0
        x, ladj = f(z, context)
        assert f.evaluations > 0
        grads = torch.autograd.grad(
            x.square().sum() + ladj.sum(), [z, *f.parameters()]
        )
        pushed = f.push(z, context)
        found.append([x, ladj, *f.inverse(x, context), pushed, *grads])
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_without_torchdiffeq_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    f = flow_of(solver="torchdiffeq")
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        f(noise(2, 3))


def test_float32_is_within_the_tolerance():
    f = flow_of(3, tolerance=1e-5)
    z = noise(50, 3)
    x, ladj = f(z)
    single = copy.deepcopy(f).float()
    for a, b in zip(single(z.float()), (x, ladj)):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_beside_another_device(context_dim):
    check_beside_another_device(
        lambda: Continuous(
            MLPVelocity(2, hidden=(4,), context_dim=context_dim),
            adaptive=False,
            steps=2,
        ),
        context_dim,
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MLPVelocity(0), "dim"),
        (
            lambda: MLPVelocity(2, hidden=(3, 3, 3)),
            "hidden: expected one width",
        ),
        (lambda: MLPVelocity(2, bound=0), "bound"),
        (lambda: Continuous(Net()), "event_shape: expected one"),
        (lambda: Continuous(lambda t, x: x, 2), "velocity: expected a module"),
        (lambda: Continuous(MLPVelocity(2), 3), "velocity: expected dim"),
        (lambda: Continuous(MLPVelocity(2), 2, 1), "context_dim 1, got 0"),
        (lambda: Continuous(MLPVelocity(2), steps=0), "steps"),
        (lambda: Continuous(MLPVelocity(2), tolerance=0), "tolerance"),
        (lambda: Continuous(MLPVelocity(2), divergence="both"), "divergence"),
        (lambda: Continuous(MLPVelocity(2), noise="pink"), "noise"),
        (lambda: Continuous(MLPVelocity(2), solver="euler"), "solver"),
        (
            lambda: Continuous(MLPVelocity(2)).with_error(
                torch.zeros(1, 2), probes=1
            ),
            "probes",
        ),
    ],
)
def test_arguments_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_it_learns_a_density():
    """Maximum likelihood on a shifted, stretched normal comes near its entropy."""
    torch.manual_seed(0)
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0])
    flow = Flow(Continuous(MLPVelocity(2, hidden=(16, 16))))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(200):
        x = torch.randn(128, 2) * scale + shift
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(5000, 2) * scale + shift
    entropy = 1 + math.log(2 * math.pi)  # log 2 + log 0.5 = 0
    with torch.no_grad():
        found = -flow.log_prob(x).mean()
    assert abs(found - entropy) < 0.06
    assert flow.bijection.evaluations > 0


def test_a_history_counts_the_evaluations():
    torch.manual_seed(0)
    flow = Flow(
        Continuous(MLPVelocity(2, hidden=(4,)), adaptive=False, steps=3)
    )
    rows = torch.randn(32, 2)
    recipe = {"steps": 4, "progress": False}
    history = fit(MaximumLikelihood(flow), rows, **recipe)
    assert history.evaluations == [19] * 4  # six a step, and the first
    flow.bijection.adaptive = True
    history = fit(MaximumLikelihood(flow), rows, **recipe)
    assert len(history.evaluations) == 4 and min(history.evaluations) > 0
    assert history.to_dict()["evaluations"] == history.evaluations
    plain = Flow(RealNVP(2, 2))
    assert not fit(MaximumLikelihood(plain), rows, **recipe).evaluations


def test_images_have_any_event_shape():
    class Conv(nn.Module):
        """A convolution as velocity."""

        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, t, x):
            return self.net(x).tanh() * t

    f = Continuous(Conv().double(), (1, 3, 3), tolerance=1e-9)
    x = noise(2, 1, 3, 3)
    z, ladj = f.inverse(x)
    assert z.shape == x.shape and ladj.shape == (2,)
    J = torch.autograd.functional.jacobian(
        lambda y: f.inverse(y)[0].flatten(), x[0]
    )
    assert_close(
        ladj[0], J.reshape(9, 9).slogdet().logabsdet, rtol=1e-7, atol=1e-7
    )
