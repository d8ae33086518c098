"""Couplings: what depends on what, every way to cut, images, stacks, and what they refuse."""

import copy
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from helpers import check_beside_another_device
from pyro.distributions import transforms as pyro_transforms
from pyro.nn import DenseNN
from torch import nn
from torch.testing import assert_close

from flowcourse.conditioners import (
    ResidualBlock,
    convnet,
    convolution,
    residual,
)
from flowcourse.core import Compose, Flow
from flowcourse.coupling import (
    NICE,
    Coupling,
    Couplings,
    RealNVP,
    alternating,
    channel,
    checkerboard,
    half,
    random_half,
)
from flowcourse.elementwise import (
    AdditiveMap,
    AffineMap,
    InverseMap,
    ScalarMap,
    SigmoidMap,
    mlp,
)
from flowcourse.scalar_maps import (
    ArcsinhMap,
    ExpMap,
    SinhArcsinhMap,
    affine_maps,
)
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.testing import check_bijection

image = (2, 4, 4)
tiny = partial(mlp, hidden=(8,))
tiny_image = partial(convnet, hidden=(4,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def event_jacobian(f, z, context=None):
    """The Jacobian of one event, both flattened."""
    n = z.numel()
    return (
        torch.func.jacrev(lambda z: f(z, context)[0])(z).reshape(n, n).detach()
    )


def make(mask, context_dim=0, scalar_map=AffineMap()):
    conditioner = tiny if mask.dim() == 1 else tiny_image
    return Coupling(
        mask, scalar_map, conditioner=conditioner, context_dim=context_dim
    ).double()


masks = {
    "half": half(6),
    "second half": ~half(5),
    "alternating": alternating(6),
    "alternating, odd": ~alternating(5),
    "random": random_half(6, seeded(1)),
    "channel": channel((3, 4, 4)),
    "alternating channels": alternating(4)[:, None, None].expand(4, 2, 3),
    "channels mixed": torch.tensor([True, False, False, True, True])[
        :, None, None
    ].expand(5, 2, 2),
    "checkerboard": checkerboard(image),
    "random pixels": random_half(image, seeded(2)),
}
each_mask = pytest.mark.parametrize("mask", masks.values(), ids=masks)


# The affine scalar maps.


@pytest.mark.parametrize("name", affine_maps)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affine_maps_start_at_the_identity_and_come_back(name, dtype):
    h = affine_maps[name]
    z = torch.linspace(-3, 3, 7, dtype=dtype)
    x, log_slope = h.forward(z, torch.zeros(7, h.n_params, dtype=dtype))
    assert_close(x, z)
    assert_close(log_slope, torch.zeros_like(z))
    theta = torch.randn(7, h.n_params, dtype=dtype)
    x, log_slope = h.forward(z, theta)
    slope = torch.func.vmap(torch.func.grad(lambda z, t: h.forward(z, t)[0]))(
        z, theta
    )
    assert_close(log_slope, slope.log())
    back, back_slope = h.inverse(x, theta)
    assert_close(back, z)
    assert_close(back_slope, -log_slope)


def test_affine_scales_are_those_that_their_names_say():
    raw = torch.linspace(-4, 4, 9, dtype=torch.float64)
    theta, one = (
        torch.stack([raw, torch.zeros(9)], -1),
        torch.ones(9, dtype=torch.float64),
    )
    scale = {
        name: h.forward(one, theta)[0]
        for name, h in affine_maps.items()
        if h.n_params == 2
    }
    assert_close(scale["affine"], (3 * torch.tanh(raw / 3)).exp())
    assert_close(scale["affine-tanh"], raw.tanh().exp())
    assert_close(scale["affine-exp"], raw.exp())
    shifted = 5 * torch.tanh(raw / 5) + math.log(math.e - 1)
    assert_close(scale["affine-softplus"], nn.functional.softplus(shifted))
    unbounded = AffineMap(None, "softplus").forward(one, theta)[0]
    assert_close(unbounded, nn.functional.softplus(raw + math.log(math.e - 1)))


@pytest.mark.parametrize(
    "h", [AffineMap(), AffineMap(1.0), AffineMap(5.0, "softplus")], ids=repr
)
def test_a_bound_keeps_any_raw_scale_finite_in_float32(h):
    raw = torch.tensor(
        [-1e30, -1e3, -100.0, 100.0, 1e3, 1e30], requires_grad=True
    )
    theta = torch.stack([raw, torch.zeros(6)], -1)
    x, log_slope = h.forward(torch.ones(6), theta)
    z, _ = h.inverse(x, theta)
    assert_close(z, torch.ones(6))
    (x.sum() + log_slope.sum()).backward()
    assert raw.grad.isfinite().all()


def test_a_softplus_scale_without_a_bound_has_slopes_wherever_exp_underflows():
    raw = torch.tensor(
        [-200.0, -20.0, -15.0, 0.0, 50.0, 200.0], requires_grad=True
    )
    _, log_slope = AffineMap(None, "softplus").forward(
        torch.ones(6), torch.stack([raw, torch.zeros(6)], -1)
    )
    log_slope.sum().backward()
    assert log_slope.isfinite().all() and (raw.grad > 0).all()
    assert_close(log_slope[0], raw[0].detach() + math.log(math.e - 1))


# Partitions.


def test_partitions_of_vectors():
    assert half(5).tolist() == [True, True, False, False, False]
    assert alternating(5).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("shape", [6, 7, (2, 3, 3)])
def test_a_random_partition_follows_from_its_generator_alone(shape):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = [random_half(shape, seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(
        drawn[0], drawn[2]
    )
    assert (
        drawn[0].dtype == torch.bool
        and int(drawn[0].sum()) == drawn[0].numel() // 2
    )


def test_a_random_partition_passes_every_entry_through_equally_often():
    g = seeded()
    share = (
        torch.stack([random_half(7, g) for _ in range(2000)]).float().mean(0)
    )
    assert_close(
        share, torch.full((7,), 3 / 7), atol=4 * (0.25 / 2000) ** 0.5, rtol=0
    )


def test_partitions_of_images():
    board, channels = checkerboard((3, 4, 5)), channel((3, 4, 5))
    assert board.shape == channels.shape == (3, 4, 5)
    assert board[:, 0, 0].all() and torch.equal(board[0], board[2])
    assert (board[:, 1:] != board[:, :-1]).all() and (
        board[..., 1:] != board[..., :-1]
    ).all()
    assert channels[0].all() and not channels[1:].any()


# What depends on what.


@each_mask
def test_a_layer_agrees_with_its_formula(mask, scramble):
    """x = z where the mask is true, h(z; m(z_a)) elsewhere, by a slow way to cut and join."""
    f = scramble(make(mask))
    z = torch.randn(mask.shape, dtype=torch.float64)
    if mask.dim() == 1:
        theta = f.conditioner(z[mask]).reshape(-1, 2)
    elif (mask.flatten(1).all(1) == mask.flatten(1).any(1)).all():
        kept = mask.flatten(1).all(1)
        theta = (
            f.conditioner(z[kept][None])[0]
            .unflatten(0, (-1, 2))
            .movedim(1, -1)
            .reshape(-1, 2)
        )
    else:
        theta = (
            f.conditioner((z * mask)[None])[0]
            .unflatten(0, (-1, 2))
            .movedim(1, -1)[~mask]
        )
    moved, log_slope = AffineMap().forward(z[~mask], theta)
    x = z.clone()
    x[~mask] = moved
    got, ladj = f(z)
    assert_close(got, x)
    assert_close(ladj, log_slope.sum())
    assert_close(f.inverse(x)[0], z)


@each_mask
def test_the_jacobian_is_triangular_and_its_rank_above_the_identity_is_the_number_moved(
    mask, scramble
):
    f, flat = scramble(make(mask)), mask.flatten()
    J = event_jacobian(f, torch.randn(mask.shape, dtype=torch.float64))
    eye = torch.eye(len(flat), dtype=torch.bool)
    # these rows pass through
    assert_close(J[flat], eye[flat].double(), rtol=0, atol=0)
    within = J[~flat][:, ~flat]
    assert torch.equal(within != 0, torch.eye(len(within), dtype=torch.bool))
    assert (J[~flat][:, flat] != 0).any()
    rank = torch.linalg.matrix_rank(J - eye.double(), atol=1e-10, rtol=0)
    assert 0 < rank <= (~flat).sum()
    if mask.dim() == 1:
        assert rank == (~flat).sum()
        assert (J[~flat][:, flat] != 0).all()


def test_three_layers_let_all_depend_on_all_and_one_side_never_does(scramble):
    z = torch.randn(6, dtype=torch.float64)
    for layers, full in ((1, False), (2, False), (3, True)):
        f = scramble(
            Couplings(6, layers=layers, hidden=(16,), partition=half)
        ).double()
        assert (event_jacobian(f, z) != 0).all() == full
    one_sided = scramble(nn.Sequential(*(make(half(6)) for _ in range(5))))
    for f in one_sided:
        z = f(z)[0]
    start = torch.randn(6, dtype=torch.float64)

    def through(z):
        for f in one_sided:
            z = f(z)[0]
        return z

    J = torch.func.jacrev(through)(start)
    assert_close(J[:3], torch.eye(6, dtype=torch.float64)[:3])


def test_a_convolution_sees_only_the_pixels_that_pass_through(scramble):
    f = scramble(make(checkerboard((1, 5, 5))))
    J = event_jacobian(f, torch.randn(1, 5, 5, dtype=torch.float64)).reshape(
        5, 5, 5, 5
    )
    # a moved pixel: itself, and kept ones at most 2 away (two layers of 3 x 3)
    at = J[1, 2] != 0
    assert at[1, 2] and at[1, 1] and at[2, 2] and at[3, 3]
    assert not at[4].any()
    assert int(at.sum()) == int(checkerboard((1, 5, 5))[0, :4].sum()) + 1


# One evaluation of the network, any batch, and the transforms of torch.func.


@each_mask
def test_each_direction_evaluates_the_network_once(mask):
    f = make(mask, context_dim=2)
    calls = []
    f.conditioner.register_forward_hook(lambda *args: calls.append(1))
    z, context = (
        torch.randn(3, *mask.shape).double(),
        torch.randn(3, 2).double(),
    )
    f(z, context)
    assert len(calls) == 1
    f.inverse(z, context)
    assert len(calls) == 2


@each_mask
def test_the_context_decides_and_broadcasts(mask, scramble):
    f = scramble(make(mask, context_dim=2))
    z, context = (
        torch.randn(3, 1, *mask.shape).double(),
        torch.randn(4, 2).double(),
    )
    x, ladj = f(z, context)
    assert x.shape == (3, 4, *mask.shape) and ladj.shape == (3, 4)
    for i, j in product(range(3), range(4)):
        one, step = f(z[i, 0], context[j])
        assert_close(x[i, j], one)
        assert_close(ladj[i, j], step)
    assert not torch.equal(x[:, 0], x[:, 1])
    assert f(torch.zeros(0, *mask.shape).double(), context[:1])[1].shape == (0,)


@each_mask
def test_vmap_second_derivatives_and_compile(mask, scramble):
    f = scramble(make(mask))
    z = torch.randn(3, *mask.shape, dtype=torch.float64)
    x, ladj = f(z)
    for got, wanted in zip(torch.func.vmap(f)(z), (x, ladj)):
        assert_close(got, wanted)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda z: f(z)[1]))(z[0])
    assert hessian.isfinite().all() and (hessian != 0).any()
    torch.compiler.reset()  # it stops compiling what it has compiled too often
    for way in (f.forward, f.inverse):
        quick = torch.compile(way, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(quick(z), way(z)):
            assert_close(got, wanted)


def test_autocast_keeps_points_in_float32(scramble):
    for f, z in (
        (scramble(RealNVP(6, 2, hidden=(8,))), torch.randn(5, 6)),
        (
            scramble(RealNVP(image, 2, hidden=(8,), partition=checkerboard)),
            torch.randn(5, *image),
        ),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            x, ladj = f(z)
            back, _ = f.inverse(x)
        assert x.dtype == ladj.dtype == torch.float32
        # the same half-precision network both ways
        assert_close(back, z, atol=1e-4, rtol=1e-4)


# The same map elsewhere.


def test_pyro_makes_the_same_of_the_same_weights():
    net = DenseNN(3, [16, 16], [4, 4])  # shift first, then log-scale
    theirs = pyro_transforms.AffineCoupling(3, net)
    ours = Coupling(
        half(7),
        AffineMap(None),
        conditioner=partial(mlp, hidden=(16, 16), activation=nn.ReLU),
    )
    with torch.no_grad():
        linear = [
            layer for layer in ours.conditioner if isinstance(layer, nn.Linear)
        ]
        for mine, other in zip(linear[:-1], net.layers):
            mine.weight.copy_(other.weight)
            mine.bias.copy_(other.bias)
        last = net.layers[-1]
        last.weight.mul_(3)
        order = torch.stack(
            [torch.arange(4) + 4, torch.arange(4)], -1
        ).flatten()
        linear[-1].weight.copy_(last.weight[order])
        linear[-1].bias.copy_(last.bias[order])
    z = torch.randn(50, 7)
    x, ladj = ours(z)
    # within Pyro's clipping
    assert (ladj.abs() > 0.1).any() and ladj.abs().max() < 3
    wanted = theirs(z)
    assert_close(x, wanted, atol=1e-5, rtol=1e-5)
    assert_close(
        ladj, theirs.log_abs_det_jacobian(z, wanted), atol=1e-5, rtol=1e-5
    )
    assert_close(
        ours.inverse(x)[0], theirs.inv(wanted.clone()), atol=1e-5, rtol=1e-5
    )


# Checkpoints.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (random_half(8, seeded(0)), random_half(8, seeded(1))),
        (half(8), alternating(8)),
        (alternating(8), random_half(8, seeded(0))),
        (~half(8), half(8)),
        (checkerboard(image), random_half(image, seeded(0))),
        (checkerboard(image), ~checkerboard(image)),
    ],
)
def test_a_checkpoint_restores_the_partition(one, other, scramble):
    saved, fresh = scramble(make(one)), make(other)
    z = torch.randn(4, *one.shape, dtype=torch.float64)
    assert not torch.equal(fresh(z)[0], saved(z)[0])
    fresh.load_state_dict(saved.state_dict())
    for loaded in (fresh, copy.deepcopy(fresh)):
        for got, wanted in zip(loaded(z), saved(z)):
            assert torch.equal(got, wanted)
        assert torch.equal(loaded.inverse(z)[0], saved.inverse(z)[0])


def test_the_mask_is_a_copy(scramble):
    mask = random_half(6, seeded())
    f = scramble(make(mask))
    z = torch.randn(3, 6, dtype=torch.float64)
    x, _ = f(z)
    mask.logical_not_()
    assert torch.equal(f(z)[0], x)


def test_a_conditioner_hands_its_dropout_and_widths_on():
    for make in (RealNVP, NICE, partial(Couplings, scalar_map=AffineMap(1.0))):
        for dim, kind in ((4, nn.Linear), (image, nn.Conv2d)):
            f = make(dim, layers=2, hidden=(5, 7), dropout=0.25)
            rates = [m.p for m in f.modules() if isinstance(m, nn.Dropout)]
            assert rates == [0.25] * 4
            ends = [len(m.weight) for m in f.modules() if isinstance(m, kind)]
            assert ends[:2] == ends[3:5] == [5, 7]
            plain = make(dim, layers=2, hidden=(5,))
            assert not any(isinstance(m, nn.Dropout) for m in plain.modules())


def test_stacks_hand_their_options_on():
    for make in (RealNVP, NICE, Couplings):
        f = make(6, layers=3, hidden=(5,), context_dim=2, partition=half,
                 conditioner=residual)  # fmt: skip
        couplings = [m for m in f.modules() if isinstance(m, Coupling)]
        assert len(couplings) == 3
        for layer in couplings:
            assert layer.context_dim == 2 and layer.layout == "blocks"
            assert any(isinstance(m, ResidualBlock) for m in layer.modules())
    assert RealNVP(6, bound=0.5).bijections[0].scalar_map.bound == 0.5
    scaling, _ = NICE(6, context_dim=2).bijections
    assert scaling.context_dim == 2
    # scales, and no shifts
    assert scaling.raw(torch.zeros(2)).shape == (6,)


def test_the_cheapest_way_to_cut_is_found():
    for mask, layout in (
        (half(6), "blocks"),
        (~half(5), "blocks"),
        (alternating(6), "alternating"),
        (~alternating(6), "alternating"),
        (alternating(5), "mixed"),
        (channel((3, 4, 4)), "blocks"),
    ):
        f = make(mask)
        assert f.by_line and f.layout == layout
    assert not make(checkerboard(image)).by_line


# Sizes, masks and devices of any kind.


@pytest.mark.parametrize(
    "read", [list, np.array, lambda m: np.array(m)[::-1].copy()[::-1]]
)
def test_a_mask_is_read_from_booleans_of_any_kind(read):
    mask = [True, False, False, True]
    f = Coupling(read(mask), conditioner=tiny)
    assert f.mask.dtype == torch.bool and f.mask.tolist() == mask
    g = RealNVP(4, 2, hidden=(8,), partition=lambda n: read(mask))
    assert g.bijections[1].mask.tolist() == (~f.mask).tolist()


def test_sizes_are_whole_numbers_of_any_kind():
    for n in (np.int64, np.uint8, torch.tensor):
        kinds = dict(layers=n(2), hidden=(n(4),), context_dim=n(3))
        for make in (Couplings, RealNVP, NICE):
            for dim, same in ((n(4), 4), ((n(2), n(4), n(4)), image)):
                f = make(dim, **kinds)
                g = make(same, layers=2, hidden=(4,), context_dim=3)
                assert repr(f) == repr(g)
        assert torch.equal(half(n(5)), half(5))
        assert torch.equal(alternating(n(5)), alternating(5))


@pytest.mark.parametrize("make", [Couplings, RealNVP, NICE])
def test_images_have_a_partition_by_default(make, scramble):
    f = scramble(make((3, 8, 8), layers=3, hidden=(4,))).double()
    couplings = [m for m in f.modules() if isinstance(m, Coupling)]
    assert torch.equal(couplings[0].mask, checkerboard((3, 8, 8)))
    assert torch.equal(couplings[1].mask, ~checkerboard((3, 8, 8)))
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x, ladj = f(z)
    assert (x != z).all() and ladj.shape == (2,)
    assert_close(f.inverse(x)[0], z)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RealNVP(6, 2, hidden=(8,), context_dim=3),
        lambda: RealNVP(5, 2, hidden=(8,), partition=half),
        lambda: NICE(image, 2, hidden=(4,), context_dim=3, partition=channel),
        lambda: RealNVP(image, 2, hidden=(4,), context_dim=3),
        lambda: Couplings(6, layers=2, hidden=(8,), conditioner=residual),
        lambda: Coupling([True, False, False, True, True]),
        lambda: Coupling(random_half(image, seeded())),
    ],
)
def test_a_flow_lives_on_the_default_device_and_works_beside_another(make):
    check_beside_another_device(make, 3)


# Stacks.


@pytest.mark.parametrize(
    "f",
    [
        RealNVP(4, 3, hidden=(8,)),
        RealNVP(4, 3, hidden=(8,), conditioner=residual, partition=half),
        NICE(5, 3, hidden=(8,)),
        Couplings(5, 2, scalar_map=RationalQuadraticSplineMap(), hidden=(8,)),
        Couplings(4, 2, scalar_map=AffineMap(2.0, "softplus"), hidden=(8,), partition=partial(random_half, generator=seeded())),
        RealNVP(image, 3, hidden=(4,), partition=checkerboard),
        Couplings(image, 3, scalar_map=AdditiveMap(), hidden=(4,), partition=channel, conditioner=partial(residual, layer=convolution)),
    ],
    ids=lambda f: type(f).__name__,
)  # fmt: skip
def test_stacks_start_at_the_identity_and_move_everything(f, scramble):
    z = torch.randn(4, *f.event_shape)
    x, ladj = f(z)
    assert_close(x, z)
    assert_close(ladj, torch.zeros(4))
    f, z = scramble(f).double(), z.double()
    x, _ = f(z)
    assert (x != z).all(0).all()
    assert_close(f.inverse(x)[0], z)


stacks = {
    "alternating": (6, alternating),
    "blocks": (5, half),
    "mixed, uneven": (7, lambda n: torch.arange(n) % 4 == 1),
    "drawn for every pair": (6, partial(random_half, generator=seeded())),
    "channels": ((3, 4, 4), channel),
    "pixels": (image, checkerboard),
}


@pytest.mark.parametrize(("dim", "partition"), stacks.values(), ids=stacks)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_stack_equals_its_layers_one_after_another(
    dim, partition, context_dim, scramble
):
    """What is shared between layers that cut alike changes neither values nor gradients."""
    f = Couplings(
        dim,
        5,
        scalar_map=SinhArcsinhMap(),
        hidden=(4,),
        context_dim=context_dim,
        partition=partition,
    )
    f = scramble(f).double()
    plain = Compose(*f.bijections)
    start = torch.randn(2, 3, *f.event_shape, dtype=torch.float64)
    context = torch.randn(3, 2, dtype=torch.float64) if context_dim else None
    exact = partial(assert_close, rtol=1e-10, atol=1e-10)
    for direction in ("forward", "inverse"):
        found = []
        for stack in (f, plain):
            points = start.clone().requires_grad_()
            end, ladj = getattr(stack, direction)(points, context)
            loss = (end.sin() + end.square()).sum() + ladj.square().sum()
            gradients = torch.autograd.grad(loss, [points, *f.parameters()])
            found.append([end, ladj, *gradients])
        for one, other in zip(*found, strict=True):
            exact(one, other)


def test_a_stack_cuts_once_and_again_where_the_partition_changes(
    scramble, monkeypatch
):
    cuts = []
    cut = Coupling._cut
    monkeypatch.setattr(
        Coupling,
        "_cut",
        lambda self, point: cuts.append(self) or cut(self, point),
    )
    f = RealNVP(6, 5, hidden=(4,))
    f(torch.randn(2, 6))
    assert cuts == [f.bijections[0]]
    f = scramble(
        RealNVP(
            6,
            6,
            hidden=(4,),
            partition=partial(random_half, generator=seeded(3)),
        )
    )
    other = RealNVP(6, 6, hidden=(4,))
    other.load_state_dict(f.state_dict())  # partitions come with the weights
    z = torch.randn(2, 6)
    cuts.clear()
    for got, wanted in zip(other(z), f(z)):
        assert torch.equal(got, wanted)
    assert cuts == [g.bijections[i] for g in (other, f) for i in (0, 2, 4)]


def test_a_stack_of_every_kind_keeps_the_contract():
    z = torch.randn(6, 4)
    g = seeded()
    couplings = Couplings(
        4,
        2,
        scalar_map=SinhArcsinhMap(),
        hidden=(8,),
        context_dim=2,
        partition=partial(random_half, generator=g),
        conditioner=residual,
    )
    check_bijection(couplings, z, torch.randn(6, 2), levels=(0.0, 1.0))
    f = Couplings(
        image,
        2,
        scalar_map=AffineMap(),
        hidden=(3,),
        context_dim=1,
        partition=checkerboard,
        conditioner=partial(residual, layer=convolution),
    )
    check_bijection(
        f, torch.randn(6, *image), torch.randn(6, 1), levels=(0.0, 1.0)
    )


def test_sides_change_and_random_partitions_are_drawn_for_every_pair():
    stacks = {
        "alternating": RealNVP(6, 4, hidden=(4,)),
        "random": RealNVP(
            6,
            4,
            hidden=(4,),
            partition=partial(random_half, generator=seeded()),
        ),
    }
    for name, f in stacks.items():
        a, b, c, d = (layer.mask for layer in f.bijections)
        assert torch.equal(a, ~b) and torch.equal(c, ~d)
        assert torch.equal(a, c) == (name == "alternating")


def test_nice_scales_once_and_couplings_keep_every_volume(scramble):
    f = scramble(NICE(5, 4, hidden=(8,)))
    scaling, couplings = f.bijections
    z = torch.randn(6, 5)
    log_scale = scaling(z)[1]
    assert (log_scale == log_scale[0]).all() and log_scale[0].abs() > 1e-3
    _, ladj = f(z)
    assert_close(ladj, log_scale)
    assert [type(c.scalar_map) for c in couplings.bijections] == [
        AdditiveMap
    ] * 4
    conditional = scramble(NICE(5, 2, hidden=(8,), context_dim=1))
    ladj = conditional(z, torch.linspace(-1, 1, 6)[:, None])[1]
    assert len(ladj.unique()) == 6


def test_nice_learns_the_widths_of_its_data():
    torch.manual_seed(0)
    width = torch.tensor([0.2, 5.0])
    x, flow = width * torch.randn(4000, 2), Flow(NICE(2, 2, hidden=(8,)))
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    entropy = 1 + math.log(2 * math.pi)  # the two widths multiply to 1
    assert abs(-flow.log_prob(x).mean().item() - entropy) < 0.05


class Slow(AffineMap):
    inverse_cost = "numerical"


def test_costs_follow_the_scalar_map():
    f = Couplings(4, 2, scalar_map=Slow(), hidden=(4,))
    assert (f.forward_cost, f.inverse_cost) == ("one pass", "numerical")
    assert RealNVP(4, 1, hidden=(4,)).inverse_cost == "one pass"


def test_a_scalar_map_needs_no_base_class(scramble):
    class Plain:
        n_params = 2
        forward_cost, inverse_cost = "one pass", "numerical"

        def forward(self, z, theta):
            return AffineMap().forward(z, theta)

        def inverse(self, x, theta):
            return AffineMap().inverse(x, theta)

    f = scramble(Coupling(half(4), Plain(), conditioner=tiny))
    assert (f.forward_cost, f.inverse_cost) == ("one pass", "numerical")
    z = torch.randn(3, 4)
    assert_close(f.inverse(f(z)[0])[0], z)


def test_a_repr_shows_structure():
    text = repr(RealNVP(image, 1, hidden=(4,), partition=checkerboard))
    assert (
        "event_shape=(2, 4, 4)" in text
        and "kept=16" in text
        and "Conv2d(2, 4" in text
    )


# Refusals.


class Box(ScalarMap):
    n_params = 3
    domain = codomain = torch.distributions.constraints.unit_interval


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Coupling(torch.ones(3, dtype=torch.bool)), "mask: .* one true and one false"),
        (lambda: Coupling(torch.zeros(image, dtype=torch.bool)), "mask: .* one true and one false"),
        (lambda: Coupling(torch.tensor([1.0, 0.0])), r"mask: expected booleans .* got \[1.0, 0.0\]"),
        (lambda: Coupling(torch.tensor(True)), "mask: expected booleans .* got True"),
        (lambda: Coupling(half(4), Box()), r"scalar_map: .*the whole line.* Box\(\) leads from"),
        (lambda: Coupling(half(4), ExpMap()), "scalar_map: expected one with parameters, got ExpMap"),
        (lambda: Coupling(half(4), InverseMap(SigmoidMap())), "scalar_map: expected one with param"),
        (lambda: Couplings(4, scalar_map=ArcsinhMap()), "scalar_map: expected one with parameters"),
        (lambda: Coupling(half(4), InverseMap(Box())), "scalar_map: expected a map of the whole line onto"),
        (lambda: Coupling(half(4)[:, None].expand(4, 3)), r"conditioner: .* shape \(4, 3\), give one"),
        (lambda: AffineMap(0.0), "bound: expected a finite number above 0, got 0.0"),
        (lambda: RealNVP(2, bound=math.inf), "bound: expected a finite number above 0, got inf"),
        (lambda: AffineMap(scale="exponential"), "scale: expected 'exp' or 'softplus', got 'expon"),
        (lambda: RealNVP(1), "dim: a coupling needs at least 2 coordinates, got 1"),
        (lambda: NICE(0), "dim: a coupling needs at least 2 coordinates, got 0"),
        (lambda: RealNVP(-3), "dim: a coupling needs at least 2 coordinates, got -3"),
        (lambda: RealNVP((1, 1, 1)), "dim: a coupling needs at least 2 coordinates"),
        (lambda: RealNVP(2.0), "dim: expected positive integers, got 2.0"),
        (lambda: RealNVP("ab"), "dim: expected positive integers, got ab"),
        (lambda: RealNVP(None), "dim: expected positive integers, got None"),
        (lambda: Couplings(4, layers=0), "layers: expected"),
        (lambda: NICE(4, 2.0), "layers: expected"),
        (lambda: RealNVP(4, (2, 3)), "layers: expected"),
        (lambda: RealNVP(4, context_dim="a"), "context_dim: expected"),
        (lambda: RealNVP(4, hidden="ab"), "hidden: expected positive integers"),
        (lambda: RealNVP(4, dropout=2), "dropout: expected a finite number"),
        (lambda: RealNVP(4, dropout=True), "dropout: expected a finite number"),
        (lambda: RealNVP(4, partition=lambda n: half(6)), r"partition: expected masks of shape \(4,\), got \(6,\)"),
        (lambda: NICE(4, partition=lambda n: half(1)), "mask: .* one true and one false"),
        (lambda: RealNVP(image, partition=lambda s: half(32)), r"partition: .* \(2, 4, 4\), got \(32,\)"),
        (lambda: RealNVP(image, partition=half), "dim: expected"),
        (lambda: RealNVP((4, 3), conditioner=tiny), r"partition: there is none for events of shape \(4, 3\), give one"),
        (lambda: RealNVP((4, 3)), r"conditioner: there is none for events of shape \(4, 3\), give one"),
        (lambda: RealNVP(4, partition=half(4)), r"partition: expected what makes a mask, got tensor\("),
        (lambda: RealNVP(4, partition="half"), "partition: expected what makes a mask, got 'half'"),
        (lambda: RealNVP(4, partition=random_half), "partition: .* which says: .*'generator'"),
        (lambda: RealNVP(4, partition=lambda n: "half"), "mask: expected booleans .* got half"),
        (lambda: RealNVP(4, conditioner=mlp(2, 4)), "conditioner: expected what makes a module"),
        (lambda: RealNVP(4, conditioner="mlp"), "conditioner: expected what makes a module, got 'mlp'"),
        (lambda: RealNVP(4, conditioner=nn.Linear), "conditioner: .* which says: .*'hidden'"),
        (lambda: Coupling(half(4), conditioner=mlp(2, 4)), "conditioner: expected what makes a module, got Seq"),
        (lambda: Coupling(half(4), conditioner=lambda a, b: b), "conditioner: .* which makes 4"),
        (lambda: Coupling(half(4), conditioner=lambda a, b: nn.Linear(a, 5))(torch.zeros(3, 4)),
         r"conditioner: .* makes \(4,\) of a row, got shape \(3, 5\) of \(3, 2\)"),
        (lambda: Coupling(channel(image), conditioner=lambda a, b: nn.Conv2d(a, b, 3))(torch.zeros(image)),
         r"conditioner: .* makes \(2, 4, 4\) of a row, got shape \(1, 2, 2, 2\)"),
        (lambda: Coupling(half(4), AffineMap), "scalar_map: expected a scalar map, got the class AffineMap; call it"),
        (lambda: Coupling(half(4), nn.Tanh()), "scalar_map: expected a scalar map, got Tanh"),
        (lambda: Couplings(4, scalar_map="affine"), "scalar_map: expected a scalar map, got str"),
        (lambda: Couplings(4, scalar_map=None), "scalar_map: expected a scalar map, got NoneType"),
        (lambda: Coupling(None), "mask: expected booleans"),
        (lambda: Coupling("ab"), "mask: expected booleans .* got ab"),
        (lambda: Coupling([[True], [True, False]]), "mask: expected booleans"),
        (lambda: Coupling(torch.ones(2, dtype=torch.bool, device="meta")), "mask: expected booleans"),
        (lambda: Coupling(half(4).to(torch.uint8)), r"mask: expected booleans .* got \[1, 1, 0, 0\]"),
        (lambda: half(0), "dim: expected"),
        (lambda: half(2.5), "dim: expected"),
        (lambda: alternating("ab"), "dim: expected"),
        (lambda: alternating(image), "dim: expected"),
        (lambda: random_half(4, None), "generator: expected a torch.Generator, got None"),
        (lambda: random_half(4.0, seeded()), "event_shape: expected positive integers"),
        (lambda: channel(4), r"event_shape: expected \(channels, height, width\), got \(4,\)"),
        (lambda: checkerboard((4, 4)), r"event_shape: expected \(channels, height, width\)"),
        (lambda: RealNVP((1, 4, 4), 1, partition=channel), "mask: .* one true and one false"),
        (lambda: Coupling(checkerboard(image))(torch.zeros(2, 4, 3)), r"z: .*last dimensions \(2, 4, 4\)"),
    ],
)  # fmt: skip
def test_refusals_say_what_came_and_what_was_expected(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        wrong()
