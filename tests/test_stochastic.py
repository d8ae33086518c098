"""Scores and matched velocities: closed forms on normal and on discrete data."""

import copy
import itertools
import math
import pickle
import sys

import pytest
import torch
from helpers import noise, shaken
from torch import nn
from torch.testing import assert_close

from flowcourse.bases import (
    DiagonalGaussian,
    GaussianMixture,
    TorchBase,
    Uniform,
)
from flowcourse.checkpoint import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Flow, StandardNormal
from flowcourse.coupling import RealNVP
from flowcourse.quadrature import total_mass
from flowcourse.schedules import (
    Straight,
    VarianceExploding,
    VariancePreserving,
)
from flowcourse.stochastic import (
    FlowMatching,
    Guided,
    ScoreMatching,
    ScoreVelocity,
    optimal_pairs,
)
from flowcourse.trainer import fit

MILD = {
    "straight": Straight(0.1),
    "preserving": VariancePreserving(1.0, 5.0, 0.05),
    "exploding": VarianceExploding(3.0, 0.2),
}
each_mild = pytest.mark.parametrize("schedule", MILD.values(), ids=MILD)
# what training takes
FULL = {
    "straight": Straight(),
    "preserving": VariancePreserving(),
    "exploding": VarianceExploding(),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def velocity_of(schedule=None, dim=3, context_dim=0, sd=1.0, **options):
    """A score velocity in float64 with noise on its parameters."""
    options = {"hidden": (6,), "context_dim": context_dim} | options
    return shaken(ScoreVelocity(dim, schedule, **options).double(), sd)


def score_flow(*args, **options):
    v = velocity_of(*args, **options)
    return Flow(Continuous(v), v.base()).double()


def within_errors(found, wanted=0.0, errors=5.0):
    """The mean over the first dimension is what is wanted, up to its standard error."""
    error = found.std(0) / len(found) ** 0.5
    gap = (found.mean(0) - wanted).abs()
    assert (gap <= errors * error + 1e-12).all(), (gap / error).max()


def gradients(losses, parameters):
    """Of several losses, one after the other, flat."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


# the velocity of a score model


@each_mild
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_the_divergence_is_the_trace_of_autograds_jacobian(
    schedule, context_dim, hidden
):
    v = velocity_of(
        schedule, context_dim=context_dim, hidden=hidden, data_sd=0.6
    )
    x, context = noise(4, 3), noise(4, 2) if context_dim else None
    for t in (0.0, 0.4, 1.0):
        velocity, divergence = v.with_divergence(t, x, context)
        assert divergence.shape == (4,)
        assert_close(velocity, v(t, x, context), rtol=1e-12, atol=1e-12)
        for i in range(4):
            c = None if context is None else context[i : i + 1]
            J = torch.autograd.functional.jacobian(
                lambda y, t=t, c=c: v(t, y[None], c)[0], x[i]
            )
            assert_close(divergence[i], J.trace(), rtol=1e-11, atol=1e-11)


@each_mild
@pytest.mark.parametrize("context_dim", [0, 2])
def test_each_row_may_have_a_time_of_its_own(schedule, context_dim):
    v = velocity_of(schedule, context_dim=context_dim)
    x, context = noise(5, 3), noise(5, 2) if context_dim else None
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    for function in (v, v.score, v.network):
        together = function(times[:, None], x, context)
        for i, t in enumerate(times):
            c = None if context is None else context[i : i + 1]
            alone = function(t, x[i : i + 1], c)
            assert_close(together[i], alone[0], rtol=1e-12, atol=1e-12)
            plain = function(float(t), x[i : i + 1], c)
            assert torch.equal(plain, alone)


@each_mild
def test_score_and_velocity_are_two_forms_of_one_thing(schedule):
    v = velocity_of(schedule, data_sd=0.7)
    x = noise(6, 3)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)[:, None]
    velocity, score = v(t, x), v.score(t, x)
    assert_close(schedule.score(t, x, velocity), score, rtol=1e-9, atol=1e-9)
    # Song et al. 2021, eq. 13: v = a'/a x + g²/2 score
    a, s, a_rate, s_rate = schedule.at(t)
    half = (a_rate * s - a * s_rate) * s / a
    wanted = a_rate / a * x + half * score
    assert_close(velocity, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("sd", [1.0, 0.4])
def test_new_it_is_the_exact_flow_of_normal_data(name, sd):
    """The density of N(0, s² m(1)² / m(0)²), where s is that of the base."""
    schedule = FULL[name]
    v = ScoreVelocity(2, schedule, data_sd=sd).double()
    flow = Flow(Continuous(v, tolerance=1e-9), v.base()).double()
    ends = [schedule._at(t) for t in (0.0, 1.0)]
    start, end = (math.hypot(a * sd, s) for a, s in ends)
    scale = schedule.base_sd * end / start
    x = scale * noise(20, 2)
    wanted = torch.distributions.Normal(0.0, scale).log_prob(x).sum(-1)
    assert_close(flow.log_prob(x), wanted, rtol=1e-6, atol=1e-6)
    z = schedule.base_sd * noise(5, 2)
    assert_close(flow.bijection(z)[0], z * end / start, rtol=1e-6, atol=1e-6)


@each_mild
def test_the_density_has_mass_one(schedule):
    v = velocity_of(schedule, dim=2, hidden=(4,), sd=0.5)
    flow = Flow(Continuous(v, adaptive=False, steps=6), v.base()).double()
    with torch.no_grad():
        mass = total_mass(
            flow.log_prob, 2, max_evals=300_000, dtype=torch.float64
        )
    assert_close(float(mass), 1.0, rtol=0, atol=1e-3)


def test_the_base_stays_as_it_is():
    base = ScoreVelocity(3, VarianceExploding(7.0)).base()
    assert_close(base.scale, torch.full((3,), 7.0))
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_checkpoint_restores_the_flow(tmp_path, context_dim):
    flow = score_flow(context_dim=context_dim)
    save_checkpoint(tmp_path / "flow.pt", {"flow": flow.state_dict()})
    fresh = ScoreVelocity(3, hidden=(6,), context_dim=context_dim)
    other = Flow(Continuous(fresh), fresh.base()).double()
    other.load_state_dict(load_checkpoint(tmp_path / "flow.pt")["flow"])
    x, context = noise(4, 3), noise(4, 2) if context_dim else None
    assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))
    assert repr(other) == repr(flow)


# score matching


def normal_minimum(a, s, sd):
    """Variance of the noise given the point, for normal data."""
    return a**2 * sd**2 / (a**2 * sd**2 + s**2)


@each_mild
@pytest.mark.parametrize("weighting", ["noise", "likelihood"])
def test_the_true_score_has_the_least_loss(schedule, weighting):
    """For N(0, sd²) it is known, and so is the integral over time."""
    if weighting == "likelihood" and isinstance(schedule, Straight):
        return
    sd, n = 0.7, 40_000
    v = ScoreVelocity(2, schedule, data_sd=sd).double()
    objective = ScoreMatching(Flow(Continuous(v), v.base()).double(), weighting)
    x = sd * noise(n, 2, seed=1)
    losses = objective.losses(x, objective.draw(n, generator())).detach()
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    a, s, _, _ = schedule.at(t)
    each = normal_minimum(a, s, sd)
    if weighting == "likelihood":  # half of g² over s², from its definition
        each = each * schedule.squared_diffusion(t) / (2 * s**2)
    within_errors(losses, 2 * each.mean())


@pytest.mark.parametrize("name", ["preserving", "exploding"])
def test_likelihood_weights_are_half_of_the_squared_diffusion(name):
    """Of any score: times spread by their weight, and weights at even times."""
    schedule, n = MILD[name], 60_000
    flow = score_flow(schedule, dim=2, sd=1.5)
    x = 0.5 + 0.3 * noise(n, 2, seed=1)
    spread = ScoreMatching(flow, "likelihood")
    even = ScoreMatching(flow, "noise")
    with torch.no_grad():
        a = spread.losses(x, spread.draw(n, generator(2)))
        u, *points = even.draw(n, generator(3))
        u[:, 0] = (torch.arange(n) + u[:, 0]) / n
        _, s, _, _ = schedule.at(u[:, 0])
        weight = schedule.squared_diffusion(u[:, 0]) / (2 * s**2)
        b = weight * even.losses(x, (u, *points))
    error = math.hypot(a.std() / n**0.5, b.std() / n**0.5)
    assert abs(a.mean() - b.mean()) < 5 * error
    assert error < 0.02 * b.mean()


@each_mild
def test_its_gradient_is_that_of_the_distance_to_the_true_score(schedule):
    """Vincent 2011: the two losses differ by a constant."""
    sd, n, batches = 0.7, 500, 40
    flow = score_flow(schedule, dim=2, hidden=(3,))
    objective = ScoreMatching(flow)
    v, found = flow.bijection.velocity, []
    parameters = [*v.network.parameters()]
    for k in range(batches):
        drawn = objective.draw(n, generator(k))
        x = sd * noise(n, 2, seed=1000 + k)
        t = drawn[0][:, :1]
        a, s, _, _ = schedule.at(t)
        points = a * x + s * drawn[1]
        true = -points / (a**2 * sd**2 + s**2)
        plain = (s * (v.score(t, points) - true)).square().sum(-1).mean()
        found.append((objective(x, drawn), plain))
    noisy, plain = (gradients(part, parameters) for part in zip(*found))
    within_errors(noisy - plain)
    # which is no statement about nothing
    assert ((plain.mean(0) / (plain.std(0) / batches**0.5)).abs() > 10).any()


class Spy(nn.Module):
    """A velocity, zero, that notes what it was called with."""

    def __init__(self, dim=2, context_dim=2):
        super().__init__()
        self.dim, self.context_dim = dim, context_dim
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, t, x, context=None):
        self.seen = t, x, context
        return self.gain * x


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["flow", "score"])
def test_features_are_dropped_as_often_as_asked(drop, kind):
    n = 4000
    x, context = noise(n, 2), 1 + noise(n, 2, seed=1).abs()
    spy = Spy()
    if kind == "flow":
        objective = FlowMatching(Flow(Continuous(spy)).double(), drop=drop)
    else:
        v = velocity_of(dim=2, context_dim=2)
        objective = ScoreMatching(
            Flow(Continuous(v), v.base()).double(), drop=drop
        )
        v.network.forward = spy.forward
    drawn = objective.draw(n, generator())
    objective.losses((x, context), drawn)
    t, _, given = spy.seen
    gone = (given == 0).all(1)
    assert torch.equal(given[~gone], context[~gone])
    error = (drop * (1 - drop) / n) ** 0.5
    assert abs(gone.double().mean() - drop) <= 5 * error
    if 0 < drop < 1:  # at any time alike
        early = t[gone].mean() - t[~gone].mean()
        assert abs(early) < 5 * (1 / 12 / (drop * (1 - drop) * n)) ** 0.5


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ScoreMatching(Flow(RealNVP(2))), "flow: expected a Flow"),
        (
            lambda: ScoreMatching(Flow(Continuous(MLPVelocity(2)))),
            "of a ScoreVelocity v",
        ),
        (lambda: ScoreMatching(ScoreVelocity(2)), "flow: expected a Flow"),
        (lambda: ScoreMatching(based(), "both"), "weighting"),
        (
            lambda: ScoreMatching(based(Straight()), "likelihood"),
            "needs a schedule with time_of",
        ),
        (lambda: ScoreMatching(based(), drop=0.1), "drop: expected 0"),
        (lambda: ScoreMatching(based(), drop=1.5), "drop"),
        (
            lambda: ScoreMatching(
                based(VarianceExploding(), StandardNormal(2))
            ),
            "base of standard deviation 25",
        ),
        (
            lambda: ScoreMatching(based(None, DiagonalGaussian(2, loc=1.0))),
            "expected a normal base",
        ),
        (
            lambda: ScoreMatching(based(None, Uniform(2))),
            "expected a normal base",
        ),
        (
            lambda: FlowMatching(
                Flow(Continuous(MLPVelocity(2))), VarianceExploding()
            ),
            "base of standard deviation 25",
        ),
        (lambda: FlowMatching(Flow(RealNVP(2))), "Continuous.*got RealNVP"),
        (lambda: FlowMatching(MLPVelocity(2)), "Continuous.*got"),
        (lambda: FlowMatching(based(), 0.5), "schedule: expected"),
        (lambda: FlowMatching(based(), pairing="best"), "pairing"),
        (lambda: FlowMatching(based(), drop=0.1), "drop: expected 0"),
        (
            lambda: FlowMatching(
                Flow(Continuous(MLPVelocity(2, context_dim=1))),
                pairing="optimal",
            ),
            "tie base points to the context",
        ),
        (lambda: ScoreVelocity(0), "dim"),
        (lambda: ScoreVelocity(2, 3.0), "schedule: expected a Schedule"),
        (lambda: ScoreVelocity(2, data_sd=0.0), "data_sd"),
        (lambda: Guided(torch.sin, 2.0), "velocity: expected a module"),
        (lambda: Guided(MLPVelocity(2), 2.0), "expected one with context"),
        (lambda: Guided(MLPVelocity(2, context_dim=1), -1.0), "weight"),
    ],
)
def test_arguments_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def based(schedule=None, base=None):
    v = ScoreVelocity(2, schedule)
    return Flow(Continuous(v), v.base() if base is None else base)


@pytest.mark.parametrize("base", [StandardNormal(2), DiagonalGaussian(2)])
def test_the_standard_normal_is_near_enough_to_the_base(base):
    ScoreMatching(based(VariancePreserving(), base))
    FlowMatching(based(VariancePreserving(), base), VariancePreserving())


# flow matching


class Few(nn.Module):
    """The marginal velocity of a few points, in closed form."""

    def __init__(self, schedule, points):
        super().__init__()
        self.schedule, self.points = schedule, points
        self.dim = points.shape[1]
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, t, x):
        a, s, a_rate, s_rate = (n.unsqueeze(-2) for n in self.schedule.at(t))
        z = (x.unsqueeze(-2) - a * self.points) / s
        share = (-z.square().sum(-1) / 2).softmax(-1)
        each = a_rate * self.points + s_rate * z
        return (share.unsqueeze(-1) * each).sum(-2)


class Affine(nn.Module):
    """The velocity `A x + b t + c`."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(noise(2, 2))
        self.b, self.c = nn.Parameter(noise(2)), nn.Parameter(noise(2, seed=1))

    def forward(self, t, x):
        return x @ self.A.mT + self.b * t + self.c


POINTS = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -0.5]]).double()


def flow_along(velocity, schedule):
    base = DiagonalGaussian(2, scale=schedule.base_sd)
    return Flow(Continuous(velocity), base).double()


@each_mild
def test_its_gradient_is_that_of_the_distance_to_the_marginal_velocity(
    schedule,
):
    """Lipman et al. 2023, theorem 2: the two losses differ by a constant."""
    n, batches = 500, 50
    flow = flow_along(Affine(), schedule)
    objective = FlowMatching(flow, schedule)
    v, marginal, found = flow.bijection.velocity, Few(schedule, POINTS), []
    for k in range(batches):
        drawn = objective.draw(n, generator(k))
        x = POINTS[torch.randint(3, (n,), generator=generator(100 + k))]
        t = drawn[0][:, :1]
        a, s, _, _ = schedule.at(t)
        points = a * x + s * drawn[1]
        plain = (v(t, points) - marginal(t, points)).square().sum(-1).mean()
        found.append((objective(x, drawn), plain))
    paths, plain = (gradients(part, [*v.parameters()]) for part in zip(*found))
    within_errors(paths - plain)
    assert ((plain.mean(0) / (plain.std(0) / batches**0.5)).abs() > 10).any()


@each_mild
def test_its_minimum_is_the_variance_of_the_velocities_at_a_point(schedule):
    n = 20_000
    marginal = Few(schedule, POINTS)
    objective = FlowMatching(flow_along(marginal, schedule), schedule)
    drawn = objective.draw(n, generator())
    x = POINTS[torch.randint(3, (n,), generator=generator(1))]
    with torch.no_grad():
        losses = objective.losses(x, drawn)
        t = drawn[0][:, :1]
        a, s, a_rate, s_rate = schedule.at(t)
        path = a_rate * x + s_rate * drawn[1]
        mean = marginal(t, a * x + s * drawn[1])
    spread = path.square().sum(-1) - mean.square().sum(-1)
    within_errors(losses - spread)
    assert losses.mean() > 10 * losses.std() / n**0.5


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_its_minimum_for_normal_data_along_straight_lines(sd):
    """For N(0, sd²) it is sd times pi over two for each coordinate."""
    n = 40_000
    v = ScoreVelocity(3, Straight(), data_sd=sd).double()
    objective = FlowMatching(Flow(Continuous(v)).double())
    x = sd * noise(n, 3, seed=5)
    losses = objective.losses(x, objective.draw(n, generator())).detach()
    within_errors(losses, 3 * sd * math.pi / 2)


@pytest.mark.parametrize("schedule", [None, *MILD.values()])
def test_the_loss_by_hand(schedule):
    spy, n = Spy(context_dim=0), 7
    objective = FlowMatching(flow_along(spy, schedule or Straight()), schedule)
    drawn = objective.draw(n, generator())
    x = noise(n, 2)
    losses = objective.losses(x, drawn)
    uniform, z = drawn
    assert uniform.shape == (n, 2) and z.shape == (n, 2)
    a, s, a_rate, s_rate = (schedule or Straight()).at(uniform[:, :1])
    t, points, context = spy.seen
    assert torch.equal(t, uniform[:, :1]) and context is None
    assert_close(points, a * x + s * z)
    assert_close(losses, (a_rate * x + s_rate * z).square().sum(-1))
    if schedule is None:
        assert_close(losses, (x - z).square().sum(-1))


def test_images():
    class Conv(nn.Module):
        """Time as one more channel."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, t, x):
            clock = t.expand(len(x), 1, 1, 1).expand_as(x)
            return self.layer(torch.cat([x, clock], 1))

    shape = (1, 4, 3)
    v = Conv().double()
    flow = Flow(
        Continuous(v, shape, adaptive=False, steps=3), StandardNormal(shape)
    ).double()
    objective = FlowMatching(flow)
    x = noise(5, *shape)
    drawn = objective.draw(5, generator())
    losses = objective.losses(x, drawn)
    assert losses.shape == (5,)
    for i in range(5):
        t, z = drawn[0][i, 0], drawn[1][i]
        path = t * x[i] + (1 - t) * z
        off = v(t.view(1, 1, 1, 1), path[None])[0] - (x[i] - z)
        assert_close(losses[i], off.square().sum())
    losses.mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in v.parameters())
    assert flow.log_prob(x).shape == (5,)


@pytest.mark.parametrize(
    "base",
    [
        Uniform(2, -1.0, 2.0),
        GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]])),
        TorchBase(
            torch.distributions.Independent(
                torch.distributions.Laplace(torch.zeros(2), 1.0), 1
            )
        ),
        DiagonalGaussian(2, loc=3.0, scale=0.5),
    ],
    ids=lambda base: type(base).__name__,
)
def test_straight_lines_start_at_the_points_of_any_base(base):
    spy = Spy(context_dim=0)
    flow = Flow(Continuous(spy), copy.deepcopy(base)).double()
    objective = FlowMatching(flow)
    drawn = objective.draw(6, generator())
    assert {part.dtype for part in drawn} == {torch.float64}
    drawn[0][:, 0] = 0.0
    objective(noise(6, 2), drawn).backward()
    noises = drawn[1:] if len(drawn) > 2 else drawn[1]
    assert_close(spy.seen[1], flow.base.from_noise(noises).detach())
    # the base does not learn
    assert all(p.grad is None for p in flow.base.parameters())


def test_a_trainable_base_stays_as_it_is():
    flow = Flow(Continuous(MLPVelocity(2)), DiagonalGaussian(2))
    before = copy.deepcopy(flow.base.state_dict())
    fit(FlowMatching(flow), torch.randn(20, 2), steps=3, progress=False)
    for name, value in flow.base.state_dict().items():
        assert torch.equal(value, before[name])
    assert flow.bijection.velocity.layers[-1].weight.abs().sum() > 0


# pairing


def test_the_optimal_pairing_is_the_best_of_all():
    pytest.importorskip("ot")
    for seed in range(5):
        z, x = noise(6, 2, seed=seed), noise(6, 2, seed=100 + seed) + 1
        found = optimal_pairs(z, x)
        costs = {
            order: (z[list(order)] - x).square().sum().item()
            for order in itertools.permutations(range(6))
        }
        assert tuple(found.tolist()) == min(costs, key=costs.get)


def test_the_optimal_pairing_uses_each_point_once():
    pytest.importorskip("ot")
    z, x = noise(300, 1, 2, 2), noise(300, 1, 2, 2, seed=1)
    found = optimal_pairs(z, x)
    assert torch.equal(found.sort().values, torch.arange(300))
    line = noise(50, 1), noise(50, 1, seed=1)  # where it keeps the order
    ranks = [part.flatten().argsort().argsort() for part in line]
    assert torch.equal(ranks[0][optimal_pairs(*line)], ranks[1])


def test_pairs_keep_the_rows_of_the_data():
    pytest.importorskip("ot")
    spy, n = Spy(context_dim=0), 40
    objective = FlowMatching(flow_along(spy, Straight()), pairing="optimal")
    x = noise(n, 2, seed=3)
    uniform, z = objective.draw(n, generator())
    losses = objective.losses(x, (uniform, z))
    mate = z[optimal_pairs(z, x)]
    assert_close(losses, (x - mate).square().sum(-1))
    t = uniform[:, :1]
    assert_close(spy.seen[1], t * x + (1 - t) * mate)
    alone = FlowMatching(flow_along(Spy(context_dim=0), Straight()))
    assert losses.sum() < alone.losses(x, (uniform, z)).sum()


def test_without_pot_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    flow = Flow(Continuous(MLPVelocity(2)))
    FlowMatching(flow)
    with pytest.raises(ImportError, match="pip install POT"):
        FlowMatching(flow, pairing="optimal")


# guidance


def guided_of(velocity, weight=2.0, **options):
    return Continuous(Guided(velocity, weight), **options)


@pytest.mark.parametrize("kind", ["mlp", "score"])
def test_weight_one_is_the_velocity_itself_and_zero_has_no_features(kind):
    if kind == "mlp":
        inner = shaken(MLPVelocity(3, hidden=(6,), context_dim=2).double())
    else:
        inner = velocity_of(context_dim=2)
    x, context = noise(4, 3), noise(4, 2)
    none = torch.zeros_like(context)
    assert torch.equal(
        Guided(inner, 1.0)(0.3, x, context), inner(0.3, x, context)
    )
    assert torch.equal(Guided(inner, 0.0)(0.3, x, context), inner(0.3, x, none))
    for weight in (0.5, 3.0):
        v = inner(0.3, x, none)
        wanted = v + weight * (inner(0.3, x, context) - v)
        assert_close(Guided(inner, weight)(0.3, x, context), wanted)
    ladjs = [
        f(x, context)[1] for f in (Continuous(inner), guided_of(inner, 1.0))
    ]
    assert_close(*ladjs, rtol=1e-4, atol=1e-4)  # each to the tolerance


def test_both_ways_to_a_guided_divergence_agree():
    inner = shaken(MLPVelocity(3, hidden=(6, 5), context_dim=2).double())

    class Hidden(nn.Module):
        """The same velocity, which does not tell its divergence."""

        dim, context_dim = 3, 2

        def forward(self, t, x, context):
            return inner(t, x, context)

    assert not hasattr(Guided(Hidden(), 2.0), "with_divergence")
    x, context = noise(4, 3), noise(4, 2)
    found = [
        guided_of(v, 2.5, adaptive=False, steps=8)(x, context)
        for v in (inner, Hidden())
    ]
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_guided_density_has_mass_one():
    inner = shaken(MLPVelocity(2, hidden=(4,), context_dim=2).double(), 0.5)
    flow = Flow(guided_of(inner, 3.0, adaptive=False, steps=6)).double()
    context = noise(2)
    with torch.no_grad():
        mass = total_mass(
            lambda x: flow.log_prob(x, context),
            2,
            max_evals=300_000,
            dtype=torch.float64,
        )
    assert_close(float(mass), 1.0, rtol=0, atol=1e-3)


def test_copies_and_files_keep_a_guided_flow():
    inner = shaken(MLPVelocity(3, hidden=(6,), context_dim=2).double())
    f = guided_of(inner)
    x, context = noise(4, 3), noise(4, 2)
    other = guided_of(MLPVelocity(3, hidden=(6,), context_dim=2).double())
    other.load_state_dict(f.state_dict())
    for copied in (copy.deepcopy(f), pickle.loads(pickle.dumps(f)), other):
        for a, b in zip(copied(x, context), f(x, context)):
            assert torch.equal(a, b)
        assert copied.velocity.weight == 2.0
    # a copy shares nothing
    with torch.no_grad():
        inner.layers[0].weight.zero_()
    assert not torch.equal(other(x, context)[0], f(x, context)[0])


class Normals(nn.Module):
    """Of data N(c, 0.5²) given features c, and of N(0, 1.2²) without: the exact velocities."""

    dim, context_dim = 2, 2
    sds = (1.2, 0.5)

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, t, x, context):
        known = (context != 0).any(-1, keepdim=True)
        sd = torch.where(known, self.sds[1], self.sds[0]).to(x)
        a, s, a_rate, s_rate = Straight().at(t)
        rate = (a * a_rate * sd**2 + s * s_rate) / (a**2 * sd**2 + s**2)
        return a_rate * context + rate * (x - a * context)


def test_a_guided_density_is_none_of_the_two_one_might_take_it_for():
    """Neither p(x|c) nor what is proportional to p(x) (p(x|c) / p(x))^w.

    With w = 2 the guided points have the standard deviation 0.5² / 1.2 = 0.21.
    That of p(x|c) is 0.5, and that of the tilted density 0.37.
    """
    w, (wide, narrow) = 2.0, Normals.sds
    f = guided_of(Normals(), w, tolerance=1e-9).double()
    c = torch.tensor([1.0, 0.0], dtype=torch.float64)
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    x, ladj = f(z, c)
    scale = (x[1] - x[0])[0].item()
    # a linear velocity mixes the logarithms of the scales
    assert scale == pytest.approx(narrow**w * wide ** (1 - w), rel=1e-6)
    assert_close(ladj, torch.full_like(ladj, 2 * math.log(scale)))
    tilted = (w / narrow**2 + (1 - w) / wide**2) ** -0.5
    assert tilted == pytest.approx(0.3699, abs=1e-4)
    assert scale == pytest.approx(0.2083, abs=1e-4)
    peak = w / narrow**2 * tilted**2  # where the tilted density is largest
    assert abs(x[0, 0].item() - peak) > 0.1 and abs(x[0, 0].item() - 1) > 0.1


def test_a_fast_velocity_is_that_beside_its_divergence():
    for hidden, context_dim in (((6,), 0), ((6, 5), 2)):
        v = MLPVelocity(3, hidden=hidden, context_dim=context_dim).double()
        v = shaken(v)
        x, context = noise(4, 3), noise(4, 2) if context_dim else None
        for t in (0.0, 0.3, torch.tensor(1.0)):
            wanted, _ = v.with_divergence(t, x, context)
            assert_close(v(t, x, context), wanted, rtol=1e-13, atol=1e-13)


# training


BUMPS = torch.tensor([-1.0, 1.0])


def test_matched_scores_learn_the_data_with_the_noise_that_is_left():
    """Two points become two bumps, whose density is known."""
    torch.manual_seed(0)
    left = 0.5
    v = ScoreVelocity(1, VarianceExploding(5.0, left), hidden=(32, 32))
    flow = Flow(Continuous(v), v.base())
    rows = BUMPS[torch.randint(2, (4000, 1))]
    recipe = {"steps": 600, "batch_size": 256, "lr": 1e-2}
    fit(
        ScoreMatching(flow, "likelihood"),
        rows,
        schedule="cosine",
        progress=False,
        **recipe,
    )
    x = BUMPS[torch.randint(2, (4000, 1))] + left * torch.randn(4000, 1)
    each = torch.distributions.Normal(BUMPS, left).log_prob(x)
    true = each.logsumexp(-1) - math.log(2)
    new = ScoreVelocity(1, v.schedule)
    with torch.no_grad():
        gap = true - flow.log_prob(x)
        before = true - Flow(Continuous(new), new.base()).log_prob(x)
    # a tenth of what there was to learn, and not better than the truth
    assert gap.mean() < 0.04 and before.mean() > 0.08
    assert gap.mean() > -3 * gap.std() / 4000**0.5


@pytest.mark.parametrize(
    ("pairing", "size"), [("independent", 256), ("optimal", 64)]
)
def test_matched_velocities_learn_a_density(pairing, size):
    """From 0.88 nats below the true density to 0.08."""
    if pairing == "optimal":
        pytest.importorskip("ot")
    torch.manual_seed(0)
    truth = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4)
    rows, x = truth.sample(4000), truth.sample(4000)
    flow = Flow(Continuous(MLPVelocity(2, hidden=(32, 32))))
    recipe = {"steps": 400, "batch_size": size, "lr": 1e-2}
    fit(
        FlowMatching(flow, pairing=pairing),
        rows,
        schedule="cosine",
        progress=False,
        **recipe,
    )
    with torch.no_grad():
        gap = truth.log_prob(x) - flow.log_prob(x)
        before = truth.log_prob(x) - flow.base.log_prob(x)
    assert gap.mean() < 0.08 and before.mean() > 0.8
    assert gap.mean() > -3 * gap.std() / 4000**0.5


def test_a_run_does_not_go_on_with_another_objective(tmp_path):
    x = torch.randn(20, 2)
    recipe = {"steps": 2, "progress": False, "checkpoint": tmp_path / "a.pt"}
    fit(FlowMatching(based()), x, **recipe)
    fit(FlowMatching(based()), x, resume=True, **recipe)
    with pytest.raises(CheckpointError, match="schedule=Straight"):
        other = FlowMatching(based(), VariancePreserving())
        fit(other, x, resume=True, **recipe)
    recipe["checkpoint"] = tmp_path / "b.pt"
    fit(ScoreMatching(based()), x, **recipe)
    with pytest.raises(CheckpointError, match="weighting='noise'"):
        other = ScoreMatching(based(), "likelihood")
        fit(other, x, resume=True, **recipe)
    with pytest.raises(CheckpointError, match="epsilon=0.001"):
        other = ScoreMatching(based(VariancePreserving(epsilon=0.002)))
        fit(other, x, resume=True, **recipe)


@pytest.mark.parametrize("kind", ["flow", "score"])
def test_double_precision(kind):
    flow = score_flow(dim=2)
    objective = (
        FlowMatching(flow, VariancePreserving())
        if kind == "flow"
        else ScoreMatching(flow)
    )
    drawn = objective.draw(5, generator())
    assert {part.dtype for part in drawn} == {torch.float64}
    loss = objective(noise(5, 2), drawn)
    assert loss.dtype == torch.float64
    single = copy.deepcopy(objective).float()
    again = single(noise(5, 2).float(), tuple(part.float() for part in drawn))
    assert_close(again.double(), loss, rtol=1e-4, atol=0)
