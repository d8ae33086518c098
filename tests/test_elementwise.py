"""Elementwise flows: every scalar map far out, ranges, the spline, and the state of the normalisers."""

import copy
import math

import pytest
import torch
from helpers import shaken
from torch.testing import assert_close

from flowcourse.core import Compose, Flow, Inverse, StandardNormal
from flowcourse.coupling import Coupling, half
from flowcourse.elementwise import (
    ActNorm,
    BatchNorm,
    Conditional,
    Elementwise,
    ELUMap,
    ExpMap,
    InverseMap,
    LeakyReLU,
    Logit,
    PowerMap,
    PReLU,
    PReLUMap,
    Sigmoid,
    SigmoidMap,
    SinhArcsinhMap,
    TanhMap,
    bounded,
    elementwise_maps,
)
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.testing import check_bijection, total_mass

names = pytest.mark.parametrize("name", elementwise_maps)
normalisers = pytest.mark.parametrize("kind", [ActNorm, BatchNorm])


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


@pytest.mark.parametrize("temperature", [0.01, 0.3, 2.0, 100.0])
def test_sigmoid_and_logit_are_exact_in_the_tails_at_any_temperature(
    temperature,
):
    sigmoid, logit = Sigmoid(1, temperature), Logit(1, temperature)
    z = torch.tensor([-100.0, -30.0, -1.0, 0.0, 1.0, 30.0, 100.0])[:, None]
    _, ladj = sigmoid(z)
    assert_close(ladj.double(), sigmoid(z.double())[1], rtol=1e-6, atol=1e-6)
    x = torch.tensor([2e-38, 1e-20, 0.3, 0.9, 1 - 2**-24])[:, None]
    _, ladj = logit(x)
    assert_close(ladj.double(), logit(x.double())[1], rtol=1e-6, atol=1e-6)


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


def test_a_map_that_is_not_onto_the_line_loses_mass():
    # data are squeezed: z fills (-1, 1) only
    f = Inverse(Elementwise(1, TanhMap())).double()
    base = StandardNormal(1).double()
    with pytest.raises(ValueError, match="^base: Inverse takes points of"):
        Flow(f, base)

    def log_prob(x):
        z, ladj = f.inverse(x)
        return base.log_prob(z) + ladj

    mass = total_mass(log_prob, 1, dtype=torch.float64)
    assert abs(mass - math.erf(1 / math.sqrt(2))) < 1e-3


@names
def test_points_stay_inside_the_codomain_and_come_back(name):
    f = Elementwise(1, elementwise_maps[name])
    for way, t in far_points(f, torch.float32):
        image, _ = way(t.clamp(-80, 80))
        back = f.inverse if way == f.forward else f.forward
        end = f.codomain if way == f.forward else f.domain
        assert end.check(image).all() and back(image)[0].isfinite().all()


@pytest.mark.parametrize(
    ("ranges", "dim", "lengths"),
    [
        ([(0, 2), (5, 65)], 65, [2, 3, 60]),
        ([(1, 2)], 4, [1, 1, 2]),
        ([(0, 3)], 3, [3]),
        ([(3, 4), (0, 1)], 4, [1, 2, 1]),
    ],
)
def test_ranges_are_filled_with_the_identity(ranges, dim, lengths):
    f = Elementwise(dim, {r: ExpMap() for r in ranges})
    assert f.lengths == lengths
    z = torch.randn(4, dim)
    x, ladj = f(z)
    moved = torch.zeros(dim, dtype=torch.bool)
    for start, stop in ranges:
        moved[start:stop] = True
    assert_close(x, torch.where(moved, z.exp(), z))
    assert_close(ladj, z[:, moved].sum(-1))
    assert (
        f.codomain.check(x).all() and not f.codomain.check(-x.abs() - 1).any()
    )


@pytest.mark.parametrize(
    "ranges", [[(0, 2), (1, 3)], [(0, 5)], [(-1, 2)], [(2, 2)], [(2, 1)]]
)
def test_ranges_that_overlap_or_leave_the_event_are_refused(ranges):
    with pytest.raises(ValueError, match="maps: expected ranges"):
        Elementwise(4, {r: ExpMap() for r in ranges})


def test_images_work_and_ranges_follow_the_last_axis():
    f = shaken(
        Elementwise(
            (2, 3, 4),
            {(0, 2): RationalQuadraticSplineMap(4), (3, 4): PReLUMap()},
            context_dim=2,
        )
    )
    f = f.double()
    z = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    context = torch.randn(5, 2, dtype=torch.float64)
    x, ladj = f(z, context)
    assert ladj.shape == (5,) and torch.equal(x[..., 2], z[..., 2])
    assert_close(f.inverse(x, context)[0], z)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PReLUMap(0.0),
        lambda: PReLUMap(-1.0),
        lambda: SigmoidMap(0.0),
        lambda: PowerMap(0.0),
        lambda: RationalQuadraticSplineMap(1),
        lambda: RationalQuadraticSplineMap(bound=0.0),
        lambda: BatchNorm(2, momentum=2.0),
        lambda: ActNorm(2, eps=0.0),
        lambda: Elementwise(2, ExpMap(), context_dim=1),
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


def test_named_constructors():
    z = torch.tensor([[-2.0, 3.0]])
    assert_close(LeakyReLU(2, 0.1)(z)[0], torch.tensor([[-0.2, 3.0]]))
    assert_close(LeakyReLU(2, 0.1)(z)[1], torch.tensor([math.log(0.1)]))
    assert_close(Sigmoid(2, 2.0)(z)[0], (z / 2).sigmoid())
    assert_close(Logit(2, 2.0)(Sigmoid(2, 2.0)(z)[0])[0], z)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.5, 3.0, 16.0, 17.0, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_bounded_is_a_hyperbolic_tangent(bound, sign, dtype):
    raw = torch.linspace(-30, 30, 1001, dtype=dtype)
    want = (sign * bound * torch.tanh(raw.double() / bound)).to(dtype)
    assert_close(
        bounded(raw, bound, sign),
        want,
        rtol=1e-6,
        atol=4 * torch.finfo(dtype).eps * min(bound, 16),
    )
    ends = bounded(torch.tensor([0.0, 1e9, -1e9], dtype=dtype), bound, sign)
    assert ends.tolist() == [0, sign * bound, -sign * bound]
    raw = raw.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda raw: bounded(raw, bound, sign), raw[::100]
    )


def test_the_spline_is_smooth_across_knots_and_the_identity_outside():
    f = shaken(
        Elementwise(1, RationalQuadraticSplineMap(6, bound=2.0)), seed=3
    ).double()
    t = torch.linspace(-2.5, 2.5, 200_001, dtype=torch.float64)[:, None]
    x, ladj = f(t)
    assert (x.diff(dim=0) > 0).all()
    # no jump of the slope, at the bound included
    assert ladj.diff().abs().max() < 0.01
    outside, end = t.abs() > 2, t.abs() == 2
    assert (
        torch.equal(x[outside], t[outside])
        and not ladj[outside.squeeze()].any()
    )
    assert end.sum() == 2
    assert_close(x[end], t[end], rtol=0, atol=1e-14)
    assert_close(
        ladj[end.squeeze()], torch.zeros(2).double(), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6])
def test_the_spline_survives_wild_parameters_in_float32(scale):
    torch.manual_seed(0)
    f = Elementwise(4, RationalQuadraticSplineMap())
    with torch.no_grad():
        f.thetas[0].value.copy_(scale * torch.randn(4, 23))
    z = (4 * torch.randn(2000, 4)).requires_grad_()
    x, ladj = f(z)
    (grad,) = torch.autograd.grad(ladj.sum(), z)
    again, back = f.inverse(x.detach())
    for value in (x, ladj, grad, again, back):
        assert value.isfinite().all()
    assert (f(again)[0] - x).abs().max() < 1e-3


@normalisers
def test_statistics_are_taken_by_inverse_in_train_mode_only(kind):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(500, 2)
    f = kind(2)
    f(x)
    f.eval().inverse(x)
    assert not f.initialised and torch.equal(f.mean, torch.zeros(2))
    f.train()
    z, _ = f.inverse(x)
    assert f.initialised
    assert_close(z.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert_close(z.std(0), torch.ones(2), atol=2e-3, rtol=0)
    assert_close(f.mean, x.mean(0))
    assert_close(f.variance, x.var(0) + f.eps, rtol=1e-4, atol=0)


def test_actnorm_keeps_its_first_batch_and_batchnorm_runs_on():
    torch.manual_seed(0)
    first, second = torch.randn(100, 3), 5 + torch.randn(100, 3)
    act, batch, reference = (
        ActNorm(3),
        BatchNorm(3, momentum=0.3),
        torch.nn.BatchNorm1d(3, momentum=0.3),
    )
    for x in (first, second):
        act.inverse(x), batch.inverse(x)
    assert_close(act.mean, first.mean(0))
    assert_close(batch.mean, 0.7 * first.mean(0) + 0.3 * second.mean(0))
    reference.running_mean, reference.running_var = first.mean(0), first.var(0)
    assert_close(
        batch.inverse(second)[0], reference(second), rtol=1e-4, atol=1e-5
    )
    reference(second)
    assert_close(batch.mean, reference.running_mean)


@normalisers
def test_a_batch_of_one_is_refused_in_train_mode_only(kind):
    f = kind(2)
    for x in (torch.randn(1, 2), torch.randn(2)):
        with pytest.raises(
            ValueError, match=f"{kind.__name__} in train mode .* got 1"
        ):
            f.inverse(x)
    assert not f.initialised
    f.eval().inverse(torch.randn(1, 2))


@normalisers
@pytest.mark.parametrize("context_dim", [0, 2])
def test_state_is_saved_with_initialised(kind, context_dim):
    context = torch.randn(50, 2) if context_dim else None
    f, other = kind(3, context_dim), kind(3, context_dim)
    f.inverse(4 + torch.randn(50, 3), context)
    other.load_state_dict(f.state_dict())
    assert other.initialised
    x = torch.randn(50, 3)
    assert_close(
        other.eval().inverse(x, context),
        f.eval().inverse(x, context),
        rtol=0,
        atol=0,
    )
    mean = other.mean.clone()
    other.train().inverse(9 + x, context)
    assert torch.equal(other.mean, mean) == (kind is ActNorm)


@normalisers
def test_eval_mode_treats_each_row_alone(kind):
    f = kind(2)
    f.inverse(1 + 3 * torch.randn(100, 2))
    f.eval()
    x = torch.randn(20, 2)
    whole = f.inverse(x)
    rows = [torch.cat(v) for v in zip(*(f.inverse(row[None]) for row in x))]
    assert_close(tuple(rows), whole)
    check_bijection(
        shaken(f),
        torch.randn(6, 2),
        levels=(0.0,),
        exempt={"identity": "it has seen data"},
    )


@normalisers
def test_images_are_normalised_by_channel(kind):
    torch.manual_seed(0)
    x = torch.randn(10, 2, 4, 5) * torch.tensor([1.0, 3.0])[:, None, None]
    f = kind((2, 4, 5))
    z, ladj = f.inverse(x)
    assert f.mean.shape == (2, 1, 1) and ladj.shape == (10,)
    assert_close(z.std((0, 2, 3)), torch.ones(2), rtol=1e-2, atol=0)
    assert_close(
        ladj[0], -20 * x.std((0, 2, 3)).log().sum(), rtol=1e-2, atol=0.05
    )


@normalisers
def test_training_goes_through_the_statistics(kind):
    flow = Flow(kind(2))
    x = torch.randn(50, 2).requires_grad_()
    (flow.log_prob(x).mean() + flow.log_prob(2 * x).mean()).backward()
    assert (
        x.grad.isfinite().all()
        and flow.bijection.theta.value.grad.abs().sum() > 0
    )


def test_conditional_starts_where_it_is_told():
    start = torch.randn(3, 2)
    assert torch.equal(Conditional((3, 2), start=start)(None), start)
    f = Conditional((3, 2), 4, start)
    assert_close(f(torch.randn(5, 4)), start.expand(5, 3, 2))
    assert Conditional((), 4)(torch.randn(5, 4)).shape == (5,)


def test_elu_and_inverse_maps_say_where_they_live():
    f = Elementwise(1, InverseMap(ELUMap()))
    assert f.domain.check(torch.tensor([-0.9])) and not f.domain.check(
        torch.tensor([-1.1])
    )
    assert "InverseMap(ELUMap())" in repr(f)


def test_points_beyond_an_end_have_no_density_and_points_on_it_do():
    flow = Flow(Sigmoid(1))
    assert flow.log_prob(torch.tensor([[0.0], [1.0]])).isfinite().all()
    assert flow.log_prob(torch.tensor([[-0.1], [1.1]])).isneginf().all()


def test_a_torch_module_is_no_scalar_map():
    with pytest.raises(ValueError, match="expected scalar maps, got Tanh"):
        Elementwise(2, torch.nn.Tanh())


@normalisers
def test_training_compiles_without_a_break(kind):
    f = kind(2)
    run = torch.compile(f.inverse, fullgraph=True, backend="aot_eager")
    x = 3 + torch.randn(50, 2)
    run(x)
    assert f.initialised
    assert_close(f.mean, x.mean(0))
