"""Four representations of showers, there and back, against numbers made by hand."""

import math

import pytest
import torch
from helpers import showers_by_hand as by_hand
from torch.testing import assert_close

from flowcourse.shower_features import SETS, features, without
from flowcourse.shower_points import REPRESENTATIONS, represent
from flowcourse.showers import Showers

EVERY = pytest.mark.parametrize("kind", REPRESENTATIONS)
SINGLE = pytest.mark.parametrize("kind", REPRESENTATIONS[1:])
DEQUANTISED = pytest.mark.parametrize("kind", ["softplus", "log"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_max_normed_points_are_those_of_the_original():
    showers = by_hand()
    form = represent("max-normed", showers)
    points = form.encode(showers)
    assert form.dim == 65 and not form.dequantised
    n, e = showers.clusters, showers.deposits
    assert_close(points[:, 0], n.sum(-1) / 5000)
    assert_close(points[:, 1], e.sum(-1) / 2500)
    mean, sd = showers.cog.mean(0), showers.cog.std(0, correction=0)
    assert_close(points[:, 2:5], (showers.cog - mean) / sd)
    assert_close(points[:, 5:35], n / n.max(-1, keepdim=True).values)
    assert_close(points[:, 35:], e / e.max(-1, keepdim=True).values)
    for part in (points[:, 5:35], points[:, 35:]):
        assert ((part == 1).sum(-1) >= 1).all() and part.min() == 0
    assert_close(form.context(showers.energy)[:, 0], showers.energy / 100)


def test_fixed_norms_are_those_of_the_original():
    showers = by_hand()
    form = represent("fnorms", showers)
    points = form.encode(showers)
    assert form.dim == 62
    assert_close(points[:, 2:32], showers.clusters * 30 / 7864)
    assert_close(points[:, 32:], showers.deposits * 30 / 3400)
    assert_close(form.context(showers.energy)[:, 0], showers.energy / 127)


@DEQUANTISED
def test_dequantised_points_are_as_they_were_measured(kind):
    showers = by_hand(4000)
    form = represent(kind, showers, generator=generator(1))
    u = form.draw(4000, generator(2))
    points = form.encode(showers, u)
    n, e, u_n, u_e = (
        *(showers.clusters, showers.deposits),
        *u.split(30, -1),
    )
    if kind == "softplus":
        s_n, s_e = (t.std(0, correction=0) for t in (n, e))
        y = torch.cat([(n + u_n) / s_n, (e + 0.05 * s_e * u_e) / s_e], -1)
        v = y.expm1().log()
    else:
        v = torch.cat(
            [(n + u_n + 0.5).log(), (e + 0.05 * (u_e + 0.5)).log()], -1
        )
    # constants were learned with other noise, so that they differ by the noise
    for k in range(60):
        line = torch.stack([v[:, k], torch.ones_like(v[:, k])], -1)
        found = torch.linalg.lstsq(line, points[:, 2 + k, None])
        assert_close(line @ found.solution, points[:, 2 + k, None])
    learned = form.encode(showers, form.draw(4000, generator(1)))
    assert_close(learned.mean(0), torch.zeros(62).double(), atol=1e-9, rtol=0)
    assert_close(learned.std(0, correction=0), torch.ones(62).double())


@EVERY
@DTYPES
def test_showers_come_back(kind, dtype):
    """But for noise in energies, at most half a grain, and counts on the edge of their cells."""
    showers = by_hand(dtype=dtype)
    form = represent(kind, showers, generator=generator(1))
    u = form.draw(500, generator(2))
    again = form.decode(form.encode(showers, u), showers.energy)
    eps = 300 * torch.finfo(dtype).eps
    sure = torch.ones_like(showers.clusters, dtype=torch.bool)
    if u is not None:
        # a logarithm of 300 and a unit of it are in between
        edge = 50 * eps
        sure = (u[:, :30] > edge) & (u[:, :30] < 1 - edge)
    off = (again.clusters - showers.clusters).abs()
    assert (off[sure] == 0).all() and (off <= 1).all()
    assert sure.double().mean() > 0.98
    grain = form.grain[30:] if u is not None else torch.zeros(30, dtype=dtype)
    off = (again.deposits - showers.deposits).abs()
    same = again.clusters == showers.clusters
    assert (off <= grain / 2 + 50 * eps)[same].all()
    assert torch.equal(again.energy, showers.energy)
    assert_close(again.cog[:, :2], showers.cog[:, :2])
    # as far as energies are off, each with its lever
    layer = torch.arange(1, 31, dtype=dtype)
    lever = (layer - showers.cog[:, 2:]).abs()
    reach = (off * lever).sum(-1) / again.deposits.sum(-1)
    off = (again.cog - showers.cog)[:, 2].abs()
    assert (off <= 1.001 * reach + 50 * eps).all()
    assert {t.dtype for t in vars(again).values()} == {dtype}
    # an empty layer is empty again
    assert (again.deposits[again.clusters == 0] == 0).all()


@EVERY
def test_the_centre_comes_back_with_its_sign(kind):
    """The original took the mean away where it had been taken away before."""
    showers = by_hand()
    form = represent(kind, showers)
    again = form.decode(form.encode(showers), showers.energy)
    assert_close(again.cog[:, :2], showers.cog[:, :2])
    assert (again.cog[:, :2].mean(0) > 2.9).all()


@DEQUANTISED
def test_energies_are_right_on_average(kind):
    showers = by_hand(20)
    many = showers[torch.arange(20).repeat(2000)]
    form = represent(kind, showers, generator=generator(1))
    again = form.decode(form.encode(many, generator=generator(2)), many.energy)
    off = (again.deposits - many.deposits).unflatten(0, (2000, 20))
    # where nothing is clipped, the noise is uniform over a grain
    clear = showers.deposits > form.grain[30:] / 2
    error = form.grain[30:] / 12**0.5 / 2000**0.5
    assert (off.mean(0).abs() < 6 * error)[clear].all()
    assert (off.std(0) > 0.2 * form.grain[30:])[clear].all()
    assert clear.double().mean() > 0.7


@SINGLE
def test_log_determinants_are_those_of_autograd(kind):
    showers = by_hand()
    form = represent(kind, showers, generator=generator(1))
    points = form.encode(showers[:5], generator=generator(2))

    def features_of(point):
        """The way back, by hand, before anything is rounded or clipped."""
        layers = point[2:] * form.layer_sd + form.layer_mean
        y = {
            "fnorms": lambda v: v,
            "softplus": lambda v: v.exp().log1p(),
            "log": torch.exp,
        }[kind](layers)
        return torch.cat([form.cog_sd[:2] * point[:2], y * form.unit])

    jacobian = torch.func.vmap(torch.func.jacrev(features_of))(points)
    wanted = torch.linalg.slogdet(jacobian).logabsdet
    assert_close(form.ladj(points), wanted)
    if kind == "fnorms":
        hand = 30 * math.log(7864 / 30) + 30 * math.log(3400 / 30)
        hand += showers.cog[:, :2].std(0, correction=0).log().sum().item()
        assert_close(form.ladj(points), torch.full((5,), hand).double())
    smaller = represent(kind, showers, SETS[60], generator(1))
    points = smaller.encode(showers[:5], generator=generator(2))
    assert_close(smaller.ladj(points) - wanted + form.cog_sd[:2].log().sum(),
                 torch.zeros(5).double())  # fmt: skip


@EVERY
def test_what_a_flow_draws_becomes_showers(kind):
    """Whole counts, nothing below zero, and no energy without a cluster, whatever comes."""
    showers = by_hand()
    form = represent(kind, showers, generator=generator())
    points = 3 * torch.randn(500, form.dim, generator=generator(1)).double()
    found = form.decode(points, showers.energy)
    assert torch.equal(found.clusters, found.clusters.round())
    assert found.clusters.min() == 0 and found.deposits.min() == 0
    assert (found.deposits[found.clusters == 0] == 0).all()
    assert (found.clusters > 0).any() and (found.deposits > 0).any()
    assert features(found).isfinite().all()


def test_the_layers_of_max_normed_showers_add_up_to_the_totals():
    showers = by_hand()
    form = represent("max-normed", showers)
    points = form.encode(showers)
    points[:, 0] += 0.1
    points[:, 5] = 1.5  # clipped to 1
    points[:, 6] = -0.5  # and to 0
    found = form.decode(points, showers.energy)
    n = 5000 * points[:, 0]
    # each count is rounded by half a cluster at most
    assert ((found.clusters.sum(-1) - n).abs() <= 15).all()
    # to the nearest, so that as many are rounded up as down
    error = (30 / 12 / 500) ** 0.5
    assert (found.clusters.sum(-1) - n).mean().abs() < 6 * error
    assert (found.clusters[:, 1] == 0).all()
    assert_close(found.clusters[:, 0], found.clusters.amax(-1))
    empty = points.clone()
    empty[:, 5:] = -1.0
    found = form.decode(empty, showers.energy)
    assert (found.clusters == 0).all() and (found.deposits == 0).all()


@EVERY
def test_what_is_not_finite_stays_so(kind):
    """It is the judge's to count."""
    showers = by_hand()
    form = represent(kind, showers, generator=generator())
    points = form.encode(showers[:3], generator=generator())
    points[0, -60] = math.nan
    found = features(form.decode(points, showers.energy[:3]))
    assert not found[0].isfinite().all() and found[1:].isfinite().all()


@pytest.mark.parametrize("kind", ["fnorms", "softplus", "log"])
@pytest.mark.parametrize(
    "inputs", [SETS[62], SETS[60], without(0, 1), without(0, 1, 2)]
)
def test_reduced_sets_leave_out_the_centre(kind, inputs):
    showers = by_hand()
    form = represent(kind, showers, inputs, generator(1))
    whole = represent(kind, showers, without(0, 1), generator(1))
    u = form.draw(500, generator(2))
    points = form.encode(showers, u)
    used = torch.tensor(inputs)[2:]
    assert points.shape[-1] == form.dim == sum(inputs)
    assert torch.equal(points, whole.encode(showers, u)[:, used])
    found = form.decode(points, showers.energy)
    mean = showers.cog.mean(0)
    for i in range(2):
        wanted = showers.cog[:, i] if inputs[2 + i] else mean[i].expand(500)
        assert_close(found.cog[:, i], wanted)
    # along the beam the layers tell it, where it is not a feature
    layer = torch.arange(1, 31).double()
    e = found.deposits
    told = (e * layer).sum(-1) / e.sum(-1)
    z = showers.cog[:, 2] if inputs[4] else told
    assert_close(found.cog[:, 2], z)


@EVERY
def test_constants_come_with_a_checkpoint(kind):
    showers, others = by_hand(), by_hand(seed=1)
    one = represent(kind, showers, generator=generator(1))
    two = represent(kind, others[:100], generator=generator(2))
    u = one.draw(500, generator(3))
    assert not torch.equal(one.encode(showers, u), two.encode(showers, u))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.encode(showers, u), two.encode(showers, u))
    assert not [*one.parameters()]


@DEQUANTISED
def test_noise_is_drawn_from_the_generator_or_taken(kind):
    showers = by_hand(50)
    form = represent(kind, showers, generator=generator(1))
    u = form.draw(50, generator(2))
    assert u.shape == (50, 60) and u.min() > 0 and u.max() < 1
    drawn = form.encode(showers, generator=generator(2))
    assert torch.equal(drawn, form.encode(showers, u))
    assert not torch.equal(drawn, form.encode(showers, generator=generator(3)))
    zero = torch.zeros_like(u)
    # a hundred million draws have one that is 0
    zero = form.encode(showers, zero)
    assert zero.isfinite().all()
    with pytest.raises(ValueError, match="^noise: expected"):
        form.encode(showers, u[:, :30])


def test_noise_is_never_zero(monkeypatch):
    """Of zero there is no logarithm."""
    form = represent("softplus", by_hand(50), generator=generator())
    monkeypatch.setattr(
        torch, "rand", lambda shape, **kw: torch.zeros(shape).double()
    )
    assert (form.draw(3) > 0).all()


@EVERY
def test_a_column_that_never_varies_is_no_trouble(kind):
    showers = by_hand()
    clusters, deposits = showers.clusters.clone(), showers.deposits.clone()
    clusters[:, 3], deposits[:, 3] = 0.0, 0.0
    flat = Showers(
        showers.energy, clusters, deposits, torch.zeros(500, 3).double()
    )
    form = represent(kind, flat, generator=generator())
    points = form.encode(flat, generator=generator(1))
    assert points.isfinite().all()
    assert features(form.decode(points, flat.energy)).isfinite().all()


def test_a_shower_that_left_nothing_has_points():
    showers = by_hand()
    zeros = torch.zeros(2, 30).double()
    empty = Showers(
        showers.energy[:2], zeros, zeros, torch.zeros(2, 3).double()
    )
    for kind in REPRESENTATIONS:
        form = represent(kind, showers, generator=generator())
        points = form.encode(empty, generator=generator(1))
        assert points.isfinite().all()
        found = form.decode(points, empty.energy)
        assert (found.clusters == 0).all() and (found.deposits == 0).all()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda s: represent("maxnormed", s), "^kind: expected one of 'max-n"),
        (lambda s: represent("log", s[:1]), "^showers: expected at least 2"),
        (lambda s: represent("log", s.clusters), "^showers: expected Showers"),
        (lambda s: represent("fnorms", s, SETS[65]), "^inputs: .*no totals"),
        (lambda s: represent("log", s, without(0)), "^inputs: .*no totals"),
        (
            lambda s: represent("max-normed", s, without(5)),
            "^inputs: expected clusters and energy of all layers",
        ),
        (lambda s: represent("fnorms", s, (True,)), "^inputs: expected 65"),
        (
            lambda s: represent("max-normed", s, SETS[62]).decode(
                torch.zeros(500, 62).double(), s.energy
            ),
            "^inputs: expected both totals",
        ),
        (
            lambda s: represent("fnorms", s).decode(
                torch.zeros(3, 61).double(), s.energy[:3]
            ),
            "^points: expected shape",
        ),
        (
            lambda s: represent("fnorms", s).decode(
                torch.zeros(3, 62).double(), s.energy
            ),
            "^energy: expected shape",
        ),
        (lambda s: represent("fnorms", s).encode(s.cog), "^showers: expected"),
        (lambda s: represent("log", s).ladj(s.cog), "^points: expected shape"),
    ],
)
def test_a_wrong_argument_is_named(made, told):
    with pytest.raises(ValueError, match=told):
        made(by_hand())
