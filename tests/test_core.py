"""Flows as modules, as distributions of torch and Pyro, and under torch's function transforms."""

import copy
import io
import math
import pickle
import shutil
from functools import partial

import pyro
import pyro.distributions as pdist
import pytest
import torch
import torch.distributions as D
from pyro.infer import SVI, Trace_ELBO
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing import assert_close

from flowcourse.core import (
    Base,
    Bijection,
    Compose,
    DiagonalGaussian,
    Flow,
    FlowDistribution,
    GaussianMixture,
    Inverse,
    StandardNormal,
    TorchBase,
    Uniform,
)
from flowcourse.coupling import RealNVP
from flowcourse.testing import total_mass
from flowcourse.zoo import zoo


class Counted(Bijection):
    """Multiplies by two, and counts how often each direction runs."""

    def __init__(self, dim):
        super().__init__(dim)
        self.calls = {"forward": 0, "inverse": 0}

    def _forward(self, z, context):
        self.calls["forward"] += 1
        return 2 * z, z.new_full(z.shape[:-1], z.shape[-1] * math.log(2))

    def _inverse(self, x, context):
        self.calls["inverse"] += 1
        return x / 2, x.new_full(x.shape[:-1], -x.shape[-1] * math.log(2))


class Flatten(Bijection):
    """Turns images into vectors: a map that changes the event's shape."""

    event_dim_out = 1

    def event_shape_out(self, event_shape):
        return (math.prod(event_shape),)

    def event_shape_in(self, event_shape):
        return self.event_shape

    def _forward(self, z, context):
        return z.flatten(-3), z.new_zeros(z.shape[:-3])

    def _inverse(self, x, context):
        return x.unflatten(-1, self.event_shape), x.new_zeros(x.shape[:-1])


def bases():
    return {
        "normal": StandardNormal(2),
        "gaussian": DiagonalGaussian(
            2, loc=torch.tensor([1.0, -2.0]), scale=0.5
        ),
        "mixture": GaussianMixture(
            torch.tensor([[0.0, 0.0], [4.0, 1.0]]),
            0.7,
            weights=torch.tensor([1.0, 3.0]),
        ),
        "uniform": Uniform(2, low=-1.0, high=torch.tensor([1.0, 3.0])),
        "torch normal": TorchBase(
            D.Independent(D.Normal(torch.tensor([0.0, 1.0]), 2.0), 1)
        ),
        "torch full": TorchBase(
            D.MultivariateNormal(
                torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
            )
        ),
        "torch mixture": TorchBase(
            D.MixtureSameFamily(
                D.Categorical(torch.tensor([0.3, 0.7])),
                D.Independent(
                    D.Normal(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), 1.0), 1
                ),
            )
        ),
        "pyro": TorchBase(
            pdist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)
        ),
    }


@pytest.mark.parametrize("name", bases())
def test_a_base_has_mass_one_and_samples_what_it_says(name):
    base = bases()[name].double()
    weigh = partial(total_mass, base.log_prob, 2, dtype=torch.float64)
    mass = weigh(-1.0, 3.0) if name == "uniform" else weigh()
    assert_close(mass, torch.ones_like(mass), atol=1e-3, rtol=0)
    z = base.sample((20_000,), torch.Generator().manual_seed(1))
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    part = weigh(low.tolist(), high.tolist()).item()
    share = ((z > low) & (z < high)).all(-1).double().mean().item()
    assert abs(share - part) < 5 * math.sqrt(part * (1 - part) / 20_000) + 1e-3


@pytest.mark.parametrize("name", bases())
def test_a_base_honours_its_generator_and_leaves_the_global_one_alone(name):
    base = bases()[name]
    before = torch.get_rng_state()
    one, two, other = (
        base.sample((5,), torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("name", bases())
def test_a_base_moves_copies_and_pickles_with_the_flow(name):
    flow = Flow(RealNVP(2, 2, hidden=(4,)), bases()[name])
    x = flow.sample(4)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    fresh = Flow(RealNVP(2, 2, hidden=(4,)), bases()[name])
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.log_prob(x), flow.log_prob(x))
    double = copy.deepcopy(flow).double()
    assert double.sample(4).dtype == torch.float64
    assert_close(
        double.log_prob(x.double()),
        flow.log_prob(x).double(),
        atol=1e-4,
        rtol=1e-5,
    )
    # every tensor has moved, none was left behind
    meta = copy.deepcopy(flow.base).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())


def test_trainable_bases_learn_and_keep_a_positive_scale():
    base = DiagonalGaussian(1)
    with torch.no_grad():
        base.raw_scale.fill_(-200.0)  # softplus underflows to zero here
    assert (base.scale > 0).all() and base.scale.log().isfinite().all()
    base = DiagonalGaussian(2, loc=3.0, scale=0.25)
    assert_close(base.scale, torch.full((2,), 0.25))
    for trained in (base, GaussianMixture(torch.randn(3, 2))):
        trained.log_prob(torch.randn(7, 2)).sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0
            for p in trained.parameters()
        )


@pytest.mark.parametrize(
    "bad", [D.Normal(torch.zeros(2), 1.0), D.Normal(0.0, 1.0)]
)
def test_a_torch_base_wants_one_event(bad):
    with pytest.raises(ValueError, match="^base: expected"):
        Flow(RealNVP(2), bad)


def test_a_torch_base_refuses_what_it_cannot_move():
    hidden = D.TransformedDistribution(
        StandardNormalTorch(), [D.AffineTransform(torch.ones(2), 2.0)]
    )
    with pytest.raises(ValueError, match="cannot move with the flow"):
        Flow(RealNVP(2), D.Independent(hidden, 0))
    with pytest.raises(
        ValueError,
        match="^base: expected a Base or a torch distribution, got int",
    ):
        Flow(RealNVP(2), 3)


class Root(Bijection):
    """Square root of every coordinate: takes points between 0 and 1 only."""

    domain = codomain = D.constraints.independent(
        D.constraints.unit_interval, 1
    )

    def _forward(self, z, context):
        return z.sqrt(), -torch.log(2 * z.sqrt()).sum(-1)

    def _inverse(self, x, context):
        return x.square(), torch.log(2 * x).sum(-1)


class Log(Root):
    domain, codomain = (
        D.constraints.independent(D.constraints.positive, 1),
        D.constraints.real_vector,
    )


class Simplex(Root):
    domain = codomain = D.constraints.simplex


def many(make, *args):
    return D.Independent(make(*(torch.full((2,), a) for a in args)), 1)


@pytest.mark.parametrize(
    ("make", "base", "fits"),
    [
        (Root, lambda: Uniform(2), True),
        (Root, lambda: Uniform(2, 0.25, torch.tensor([0.5, 1.0])), True),
        (Root, lambda: many(D.Beta, 2.0, 3.0), True),
        (Root, lambda: None, False),
        (Root, lambda: DiagonalGaussian(2), False),
        (Root, lambda: Uniform(2, 0.0, torch.tensor([1.0, 1.001])), False),
        (Root, lambda: many(D.Exponential, 1.0), False),
        (Log, lambda: many(D.Exponential, 1.0), True),
        (Log, lambda: many(D.Gamma, 1.0, 2.0), True),
        (Log, lambda: many(pdist.Laplace, 0.0, 1.0), False),
        (lambda n: Inverse(Log(n)), lambda: None, True),
        (
            lambda n: Compose(Root(n), Counted(n)),
            lambda: bases()["torch mixture"],
            False,
        ),
        (
            lambda n: Compose(Counted(n), RealNVP(n, context_dim=3)),
            lambda: Uniform(2),
            True,
        ),
        (Simplex, lambda: D.Dirichlet(torch.ones(2)), True),
        (Simplex, lambda: None, False),
    ],
)
def test_a_base_lies_in_the_domain(make, base, fits):
    before = torch.get_rng_state()
    if fits:
        flow = copy.deepcopy(Flow(make(2), base()))
        assert flow.base.support.check(flow.base.double().sample((9,))).all()
    else:
        with pytest.raises(
            ValueError,
            match=r"^base: \w+ takes points of .*, got \w+ with support",
        ):
            Flow(make(2), base())
        assert torch.equal(torch.get_rng_state(), before)


def test_the_domain_is_compared_on_the_meta_device():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="takes points of"):
            Flow(Root(2))
    # bounds without values
    assert Flow(Root(2), Uniform(2).to("meta")).base.low.is_meta
    assert Flow(
        Counted(2).to("meta"), StandardNormal(2).to("meta")
    ).base.loc.is_meta


def StandardNormalTorch():
    return D.Independent(D.Normal(torch.zeros(2), torch.ones(2)), 1)


def test_compose_runs_in_generative_order_and_adds_the_ladjs():
    f, g = RealNVP(3, 1, hidden=(4,)), Counted(3)
    z = torch.randn(5, 3)
    y, first = f(z)
    x, second = g(y)
    both, ladj = Compose(f, g)(z)
    assert torch.equal(both, x) and torch.equal(ladj, first + second)
    back, reverse = Inverse(Compose(f, g)).forward(x)
    assert_close(back, z) and assert_close(reverse, -ladj)


def test_compose_carries_shapes_through_maps_that_change_them():
    f = Compose(Flatten((1, 2, 2)), Counted(4))
    assert (f.event_shape, f.event_dim, f.event_dim_out) == ((1, 2, 2), 3, 1)
    assert f.event_shape_out((1, 2, 2)) == (4,)
    flow = Flow(f)
    assert flow.event_shape == (4,) and flow.sample(3).shape == (3, 4)
    assert flow.log_prob(torch.randn(3, 4)).shape == (3,)
    back = Inverse(f)
    assert (back.event_shape, back.event_shape_out((4,))) == ((4,), (1, 2, 2))
    z, ladj = back.forward(torch.randn(6, 4))
    assert z.shape == (6, 1, 2, 2) and ladj.shape == (6,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compose(), "bijections: Compose expects at least one"),
        (
            lambda: Compose(Counted(2), Counted(3)),
            r"bijections\[1\]: .* shape \(3,\), got \(2,\)",
        ),
        (
            lambda: Compose(Flatten((1, 2, 2)), Flatten((1, 2, 2))),
            r"bijections\[1\]: .* 3 dimensions",
        ),
        (
            lambda: Compose(
                RealNVP(2, context_dim=1), RealNVP(2, context_dim=2)
            ),
            "one context_dim",
        ),
        (
            lambda: Flow(Counted(2), StandardNormal(3)),
            r"base: expected event shape \(2,\)",
        ),
        (lambda: Flow(Bijection()), "base: expected one"),
        (
            lambda: Bijection(0),
            "event_shape: expected positive integers, got 0",
        ),
        (
            lambda: Bijection(2, -1),
            "context_dim: expected a whole number of at least 0, got -1",
        ),
        (
            lambda: DiagonalGaussian(2, scale=-1.0),
            r"scale: expected finite numbers above 0, got -1.0",
        ),
        (lambda: Uniform(1, 1.0, 0.0), "high: expected above low"),
        (
            lambda: GaussianMixture(torch.zeros(3)),
            r"loc: expected shape \(components",
        ),
        (
            lambda: RealNVP(2)(torch.zeros(4, 3)),
            r"z: RealNVP expects last dimension 2, got .*\(4, 3\)",
        ),
        (
            lambda: RealNVP(2).inverse(torch.zeros(2).double()),
            "x: RealNVP holds torch.float32, got",
        ),
        (
            lambda: RealNVP(2)(torch.zeros(2, dtype=torch.long)),
            "floating-point tensor, got a torch.int64",
        ),
        (lambda: RealNVP(2)([0.0, 0.0]), "floating-point tensor, got list"),
        (
            lambda: RealNVP(2)(torch.zeros(2), torch.zeros(1)),
            "context: RealNVP expects none, got shape",
        ),
        (
            lambda: RealNVP(2, context_dim=3)(torch.zeros(2)),
            r"context: .*\(\*batch, 3\), got none",
        ),
        (
            lambda: Flow(RealNVP(2, context_dim=3))(),
            r"context: Flow expects shape \(\*batch, 3\)",
        ),
        (
            lambda: RealNVP(2, context_dim=1)(
                torch.zeros(4, 2), torch.zeros(3, 1)
            ),
            r"context: batch shape \(3,\) does not broadcast against \(4,\)",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_log_prob_computes_one_inverse():
    flow = Flow(Counted(2))
    x = torch.randn(6, 2)
    flow().log_prob(x)
    assert flow.bijection.calls == {"forward": 0, "inverse": 1}
    flow.rsample_and_log_prob(5)
    assert flow.bijection.calls == {"forward": 1, "inverse": 1}


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_flow_is_a_torch_distribution(context_dim, scramble):
    flow = scramble(Flow(RealNVP(3, 2, hidden=(4,), context_dim=context_dim)))
    context = torch.randn(5, 2) if context_dim else None
    batch = (5,) if context_dim else ()
    d = flow(context)
    assert (d.batch_shape, d.event_shape, d.has_rsample) == (batch, (3,), True)
    x = d.sample((7,))
    assert (
        x.shape == (7, *batch, 3)
        and not x.requires_grad
        and d.rsample().requires_grad
    )
    assert d.support.check(x).all()
    assert_close(d.log_prob(x), flow.log_prob(x, context))
    wide = d.expand((4, 5))
    assert wide.batch_shape == (4, 5) and wide.sample((2,)).shape == (
        2,
        4,
        5,
        3,
    )
    value = wide.sample()
    assert_close(wide.log_prob(value), flow.log_prob(value, context))
    assert wide.log_prob(value[0, 0]).shape == (4, 5)
    # compiling elsewhere turns the default of all distributions off
    checked = FlowDistribution(flow, context, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(torch.full((3,), math.nan))


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("module", [D, pdist])
def test_transformed_distribution_accepts_the_transform(
    module, cache_size, scramble
):
    flow = scramble(Flow(RealNVP(2, 2, hidden=(4,), context_dim=1)))
    context = torch.randn(5, 1)
    base = module.Independent(module.Normal(torch.zeros(2), torch.ones(2)), 1)
    transform = flow.bijection.as_transform(context, cache_size)
    d = module.TransformedDistribution(base, [transform])
    assert (d.batch_shape, d.event_shape) == ((5,), (2,))
    x = d.rsample((4,))
    assert_close(d.log_prob(x), flow.log_prob(x, context), atol=1e-4, rtol=1e-5)
    z = transform.inv(x)
    assert_close(transform(z), x, atol=1e-5, rtol=1e-5)
    assert (
        transform.inverse_shape((5, 2)) == (5, 2)
        and transform.domain.event_dim == 1
    )


def test_a_cached_transform_does_not_compute_twice():
    f = Counted(2)
    d = D.TransformedDistribution(
        StandardNormalTorch(), [f.as_transform(cache_size=1)]
    )
    x = d.rsample((3,))
    d.log_prob(x)
    assert f.calls == {"forward": 1, "inverse": 0}
    d.log_prob(x.clone())
    assert f.calls == {"forward": 1, "inverse": 1}
    assert f.as_transform().with_cache(1)._cache_size == 1


def test_a_flow_works_in_pyro_models_plates_and_guides(scramble):
    pyro.clear_param_store()
    data = torch.randn(40, 2) * 0.5 + torch.tensor([1.0, -1.0])

    def model(x):
        with pyro.plate("rows", len(x)):
            return pyro.sample("x", flow(), obs=x)

    flow = scramble(Flow(RealNVP(2, 2, hidden=(4,))), 0.1)
    trace = pyro.poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    assert_close(trace.nodes["x"]["log_prob"], flow.log_prob(data))

    def target():
        with pyro.plate("batch", 8):
            pyro.sample(
                "z", pdist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1)
            )

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("batch", 8):
            pyro.sample("z", flow.condition(None))

    svi = SVI(target, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    pyro.enable_validation(True)
    losses = [svi.step() / 8 for _ in range(300)]
    # zero is the optimum
    assert sum(losses[-20:]) / 20 < 0.1 < sum(losses[:20]) / 20

    conditional = Flow(RealNVP(2, 2, hidden=(4,), context_dim=3))
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 5, dim=-1):
        assert pyro.sample("y", conditional(torch.randn(5, 3))).shape == (
            4,
            5,
            2,
        )
    masked = conditional(torch.randn(5, 3)).mask(
        torch.zeros(5, dtype=torch.bool)
    )
    assert torch.equal(masked.log_prob(torch.randn(5, 2)), torch.zeros(5))


def test_rsample_and_log_prob_agree_with_log_prob_and_carry_gradients(scramble):
    flow = scramble(
        Flow(RealNVP(2, 2, hidden=(4,)), DiagonalGaussian(2))
    ).double()
    x, log_prob = flow.rsample_and_log_prob(
        9, generator=torch.Generator().manual_seed(0)
    )
    assert_close(log_prob, flow.log_prob(x))
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    noise = flow.base.noise((9,), torch.Generator().manual_seed(0))
    assert torch.equal(flow.rsample_and_log_prob(noise=noise)[0], x)
    with pytest.raises(ValueError, match="no reparametrised sample"):
        Flow(
            RealNVP(2), GaussianMixture(torch.randn(2, 2))
        ).rsample_and_log_prob(3)


rows = [
    # with context where the row takes one: then its parameters come out of a
    # network
    pytest.param(
        row,
        row.event_shapes[0],
        row.make(row.event_shapes[0], 2).context_dim,
        id=name,
    )
    for name, row in zoo.items()
]


@pytest.mark.parametrize(("row", "shape", "context_dim"), rows)
def test_both_directions_compile_without_a_graph_break(
    row, shape, context_dim, scramble
):
    torch._dynamo.reset()
    f = scramble(row.make(shape, context_dim)).eval()
    z = D.biject_to(f.domain)(torch.randn(5, *shape))
    context = torch.randn(5, context_dim) if context_dim else None
    x = f.forward(z, context)[0].detach()
    for direction, start in ((f.forward, z), (f.inverse, x)):
        fast = torch.compile(direction, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(fast(start, context), direction(start, context)):
            assert_close(got, wanted)


@pytest.mark.skipif(
    not shutil.which("g++"), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("name", ["affine-coupling", "realnvp"])
def test_inductor_compiles_training(name, scramble):
    torch._dynamo.reset()
    flow = scramble(Flow(zoo[name].make(2)))
    x = torch.randn(16, 2)
    fast = torch.compile(lambda x: flow.log_prob(x).mean(), fullgraph=True)
    assert_close(fast(x), flow.log_prob(x).mean())
    wanted = torch.autograd.grad(
        flow.log_prob(x).mean(), list(flow.parameters())
    )
    got = torch.autograd.grad(fast(x), list(flow.parameters()))
    assert_close(got, wanted)


@pytest.mark.parametrize(("row", "shape", "context_dim"), rows)
def test_function_transforms(row, shape, context_dim, scramble):
    f = scramble(row.make(shape, context_dim)).double().eval()
    z = D.biject_to(f.domain)(torch.randn(4, *shape, dtype=torch.float64))
    c = (
        torch.randn(4, context_dim, dtype=torch.float64)
        if context_dim
        else None
    )
    dims = (0, None if c is None else 0)
    x = f.forward(z, c)[0].detach()
    for direction, start in ((f.forward, z), (f.inverse, x)):
        each = vmap(direction, in_dims=dims)(start, c)
        for got, wanted in zip(each, direction(start, c)):
            assert_close(got, wanted)

        def point(z, c):
            return direction(z, c)[0].sum()

        hessian = vmap(jacrev(jacrev(point)), in_dims=dims)(start, c)
        assert hessian.isfinite().all()
        assert_close(
            vmap(grad(point), in_dims=dims)(start, c), jacrev(point)(start, c)
        )

    def loss(parameters):
        x, ladj = functional_call(f, parameters, (z, c))
        return x.square().sum() + ladj.sum()

    parameters = dict(f.named_parameters())
    if not parameters:
        return
    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_close(list(grad(loss)(parameters).values()), list(wanted))


def test_the_dtype_and_device_are_the_bases(scramble):
    flow = scramble(Flow(RealNVP(2, 2, hidden=(4,)))).double()
    assert flow.sample(3).dtype == torch.float64
    assert isinstance(flow.base, Base) and flow.base.loc.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_flow_moves_to_the_gpu():
    flow = Flow(
        RealNVP(2, 2, hidden=(4,)),
        D.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ).cuda()
    x = flow.sample(5, generator=torch.Generator().manual_seed(0))
    assert x.is_cuda and flow.log_prob(x).is_cuda
