"""Three ways to sample an autoregressive layer: one after another, unit by unit, and by sweeps."""

import math

import pytest
import torch
from helpers import noise
from masked import one_layer, perturbed, sample_by
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from flowcourse.autoregressive import IAF, MAF, Autoregressive
from flowcourse.bnaf import BNAF
from flowcourse.elementwise import AdditiveMap, AffineMap, ScalarMap
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.zoo_scalar_maps import scalar_maps

WAYS = ("incremental", "fixed-point", "loop")


class Squash(ScalarMap):
    """Onto the unit interval, with a shift: in float32 large points round onto its end."""

    n_params, codomain = 1, torch.distributions.constraints.unit_interval

    def point(self, z, shift):
        return (z + shift).sigmoid()

    def back(self, x, shift):
        return x.log() - (-x).log1p() - shift

    def log_slope(self, z, x, shift):
        u = z + shift
        return nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)


@pytest.mark.parametrize("way", WAYS)
def test_points_stay_inside_an_open_codomain(way):
    f = Autoregressive(2, Squash(), sampling=way)
    x, ladj = f(torch.tensor([[20.0, 30.0], [-20.0, 100.0]]))
    assert (x < 1).all() and (x > 0).all() and ladj.isfinite().all()
    assert all(t.isfinite().all() for t in f.inverse(x))


def test_a_tolerance_is_relative():
    f = one_layer(
        16,
        scalar_map=AdditiveMap(),
        scale=0.1,
        sampling="fixed-point",
        tolerance=1e-2,
    )
    f.made = Counted(f.made)
    with torch.no_grad():
        f(300 * noise(16, 16))
    assert f.made.calls < 8  # absolute it would take nearly all 16


@pytest.mark.parametrize(
    "scalar_map", [AffineMap(), RationalQuadraticSplineMap()]
)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_three_ways_agree_with_their_gradients(dim, context_dim, scalar_map):
    f = one_layer(dim, context_dim, scalar_map)
    z, context = noise(9, dim), noise(9, context_dim) if context_dim else None
    results = {}
    for way in WAYS:
        g = sample_by(f, way)
        inputs = [z.clone().requires_grad_()]
        inputs += [] if context is None else [context.clone().requires_grad_()]
        x, ladj = g(*inputs)
        loss = (x * noise(9, dim, seed=1)).sum() + (
            ladj * noise(9, seed=2)
        ).sum()
        grads = torch.autograd.grad(
            loss, [*inputs, *g.parameters()], materialize_grads=True
        )
        results[way] = (x, ladj, *grads)
    for way in WAYS:
        for got, wanted in zip(results[way], results["loop"]):
            assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        with torch.no_grad():  # which takes another path
            for got, wanted in zip(
                sample_by(f, way)(z, context), results["loop"]
            ):
                assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_fixed_point_is_as_good_as_its_tolerance_and_exact_without(tolerance):
    f = one_layer(20, hidden=(40, 40))
    z = noise(64, 20)
    wanted, ladj = sample_by(f, "loop")(z)
    with torch.no_grad():
        got, got_ladj = sample_by(f, "fixed-point", tolerance)(z)
    error = ((got - wanted).abs() / (1 + wanted.abs())).max()
    assert 0 < error < 10 * tolerance
    assert (got_ladj - ladj).abs().max() < 20 * 10 * tolerance
    got, _ = sample_by(f, "fixed-point", 0.0)(z)
    assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # by default it stops at what rounding does
        got, _ = sample_by(f, "fixed-point")(z)
    assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "name", ["affine", "rational-quadratic-spline", "deep-sigmoidal"]
)
@pytest.mark.parametrize(
    ("scale", "layers"), [(0.0, 1), (0.3, 3), (1.0, 1), (3.0, 1)]
)
def test_in_float32_no_way_is_further_off_than_twice_the_loop(
    name, scale, layers
):
    """By the worst of a thousand points, however much the map amplifies what rounding does."""
    for seed in range(2):
        torch.manual_seed(seed)
        f = perturbed(
            MAF(16, layers, hidden=(64, 64), scalar_map=scalar_maps[name]),
            scale,
            seed,
        )
        f = f.float().double()  # weights that float32 has as well
        z = noise(1000, 16, seed=seed).float()
        with torch.no_grad():
            exact = sample_by(f, "loop")(z.double())
            error = {}
            for way in WAYS:
                got = sample_by(f, way).float()(z)
                error[way] = [
                    ((a.double() - b) / (1 + b.abs())).abs().max()
                    for a, b in zip(got, exact)
                ]
        for way in WAYS:
            for mine, plain in zip(error[way], error["loop"]):
                assert mine <= 2 * max(
                    plain, torch.finfo(torch.float32).eps / 2
                )


def test_an_activation_with_parameters_samples_in_float32_and_gets_its_gradient():
    f = one_layer(4, 2, activation=nn.PReLU).float()
    z, context = noise(8, 4).float(), noise(8, 2, seed=1).float()
    for way in WAYS:
        x, ladj = sample_by(f, way)(z, context)
        assert x.dtype == ladj.dtype == torch.float32
        assert_close(f.inverse(x, context)[0], z, rtol=1e-4, atol=1e-4)
    f(z, context)[0].square().sum().backward()
    assert f.made.activation.weight.grad.any()


class Explosive(ScalarMap):
    """Affine without a bound: what the course does not do, to make numbers overflow."""

    n_params = 2

    def forward(self, z, theta):
        s, t = theta.unbind(-1)
        return z * s.exp() + t, s.expand_as(z)

    def inverse(self, x, theta):
        s, t = theta.unbind(-1)
        return (x - t) * (-s).exp(), -s.expand_as(x)


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_of_what_is_not_determined_yet_does_not_spread(way):
    degrees = [torch.tensor([1, 2])]
    f = Autoregressive(
        3, Explosive(), sampling=way, degrees=degrees, activation=nn.Identity
    )
    first, last = f.made.layers
    # the last log-scale is 100 (1 - x_1): large while x_1 is not known
    with torch.no_grad():
        first.weight.copy_(torch.eye(2, 3))
        first.bias.zero_()
        last.weight[4, 1], last.bias[4] = -100.0, 100.0
    z = torch.tensor([[0.5, 1.0, 2.0], [-1.0, 0.99, -1.0]]).requires_grad_()
    swept = f.scalar_map.forward(z, f.made(torch.zeros_like(z)))[0]
    assert swept[:, 2].isinf().all() and f.made(swept).isnan().all()  # 0 * inf
    wanted = torch.tensor([[0.5, 1.0, 2.0], [-1.0, 0.99, -math.e]])
    x, ladj = f(z)
    assert_close(x, wanted, rtol=1e-4, atol=1e-4)
    assert_close(ladj, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(x.sum() + ladj.sum(), z)
    assert_close(grad[0], torch.tensor([1.0, 1 - 200.0 - 100.0, 1.0]))


def test_a_coordinate_that_overflows_leaves_those_before_it_alone():
    for way in WAYS:
        f = one_layer(5, order=torch.arange(5), sampling=way)
        z = noise(3, 5)
        wanted = f(z)[0]
        z[:, 2] = torch.inf
        assert_close(f(z)[0][:, :2], wanted[:, :2])


class Counted(nn.Module):
    """A network that counts how often it is called."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def __getattr__(self, name):
        return (
            super().__getattr__(name)
            if name == "net"
            else getattr(self.net, name)
        )

    def forward(self, *args):
        self.calls += 1
        return self.net(*args)


def test_passes_are_what_the_classes_declare():
    dim = 9
    f = one_layer(dim)
    f.made = Counted(f.made)
    assert (f.inverse_cost, f.forward_cost) == ("one pass", "D passes")
    f.inverse(noise(4, dim))
    assert f.made.calls == 1
    for way, tolerance, calls in (
        ("loop", None, dim),
        ("fixed-point", 0.0, 2 * dim),
    ):
        f.made.calls, f.sampling, f.tolerance = 0, way, tolerance
        f(noise(4, dim))
        assert f.made.calls == calls  # under gradients, a sweep is made twice
        f.made.calls = 0
        with torch.no_grad():
            f(noise(4, dim))
        assert f.made.calls == dim
    f.made.calls, f.sampling, f.tolerance = 0, "fixed-point", 1e-2
    with torch.no_grad():
        f(noise(4, dim))
    assert 1 < f.made.calls < dim
    maf, iaf = MAF(3, 2), IAF(3, 2)
    assert (maf.forward_cost, maf.inverse_cost) == ("D passes", "one pass")
    assert (iaf.forward_cost, iaf.inverse_cost) == ("one pass", "D passes")
    bnaf = BNAF(3)
    assert (bnaf.forward_cost, bnaf.inverse_cost) == ("numerical", "one pass")


@pytest.mark.parametrize("context_dim", [0, 4])
def test_incremental_sampling_does_the_arithmetic_of_one_pass(context_dim):
    f = MAF(32, 2, hidden=(64, 64), context_dim=context_dim)
    z, context = (
        torch.randn(16, 32),
        torch.randn(16, context_dim) if context_dim else None,
    )

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call(z, context)
        return counter.get_total_flops()

    one = flops(f.inverse)
    assert flops(f.forward) <= one
    with torch.no_grad():
        assert flops(f.forward) <= one
        assert flops(sample_by(f, "loop").forward) == 32 * one


@pytest.mark.parametrize("way", WAYS)
def test_sampling_works_under_vmap_and_compile(way):
    f = one_layer(3, 2, sampling=way, tolerance=0.0, hidden=(8, 8))
    z, context = noise(3, 3), noise(3, 2, seed=1)
    wanted = f(z, context)
    for got in (
        torch.func.vmap(f)(z, context),
        torch.compile(f, backend="aot_eager", fullgraph=True)(z, context),
    ):
        assert_close(got[0], wanted[0])
        assert_close(got[1], wanted[1])
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, c: f(z, c)[0]))(
        z, context
    )
    assert_close(torch.linalg.slogdet(jacobian).logabsdet, wanted[1])
    second = torch.func.jacrev(
        torch.func.jacrev(lambda z: f(z, context[0])[1])
    )(z[0])
    assert_close(second, second.T)
    assert second.any()
