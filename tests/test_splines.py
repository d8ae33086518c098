"""Spline maps: against Pyro, against plain loops, at their knots, outside the box and in float32."""

import math
import sys

import numpy as np
import pyro.distributions.transforms  # noqa: F401  the module is shadowed by a function of its name
import pytest
import torch
from torch.distributions import biject_to
from torch.testing import assert_close

from flowcourse.bases import Uniform
from flowcourse.core import Flow
from flowcourse.coupling import Coupling, Couplings, half
from flowcourse.elementwise import Elementwise
from flowcourse.quadrature import total_mass
from flowcourse.spline_maps import (
    CubicSplineMap,
    QuadraticSplineMap,
    RationalLinearSplineMap,
    spline_maps,
)
from flowcourse.splines import (
    NSF,
    LinearSplineMap,
    RationalQuadraticSplineMap,
    SplineMap,
    wrap,
)
from flowcourse.testing import check_bijection

KINDS = [
    LinearSplineMap,
    QuadraticSplineMap,
    CubicSplineMap,
    RationalLinearSplineMap,
    RationalQuadraticSplineMap,
]
BOXES = {"linear": 3.0, "box": (0.0, 1.0), "circular": math.pi}
kinds = pytest.mark.parametrize("kind", KINDS)
everything = pytest.mark.parametrize(
    "scalar_map",
    [kind(5, bound, tails) for kind in KINDS for tails, bound in BOXES.items()],
    ids=lambda m: f"{type(m).__name__}-{m.tails}",
)


def draw(scalar_map, n, sd=1.0, seed=0, dtype=torch.float64):
    """Points of the domain and raw parameters, one set for each point."""
    generator = torch.Generator().manual_seed(seed)
    low, high = scalar_map.ends
    t = low + (high - low) * torch.rand(n, generator=generator, dtype=dtype)
    return t, sd * torch.randn(
        n, scalar_map.n_params, generator=generator, dtype=dtype
    )


def distance(scalar_map, a, b):
    """On a circle, the shorter way round."""
    gap = (a - b).abs()
    low, high = scalar_map.ends
    return (
        torch.minimum(gap, high - low - gap)
        if scalar_map.tails == "circular"
        else gap
    )


def knots_of(scalar_map, theta):
    """Knots in z and in x, slopes there and what else shapes the pieces, of one set of parameters."""
    parts = scalar_map.parts()
    return scalar_map.knots(*theta[: sum(parts)].split(parts)).tolist()


@everything
def test_the_contract_up_to_raw_parameters_of_size_6(scalar_map):
    f = Elementwise(1, scalar_map)
    z = biject_to(f.domain)(torch.randn(12, 1))
    check_bijection(f, z, levels=(0.0, 1.0, 3.0, 6.0))


# The same maps in plain loops, from the papers' formulas in z and x rather than
# in the unit square.


def naive_linear(z, zs, xs):
    for z0, z1, x0, x1 in zip(zs, zs[1:], xs, xs[1:]):
        if z0 <= z < z1:
            return x0 + (x1 - x0) * (z - z0) / (z1 - z0), (x1 - x0) / (z1 - z0)


def naive_quadratic(z, zs, xs, slopes):
    """Integrate the polygon of slopes from the left end: whole trapezia, then a part of one."""
    x = xs[0]
    for z0, z1, v0, v1 in zip(zs, zs[1:], slopes, slopes[1:]):
        if z < z1:
            v = v0 + (v1 - v0) * (z - z0) / (z1 - z0)
            return x + (v0 + v) / 2 * (z - z0), v
        x += (v0 + v1) / 2 * (z1 - z0)


def steffen(zs, xs, k):
    """The slope at an inner knot (Steffen 1990), for increasing data."""
    h0, h1 = zs[k] - zs[k - 1], zs[k + 1] - zs[k]
    s0, s1 = (xs[k] - xs[k - 1]) / h0, (xs[k + 1] - xs[k]) / h1
    return 2 * min(s0, s1, 0.5 * (s0 * h1 + s1 * h0) / (h0 + h1))


def naive_cubic(z, zs, xs, slopes):
    for k in range(len(zs) - 1):
        if zs[k] <= z < zs[k + 1]:
            h, t = zs[k + 1] - zs[k], z - zs[k]
            s, d0, d1 = (xs[k + 1] - xs[k]) / h, slopes[k], slopes[k + 1]
            a, b = (d0 + d1 - 2 * s) / h**2, (3 * s - 2 * d0 - d1) / h
            return xs[
                k
            ] + d0 * t + b * t**2 + a * t**3, d0 + 2 * b * t + 3 * a * t**2


def naive_rational_linear(z, zs, xs, slopes, meets):
    """Homogeneous weights at both ends and at the middle point of the bin (Dolatabadi et al. 2020)."""
    for k in range(len(zs) - 1):
        if zs[k] <= z < zs[k + 1]:
            h, s = zs[k + 1] - zs[k], (xs[k + 1] - xs[k]) / (zs[k + 1] - zs[k])
            lam, phi = meets[k], (z - zs[k]) / h
            wa, wb = 1.0, math.sqrt(slopes[k] / slopes[k + 1])
            wc = (lam * wa * slopes[k] + (1 - lam) * wb * slopes[k + 1]) / s
            ya, yb = xs[k], xs[k + 1]
            yc = ((1 - lam) * wa * ya + lam * wb * yb) / (
                (1 - lam) * wa + lam * wb
            )
            if phi <= lam:
                below = wa * (lam - phi) + wc * phi
                y = (wa * ya * (lam - phi) + wc * yc * phi) / below
                return y, lam * wa * wc * (yc - ya) / below**2 / h
            below = wc * (1 - phi) + wb * (phi - lam)
            y = (wc * yc * (1 - phi) + wb * yb * (phi - lam)) / below
            return y, (1 - lam) * wb * wc * (yb - yc) / below**2 / h


def naive_rational_quadratic(z, zs, xs, slopes):
    for k in range(len(zs) - 1):
        if zs[k] <= z < zs[k + 1]:
            s, d0, d1 = (
                (xs[k + 1] - xs[k]) / (zs[k + 1] - zs[k]),
                slopes[k],
                slopes[k + 1],
            )
            xi = (z - zs[k]) / (zs[k + 1] - zs[k])
            below = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
            y = (
                xs[k]
                + (xs[k + 1] - xs[k]) * (s * xi**2 + d0 * xi * (1 - xi)) / below
            )
            top = s**2 * (
                d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2
            )
            return y, top / below**2


NAIVE = dict(
    zip(
        KINDS,
        [
            naive_linear,
            naive_quadratic,
            naive_cubic,
            naive_rational_linear,
            naive_rational_quadratic,
        ],
    )
)


@everything
def test_a_map_agrees_with_plain_loops(scalar_map):
    t, theta = draw(scalar_map, 300, sd=2.0)
    x, log_slope = scalar_map.forward(t, theta)
    for i in range(len(t)):
        want, slope = NAIVE[type(scalar_map)](
            t[i].item(), *knots_of(scalar_map, theta[i])
        )
        if scalar_map.tails == "circular":
            want = (want + theta[i, -1].item() + math.pi) % (
                2 * math.pi
            ) - math.pi
        assert_close(x[i].item(), want, rtol=1e-9, atol=1e-9)
        assert_close(log_slope[i].item(), math.log(slope), rtol=1e-8, atol=1e-8)


def test_cubic_slopes_are_those_of_steffen():
    scalar_map = CubicSplineMap(6)
    _, theta = draw(scalar_map, 50, sd=2.0)
    for row in theta:
        zs, xs, slopes = knots_of(scalar_map, row)
        for k in range(1, 6):
            assert_close(slopes[k], steffen(zs, xs, k), rtol=1e-9, atol=0)
    # on a circle the neighbours of the first knot lie across the cut
    zs, xs, slopes = knots_of(CubicSplineMap(6, 1.0, "circular"), theta[0, :13])
    around_z, around_x = (
        [v - 2 for v in knots[:-1]] + knots for knots in (zs, xs)
    )
    assert_close(slopes[0], steffen(around_z, around_x, 6), rtol=1e-9, atol=0)
    assert slopes[0] == slopes[-1]


def test_bins_hold_their_share_and_quadratic_slopes_their_area():
    scalar_map = LinearSplineMap(4, (0.0, 1.0), "box")
    theta = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64)
    zs, xs = torch.tensor(knots_of(scalar_map, theta), dtype=torch.float64)
    assert_close(zs, torch.linspace(0, 1, 5, dtype=torch.float64))
    assert_close(xs.diff(), (1.5 * torch.tanh(theta / 1.5)).softmax(-1))
    for tails, bound in BOXES.items():
        scalar_map = QuadraticSplineMap(5, bound, tails)
        _, theta = draw(scalar_map, 20, sd=3.0)
        for row in theta:
            zs, xs, v = torch.tensor(
                knots_of(scalar_map, row), dtype=torch.float64
            )
            assert_close(xs.diff(), zs.diff() * (v[:-1] + v[1:]) / 2)
            if tails == "linear":
                assert v[0] == v[-1] == 1


@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_the_rational_splines_are_those_of_pyro(order):
    """Pyro's floors are undone on the way in; its slope at the ends is 0.999."""
    kind = (
        RationalLinearSplineMap
        if order == "linear"
        else RationalQuadraticSplineMap
    )

    class AsPyro(kind):
        end_slope = 1 - 1e-3

    scalar_map = AsPyro(6)
    generator = torch.Generator().manual_seed(0)
    theta = 2 * torch.randn(
        3, scalar_map.n_params, generator=generator, dtype=torch.float64
    )
    z = 3.5 * (
        2 * torch.rand(4000, 3, generator=generator, dtype=torch.float64) - 1
    )
    zs, xs, slopes, *rest = scalar_map.knots(
        *theta.split(scalar_map.parts(), -1)
    ).unbind(-2)
    shares = [
        (knots.diff(dim=-1) / 6 - 1e-3) / (1 - 6e-3) for knots in (zs, xs)
    ]
    meets = [(rest[0][..., :-1] - 0.025) / 0.95] if rest else [None]
    theirs = sys.modules[
        "pyro.distributions.transforms.spline"
    ].ConditionedSpline(
        (*shares, slopes[..., 1:-1] - 1e-3, *meets), bound=3.0, order=order
    )
    x, log_slope = scalar_map.forward(z, theta)
    want = theirs(z)
    inside = z.abs() < 3
    assert_close(x, want, rtol=0, atol=1e-5)
    # within 1e-6 above a knot Pyro still uses the bin below
    near = ((z.unsqueeze(-1) - zs).abs() < 2e-6).any(-1)
    assert near.float().mean() < 1e-3
    assert_close(
        log_slope[~near],
        theirs.log_abs_det_jacobian(z, want)[~near],
        rtol=0,
        atol=1e-5,
    )
    assert torch.equal(x[~inside], z[~inside])
    back, log_back = scalar_map.inverse(want, theta)
    assert_close(back, z, rtol=0, atol=1e-5)
    assert_close(log_back[~near], -log_slope[~near], rtol=0, atol=1e-5)


@everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_are_the_identity(scalar_map, dtype):
    z, _ = draw(scalar_map, 1000, dtype=dtype)
    x, log_slope = scalar_map.forward(
        z, torch.zeros(scalar_map.n_params, dtype=dtype)
    )
    tol = 8 * torch.finfo(dtype).eps
    assert_close(x, z, rtol=tol, atol=tol)
    assert log_slope.abs().max() < 4 * tol


@everything
def test_pieces_join_at_the_knots_and_at_the_ends(scalar_map):
    """The map everywhere; its slope too, unless the pieces are straight."""
    _, theta = draw(scalar_map, 200, sd=3.0)
    for row in theta:
        zs = torch.tensor(knots_of(scalar_map, row)[0], dtype=torch.float64)
        inner = zs if scalar_map.tails == "linear" else zs[1:-1]
        sides = [inner - 1e-9, inner + 1e-9]
        if scalar_map.tails == "circular":  # the two ends are one point
            sides = [
                torch.cat([t, end])
                for t, end in zip(sides, (zs[-1:] - 1e-9, zs[:1] + 1e-9))
            ]
        (x0, slope0), (x1, slope1) = (scalar_map.forward(t, row) for t in sides)
        assert distance(scalar_map, x0, x1).max() < 1e-5
        if type(scalar_map) is not LinearSplineMap:
            assert (slope0 - slope1).abs().max() < 1e-4


@kinds
def test_linear_tails_go_on_for_ever(kind):
    scalar_map = kind(5)
    t, theta = draw(scalar_map, 1000, sd=3.0)
    far = torch.where(t > 0, 3 + 50 * t, -3 + 50 * t)
    x, log_slope = scalar_map.forward(far, theta)
    if kind is CubicSplineMap:  # straight on, with the slope of the end
        end, slope = scalar_map.forward(3.0 * far.sign(), theta)
        assert_close(x, end + (far - 3 * far.sign()) * slope.exp())
        assert_close(log_slope, slope)
    else:
        assert torch.equal(x, far) and not log_slope.any()
    assert_close(scalar_map.inverse(x, theta)[0], far)


@kinds
def test_a_box_keeps_its_ends_and_leaves_alone_what_lies_outside(kind):
    scalar_map = kind(5, (0.0, 1.0), "box")
    _, theta = draw(scalar_map, 100, sd=3.0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(2, 100)
    images = scalar_map.forward(ends, theta)[0]
    assert_close(images, ends)
    assert ((images > 0) & (images < 1)).all()  # the box is open
    outside = torch.tensor([-0.5, 1.5], dtype=torch.float64)[:, None].expand(
        2, 100
    )
    x, log_slope = scalar_map.forward(outside, theta)
    assert torch.equal(x, outside) and not log_slope.any()
    # no density where there is no base
    f = Flow(Elementwise(1, scalar_map), Uniform(1))
    with torch.no_grad():
        f.bijection.thetas[0].value.normal_()
        assert f.log_prob(torch.tensor([[1.5], [-0.1]])).isneginf().all()
        assert_close(
            total_mass(f.log_prob, low=0, high=1).item(), 1.0, atol=1e-3, rtol=0
        )


def test_a_knot_belongs_to_the_bin_above():
    scalar_map = LinearSplineMap(4, (0.0, 1.0), "box")
    theta = draw(scalar_map, 1)[1][0]
    knots = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    _, at = scalar_map.forward(knots, theta)
    assert_close(at, scalar_map.forward(knots + 0.1, theta)[1])


@kinds
@pytest.mark.parametrize("tails", BOXES)
def test_raw_parameters_ask_for_no_more_than_their_bounds(kind, tails):
    """Sizes of bins up to e^(2 size_bound) apart, log-slopes up to slope_bound."""
    scalar_map = kind(5, BOXES[tails], tails)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        signs = torch.randn(scalar_map.n_params, generator=generator).sign()
        theta = 1e4 * signs.double()
        zs, xs, *rest = torch.tensor(
            knots_of(scalar_map, theta), dtype=torch.float64
        )
        most = math.exp(2 * scalar_map.size_bound) * (1 + 1e-6)
        for knots in (zs, xs) if kind is not QuadraticSplineMap else (zs,):
            assert knots.diff().max() / knots.diff().min() < most
        if kind in (RationalLinearSplineMap, RationalQuadraticSplineMap):
            assert rest[0].log().abs().max() < scalar_map.slope_bound + 1e-6
        if kind is RationalLinearSplineMap:
            assert 0.11 < rest[1][:-1].min() and rest[1].max() < 0.89


@kinds
def test_a_circle_holds_one_of_its_ends(kind):
    domain = kind(5, math.pi, "circular").domain
    ends = torch.tensor([-math.pi, math.pi], dtype=torch.float64)
    assert domain.check(ends).tolist() == [True, False]


@kinds
def test_a_circle_has_no_ends(kind):
    scalar_map = kind(5, math.pi, "circular")
    z, theta = draw(scalar_map, 500, sd=3.0)
    x, log_slope = scalar_map.forward(z, theta)
    again, log_again = scalar_map.forward(z + 6 * math.pi, theta)
    assert distance(scalar_map, x, again).max() < 1e-9
    assert_close(log_slope, log_again, rtol=1e-7, atol=1e-7)
    assert scalar_map.codomain.check(x).all()
    shifted = theta.clone()
    shifted[:, -1] += 1.0
    moved = scalar_map.forward(z, shifted)[0]
    assert distance(scalar_map, moved, wrap(x + 1.0)).max() < 1e-9


def test_wrap_stays_in_its_interval_despite_rounding():
    for dtype in (torch.float32, torch.float64):
        pi = torch.tensor(math.pi, dtype=dtype)
        t = torch.cat(
            [torch.linspace(-50, 50, 100_001, dtype=dtype), pi[None], -pi[None]]
        )
        t = torch.cat(
            [
                t,
                *(
                    s * pi.nextafter(e * pi)[None]
                    for s in (-1, 1)
                    for e in (0, 2)
                ),
            ]
        )
        turned = wrap(t)
        assert ((turned >= -math.pi) & (turned < math.pi)).all()
        assert_close(
            turned.sin(), t.sin(), rtol=0, atol=100 * torch.finfo(dtype).eps
        )
    # 1 - 1e-9 is 1 in float32, and so the next turn's beginning
    assert wrap(torch.tensor(-1e-9), 0.0, 1.0) == 0
    assert wrap(torch.tensor(math.nan)).isnan()


# The largest |forward(inverse(x)) - x| and |inverse(forward(z)) - z| of 100,000
# points, each with raw parameters of its own of standard deviation 6; measured,
# and doubled.
FLOAT32 = {
    "linear-spline": (3e-6, 5e-6),
    "quadratic-spline": (6e-6, 2e-5),
    "cubic-spline": (4e-5, 7e-5),
    "rational-linear-spline": (4e-4, 3e-4),
    "rational-quadratic-spline": (4e-5, 3e-3),
    "rational-quadratic-spline-box": (1e-5, 1e-3),
    "circular-spline": (4e-5, 2e-2),
}


@pytest.mark.parametrize("name", spline_maps)
def test_float32_comes_back_from_raw_parameters_of_size_6(name):
    scalar_map = spline_maps[name]
    t, theta = draw(scalar_map, 100_000, sd=6.0, dtype=torch.float32)
    z, log_back = scalar_map.inverse(t, theta)
    x, log_there = scalar_map.forward(z, theta)
    in_x = distance(scalar_map, x, t).max()
    in_z = distance(
        scalar_map,
        scalar_map.inverse(scalar_map.forward(t, theta)[0], theta)[0],
        t,
    ).max()
    assert in_x < FLOAT32[name][0] and in_z < FLOAT32[name][1]
    assert (log_back + log_there).abs().max() < 2e-3


@everything
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6])
def test_wild_parameters_stay_finite_in_float32(scalar_map, scale):
    t, theta = draw(scalar_map, 2000, sd=scale, dtype=torch.float32)
    theta.requires_grad_()
    t = torch.cat(
        [t, t + 100, t - 100, torch.tensor(scalar_map.ends).repeat(1000)[:2000]]
    )
    t = t.requires_grad_()
    for way in (scalar_map.forward, scalar_map.inverse):
        image, log_slope = way(t, theta.repeat(4, 1))
        for grad in torch.autograd.grad((image + log_slope).sum(), (t, theta)):
            assert grad.isfinite().all()
        assert image.isfinite().all() and log_slope.isfinite().all()


def test_nan_is_not_hidden():
    for scalar_map in spline_maps.values():
        for way in (scalar_map.forward, scalar_map.inverse):
            assert way(
                torch.tensor(math.nan), torch.zeros(scalar_map.n_params)
            )[0].isnan()


@everything
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_transforms_of_functions(scalar_map, way):
    t, theta = draw(scalar_map, 6)

    def log_slope(t, theta):
        return getattr(scalar_map, way)(t, theta)[1]

    once = torch.func.vmap(torch.func.grad(log_slope, (0, 1)))(t, theta)
    free = t.clone().requires_grad_(), theta.clone().requires_grad_()
    plain = torch.autograd.grad(
        log_slope(*free).sum(), free, create_graph=True, materialize_grads=True
    )
    assert_close(once, plain)
    twice = torch.func.vmap(
        torch.func.jacrev(torch.func.jacrev(log_slope, 1), 1)
    )(t, theta)
    weight = torch.randn(scalar_map.n_params, dtype=torch.float64)
    (want,) = torch.autograd.grad((plain[1] * weight).sum(), free[1])
    assert_close(twice @ weight, want)


@pytest.mark.parametrize(
    "scalar_map",
    [
        *(kind(5) for kind in KINDS),
        RationalQuadraticSplineMap(5, math.pi, "circular"),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.tails}",
)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_the_compiler_sees_one_graph(scalar_map, way):
    torch.compiler.reset()
    t, theta = draw(scalar_map, 6)
    compiled = torch.compile(
        getattr(scalar_map, way), fullgraph=True, backend="aot_eager"
    )
    free = theta.clone().requires_grad_()
    got, want = compiled(t, free), getattr(scalar_map, way)(t, theta)
    assert_close(got, want)
    got[1].sum().backward()
    assert free.grad.isfinite().all()


@everything
def test_one_set_of_parameters_serves_any_batch(scalar_map):
    t, theta = draw(scalar_map, 12)
    shared = theta[:3]
    points = t.view(4, 3)
    want = scalar_map.forward(points, shared.expand(4, 3, -1))
    assert_close(scalar_map.forward(points, shared), want)
    assert_close(
        scalar_map.forward(points[:, :1], shared[0]),
        scalar_map.forward(points[:, :1], shared[:1]),
    )


@kinds
def test_gradients_reach_every_parameter(kind):
    scalar_map = kind(5)
    t, theta = draw(scalar_map, 400)
    one = theta[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        scalar_map.forward(t, one)[1].square().sum(), one
    )
    assert (grad != 0).all()


@kinds
def test_a_coupling_of_splines_takes_a_context(kind):
    f = Coupling(half(3), kind(4), context_dim=2)
    check_bijection(
        f,
        torch.randn(6, 3),
        torch.randn(6, 2),
        levels=(0.0, 1.0),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSplineMap(1), "bins: .* at least 2, got 1"),
        (lambda: QuadraticSplineMap(2), "bins: .* at least 3, got 2"),
        (lambda: LinearSplineMap(8.0), "bins: expected a whole number"),
        (lambda: CubicSplineMap(bound=-1.0), "bound: expected"),
        (lambda: RationalLinearSplineMap(bound=(1.0, 1.0)), "bound: expected"),
        (
            lambda: RationalQuadraticSplineMap(tails="none"),
            "tails: expected 'linear', 'box'",
        ),
        (lambda: LinearSplineMap(tails=None), "tails: expected"),
        *(
            (lambda b=b: RationalQuadraticSplineMap(bound=b), "bound: expected")
            for b in (
                0,
                math.inf,
                math.nan,
                "3",
                None,
                True,
                (),
                (0.0,),
                (0.0, math.inf),
                (2.0, 1.0),
                (0.0, 1.0, 2.0),
                (-1e308, 1e308),
            )
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_spline_of_ones_own_says_what_it_lacks():
    class Mine(SplineMap):
        pass

    with pytest.raises(NotImplementedError, match="Mine defines no knots"):
        Mine(4).forward(torch.zeros(2), torch.zeros(11))


def test_settings_may_be_numbers_of_numpy_and_pairs_may_be_lists():
    by_numpy = RationalQuadraticSplineMap(np.int64(8), np.float32(3))
    assert repr(by_numpy) == repr(RationalQuadraticSplineMap())
    pair = RationalQuadraticSplineMap(4, [np.float64(0), np.int64(1)], "box")
    assert pair.ends == (0.0, 1.0) and pair.domain.check(torch.tensor(0.5))


@everything
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_no_tensor_is_made_on_the_default_device(scalar_map, way):
    points, theta = draw(scalar_map, 4)
    go = getattr(scalar_map, way)
    want = go(points, theta)
    try:
        torch.set_default_device("meta")
        got = go(points, theta)
    finally:
        torch.set_default_device(None)
    assert_close(got, want)
    assert all(t.is_meta for t in go(points.to("meta"), theta.to("meta")))


@everything
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_far_points_stay_numbers_and_so_do_their_derivatives(scalar_map, way):
    go = getattr(scalar_map, way)
    for dtype, sizes in (
        (torch.float32, (1e6, 1e18, 2e19, 1e30)),
        (torch.float64, (1e150, 1e300)),
    ):
        theta = draw(scalar_map, 1, dtype=dtype)[1][0]
        for size in sizes:

            def value(t, theta, size=size):
                image, log_slope = go(t, theta)
                return image / size + log_slope

            for t in (size, -size):
                at = torch.tensor(t, dtype=dtype), theta
                assert value(*at).isfinite()
                found = torch.func.grad(value, (0, 1))(*at)
                second = torch.func.hessian(value, (0, 1))(*at)
                for slope in (*found, *sum(second, ())):
                    assert slope.isfinite().all()


def test_a_neural_spline_flow_is_a_stack_of_spline_couplings(scramble):
    f = NSF(5, 3, hidden=(8,), context_dim=2, bins=4, bound=2.0, partition=half)
    assert len(f.bijections) == 3
    for layer in f.bijections:
        assert repr(layer.scalar_map) == repr(
            RationalQuadraticSplineMap(4, 2.0)
        )
        assert layer.context_dim == 2 and layer.mask.sum() in (2, 3)
    z, context = torch.randn(6, 5), torch.randn(6, 2)
    assert_close(f(z, context)[0], z)
    f = scramble(f).double()
    z, context = z.double(), context.double()
    x, ladj = f(z, context)
    plain = Couplings(
        5,
        3,
        hidden=(8,),
        context_dim=2,
        scalar_map=RationalQuadraticSplineMap(4, 2.0),
        partition=half,
    ).double()
    plain.load_state_dict(f.state_dict())
    assert_close(plain(z, context), (x, ladj), rtol=0, atol=0)
    back, ladj_back = f.inverse(x, context)
    assert_close(back, z)
    assert_close(ladj_back, -ladj)
    image = NSF((2, 4, 4), 2, hidden=(4,))
    assert_close(image(torch.ones(1, 2, 4, 4))[0], torch.ones(1, 2, 4, 4))


def test_a_repr_says_what_it_is():
    assert (
        repr(LinearSplineMap(4))
        == "LinearSplineMap(bins=4, bound=3.0, tails=linear)"
    )
