"""Every scalar map of the tables: far out, at its ends, at zero and in a coupling."""

import copy
import math

import pytest
import torch
from helpers import shaken
from torch.distributions import constraints
from torch.testing import assert_close

from flowcourse.core import Compose, Flow
from flowcourse.coupling import Coupling, half
from flowcourse.elementwise import Elementwise, InverseMap, PReLUMap
from flowcourse.quadrature import total_mass
from flowcourse.scalar_maps import (
    ELUMap,
    ExpMap,
    LeakyReLU,
    Logit,
    PowerMap,
    PReLU,
    Sigmoid,
    SinhArcsinhMap,
    SmoothPReLUMap,
    TanhMap,
    elementwise_maps,
)
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.testing import check_bijection

names = pytest.mark.parametrize("name", elementwise_maps)


def far_points(f, dtype):
    t = torch.tensor(
        [-100.0, -50.0, -17.0, -1.0, 0.0, 1.0, 17.0, 50.0, 100.0], dtype=dtype
    )
    t = t[:, None]
    for end, way in ((f.domain, "forward"), (f.codomain, "inverse")):
        if end.check(t).all():
            yield getattr(f, way), t


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_slopes_and_their_gradients_are_finite_far_out(name, dtype):
    f = shaken(Elementwise(1, elementwise_maps[name])).to(dtype)
    found = 0
    for way, t in far_points(f, dtype):
        t = t.clone().requires_grad_()
        _, ladj = way(t)
        (slope,) = torch.autograd.grad((ladj + 0 * t.sum()).sum(), t)
        assert ladj.isfinite().all() and slope.isfinite().all(), (name, way)
        found += 1
    assert found


@names
def test_float32_agrees_with_float64_far_out(name):
    f = shaken(Elementwise(1, elementwise_maps[name]))
    exact = copy.deepcopy(f).double()
    pairs = zip(far_points(f, torch.float32), far_points(exact, torch.float64))
    for (way, t), (way64, t64) in pairs:
        assert_close(way(t)[1].double(), way64(t64)[1], rtol=1e-5, atol=1e-5)


@names
def test_with_parameters_at_zero_a_map_is_the_identity(name):
    scalar_map = elementwise_maps[name]
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    if scalar_map.n_params:
        theta = torch.zeros(101, scalar_map.n_params, dtype=torch.float64)
        for way in (scalar_map.forward, scalar_map.inverse):
            image, log_slope = way(z, theta)
            assert_close(image, z)
            assert_close(log_slope, torch.zeros_like(z))


@names
def test_the_density_of_every_map_weighs_one(name):
    f = shaken(Elementwise(1, elementwise_maps[name]))
    inner = f.domain.base_constraint
    start = {
        "unit_interval": Sigmoid(1),
        "positive": Elementwise(1, ExpMap()),
        "interval": Elementwise(1, TanhMap()),
        "real": None,
    }[_kind(inner)]
    flow = Flow((Compose(start, f) if start else f).double())
    end = f.codomain.base_constraint
    low, high = (
        getattr(end, f"{side}_bound", None) for side in ("lower", "upper")
    )
    mass = total_mass(flow.double().log_prob, 1, low, high, dtype=torch.float64)
    assert abs(mass - 1) < 1e-3


def _kind(constraint):
    low, high = (
        getattr(constraint, f"{side}_bound", None)
        for side in ("lower", "upper")
    )
    return {
        (None, None): "real",
        (0.0, None): "positive",
        (0.0, 1.0): "unit_interval",
    }.get((low, high), "interval")


@names
def test_points_stay_inside_the_codomain_and_come_back(name):
    f = Elementwise(1, elementwise_maps[name])
    for way, t in far_points(f, torch.float32):
        image, _ = way(t.clamp(-80, 80))
        back = f.inverse if way == f.forward else f.forward
        end = f.codomain if way == f.forward else f.domain
        assert end.check(image).all() and back(image)[0].isfinite().all()


@names
def test_points_beyond_an_end_are_never_given_a_finite_number(name):
    f = shaken(Elementwise(1, elementwise_maps[name])).double()
    far = torch.tensor([-1e6, -3.0, -1.5, -1e-3, 1.001, 3.0, 1e6])[:, None]
    nan = torch.full((1, 1), math.nan).double()
    for end, way in ((f.domain, f.forward), (f.codomain, f.inverse)):
        t = far.double()
        outside = t[~end.check(t)]
        image, _ = way(outside[:, None])
        assert not image.isfinite().any()
        assert way(nan)[0].isnan().all()


@names
def test_the_slope_at_zero_itself_is_the_one_that_is_told(name):
    f = elementwise_maps[name]
    f = f if f.domain is constraints.real else InverseMap(f)
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    theta = [torch.full((f.n_params,), 0.3).double()] if f.n_params else []
    x, log_slope = f.forward(z, *theta)
    (slope,) = torch.autograd.grad(x, z)
    assert_close(slope.log(), log_slope.detach())


def test_elu_and_inverse_maps_say_where_they_live():
    f = Elementwise(1, InverseMap(ELUMap()))
    assert f.domain.check(torch.tensor([-0.9])) and not f.domain.check(
        torch.tensor([-1.1])
    )
    assert "InverseMap(ELUMap())" in repr(f)


@pytest.mark.parametrize(
    "scalar_map",
    [PReLUMap(), SinhArcsinhMap(), PowerMap(), RationalQuadraticSplineMap(4)],
)
def test_the_same_maps_serve_a_coupling(scalar_map):
    f = Coupling(half(2), scalar_map)
    check_bijection(
        f,
        torch.randn(6, 2),
        levels=(0.0, 1.0),
        exempt={"mass": "weighed alone"},
    )


BOUNDS = {  # a learned map, and its image of -2 where raw parameters are huge
    "prelu": (PReLUMap(), lambda t: t * math.exp(3)),
    "smooth-prelu": (
        SmoothPReLUMap(),
        lambda t: (
            (1 + math.exp(3)) / 2 * t
            + (1 - math.exp(3)) / 2 * (math.hypot(t, 1) - 1)
        ),
    ),
    "signed-power": (PowerMap(), lambda t: 1 - (1 - t) ** math.e),
    "sinh-arcsinh": (
        SinhArcsinhMap(),
        lambda t: math.sinh(math.exp(0.5) * math.asinh(t) + 2),
    ),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_learned_maps_are_bounded_as_their_pages_say(name):
    f, image = BOUNDS[name]
    z = torch.tensor(-2.0).double()
    x, _ = f.forward(z, torch.full((f.n_params,), 1e9).double())
    assert_close(x, torch.tensor(image(-2.0)).double())


@pytest.mark.parametrize("temperature", [0.01, 0.3, 2.0, 100.0])
def test_sigmoid_and_logit_are_exact_in_the_tails_at_any_temperature(
    temperature,
):
    sigmoid, logit = (
        Sigmoid(1, temperature=temperature),
        Logit(1, temperature=temperature),
    )
    z = torch.tensor([-100.0, -30.0, -1.0, 0.0, 1.0, 30.0, 100.0])[:, None]
    _, ladj = sigmoid(z)
    assert_close(ladj.double(), sigmoid(z.double())[1], rtol=1e-6, atol=1e-6)
    x = torch.tensor([2e-38, 1e-20, 0.3, 0.9, 1 - 2**-24])[:, None]
    _, ladj = logit(x)
    assert_close(ladj.double(), logit(x.double())[1], rtol=1e-6, atol=1e-6)


def test_named_constructors():
    z = torch.tensor([[-2.0, 3.0]])
    assert_close(LeakyReLU(2, slope=0.1)(z)[0], torch.tensor([[-0.2, 3.0]]))
    assert_close(LeakyReLU(2, slope=0.1)(z)[1], torch.tensor([math.log(0.1)]))
    assert_close(Sigmoid(2, temperature=2.0)(z)[0], (z / 2).sigmoid())
    assert_close(
        Logit(2, temperature=2.0)(Sigmoid(2, temperature=2.0)(z)[0])[0], z
    )
    f = PReLU(2, context_dim=3)
    assert_close(f(z, torch.randn(1, 3))[0], z)
    assert [p.requires_grad for p in PReLU(2).parameters()] == [True]


def test_slopes_are_learned_for_each_dimension():
    torch.manual_seed(0)
    true, f = torch.tensor([0.3, 2.0]), PReLU(2)
    z = torch.randn(4000, 2)
    x = torch.where(z < 0, true * z, z)
    optimizer, flow = torch.optim.Adam(f.parameters(), 0.05), Flow(f)
    for _ in range(200):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    assert_close(f(-torch.ones(2))[0], -true, rtol=0.05, atol=0)


def test_points_beyond_an_end_have_no_density_and_points_on_it_do():
    flow = Flow(Sigmoid(1))
    assert flow.log_prob(torch.tensor([[0.0], [1.0]])).isfinite().all()
    assert flow.log_prob(torch.tensor([[-0.1], [1.1]])).isneginf().all()


@pytest.mark.parametrize("low", [-0.1, -1e-6, 0.0, 0.3, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exponential_ends_where_it_is_told(low, dtype):
    f = Elementwise(1, ExpMap(low))
    z = torch.linspace(-3, 3, 61, dtype=dtype)[:, None]
    x, ladj = f.forward(z)
    assert_close(x, low + z.exp())
    assert_close(ladj, z.squeeze(-1))
    assert_close(f.inverse(x)[1], -ladj)
    # far out nothing is left of the exponential, and a sample stays a sample
    flow = Flow(f)
    x = f.push(torch.full((1, 1), -1e3, dtype=dtype))
    assert (x > low).all() and f.inverse(x)[0].isfinite().all()
    flow = flow.to(dtype)
    assert flow.log_prob(x).isfinite().all()
    beyond = torch.tensor([[low - 1e-3]], dtype=dtype)
    assert flow.log_prob(beyond).item() == -math.inf


def test_an_exponential_says_where_it_ends():
    assert (
        repr(ExpMap()) == "ExpMap()" and repr(ExpMap(-1)) == "ExpMap(low=-1.0)"
    )
    for low in (math.inf, "0", None):
        with pytest.raises(ValueError, match="^low: expected a finite number"):
            ExpMap(low)
