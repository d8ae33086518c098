"""Energies, chains, what weights tell, and flows judged by the true divergence."""

import copy
import math
import time

import numpy as np
import pytest
import torch
from helpers import check_under_a_default_device, noise, shaken
from torch.testing import assert_close

from flowcourse.autoregressive import IAF
from flowcourse.bases import DiagonalGaussian
from flowcourse.core import Flow, StandardNormal
from flowcourse.coupling import RealNVP
from flowcourse.elementwise import AffineMap, Elementwise
from flowcourse.objectives import Annealing, ReverseKL
from flowcourse.planar import Planar
from flowcourse.plots import grid_points
from flowcourse.quadrature import total_mass
from flowcourse.testing import expect_fail
from flowcourse.trainer import fit
from flowcourse.variational import (
    Chains,
    Ridges,
    SplitRing,
    assess,
    energies,
    metropolis_hastings,
    wall,
)

NAMES = list(energies)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(energy, n=1601, margin=4.0):
    """Points, log-density and the area of a cell, of a fine grid in float64."""
    side = torch.linspace(
        -energy.window - margin, energy.window + margin, n, dtype=torch.float64
    )
    z = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    return z, energy.log_density(z), (side[1] - side[0]).item() ** 2


def paper(name, z1, z2):
    """U as printed, in NumPy."""
    if name.startswith("U1"):
        radius, side = (2, 0.6) if name == "U1" else (4, 0.8)
        ring = 0.5 * ((np.hypot(z1, z2) - radius) / 0.4) ** 2
        left, right = (np.exp(-0.5 * ((z1 + c) / side) ** 2) for c in (2, -2))
        return ring - np.log(left + right)
    if name == "four-gaussians":
        total = 0
        for c1, c2, v1, v2 in (
            (0, 3, 0.2, 0.4), (0, -3, 0.2, 0.4), (3, 0, 0.4, 0.2), (-3, 0, 0.4, 0.2)
        ):  # fmt: skip
            total += np.exp(-0.5 * ((z1 - c1) ** 2 / v1 + (z2 - c2) ** 2 / v2))
        return -np.log(total)
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    beyond = 0.5 * (max(abs(z1) - 4, 0) / 0.4) ** 2
    if name == "U2":
        return 0.5 * ((z2 - w1) / 0.4) ** 2 + beyond
    first, drop = (0.35, w2) if name == "U3" else (0.4, w3)
    ridges = np.exp(-0.5 * ((z2 - w1) / first) ** 2)
    return beyond - np.log(
        ridges + np.exp(-0.5 * ((z2 - w1 + drop) / 0.35) ** 2)
    )


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_those_of_the_paper(name):
    # Not far out, where the printed form takes the logarithm of an underflow.
    for z in (
        grid_points(-4.6, 4.6, 12, torch.float64).reshape(-1, 2) + 0.01
    ).tolist():
        found = energies[name].log_density(torch.tensor(z, dtype=torch.float64))
        assert found.item() == pytest.approx(
            -paper(name, *z), rel=1e-9, abs=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
def test_log_normaliser_is_that_of_quadrature(name):
    energy = energies[name]
    mass = total_mass(energy.log_prob, 2, tol=1e-5, dtype=torch.float64)
    assert mass.item() == pytest.approx(1, abs=3e-5)
    known = {"U1": 1.8775, "U2": 2.2002, "U3": 2.7598, "U4": 2.8288}
    known |= {"U1-radius-4": 2.3133, "four-gaussians": 1.9613}
    assert energy.log_normaliser == pytest.approx(known[name], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_and_draws_are_those_of_quadrature(name):
    energy = energies[name]
    z, log_p, cell = grid(energy)
    p = (log_p - energy.log_normaliser).exp() * cell
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    entropy = -(p * (log_p - energy.log_normaliser)).sum().item()
    assert energy.entropy == pytest.approx(entropy, abs=2e-4)
    n = 100_000
    x = energy.sample(n, seeded())
    assert x.shape == (n, 2) and x.dtype == torch.float32
    surprise = -energy.log_prob(x)
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / math.sqrt(n)
    for part in (
        lambda t: t[..., 0],
        lambda t: t[..., 1],
        lambda t: t.norm(dim=-1),
    ):
        for power in (1, 2):
            exact = (p * part(z) ** power).sum()
            drawn = part(x.double()) ** power
            assert (
                abs(drawn.mean() - exact)
                < 4 * drawn.std() / math.sqrt(n) + 1e-4
            )
    corners = p.unflatten(0, (-1,)) * ((z[..., 0] > 0) == (z[..., 1] > 0.5))
    share = ((x[:, 0] > 0) == (x[:, 1] > 0.5)).double().mean()
    # and the grid's cells
    assert abs(share - corners.sum()) < 4 * 0.5 / math.sqrt(n) + 2e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_keep_dtype_and_shape_and_are_smooth(name, dtype):
    energy = energies[name]
    z = torch.tensor(
        [[0.0, 0.0], [4.0, 0.3], [-50.0, 80.0], [300.0, -2.0]], dtype=dtype
    )
    z.requires_grad_()
    log_p = energy.log_prob(z)
    assert (
        log_p.dtype == dtype and log_p.shape == (4,) and log_p.isfinite().all()
    )
    gradient = torch.autograd.grad(log_p.sum(), z)[0]
    assert gradient.isfinite().all()
    # no flat floor
    assert (log_p[2:] < -1000).all() and (gradient[2:].norm(dim=-1) > 10).all()
    assert energy.log_prob(z.detach().expand(3, 1, 4, 2)).shape == (3, 1, 4)
    rows = torch.vmap(energy.log_density)(z.detach())
    assert_close(rows, energy.log_density(z.detach()))
    assert energy.sample(7, seeded(), dtype=dtype).dtype == dtype
    assert_close(energy.sample(9, seeded(1)), energy.sample(9, seeded(1)))
    with expect_fail(ValueError, contains="(*batch, 2)"):
        energy.log_density(torch.zeros(3))
    assert f"{energy.log_normaliser:.4f}" in repr(energy)


def test_the_wall_is_smooth_and_stands_where_it_should():
    z = torch.tensor([-4.4, -4.0, 0.0, 4.0, 4.8])
    assert_close(wall(z), torch.tensor([0.5, 0.0, 0.0, 0.0, 2.0]))
    assert_close(
        wall(torch.tensor(5.0), edge=3.0, width=1.0), torch.tensor(2.0)
    )


def test_an_unknown_energy_is_answered_with_the_names():
    with expect_fail(ValueError, contains="'U1'"):
        energies["U5"]


@pytest.fixture(scope="module")
def ring_chains():
    energy = energies["U1-radius-4"]
    start = 3 * torch.randn(1000, 2, generator=seeded(1))
    return metropolis_hastings(
        energy.log_density,
        start,
        500,
        burn_in=300,
        target=0.3,
        generator=seeded(2),
    )


def test_chains_agree_with_quadrature(ring_chains):
    z, log_p, _ = grid(energies["U1-radius-4"])
    radius = (log_p.exp() * z.norm(dim=-1)).sum() / log_p.exp().sum()
    states = ring_chains.states
    assert states.shape == (500, 1000, 2)  # 5e5 states
    assert abs((states[..., 0] > 0).double().mean().item() - 0.5) <= 0.05
    assert abs(states.double().norm(dim=-1).mean() - radius) <= 0.02
    assert ring_chains.acceptance == pytest.approx(0.3, abs=0.02)
    assert ring_chains.step > 0.5
    assert "1000 chains of 500 states" in repr(ring_chains)


def test_chains_on_a_gaussian_have_its_moments():
    scale = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    start = scale * noise(100, 3)
    found = metropolis_hastings(
        lambda z: -0.5 * (z / scale).square().sum(-1),
        start,
        5000,
        step=0.8,
        generator=seeded(),
    )
    assert found.states.dtype == torch.float64
    error = scale / found.ess.sqrt()
    assert (found.states.flatten(0, 1).mean(0).abs() < 4 * error).all()
    sd = found.states.flatten(0, 1).std(0)
    assert ((sd - scale).abs() < 4 * error).all()
    assert (found.r_hat < 1.02).all()


def test_a_chain_that_starts_right_stays_right():
    energy = energies["four-gaussians"]
    start = energy.sample(100_000, seeded())
    after = metropolis_hastings(
        energy.log_density, start, 1, step=1.5, generator=seeded(1)
    )
    for x in (start, after.states[0]):
        share = (x[:, 0] > x[:, 1]).double().mean()
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(x))
        surprise = -energy.log_prob(x)
        assert abs(
            surprise.mean() - energy.entropy
        ) < 4 * surprise.std() / math.sqrt(len(x))
    moved = (after.states[0] != start).any(-1).double().mean().item()
    assert (
        after.acceptance == pytest.approx(moved, abs=1e-6) and 0.1 < moved < 0.5
    )


def test_log_space_survives_where_densities_underflow():
    # 50 and 49 standard deviations out, both densities are zero and their ratio
    # is 0/0
    def log_density(z):
        return -0.5 * z.square().sum(-1)

    start = torch.full((50, 1), 50.0)
    assert log_density(start).exp().max() == 0
    found = metropolis_hastings(
        log_density, start, 500, step=1.0, generator=seeded()
    )
    assert found.states[-1].abs().max() < 10 and found.states.isfinite().all()


def test_points_of_density_zero_or_nan_are_never_entered():
    def log_density(z):
        inside = torch.where(z[:, 0] < 1, 0.0, -math.inf)
        return torch.where(z[:, 0] > -1, inside, math.nan)

    with pytest.warns(UserWarning, match="nan at [0-9]+ of 60000") as caught:
        found = metropolis_hastings(
            log_density, torch.zeros(200, 1), 300, generator=seeded()
        )
    assert len(caught) == 1  # for all of them
    assert caught[0].filename == __file__
    assert found.states.abs().max() < 1
    # uniform on (-1, 1)
    assert found.states.var().item() == pytest.approx(1 / 3, abs=0.03)


def test_proposals_that_are_nan_are_counted_in_the_burn_in_too():
    calls = []

    def log_density(z):
        calls.append(len(calls))
        worth = torch.zeros(len(z))
        if calls[-1] in (2, 150, 204):
            worth[:3] = math.nan
        return worth

    with pytest.warns(UserWarning, match="nan at 9 of 1050 proposals"):
        metropolis_hastings(log_density, torch.zeros(5, 1), 110, burn_in=100)


def test_a_density_that_is_infinite_somewhere_is_refused():
    def log_density(z):
        return torch.where(z[:, 0] > 1, math.inf, 0.0)

    with expect_fail(ValueError, contains="infinite where 7 of 7"):
        metropolis_hastings(
            log_density, torch.zeros(7, 1), 100, generator=seeded()
        )


WRONG_DENSITIES = {
    "summed over the batch": lambda z: -0.5 * z.square().sum(),
    "not summed": lambda z: -0.5 * z.square(),
    "kept": lambda z: -0.5 * z.square().sum(-1, keepdim=True),
    "a number": lambda z: -1.0,
    "none": lambda z: None,
}


@pytest.mark.parametrize("name", WRONG_DENSITIES)
def test_a_log_density_gives_one_number_for_each_point(name):
    wrong = WRONG_DENSITIES[name]
    for chains in (1, 2, 5):
        with expect_fail(ValueError, contains="log_density: expected one"):
            metropolis_hastings(wrong, torch.zeros(chains, 2), 3)
    with expect_fail(ValueError, contains="log_prob: expected one number"):
        assess(gaussian_flow(0.0, 1.0), wrong, 100)


def test_thinning_burn_in_and_noise_in_blocks_change_only_what_is_kept():
    log_density, start = energies["U2"].log_density, torch.zeros(3, 2)

    def run(steps, **options):
        return metropolis_hastings(
            log_density, start, steps, generator=seeded(), **options
        ).states

    full = run(230)
    assert full.shape == (230, 3, 2)
    assert_close(run(230, thin=7), full[6::7][: 230 // 7])
    assert_close(run(130, burn_in=100), full[100:])
    assert not torch.equal(full[0], full[-1])


def test_tuning_stops_with_the_burn_in():
    for step in (0.01, 50.0):
        found = metropolis_hastings(
            energies["U1"].log_density,
            torch.randn(500, 2, generator=seeded()),
            200,
            step=step,
            burn_in=400,
            target=0.4,
            generator=seeded(),
        )
        assert found.acceptance == pytest.approx(0.4, abs=0.03)
    fixed = metropolis_hastings(
        energies["U1"].log_density,
        torch.randn(9, 2, generator=seeded()),
        10,
        step=0.7,
        burn_in=5,
    )
    assert fixed.step == pytest.approx(0.7)


def test_tuning_settles():
    # With changes that shrink as t^-0.6, steps of several runs agree to some
    # 5 %; with changes that do not, to a third.
    logs = [
        math.log(
            metropolis_hastings(
                StandardNormal(1).log_prob,
                torch.zeros(4, 1),
                1,
                burn_in=400,
                target=0.4,
                generator=seeded(seed),
            ).step
        )
        for seed in range(12)
    ]
    assert torch.tensor(logs).std() < 0.15


def test_bad_arguments_of_chains_are_named():
    def run(**options):
        chosen = {"start": torch.zeros(3, 2), "steps": 10} | options
        return metropolis_hastings(energies["U1"].log_density, **chosen)

    for options, text in (
        ({"start": torch.zeros(2)}, "(chains, d)"),
        ({"start": torch.zeros(3, 2, dtype=torch.long)}, "floating-point"),
        ({"start": [[0.0, 0.0]]}, "floating-point"),
        ({"start": torch.zeros(0, 2)}, "(chains, d)"),
        ({"start": torch.zeros(3, 0)}, "(chains, d)"),
        ({"start": torch.zeros(3, 2, device="meta")}, "start: expected values"),
        ({"steps": 0}, "steps"),
        ({"steps": 10.0}, "steps"),
        ({"steps": "10"}, "steps"),
        ({"thin": 0}, "thin"),
        ({"thin": 2.0}, "thin"),
        ({"thin": 11}, "thin"),
        ({"burn_in": -1}, "burn_in"),
        ({"burn_in": True}, "burn_in"),
        ({"step": 0.0}, "step"),
        ({"step": math.inf}, "step"),
        ({"step": math.nan}, "step"),
        ({"step": "1"}, "step"),
        ({"target": 1.5, "burn_in": 5}, "target"),
        ({"target": math.nan, "burn_in": 5}, "target"),
        ({"target": "0.3", "burn_in": 5}, "target"),
        ({"target": 0.3}, "burn-in"),
        ({"start": torch.full((3, 2), math.nan)}, "3 states"),
    ):
        with expect_fail(ValueError, contains=text):
            run(**options)
    with expect_fail(ValueError, contains="log_density: expected a function"):
        metropolis_hastings("U1", torch.zeros(3, 2), 10)


def test_numbers_of_numpy_and_torch_are_numbers():
    log_density, start = energies["U1"].log_density, torch.zeros(3, 2)
    plain, other = (
        metropolis_hastings(
            log_density,
            start,
            whole(20),
            step=real(0.5),
            burn_in=whole(10),
            target=real(0.25),
            thin=whole(2),
            generator=seeded(),
        )
        for whole, real in ((int, float), (np.int64, np.float32))
    )
    assert_close(plain.states, other.states)
    assert energies["U1"].sample(np.int32(3)).shape == (3, 2)
    flow = gaussian_flow(0.0, 1.0)
    found = assess(
        flow, StandardNormal(2).log_prob, np.int64(50), batch=torch.tensor(20)
    )
    assert math.isfinite(found.kl)


def numpy_loop(steps, seed=0):
    """One chain on the first density, a step at a time."""
    rng, z, kept = (
        np.random.default_rng(seed),
        np.zeros(2),
        np.empty((steps, 2)),
    )

    def log_density(z):
        ring = 0.5 * ((np.sqrt(z @ z) - 2) / 0.4) ** 2
        left, right = (
            -0.5 * ((z[0] + 2) / 0.6) ** 2,
            -0.5 * ((z[0] - 2) / 0.6) ** 2,
        )
        return np.logaddexp(left, right) - ring

    log_p = log_density(z)
    for t in range(steps):
        proposal = z + rng.standard_normal(2)
        log_new = log_density(proposal)
        if np.log(rng.random()) < log_new - log_p:
            z, log_p = proposal, log_new
        kept[t] = z
    return kept


def test_many_chains_are_fifty_times_as_quick_as_a_loop():
    log_density = energies["U1"].log_density
    start = torch.randn(10_000, 2, generator=seeded())

    def seconds(run):
        # of the processor: other work on the machine does not count
        began = time.process_time()
        run()
        return time.process_time() - began

    # in turn, and the best of each: a slow spell meets both
    pairs = [
        (
            seconds(lambda: numpy_loop(3000)),
            seconds(lambda: metropolis_hastings(log_density, start, 60)),
        )
        for _ in range(5)
    ]
    one, all_ = map(min, zip(*pairs))
    loop, many = 3000 / one, 10_000 * 60 / all_
    assert many >= 50 * loop, (many, loop)


def test_a_default_device_does_not_reach_chains_and_energies():
    start = torch.zeros(3, 2)

    def look():
        chains = metropolis_hastings(
            energies["U3"].log_density,
            start,
            20,
            burn_in=5,
            target=0.3,
            generator=seeded(),
        )
        return (
            chains.states,
            *(e.sample(9, seeded()) for e in energies.values()),
            *(e.log_prob(start) for e in energies.values()),
        )

    check_under_a_default_device(look)


def test_a_device_without_float64_is_served(monkeypatch):
    # Apple's GPU, as far as this can be seen elsewhere
    for module in ("variational", "diagnostics"):
        monkeypatch.setattr(f"flowcourse.{module}.in_double", lambda t: t)
    whole = torch.Tensor.double

    def double(self):
        # but for the fit, on the CPU
        assert self.numel() < 100, "no float64"
        return whole(self)

    monkeypatch.setattr(torch.Tensor, "double", double)
    found = assess(gaussian_flow(0.0, 1.1), StandardNormal(2).log_prob, 1000)
    assert math.isfinite(found.kl)


def gaussian_flow(loc, scale):
    return Flow(Elementwise(2, AffineMap()), DiagonalGaussian(2, loc, scale))


def test_assess_knows_the_divergence_of_gaussians():
    flow, target = gaussian_flow(0.5, 0.8), StandardNormal(2)
    found = assess(flow, target.log_prob, 200_000, generator=seeded())
    exact = 2 * (0.5 * (0.8**2 + 0.5**2 - 1) - math.log(0.8))
    assert abs(found.kl - exact) < 4 * found.error and found.error < 0.01
    assert abs(found.log_z) < 0.05 and 0.1 < found.ess_share < 0.5
    raw = assess(
        flow, lambda x: target.log_prob(x) + 2.0, 200_000, generator=seeded()
    )
    assert raw.kl == pytest.approx(found.kl - 2, abs=1e-5)
    assert raw.log_z == pytest.approx(found.log_z + 2, abs=1e-5)
    assert (raw.ess_share, raw.pareto_k) == pytest.approx(
        (found.ess_share, found.pareto_k)
    )
    assert "KL 0.3" in repr(found)
    compiled = torch.compile(flow, backend="eager")
    again = assess(compiled, target.log_prob, 200_000, generator=seeded())
    assert again.kl == pytest.approx(found.kl)
    perfect = assess(gaussian_flow(0.0, 1.0), target.log_prob, 1000)
    assert perfect.kl == pytest.approx(
        0, abs=1e-6
    ) and perfect.ess_share == pytest.approx(1)


def test_assess_states_its_error_right():
    flow, target = gaussian_flow(0.3, 1.2), StandardNormal(2)
    runs = [
        assess(flow, target.log_prob, 500, generator=seeded(i))
        for i in range(300)
    ]
    kls = torch.tensor([run.kl for run in runs])
    assert kls.std().item() == pytest.approx(
        np.mean([run.error for run in runs]), rel=0.15
    )
    uneven = assess(flow, target.log_prob, 1001, generator=seeded(), batch=100)
    assert abs(uneven.kl - kls.mean()) < 5 * uneven.error


def test_draws_of_unknown_density_are_counted_and_said():
    flow = gaussian_flow(0.0, 1.0)

    def with_holes(x, hole=math.nan):
        holes = torch.arange(len(x)) < 3
        return torch.where(holes, hole, StandardNormal(2).log_prob(x))

    with pytest.warns(UserWarning, match="nan or infinite at 9 of 250") as seen:
        found = assess(flow, with_holes, 250, batch=100)
    assert len(seen) == 1 and seen[0].filename == __file__
    for name in ("kl", "error", "ess_share", "pareto_k", "log_z"):
        assert math.isnan(getattr(found, name)), name
    with pytest.warns(UserWarning, match="nan or infinite at 3 of 100"):
        found = assess(flow, lambda x: with_holes(x, math.inf), 100)
    assert found.pareto_k == math.inf and math.isnan(found.ess_share)


def test_a_density_that_is_zero_at_some_draws_is_infinitely_far():
    flow = gaussian_flow(0.0, 1.0)

    def half(x):
        log_p = StandardNormal(2).log_prob(x) + math.log(2)
        return torch.where(x[:, 0] > 0, log_p, -math.inf)

    found = assess(flow, half, 20_000, generator=seeded())
    assert found.kl == math.inf
    assert found.ess_share == pytest.approx(0.5, abs=0.02)
    assert found.log_z == pytest.approx(0, abs=0.04)
    nowhere = assess(flow, lambda x: torch.full((len(x),), -math.inf), 100)
    assert nowhere.pareto_k == nowhere.kl == math.inf
    assert nowhere.ess_share == 0 and nowhere.log_z == -math.inf


def test_bad_arguments_of_assess_are_named():
    flow, target = gaussian_flow(0.0, 1.0), StandardNormal(2).log_prob
    conditional = Flow(Planar(2, 1, context_dim=4))
    for arguments, text in (
        ((Flow, target), "flow: expected a Flow"),
        ((flow, target, 100, None, 0), "generator: expected"),
        ((None, target), "flow: expected a Flow"),
        ((flow, "U1"), "log_prob: expected a function"),
        ((flow, StandardNormal), "log_prob: expected a function"),
        ((flow, target, 100, "4"), "context: "),
        ((flow, target, 0), "n: expected"),
        ((flow, target, 24), "n: expected"),
        ((flow, target, 100.0), "n: expected"),
        ((flow, target, 100, None, None, 0), "batch: expected"),
        ((flow, target, 100, torch.zeros(4)), "context: "),
        ((conditional, target, 100), "context: "),
        ((conditional, target, 100, torch.zeros(2, 4)), "context: "),
        ((conditional, target, 100, "4"), "context: "),
        ((flow.to("meta"), target, 100), "meta"),
    ):
        with expect_fail(ValueError, contains=text):
            assess(*arguments)


def test_settings_of_energies_are_finite():
    for make, text in (
        (lambda: SplitRing(0.0, 0.0, radius=math.inf), "radius"),
        (lambda: SplitRing(0.0, 0.0, side=0.0), "side"),
        (lambda: SplitRing(0.0, 0.0, side=math.nan), "side"),
        (lambda: Ridges(0.0, (0.4, 0.4)), "widths"),
        (lambda: Ridges(0.0, (0.4,), wall), "widths"),
        (lambda: Ridges(0.0, (-0.4,)), "widths"),
        (lambda: Ridges(0.0, (0.4, 0.4), 3.0), "drop"),
        (lambda: wall(4.0), "x1"),
        (lambda: wall(torch.zeros(2), edge=math.inf), "edge"),
        (lambda: wall(torch.zeros(2), width=0.0), "width"),
        (lambda: Ridges(0.0, (math.inf,)), "widths"),
        (lambda: Ridges(0.0, 0.4), "widths"),
        (lambda: energies["U1"].sample(-1), "n"),
        (lambda: energies["U1"].sample(1.5), "n"),
        (lambda: energies["U1"].log_density([0.0, 0.0]), "x"),
        (lambda: energies["U2"].log_density(torch.zeros(2).long()), "x"),
    ):
        with expect_fail(ValueError, contains=f"{text}: "):
            make()


@pytest.mark.parametrize("name", NAMES)
def test_no_draws_at_all_are_fine(name):
    assert energies[name].sample(0).shape == (0, 2)


def test_assess_takes_a_context():
    flow = Flow(Planar(2, 3, context_dim=4))
    shaken(flow, 0.3)
    found = assess(
        flow, StandardNormal(2).log_prob, 3000, torch.zeros(4), seeded()
    )
    assert found.kl > -3 * found.error


@pytest.fixture(scope="module")
def trained():
    """Eight planar layers on U1, trained for a short time."""
    torch.manual_seed(0)
    flow = Flow(Planar(2, 8), DiagonalGaussian(2))
    recipe = dict(
        steps=400, batch_size=256, lr=2e-2, schedule="cosine", progress=False
    )
    fit(ReverseKL(flow, energies["U1"].log_density), **recipe)
    return flow.eval()


def test_a_trained_flow_is_near_in_true_nats(trained):
    target = energies["U1"]
    found = assess(trained, target.log_prob, 50_000, generator=seeded())
    assert -3 * found.error < found.kl < 0.4
    assert found.ess_share > 0.3


def test_density_of_a_trained_flow_weighs_one_and_is_that_of_its_draws(trained):
    side, bins, fine = 5.0, 30, 20
    points = grid_points(-side, side, bins * fine)
    with torch.no_grad():
        q = torch.cat(
            [
                trained.log_prob(part)
                for part in points.reshape(-1, 2).split(40_000)
            ]
        )
    q = (
        q.exp().reshape(bins * fine, bins * fine)
        * (2 * side / (bins * fine)) ** 2
    )
    assert abs(q.sum().item() - 1) < 0.01
    q = q.unflatten(0, (bins, fine)).unflatten(2, (bins, fine)).sum((1, 3))
    x = trained.sample(1_000_000, generator=seeded())
    edges = [torch.linspace(-side, side, bins + 1)] * 2
    # rows are the second coordinate
    counts = torch.histogramdd(x.flip(-1), edges)[0] / len(x)
    assert (counts - q).abs().sum().item() <= 0.05


def test_chains_and_what_they_are_worth_travel_together(ring_chains):
    assert isinstance(ring_chains, Chains)
    n = ring_chains.states[..., 0].numel()
    assert (ring_chains.ess > 100).all() and (ring_chains.ess < n / 10).all()
    assert ring_chains.r_hat.shape == (2,)


def gradients(objective, noise):
    """The gradient in all parameters, as one vector."""
    found = torch.autograd.grad(
        objective(None, noise), list(objective.parameters())
    )
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize(
    "make", [lambda: Planar(2, 3), lambda: IAF(2, 2, hidden=(8,))]
)
def test_path_gradient_is_unbiased(make):
    torch.manual_seed(0)
    flow = shaken(Flow(make(), DiagonalGaussian(2, 0.3, 0.9)).double(), 0.3)
    target = energies["U1"].log_density
    plain, path = ReverseKL(flow, target), ReverseKL(flow, target, path=True)
    draws = noise(20_000, 2)
    # the same number, another gradient
    assert_close(plain(None, draws), path(None, draws))
    pairs = [
        (gradients(plain, part), gradients(path, part))
        for part in draws.split(100)
    ]
    gap = torch.stack([a - b for a, b in pairs])
    scale = gap.std(0) / math.sqrt(len(gap))
    assert (gap.mean(0).abs() <= 4.5 * scale + 1e-12).all()
    assert gap.abs().max() > 1e-3  # batch by batch they differ


def test_path_gradient_vanishes_where_the_flow_is_the_target():
    torch.manual_seed(0)
    flow = shaken(
        Flow(RealNVP(2, 2, hidden=(8,)), DiagonalGaussian(2)).double(), 0.5
    )
    target = copy.deepcopy(flow).requires_grad_(False).log_prob
    draws = noise(50, 2)
    assert gradients(ReverseKL(flow, target), draws).abs().max() > 1e-2
    assert (
        gradients(ReverseKL(flow, target, path=True), draws).abs().max() < 1e-9
    )


def test_path_gradient_trains_resumes_and_compiles(tmp_path):
    def run(steps, **options):
        torch.manual_seed(0)
        flow = Flow(RealNVP(2, 4, hidden=(16,)), DiagonalGaussian(2))
        objective = ReverseKL(
            flow, energies["U1"].log_density, Annealing(0.1, 40), path=True
        )
        options = {"batch_size": 200, "lr": 2e-2, "progress": False} | options
        history = fit(objective, steps=steps, **options)
        return flow, history.loss

    whole, _ = run(30)
    run(20, checkpoint=tmp_path / "a.pt")
    halves, _ = run(30, checkpoint=tmp_path / "a.pt", resume=True)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)
    # not with Adam, which makes whole steps of gradients that are rounding
    compiled, plain = (
        run(3, compile=c, optimizer="sgd", lr=1e-3)[1]
        for c in ("aot_eager", False)
    )
    assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-3, atol=0)
    better = assess(
        run(300)[0], energies["U1"].log_prob, 20_000, generator=seeded()
    )
    assert better.kl < 0.6


def test_path_gradient_reaches_what_is_trained_along():
    """The target's own parameters, of a decoder say, keep their gradient."""
    target = Flow(Elementwise(2, AffineMap()), DiagonalGaussian(2))
    log_target = _Scorer(target)
    flow = Flow(Planar(2, 2))
    objective = ReverseKL(flow, log_target, path=True)
    objective(None, torch.randn(9, 2, generator=seeded())).backward()
    assert target.base.loc.grad.abs().max() > 0


class _Scorer(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.log_prob(x)
