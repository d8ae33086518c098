"""Autoregressive flows: masks, orders, stacks, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from helpers import check_beside_another_device, noise
from masked import one_layer, perturbed, sample_by, shuffled
from pyro.distributions.transforms import (
    AffineAutoregressive,
    ConditionalAffineAutoregressive,
)
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import nn
from torch.testing import assert_close

from flowcourse.autoregressive import (
    IAF,
    MADE,
    MAF,
    NAF,
    Autoregressive,
    MaskedLinear,
)
from flowcourse.bnaf import BNAF, BlockAutoregressive
from flowcourse.core import Flow, Inverse
from flowcourse.elementwise import (
    AffineMap,
    InverseMap,
    ScalarMap,
)
from flowcourse.monotone_maps import DeepSigmoidalMap
from flowcourse.testing import check_bijection

WAYS = ("incremental", "fixed-point", "loop")


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
    net = perturbed(
        MADE(7, 2, hidden=(24, 24), context_dim=context_dim, order=order)
    )
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
    f = perturbed(make_flow(4, 1, hidden=(8,), orders=[order]))
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
        f = make(4, 3, hidden=(5, 7), context_dim=2, **options)
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
    f = BNAF(3, 3, hidden=(5, 7), context_dim=2, bend=0.25)
    assert [m.order.tolist() for m in f.bijections] == [
        [0, 1, 2],
        [2, 1, 0],
        [0, 1, 2],
    ]
    for m in f.bijections:
        assert [layer.bend for layer in m.layers] == [0.25, 0.25, 0.0]
        assert [layer.within.shape[1] for layer in m.layers] == [5, 7, 1]
        assert all(layer.units.net is not None for layer in m.layers)


def test_a_neural_autoregressive_flow_is_one_of_deep_sigmoidal_maps():
    torch.manual_seed(0)
    f = NAF(3, 2, hidden=(8,), context_dim=2, units=4, sampling="loop")
    torch.manual_seed(0)
    plain = MAF(
        3,
        2,
        hidden=(8,),
        context_dim=2,
        scalar_map=InverseMap(DeepSigmoidalMap(4)),
    )
    plain.load_state_dict(f.state_dict())
    z, context = noise(5, 3), noise(5, 2, seed=1)
    f, plain = f.double(), plain.double()
    x, _ = f(z, context)
    assert_close(plain(z, context)[0], x)
    assert_close(f.inverse(x, context)[0], z)
    layers = [m for m in f.modules() if isinstance(m, Autoregressive)]
    assert [m.sampling for m in layers] == ["loop"] * 2


def test_degrees_are_spread_over_all_that_there_are():
    for context_dim, wanted in ((0, [1, 1, 2, 2]), (3, [0, 0, 1, 2])):
        made = MADE(3, hidden=(4,), context_dim=context_dim)
        assert made.degree0.tolist() == wanted


LAYERS = (MADE, Autoregressive, BlockAutoregressive)
STACKS = (MAF, IAF, NAF, BNAF)
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

    f, z = one_layer(4, scalar_map=Plain()), noise(3, 4)
    for way in WAYS:
        assert_close(f.inverse(sample_by(f, way)(z)[0])[0], z)
    assert f.codomain.check(z).all() and f.domain.check(z).all()
    assert (f.forward_cost, f.inverse_cost) == ("D passes", "one pass")


def test_a_direction_costs_the_dearer_of_its_passes_and_of_the_scalar_map():
    numerical = DeepSigmoidalMap(2)
    f = Autoregressive(3, numerical, hidden=(4,))
    assert (f.forward_cost, f.inverse_cost) == ("D passes", "numerical")
    maf = MAF(3, 1, hidden=(4,), scalar_map=InverseMap(numerical))
    assert (maf.forward_cost, maf.inverse_cost) == ("numerical", "one pass")
    iaf = IAF(3, 1, hidden=(4,), scalar_map=numerical)
    assert (iaf.forward_cost, iaf.inverse_cost) == ("one pass", "numerical")
    naf = NAF(3, 1, hidden=(4,), units=2)
    assert (naf.forward_cost, naf.inverse_cost) == ("numerical", "one pass")
    assert MAF(3, 1, hidden=(4,)).forward_cost == "D passes"


@pytest.mark.parametrize(
    "create",
    [
        lambda: MAF(4, 2, hidden=(8,), context_dim=2),
        lambda: MAF(
            1, 2, hidden=(8,), orders=[torch.tensor([0], device="cpu")]
        ),
        lambda: IAF(4, 2, hidden=(8,), context_dim=2, orders=[[2, 0, 3, 1]]),
        lambda: Autoregressive(4, degrees=[[1, 3, 2]], sampling="fixed-point"),
        lambda: Autoregressive(4, context_dim=2, sampling="loop"),
        lambda: BNAF(3, 2, hidden=(4,), context_dim=2),
        lambda: BlockAutoregressive(3, hidden=(4,), order=[1, 2, 0]),
    ],
)
def test_a_flow_lives_on_the_default_device_and_works_beside_another(create):
    check_beside_another_device(create, 2)


# duality, parity


def test_maf_and_iaf_are_dual_with_one_set_of_weights():
    maf = perturbed(MAF(6, 1, hidden=(20,)))
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
    made = MADE(
        dim,
        2,
        hidden=None,
        context_dim=context_dim,
        order=order,
        degrees=degrees,
        activation=nn.ReLU,
    )
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
    z = noise(7, dim).float()
    context = noise(7, context_dim, seed=1).float() if context_dim else None
    if context_dim:
        theirs = ConditionalAffineAutoregressive(net).condition(context)
    else:
        theirs = AffineAutoregressive(net)
    x, ladj = f(z, context)
    y = theirs(z)
    assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert_close(ladj, theirs.log_abs_det_jacobian(z, y), rtol=1e-5, atol=1e-5)
    assert_close(f.inverse(y, context)[0], z, rtol=1e-4, atol=1e-4)


def test_a_state_dict_restores_random_orders_and_degrees():
    def random(seed):
        torch.manual_seed(seed)
        degrees = [torch.randint(1, 6, (20,)) for _ in range(2)]
        return one_layer(6, seed=seed, degrees=degrees)

    one, other = random(1), random(2)
    z = noise(4, 6)
    assert not torch.allclose(one(z)[0], other(z)[0])
    other.load_state_dict(one.state_dict())
    for way in WAYS:
        assert_close(sample_by(other, way)(z)[0], sample_by(one, way)(z)[0])
        assert_close(sample_by(other, way)(z)[0], one(z)[0])


def test_autocast_keeps_the_dtype_and_the_block_networks_exact():
    z = noise(8, 4).float()
    for f in (MAF(4, 2, hidden=(16,)), IAF(4, 2, hidden=(16,)), BNAF(4)):
        f = perturbed(f).float()
        with torch.autocast("cpu", torch.bfloat16):
            x, ladj = f(z)
            back, _ = f.inverse(x)
        assert x.dtype == back.dtype == ladj.dtype == torch.float32
        if isinstance(f, BNAF):
            assert_close(x, f(z)[0])
            assert_close(back, z, rtol=1e-4, atol=1e-4)


def test_samples_carry_gradients_to_every_weight_that_a_mask_allows():
    flow = Flow(perturbed(MAF(4, 2, hidden=(8, 8)))).double()
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
        f, z = perturbed(IAF(5, 2, hidden=(8,)), 3.0, seed), noise(5, seed=seed)
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


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_contexts_that_are_shared_are_broadcast(direction):
    context, points = noise(3, 2), noise(4, 3, 5)
    for f in (
        one_layer(5, 2),
        perturbed(BlockAutoregressive(5, hidden=(4,), context_dim=2)),
    ):
        whole = getattr(f, direction)(points, context)
        one = getattr(f, direction)(points[1, 2], context[2])
        assert_close(whole[0][1, 2], one[0])
        assert_close(whole[1][1, 2], one[1])


def test_the_checker_sees_a_mask_that_is_off_by_one():
    torch.manual_seed(0)
    f = one_layer(3, order=torch.arange(3), hidden=(16,))
    # the first coordinate sees units that see itself
    f.made.layers[-1].mask[0:2] = True
    with pytest.raises(AssertionError, match="breaks"):
        check_bijection(f, noise(8, 3))
