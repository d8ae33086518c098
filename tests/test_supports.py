"""Density zero where a map never leads, and maps whose points do not suit each other."""

import copy
import math

import pyro.distributions as pdist
import pytest
import torch
import torch.distributions as D
from helpers import Counted, affine, many
from torch.func import jacrev, vmap
from torch.testing import assert_close

from flowcourse.bases import DiagonalGaussian, Uniform
from flowcourse.core import Bijection, Compose, Flow, Inverse, StandardNormal
from flowcourse.coupling import RealNVP
from flowcourse.elementwise import Elementwise, SigmoidMap, SoftplusMap
from flowcourse.scalar_maps import ELUMap, ExpMap, TanhMap
from flowcourse.splines import RationalQuadraticSplineMap

inf, nan = math.inf, math.nan


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


def test_a_density_of_the_whole_plane_asks_for_no_more_calls():
    flow = Flow(affine())
    assert flow._onto and Flow(Compose(affine(), affine()))._onto
    assert not Flow(Compose(Elementwise(2, ExpMap()), affine()))._onto


# --- where points come from --------------------------------------------------


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
            lambda: D.MixtureSameFamily(
                D.Categorical(torch.tensor([0.3, 0.7])),
                D.Independent(D.Normal(torch.zeros(2, 2), 1.0), 1),
            ),
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
