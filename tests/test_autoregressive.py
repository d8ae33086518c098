"""Autoregressive flows: masks, orders, costs, and three ways to sample that agree."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import check_beside_another_device
from pyro.distributions.transforms import (
    AffineAutoregressive,
    ConditionalAffineAutoregressive,
)
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from flowcourse.autoregressive import (
    BNAF,
    IAF,
    MADE,
    MAF,
    Autoregressive,
    BlockAutoregressive,
    BlockLayer,
    MaskedLinear,
    _steepness,
)
from flowcourse.core import Flow, Inverse
from flowcourse.elementwise import (
    AdditiveMap,
    AffineMap,
    InverseMap,
    ScalarMap,
)
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.testing import check_bijection, total_mass
from flowcourse.zoo_scalar_maps import scalar_maps

WAYS = ("incremental", "fixed-point", "loop")


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(
        dtype
    )


def shuffled(dim, seed=0):
    return torch.randperm(dim, generator=torch.Generator().manual_seed(seed))


def perturbed(f, scale=0.3, seed=0):
    f = f.double()
    with torch.no_grad():
        for i, p in enumerate(f.parameters()):
            p.add_(scale * noise(*p.shape, seed=seed + i))
    return f


def sample_by(f, way, tolerance=None):
    """A copy of a map whose autoregressive layers sample in another way."""
    f = copy.deepcopy(f)
    for layer in f.modules():
        if isinstance(layer, Autoregressive):
            layer.sampling, layer.tolerance = way, tolerance
    return f


def make(
    dim=5, context_dim=0, scalar_map=AffineMap(), seed=0, scale=0.3, **options
):
    torch.manual_seed(seed)
    options.setdefault("order", shuffled(dim, seed))
    options.setdefault("hidden", (16, 12))
    return perturbed(
        Autoregressive(dim, scalar_map, context_dim, **options), scale, seed
    )


# masks


@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_output_sees_its_own_or_a_later_coordinate(dim, context_dim, seed):
    torch.manual_seed(seed)
    degrees = [torch.randint(0, dim, (n,)) for n in (30, 20)]
    order = shuffled(dim, seed)
    net = perturbed(
        MADE(dim, 3, context_dim=context_dim, order=order, degrees=degrees)
    )
    context = noise(context_dim) if context_dim else None
    # (dim, 3, dim)
    slopes = torch.func.jacrev(net)(noise(dim, seed=1), context)
    place = order.argsort()
    allowed = place[:, None] > place[None, :]
    assert not slopes[(~allowed)[:, None].expand_as(slopes)].any()


@pytest.mark.parametrize("context_dim", [0, 3])
def test_every_output_sees_all_that_it_may(context_dim):
    order = shuffled(7)
    net = perturbed(MADE(7, 2, (24, 24), context_dim, order))
    context = noise(context_dim) if context_dim else None
    slopes = torch.func.jacrev(net)(noise(7), context)
    place = order.argsort()
    allowed = (place[:, None] > place[None, :])[:, None].expand_as(slopes)
    assert torch.equal(slopes != 0, allowed)
    if context_dim:
        seen = torch.func.jacrev(net, argnums=1)(noise(7), context)
        assert (seen != 0).all()


@pytest.mark.parametrize("make_flow", [MAF, IAF, BNAF])
def test_the_jacobian_of_a_layer_is_triangular_in_its_order(make_flow):
    order = shuffled(4)
    f = perturbed(make_flow(4, 1, (8,), orders=[order]))
    for direction in (f.forward, f.inverse):
        jacobian = torch.func.jacrev(lambda t: direction(t)[0])(noise(4))[
            order
        ][:, order]
        assert_close(
            jacobian.triu(1), torch.zeros_like(jacobian), rtol=0, atol=1e-12
        )
        assert (jacobian.tril() != 0).sum() == 10


def test_units_of_low_degree_start_as_large_as_others():
    torch.manual_seed(0)
    layer = MaskedLinear(torch.ones(4000, 40).tril(36) > 0)
    torch.manual_seed(0)
    narrow = MaskedLinear(torch.arange(40).expand(4000, 40) < 4)
    out = [m(torch.randn(1000, 40)).std().item() for m in (layer, narrow)]
    assert abs(out[0] / out[1] - 1) < 0.1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: MADE(3, degrees=[torch.tensor([1, 2]), torch.tensor([3])]), r"degrees\[1\]: expected whole numbers from 0 to 2, got \[3\]"),
        (lambda: MADE(3, degrees=[torch.tensor([-1, 2])]), r"degrees\[0\]: expected whole numbers from 0 to 2"),
        (lambda: MADE(3, degrees=[torch.tensor([0.5, 2.0])]), r"degrees\[0\]: expected whole numbers from 0 to 2"),
        (lambda: MADE(3, degrees=[torch.tensor(1)]), r"degrees\[0\]: expected whole numbers from 0 to 2"),
        (lambda: MADE(3, degrees=[[]]), r"degrees\[0\]: expected whole numbers from 0 to 2"),
        (lambda: MADE(3, degrees=[]), r"degrees: expected a tensor for each hidden layer, got \[\]"),
        (lambda: MADE(3, degrees=2), "degrees: expected a tensor for each hidden layer"),
        (lambda: MADE(3, degrees=[torch.arange(3, device="meta")]), "degrees: expected a tensor for each"),
        (lambda: MADE(3, hidden=()), "hidden: expected positive integers"),
        (lambda: MADE(3, hidden="ab"), "hidden: expected positive integers"),
        (lambda: MADE(3, activation=nn.SiLU()), r"activation: .* got SiLU\(\)"),
        (lambda: MAF(3, activation=torch.relu), "activation: .* which says"),
        (lambda: Autoregressive(3, sampling="parallel"), "sampling: expected one of incremental, .*, got parallel"),
        (lambda: Autoregressive(3, sampling=None), "sampling: expected one of incremental"),
        (lambda: Autoregressive(3, sampling=np.arange(2)), "sampling: expected one of incremental"),
        (lambda: Autoregressive(3, tolerance=-1.0), "tolerance: expected a finite number"),
        (lambda: IAF(3, tolerance=math.inf), "tolerance: expected a finite number"),
        (lambda: MAF(3, tolerance="small"), "tolerance: expected a finite number"),
        (lambda: Autoregressive(3, ScalarMap()), "scalar_map: expected one with parameters"),
        (lambda: Autoregressive(3, AffineMap), "scalar_map: expected a scalar map, got the class AffineMap; call it"),
        (lambda: MAF(3, scalar_map="affine"), "scalar_map: expected a scalar map, got str"),
        (lambda: IAF(3, scalar_map=AffineMap), "scalar_map: expected a scalar map, got the class AffineMap"),
        (lambda: BlockAutoregressive(3, bend=1.0), "bend: expected a number between 0 and 1, got 1.0"),
        (lambda: BNAF(3, bend=0.0), "bend: expected a number between 0 and 1, got 0.0"),
        (lambda: BNAF(3, bend=math.nan), "bend: expected a finite number"),
        (lambda: BNAF(3, bend="a"), "bend: expected a finite number"),
        (lambda: BNAF(3, hidden=()), "hidden: expected positive integers"),
        (lambda: MaskedLinear(torch.ones(2, 3)), "mask: expected a boolean tensor of two dimensions"),
        (lambda: MaskedLinear(torch.ones(3, dtype=torch.bool)), "mask: expected a boolean tensor of two"),
        (lambda: MaskedLinear(3), "mask: expected a boolean tensor of two dimensions, got 3"),
    ],
)  # fmt: skip
def test_arguments_that_are_wrong_are_refused_by_name(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        wrong()


def test_stacks_hand_their_options_on():
    options = dict(sampling="loop", tolerance=0.5, activation=nn.Tanh)
    for make in (MAF, IAF):
        f = make(4, 3, (5, 7), 2, **options)
        layers = [m for m in f.modules() if isinstance(m, Autoregressive)]
        assert [m.made.order.tolist() for m in layers] == [
            [0, 1, 2, 3],
            [3, 2, 1, 0],
            [0, 1, 2, 3],
        ]
        for m in layers:
            assert (m.sampling, m.tolerance, m.context_dim) == ("loop", 0.5, 2)
            assert [len(p.bias) for p in m.made.layers] == [5, 7, 8]
            assert isinstance(m.made.activation, nn.Tanh)
        f = make(4, 1, degrees=[[1, 2, 3]])
        assert [len(m.bias) for m in f.modules() if isinstance(m, MaskedLinear)] == [3, 8]  # fmt: skip
    f = BNAF(3, 3, (5, 7), 2, bend=0.25)
    assert [m.order.tolist() for m in f.bijections] == [
        [0, 1, 2],
        [2, 1, 0],
        [0, 1, 2],
    ]
    for m in f.bijections:
        assert [layer.bend for layer in m.layers] == [0.25, 0.25, 0.0]
        assert [layer.within.shape[1] for layer in m.layers] == [5, 7, 1]
        assert all(layer.units.net is not None for layer in m.layers)


def test_degrees_are_spread_over_all_that_there_are():
    for context_dim, wanted in ((0, [1, 1, 2, 2]), (3, [0, 0, 1, 2])):
        made = MADE(3, hidden=(4,), context_dim=context_dim)
        assert made.degree0.tolist() == wanted


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
    f = make(
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


def test_what_a_block_layer_makes_of_raw_numbers_of_any_size():
    layer = BlockLayer(2, 3, 4, bend=0.5)
    assert_close(layer.mask.max(), torch.tensor(1 / math.sqrt(2 * 3)))
    assert_close(
        layer.below.unflatten(0, (2, 4)).mean(1),
        torch.zeros(2, 6),
        rtol=0,
        atol=1e-6,
    )
    shift, raw, _ = layer.units()
    assert_close(shift.mean(1), torch.zeros(2, 1), rtol=0, atol=1e-6)
    scale = layer.settings(None, torch.float32)[2]
    assert_close(scale.mean(1), torch.ones(2, 1))
    assert raw.std() > 0.05
    with torch.no_grad():
        layer.units.value.fill_(1e9)
        layer.within[..., 0], layer.within[..., 1:] = 1e9, -1e9
    weights, _, scale, bend = layer.settings(None, torch.float32)
    assert_close(scale, torch.full((2, 4, 1), math.exp(1.5)))
    assert_close(bend, torch.full((2, 4, 1), 0.5))
    most = 1 / (1 + 2 * math.exp(-6))
    assert_close(weights[..., 0], torch.full((2, 4), most))


def test_the_steepness_of_a_block_network_is_a_bound():
    f = perturbed(BlockAutoregressive(3, (4, 4), bend=0.8), 2.0)
    settings = [layer.settings(None, torch.float64) for layer in f.layers]
    least, most = _steepness(settings)
    x = 10 * noise(500, 3)
    slopes = torch.func.vmap(torch.func.jacrev(lambda t: f.inverse(t)[0]))(x)
    slopes = slopes.diagonal(dim1=-2, dim2=-1)
    least, most = least.flatten(), most.flatten()
    assert (slopes >= least - 1e-12).all() and (slopes <= most + 1e-12).all()
    assert (least < 0.9 * slopes.amin(0).clamp(max=1)).any()
    plain = f.layers[-1].settings(None, torch.float64)
    only_scales = _steepness([(*s[:3], None) for s in settings[:-1]] + [plain])
    assert (least < only_scales[0].flatten()).all()
    assert (most > only_scales[1].flatten()).all()


LAYERS = (MADE, Autoregressive, BlockAutoregressive)
STACKS = (MAF, IAF, BNAF)
NO_ORDERS = [
    [0, 0, 1],
    torch.arange(4),
    torch.tensor([0.0, 1.0, 2.0]),
    torch.tensor([True, False, True]),
    torch.arange(3, device="meta"),
    [True, 0, 2],
    "012",
    2,
]


@pytest.mark.parametrize("bad", NO_ORDERS, ids=repr)
def test_an_order_holds_each_whole_number_once(bad):
    for make in LAYERS:
        with pytest.raises(ValueError, match="^order: expected each of 0 to 2"):
            make(3, order=bad)
    for make in STACKS:
        said = r"^orders\[1\]: expected each of 0 to 2 once"
        with pytest.raises(ValueError, match=said):
            make(3, orders=[[2, 1, 0], bad])
        for none in ([], 3):
            with pytest.raises(ValueError, match="^orders: expected at least"):
                make(3, orders=none)


@pytest.mark.parametrize(
    "read",
    [
        list,
        np.array,
        lambda order: np.array(order[::-1])[::-1],
        lambda order: np.array(order, dtype=np.uint16),
        lambda order: torch.tensor(order, dtype=torch.uint8),
        lambda order: torch.tensor(order, dtype=torch.int32),
        lambda order: [torch.tensor(i) for i in order],
    ],
)
def test_orders_and_degrees_are_read_from_any_whole_numbers(read):
    def options(make, read):
        order = read([2, 0, 3, 1])
        given = dict(order=order) if make in LAYERS else dict(orders=[order])
        if make not in (BlockAutoregressive, BNAF):
            given["degrees"] = [read([1, 3, 2, 1]), read([2, 1, 3])]
        return given

    for make in (*LAYERS, *STACKS):
        torch.manual_seed(0)
        f = make(4, **options(make, read))
        torch.manual_seed(0)
        wanted = make(4, **options(make, torch.tensor))
        assert repr(f) == repr(wanted)
        state = wanted.state_dict()
        for key, value in f.state_dict().items():
            assert_close(value, state[key], rtol=0, atol=0)


def test_sizes_are_whole_numbers_of_any_kind():
    for make in (MADE, Autoregressive, BlockAutoregressive, *STACKS):
        sizes = dict(dim=3, context_dim=2, hidden=(4,))
        sizes |= dict(layers=2) if make in STACKS else {}
        sizes |= dict(n_params=2) if make is MADE else {}
        wanted = repr(make(**sizes))
        for n in (np.int64, np.uint8, torch.tensor):
            kinds = sizes | {k: n(v) for k, v in sizes.items() if k != "hidden"}
            assert repr(make(**kinds | dict(hidden=(n(4),)))) == wanted
        for name in sizes:
            for bad in ("a", 2.0, True, -1, None, object()):
                with pytest.raises(ValueError, match=f"^{name}: expected"):
                    make(**sizes | {name: bad})


def test_a_scalar_map_needs_no_base_class():
    class Plain:
        n_params = 2
        forward = staticmethod(AffineMap().forward)
        inverse = staticmethod(AffineMap().inverse)

    f, z = make(4, scalar_map=Plain()), noise(3, 4)
    for way in WAYS:
        assert_close(f.inverse(sample_by(f, way)(z)[0])[0], z)
    assert f.codomain.check(z).all() and f.domain.check(z).all()


@pytest.mark.parametrize(
    "create",
    [
        lambda: MAF(4, 2, (8,), 2),
        lambda: MAF(1, 2, (8,), orders=[torch.tensor([0], device="cpu")]),
        lambda: IAF(4, 2, (8,), 2, orders=[[2, 0, 3, 1]]),
        lambda: Autoregressive(4, degrees=[[1, 3, 2]], sampling="fixed-point"),
        lambda: Autoregressive(4, context_dim=2, sampling="loop"),
        lambda: BNAF(3, 2, (4,), 2),
        lambda: BlockAutoregressive(3, (4,), order=[1, 2, 0]),
    ],
)
def test_a_flow_lives_on_the_default_device_and_works_beside_another(create):
    check_beside_another_device(create, 2)


# three ways to sample


@pytest.mark.parametrize(
    "scalar_map", [AffineMap(), RationalQuadraticSplineMap()]
)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_three_ways_agree_with_their_gradients(dim, context_dim, scalar_map):
    f = make(dim, context_dim, scalar_map)
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
    f = make(20, hidden=(40, 40))
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
            MAF(16, layers, (64, 64), scalar_map=scalar_maps[name]), scale, seed
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
    f = make(4, 2, activation=nn.PReLU).float()
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
        f = make(5, order=torch.arange(5), sampling=way)
        z = noise(3, 5)
        wanted = f(z)[0]
        z[:, 2] = torch.inf
        assert_close(f(z)[0][:, :2], wanted[:, :2])


# costs


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
    f = make(dim)
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
    f = MAF(32, 2, (64, 64), context_dim)
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


# duality, parity


def test_maf_and_iaf_are_dual_with_one_set_of_weights():
    maf = perturbed(MAF(6, 1, (20,)))
    iaf = Inverse(
        Autoregressive(6, InverseMap(AffineMap()), hidden=(20,))
    ).double()
    iaf.bijection.made = maf.bijections[0].made
    u = noise(5, 6)
    # The IAF sees its base points where the MAF sees its data.
    for a, b in zip(iaf.forward(u), Inverse(maf).forward(u)):
        assert a.shape == b.shape
    theta = maf.bijections[0].made(u)
    x, _ = iaf.forward(u)
    assert_close(x, AffineMap().forward(u, theta)[0])
    assert_close(iaf.inverse(x)[0], u)
    turned = Autoregressive(6, InverseMap(AffineMap()), hidden=(20,)).double()
    turned.made = maf.bijections[0].made
    for a, b in zip(turned.inverse(u), iaf.forward(u)):
        assert_close(a, b)
    for a, b in zip(turned.forward(x), iaf.inverse(x)):
        assert_close(a, b)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_pyro_agrees_given_the_same_weights(context_dim):
    dim, hidden = 5, [17, 13]
    torch.manual_seed(0)
    order = shuffled(dim)
    if context_dim:
        net = ConditionalAutoRegressiveNN(
            dim, context_dim, hidden, permutation=order
        )
    else:
        net = AutoRegressiveNN(dim, hidden, permutation=order)
    low = 0 if context_dim else 1
    degrees = [
        torch.linspace(1, dim - low, n).round().long() - 1 + low for n in hidden
    ]
    f = IAF(
        dim,
        1,
        context_dim=context_dim,
        scalar_map=AffineMap(1e6),
        orders=[order],
    )
    made = MADE(dim, 2, None, context_dim, order, degrees, nn.ReLU)
    f.bijections[0].bijection.made = made
    with torch.no_grad():
        for i, (mine, theirs) in enumerate(zip(made.layers, net.layers)):
            weight, bias = theirs.weight, theirs.bias
            if i == 0:
                if context_dim:
                    made.from_context.weight.copy_(weight[:, :context_dim])
                weight = weight[:, context_dim:]
            # theirs are all shifts, then all log-scales; ours alternate
            if i == 2:
                weight, bias = (
                    t.unflatten(0, (2, dim))
                    .flip(0)
                    .transpose(0, 1)
                    .flatten(0, 1)
                    for t in (weight, bias)
                )
            mask = theirs.mask[:, context_dim:] if i == 0 else theirs.mask
            if i < 2:
                assert torch.equal(mine.mask, mask)
            mine.weight.copy_(weight)
            mine.bias.copy_(bias)
    z = noise(7, dim, dtype=torch.float32)
    context = (
        noise(7, context_dim, seed=1, dtype=torch.float32)
        if context_dim
        else None
    )
    if context_dim:
        theirs = ConditionalAffineAutoregressive(net).condition(context)
    else:
        theirs = AffineAutoregressive(net)
    x, ladj = f(z, context)
    y = theirs(z)
    assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert_close(ladj, theirs.log_abs_det_jacobian(z, y), rtol=1e-5, atol=1e-5)
    assert_close(f.inverse(y, context)[0], z, rtol=1e-4, atol=1e-4)


# transforms of torch


@pytest.mark.parametrize("way", WAYS)
def test_sampling_works_under_vmap_and_compile(way):
    f = make(3, 2, sampling=way, tolerance=0.0, hidden=(8, 8))
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


def test_block_networks_work_under_vmap_and_compile():
    f = perturbed(BlockAutoregressive(2, (3,), 2, shuffled(2)))
    z, context = noise(3, 2), noise(3, 2, seed=1)
    for direction in (f.forward, f.inverse):
        wanted = direction(z, context)
        got = torch.func.vmap(direction)(z, context)
        assert_close(got[0], wanted[0])
        assert_close(got[1], wanted[1])
        second = torch.func.jacrev(
            torch.func.jacrev(lambda z: direction(z, context[0])[1])
        )(z[0])
        assert_close(second, second.T)
        assert second.any()
    f, z = perturbed(BlockAutoregressive(1, (2,))), noise(3, 1)
    for direction in (f.forward, f.inverse):
        got = torch.compile(direction, backend="aot_eager", fullgraph=True)(z)
        for a, b in zip(got, direction(z)):
            assert_close(a, b)


def test_a_state_dict_restores_random_orders_and_degrees():
    def random(seed):
        torch.manual_seed(seed)
        degrees = [torch.randint(1, 6, (20,)) for _ in range(2)]
        return make(6, seed=seed, degrees=degrees)

    one, other = random(1), random(2)
    z = noise(4, 6)
    assert not torch.allclose(one(z)[0], other(z)[0])
    other.load_state_dict(one.state_dict())
    for way in WAYS:
        assert_close(sample_by(other, way)(z)[0], sample_by(one, way)(z)[0])
        assert_close(sample_by(other, way)(z)[0], one(z)[0])


def test_autocast_keeps_the_dtype_and_the_block_networks_exact():
    z = noise(8, 4, dtype=torch.float32)
    for f in (MAF(4, 2, (16,)), IAF(4, 2, (16,)), BNAF(4)):
        f = perturbed(f).float()
        with torch.autocast("cpu", torch.bfloat16):
            x, ladj = f(z)
            back, _ = f.inverse(x)
        assert x.dtype == back.dtype == ladj.dtype == torch.float32
        if isinstance(f, BNAF):
            assert_close(x, f(z)[0])
            assert_close(back, z, rtol=1e-4, atol=1e-4)


def test_samples_carry_gradients_to_every_weight_that_a_mask_allows():
    flow = Flow(perturbed(MAF(4, 2, (8, 8)))).double()
    x, log_prob = flow.rsample_and_log_prob(
        64, generator=torch.Generator().manual_seed(0)
    )
    (x.square().sum() + log_prob.sum()).backward()
    for layer in flow.modules():
        if isinstance(layer, MaskedLinear):
            assert torch.equal(layer.weight.grad != 0, layer.mask != 0)


def test_the_way_back_of_an_iaf_has_the_implicit_derivative_where_parameters_are_wild():
    """Such layers enlarge rounding by up to 1e12, so single points say little and most must agree."""
    errors = []
    for seed in range(20):
        f, z = perturbed(IAF(5, 2, (8,)), 3.0, seed), noise(5, seed=seed)
        x, _ = f(z)
        there = torch.func.jacrev(lambda t, f=f: f(t)[0])(z)
        back = torch.func.jacrev(lambda t, f=f: f.inverse(t)[0])(x)
        off = (there @ back - torch.eye(5).double()).norm() / (
            there.norm() * back.norm()
        )
        errors.append(torch.stack([(f.inverse(x)[0] - z).abs().max(), off]))
    errors = torch.stack(errors)
    assert errors.isfinite().all()
    again, derivative = errors.quantile(0.7, 0)
    assert again < 1e-5 and derivative < 1e-8


# block autoregressive networks


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_block_networks_are_onto_and_have_mass_one(scale, context_dim):
    flow = Flow(perturbed(BNAF(2, 2, (6,), context_dim), scale)).double()
    context = noise(context_dim) if context_dim else None
    mass = total_mass(
        lambda x: flow.log_prob(x, context), 2, dtype=torch.float64
    )
    assert abs(mass - 1) < 1e-3
    far = torch.tensor([[1e6, -1e6], [-1e8, 3.0]], dtype=torch.float64)
    x, _ = flow.bijection(far, context)
    assert x.isfinite().all()
    assert_close(
        flow.bijection.inverse(x, context)[0], far, rtol=1e-9, atol=1e-6
    )


def test_a_block_network_starts_at_the_identity_with_units_that_differ():
    torch.manual_seed(0)
    f = BlockAutoregressive(3, (8, 8)).double()
    x = noise(500, 3)
    z, ladj = f.inverse(x)
    assert_close(z, x, rtol=1e-6, atol=1e-6)
    assert_close(ladj, torch.zeros_like(ladj), rtol=0, atol=1e-6)
    target = torch.stack(
        [x[:, 0].sinh(), x[:, 1] + x[:, 0] ** 2, x[:, 2].tanh()], 1
    )
    (z - target).square().mean().backward()
    for layer in f.layers:
        first_block = layer.units.value.grad[1:, 0].squeeze(-1)  # scales, bends
        if first_block.shape[-1] > 1:
            assert first_block.std(-1).min() > 1e-6
        assert layer.units.value.grad.isfinite().all()
        assert layer.below.grad[layer.mask == 0].eq(0).all()
        assert layer.below.grad[layer.mask != 0].ne(0).all()


def test_a_bounded_network_would_not_be_onto():
    """What the leak is for: without it the same network misses most of the plane."""
    f = BlockAutoregressive(1, (8,)).double()
    assert f.inverse(torch.tensor([[1e9]]).double())[0] > 1e6
    squashed = nn.Sequential(
        nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)
    ).double()
    with torch.no_grad():
        for p in squashed.parameters():
            p.abs_()
        assert squashed(torch.tensor([[1e9]]).double()) < 10


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_contexts_that_are_shared_are_broadcast(direction):
    context, points = noise(3, 2), noise(4, 3, 5)
    for f in (make(5, 2), perturbed(BlockAutoregressive(5, (4,), 2))):
        whole = getattr(f, direction)(points, context)
        one = getattr(f, direction)(points[1, 2], context[2])
        assert_close(whole[0][1, 2], one[0])
        assert_close(whole[1][1, 2], one[1])


def test_the_checker_sees_a_mask_that_is_off_by_one():
    torch.manual_seed(0)
    f = make(3, order=torch.arange(3), hidden=(16,))
    # the first coordinate sees units that see itself
    f.made.layers[-1].mask[0:2] = True
    with pytest.raises(AssertionError, match="breaks"):
        check_bijection(f, noise(8, 3))
