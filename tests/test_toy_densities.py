"""The toys: mass, entropy, draws and density agree, also far out."""

import math

import numpy as np
import pytest
import torch

from flowcourse.plots import grid_points
from flowcourse.toy_densities import (
    EightGaussians,
    Moons,
    Pinwheel,
    Rings,
    _blurred,
    _circle,
    _nodes,
    toys,
)


def check_toy(toy):
    """Complain where mass, entropy, draws and density do not agree."""
    bins, low, high = 240, -6.0, 6.0
    cell = ((high - low) / bins) ** 2
    points = grid_points(low, high, bins, dtype=torch.float64)
    log_p = torch.cat([toy.log_prob(part) for part in points.split(20)])
    p = log_p.exp()
    mass, entropy = (
        (p.sum() * cell).item(),
        (torch.special.entr(p).sum() * cell).item(),
    )
    assert abs(mass - 1) < 1e-3, f"mass {mass}"
    assert abs(entropy - toy.entropy) < 1e-3, f"entropy {entropy}"
    x = toy.sample(100_000, torch.Generator().manual_seed(0), torch.float64)
    # 24 x 24 cells of a histogram; the expected count sums the density over 10
    # x 10 fine cells.
    index = ((x - low) / (high - low) * 24).floor().long().clamp(0, 23)
    count = torch.bincount(
        index[:, 1] * 24 + index[:, 0], minlength=576
    ).double()
    coarse = p.reshape(24, 10, 24, 10).sum((1, 3)).flatten() * cell
    expected = coarse * len(x)
    seen = expected > 5
    chi2 = ((count - expected)[seen].square() / expected[seen]).sum().item()
    freedom = int(seen.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), (
        f"chi2 {chi2} for {freedom} cells"
    )


@pytest.mark.parametrize("name", toys)
def test_toy(name):
    check_toy(toys[name])


def test_the_check_rejects():
    class Heavy(Rings):
        def _log_prob(self, x):
            return super()._log_prob(x) + 0.01

    class Wide(EightGaussians):
        def _place(self, u, e):
            return super()._place(u, 1.1 * e)

    class Lopsided(Moons):
        def _place(self, u, e):
            return super()._place(u**1.1, e)

    class Vague(Pinwheel):
        entropy = 2.33

    for toy, complaint in (
        (Heavy, "mass"),
        (Wide, "chi2"),
        (Lopsided, "chi2"),
        (Vague, "entropy"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            check_toy(toy())


@pytest.mark.parametrize("name", toys)
def test_toys_keep_type_and_shape_and_the_global_generator(name):
    toy = toys[name]
    before = torch.get_rng_state()
    a, b = (
        toy.sample(7, torch.Generator().manual_seed(1), torch.float64)
        for _ in range(2)
    )
    assert torch.equal(a, b) and a.dtype == torch.float64 and a.shape == (7, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert toy.sample(0).shape == (0, 2)
    assert toy.sample(np.int64(3)).shape == (3, 2)
    log_p = toy.log_prob(a.expand(3, 7, 2))
    assert log_p.shape == (3, 7) and log_p.dtype == torch.float64
    assert toy.log_prob(a[0].float()).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(toys) - {"checkerboard"}))
def test_log_density_and_slope_are_finite_and_right_far_out(name):
    x = torch.tensor(
        [[0.0, 0.0], [30.0, -40.0], [1e-3, 0.0], [2.0, 2.0]], requires_grad=True
    )
    toys[name].log_prob(x).sum().backward()
    assert toys[name].log_prob(x).isfinite().all() and x.grad.isfinite().all()
    y = torch.tensor(
        [[1.3, -0.4], [0.2, 2.1]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(toys[name].log_prob, y)


@pytest.mark.parametrize("name", toys)
def test_density_is_zero_at_infinity_and_unknown_at_nan(name):
    inf, nan = math.inf, math.nan
    far = torch.tensor([[inf, 0.0], [0.0, -inf], [inf, inf]])
    assert (toys[name].log_prob(far) == -inf).all()
    unknown = torch.tensor([[nan, 0.0], [0.5, nan], [nan, inf]])
    assert toys[name].log_prob(unknown).isnan().all()


def test_every_draw_from_the_board_has_a_density():
    x = toys["checkerboard"].sample(3_000_000, torch.Generator().manual_seed(0))
    assert (toys["checkerboard"].log_prob(x) == -math.log(32)).all()


def test_a_ring_is_its_own_quadrature():
    points, sd = (
        _circle(torch.arange(4000) * 2 * math.pi / 4000),
        Rings.sd,
    )
    circles = torch.cat([radius * points for radius in Rings.radii])
    x = toys["rings"].sample(50, torch.Generator().manual_seed(0)).double()
    by_sum = _blurred(
        x, circles.double(), torch.full((16000,), -math.log(16000)), sd
    )
    torch.testing.assert_close(
        toys["rings"].log_prob(x), by_sum, atol=1e-4, rtol=0
    )


def test_a_default_device_does_not_reach_a_toy():
    p = toys["moons"].sample(5, torch.Generator().manual_seed(0))
    values = {name: toy.log_prob(p) for name, toy in toys.items()}
    _nodes.cache_clear()
    with torch.device("meta"):
        again = {name: toy.log_prob(p) for name, toy in toys.items()}
    for name in toys:
        assert torch.equal(again[name], values[name]), name


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: toys["moons"].sample(-1), "n"),
        (lambda: toys["moons"].sample(2.0), "n"),
        (lambda: toys["moons"].sample("2"), "n"),
        (lambda: toys["moons"].sample(2, 0), "generator"),
        (lambda: toys["moons"].sample(2, dtype=torch.int64), "dtype"),
        (lambda: toys["moons"].sample(2, dtype="float32"), "dtype"),
        (lambda: toys["moons"].sample(2, dtype=torch.zeros(2)), "dtype"),
        (lambda: toys["moons"].sample(2, device="gpu"), "device"),
        (lambda: toys["moons"].sample(2, device=[0]), "device"),
        (lambda: toys["moons"].log_prob([[0.0, 0.0]]), "x"),
        (lambda: toys["moons"].log_prob(torch.zeros(2, 2).long()), "x"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=f"^{text}: "):
        call()
