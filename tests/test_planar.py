"""Planar, radial and Sylvester layers: what the contract does not ask of every bijection."""

import copy
import math
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from helpers import noise, shaken
from pyro.distributions.transforms import Planar as PyroPlanar
from torch.testing import assert_close

from flowcourse.numerics import IDENTITY, above_minus_one
from flowcourse.planar import (
    LeakyUnit,
    LogisticUnit,
    Planar,
    Radial,
    Sylvester,
    TanhUnit,
    Unit,
    _gram_schmidt,
    _reflect,
)

UNITS = [TanhUnit(), LogisticUnit(), LeakyUnit()]


def perturbed(f, scale=1.0, seed=0):
    return shaken(f.double(), scale, seed)


def layer(w, u, b=0.0, **options):
    """One planar layer with the parameters given."""
    w, u = torch.as_tensor(w), torch.as_tensor(u)
    f = Planar(len(w), **options).to(w.dtype)
    f.raw.value.data = torch.cat([w, u, torch.full_like(w[:1], b)])[None]
    return f


def test_a_tanh_layer_is_that_of_pyro():
    torch.manual_seed(0)
    for _ in range(20):
        theirs = PyroPlanar(5)
        for p in (theirs.w, theirs.u, theirs.bias):
            # theirs loses digits in float32
            p.data = torch.randn(p.shape, dtype=torch.float64) * 2
        ours = layer(
            theirs.w.data,
            theirs.u.data,
            float(theirs.bias.detach()),
            offset=0.0,
        )
        z = torch.randn(50, 5, dtype=torch.float64)
        x, ladj = ours(z)
        want = theirs(z)
        assert_close(x, want, rtol=1e-7, atol=1e-7)
        assert_close(
            ladj, theirs.log_abs_det_jacobian(z, want), rtol=1e-7, atol=1e-7
        )


@pytest.mark.parametrize(
    "norm, product, broken", [(0.5, -2.0, -1.44), (4.0, 1.1, -1.75)]
)
def test_division_by_the_norm_alone_folds_space(norm, product, broken):
    w = torch.tensor([norm, 0.0], dtype=torch.float64)
    u = torch.tensor([product / norm, 1.0], dtype=torch.float64)
    m = math.log1p(math.exp(product)) - 1
    wrong = u + (m - product) * w / w.norm()
    assert math.isclose(w @ wrong, broken, abs_tol=0.01) and w @ wrong < -1
    _, u_hat, _, gain, _ = layer(w, u, offset=0.0)._per_layer()
    assert gain > -1
    assert_close(w @ u_hat[0], gain[0])
    assert_close(gain[0], torch.tensor(m, dtype=torch.float64))


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_the_slope_stays_positive(unit):
    w, u = noise(10000, 3), noise(10000, 3, seed=1)
    w = w * torch.logspace(-3, 2, len(w), dtype=torch.float64)[:, None]
    f = Planar(3, len(w), unit=unit).double()
    f.raw.value.data = torch.cat([w, u, torch.zeros(len(w), 1)], -1)
    _, u_hat, _, gain, log_steepest = f._per_layer()
    # 1 + m > 0
    assert (gain >= -1 / unit.max_slope).all() and log_steepest.isfinite().all()
    assert_close((w * u_hat).sum(-1), gain, rtol=1e-9, atol=1e-9)


def test_the_logistic_unit_bends_by_more_than_minus_four():
    for product, least in ((-30.0, -4.0), (-3.0, -4.0), (5.0, 0.0)):
        _, _, _, gain, _ = layer(
            [1.0, 0.0], [product, 0.3], unit=LogisticUnit()
        )._per_layer()
        assert least <= gain.item()
    assert (
        layer([1.0], [-30.0], unit=LogisticUnit())._per_layer()[3].item() < -3.9
    )


def exact_log_slope(a, product, half):
    """log(tanh² + sech² softplus) with as many digits as it takes."""
    with mpmath.workdps(60):
        a, product = (
            mpmath.mpf(a) / (2 if half else 1),
            mpmath.mpf(product) / (4 if half else 1),
        )
        top = mpmath.log1p(mpmath.exp(product + mpmath.log(mpmath.e - 1)))
        return float(
            mpmath.log(mpmath.tanh(a) ** 2 + mpmath.sech(a) ** 2 * top)
        )


@pytest.mark.parametrize("unit", UNITS[:2], ids=str)
def test_the_log_slope_is_right_in_float32(unit):
    half = isinstance(unit, LogisticUnit)
    for a in (0.0, 1e-20, 1e-6, 0.03, 1.0, 7.0, 100.0, 1e4):
        for product in (-1e4, -300.0, -80.0, -20.0, -1.0, 0.0, 1.0, 30.0, 1e4):
            at = torch.tensor(a, requires_grad=True)
            p = torch.tensor(product, requires_grad=True)
            got = unit.log_slope(at, above_minus_one(p * unit.max_slope)[1])
            want = torch.tensor(exact_log_slope(at.item(), product, half))
            assert_close(got, want, rtol=1e-5, atol=1e-5)
            for g in torch.autograd.grad(got, [at, p]):
                assert g.isfinite()


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_the_ladj_is_finite_for_any_w_and_u(unit):
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(
        torch.randn(2000, 3, generator=g), dim=-1
    )
    for norm in (0.0, 1e-30, 1e-10, 1e-3, 1.0, 100.0, 1e4):
        for product in (-1e4, -100.0, -1.0, 0.0, 100.0, 1e4):
            w = direction * norm
            u = torch.randn(2000, 3, generator=g)
            if norm > 1e-4:
                u = direction * product / norm + u / norm
            f = Planar(3, 2000, unit=unit)
            f.raw.value.data = torch.cat([w, u, torch.zeros(2000, 1)], -1)
            w, u_hat, b, _, log_steepest = f._per_layer()
            z = torch.randn(2000, 3, generator=g)
            ladj = unit.log_slope((w * z).sum(-1) + b, log_steepest)
            assert ladj.isfinite().all() and u_hat.isfinite().all()
            slopes = torch.autograd.grad(ladj.sum() + u_hat.sum(), f.raw.value)[
                0
            ]
            assert slopes.isfinite().all()


@pytest.mark.parametrize("context_dim", [0, 2])
def test_parameters_of_a_context_are_those_that_the_layers_use(context_dim):
    f = perturbed(Planar(3, 2, context_dim=context_dim))
    z, features = noise(5, 3), noise(5, 2, seed=1)
    context = features if context_dim else None
    w, u, b = f.parameters_of(context)
    x = z
    for k in range(2):
        a = (w[..., k, :] * x).sum(-1) + b[..., k]
        x = x + u[..., k, :] * a.tanh().unsqueeze(-1)
    assert_close(x, f(z, context)[0])
    with pytest.raises(ValueError, match=r"^context: Planar expects"):
        f.parameters_of(None if context_dim else features)


def test_u_hat_stays_bounded_as_w_vanishes_and_the_paper_s_does_not():
    u = torch.tensor([3.0, -4.0])
    for norm in (1.0, 1e-3, 1e-8, 1e-15, 1e-30):
        u_hat = layer([0.6 * norm, 0.8 * norm], u)._per_layer()[1]
        assert u_hat.norm() < 1.5 * u.norm()
    assert_close(layer([0.0, 0.0], u)._per_layer()[1][0], u)
    assert layer([6e-9, 8e-9], u, offset=0.0)._per_layer()[1].norm() > 1e7


def test_u_zero_is_the_identity():
    f, z = (
        layer(noise(4), torch.zeros(4, dtype=torch.float64), 0.7),
        noise(5, 4, seed=1),
    )
    x, ladj = f(z)
    assert torch.equal(x, z)
    assert_close(ladj, torch.zeros_like(ladj), rtol=0, atol=1e-15)


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("offset", [0.0, IDENTITY])
def test_where_w_is_zero_a_layer_only_shifts(unit, offset):
    """Whatever m is there: the paper's is log 2 - 1 at zero, and would count in the ladj."""
    u, z = noise(4), noise(5, 4, seed=1)
    f = layer(torch.zeros_like(u), u, 0.7, unit=unit, offset=offset)
    shift = u * unit(torch.tensor(0.7, dtype=torch.float64))
    for way, sign in ((f.forward, 1), (f.inverse, -1)):
        image, ladj = way(z)
        assert_close(image, z + sign * shift)
        assert ladj.abs().max() < 1e-15
    assert (f._per_layer()[3] == 0).all()
    # R~ with zeros on its diagonal: R~ R is strictly upper triangular
    f = perturbed(Sylvester(4, 2, unit=unit, offset=offset))
    f.raw.value.data[:, 16:20] = 0.0
    assert f(z)[1].abs().max() < 1e-15 and (f._per_layer()[4] == 0).all()
    jacobian = torch.func.jacrev(lambda t: f(t)[0])(z[0])
    determinant = torch.linalg.det(jacobian)
    assert_close(determinant, torch.ones_like(determinant))


def test_a_leaky_layer_squeezes_no_half_of_space_by_more_than_five():
    steepest = torch.tensor(-1e4, dtype=torch.float64)
    sides = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    least = LeakyUnit(0.5).log_slope(sides, steepest)
    assert_close(least.exp(), torch.tensor([0.6, 0.2], dtype=torch.float64))


def test_every_option_is_used():
    hidden = {"context_dim": 2, "hidden": (5,)}
    for f in (
        Planar(3, 2, **hidden),
        Radial(3, 2, **hidden),
        Sylvester(3, 2, **hidden),
    ):
        assert f.raw.net[0].out_features == 5
    w, u, b = Planar(3, 7, block=3).parameters_of()
    parts = Planar(3, 7, block=3)._blocks(w, u, b)
    assert [len(b) for _, _, b in parts] == [3, 3, 1]
    reflected = Sylvester(3, units=2, variant="householder", reflections=7)
    assert reflected.raw.value.shape == (1, 4 + 2 + 2 + 7 * 3)
    turned = Sylvester(3, 3, variant="triangular")._per_layer()[0]
    eye = torch.eye(3)
    assert torch.equal(turned, torch.stack([eye, eye.flip(0), eye]))


def test_a_direction_starts_with_length_one():
    """So that w'z is about as large as an entry of z; the mean is good to 1/100."""
    w = Planar(50, 400).raw.value[:, :50]
    assert abs(w.square().sum(-1).mean() - 1) < 0.05


class ArctanUnit(Unit):
    """A unit as a user writes one: its range, its value and its slope."""

    max_slope, low, high = 1.0, -math.pi / 2, math.pi / 2

    def __call__(self, a):
        return a.atan()

    def slope(self, a):
        return 1 / (1 + a.square())


def test_a_unit_needs_its_range_its_value_and_its_slope():
    f = perturbed(Planar(4, 3, unit=ArctanUnit(), block=2))
    z = noise(20, 4)
    x, ladj = f(z)
    jacobian = torch.vmap(torch.func.jacrev(lambda t: f(t)[0]))(z)
    assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet)
    back, ladj_back = f.inverse(x)
    assert_close(back, z)
    assert_close(ladj_back, -ladj)
    assert f.inverse_cost == "numerical" and "unit=ArctanUnit()" in repr(f)


def test_what_a_unit_lacks_is_named():
    class Bare(Unit):
        max_slope = 1.0

    class Flat(Bare):
        def __call__(self, a):
            return a

    z = noise(3, 2)
    for unit, word in (
        (Bare(), "Bare defines no __call__"),
        (Flat(), "Flat defines no slope"),
    ):
        with pytest.raises(NotImplementedError, match=f"^{word}$"):
            Planar(2, unit=unit).double()(z)
    flat = Flat()
    with pytest.raises(NotImplementedError, match="^Flat has no bounds and"):
        flat.solve(z, z, z)


MAKERS = {
    **{
        f"planar {u}": lambda c, u=u: Planar(
            4, 3, context_dim=c, unit=u, block=2
        )
        for u in UNITS
    },
    "radial": lambda c: Radial(4, 3, context_dim=c),
    **{
        f"sylvester {v}": lambda c, v=v: Sylvester(
            4, 2, context_dim=c, variant=v
        )
        for v in ("orthogonal", "householder", "triangular")
    },
    "sylvester narrow": lambda c: Sylvester(4, 2, units=2, context_dim=c),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_derivatives_of_the_inverse_are_the_implicit_ones(name, scale):
    """Of `z` it is the inverse matrix, of `ladj` it is what the forward direction says."""
    torch.manual_seed(0)
    f = perturbed(MAKERS[name](0), scale)
    z = noise(20, 4, seed=5)
    x = f(z)[0].detach()
    forward = torch.vmap(torch.func.jacrev(lambda t: f(t)[0]))(z)
    inverse = torch.vmap(torch.func.jacrev(lambda t: f.inverse(t)[0]))(x)
    z_slope = torch.vmap(torch.func.grad(lambda t: f(t)[1]))(z)
    x_slope = torch.vmap(torch.func.grad(lambda t: f.inverse(t)[1]))(x)
    condition = torch.linalg.cond(forward)
    good = condition < 1e6
    assert good.sum() >= 5
    assert_close(f.inverse(x)[0][good], z[good], rtol=1e-8, atol=1e-8)
    want = torch.linalg.inv(forward)
    error = (inverse - want).flatten(1).norm(dim=-1) / want.flatten(1).norm(
        dim=-1
    )
    assert (error < 1e-12 * condition.square())[good].all()
    want = -torch.linalg.solve(forward.mT, z_slope)
    error = (x_slope - want).norm(dim=-1) / (1 + want.norm(dim=-1))
    assert (error < 1e-12 * condition.square())[good].all()


def test_second_derivatives_of_the_inverse_are_right():
    f = perturbed(Planar(3, 2))
    x = noise(3, seed=3)
    assert torch.autograd.gradgradcheck(
        lambda t: f.inverse(t), x.requires_grad_()
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_ladj_of_the_inverse_is_right_in_float32_at_wild_parameters(seed):
    torch.manual_seed(seed)
    f = Planar(5, 20, context_dim=2)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(3 * torch.randn_like(p))
    x, context = 2 * torch.randn(64, 5), torch.randn(64, 2)
    _, ladj = f.inverse(x, context)
    exact = copy.deepcopy(f).double()
    # the network rounds as well
    exact.raw = Given(f.raw(context).detach().double())
    _, true = exact.inverse(x.double(), context.double())
    assert ((ladj - true).abs() / (1 + true.abs())).max() < 1e-6


class Given(torch.nn.Module):
    """Raw parameters, whatever the context is."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, context):
        return self.value


@pytest.mark.parametrize("make", [Planar, partial(Sylvester, units=2)])
def test_context_scale_multiplies_the_context(make):
    context, z = noise(7, 2), noise(7, 3)
    quiet, loud = (
        make(3, 4, context_dim=2, hidden=(), context_scale=s)
        for s in (0.1, 1.0)
    )
    perturbed(quiet)
    loud.double().load_state_dict(quiet.state_dict())
    for found, expected in zip(
        quiet(z, context), loud(z, 0.1 * context), strict=True
    ):
        assert_close(found, expected)
    assert not torch.allclose(quiet(z, context)[0], loud(z, context)[0])


def test_the_radial_inverse_keeps_its_digits():
    """The naive root of the quadratic is 2.5 % off in float32 at beta = 1e4 and r = 0.01."""
    alpha, beta = 1.0, 1e4
    f = Radial(2)
    f.raw.value.data = torch.tensor([[0.0, 0.0, 0.0, 1 + beta - IDENTITY]])
    z = torch.tensor([0.006, 0.008])
    x, _ = f(z)
    total, r_out = torch.tensor(alpha + beta), x.norm()
    half = total - r_out
    naive = (-half + (half.square() + 4 * alpha * r_out).sqrt()) / 2
    assert abs(naive - 0.01) > 1e-4
    assert_close(f.inverse(x)[0], z, rtol=1e-5, atol=0)


def test_the_radial_layer_is_its_formula():
    f, z = perturbed(Radial(3)), noise(10, 3, seed=4)
    z0, alpha, total = (t[0] for t in f._per_layer())
    assert alpha > 0 and total > 0
    beta, ray = total - alpha, z - z0
    r = ray.norm(dim=-1)
    h, slope = 1 / (alpha + r), -1 / (alpha + r).square()
    x, ladj = f(z)
    assert_close(x, z + (beta * h)[:, None] * ray)
    assert_close(
        ladj, (1 + beta * h + beta * slope * r).log() + 2 * (1 + beta * h).log()
    )
    assert f(z0)[0].isfinite().all() and f.inverse(z0)[1].isfinite()


FAR = {  # lengths whose squares overflow, and some that are not so far
    torch.float32: (1e3, 1e18, 2e19, 1e25, 1e30, 1e38),
    torch.float64: (1e3, 1e153, 1e155, 1e200, 1e300),
}


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_radial_layers_take_points_as_far_as_numbers_go(way, dtype):
    """Far out the layer moves a point by beta along its ray, and by nothing that shows."""
    f = perturbed(Radial(3)).to(dtype)
    z0, alpha, total = (t[0] for t in f._per_layer())
    beta = (total - alpha).detach()
    eps = torch.finfo(dtype).eps
    for size in FAR[dtype]:
        ray = torch.tensor([0.6, 0.0, -0.8], dtype=dtype) * size
        point = (z0 + ray).detach()
        image, ladj = getattr(f, way)(point)
        step = beta if way == "forward" else -beta
        want = point + step * ray / size
        assert_close(image, want, rtol=4 * eps, atol=2 * beta.abs() / size)
        # (1 + beta / r)^2 across, and 1 - O(1 / r^2) along
        close = 10 * ((beta.abs() + alpha) / size) ** 2 + 4 * eps
        assert (ladj - 2 * step / size).abs() < close

        def value(theta, point):
            image, ladj = torch.func.functional_call(
                f, {"raw.value": theta}, (point,)
            )
            return (image * ray).sum() / size + ladj

        at = f.raw.value.detach(), point
        for slope in torch.func.grad(value, (0, 1))(*at):
            assert slope.isfinite().all()
        for curvature in torch.func.hessian(value, (0, 1))(*at):
            assert all(t.isfinite().all() for t in curvature)


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("dtype", FAR, ids=str)
def test_second_derivatives_of_the_log_slope_are_right_far_out(unit, dtype):
    """Of log(1 + m h'(a) / max h'), written out for the unit; 0 where it is flat."""

    def log_slope(a, log_steepest):
        return unit.log_slope(a, log_steepest)

    def plain(a, log_steepest):
        share = unit.slope(a) / unit.max_slope
        return (1 + log_steepest.expm1() * share).log()

    for steepest in (-300.0, -20.0, -2.0, 0.0, 3.0):
        for a in (0.0, 0.3, -2.0, 8.0, -30.0, 50.0, -400.0, *FAR[dtype]):
            at = torch.tensor(a, dtype=dtype), torch.tensor(steepest).to(dtype)
            got = torch.func.hessian(log_slope, (0, 1))(*at)
            assert all(t.isfinite() for row in got for t in row)
            if steepest > -10:  # else the plain form loses all digits
                wide = [t.double() for t in at]
                want = torch.func.hessian(plain, (0, 1))(*wide)
                for g, w in zip(sum(got, ()), sum(want, ())):
                    assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_far_points_stay_numbers_and_so_do_their_derivatives(name, way):
    for dtype, sizes in FAR.items():
        torch.manual_seed(0)
        f = perturbed(MAKERS[name](0)).to(dtype)
        for size in sizes[1:-1]:

            def value(point, size=size):
                image, ladj = getattr(f, way)(point)
                return image.sum() / size + ladj

            point = noise(4).to(dtype) * size
            assert value(point).isfinite()
            assert torch.func.grad(value)(point).isfinite().all()
            curvature = torch.func.jacrev(torch.func.grad(value))(point)
            assert curvature.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, IDENTITY])
def test_a_sylvester_layer_with_one_unit_is_planar(offset):
    f = perturbed(Sylvester(4, units=1, offset=offset))
    z = noise(6, 4, seed=2)
    q, _, r_inner, b, _, _ = f._per_layer()
    w = (q * r_inner)[0, :, 0]
    outer = f.raw.value[0, 0]
    g = layer(
        w.detach(),
        (q[0, :, 0] * outer).detach(),
        float(b.detach()),
        offset=offset,
    )
    for got, want in zip(g(z), f(z)):
        assert_close(got, want)


@pytest.mark.parametrize("variant", ["orthogonal", "householder", "triangular"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_sylvester_ladj_at_large_parameters(variant, scale):
    """In float32 against autograd's Jacobian in float64."""
    torch.manual_seed(0)
    f = perturbed(Sylvester(3, variant=variant), scale)
    z = noise(20, 3).float().double()
    jacobian = torch.vmap(torch.func.jacrev(lambda t: f(t)[0]))(z)
    want, known = (
        torch.linalg.slogdet(jacobian).logabsdet,
        torch.linalg.cond(jacobian) < 1e9,
    )
    assert known.sum() > 5
    assert_close(f(z)[1][known], want[known], rtol=1e-6, atol=1e-6)
    assert_close(
        f.float()(z.float())[1][known],
        want[known].float(),
        rtol=1e-3,
        atol=1e-3,
    )


def test_frames_are_orthonormal_and_move_smoothly():
    raw = noise(7, 5, 3)
    eye = torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
    for q in (_gram_schmidt(raw), _reflect(raw.mT, 3)):
        assert_close(q.mT @ q, eye)
    assert_close(
        _reflect(torch.zeros_like(raw.mT), 3)[0],
        torch.eye(5, 3, dtype=torch.float64),
    )
    right = torch.tensor(
        [[1e-9, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64
    )
    left = right * torch.tensor([[-1.0], [1.0], [1.0]], dtype=torch.float64)
    assert_close(_gram_schmidt(left), _gram_schmidt(right), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: LeakyUnit(1.5), "slope: expected a number between 0 and 1"),
        (lambda: LeakyUnit("0.1"), "slope: expected a finite number"),
        (lambda: LeakyUnit(math.nan), "slope: expected a finite number"),
        (lambda: Planar(2, 0), "layers: expected a whole number"),
        (lambda: Planar(2, 2.5), "layers: expected a whole number"),
        (lambda: Planar((2, 3)), "dim: expected a whole number"),
        (lambda: Planar("2"), "dim: expected a whole number"),
        (
            lambda: Planar(2, unit="tanh"),
            r"unit: expected a Unit such as TanhUnit\(\), got str",
        ),
        (lambda: Planar(2, unit=LeakyUnit), r"unit: expected .*LeakyUnit\("),
        (
            lambda: Planar(2, offset=math.inf),
            "offset: expected a finite number",
        ),
        (lambda: Planar(2, 3, block=0), "block: expected a whole number"),
        (
            lambda: Planar(2, 3, context_dim=2, context_scale=0.0),
            "context_scale",
        ),
        (lambda: Radial(2, 1.0), "layers: expected a whole number"),
        (lambda: Radial(0), "dim: expected a whole number"),
        (lambda: Sylvester(3, units=4), "units: .* at most 3, got 4"),
        (lambda: Sylvester(3, units=0), "units: expected a whole number"),
        (lambda: Sylvester(3, None), "layers: expected a whole number"),
        (
            lambda: Sylvester(3, units=2, variant="triangular"),
            "units: .* 3, got",
        ),
        (lambda: Sylvester(3, variant="qr"), "variant: expected one of"),
        (lambda: Sylvester(3, variant=["qr"]), "variant: expected one of"),
        (lambda: Sylvester(3, unit=TanhUnit), "unit: expected a Unit"),
        (lambda: Sylvester(3, offset=math.nan), "offset: expected a finite"),
        (
            lambda: Sylvester(3, variant="householder", reflections=0),
            "reflections: expected a whole number",
        ),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=f"^{word}"):
        make()


def test_sizes_may_be_numbers_of_numpy():
    three, two = np.int64(3), np.uint8(2)
    for f in (
        Planar(three, two, context_dim=two, block=two),
        Radial(three, two, context_dim=two),
        Sylvester(
            three,
            two,
            context_dim=two,
            units=two,
            variant="householder",
            reflections=two,
        ),
    ):
        assert f(torch.zeros(3), torch.zeros(2))[0].shape == (3,)
        assert "np." not in repr(f)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_no_tensor_is_made_on_the_default_device(name, context_dim):
    """Made there all of it is there; made elsewhere, the map works where it was made."""
    f = perturbed(MAKERS[name](context_dim))
    z = noise(6, 4)
    context = noise(6, 2, seed=1) if context_dim else None
    try:
        torch.set_default_device("meta")
        made = MAKERS[name](context_dim)
        results = f(z, context), f.inverse(z, context)
    finally:
        torch.set_default_device(None)
    assert all(p.is_meta for p in made.state_dict().values())
    assert all(t.device.type == "cpu" for pair in results for t in pair)
    away = None if context is None else context.float().to("meta")
    x, ladj = made(z.float().to("meta"), away)
    assert x.is_meta and ladj.shape == (6,)
