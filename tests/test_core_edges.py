"""Density zero, settings at the edge, and mistakes in the calls of the core's classes."""

import copy
import math
import re

import numpy as np
import pyro.distributions as pdist
import pytest
import torch
import torch.distributions as D
from torch import nn
from torch.func import jacrev, vmap
from torch.testing import assert_close

from flowcourse.core import (
    Base,
    Bijection,
    BijectionTransform,
    Compose,
    DiagonalGaussian,
    Flow,
    FlowDistribution,
    GaussianMixture,
    Inverse,
    StandardNormal,
    TorchBase,
    Uniform,
    as_float,
    as_int,
    as_shape,
)
from flowcourse.coupling import RealNVP
from flowcourse.elementwise import (
    AffineMap,
    Elementwise,
    ELUMap,
    ExpMap,
    SigmoidMap,
    SoftplusMap,
    TanhMap,
)
from flowcourse.splines import RationalQuadraticSplineMap

inf, nan = math.inf, math.nan


def affine(shift=0.0):
    """A map of the plane onto itself with a parameter."""
    f = Elementwise(2, AffineMap())
    with torch.no_grad():
        f.thetas[0].value[:, 1] = shift  # after the raw scale
    return f


def many(make, *args):
    return D.Independent(make(*(torch.full((2,), a) for a in args)), 1)


# --- density zero ------------------------------------------------------------

OUTSIDE = {  # a flow, and points that it never reaches
    "exp": (lambda: Flow(Elementwise(2, ExpMap())), [-1.0, 0.0, -inf]),
    "softplus": (lambda: Flow(Elementwise(2, SoftplusMap())), [-1.0, 0.0]),
    "elu": (lambda: Flow(Elementwise(2, ELUMap())), [-1.5, -1.0]),
    "sigmoid": (
        lambda: Flow(Elementwise(2, SigmoidMap())),
        [-0.1, 1.1, 50.0, inf, -inf],
    ),
    "tanh": (lambda: Flow(Elementwise(2, TanhMap())), [-1.1, 1.1]),
    "ranges": (
        lambda: Flow(Elementwise(2, {(0, 1): ExpMap(), (1, 2): SigmoidMap()})),
        [-0.5],
    ),
    "a chain": (
        lambda: Flow(Compose(affine(), Elementwise(2, SigmoidMap()))),
        [-0.1, 1.1],
    ),
    "within a chain": (
        lambda: Flow(Compose(Elementwise(2, SigmoidMap()), affine(3.0))),
        [2.9, 4.1],
    ),
    "a spline on a box": (
        lambda: Flow(
            Elementwise(2, RationalQuadraticSplineMap(4, (0.0, 1.0), "box")),
            Uniform(2),
        ),
        [-0.1, 1.1],
    ),
    "a map turned round": (
        lambda: Flow(
            Inverse(Elementwise(2, ExpMap())), many(D.Exponential, 1.0)
        ),
        [],
    ),
    "uniform": (lambda: Flow(affine(), Uniform(2)), [-0.1, 1.1, inf]),
    "torch uniform": (
        lambda: Flow(affine(), many(D.Uniform, 0.0, 1.0)),
        [-0.1, 1.1, inf],
    ),
    "exponential": (
        lambda: Flow(affine(), many(D.Exponential, 1.0)),
        [-0.1],
    ),
    "beta": (lambda: Flow(affine(), many(D.Beta, 2.0, 3.0)), [-0.1, 1.1]),
    "pyro": (lambda: Flow(affine(), many(pdist.Gamma, 2.0, 1.0)), [-0.1]),
    "a mixture": (
        lambda: Flow(
            affine(),
            D.MixtureSameFamily(
                D.Categorical(torch.ones(3)),
                D.Independent(
                    D.Uniform(
                        torch.tensor([[0.0], [0.2], [-4.0]]).expand(3, 2),
                        torch.tensor([[1.0], [0.5], [-3.0]]).expand(3, 2),
                    ),
                    1,
                ),
            ),
        ),
        [-0.1, -5.0, 1.1],
    ),
    "a mixture of half-lines": (
        lambda: Flow(
            affine(),
            D.MixtureSameFamily(
                D.Categorical(torch.ones(3)),
                D.Independent(D.Exponential(torch.ones(3, 2)), 1),
            ),
        ),
        [-0.1],
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_log_of_density_zero_is_minus_infinity(name):
    make, outside = OUTSIDE[name]
    flow = make()
    inside = torch.full((2,), 3.5 if name == "within a chain" else 0.3)
    rows = [[p, inside[1]] for p in outside] + [[inside[0], p] for p in outside]
    x = torch.tensor([inside.tolist(), *rows, [nan, 0.3], [nan, -99.0]])
    found = flow.log_prob(x)
    assert found[0].isfinite()
    assert (found[1:-2] == -inf).all() and found[-2:].isnan().all()
    assert_close(vmap(flow.log_prob)(x), found, equal_nan=True)
    # rows outside spoil no gradient
    x = x[:-2].requires_grad_()
    alone = flow.log_prob(x[0])
    parameters = [x, *flow.parameters()]
    wanted = torch.autograd.grad(alone, parameters, allow_unused=True)
    got = torch.autograd.grad(
        flow.log_prob(x).sum(), parameters, allow_unused=True
    )
    for a, b in zip(got, wanted, strict=True):
        if b is not None:
            assert a.isfinite().all()
            if not flow._onto:  # the map ends there, and not the base
                assert_close(a, b)
    slopes = jacrev(lambda x: flow.log_prob(x).sum())(x.detach())
    assert slopes.isfinite().all()


@pytest.mark.parametrize("name", ["ranges", "within a chain", "sigmoid"])
def test_density_zero_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    make, outside = OUTSIDE[name]
    flow, x = make(), torch.tensor([[p, 0.3] for p in (*outside, 0.3, nan)])
    fast = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    assert_close(fast(x), flow.log_prob(x), equal_nan=True)


def test_the_ends_of_a_closed_interval_have_a_density():
    ends = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for base in (Uniform(2), many(D.Beta, 1.0, 1.0)):
        assert_close(Flow(affine(), base).log_prob(ends), torch.zeros(2))
    assert Flow(Elementwise(2, SigmoidMap())).log_prob(ends).isfinite().all()


def test_points_of_a_circle_are_read_modulo_its_length():
    spline = RationalQuadraticSplineMap(4, math.pi, "circular")
    flow = Flow(Elementwise(1, spline), Uniform(1, -math.pi, math.pi))
    x = torch.tensor([[math.pi], [1.0 + 2 * math.pi], [1.0]])
    found = flow.log_prob(x)
    assert found.isfinite().all()
    assert_close(found[1], found[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "base",
    [
        StandardNormal(2),
        DiagonalGaussian(2),
        GaussianMixture(torch.zeros(3, 2)),
        Uniform(2),
        TorchBase(many(D.Normal, 0.0, 1.0)),
        TorchBase(many(D.Uniform, 0.0, 1.0)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_the_density_at_nan_is_nan(base):
    z = torch.tensor([[nan, 0.5], [0.5, 0.5], [nan, 9.0]])
    assert base.log_prob(z).isnan().tolist() == [True, False, True]


def test_the_distribution_of_a_flow_speaks_of_data():
    flow = Flow(affine(2.0), many(D.Exponential, 1.0))
    x = torch.tensor([[1.0, 3.0]])  # of density zero, but a point of the plane
    assert flow().log_prob(x) == -inf
    flow = Flow(Elementwise(2, SigmoidMap()))
    d = FlowDistribution(flow, validate_args=True)
    with pytest.raises(ValueError, match=r"(?s)FlowDistribution.*1\.5"):
        d.log_prob(torch.full((2,), 1.5))


def test_a_density_of_the_whole_plane_asks_for_no_more_calls():
    flow = Flow(affine())
    assert flow._onto and Flow(Compose(affine(), affine()))._onto
    assert not Flow(Compose(Elementwise(2, ExpMap()), affine()))._onto


# --- where points come from --------------------------------------------------


def logit():
    return Inverse(Elementwise(2, SigmoidMap()))


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (lambda: Compose(RealNVP(2), logit()), False),
        (lambda: Compose(Elementwise(2, ExpMap()), logit()), False),
        (lambda: Compose(Elementwise(2, TanhMap()), logit()), False),
        (lambda: Compose(logit(), RealNVP(2), logit()), False),
        (
            lambda: Compose(Elementwise(2, {(0, 1): SigmoidMap()}), logit()),
            False,
        ),
        (lambda: Compose(Elementwise(2, SigmoidMap()), logit()), True),
        (lambda: Compose(logit(), RealNVP(2)), True),
        (
            lambda: Compose(
                Elementwise(2, {(0, 1): SigmoidMap()}),
                Inverse(Elementwise(2, {(0, 1): SigmoidMap()})),
            ),
            True,
        ),
        (
            lambda: Compose(
                Elementwise(2, SigmoidMap()), Inverse(Elementwise(2, ExpMap()))
            ),
            True,
        ),
        # the first coordinate in the unit interval, the second anywhere
        (
            lambda: Flow(
                Inverse(Elementwise(2, {(0, 1): SigmoidMap()})), Uniform(2)
            ),
            True,
        ),
        (lambda: Flow(Inverse(Elementwise(2, {(0, 1): SigmoidMap()}))), False),
    ],
)
def test_each_map_of_a_chain_takes_what_the_one_before_gives(make, fits):
    if fits:
        make()
    else:
        with pytest.raises(ValueError, match=r"takes points of .*, got"):
            make()


@pytest.mark.parametrize(
    "base",
    [
        lambda: many(D.Poisson, 1.0),
        lambda: many(D.Bernoulli, 0.5),
        lambda: D.Independent(D.Categorical(torch.ones(2, 3)), 1),
        lambda: D.OneHotCategorical(torch.ones(2)),
        lambda: D.Multinomial(3, torch.ones(2)),
        lambda: D.Dirichlet(torch.ones(2)),
        lambda: pdist.ProjectedNormal(torch.ones(2)),
        lambda: D.MixtureSameFamily(
            D.Categorical(torch.ones(3)), D.Dirichlet(torch.ones(3, 2))
        ),
    ],
)
def test_a_base_without_a_density_on_the_plane_is_refused(base):
    with pytest.raises(ValueError, match=r"^base: RealNVP takes points of"):
        Flow(RealNVP(2), base())


def test_a_simplex_keeps_its_own_bases():
    class Swap(Bijection):
        domain = codomain = D.constraints.simplex

        def _forward(self, z, context):
            return z.flip(-1), z.new_zeros(z.shape[:-1])

        _inverse = _forward

    flow = Flow(Swap(2), D.Dirichlet(torch.tensor([2.0, 1.0])))
    x = torch.tensor([[0.25, 0.75], [0.25, 0.25]])
    assert_close(flow.log_prob(x), torch.tensor([math.log(1.5), -inf]))


# --- sizes and settings ------------------------------------------------------

KINDS = [int, np.int64, np.uint8, torch.tensor, np.array]


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_any_library_are_read(kind):
    two, three = kind(2), kind(3)
    assert type(as_int(three, "n")) is int and as_int(three, "n") == 3
    assert as_shape(three, "n") == (3,) and as_shape([three, 2], "n") == (3, 2)
    f = RealNVP(2, 2, hidden=(4,), context_dim=3)
    flow, c = Flow(f), torch.zeros(4, 3)
    assert Flow(RealNVP(2, 2, hidden=(4,))).sample(three).shape == (3, 2)
    assert flow.sample((three, two), c).shape == (3, 2, 4, 2)
    assert flow.rsample_and_log_prob(three, c)[1].shape == (3, 4)
    assert flow(c).sample((three,)).shape == flow(c).sample(three).shape
    assert flow(c).expand((three, 4)).batch_shape == (3, 4)
    base = Uniform(two)
    assert base.event_shape == (2,) and type(base.event_shape[0]) is int
    for b in (base, DiagonalGaussian(2), GaussianMixture(torch.zeros(1, 2))):
        assert b.sample(three).shape == b.sample((three,)).shape == (3, 2)
    assert TorchBase(many(D.Normal, 0.0, 1.0)).sample(three).shape == (3, 2)
    own = Bijection(two, three, two)
    assert type(own.context_dim) is int and own.event_shape == (2,)
    assert f.as_transform(c).forward_shape((three, 4, two)) == (3, 4, 2)


@pytest.mark.parametrize(
    "kind", [int, float, np.float32, np.int64, torch.tensor, np.array]
)
def test_numbers_of_any_library_are_read(kind):
    number = as_float(kind(3), "lr")
    assert type(number) is float and number == 3.0
    assert (DiagonalGaussian(2, kind(3), kind(3)).loc == 3).all()
    assert (Uniform(2, kind(3), kind(4)).low == 3).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: StandardNormal(2),
        lambda: DiagonalGaussian(2, 1.0, 2.0),
        lambda: Uniform(2, -1.0, 1.0),
        lambda: GaussianMixture([[0.0, 1.0], [2.0, 3.0]], 0.5, [1.0, 2.0]),
    ],
)
def test_a_base_is_made_on_the_default_device(make):
    with torch.device("meta"):
        maps = Elementwise(2, AffineMap()), Elementwise(2, TanhMap())
        flow = Flow(Compose(*maps), make())
        tensors = [*flow.parameters(), *flow.buffers()]
        assert tensors and all(t.is_meta for t in tensors)
        x = flow.sample(5)
        assert x.is_meta and flow.log_prob(x).is_meta
        assert flow().log_prob(x).shape == (5,)
        transform = flow.bijection.as_transform(cache_size=1)
        z = flow.base.sample(5)
        assert transform.log_abs_det_jacobian(z, transform(z)).is_meta
    cpu = make()
    assert not any(t.is_meta for t in [*cpu.parameters(), *cpu.buffers()])


# --- a kept pair -------------------------------------------------------------


def gradient(d, f, x):
    """The gradient of a log-density in the parameters of a map."""
    return torch.autograd.grad(d.log_prob(x).sum(), list(f.parameters()))


def cached(f, cache_size=1):
    return D.TransformedDistribution(
        many(D.Normal, 0.0, 1.0), [f.as_transform(cache_size=cache_size)]
    )


def test_a_kept_pair_keeps_the_gradients():
    f = affine()
    d = cached(f)
    with torch.no_grad():
        x = d.rsample((50,))
    wanted = gradient(cached(f, 0), f, x)
    assert wanted[0].abs().max() > 1
    assert_close(gradient(d, f, x), wanted)
    # the same for a sample that never had a gradient, and for the inverse
    x = d.sample((50,))
    assert_close(gradient(d, f, x), gradient(cached(f, 0), f, x))
    transform = f.as_transform(cache_size=1)
    with torch.no_grad():
        z = transform.inv(x)
    assert transform(z).requires_grad
    assert transform.log_abs_det_jacobian(z, x).requires_grad


UPDATES = {
    "in place": lambda f: torch.no_grad()(
        lambda: f.thetas[0].value.add_(1.0)
    )(),
    "other numbers": lambda f: setattr(
        f.thetas[0].value, "data", f.thetas[0].value.data + 1
    ),
    "another parameter": lambda f: setattr(
        f.thetas[0], "value", nn.Parameter(f.thetas[0].value.detach() + 1)
    ),
    "loaded": lambda f: f.load_state_dict(
        {k: v + 1 for k, v in f.state_dict().items()}
    ),
}


def step(optimizer):
    def update(f):
        f.thetas[0].value.grad = torch.ones_like(f.thetas[0].value)
        optimizer(f.parameters(), lr=0.5).step()

    return update


UPDATES |= {
    "Adam": step(torch.optim.Adam),
    "fused Adam": step(lambda p, lr: torch.optim.Adam(p, lr, fused=True)),
    "Adam over all": step(lambda p, lr: torch.optim.Adam(p, lr, foreach=True)),
    "SGD": step(torch.optim.SGD),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_kept_pair_is_not_given_again_after_an_update(name, grad):
    f = affine()
    transform = f.as_transform(cache_size=1)
    z = torch.randn(5, 2)
    with torch.set_grad_enabled(grad):
        x = transform(z)
        ladj = transform.log_abs_det_jacobian(z, x)
        assert transform(z) is x and transform.inv(x) is z
        assert transform.log_abs_det_jacobian(z, x) is ladj
        with torch.enable_grad():
            UPDATES[name](f)
        assert_close(transform.inv(x), f.inverse(x)[0])
        x = transform(z)
        assert_close(x, f(z)[0])
        UPDATES["in place"](f)
        assert_close(transform.log_abs_det_jacobian(z, x), f(z)[1])


def test_a_kept_pair_hangs_on_points_context_and_mode():
    f = RealNVP(2, 2, hidden=(4,), context_dim=1)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.3 * torch.randn_like(p))
    c = torch.randn(1)
    transform = f.as_transform(c, cache_size=1)
    for change in (
        lambda z, x: z.add_(1.0),
        lambda z, x: c.add_(1.0),
        lambda z, x: f.train(not f.training),
        lambda z, x: z.requires_grad_(),
    ):
        z = torch.randn(5, 2)
        with torch.no_grad():
            x = transform(z)
            change(z, x)
            assert transform(z) is not x
            assert_close(transform(z), f(z, c)[0])
    with torch.inference_mode():
        z = torch.randn(5, 2)
        x = transform(z)
        z.add_(1.0)  # of which torch keeps no count
        assert_close(transform(z), f(z, c)[0])


def test_a_transform_with_a_kept_pair_can_be_copied():
    f = affine()
    transform = f.as_transform(cache_size=1)
    x = transform(torch.randn(5, 2))
    twin = copy.deepcopy(transform)
    assert_close(twin.inv(x), transform.inv(x))


# --- mistakes ----------------------------------------------------------------

f = RealNVP(2, 2, hidden=(4,))
flow, flow_c = Flow(f), Flow(RealNVP(2, 2, hidden=(4,), context_dim=3))
g = torch.Generator()
x, c = torch.zeros(5, 2), torch.zeros(4, 3)


class Unfinished(Bijection):
    pass


class NoDensity(Base):
    pass


MISTAKES = {
    "no integer": (lambda: as_int(2.0, "n"), "n: expected a whole number"),
    "bool": (lambda: as_int(True, "n"), "a whole number of at least 0"),
    "numpy bool": (lambda: as_int(np.True_, "n"), "n: expected a whole number"),
    "below": (lambda: as_int(-1, "n"), "of at least 0, got -1"),
    "no value": (
        lambda: as_int(torch.tensor(3, device="meta"), "n"),
        "n: expected a whole number",
    ),
    "several": (lambda: as_int(torch.ones(2).long(), "n"), "a whole number"),
    "text": (lambda: as_int("3", "n"), "a whole number of at least 0, got '3'"),
    "NaN": (lambda: as_float(nan, "lr"), "lr: expected a finite number, got"),
    "infinite": (lambda: as_float(inf, "lr"), "a finite number, got inf"),
    "numpy NaN": (lambda: as_float(np.float32(nan), "lr"), "a finite number"),
    "no number": (lambda: as_float("1", "lr"), "a finite number, got '1'"),
    "truth": (lambda: as_float(True, "lr"), "a finite number, got True"),
    "an end": (
        lambda: as_float(0, "lr", 0, strict=True),
        "a finite number above 0, got 0",
    ),
    "both ends": (
        lambda: as_float(2, "decay", 0, 1),
        "a finite number of at least 0 and at most 1, got 2",
    ),
    "bool in a shape": (
        lambda: as_shape((True, 2), "n"),
        "n: expected positive integers, got (True, 2)",
    ),
    "float as a shape": (lambda: as_shape(2.0, "n"), "positive integers"),
    "nothing as a shape": (lambda: as_shape(None, "n"), "positive integers"),
    "text as a shape": (lambda: as_shape("ab", "n"), "positive integers"),
    # samples
    "sample(-1)": (lambda: flow.sample(-1), "shape: expected a whole number"),
    "sample(2.0)": (
        lambda: flow.sample(2.0),
        "shape: expected a whole number of at least 0, got 2.0",
    ),
    "sample(True)": (lambda: flow.sample(True), "shape: expected a whole"),
    "sample(None)": (lambda: flow.sample(None), "shape: expected a whole"),
    "sample of points": (lambda: flow.sample(x), "shape: expected a whole"),
    "a generator as a context": (
        lambda: flow.sample(3, g),
        "context: Flow expects none, got Generator; write generator=...",
    ),
    "a generator as features": (
        lambda: flow_c.sample(3, g),
        "context: Flow expects a floating-point tensor, got Generator; write",
    ),
    "a generator in rsample_and_log_prob": (
        lambda: flow.rsample_and_log_prob(3, g),
        "write generator=...",
    ),
    "a seed as a generator": (
        lambda: flow.sample(3, generator=0),
        "generator: expected a torch.Generator, got int",
    ),
    "a seed as a torch base's generator": (
        lambda: TorchBase(many(D.Normal, 0.0, 1.0)).sample(3, 0),
        "generator: expected a torch.Generator, got int",
    ),
    "numpy's generator": (
        lambda: flow.sample(3, generator=np.random.default_rng()),
        "generator: expected a torch.Generator",
    ),
    "no sample of a distribution": (
        lambda: flow().sample(2.0),
        "shape: expected a whole number of at least 0, got 2.0",
    ),
    "no rsample of a distribution": (
        lambda: flow().rsample(-1),
        "shape: expected a whole number of at least 0, got -1",
    ),
    "no sample of a base": (
        lambda: StandardNormal(2).sample(2.0),
        "shape: expected a whole number of at least 0, got 2.0",
    ),
    "noise of another shape": (
        lambda: Flow(f, DiagonalGaussian(2)).rsample_and_log_prob(
            noise=torch.zeros(5, 3)
        ),
        "noise: DiagonalGaussian expects last dimension 2",
    ),
    "noise in two parts": (
        lambda: Flow(f, Uniform(2)).rsample_and_log_prob(noise=(x, x)),
        "noise: Uniform expects a floating-point tensor, got tuple",
    ),
    "noise in one part": (
        lambda: GaussianMixture(torch.zeros(3, 2)).from_noise(x),
        "noise: GaussianMixture expects the two tensors",
    ),
    # maps
    "a list of maps": (
        lambda: Compose([f, f]),
        "bijections[0]: expected a bijection, got list; give its entries one",
    ),
    "a flow in a chain": (
        lambda: Compose(f, flow),
        "bijections[1]: expected a bijection, got Flow; the map in it is",
    ),
    "a class in a chain": (
        lambda: Compose(RealNVP, f),
        "bijections[0]: expected a bijection, got the class RealNVP; make one",
    ),
    "a scalar map in a chain": (
        lambda: Compose(f, AffineMap()),
        "bijections[1]: expected a bijection, got AffineMap; a scalar map",
    ),
    "a flow turned round": (
        lambda: Inverse(flow),
        "bijection: expected a bijection, got Flow; the map in it is",
    ),
    "a layer turned round": (
        lambda: Inverse(nn.Linear(2, 2)),
        "bijection: expected a bijection, got Linear",
    ),
    "a layer as a map": (
        lambda: Flow(nn.Linear(2, 2)),
        "bijection: expected a bijection, got Linear",
    ),
    "a class as a map": (
        lambda: Flow(RealNVP),
        "bijection: expected a bijection, got the class RealNVP; make one",
    ),
    "a list as a map": (
        lambda: Flow([f, f]),
        "bijection: expected a bijection, got list; give its entries one by",
    ),
    "a flow as a map": (lambda: Flow(flow), "bijection: expected a bijection"),
    "a class as a base": (
        lambda: Flow(f, base=StandardNormal),
        "base: expected a Base or a torch distribution, got the class Standard",
    ),
    "torch's class as a base": (
        lambda: Flow(f, base=D.Normal),
        "base: expected a Base or a torch distribution, got the class Normal",
    ),
    "a flow as a base": (
        lambda: Flow(f, base=flow),
        "base: expected a Base or a torch distribution, got Flow",
    ),
    "a base in a base": (
        lambda: TorchBase(StandardNormal(2)),
        "base: expected a torch distribution, got StandardNormal",
    ),
    "a map as a flow": (
        lambda: FlowDistribution(f),
        "flow: expected a Flow, got RealNVP",
    ),
    "a flow as a transform": (
        lambda: BijectionTransform(flow),
        "bijection: expected a bijection, got Flow",
    ),
    "a transform without its context": (
        lambda: flow_c.bijection.as_transform(),
        "context: RealNVP expects shape (*batch, 3), got none",
    ),
    "a float as a width": (
        lambda: Bijection(2, 1.5),
        "context_dim: expected a whole number of at least 0, got 1.5",
    ),
    "a float of dimensions": (
        lambda: Bijection(None, event_dim=1.0),
        "event_dim: expected a whole number of at least 0, got 1.0",
    ),
    "too few dimensions": (
        lambda: f.as_transform().forward_shape(()),
        "shape: expected at least 1 dimensions, got ()",
    ),
    "a batch that does not fit": (
        lambda: flow_c.bijection.as_transform(c).forward_shape((5, 2)),
        "shape: expected a batch shape that broadcasts against (4,)",
    ),
    # points and contexts
    "no tensor": (
        lambda: flow.log_prob(np.zeros((5, 2))),
        "x: RealNVP expects a floating-point tensor, got ndarray",
    ),
    "integers": (
        lambda: flow.log_prob(x.long()),
        "got a torch.int64 tensor; convert it, for example with .float()",
    ),
    "a point without values": (
        lambda: flow.log_prob(x.to("meta")),
        "x: RealNVP is on the device cpu, got a tensor on meta",
    ),
    "a map without values": (
        lambda: Flow(RealNVP(2).to("meta")).log_prob(x),
        "got a tensor on cpu; move one, for example with .to",
    ),
    "labels as a context": (
        lambda: flow_c.log_prob(x, torch.tensor([1, 2, 0, 1, 1])),
        "context: RealNVP expects a floating-point tensor, got a torch.int64",
    ),
    "a context without values": (
        lambda: flow_c.sample(3, c.to("meta")),
        "context: Flow is on the device cpu, got a tensor on meta",
    ),
    "an array as a context": (
        lambda: flow_c(c.numpy()),
        "context: Flow expects a floating-point tensor, got ndarray",
    ),
    "a number as a context": (
        lambda: flow.sample(3, 4),
        "context: Flow expects none, got int",
    ),
    "a value of another size": (
        lambda: FlowDistribution(flow, validate_args=False).log_prob(
            torch.zeros(5, 3)
        ),
        "value: Flow expects last dimension 2, got shape (5, 3)",
    ),
    "a value of another batch": (
        lambda: FlowDistribution(flow_c, c, validate_args=False).log_prob(x),
        "value: expected a batch shape that broadcasts against (4,), got shape",
    ),
    # batch shapes
    "expand that shrinks": (
        lambda: flow().expand((3,)).expand((2,)),
        "batch_shape: expected an expansion of (3,), got (2,)",
    ),
    "expand that drops": (
        lambda: flow_c(c).expand(()),
        "batch_shape: expected an expansion of (4,), got ()",
    ),
    "expand in the wrong place": (
        lambda: flow_c(c).expand((4, 2)),
        "batch_shape: expected an expansion of (4,), got (4, 2)",
    ),
    "expand to less than nothing": (
        lambda: flow().expand((-1,)),
        "batch_shape: expected a whole number of at least 0, got -1",
    ),
    "a batch shape beside the context's": (
        lambda: FlowDistribution(flow_c, c, (3,)),
        "batch_shape: expected an expansion of (4,), got (3,)",
    ),
    # settings
    "loc NaN": (lambda: DiagonalGaussian(2, nan), "loc: expected finite"),
    "loc infinite": (lambda: DiagonalGaussian(2, inf), "loc: expected finite"),
    "loc a word": (lambda: DiagonalGaussian(2, "a"), "loc: expected finite"),
    "loc complex": (
        lambda: DiagonalGaussian(2, torch.zeros(2) + 1j),
        "loc: expected finite",
    ),
    "loc too long": (
        lambda: DiagonalGaussian(2, torch.zeros(3)),
        "loc: expected a number, or numbers that broadcast to (2,), got shape",
    ),
    "scale NaN": (
        lambda: DiagonalGaussian(2, scale=nan),
        "scale: expected finite numbers above 0, got nan",
    ),
    "scale too long": (
        lambda: DiagonalGaussian(2, scale=torch.ones(3)),
        "scale: expected a number, or numbers that broadcast to (2,)",
    ),
    "locs NaN": (
        lambda: GaussianMixture([[nan, 0.0]]),
        "loc: expected finite numbers, got [[nan, 0.0]]",
    ),
    "scales infinite": (
        lambda: GaussianMixture(torch.zeros(3, 2), inf),
        "scale: expected finite numbers above 0, got inf",
    ),
    "weights NaN": (
        lambda: GaussianMixture(torch.zeros(2, 2), weights=[1.0, nan]),
        "weights: expected finite numbers above 0, got [1.0, nan]",
    ),
    "weights of words": (
        lambda: GaussianMixture(torch.zeros(2, 2), weights="ab"),
        "weights: expected finite numbers",
    ),
    "the whole line": (
        lambda: Uniform(2, -inf, inf),
        "low: expected finite numbers, got -inf",
    ),
    "an end NaN": (lambda: Uniform(2, 0.0, nan), "high: expected finite"),
    "a width that overflows": (
        lambda: Uniform(1, -3e38, 3e38),
        "high: expected above low",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Unfinished(2)(x), "Unfinished defines no _forward"),
        (lambda: Unfinished(2).inverse(x), "Unfinished defines no _inverse"),
        (lambda: NoDensity(2).log_prob(x), "NoDensity defines no _log_prob"),
    ],
)
def test_what_a_class_of_ones_own_lacks_is_said(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()


def test_a_compiled_map_is_a_map():
    assert Flow(torch.compile(f)).sample(3).shape == (3, 2)
