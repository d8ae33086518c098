"""ShowerFlow: its forms, its numbers of parameters, its conventions, and what was mended."""

import copy
import math
import pickle

import pyro.distributions.transforms as T
import pytest
import torch
from helpers import shaken
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from flowcourse.bases import DiagonalGaussian
from flowcourse.core import StandardNormal
from flowcourse.coupling import Coupling
from flowcourse.elementwise import Elementwise
from flowcourse.linear import Permutation
from flowcourse.shower import PATTERNS, ShowerFlow, TanhAffineMap, partial_exp
from flowcourse.spline_maps import RationalLinearSplineMap

versions = pytest.mark.parametrize("version", PATTERNS)
SMALL = dict(num_blocks=1, d=8, width=1, spline_width=1)


def size(module):
    return sum(p.numel() for p in module.parameters())


# --- numbers of parameters, to the last one ---

BLOCKS = {
    (65, 1): 3_523_591,
    (65, 4): 3_536_071,
    (62, 1): 3_204_718,
    (62, 4): 3_216_622,
    (60, 1): 3_001_740,
    (60, 4): 3_013_260,
}


@pytest.mark.parametrize(("d", "context_dim"), BLOCKS)
@pytest.mark.parametrize("version", ["original", "alt1", "alt3", "log1"])
def test_a_block_has_as_many_parameters_as_the_original(
    version, d, context_dim
):
    flow = ShowerFlow(version, 1, d, context_dim)
    assert size(flow) == BLOCKS[d, context_dim]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(num_blocks=2, d=62, context_dim=4), 6_433_244),
        (dict(num_blocks=10, d=62, context_dim=4), 32_166_220),
        (dict(num_blocks=2, d=65, context_dim=4), 7_072_142),
        (dict(num_blocks=10, d=65, context_dim=4), 35_360_710),
        (dict(version="alt2", num_blocks=1, d=65), 2_929_296),
        (dict(version="original", num_blocks=8, d=60), 8 * 3_001_740),
        # and a location and a scale
        (dict(num_blocks=1, d=65, train_base=True), 3_523_591 + 2 * 65),
        # the network of a true coupling by splines sees 31 numbers more
        (
            dict(version="spline", num_blocks=1, d=62),
            3_204_718 - (248 + 1) * 31 * 62 + (248 + 1) * 31 * 31 + 31 * 248,
        ),
    ],
)
def test_whole_flows_have_as_many_too(settings, wanted):
    assert size(ShowerFlow(**settings)) == wanted


def test_ten_blocks_are_seventy_trained_maps():
    flow = ShowerFlow("alt1", 10, width=1, spline_width=1)
    assert sum(size(f) > 0 for f in flow.bijection.bijections) == 70


# --- the order of the maps ---

ROWS = {
    "original": "A P A P A P P S A P A P A P",
    "alt1": "A P A P A P S P A P A P A P",
    "alt2": "A P A P A P A P A P A P",
    "alt3": "A P A P A P S P A P A P A P",
    "log1": "A P A P A P S P A P A P A P",
    "spline": "A P A P A P C P A P A P A P",
}


def letter(f):
    if isinstance(f, Coupling):
        return "A" if isinstance(f.scalar_map, TanhAffineMap) else "C"
    return {Permutation: "P", Elementwise: "S"}[type(f)]


@versions
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_maps_stand_in_the_order_of_the_form(version, num_blocks):
    flow = ShowerFlow(version, **SMALL | {"num_blocks": num_blocks})
    maps = [*flow.bijection.bijections]
    if version in ("alt3", "log1"):
        # at the end, and once
        assert "ExpMap" in repr(maps.pop())
    if version == "alt3":
        num_blocks = 1  # whatever was asked for
    row = (ROWS[version].replace(" ", "")) * num_blocks
    assert "".join(map(letter, maps)) == row


def test_widths_and_units_are_those_of_the_original():
    flow = ShowerFlow("alt1", 1, 65, 4)
    coupling, _, _, _, _, _, spline = flow.bijection.bijections[:7]
    assert int(coupling.mask.sum()) == 32 and coupling.mask[:32].all()
    wide = [m for m in coupling.modules() if isinstance(m, nn.Linear)]
    shapes = [(m.in_features, m.out_features) for m in wide]
    assert shapes == [(36, 650), (650, 650), (650, 66)]
    assert sum(isinstance(m, nn.ReLU) for m in coupling.modules()) == 2
    wide = [m for m in spline.modules() if isinstance(m, nn.Linear)]
    shapes = [(m.in_features, m.out_features) for m in wide]
    assert shapes == [(4, 260), (260, 260), (260, 65 * 31)]
    (scalar_map,) = spline.maps
    assert isinstance(scalar_map, RationalLinearSplineMap)
    assert (scalar_map.bins, scalar_map.bound) == (8, 3.0)
    small = ShowerFlow("alt1", 1, 62, width=2, spline_width=1)
    rows = {m.out_features for m in small.modules() if hasattr(m, "bias")}
    assert rows == {124, 62, 62 * 31}


# --- conventions ---


def test_a_coupling_is_that_of_the_original():
    """The first part passes; -tanh of the second half of the outputs is a log-scale."""
    flow = shaken(ShowerFlow("alt2", 1, 7, 2, width=1).double())
    f = flow.bijection.bijections[0]
    z, context = torch.randn(20, 7).double(), torch.randn(20, 2).double()
    z1, z2 = z[:, :3], z[:, 3:]
    raw, shift = (
        f.conditioner(torch.cat([z1, context], -1))
        .unflatten(-1, (4, 2))
        .unbind(-1)
    )
    log_scale = -torch.tanh(raw)
    x, ladj = f.forward(z, context)
    assert_close(x, torch.cat([z1, log_scale.exp() * z2 + shift], -1))
    assert_close(ladj, log_scale.sum(-1))


def test_a_permutation_is_that_of_pyro():
    flow = ShowerFlow("alt1", **SMALL)
    f = flow.bijection.bijections[1]
    z = torch.randn(5, 8)
    assert torch.equal(f.forward(z)[0], T.Permute(f.order)(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_lies_between_one_over_e_and_e(dtype):
    raw = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9], dtype=dtype)
    theta = torch.stack([raw, torch.full_like(raw, 5.0)], -1)
    f, one = TanhAffineMap(), torch.ones_like(raw)
    x, log_slope = f.forward(one, theta)
    assert_close(log_slope, -raw.tanh())
    assert_close(x, (-raw.tanh()).exp() + 5)
    z, back = f.inverse(x, theta)
    assert_close(z, one)
    assert_close(back, raw.tanh())


def test_the_spline_of_the_context_couples_nothing():
    """Its Jacobian is diagonal, exactly; outside of (-3, 3) it is the identity."""
    f = shaken(ShowerFlow("alt1", **SMALL)).bijection.bijections[6]
    z, context = 2 * torch.randn(8), torch.rand(1)
    jacobian = torch.func.jacrev(lambda z: f.forward(z, context)[0])(z)
    assert torch.equal(jacobian, jacobian.diagonal().diag())
    far = torch.full((8,), 3.001)
    assert torch.equal(f.forward(far, context)[0], far)
    other = f.forward(z, context + 1)[0]
    assert not torch.equal(other, f.forward(z, context)[0])


def test_the_coupling_by_a_spline_couples():
    f = shaken(ShowerFlow("spline", **SMALL)).bijection.bijections[6]
    z, context = torch.rand(8), torch.rand(1)
    jacobian = torch.func.jacrev(lambda z: f.forward(z, context)[0])(z)
    assert torch.equal(jacobian[:4, :4], torch.eye(4))
    assert (jacobian[4:, :4] != 0).all()
    moved = jacobian[4:, 4:]
    assert torch.equal(moved, moved.diagonal().diag())


# --- the exponentials at the end ---


@pytest.mark.parametrize(
    ("version", "d", "lengths"),
    [
        ("alt3", 65, [2, 3, 60]),
        ("alt3", 62, [2, 60]),
        ("alt3", 60, [60]),
        ("alt3", 8, [8]),
        ("log1", 65, [5, 60]),
        ("log1", 62, [2, 60]),
    ],
)
def test_exponentials_lie_where_the_original_has_them(version, d, lengths):
    f = partial_exp(d, version)
    assert f.lengths == lengths
    low = {"alt3": -0.1, "log1": -1e-6}[version]
    z = torch.randn(50, d).double()
    x, ladj = f.forward(z)
    moved = torch.arange(d) >= d - 60
    if version == "alt3" and d == 65:
        moved[:2] = True
    assert_close(x, torch.where(moved, z.exp() + low, z))
    assert_close(ladj, torch.where(moved, z, 0.0).sum(-1))
    assert_close(f.inverse(x)[0], z)
    ends = f.codomain.base_constraint
    parts = ends.cseq if hasattr(ends, "cseq") else [ends]
    found = [getattr(part, "lower_bound", None) for part in parts]
    ranges = 2 if (version, d) == ("alt3", 65) else 1
    assert [end for end in found if end is not None] == [low] * ranges


def test_points_below_the_end_have_no_density():
    flow = ShowerFlow("log1", **SMALL)
    context = torch.rand(2, 1)
    x = flow.sample(context=context)
    x[0, 3] = -1e-3
    found = flow.log_prob(x, context)
    assert found[0] == -math.inf and found[1].isfinite()
    assert not constraints.independent(flow.bijection.codomain, 0).check(x)[0]


# --- the maps as such ---


@versions
@pytest.mark.parametrize("d", [60, 62, 65])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-9)]
)
def test_there_and_back(version, d, dtype, most):
    """A trained flow's points come back, those beyond the box of the splines too."""
    flow = ShowerFlow(version, 2, d, width=1, spline_width=1)
    f = shaken(flow, 0.05).to(dtype).bijection
    context = torch.rand(100, 1, dtype=dtype)
    z = torch.randn(100, d, dtype=dtype)
    x, ladj = f.forward(z, context)
    again, back = f.inverse(x, context)
    x_again, _ = f.forward(again, context)
    assert ((x_again - x).abs() / (1 + x.abs())).max() <= most
    assert (again - z).abs().max() <= most
    assert (ladj + back).abs().max() <= most * (1 + ladj.abs().max())
    assert not torch.equal(x, z) and ladj.std() > 0


@versions
def test_log_determinants_are_those_of_autograd(version):
    f = shaken(ShowerFlow(version, **SMALL), 0.3).double().bijection
    z, context = torch.randn(10, 8).double(), torch.rand(10, 1).double()
    x, ladj = f.forward(z, context)
    for way, t, told in (
        (f.forward, z, ladj),
        (f.inverse, x, f.inverse(x, context)[1]),
    ):
        jacobian = torch.func.vmap(
            torch.func.jacrev(lambda t, c, way=way: way(t, c)[0])
        )(t, context)
        wanted = torch.linalg.slogdet(jacobian).logabsdet
        assert_close(told, wanted, rtol=1e-6, atol=1e-6)


def test_a_new_flow_permutes_and_does_nothing_else():
    f = ShowerFlow("alt1", **SMALL).bijection
    z = torch.randn(5, 8)
    x, ladj = f.forward(z, torch.rand(5, 1))
    assert_close(x.sort(-1).values, z.sort(-1).values)
    assert_close(ladj, torch.zeros(5), atol=1e-5, rtol=0)
    order = torch.stack([(x[0] == t).nonzero().squeeze() for t in z[0]])
    assert order.tolist() != [*range(8)]


# --- what was mended ---


def test_torch_s_random_state_stays_as_it_is():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ShowerFlow("original", **SMALL)
    ShowerFlow("spline", **SMALL, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    # which the original's seed_torch did not leave in anybody's hands
    assert torch.initial_seed() == 5


def numbers(flow):
    return torch.cat([t.flatten().double() for t in flow.state_dict().values()])


@versions
def test_a_flow_follows_from_its_generator_alone(version):
    def made(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        generator = torch.Generator().manual_seed(seed)
        return numbers(ShowerFlow(version, **SMALL, generator=generator))

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    usual = [numbers(ShowerFlow(version, **SMALL)) for _ in range(2)]
    assert torch.equal(*usual) and torch.equal(usual[0], made(42))
    assert len({*numbers(ShowerFlow(version, **SMALL)).tolist()}) > 100


def test_blocks_have_permutations_and_weights_of_their_own():
    flow = ShowerFlow("alt1", **SMALL | {"num_blocks": 4})
    maps = [*flow.bijection.bijections]
    orders = {tuple(f.order.tolist()) for f in maps if letter(f) == "P"}
    first = {
        f.conditioner[0].weight.sum().item() for f in maps if letter(f) == "A"
    }
    assert len(orders) > 20 and len(first) == 24


@versions
def test_a_checkpoint_brings_the_permutations(version, tmp_path):
    one, two = (
        shaken(ShowerFlow(version, **SMALL, generator=g))
        for g in map(torch.Generator().manual_seed, (1, 2))
    )
    z, context = torch.randn(5, 8), torch.rand(5, 1)
    wanted = one.bijection.forward(z, context)
    assert not torch.equal(two.bijection.forward(z, context)[0], wanted[0])
    torch.save(one.state_dict(), tmp_path / "flow.pt")
    two.load_state_dict(torch.load(tmp_path / "flow.pt"))
    for copied in (two, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        found = copied.bijection.forward(z, context)
        assert all(torch.equal(*pair) for pair in zip(found, wanted))
    names = [n for n, _ in one.named_buffers() if n.endswith("order")]
    assert len(names) >= 6


def test_a_trained_base_keeps_its_scale_above_zero():
    flow = ShowerFlow("alt1", **SMALL, train_base=True)
    assert isinstance(flow.base, DiagonalGaussian)
    assert torch.equal(flow.base.loc, torch.zeros(8))
    assert_close(flow.base.scale, torch.ones(8))
    flow.base.raw_scale.data.fill_(-1e3)
    assert (flow.base.scale > 0).all()
    plain = ShowerFlow("alt1", **SMALL).base
    assert isinstance(plain, StandardNormal)


@pytest.mark.parametrize("context_dim", [0, 1, 4])
def test_a_flow_has_as_much_context_as_it_is_told(context_dim):
    flow = ShowerFlow("alt1", **SMALL, context_dim=context_dim)
    assert flow.context_dim == context_dim and flow.event_shape == (8,)
    context = torch.rand(5, context_dim) if context_dim else None
    x = flow.sample((3,), context) if context_dim else flow.sample((3, 5))
    assert flow.log_prob(x, context).shape == (3, 5)


def test_a_flow_takes_torch_s_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    try:
        flow = ShowerFlow("alt3", **SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    with torch.device("meta"):
        flow = ShowerFlow("alt1", **SMALL)
    assert {t.device.type for t in flow.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(version="alt9"), "^name: expected one of 'original', 'alt1'"),
        (dict(num_blocks=0), "^num_blocks: .*at least 1, got 0"),
        (dict(d=1), "^d: .*at least 2, got 1"),
        (dict(context_dim=-1), "^context_dim: .*at least 0, got -1"),
        (dict(width=0), "^width: .*at least 1, got 0"),
        (dict(spline_width=1.5), "^spline_width: .*got 1.5"),
        (dict(train_base=1), "^train_base: expected True or False, got 1"),
        (dict(generator=42), "^generator: expected a torch.Generator"),
    ],
)
def test_a_wrong_argument_is_named(settings, told):
    with pytest.raises(ValueError, match=told):
        ShowerFlow(**settings)
