"""A flow as a guide: its density by hand, exact evidence, many kinds of latents, data sets and errors."""

import copy
import io
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_value
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.reparam import NeuTraReparam
from torch import nn
from torch.autograd.functional import jacobian
from torch.testing import assert_close

from flowcourse.autoregressive import IAF
from flowcourse.bases import GaussianMixture, TorchBase
from flowcourse.core import Bijection, Compose, StandardNormal
from flowcourse.coupling import Couplings, RealNVP
from flowcourse.elementwise import AffineMap, Elementwise, SigmoidMap
from flowcourse.guides import AutoFlow
from flowcourse.linear import Triangular
from flowcourse.splines import RationalQuadraticSplineMap

small = partial(RealNVP, layers=2, hidden=(8,))
conditional = partial(
    Elementwise, maps=AffineMap(bound=None), hidden=()
)  # a Gaussian


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def supports():
    """Latents of several shapes and supports, in plates and outside of them."""
    pyro.sample("place", dist.Normal(1.0, 2.0))
    pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 3, dim=-2):
        pyro.sample("share", dist.Beta(2.0, 3.0))
    with pyro.plate("columns", 2, dim=-1):
        pyro.sample("point", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
    pyro.sample("range", dist.Uniform(-1.0, 3.0))


SIZES = {"place": (), "scale": (), "share": (3, 2), "point": (2, 2)}
SIZES |= {"mix": (3,), "range": ()}
D = 1 + 1 + 6 + 4 + 2 + 1


def scattered(guide, sd=0.3):
    """The guide, away from its start."""
    with torch.no_grad():
        for p in guide.flow.parameters():
            p.add_(sd * torch.randn_like(p))
    return guide


def made(model, bijection=small, *args, **options):
    """A guide after its first call."""
    guide = AutoFlow(model, bijection, **options)
    guide(*args)
    return guide


def by_hand(u):
    """From the whole line to free coordinates of the supports of `supports`."""
    stick = (u[12:14] - torch.tensor([2.0, 1.0]).log()).sigmoid()
    mix = torch.stack([stick[0], (1 - stick[0]) * stick[1]])
    return torch.cat(
        [
            u[:1],
            u[1:2].exp(),
            u[2:8].sigmoid(),
            u[8:12],
            mix,
            4 * u[14:].sigmoid() - 1,
        ]
    )


def side_by_side(latents):
    """The free coordinates of one draw."""
    parts = [latents[name].reshape(-1) for name in SIZES]
    parts[4] = parts[4][:2]  # the rest follows from the sum
    return torch.cat(parts)


def test_the_density_is_that_of_the_jacobian(double):
    guide = scattered(made(supports))
    assert guide.latent_dim == D
    z = torch.randn(D)
    f = guide.flow.bijection
    there = by_hand(f.forward(z)[0])
    J = jacobian(lambda z: by_hand(f.forward(z)[0]), z)
    wanted = StandardNormal(D).log_prob(z) - torch.linalg.slogdet(J)[1]
    place, scale, share, point, mix, end = there.split([1, 1, 6, 4, 2, 1])
    latents = {
        "place": place[0],
        "scale": scale[0],
        "share": share.reshape(3, 2),
        "point": point.reshape(2, 2),
        "mix": torch.cat([mix, 1 - mix.sum(0, keepdim=True)]),
        "range": end[0],
    }
    # a dozen sums of numbers of the size of 10
    assert_close(guide.log_prob(latents), wanted, atol=1e-10, rtol=0)


def test_draws_are_the_flow_s_and_lie_where_they_should(double):
    guide = scattered(made(supports))
    seed = torch.Generator().manual_seed(1)
    found = guide.sample((4, 5), generator=seed)
    assert {k: tuple(v.shape[2:]) for k, v in found.items()} == SIZES
    assert all(v.shape[:2] == (4, 5) for v in found.values())
    vectors = guide.flow.sample((4, 5), generator=seed.manual_seed(1))
    for i in range(4):
        for j in range(5):
            one = {name: v[i, j] for name, v in found.items()}
            assert_close(side_by_side(one), by_hand(vectors[i, j]))
    assert_close(found["mix"].sum(-1), torch.ones(4, 5))
    assert not any(v.requires_grad for v in found.values())


@pytest.mark.parametrize("particles", [None, 7])
def test_a_trace_and_log_prob_say_the_same(double, particles):
    guide = scattered(made(supports))

    def called():
        if particles is None:
            return guide()
        with pyro.plate("particles", particles, dim=-3):
            return guide()

    trace = poutine.trace(called).get_trace()
    values = {name: trace.nodes[name]["value"] for name in SIZES}
    wanted = guide.log_prob(values)
    if particles is not None:  # with ones for plates, and without
        assert values["place"].shape == (particles, 1, 1)
        for name, shape in SIZES.items():
            values[name] = values[name].reshape(particles, *shape)
        assert_close(guide.log_prob(values), wanted, atol=0, rtol=0)
    assert wanted.shape == (() if particles is None else (particles,))
    assert_close(trace.log_prob_sum(), wanted.sum())
    if particles is not None:
        assert len(values["place"].unique()) == particles


def test_other_plates_and_matrices(double):
    def model():
        with pyro.plate("columns", 2, dim=-3):
            pyro.sample("a", dist.LKJCholesky(3, 2.0))
            pyro.sample("b", dist.LogNormal(0.0, 1.0))

    guide = scattered(made(model))
    assert guide.latent_dim == 2 * 3 + 2
    trace = poutine.trace(guide).get_trace()
    values = {name: trace.nodes[name]["value"] for name in "ab"}
    assert values["a"].shape == (2, 1, 1, 3, 3)
    assert_close(trace.log_prob_sum(), guide.log_prob(values))
    assert guide.sample(5)["a"].shape == (5, 2, 1, 1, 3, 3)


class Correlated(Bijection):
    """A given triangular matrix."""

    def __init__(self, chol):
        super().__init__(len(chol))
        self.register_buffer("chol", chol)

    def _forward(self, z, context):
        ladj = self.chol.diagonal().log().sum()
        return z @ self.chol.T, ladj.expand(z.shape[:-1])


def gaussians(x):
    """A correlated Gaussian posterior, of a number and the logarithm of another."""
    gaussians_of(x, x.shape[-1])


def gaussians_of(x, n):
    """The same, of data that may have yet to be drawn."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.LogNormal(1.0, 0.5)).log()
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(a + b, 1.5), obs=x)


def exact(x):
    """Evidence, posterior mean and covariance of `gaussians`."""
    n = x.shape[-1]
    mean, prior = torch.tensor([0.0, 1.0]), torch.tensor([4.0, 0.25]).diag()
    A = torch.ones(n, 2)
    S = A @ prior @ A.T + 2.25 * torch.eye(n)
    gain = prior @ A.T @ torch.linalg.inv(S)
    evidence = torch.distributions.MultivariateNormal(A @ mean, S).log_prob(x)
    return (
        evidence,
        mean + (x - A @ mean) @ gain.T,
        prior - gain @ A @ prior,
    )


def test_the_exact_posterior_has_the_evidence_as_every_weight(double):
    x = torch.tensor([2.0, 0.5, 3.0])
    evidence, mean, covariance = exact(x)
    guide = made(gaussians, Correlated(torch.linalg.cholesky(covariance)), x)
    last = guide.flow.bijection.bijections[1].thetas[0].value.data
    last[:, 0], last[:, 1] = 0.0, mean
    log_w = vectorized_importance_weights(
        gaussians, guide, x, num_samples=50, max_plate_nesting=1
    )[0]
    assert_close(log_w, evidence.expand(50), atol=1e-10, rtol=0)


@pytest.mark.parametrize("vectorize", [False, True])
def test_training_finds_the_evidence(double, vectorize):
    x = torch.tensor([2.0, 0.5, 3.0])
    evidence, mean, covariance = exact(x)
    guide = AutoFlow(gaussians, Triangular)
    elbo = Trace_ELBO(8 if vectorize else 1, 1, vectorize_particles=vectorize)
    decay = {"gamma": 0.05 ** (1 / 400)}
    rate = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}} | decay
    optimizer = pyro.optim.ExponentialLR(rate)
    svi = SVI(gaussians, guide, optimizer, elbo)
    for _ in range(400):
        svi.step(x)
        optimizer.step()
    log_w = vectorized_importance_weights(
        gaussians, guide, x, num_samples=2000, max_plate_nesting=1
    )[0]
    # the family holds the posterior: what is left is the noise of the steps
    assert -0.02 < log_w.mean() - evidence < 0.005
    found = guide.sample(20_000)
    u = torch.stack([found["a"], found["b"].log()], -1)
    sd = covariance.diagonal().sqrt()
    assert ((u.mean(0) - mean).abs() < 0.15 * sd).all()
    assert ((u.std(0) / sd - 1).abs() < 0.1).all()


def test_it_starts_narrow_where_the_model_says(double):
    values = {"place": torch.tensor(4.0), "scale": torch.tensor(0.2)}
    values["mix"] = torch.tensor([0.2, 0.3, 0.5])
    guide = made(
        supports,
        init_loc_fn=init_to_value(values=values),
        init_scale=0.01,
    )
    found = guide.sample(4000)
    # coordinates by themselves, 4 standard errors of means and deviations
    for u, start in (
        (found["place"], 4.0),
        (found["scale"].log(), math.log(0.2)),
    ):
        assert abs(u.mean() - start) < 4 * 0.01 / math.sqrt(4000)
        assert abs(u.std() / 0.01 - 1) < 4 / math.sqrt(2 * 4000)
    assert_close(found["mix"].mean(0), values["mix"], atol=2e-3, rtol=0)


def test_an_elbo_takes_one_pass_forward_and_none_back(monkeypatch):
    x = torch.ones(3)
    guide = AutoFlow(gaussians, partial(IAF, layers=2, hidden=(8,)))
    calls = []

    def never(*_):
        raise AssertionError("inverse")

    for vectorize in (False, True):
        elbo = Trace_ELBO(4, 1, vectorize_particles=vectorize)
        svi = SVI(gaussians, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        svi.step(x)
        f = guide.flow.bijection
        with monkeypatch.context() as patch:
            forward = f._forward
            patch.setattr(f, "_inverse", never)
            patch.setattr(
                f, "_forward", lambda *a: calls.append(1) or forward(*a)
            )
            svi.step(x)
        assert len(calls) == (1 if vectorize else 4)
        calls.clear()


def test_a_log_density_is_kept_for_one_question_alone(double):
    x = torch.ones(3)
    guide = scattered(made(gaussians, small, x))
    trace = poutine.trace(guide).get_trace(x)
    site = trace.nodes["_AutoFlow_latent"]
    first = site["fn"].log_prob(site["value"])
    assert_close(first, guide.flow.log_prob(site["value"]))
    scattered(guide)
    now = site["fn"].log_prob(site["value"])
    assert_close(now, guide.flow.log_prob(site["value"]))
    assert (now - first).abs() > 1e-3
    # of another value nothing is known
    trace = poutine.trace(guide).get_trace(x)
    site = trace.nodes["_AutoFlow_latent"]
    other = site["value"] + 1
    assert_close(site["fn"].log_prob(other), guide.flow.log_prob(other))
    # replayed values have the density that the guide gives them
    again = poutine.trace(poutine.replay(guide, trace)).get_trace(x)
    assert again.nodes["a"]["value"] == trace.nodes["a"]["value"]
    assert_close(again.log_prob_sum(), trace.log_prob_sum())


def test_gradients_are_those_of_the_elbo(double):
    x = torch.tensor([2.0, 0.5, 3.0])
    guide = scattered(made(gaussians, small, x))
    torch.manual_seed(3)
    Trace_ELBO(5, 1, vectorize_particles=True).differentiable_loss(
        gaussians, guide, x
    ).backward()
    found = [p.grad.clone() for p in guide.parameters()]
    guide.zero_grad()
    torch.manual_seed(3)
    u, log_q = guide.flow.rsample_and_log_prob((5, 1))
    a, b = u[..., 0], u[..., 1]
    log_p = dist.Normal(0.0, 2.0).log_prob(a) + dist.Normal(1.0, 0.5).log_prob(
        b
    )
    log_p = log_p + dist.Normal(a + b, 1.5).log_prob(x).sum(-1, keepdim=True)
    (log_q - log_p).mean().backward()
    for mine, p in zip(found, guide.parameters(), strict=True):
        assert_close(mine, p.grad)


class Summary(nn.Module):
    """The mean of a data set, as one feature."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x=None):
        return self.scale * x.mean(-1, keepdim=True)


def test_an_encoder_makes_one_guide_of_many_data_sets(double):
    many = torch.randn(6, 3)
    guide = made(gaussians, small, many[0], encoder=Summary())
    assert guide.flow.context_dim == 1
    scattered(guide)
    found = guide.sample((4,), many)
    assert found["a"].shape == (4, 6)
    density = guide.log_prob(found, many)
    assert density.shape == (4, 6)
    for i, x in enumerate(many):
        one = {name: value[:, i] for name, value in found.items()}
        assert_close(guide.log_prob(one, x), density[:, i])
        assert_close(guide.log_prob(one, x=x), density[:, i])
        trace = poutine.trace(guide).get_trace(x)
        values = {name: trace.nodes[name]["value"] for name in "ab"}
        assert_close(trace.log_prob_sum(), guide.log_prob(values, x))
    assert (density - guide.log_prob(found, many.flip(0))).abs().max() > 1e-3
    # one draw of latents, and all data sets
    one = {name: value[0, 0] for name, value in found.items()}
    assert guide.log_prob(one, many).shape == (6,)


def test_latents_are_taken_as_pyro_lays_them_out(double):
    """Also where all plates are those of the data."""
    x = torch.ones(3)
    guide = scattered(made(gaussians, small, x, encoder=Summary()))
    many = Predictive(
        lambda: gaussians_of(None, 3), num_samples=6, parallel=True
    )()
    assert many["a"].shape == (6, 1) and many["x"].shape == (6, 3)
    found = guide.log_prob(many, many["x"])
    flat = {name: many[name][:, 0] for name in "ab"}
    assert_close(found, guide.log_prob(flat, many["x"]), atol=0, rtol=0)
    each = [
        guide.log_prob({k: v[i] for k, v in flat.items()}, many["x"][i])
        for i in range(6)
    ]
    assert_close(found, torch.stack(each))
    # one draw of one data set is no layout of plates
    one = {name: value[:1] for name, value in flat.items()}
    assert guide.log_prob(one, x).shape == (1,)
    # nor are ones where there is a plate of latents
    other = made(supports)
    assert other.log_prob(other.sample((5, 1, 1))).shape == (5, 1, 1)


def test_training_on_draws_of_the_prior_finds_the_posterior(double):
    """Neural posterior estimation where the exact posterior is in the family."""
    x = torch.tensor([2.0, 0.5, 3.0])

    def bijection(d, context_dim):
        shear = Couplings(d, layers=2, hidden=(), context_dim=context_dim)
        return Compose(conditional(d, context_dim=context_dim), shear)

    guide = made(gaussians, bijection, x, encoder=Summary(), init_scale=1.0)
    n = 20_000
    a, b = 2 * torch.randn(n), 1 + 0.5 * torch.randn(n)
    data = (a + b)[:, None] + 1.5 * torch.randn(n, 3)
    latents = {"a": a, "b": b.exp()}
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=60, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -guide.log_prob(latents, data).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    _, mean, covariance = exact(x)
    found = guide.sample(20_000, x)
    u = torch.stack([found["a"], found["b"].log()], -1)
    sd = covariance.diagonal().sqrt()
    # errors of the fit to as many draws, and of as many draws of it
    assert ((u.mean(0) - mean).abs() < 0.08 * sd).all()
    assert ((u.std(0) / sd - 1).abs() < 0.05).all()
    rho = covariance[0, 1] / sd.prod()
    assert abs(torch.corrcoef(u.T)[0, 1] - rho) < 0.05


def test_svi_trains_the_encoder(double):
    guide = AutoFlow(gaussians, conditional, encoder=Summary())
    svi = SVI(gaussians, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    x = torch.ones(3)
    guide(x)
    scattered(guide)
    before = [p.detach().clone() for p in guide.parameters()]
    svi.step(x)
    moved = [(p != q).any() for p, q in zip(guide.parameters(), before)]
    assert all(moved) and len(moved) == 4  # encoder; weight and bias; last


class PyroSummary(pyro.nn.PyroModule):
    """The same, as a module of Pyro."""

    def __init__(self):
        super().__init__()
        positive = dist.constraints.positive
        self.scale = pyro.nn.PyroParam(torch.ones(1), positive)

    def forward(self, x):
        return self.scale * x.mean(-1, keepdim=True)


class Turned(Bijection):
    """A matrix that does not lie in memory row after row."""

    def __init__(self, d):
        super().__init__(d)
        matrix = torch.eye(d)
        matrix[0, 1:] = 0.5
        self.matrix = nn.Parameter(matrix.t())
        assert not self.matrix.is_contiguous()

    def _forward(self, z, context):
        ladj = torch.linalg.slogdet(self.matrix)[1]
        return z @ self.matrix.T, ladj.expand(z.shape[:-1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoFlow(gaussians, small),
        lambda: AutoFlow(gaussians, small, encoder=Summary()),
        lambda: AutoFlow(gaussians, small, encoder=PyroSummary()),
        lambda: AutoFlow(gaussians, Turned),
    ],
)
def test_two_guides_have_parameters_of_their_own(make):
    x = torch.ones(3)
    optimizer = pyro.optim.Adam({"lr": 0.1})
    first, second = make(), make()
    for guide, other in ((first, None), (second, first), (first, second)):
        svi = SVI(gaussians, guide, optimizer, Trace_ELBO())
        guide(x)
        mine = [p.detach().clone() for p in guide.parameters()]
        theirs = (
            [p.detach().clone() for p in other.parameters()] if other else []
        )
        svi.step(x)
        assert any((p != q).any() for p, q in zip(guide.parameters(), mine))
        for p, q in zip(other.parameters() if other else (), theirs):
            assert_close(p, q, atol=0, rtol=0)
        store = pyro.get_param_store()
        kept = {id(store[name].unconstrained()) for name in store}
        assert kept == {id(p) for p in guide.parameters()}


def test_parameters_of_the_module_alone():
    x = torch.ones(3)
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlow(gaussians, small)
        guide(x)
        # Pyro's SVI does not know parameters of modules in this mode
        loss = Trace_ELBO()(gaussians, guide)
        before = [p.detach().clone() for p in guide.parameters()]
        optimizer = torch.optim.Adam(loss.parameters(), 0.1)
        loss(x).backward()
        optimizer.step()
        assert any((p != q).any() for p, q in zip(guide.parameters(), before))
        assert not list(pyro.get_param_store())


def test_copies_pickles_and_state_dicts_are_the_guide(double):
    x = torch.ones(3)
    guide = scattered(made(gaussians, small, x, encoder=Summary()))
    latents = guide.sample(5, x)
    wanted = guide.log_prob(latents, x)
    pickled = pickle.loads(pickle.dumps(guide))
    assert pickled._model is None and callable(guide.model)
    copied = copy.deepcopy(guide)
    assert copied.model is guide.model
    for other in (pickled, copied):
        assert_close(other.log_prob(latents, x), wanted, atol=0, rtol=0)
        assert set(other(x)) == {"a", "b"}
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    loaded = AutoFlow(gaussians, small, encoder=Summary())
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    with pytest.raises(ValueError, match=r"^guide: .*guide\(\*args\)"):
        loaded.load_state_dict(saved)
    loaded(x)
    loaded.load_state_dict(saved)
    assert_close(loaded.log_prob(latents, x), wanted, atol=0, rtol=0)
    # the guide has learned nothing of its copies, and they nothing of it
    scattered(copied)
    assert_close(guide.log_prob(latents, x), wanted, atol=0, rtol=0)
    # a copy made before the first call can be called
    early = copy.deepcopy(AutoFlow(gaussians, small))
    assert set(early(x)) == {"a", "b"}


def test_a_model_that_learns_too_can_be_copied():
    class Learns(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self):
            pyro.sample("a", dist.Normal(0.0, self.scale.exp()))
            pyro.sample("b", dist.Uniform(0.0, self.scale.exp()))
            ends = self.scale.exp().expand(2)
            pyro.sample("c", dist.Uniform(-ends, ends).to_event(1))

    guide = made(Learns())
    assert set(pickle.loads(pickle.dumps(guide))()) == {"a", "b", "c"}
    assert set(copy.deepcopy(guide)()) == {"a", "b", "c"}


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(double, parallel):
    x = torch.ones(3)
    guide = scattered(made(gaussians, small, x, encoder=Summary()))
    found = Predictive(
        gaussians,
        guide=guide,
        num_samples=300,
        parallel=parallel,
        return_sites=("a", "b"),
    )(x)
    mine = guide.sample(20_000, x)
    a, b = found["a"].flatten(), mine["a"]
    assert a.shape == (300,)
    # 4 standard errors
    assert abs(a.mean() - b.mean()) < 4 * b.std() / math.sqrt(300)


def test_quantiles_and_median_are_those_of_the_posterior(double):
    x = torch.ones(3)
    guide = made(
        gaussians, partial(Elementwise, maps=AffineMap()), x, draws=40_000
    )
    last = guide.flow.bijection.bijections[-1].thetas[0].value.detach()
    q = torch.tensor([0.1, 0.5, 0.9])
    wanted = last[:, 1] + last[:, 0].exp() * torch.special.ndtri(q)[:, None]
    found = guide.quantiles([0.1, 0.5, 0.9], x)
    u = torch.stack([found["a"], found["b"].log()], -1)
    # of 40 000 draws, 5 standard errors of a tenth
    error = 5 * last[:, 0].exp() * 0.3 / 0.1755 / math.sqrt(40_000)
    assert ((u - wanted).abs() < error).all()
    median = guide.median(x)
    assert median["a"].shape == () and abs(median["a"] - last[0, 1]) < error[0]
    ends = guide.quantiles(torch.tensor([0.0, 1.0]))["a"]
    assert ends[0] < wanted[0, 0] and ends[1] > wanted[-1, 0]
    assert guide.quantiles(0.3)["b"].shape == ()
    # between two draws, a line
    two = made(gaussians, small, x, draws=2)
    torch.manual_seed(1)
    low, high = two.sample(2)["a"].sort().values
    torch.manual_seed(1)
    assert_close(two.quantiles(0.25)["a"], 0.75 * low + 0.25 * high)


def test_densities_are_zero_outside_of_the_supports(double):
    guide = scattered(made(supports))
    found = guide.sample(6)
    found["scale"][0] = -1.0
    found["share"][1, 2, 0] = 1.5
    found["mix"][2] = torch.tensor([0.5, 0.6, 0.1])
    found["point"][3, 0, 1] = math.nan
    found["range"][4] = math.nan
    found = {k: v.requires_grad_() for k, v in found.items()}
    density = guide.log_prob(found)
    assert (density[:3] == -math.inf).all() and density[3:5].isnan().all()
    density[5].backward()
    assert all(v.grad.isfinite().all() for v in found.values())
    # names beside the latents are passed over
    assert_close(guide.log_prob(found | {"x": torch.ones(2)})[5], density[5])


def test_a_base_may_have_heavy_tails_or_bumps(double):
    x = torch.ones(3)

    def student(d):
        return TorchBase(dist.StudentT(3 * torch.ones(d)).to_event(1))

    heavy = made(gaussians, small, x, base=student)
    wide, narrow = (
        g.sample(20_000)["a"].sub(g.median()["a"]).abs().quantile(0.999)
        for g in (heavy, made(gaussians, small, x))
    )
    assert wide > 1.5 * narrow
    bumps = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    guide = AutoFlow(gaussians, small, base=bumps)
    svi = SVI(gaussians, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(x))
    assert not guide.get_posterior(x).has_rsample


def test_a_bijection_itself_is_taken_as_it_is(double):
    f = RealNVP(2, 2, hidden=(8,)).float()
    x = torch.ones(3)
    guide = made(gaussians, f, x)
    assert guide.flow.bijection.bijections[0] is f
    assert next(f.parameters()).dtype == torch.float64
    spline = Elementwise(2, RationalQuadraticSplineMap())
    assert made(gaussians, spline, x)(x)["a"].dtype == torch.float64
    # one of any size gets the model's
    anywhere = made(gaussians, lambda d: Twice(), x)
    assert anywhere.flow.event_shape == (2,)


class Twice(Bijection):
    """A bijection of vectors of any size."""

    def _forward(self, z, context):
        return 2 * z, (0 * z + math.log(2)).sum(-1)


def test_the_posterior_is_its_base_and_its_transform(double):
    x = torch.ones(3)
    guide = scattered(made(gaussians, small, x, encoder=Summary()))
    u = torch.randn(5, 2)
    both = dist.TransformedDistribution(
        guide.get_base_dist(), [guide.get_transform(x)]
    )
    assert_close(both.log_prob(u), guide.get_posterior(x).log_prob(u))
    assert guide.get_base_dist().sample((5,)).shape == (5, 2)


def test_a_trained_guide_straightens_a_chain(double):
    x = torch.ones(3)
    guide = scattered(made(gaussians, small, x), 0.1)
    neutra = NeuTraReparam(guide)
    straight = poutine.reparam(gaussians, config=lambda _: neutra)
    z = torch.randn(2)
    trace = poutine.trace(
        poutine.condition(straight, {"a_shared_latent": z})
    ).get_trace(x)
    u, ladj = guide.flow.bijection.forward(z)
    log_p = dist.Normal(0.0, 2.0).log_prob(u[0])
    log_p = log_p + dist.Normal(1.0, 0.5).log_prob(u[1])
    log_p = log_p + dist.Normal(u.sum(), 1.5).log_prob(x).sum()
    assert_close(trace.log_prob_sum(), log_p + ladj)
    chain = MCMC(NUTS(straight), 5, 5, disable_progbar=True)
    chain.run(x)
    latents = chain.get_samples()["a_shared_latent"]
    assert neutra.transform_sample(latents)["b"].shape == (5,)


def test_it_can_be_one_of_several_guides():
    x = torch.ones(3)
    guide = AutoGuideList(gaussians)
    guide.append(
        AutoFlow(
            poutine.block(gaussians, hide=["b"]),
            lambda d: Elementwise(d, AffineMap()),
        )
    )
    guide.append(AutoDelta(poutine.block(gaussians, hide=["a"])))
    svi = SVI(gaussians, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(50)]
    assert all(map(math.isfinite, losses))
    assert set(guide(x)) == {"a", "b"}


def test_data_may_be_shown_in_parts():
    x = torch.arange(10.0)

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=3) as rows:
            pyro.sample("x", dist.Normal(a, 1.0), obs=x[rows])

    guide = AutoFlow(model, lambda d: Elementwise(d, AffineMap()))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert math.isfinite(svi.step(x))


def local(size, subsample=None):
    with pyro.plate("data", size, subsample_size=subsample):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def one_by_one():
    for i in pyro.plate("data", 3):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


def discrete():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("k", dist.Poisson(3.0))


def at_the_edge(site):
    return torch.zeros(()) if site["name"] == "b" else torch.ones(())


X = torch.ones(3)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: AutoFlow(3, RealNVP), "^model: expected a function"),
        (lambda: AutoFlow(gaussians, 3), "^bijection: .*got int"),
        (lambda: AutoFlow(gaussians, RealNVP, base=3), "^base: .*got int"),
        (lambda: AutoFlow(gaussians, RealNVP, encoder=3), "^encoder: "),
        (lambda: AutoFlow(gaussians, RealNVP, encoder=Summary), "^encoder: "),
        (lambda: AutoFlow(gaussians, RealNVP, init_scale=0.0), "^init_scale"),
        (lambda: AutoFlow(gaussians, RealNVP, draws=0), "^draws: "),
        (lambda: AutoFlow(gaussians, RealNVP, init_loc_fn=1), "^init_loc_fn"),
        (lambda: made(discrete), "discrete sample site 'k'"),
        (lambda: made(lambda: None), "^model: .*without any"),
        (lambda: made(one_by_one), "^model: .*sequential"),
        (
            lambda: made(local, small, 10, 4),
            "^model: .*'z' in 'data', which shows 4 of 10",
        ),
        (
            lambda: made(gaussians, RealNVP(3), X),
            r"^bijection: .*shape \(2,\).*got \(3,\)",
        ),
        (
            lambda: made(gaussians, lambda d: RealNVP(d + 1), X),
            r"^bijection: .*shape \(2,\).*got \(3,\)",
        ),
        (
            lambda: made(gaussians, lambda d: nn.Linear(d, d), X),
            "^bijection: .*got Linear",
        ),
        (
            lambda: made(gaussians, lambda: RealNVP(2), X),
            "^bijection: .*positional argument",
        ),
        (
            lambda: made(gaussians, RealNVP(2, context_dim=3), X),
            "^bijection: expected context_dim 0, without an encoder, got 3",
        ),
        (
            lambda: made(gaussians, RealNVP(2), X, encoder=Summary()),
            "^bijection: expected context_dim 1, as encoded, got 0",
        ),
        (
            lambda: made(gaussians, lambda d: RealNVP(d), X, encoder=Summary()),
            "^bijection: .*context_dim",
        ),
        (
            lambda: made(gaussians, RealNVP, X, encoder=lambda x: x[:, None]),
            r"^encoder: .*one data set.*got \(3, 1\)",
        ),
        (
            lambda: made(gaussians, RealNVP, X, encoder=lambda x: 1.0),
            "^encoder: expected floating-point numbers",
        ),
        (
            lambda: made(gaussians, small, X, base=lambda d: nn.Linear(d, d)),
            "^base: .*Linear",
        ),
        (
            lambda: made(gaussians, small, X, base=StandardNormal(3)),
            r"^base: expected event shape \(2,\), got \(3,\)",
        ),
        (
            lambda: made(gaussians, small, X, init_loc_fn=at_the_edge),
            "^init_loc_fn: .*inf",
        ),
        (
            lambda: made(
                gaussians,
                lambda d: Elementwise(d, {(0, 1): SigmoidMap()}),
                X,
                base=TorchBase(dist.Uniform(torch.zeros(2), 1.0).to_event(1)),
            ).sample(-1),
            "^shape: ",
        ),
        (lambda: AutoFlow(gaussians, small).sample(3), "^guide: "),
        (lambda: AutoFlow(gaussians, small).get_posterior(), "^guide: "),
        (lambda: AutoFlow(gaussians, small).get_transform(), "^guide: "),
        (lambda: AutoFlow(gaussians, small).get_base_dist(), "^guide: "),
        (lambda: AutoFlow(gaussians, small).sample_latent(), "^guide: "),
        (lambda: AutoFlow(gaussians, small).median(), "^guide: "),
        (lambda: AutoFlow(gaussians, small).log_prob({}), "^guide: "),
        (
            lambda: made(gaussians, small, X).log_prob({"a": X}),
            r"^latents: .*'b' among them, got \['a'\]",
        ),
        (
            lambda: made(gaussians, small, X).log_prob(X),
            r"^latents: .*got shape \(3,\)",
        ),
        (
            lambda: made(gaussians, small, X).log_prob({"a": X, "b": X[:2]}),
            r"^latents: .*broadcast, got \[\(3,\), \(2,\)\]",
        ),
        (
            lambda: made(gaussians, small, X).log_prob({"a": 1.0, "b": X}),
            r"^latents\['a'\]: expected floating-point",
        ),
        (
            lambda: made(supports).log_prob(
                {name: torch.ones(2) for name in SIZES}
            ),
            r"^latents\['share'\]: expected shape \(\*batch, 3, 2\), got \(2,\)",
        ),
        (
            lambda: made(gaussians, small, X).quantiles([0.5, 1.5]),
            "^quantiles: expected numbers from 0 to 1",
        ),
        (
            lambda: made(
                gaussians, small, X, encoder=lambda x: x[..., :2]
            ).sample(3, X[:1]),
            "^context: .*dimension 2, got shape",
        ),
        (
            lambda: made(gaussians, small, X, encoder=lambda x: x[..., :2])(
                torch.ones(4, 3)
            ),
            r"^encoder: .*got \(4, 2\)",
        ),
        (
            lambda: made(
                gaussians, small, X, encoder=lambda x: x[..., :2]
            ).log_prob({"a": X, "b": X}, torch.ones(4, 3)),
            "^context: batch shape",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_an_error_of_the_first_call_leaves_no_half_made_guide():
    guide = AutoFlow(gaussians, small)
    with pytest.raises(AttributeError):
        guide(None)
    assert set(guide(X)) == {"a", "b"}
    sizes = iter([3, 2])
    guide = AutoFlow(gaussians, lambda _: small(next(sizes)))
    with pytest.raises(ValueError, match="^bijection: "):
        guide(X)
    with pytest.raises(ValueError, match="^guide: "):
        guide.median()
    assert set(guide(X)) == {"a", "b"}

    def broken(x):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        raise RuntimeError("of the model's own")

    with pytest.raises(RuntimeError, match="of the model's own"):
        AutoFlow(broken, small)(X)
