"""Monotone maps: the published formulas, roots and their derivatives, tails, mass, and broken symmetry."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from flowcourse.core import Flow
from flowcourse.coupling import Coupling, half
from flowcourse.elementwise import Elementwise, InverseMap
from flowcourse.monotone import (
    LogisticMixtureMap,
    MonotoneMap,
    MonotoneNetworkMap,
    evenly_spaced,
)
from flowcourse.monotone_maps import (
    BernsteinMap,
    DeepSigmoidalMap,
    NonlinearSquaredMap,
    SumOfSquaresMap,
    monotone_maps,
)
from flowcourse.objectives import MaximumLikelihood
from flowcourse.quadrature import total_mass
from flowcourse.testing import check_bijection
from flowcourse.trainer import fit

names = pytest.mark.parametrize("name", monotone_maps)
levels = pytest.mark.parametrize("sd", [0.0, 1.0, 3.0])
LINE = torch.linspace(-6, 6, 121, dtype=torch.float64)


def raw(scalar_map, sd, *batch, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(
        *batch, scalar_map.n_params, generator=generator, dtype=torch.float64
    )
    return (sd * theta).to(dtype)


def read(scalar_map, theta):
    """What one set of raw parameters means, for points on a line."""
    return scalar_map.read(theta[:, None])


def logit(p):
    return (p / (1 - p)).log()


# The published formulas, written as in the papers, with nothing done for far
# points.


def flowpp(z, theta, scalar_map):
    """Ho et al. 2019: log-odds of a mixture of logistic distribution functions, then affine."""
    weight, place, width, scale, shift = read(scalar_map, theta)
    total = sum(
        w * torch.sigmoid((z - m) / s.exp())
        for w, m, s in zip(weight[:, 0], place[:, 0], width)
    )
    return logit(total) * scale.exp() + shift


def nlsq(z, theta, scalar_map):
    """Ziegler and Rush 2019: a z + b + c / (1 + (d z + g)^2)."""
    log_a, b, share, log_d, g = read(scalar_map, theta)
    a, d = log_a.exp(), log_d.exp()
    c = share * 8 * math.sqrt(3) * a / (9 * d)
    assert (c.abs() < 8 * math.sqrt(3) * a / (9 * d)).all()
    return a * z + b + c / (1 + (d * z + g) ** 2)


def sos(z, theta, scalar_map):
    """Jaini et al. 2019: the exact integral of a sum of squares, here by numpy's polynomials."""
    first, second, _ = read(scalar_map, theta)
    ps = [
        np.polynomial.Polynomial([float(c) for c in p]) for p in (first, second)
    ]
    slope = ps[0] ** 2 + ps[1] ** 2 + scalar_map.floor
    integral = slope.integ(lbnd=0)
    t = z.numpy() / scalar_map.bound
    return torch.as_tensor(scalar_map.bound * integral(t)) + theta[-1]


def ddsf(z, theta, scalar_map):
    """Huang et al. 2018: h <- logit(w sigmoid(a (u h) + b)), point by point, as matrices."""
    layers = [
        [None if part is None else part[..., 0] for part in layer]
        for layer in read(scalar_map, theta)
    ]
    out = []
    for point in z:
        h = point[None]
        for a, b, u, w in layers:
            u = torch.ones(len(a), 1, dtype=z.dtype) if u is None else u
            w = torch.ones(1, 1, dtype=z.dtype) if w is None else w
            h = logit(w @ torch.sigmoid(a * (u @ h) + b))
        out.append(h[0])
    return torch.stack(out)


def umnn(z, theta, scalar_map):
    """Wehenkel and Louppe 2019: the integral of a positive network, by a fine Clenshaw-Curtis rule."""
    (out, steep, place, scale), _ = read(scalar_map, theta)
    n = 400
    k = torch.arange(n + 1, dtype=torch.float64)
    nodes = (k * math.pi / n).cos()
    j = torch.arange(n // 2 + 1, dtype=torch.float64)
    parts = (2 * j * k[:, None] * math.pi / n).cos() / (1 - 4 * j * j)
    weights = 2 / n * (2 * parts.sum(1) - parts[:, 0] - parts[:, -1])
    weights[[0, -1]] /= 2
    t = z[:, None] * (nodes + 1) / 2
    units = zip(out[:, 0], steep[:, 0], place[:, 0])
    net = sum(o * torch.erf(s * (t - p)) for o, s, p in units)
    return (net + scale).exp() @ weights * z / 2 + theta[-1]


def bernstein(z, theta, scalar_map):
    """Ramasinghe et al. 2022: coefficients against Bernstein's basis."""
    coefficients, _ = read(scalar_map, theta)
    assert (coefficients.diff(dim=0) > 0).all()
    n, u = scalar_map.degree, (z + scalar_map.bound) / (2 * scalar_map.bound)
    return sum(
        c * math.comb(n, k) * u**k * (1 - u) ** (n - k)
        for k, c in enumerate(coefficients)
    )


FORMULAS = {
    "logistic-mixture": flowpp,
    "nonlinear-squared": nlsq,
    "sum-of-squares": sos,
    "deep-sigmoidal": ddsf,
    "monotone-network": umnn,
    "bernstein": bernstein,
}


@names
@levels
@pytest.mark.parametrize("seed", range(4))
def test_the_published_formula(name, sd, seed):
    scalar_map = monotone_maps[name]
    theta = raw(scalar_map, sd, seed=seed)
    far = getattr(scalar_map, "bound", 3.0) * (1 - 1e-9)
    z = torch.linspace(-far, far, 61, dtype=torch.float64)
    x, _ = scalar_map.forward(z, theta)
    wanted = FORMULAS[name](z, theta, scalar_map)
    kept = (
        wanted.isfinite()
        if name in ("logistic-mixture", "deep-sigmoidal")
        else slice(None)
    )
    error = ((x - wanted).abs() / (1 + wanted.abs()))[kept]
    assert len(error) > 40 and error.max() < 1e-5
    # 1 - p cancels in the formula, not here
    if name not in ("logistic-mixture", "deep-sigmoidal"):
        assert error.max() < 1e-9


def test_the_integral_is_as_good_as_its_rule_says():
    scalar_map = MonotoneNetworkMap()
    worst = 0.0
    for seed in range(50):
        theta = raw(scalar_map, 3.0, seed=seed)
        z = LINE.clone().requires_grad_()
        x, log_slope = scalar_map.forward(z, theta)
        (slope,) = torch.autograd.grad(x.sum(), z)
        worst = max(worst, (slope.log() - log_slope).abs().max().item())
    assert worst < 1e-9


# Roots


@names
@levels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_root_is_found_wherever_x_is(name, sd, dtype):
    scalar_map = monotone_maps[name]
    for seed in range(5):
        theta = raw(scalar_map, sd, seed=seed, dtype=dtype)
        x = torch.cat(
            [
                torch.linspace(-20, 20, 201),
                torch.tensor([-1e4, -300.0, 300.0, 1e4]),
            ]
        )
        x = x.to(dtype)
        z, log_slope = scalar_map.inverse(x, theta)
        again, back = scalar_map.forward(z, theta)
        size = 1 + x.abs() + back.exp() * (1 + z.abs())  # what rounding z costs
        eps = torch.finfo(dtype).eps
        assert ((again - x).abs() <= 50 * eps * size).all()
        assert_close(log_slope, -back)


@names
def test_the_bracket_holds_the_root(name):
    scalar_map = monotone_maps[name]
    for seed in range(20):
        theta = raw(scalar_map, 3.0, seed=seed)
        z = torch.linspace(-30, 30, 301, dtype=torch.float64)
        x, _ = scalar_map.forward(z, theta)
        low, high = scalar_map.bracket(x, *scalar_map.shape(theta, x))
        slack = 1e-9 * (1 + x.abs())
        assert ((low <= z + slack) & (z - slack <= high)).all()


@names
@pytest.mark.parametrize("sd", [1.0, 3.0])
def test_first_derivatives_of_the_root_are_the_implicit_ones(name, sd):
    scalar_map = monotone_maps[name]
    for seed in range(5):
        theta = raw(scalar_map, sd, seed=seed)
        for t in (-1.3, 0.2, 2.1):
            z = torch.tensor(t, dtype=torch.float64)
            x, log_slope = scalar_map.forward(z, theta)
            of_theta = torch.func.jacrev(scalar_map.forward, 1)(z, theta)[0]
            got = torch.func.jacrev(scalar_map.inverse, 1)(x, theta)[0]
            assert_close(
                got, -of_theta * (-log_slope).exp(), rtol=1e-8, atol=1e-8
            )


@names
def test_second_derivatives_of_the_root_are_the_implicit_ones(name):
    scalar_map = monotone_maps[name]
    theta = raw(scalar_map, 0.5)
    n = scalar_map.n_params
    z = torch.tensor(0.7, dtype=torch.float64)
    joint = torch.cat([z[None], theta])

    def h(joint):
        return scalar_map.forward(joint[0], joint[1:])[0]

    g, second = (
        torch.func.jacrev(h)(joint),
        torch.func.jacrev(torch.func.jacrev(h))(joint),
    )
    dz = -g[1:] / g[0]  # differentiate h(z(theta), theta) = x twice
    along = torch.cat([dz[None], torch.eye(n, dtype=torch.float64)])
    wanted = -along.T @ second @ along / g[0]
    x = h(joint)
    inverse = torch.func.jacrev(
        torch.func.jacrev(lambda theta: scalar_map.inverse(x, theta)[0])
    )
    got = inverse(theta)
    assert_close(got, wanted, rtol=1e-6, atol=1e-6)


# Far out, and onto the line


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_far_out(name, dtype):
    scalar_map = monotone_maps[name]
    for seed in range(5):
        theta = raw(scalar_map, 3.0, seed=seed, dtype=dtype).requires_grad_()
        t = torch.tensor(
            [-1e6, -100.0, -17.0, -1.0, 0.0, 1.0, 17.0, 100.0, 1e6], dtype=dtype
        )
        t.requires_grad_()
        for way in (scalar_map.forward, scalar_map.inverse):
            image, log_slope = way(t, theta)
            grads = torch.autograd.grad((image + log_slope).sum(), (t, theta))
            assert all(
                value.isfinite().all() for value in (image, log_slope, *grads)
            ), way


@names
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_second_derivatives_are_finite_where_squares_overflow(name, way):
    scalar_map = monotone_maps[name]
    theta = raw(scalar_map, 1.0, dtype=torch.float32)
    for size in (1e18, -2e19, 1e30, -1e30):

        def value(t, theta, size=size):
            image, log_slope = getattr(scalar_map, way)(t, theta)
            return image / size + log_slope

        at = torch.tensor(size), theta
        assert value(*at).isfinite()
        found = torch.func.grad(value, (0, 1))(*at)
        second = torch.func.jacrev(torch.func.grad(value), (0, 1))(*at)
        assert all(t.isfinite().all() for t in (*found, *second))


@names
@levels
def test_float32_agrees_with_float64_far_out(name, sd):
    scalar_map = monotone_maps[name]
    t = torch.tensor([-100.0, -50.0, -17.0, -1.0, 0.0, 1.0, 17.0, 50.0, 100.0])
    for seed in range(5):
        theta = raw(scalar_map, sd, seed=seed, dtype=torch.float32)
        pairs = zip(
            scalar_map.forward(t, theta),
            scalar_map.forward(t.double(), theta.double()),
        )
        for got, wanted in pairs:
            assert_close(got.double(), wanted, rtol=3e-5, atol=3e-5)


@names
def test_no_raw_parameters_ask_for_tails_that_rounding_would_destroy(name):
    scalar_map = monotone_maps[name]
    far = torch.tensor([-1e4, 1e4])
    for seed in range(10):
        theta = raw(scalar_map, 1e4, seed=seed, dtype=torch.float32)
        theta[-1] = 0.0  # often a shift, which may be any number
        if name == "nonlinear-squared":
            theta[1] = 0.0
        x, log_slope = scalar_map.forward(far, theta)
        assert x.isfinite().all() and log_slope.abs().max() < 12
        assert_close(scalar_map.inverse(x, theta)[0], far, rtol=1e-4, atol=0)


def test_the_bend_leaves_a_twentieth_of_the_slope():
    """At u = 1 / sqrt(3) the bump is steepest; its share of the slope is at most 0.95."""
    scalar_map = NonlinearSquaredMap()
    for share in (-50.0, 50.0):
        theta = torch.tensor([0.0, 0.0, share, 0.0, 0.0], dtype=torch.float64)
        _, log_slope = scalar_map.forward(
            torch.linspace(-6, 6, 100_001, dtype=torch.float64), theta
        )
        assert_close(log_slope.min().item(), math.log(0.05), rtol=1e-6, atol=0)


def test_squares_that_vanish_together_leave_a_slope():
    scalar_map = SumOfSquaresMap(2)
    theta = torch.zeros(scalar_map.n_params, dtype=torch.float64)
    theta[0] = 2 * math.atanh(-math.sqrt(0.99) / 2)  # no constant is left
    _, log_slope = scalar_map.forward(torch.zeros(1).double(), theta)
    assert_close(log_slope.exp().item(), 0.01)


@pytest.mark.parametrize(
    "kind", [SumOfSquaresMap, MonotoneNetworkMap, BernsteinMap]
)
@pytest.mark.parametrize("bound", [1.5, 6.0])
def test_a_map_bends_up_to_its_bound(kind, bound):
    scalar_map = kind(bound=bound)
    theta = raw(scalar_map, 1.0)
    z = bound * torch.tensor([0.6, 0.8, 1.0, 1.2, 9.0], dtype=torch.float64)
    for side in (-z, z):
        _, log_slope = scalar_map.forward(side, theta)
        inside, outside = log_slope[:3], log_slope[2:]
        assert_close(outside, outside[:1].expand(3))
        assert inside.diff().abs().min() > 1e-4


def test_parts_start_where_they_were_told():
    assert evenly_spaced(3, 2.0) == [-2.0, 0.0, 2.0]
    for kind in (LogisticMixtureMap, DeepSigmoidalMap):
        scalar_map = kind(3, spread=2.0)
        shape = read(scalar_map, raw(scalar_map, 0.0))
        places = shape[1] if kind is LogisticMixtureMap else shape[0][1]
        assert_close(places.flatten().tolist(), [-2.0, 0.0, 2.0])


@names
@levels
def test_tails_are_straight_so_that_the_map_is_onto_the_line(name, sd):
    scalar_map = monotone_maps[name]
    for seed in range(5):
        theta = raw(scalar_map, sd, seed=seed)
        for sign in (-1, 1):
            t = sign * torch.tensor([1e4, 2e4, 4e4], dtype=torch.float64)
            x, log_slope = scalar_map.forward(t, theta)
            assert_close(log_slope, log_slope[:1].expand(3), rtol=0, atol=1e-6)
            steps = x.diff() / t.diff()
            assert_close(steps.log(), log_slope[:2], rtol=0, atol=1e-6)
            assert log_slope.abs().max() < 12  # no tail is flat


@names
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sd", [0.0, 1.0])
def test_the_density_weighs_one(name, turned, sd):
    scalar_map = (
        InverseMap(monotone_maps[name]) if turned else monotone_maps[name]
    )
    f = Elementwise(1, scalar_map).double()
    with torch.no_grad():
        f.thetas[0].value.copy_(raw(scalar_map, sd))
    mass = total_mass(
        Flow(f).double().log_prob, 1, dtype=torch.float64, max_evals=500_000
    )
    assert abs(mass - 1) < 1e-3


@pytest.mark.parametrize(
    "name", ["sum-of-squares", "monotone-network", "bernstein"]
)
def test_slopes_match_on_the_ends_of_the_box(name):
    scalar_map = monotone_maps[name]
    theta, end = raw(scalar_map, 1.0), scalar_map.bound
    z = torch.tensor(
        [-end, -end + 1e-9, -end - 1e-9, end, end - 1e-9, end + 1e-9]
    ).double()
    x, log_slope = scalar_map.forward(z.requires_grad_(), theta)
    (slope,) = torch.autograd.grad(x.sum(), z)
    assert_close(slope.log(), log_slope)
    assert_close(log_slope[:3], log_slope[:1].expand(3), rtol=1e-6, atol=1e-6)
    assert_close(log_slope[3:], log_slope[3:4].expand(3), rtol=1e-6, atol=1e-6)


# Shapes, transforms and compilers


@names
def test_raw_parameters_may_be_shared_or_not(name):
    scalar_map = monotone_maps[name]
    z, theta = (
        torch.randn(4, 3, dtype=torch.float64),
        raw(scalar_map, 1.0, 4, 3),
    )
    for way in (scalar_map.forward, scalar_map.inverse):
        each = way(z, theta)
        for i in range(3):
            for got, wanted in zip(way(z[:, i], theta[:, i]), each):
                assert_close(got, wanted[:, i])
        for got, wanted in zip(
            way(z, theta[0]), way(z, theta[:1].expand(4, -1, -1))
        ):
            assert_close(got, wanted)
        assert way(z[:0], theta[:0])[0].shape == (0, 3)
        assert way(z[0, 0], theta[0, 0])[1].shape == ()


@names
def test_functional_transforms(name):
    scalar_map = monotone_maps[name]
    z, theta = torch.randn(5, dtype=torch.float64), raw(scalar_map, 1.0, 5)
    for way in (scalar_map.forward, scalar_map.inverse):
        for got, wanted in zip(torch.vmap(way)(z, theta), way(z, theta)):
            assert_close(got, wanted)
        slope, log_slopes = torch.func.jacrev(way)(z, theta)
        assert_close(slope, way(z, theta)[1].exp().diag(), rtol=1e-8, atol=1e-8)
        second = torch.func.jacrev(torch.func.jacrev(way))(z, theta)[1]
        assert second.isfinite().all() and second.shape == (5, 5, 5)
        assert_close(log_slopes, log_slopes.diagonal().diag())


SMALL = [
    LogisticMixtureMap(2),
    NonlinearSquaredMap(),
    SumOfSquaresMap(1),
    DeepSigmoidalMap(2),
    MonotoneNetworkMap(2),
    BernsteinMap(2),
]


@pytest.mark.parametrize("scalar_map", SMALL, ids=repr)
def test_compiles_without_a_break(scalar_map):
    z, theta = torch.randn(4, 2), raw(scalar_map, 1.0, 2, dtype=torch.float32)
    for way in (scalar_map.forward, scalar_map.inverse):
        compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(compiled(z, theta), way(z, theta)):
            assert_close(got, wanted)


@names
def test_costs_and_reprs(name):
    scalar_map = monotone_maps[name]
    f = Elementwise(3, scalar_map)
    assert (f.forward_cost, f.inverse_cost) == ("one pass", "numerical")
    turned = Elementwise(3, {(1, 2): InverseMap(scalar_map)})
    assert (turned.forward_cost, turned.inverse_cost) == (
        "numerical",
        "one pass",
    )
    assert type(scalar_map).__name__ in repr(f) and "_" not in repr(scalar_map)
    assert scalar_map.reference and isinstance(scalar_map, MonotoneMap)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: LogisticMixtureMap(1), "components"),
        (lambda: SumOfSquaresMap(0), "degree"),
        (lambda: SumOfSquaresMap(bound=0.0), "bound"),
        (lambda: DeepSigmoidalMap(1), "units"),
        (lambda: DeepSigmoidalMap(layers=1), "layers"),
        (lambda: MonotoneNetworkMap(units=1), "units"),
        (lambda: MonotoneNetworkMap(bound=-1.0), "bound"),
        (lambda: BernsteinMap(1), "degree"),
        (lambda: BernsteinMap(bound=float("nan")), "bound"),
        (lambda: BernsteinMap(2.5), "degree"),
        (lambda: BernsteinMap(bound="3"), "bound"),
        (lambda: MonotoneNetworkMap(bound=math.inf), "bound"),
        (lambda: SumOfSquaresMap(None), "degree"),
        (lambda: SumOfSquaresMap(bound=None), "bound"),
        (lambda: DeepSigmoidalMap(spread=math.nan), "spread"),
        (lambda: DeepSigmoidalMap("5"), "units"),
        (lambda: LogisticMixtureMap(spread="far"), "spread"),
        (lambda: LogisticMixtureMap(8.0), "components"),
    ],
)
def test_wrong_arguments_are_named(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        make()


def test_settings_may_be_numbers_of_numpy():
    for kind, options in (
        (LogisticMixtureMap, {"components": 3, "spread": 2}),
        (SumOfSquaresMap, {"degree": 2, "bound": 2}),
        (DeepSigmoidalMap, {"units": 3, "layers": 2, "spread": 1}),
        (MonotoneNetworkMap, {"units": 3, "bound": 2}),
        (BernsteinMap, {"degree": 4, "bound": 2}),
    ):
        scalar_map = kind(**{k: np.int64(v) for k, v in options.items()})
        assert repr(scalar_map) == repr(kind(**options))
        assert scalar_map.n_params == kind(**options).n_params


@names
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_no_tensor_is_made_on_the_default_device(name, way):
    scalar_map = monotone_maps[name]
    points, theta = LINE[:4], raw(scalar_map, 1.0, 4)
    go = getattr(scalar_map, way)
    want = go(points, theta)
    try:
        torch.set_default_device("meta")
        got = go(points, theta)
    finally:
        torch.set_default_device(None)
    assert_close(got, want)
    assert all(t.is_meta for t in go(points.to("meta"), theta.to("meta")))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("units", [2, 4])
def test_deep_sigmoidal_maps_of_other_sizes(units, layers):
    f = Elementwise(1, DeepSigmoidalMap(units, layers))
    check_bijection(f, torch.randn(8, 1), exempt={"identity": "starts near it"})


@pytest.mark.parametrize("scalar_map", SMALL, ids=repr)
def test_the_contract_turned_round_in_a_coupling(scalar_map):
    f = Coupling(
        half(3),
        InverseMap(scalar_map),
        conditioner=torch.nn.Linear,
        context_dim=1,
    )
    exempt = {
        "identity": "random weights",
        ("gradients", torch.float64, 3.0): "too sharp",
    }
    check_bijection(f, torch.randn(8, 3), torch.randn(8, 1), exempt=exempt)


# The start


@names
def test_it_starts_near_the_identity(name):
    scalar_map = monotone_maps[name]
    theta = torch.zeros(scalar_map.n_params, dtype=torch.float64)
    x, log_slope = scalar_map.forward(LINE, theta)
    exact = name in ("nonlinear-squared", "monotone-network", "bernstein")
    assert (x - LINE).abs().max() < (1e-12 if exact else 0.25)
    assert log_slope.abs().max() < (1e-12 if exact else 0.15)


def bimodal(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = torch.rand(n, 1, generator=generator) < 0.4
    return torch.where(side, -1.5, 1.2) + 0.3 * torch.randn(
        n, 1, generator=generator
    )


def trained(scalar_map, steps=150):
    # data to base in one pass
    flow = Flow(Elementwise(1, InverseMap(scalar_map)))
    x = bimodal(2000)
    fit(MaximumLikelihood(flow), x, steps=steps, batch_size=500, lr=3e-2)
    with torch.no_grad():
        return flow.bijection.thetas[0].value[0], -flow.log_prob(
            bimodal(4000, 1)
        ).mean().item()


@names
def test_the_gradient_reaches_every_parameter_after_one_step(name):
    scalar_map = monotone_maps[name]
    theta = raw(scalar_map, 1e-3, dtype=torch.float32).requires_grad_()
    z, log_slope = scalar_map.forward(bimodal(500)[:, 0], theta)
    (grad,) = torch.autograd.grad((0.5 * z.square() - log_slope).mean(), theta)
    assert (grad != 0).all()


@pytest.mark.parametrize("kind", [LogisticMixtureMap, DeepSigmoidalMap])
def test_equal_components_never_separate_and_ours_do(kind):
    def places(scalar_map, theta):
        shape = scalar_map.read(theta[:, None])
        return (
            shape[1] if kind is LogisticMixtureMap else shape[0][1]
        ).flatten()

    equal, ours = kind(spread=0.0), kind()
    # its rows have favourites; take them away as well
    if kind is DeepSigmoidalMap:
        equal._rows = lambda raw, n: (
            raw.unflatten(0, (n, -1)).softmax(1) if len(raw) else None
        )
    theta_equal, loss_equal = trained(equal)
    theta, loss = trained(ours)
    assert places(equal, theta_equal).std() < 1e-4  # rounding apart
    assert places(equal, theta_equal).std() < 0.01 * places(ours, theta).std()
    assert (places(ours, theta) - places(ours, 0 * theta)).std() > 0.3
    assert loss < loss_equal - 0.3


def test_a_second_polynomial_at_zero_never_wakes_and_ours_does():
    class Asleep(SumOfSquaresMap):
        start_slope = 0.0

    theta_asleep, _ = trained(Asleep())
    theta, _ = trained(SumOfSquaresMap())
    assert (theta_asleep[5:10] == 0).all()
    assert theta[5:10].abs().min() > 1e-3


@names
def test_it_learns_two_bumps(name):
    """Entropy of the mixture: that of its two halves, apart by six widths or more."""
    entropy = (
        0.5 * math.log(2 * math.pi * math.e * 0.09)
        - 0.4 * math.log(0.4)
        - 0.6 * math.log(0.6)
    )
    _, loss = trained(monotone_maps[name], steps=300)
    gaussian = 0.5 * math.log(
        2 * math.pi * math.e * bimodal(4000, 1).var().item()
    )
    # one bend, and a basis of smooth bumps as wide as the data's: both come
    # only part of the way
    part = {"nonlinear-squared": 0.1, "bernstein": 0.6}
    assert loss < (gaussian - part[name] if name in part else entropy + 0.15)
