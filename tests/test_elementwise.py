"""Elementwise flows: every scalar map far out, ranges, the spline, and the state of the normalisers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import shaken
from torch.distributions import constraints
from torch.testing import assert_close

from flowcourse.core import Flow, Inverse, StandardNormal
from flowcourse.elementwise import (
    AffineMap,
    BatchNorm,
    Conditional,
    Elementwise,
    InverseMap,
    PReLUMap,
    SigmoidMap,
    mlp,
)
from flowcourse.objectives import MaximumLikelihood
from flowcourse.quadrature import total_mass
from flowcourse.scalar_maps import ExpMap, LeakyReLU, PowerMap, PReLU, TanhMap
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.testing import check_bijection
from flowcourse.trainer import fit


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
        lambda: RationalQuadraticSplineMap(1),
        lambda: RationalQuadraticSplineMap(bound=0.0),
        lambda: Elementwise(2, ExpMap(), context_dim=1),
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


FLOATS = {  # an argument that is a number, and one that is out of its range
    "slope": (PReLUMap, 0.0),
    "exponent": (PowerMap, -1.0),
    "temperature": (SigmoidMap, 0.0),
    "bound": (AffineMap, 0.0),
    "momentum": (partial(BatchNorm, 2), 1.5),
    "eps": (partial(BatchNorm, 2), 0.0),
    "dropout": (partial(mlp, 2, 2), -0.1),
    "context_scale": (partial(Conditional, (2,)), 0.0),
}
NO_FLOATS = ["a", [1.0], True, torch.ones(2), math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite_and_in_their_range(name):
    make, outside = FLOATS[name]
    for bad in (outside, *NO_FLOATS):
        with pytest.raises(ValueError, match=f"^{name}: expected a finite"):
            make(**{name: bad})
    inside = 0.5
    for good in (np.float32(inside), np.float64(inside), torch.tensor(inside)):
        f = make(**{name: good})
        assert type(getattr(f, name, 0.5)) is float
        assert repr(f) == repr(make(**{name: inside}))


INTEGERS = {
    "context_dim": partial(PReLU, 2),
    "n_in": partial(mlp, n_out=2),
    "n_out": partial(mlp, 2),
    "hidden": partial(mlp, 2, 2),
    "event_shape": LeakyReLU,
}


@pytest.mark.parametrize("name", INTEGERS)
def test_sizes_are_whole_numbers_of_any_kind(name):
    make = INTEGERS[name]
    for bad in ("a", 2.0, True, -1, torch.zeros(2, 2), object()):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            make(**{name: bad})
    for good in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert repr(make(**{name: good})) == repr(make(**{name: 2}))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Elementwise(2, PReLUMap), "^maps: .* the class PReLUMap; call it"),
        (lambda: Elementwise(2, {(0, 1): ExpMap}), "^maps: .* the class ExpMap"),
        (lambda: Elementwise(2, torch.nn.Tanh()), "^maps: expected a scalar map, got Tanh"),
        (lambda: Elementwise(2, "exp"), "^maps: expected a scalar map, got str"),
        (lambda: InverseMap(ExpMap), "^scalar_map: .* the class ExpMap; call it"),
        (lambda: InverseMap(None), "^scalar_map: expected a scalar map, got NoneType"),
        (lambda: Elementwise(None, ExpMap()), "^event_shape: "),
        (lambda: BatchNorm(None), "^event_shape: "),
        (lambda: AffineMap(scale=None), "^scale: expected 'exp' or 'softplus'"),
        (lambda: AffineMap(scale=["exp"]), "^scale: expected 'exp' or 'softplus'"),
        (lambda: mlp(2, 2, activation=torch.nn.SiLU()), "^activation: .*makes a module, got SiLU"),
        (lambda: mlp(2, 2, activation="tanh"), "^activation: .*makes a module, got 'tanh'"),
        (lambda: mlp(2, 2, activation=torch.tanh), "^activation: .*makes a module, got .*, which says"),
        (lambda: mlp(2, 2, activation=int), "^activation: .* which makes 0"),
        (lambda: Conditional((2, -1)), "^shape: expected positive"),
        (lambda: Conditional("ab"), "^shape: expected positive"),
        (lambda: Conditional((2,), start=1.0), "^start: expected a floating-point tensor, got 1.0"),
        (lambda: Conditional((2,), start=torch.arange(2)), "^start: expected a floating-point"),
        (lambda: Conditional((2,), start=torch.zeros(3)), r"^start: .* \(2,\), got \(3,\)"),
        (lambda: Conditional((2,), start=torch.tensor([0.0, math.nan])), "^start: expected finite"),
        (lambda: Conditional((2,), 3, start=torch.tensor(-math.inf)), "^start: expected finite"),
        (lambda: Conditional((2,), -1), "^context_dim: expected"),
        # without a context there is no network, and yet
        (lambda: Conditional((2,), hidden="ab"), "^hidden: expected positive"),
        (lambda: Elementwise(2, PReLUMap(), hidden=-1), "^hidden: expected positive"),
        (lambda: BatchNorm(2, hidden=2.5), "^hidden: expected positive"),
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_a_shape_without_parameters_of_its_own_may_be_empty():
    assert Conditional([]).value.shape == Conditional(()).value.shape == ()
    assert len(mlp(2, 3, [])) == len(mlp(2, 3, ())) == 1


@pytest.mark.parametrize("scale", ["exp", "softplus"])
@pytest.mark.parametrize("bound", [None, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_times_an_infinite_slope_is_zero(scale, bound, dtype):
    f = AffineMap(bound, scale)
    far = 150.0 if dtype == torch.float32 else 1000.0
    if bound or scale == "softplus":
        far = 2000.0 if bound is None else 190.0
    zero, shift = torch.zeros((), dtype=dtype), torch.tensor(3.0, dtype=dtype)
    for raw in (far, -far):
        points = torch.tensor([raw], dtype=dtype, requires_grad=True)
        theta = torch.stack([points[0], shift])
        x, log_slope = f.forward(zero, theta)
        z, back = f.inverse(shift, theta)
        assert torch.equal(x, shift) and torch.equal(z, zero)
        assert torch.equal(back, -log_slope) and log_slope.isfinite()
        (gradient,) = torch.autograd.grad(x + z, points)
        assert torch.equal(gradient, torch.zeros_like(points))
        for end in (math.inf, -math.inf):
            end = torch.tensor(end, dtype=dtype)
            assert torch.equal(f.forward(end, theta)[0], end)
            assert torch.equal(f.inverse(end, theta)[0], end)


def test_slopes_that_a_format_can_hold_are_what_they_were():
    raw = torch.linspace(-87, 88, 400)
    z, shift = torch.randn(400), torch.randn(400)
    z[::7] = 0.0
    theta, z = torch.stack([raw, shift], -1), z.requires_grad_()
    x, log_slope = AffineMap(None).forward(z, theta)
    assert torch.equal(x, torch.addcmul(shift, z, raw.exp()))
    near = raw <= 87  # beyond, the slope at zero is held
    (slope,) = torch.autograd.grad(x.sum(), z)
    assert torch.equal(slope[near], raw.exp()[near])
    assert torch.equal(log_slope, raw)
    z, _ = AffineMap(None).inverse(x, torch.stack([raw, shift], -1))
    assert torch.equal(z, (x - shift) * (-raw).exp())


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


def test_statistics_are_taken_by_inverse_in_train_mode_only():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(500, 2)
    f = BatchNorm(2)
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


def test_running_statistics_are_those_of_torch():
    torch.manual_seed(0)
    first, second = torch.randn(100, 3), 5 + torch.randn(100, 3)
    batch, reference = (
        BatchNorm(3, momentum=0.3),
        torch.nn.BatchNorm1d(3, momentum=0.3),
    )
    for x in (first, second):
        batch.inverse(x)
    assert_close(batch.mean, 0.7 * first.mean(0) + 0.3 * second.mean(0))
    reference.running_mean, reference.running_var = first.mean(0), first.var(0)
    assert_close(
        batch.inverse(second)[0], reference(second), rtol=1e-4, atol=1e-5
    )
    reference(second)
    assert_close(batch.mean, reference.running_mean)


few = pytest.mark.parametrize("shape", [(1,), (), (0,)], ids=str)


@few
def test_a_batch_without_variance_waits_for_the_first_that_has_one(shape):
    f, x = BatchNorm(2), 3 + torch.randn(*shape, 2)
    z, ladj = f.inverse(x)
    assert_close(z, x)
    assert_close(ladj, torch.zeros(shape))
    assert not f.initialised and torch.equal(f.mean, torch.zeros(2))


@few
def test_a_batch_without_variance_meets_running_statistics(shape):
    f = BatchNorm(2)
    f.inverse(3 + 2 * torch.randn(50, 2))
    mean, variance = f.mean.clone(), f.variance.clone()
    x = torch.randn(*shape, 2)
    z, ladj = f.inverse(x)
    assert_close(z, (x - mean) / variance.sqrt())
    assert_close(ladj, (-variance.log().sum() / 2).expand(shape))
    assert torch.equal(f.mean, mean) and torch.equal(f.variance, variance)


def test_one_image_has_a_value_for_each_pixel():
    x = 5 + 2 * torch.randn(2, 16, 16)
    for shape in ((2, 16, 16), (1, 2, 16, 16)):
        f = BatchNorm((2, 16, 16))
        z, _ = f.inverse(x.reshape(shape))
        assert f.initialised
        assert_close(z.mean((-2, -1)), torch.zeros(*shape[:-3], 2), atol=1e-5, rtol=0)  # fmt: skip
        assert_close(f.mean.flatten(), x.mean((-2, -1)))
        assert_close(f.variance.flatten(), x.var((-2, -1)), rtol=1e-4, atol=0)
    lone = BatchNorm((2, 1, 1))  # of one pixel there is no variance
    lone.inverse(torch.randn(1, 2, 1, 1))
    assert not lone.initialised


@pytest.mark.parametrize("event_shape", [2, (2, 1, 1)])
def test_the_last_batch_of_an_epoch_may_be_one_row(event_shape):
    x = 3 + 2 * torch.randn(129, 2)
    x = x if event_shape == 2 else x[..., None, None]
    flow = Flow(BatchNorm(event_shape))
    fit(MaximumLikelihood(flow), x, steps=4, batch_size=128, progress=False)
    assert flow.bijection.initialised
    assert flow.eval().log_prob(x).isfinite().all()


def test_a_column_that_does_not_vary_is_kept_finite_by_eps():
    f = BatchNorm(2, eps=1e-4)
    x = torch.stack([torch.full((8,), 5.0), torch.arange(8.0)], -1)
    z, ladj = f.inverse(x)
    assert torch.equal(z[:, 0], torch.zeros(8))
    wanted = x.var(0, correction=0) + 1e-4
    assert_close(ladj, (-wanted.log().sum() / 2).expand(8))
    assert_close(f.variance, 8 / 7 * (x.var(0, correction=0) + 1e-4))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_state_is_saved_with_initialised(context_dim):
    context = torch.randn(50, 2) if context_dim else None
    f, other = (
        BatchNorm(3, context_dim=context_dim),
        BatchNorm(3, context_dim=context_dim),
    )
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
    assert not torch.equal(other.mean, mean)


def test_eval_mode_treats_each_row_alone():
    f = BatchNorm(2)
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


def test_images_are_normalised_by_channel():
    torch.manual_seed(0)
    x = torch.randn(10, 2, 4, 5) * torch.tensor([1.0, 3.0])[:, None, None]
    f = BatchNorm((2, 4, 5))
    z, ladj = f.inverse(x)
    assert f.mean.shape == (2, 1, 1) and ladj.shape == (10,)
    assert_close(z.std((0, 2, 3)), torch.ones(2), rtol=1e-2, atol=0)
    assert_close(
        ladj[0], -20 * x.std((0, 2, 3)).log().sum(), rtol=1e-2, atol=0.05
    )


def test_training_goes_through_the_statistics():
    flow = Flow(BatchNorm(2))
    x = torch.randn(50, 2).requires_grad_()
    (flow.log_prob(x).mean() + flow.log_prob(2 * x).mean()).backward()
    assert (
        x.grad.isfinite().all()
        and flow.bijection.theta.value.grad.abs().sum() > 0
    )


def test_gradients_through_the_statistics_are_those_of_torch():
    x = (3 + 2 * torch.randn(50, 2)).double().requires_grad_()
    wanted = torch.nn.BatchNorm1d(2, affine=False).double()(x)
    got, _ = BatchNorm(2).double().inverse(x)
    assert_close(got, wanted)
    pair = [torch.autograd.grad(z.sin().sum(), x)[0] for z in (got, wanted)]
    assert_close(*pair)


def test_widths_and_eps_reach_the_layer():
    f = BatchNorm((2, 3, 3), context_dim=4, eps=0.5, hidden=(5, 6))
    assert [len(p) for p in f.theta.net.parameters()][::2] == [5, 6, 4]
    f.inverse(torch.zeros(7, 2, 3, 3), torch.zeros(7, 4))
    assert_close(f.variance, torch.full((2, 1, 1), 0.5 * 63 / 62))


def test_widths_reach_the_networks_of_elementwise_maps():
    maps = {(0, 1): PReLUMap(), (1, 3): AffineMap()}
    f = Elementwise(3, maps, context_dim=4, hidden=(5,))
    widths = [[len(p) for p in t.parameters()][::2] for t in f.thetas]
    assert widths == [[5, 1], [5, 4]]


def test_a_network_begins_at_zero_and_uses_its_activation():
    net = mlp(3, 4, (8, 8), torch.nn.Tanh, dropout=0.25)
    kinds = [type(m).__name__ for m in net]
    assert kinds == ["Linear", "Tanh", "Dropout"] * 2 + ["Linear"]
    assert [m.p for m in net if isinstance(m, torch.nn.Dropout)] == [0.25] * 2
    assert not net(torch.randn(5, 3)).any()


def test_a_small_context_scale_makes_a_network_learn_slowly(scramble):
    f, g = Conditional((2,), 3), Conditional((2,), 3, context_scale=0.1)
    g.load_state_dict(scramble(f).state_dict())
    context = torch.randn(5, 3)
    assert_close(g(10 * context), f(context))
    assert not torch.allclose(g(context), f(context))


def test_autocast_leaves_parameters_in_the_format_of_the_context():
    f = Conditional((2,), 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(torch.randn(5, 3)).dtype == torch.float32


def test_a_softplus_scale_is_a_softplus_from_end_to_end():
    raw = torch.linspace(-30, 30, 601)
    theta = torch.stack([raw, torch.zeros(601)], -1)
    _, got = AffineMap(None, "softplus").forward(torch.zeros(601), theta)
    shifted = raw.double() + math.log(math.e - 1)
    wanted = torch.nn.functional.softplus(shifted).log()
    # the sum rounds by half an ulp of 30, and so does what is added to it
    assert_close(got.double(), wanted, rtol=1e-6, atol=4e-6)


def test_costs_are_those_of_the_dearest_map_and_turn_round_with_it():
    class Dear(AffineMap):
        inverse_cost = "numerical"

    turned = InverseMap(Dear())
    assert (turned.forward_cost, turned.inverse_cost) == (
        "numerical",
        "one pass",
    )
    f = Elementwise(3, {(0, 1): Dear(), (1, 2): PReLUMap()})
    assert (f.forward_cost, f.inverse_cost) == ("one pass", "numerical")


def test_a_map_that_knows_no_cost_costs_one_pass():
    class Plain:
        n_params = 1
        domain = codomain = constraints.real

        def forward(self, z, theta):
            return z + theta[..., 0], torch.zeros_like(z)

        def inverse(self, x, theta):
            return x - theta[..., 0], torch.zeros_like(x)

    assert Elementwise(2, Plain()).inverse_cost == "one pass"


def test_conditional_starts_where_it_is_told():
    start = torch.randn(3, 2)
    assert torch.equal(Conditional((3, 2), start=start)(None), start)
    f = Conditional((3, 2), 4, start)
    assert_close(f(torch.randn(5, 4)), start.expand(5, 3, 2))
    assert Conditional((), 4)(torch.randn(5, 4)).shape == (5,)


def test_training_compiles_without_a_break():
    f = BatchNorm(2)
    run = torch.compile(f.inverse, fullgraph=True, backend="aot_eager")
    x = 3 + torch.randn(50, 2)
    run(x)
    assert f.initialised
    assert_close(f.mean, x.mean(0))
