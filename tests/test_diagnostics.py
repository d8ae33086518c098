"""What draws are worth: chains against known correlations, and weights against known tails."""

import math

import pytest
import scipy.stats
import torch
from helpers import check_under_a_default_device, noise
from pyro.ops.stats import effective_sample_size as pyro_ess
from pyro.ops.stats import fit_generalized_pareto, split_gelman_rubin
from torch.testing import assert_close

from flowcourse.diagnostics import (
    calibration_ranks,
    calibration_test,
    effective_sample_size,
    ess_share,
    pareto_k,
    r_hat,
)
from flowcourse.testing import expect_fail


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def autoregression(phi, n, chains, seed=0):
    """Stationary AR(1) chains of variance 1, shape `(n, chains)`."""
    e = noise(n, chains, seed=seed)
    x = torch.empty_like(e)
    x[0] = e[0]
    for t in range(1, n):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi**2) * e[t]
    return x


# The estimate's noise is far below a tenth, but for 0.9, where it is a twentieth.
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.1, -0.4, -0.7, -0.9])
def test_effective_sample_size_of_an_autoregression(phi):
    n, chains = 4000, 8
    x = autoregression(phi, n, chains)
    expected = n * chains * (1 - phi) / (1 + phi)
    assert effective_sample_size(x).item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("phi", [-0.99, -0.9, -0.7, -0.3])
def test_antithetic_chains_are_worth_more_than_their_states(phi):
    # Short and single chains: of 20, the mean and the least are near what the
    # variance of the mean says, and none is negative.
    for n, chains in ((500, 4), (2000, 1)):
        expected = n * chains * (1 - phi) / (1 + phi)
        found = torch.stack([
            effective_sample_size(autoregression(phi, n, chains, seed))
            for seed in range(20)
        ])  # fmt: skip
        assert found.mean().item() == pytest.approx(expected, rel=0.3)
        assert found.min() > expected / 4


def test_antithetic_chains_are_averaged_by_neighbours():
    # the sum of three with weights 1, 2, 1 has the same mean, and Pyro's number
    n, chains = 30, 6
    x = autoregression(-0.8, n, chains)
    smooth = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4

    def variance(x):
        within, means = x.var(0).mean(), x.mean(0)
        return within * (len(x) - 1) / len(x) + means.var()

    share = pyro_ess(smooth, chain_dim=1, sample_dim=0) / (n - 2)
    expected = n * share * variance(x) / variance(smooth)
    assert_close(effective_sample_size(x), expected)


def test_effective_sample_size_of_few_states_is_positive():
    x = noise(300, 4, 3)
    for n in (4, 5, 6, 9, 20):
        swings = x[:n] * (-1.0) ** torch.arange(n)[:, None, None]
        found = torch.stack([
            effective_sample_size(part)
            for part in (x[:n], swings, swings + 0.01 * x[-n:], x[:n].abs())
        ])  # fmt: skip
        assert (found > 0).all() and found.isfinite().all()
    # each state undoes the one before: at most what Stan allows
    alternating = torch.tensor([1.0, -1.0]).repeat(50)[:, None].repeat(1, 3)
    most = 300 * math.log10(300)
    assert effective_sample_size(alternating).item() == pytest.approx(most)


def test_effective_sample_size_of_what_moves_not_or_is_not_finite():
    x = noise(50, 3, 4)
    x[..., 1] = 2.0
    for bad in (math.nan, math.inf, -math.inf):
        x[7, 1, 2] = bad
        found = effective_sample_size(x)
        assert found.isnan().tolist() == [False, True, True, False]
        assert r_hat(x).isnan().tolist() == [False, True, True, False]
    for states in (
        [[1.0]],
        torch.zeros(9, 2).long(),
        torch.zeros(9),
        torch.zeros(9, 0),
        torch.zeros(9, 2, 0),
        torch.zeros(9, 2, device="meta"),
    ):
        with expect_fail(ValueError, contains="states: expected"):
            effective_sample_size(states)
        with expect_fail(ValueError, contains="states: expected"):
            r_hat(states)


def test_effective_sample_size_is_pyros_where_pyro_can():
    for n in (4, 51, 600):
        x = torch.stack(
            [autoregression(0.8, n, 5), autoregression(0.2, n, 5, 1)], -1
        )
        assert_close(
            effective_sample_size(x), pyro_ess(x, chain_dim=1, sample_dim=0)
        )
    x = autoregression(0.9, 100_000, 1)  # pyro would want 20 GB here
    assert effective_sample_size(x).item() == pytest.approx(
        100_000 / 19, rel=0.15
    )
    with expect_fail(ValueError, contains="(kept, chains"):
        effective_sample_size(torch.zeros(3, 2))


def test_chains_that_disagree_are_worth_little():
    x = noise(500, 4) + torch.tensor([0.0, 0.0, 0.0, 5.0])
    assert effective_sample_size(x) < 20


def test_r_hat_accepts_what_is_right():
    x = noise(1000, 4, 2)
    assert (r_hat(x) < 1.01).all() and (r_hat(x) > 0.99).all()
    ties = x.round()  # rejected moves repeat states
    assert (r_hat(ties) < 1.01).all()
    # only ranks count
    assert_close(r_hat(x), r_hat(10 - 3 * x), rtol=1e-4, atol=0)
    assert_close(r_hat(x.float()), r_hat(x).float())


@pytest.mark.parametrize("digits", [1, 9])
def test_r_hat_by_hand(digits):
    x = noise(40, 3).exp().round(decimals=digits)  # skewed, and with ties
    x[:, 1] *= 1.5

    def scores(x):
        flat = x.flatten()
        less = (flat < flat[:, None]).sum(1)
        ties = (flat == flat[:, None]).sum(1)
        rank = less.double() + (ties + 1) / 2
        share = (rank - 3 / 8) / (len(flat) + 1 / 4)
        return torch.special.ndtri(share).reshape(x.shape)

    folded = (x - x.flatten().median()).abs()
    each = [
        split_gelman_rubin(scores(part), chain_dim=1, sample_dim=0)
        for part in (x, folded)
    ]
    assert_close(r_hat(x[..., None])[0], max(each))
    # the two differ, and either can be the larger
    narrow = noise(40, 3) * torch.tensor([1.0, 1.0, 3.0])
    folded = (narrow - narrow.flatten().median()).abs()
    expected = split_gelman_rubin(scores(folded), chain_dim=1, sample_dim=0)
    assert_close(r_hat(narrow[..., None])[0], expected)


def test_r_hat_finds_what_is_wrong():
    x = noise(1000, 4, 1)
    shift = torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None]
    assert r_hat(x + shift) > 1.05
    scale = torch.tensor([1.0, 1.0, 1.0, 4.0])[:, None]
    assert r_hat(x * scale) > 1.05  # only the folded ranks see it
    assert split_gelman_rubin(x * scale, chain_dim=1, sample_dim=0) < 1.01
    drift = torch.linspace(-1, 1, 1000)[:, None, None]
    assert r_hat(x + drift) > 1.05  # only the halves see it
    cauchy = torch.tan(math.pi * (torch.special.ndtr(x) - 0.5)) + 2 * shift
    # no variance to go by
    assert split_gelman_rubin(cauchy, chain_dim=1, sample_dim=0) < 1.05
    assert r_hat(cauchy) > 1.05
    for wrong in (torch.zeros(3, 2, 1), torch.zeros(9, 1, 1)):
        with expect_fail(ValueError, contains="at least 2 chains"):
            r_hat(wrong)


def test_ess_share():
    assert ess_share(torch.zeros(50) - 1e4) == pytest.approx(1)
    one = torch.full((40,), -math.inf)
    one[3] = 700.0
    assert ess_share(one) == pytest.approx(1 / 40)
    w = torch.tensor([1.0, 2.0, 3.0])
    assert ess_share(w.log()) == pytest.approx(36 / (3 * 14))
    # q = N(0, 1), p = N(m, 1): the share is exp(-m²)
    z = noise(400_000)
    assert ess_share(0.5 * z - 0.125) == pytest.approx(
        math.exp(-0.25), abs=0.01
    )


def test_pareto_k_fits_the_published_tail():
    # n = 25: the five largest; n = 1000: 3 sqrt(n) = 94.9 and not 0.2 n
    for n, tail in ((25, 5), (100, 20), (1000, 95), (50_000, 671)):
        log_w = 0.7 * noise(n)
        w = log_w.exp().sort().values
        expected = fit_generalized_pareto(w[-tail:] - w[-tail - 1])[0]
        assert pareto_k(log_w) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_of_pareto_weights(k):
    u = torch.rand(100_000, generator=seeded(), dtype=torch.float64)
    log_w = -k * u.log()  # weights with P(w > t) = t^(-1/k)
    found = pareto_k(log_w)
    assert found == pytest.approx(k, abs=0.08)
    assert pareto_k(log_w + 5000) == pytest.approx(found)
    assert pareto_k(log_w.float()) == pytest.approx(found, abs=1e-3)


def test_pareto_k_at_the_ends():
    u = torch.rand(100_000, generator=seeded(), dtype=torch.float64)
    assert pareto_k(u.log()) < -0.5  # uniform weights have k = -1
    z = noise(100_000)
    # q far too narrow
    assert pareto_k(-0.5 * (z / 3).square() + 0.5 * z.square()) > 0.7
    # q too wide: bounded
    assert pareto_k(-0.5 * (3 * z).square() + 0.5 * z.square()) < 0.2
    assert pareto_k(torch.zeros(1000)) == -math.inf
    assert math.isfinite(
        pareto_k(torch.cat([torch.full((900,), -math.inf), z[:100]]))
    )
    with expect_fail(ValueError, contains="25"):
        pareto_k(torch.zeros(24))


def test_weights_that_are_nearly_all_zero_get_the_worst_verdict():
    inf, nothing = math.inf, torch.full((1000,), -math.inf)
    assert pareto_k(nothing) == inf and ess_share(nothing) == 0
    for few in (1, 2, 4):
        for rest in (-inf, -800.0, -30.0):
            log_w = torch.full((1000,), rest)
            log_w[:few] = torch.linspace(0, -0.1, few)
            assert pareto_k(log_w) == inf
            assert ess_share(log_w) == pytest.approx(few / 1000, rel=0.01)
    # weights that no float64 holds together
    for spread in (100.0, 1e3, 1e5, 1e300):
        assert pareto_k(spread * noise(1000)) > 5
    # a hair above all others is no tail
    hair = torch.zeros(1000)
    hair[:3] = 1e-6
    assert pareto_k(hair) == -inf


def test_weights_that_are_unknown_get_no_good_verdict():
    log_w = noise(100)
    log_w[3] = math.inf
    assert pareto_k(log_w) == math.inf and math.isnan(ess_share(log_w))
    log_w[4] = math.nan
    assert math.isnan(pareto_k(log_w)) and math.isnan(ess_share(log_w))


@pytest.mark.parametrize("judge", [ess_share, pareto_k])
def test_weights_are_one_row_of_numbers(judge):
    for wrong in (
        torch.zeros(40, 40),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(40).long(),
        torch.zeros(40, device="meta"),
        [0.0] * 40,
        None,
    ):
        with expect_fail(ValueError, contains="log_weights: expected"):
            judge(wrong)
    assert ess_share(torch.tensor([3.0])) == 1


def test_a_default_device_does_not_reach_the_judges():
    log_w, states = noise(1000), noise(50, 3, 2)
    draws = noise(20, 50, 3)

    def look():
        ranks = calibration_ranks(states[:, :, 0], draws)
        calibration = calibration_test(ranks, 20)
        return (
            torch.tensor([pareto_k(log_w), ess_share(log_w)], device="cpu"),
            effective_sample_size(states),
            r_hat(states),
            ranks,
            calibration.p_values,
            calibration.shift,
            calibration.spread,
        )

    check_under_a_default_device(look)


def test_a_device_without_float64_is_served(monkeypatch):
    # Apple's GPU, as far as this can be seen elsewhere
    monkeypatch.setattr("flowcourse.diagnostics.in_double", lambda t: t)
    log_w = noise(1000).float()
    whole = torch.Tensor.double

    def double(self):
        # but for the fit, on the CPU
        assert self.numel() < 100, "no float64"
        return whole(self)

    monkeypatch.setattr(torch.Tensor, "double", double)
    assert ess_share(log_w) == pytest.approx(math.exp(-1), rel=0.2)
    assert 0 < pareto_k(log_w) < 1


# --- calibration -------------------------------------------------------------


def test_ranks_are_counts_of_draws_below():
    truths = torch.tensor([[0.5, -3.0], [9.0, 0.0]])
    draws = torch.tensor([0.0, 1.0, 2.0])[:, None, None].expand(3, 2, 2)
    assert calibration_ranks(truths, draws).tolist() == [[1, 0], [3, 0]]
    assert (
        calibration_ranks(truths.double(), draws.double()).dtype == torch.int64
    )


@pytest.mark.parametrize(
    "draws, n, d", [(1, 40, 1), (9, 200, 3), (99, 200, 1), (63, 1000, 2)]
)
def test_a_right_posterior_is_rejected_as_often_as_stated(draws, n, d):
    """The level holds, for coordinates that hang together, too."""
    g, level, repeats = seeded(), 0.05, 600
    rejected = 0
    for _ in range(repeats):
        shared = torch.randint(0, draws + 1, (n, 1), generator=g)
        own = torch.randint(0, draws + 1, (n, d), generator=g)
        ranks = torch.where(torch.arange(d) < 2, shared, own)
        rejected += calibration_test(ranks, draws, level).rejected
    # three standard errors, and a tenth for the limit of Pearson's statistic
    most = 1.1 * level + 3 * math.sqrt(level * (1 - level) / repeats)
    assert rejected / repeats < most
    if d == 1:  # nothing is given away
        assert rejected / repeats > 0.9 * level - 3 * math.sqrt(level / repeats)


def conjugate(scale=1.0, shift=0.0, n=500, d=2, draws=63, seed=0):
    """Ranks for a normal posterior with its sd scaled, and its mean shifted by sds."""
    truths = noise(n, d, seed=seed)
    x = truths + noise(n, d, seed=seed + 1)
    sd = math.sqrt(0.5)
    posterior = x / 2 + sd * (shift + scale * noise(draws, n, d, seed=seed + 2))
    return calibration_test(calibration_ranks(truths, posterior), draws)


@pytest.mark.parametrize("seed", [0, 10, 20, 30])
def test_what_is_wrong_with_a_posterior_shows(seed):
    right = conjugate(seed=seed)
    assert not right.rejected and right.p_values.shape == (2,)
    # four standard errors of a mean and of a variance of 500 equal ranks
    assert (right.shift.abs() < 4 * math.sqrt(1 / 12 / 500)).all()
    assert ((right.spread - 1).abs() < 4 * math.sqrt(0.8 / 500)).all()
    for narrow in (0.5, 0.75):
        found = conjugate(narrow, seed=seed)
        assert found.rejected and (found.spread > 1.1).all()
    wide = conjugate(1.4, seed=seed)
    assert wide.rejected and (wide.spread < 0.9).all()
    high, low = conjugate(1.0, 0.4, seed=seed), conjugate(1.0, -0.4, seed=seed)
    assert high.rejected and (high.shift < -0.05).all()
    assert low.rejected and (low.shift > 0.05).all()


def test_one_bad_coordinate_of_many_shows():
    good = torch.randint(0, 64, (500, 20), generator=seeded())
    assert not calibration_test(good, 63).rejected
    good[:, 7] = good[:, 7] // 2
    found = calibration_test(good, 63)
    assert found.rejected and found.p_values.argmin() == 7
    assert (
        found.p_values.shape == found.shift.shape == found.spread.shape == (20,)
    )


def test_the_chi_square_is_pearsons():
    """64 ranks in 20 bins of three and four: the bins' sizes count."""
    ranks = torch.randint(0, 64, (800,), generator=seeded())
    bins = torch.arange(64) * 20 // 64
    sizes = torch.bincount(bins).double()
    assert set(sizes.tolist()) == {3.0, 4.0}
    counts = torch.bincount(bins[ranks], minlength=20)
    wanted = scipy.stats.chisquare(
        counts.numpy(), (800 * sizes / 64).numpy()
    ).pvalue
    assert_close(
        calibration_test(ranks, 63).p_values.item(), wanted, atol=1e-10, rtol=0
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: calibration_ranks(torch.zeros(3), torch.zeros(5, 4)),
            r"draws: expected shape \(draws, 3\)",
        ),
        (
            lambda: calibration_ranks(torch.zeros(3).long(), torch.zeros(5, 3)),
            "truths: expected floating-point",
        ),
        (
            lambda: calibration_ranks(
                torch.zeros(3), torch.full((5, 3), math.nan)
            ),
            "draws: expected numbers, got nan",
        ),
        (
            lambda: calibration_test(torch.zeros(30), 5),
            "ranks: expected a tensor of whole numbers",
        ),
        (
            lambda: calibration_test([1, 2], 5),
            "ranks: expected a tensor of whole numbers, got list",
        ),
        (
            lambda: calibration_test(torch.zeros(19, dtype=torch.long), 5),
            r"n at least 20, got \(19,\)",
        ),
        (
            lambda: calibration_test(torch.full((30,), 6), 5),
            "ranks: expected numbers from 0 to 5, got 6 to 6",
        ),
        (
            lambda: calibration_test(torch.zeros(30).long(), 0),
            "draws: expected a whole number of at least 1",
        ),
        (
            lambda: calibration_test(torch.zeros(30).long(), 5, 0.0),
            "level: expected a finite number above 0",
        ),
    ],
)
def test_calibration_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
