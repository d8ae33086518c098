"""The stand-in for simulated showers: its formulas, its distributions, and what they agree with."""

import math

import numpy as np
import pytest
import torch
from helpers import check_under_a_default_device
from scipy import stats
from scipy.special import gammaln
from torch.testing import assert_close

from flowcourse import showers as module
from flowcourse.showers import (
    DEPTHS,
    LAYERS,
    MEAN_CLUSTERS,
    MEAN_DEPOSITS,
    NUMBERS,
    POSITIONS,
    THICKNESS,
    Showers,
    centre,
    centre_across,
    make_showers,
    mean_deposits,
    observe,
)

DTYPES = torch.float32, torch.float64
SMALL = 1e-6  # of a true hypothesis: none is refused by chance, with any seed


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# the calorimeter


def test_the_layers_lie_where_those_of_the_detector_do():
    """Some lower faces of the silicon, as the simulation's files give them."""
    faces = {1: 1811.340, 2: 1814.465, 3: 1823.810, 4: 1826.935, 5: 1836.280}
    faces |= {20: 1926.695, 21: 1938.140, 22: 1943.365, 30: 2010.045}
    for layer, face in faces.items():
        assert abs(POSITIONS[layer - 1] - 0.2625 - face) < 2e-3
    assert THICKNESS == 0.525
    depths = {1: 0.6, 20: 12.0, 21: 13.2, 30: 24.0}
    for layer, depth in depths.items():
        assert math.isclose(DEPTHS[layer - 1], depth)
    assert len(DEPTHS) == len(POSITIONS) == len(LAYERS) == NUMBERS[-1] == 30


def test_the_table_adds_up():
    assert abs(sum(MEAN_CLUSTERS) - 3130.29) < 0.05
    assert abs(sum(MEAN_DEPOSITS) - 1223.24) < 0.05
    c, a = (sum(row[k] for row in LAYERS) for k in (2, 3))
    assert (round(c, 2), round(a, 3)) == (579.30, 187.799)


# the shape of a shower


def plain_means(energy, first, other, conversion):
    """Mean deposits of one shower, layer by layer, written from the publication's formulas."""
    log_y = math.log(energy / 0.008)
    rho = 0.705 - 0.023 * log_y
    log_t = math.log(-0.812 + log_y - 0.78)
    log_t += first / (-1.4 + 1.26 * log_y)
    second = rho * first + math.sqrt(1 - rho**2) * other
    log_alpha = math.log(0.81 + (0.458 + 2.26 / 74) * log_y - 0.19)
    log_alpha += second / (-0.58 + 0.86 * log_y)
    alpha = max(math.exp(log_alpha), 1.1)
    beta = (alpha - 1) / math.exp(log_t)
    v = []
    for layer, (_, _, c, _) in enumerate(LAYERS, 1):
        depth = 0.6 * layer if layer <= 20 else 12 + 1.2 * (layer - 20)
        t = depth + 0.28 - conversion
        f = stats.gamma(alpha, scale=1 / beta).pdf(t) if t > 0 else 0.0
        v.append(c * energy * f)
    r = sum(v) / energy
    log_e = math.log(energy)
    usual = math.exp(-0.0037 * log_e**2 - 0.0233 * log_e + 3.3467)
    return [24.465 / usual * (usual / r) ** 0.4 * x if r else 0.0 for x in v]


CASES = [
    (10.0, 0.0, 0.0, 0.0),
    (10.0, -1.2, 0.7, 0.1),
    (23.7, 0.4, -2.0, 0.9),
    (50.0, 1.5, 1.0, 3.3),
    (50.0, 0.0, -20.0, 0.5),  # alpha at its least
    (77.0, -2.5, 2.5, 12.1),
    (90.0, 2.0, -1.0, 23.9),  # seen by the last layer alone
    (90.0, 0.0, 0.0, 24.3),  # by none
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_that_of_a_plain_loop(dtype):
    energy, first, other, conversion = torch.tensor(CASES, dtype=dtype).mT
    noise = torch.stack([first, other], -1)
    found = mean_deposits(energy, noise, conversion)
    assert found.dtype == dtype
    wanted = torch.tensor([plain_means(*case) for case in CASES]).to(dtype)
    # exponents are of the order of 50, and rounding of them is relative;
    # where the depth less the start is nearly nothing it is that of 24
    rtol = 500 * torch.finfo(dtype).eps
    near = torch.tensor(CASES)[:, 3] > 12
    assert_close(found[~near], wanted[~near], rtol=rtol, atol=0)
    assert_close(found[near], wanted[near], rtol=100 * rtol, atol=0)
    assert (found[-1] == 0).all() and (found[-2, :-1] == 0).all()
    assert found[-2, -1] > 0


# what the layers see


@pytest.fixture(scope="module")
def seen():
    """Showers whose layers all have known means: the means, clusters and deposits."""
    mean = torch.logspace(-2, 2.3, 30, dtype=torch.float64)
    rows = mean.expand(100_000, 30)
    return mean, *observe(rows, seeded(1))


def quantiles(mean, n=20_000):
    """Deposits of one layer at equal steps of probability."""
    u = (np.arange(n) + 0.5) / n
    return stats.gamma(mean / 0.707, scale=0.707).ppf(u)


def test_deposits_are_gamma(seen):
    mean, clusters, deposits = seen
    for layer in (22, 26, 29):  # too much to leave no cluster
        assert (clusters[:, layer] > 0).all()
        law = stats.gamma(mean[layer].item() / 0.707, scale=0.707)
        assert stats.kstest(deposits[:, layer], law.cdf).pvalue > SMALL


def test_a_layer_without_clusters_has_no_energy(seen):
    mean, clusters, deposits = seen
    assert torch.equal(clusters == 0, deposits == 0)
    assert (clusters == clusters.round()).all() and (clusters >= 0).all()
    n = len(clusters)
    z, weight = np.polynomial.hermite_e.hermegauss(9)
    weight = weight / weight.sum()
    spread = np.exp(0.04 * z - 0.04**2 / 2)
    for layer in (0, 3, 6, 9, 12):
        d, a = quantiles(mean[layer].item()), LAYERS[layer][3]
        empty = np.exp(-a * d[:, None] ** 0.78 * spread) @ weight
        share = (clusters[:, layer] == 0).double().mean().item()
        p = empty.mean()
        assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / n), layer
        left = deposits[:, layer]
        error = left.std().item() / math.sqrt(n)
        wanted = (d * (1 - empty)).mean()
        # a sum in place of an integral leaves a thousandth
        assert abs(left.mean().item() - wanted) < 6 * error + 1e-3 * wanted


def test_clusters_are_counts_that_share_a_factor(seen):
    mean, clusters, _ = seen
    n = len(clusters)
    layers = [22, 26, 29]
    k = mean[layers].numpy() / 0.707
    a = np.array([LAYERS[layer][3] for layer in layers])

    def power(p):
        """Mean of a deposit's power."""
        return 0.707**p * np.exp(gammaln(k + p) - gammaln(k))

    expected, factor = a * power(0.78), math.exp(0.04**2)
    variance = expected + a**2 * power(1.56) * factor - expected**2
    found = clusters[:, layers].numpy()
    error = np.sqrt(variance / n)
    assert (np.abs(found.mean(0) - expected) < 6 * error).all()
    # kurtosis is near that of a normal number, whose variance scatters so
    spread = 6 * math.sqrt(2.5 / n)
    assert (np.abs(found.var(0) / variance - 1) < spread).all()
    # layers have nothing in common but the factor
    shared = np.outer(expected, expected) * (factor - 1)
    wanted = shared / np.sqrt(np.outer(variance, variance))
    gap = np.abs(np.corrcoef(found.T) - wanted)[np.triu_indices(3, 1)]
    assert (gap < 6 / math.sqrt(n)).all() and wanted.min() > 0.02


def test_the_common_factor_has_mean_one():
    """Its sd of 0.04 would move the mean by 8e-4 if nothing were taken off: more than chance can."""
    n = 400_000
    mean = torch.zeros(30, dtype=torch.float64)
    mean[26:] = 200.0
    clusters, deposits = observe(mean.expand(n, 30), seeded(4))
    a = torch.tensor([row[3] for row in LAYERS]).double()
    expected = (a * deposits**0.78).sum(1)
    factor = clusters.sum(1) / expected
    error = factor.std().item() / math.sqrt(n)
    assert 6 * error < 6e-4
    assert abs(factor.mean().item() - 1) < 6 * error
    noise = (1 / expected).mean().item()
    assert abs(math.sqrt(factor.var().item() - noise) - 0.04) < 0.001


def test_the_centre_across_is_student():
    energy = torch.tensor([10.0, 90.0]).double().repeat(50_000)
    across = centre_across(energy, seeded(2))
    t = across * energy.sqrt()[:, None] / across.new_tensor((2.89, 2.69))
    for part in (t[::2], t[1::2]):
        for axis in range(2):
            law = stats.t(12).cdf
            assert stats.kstest(part[:, axis], law).pvalue > SMALL
    # the variance is 12 / 10, and the kurtosis 3.75
    error = math.sqrt(2.75 / 4 / len(t))
    assert ((t.std(0) / math.sqrt(1.2) - 1).abs() < 6 * error).all()
    # neither the sign nor the size of one says anything about the other
    for part in (t, t.abs()):
        rank = stats.spearmanr(*part.mT.numpy()).statistic
        assert abs(rank) < 6 / math.sqrt(len(t))


def test_a_kurtosis_tells_student_from_normal():
    """What the last test stands on: 50,000 numbers are enough to see 12 degrees of freedom."""
    t = stats.norm.ppf((np.arange(50_000) + 0.5) / 50_000) * math.sqrt(1.2)
    assert stats.kstest(t, stats.t(12).cdf).pvalue < SMALL


def test_the_centre_along_is_a_mean_of_layers():
    deposits = torch.zeros(4, 30)
    deposits[0, 0] = 5.0
    deposits[1, 29] = 1e-30
    deposits[2, [9, 19]] = torch.tensor([3.0, 1.0])
    assert_close(centre(deposits), torch.tensor([1.0, 30.0, 12.5, 0.0]))
    found = make_showers(1000, generator=seeded())
    weights = found.deposits * torch.arange(1.0, 31.0)
    wanted = weights.sum(1) / found.deposits.sum(1)
    assert_close(found.cog[:, 2], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_shower_starts_from(monkeypatch, dtype):
    """Energies are uniform, the noise standard normal, and the start exponential."""
    given = []

    def spy(*args):
        given.extend(args)
        return mean_deposits(*args)

    monkeypatch.setattr(module, "mean_deposits", spy)
    make_showers(100_000, generator=seeded(3), dtype=dtype)
    energy, noise, conversion = (part.double().numpy() for part in given)
    laws = [
        (energy, stats.uniform(10, 80)),
        (conversion, stats.expon(0, 9 / 7)),
    ]
    laws += [(part, stats.norm()) for part in noise.T]
    for drawn, law in laws:
        assert stats.kstest(drawn, law.cdf).pvalue > SMALL
    ranks = stats.spearmanr(np.column_stack([p for p, _ in laws])).statistic
    assert (np.abs(ranks - np.eye(4)) < 6 / math.sqrt(len(energy))).all()


# compared with the reference, and with what was once found for the stand-in
# itself; both of 100,000 showers

BATCHES, SIZE = 40, 12_500


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def batches(request):
    """Showers in batches, each of its own seed, as float64."""
    return [
        make_showers(SIZE, generator=seeded(seed), dtype=request.param).to(
            torch.float64
        )
        for seed in range(BATCHES)
    ]


def agrees(found, wanted, slack=0.0, size=SIZE, others=100_000):
    """Whether the mean over batches is as wanted, but for chance in both and a slack.

    A batch's standard deviation gives the errors; 6 of them, since it is itself one of 40 numbers.
    """
    found = torch.stack([*found])
    deviation = found.std(0)
    error = deviation * math.sqrt(1 / len(found) + size / others)
    gap = (found.mean(0) - torch.as_tensor(wanted).to(found)).abs()
    return bool((gap <= slack + 6 * error).all())


def test_the_mean_of_each_layer_is_that_of_the_reference(batches):
    """Within 2 %; at half a million showers chance makes at most 0.4 % of it."""
    for name, wanted in (
        ("clusters", MEAN_CLUSTERS),
        ("deposits", MEAN_DEPOSITS),
    ):
        drawn = torch.stack([getattr(b, name).mean(0) for b in batches])
        gap = drawn.mean(0) / torch.tensor(wanted).double() - 1
        error = drawn.std(0) / drawn.mean(0) / math.sqrt(BATCHES)
        assert error.max() < 0.005
        assert gap.abs().max() < 0.02, (name, gap)


def test_the_sums_are_those_of_the_reference(batches):
    """Within half a percent, of which chance makes at most a tenth."""
    for name, wanted in (("clusters", 3130.29), ("deposits", 1223.24)):
        drawn = torch.stack([getattr(b, name).sum(1).mean() for b in batches])
        assert abs(drawn.mean() / wanted - 1) < 0.005, name


def test_the_response_is_linear(batches):
    """In the band that the reference gives when quantiles are matched, at each energy."""
    for low in range(10, 90, 10):
        share = torch.stack(
            [
                (b.deposits.sum(1) / b.energy)[
                    (b.energy >= low) & (b.energy < low + 10)
                ].mean()
                for b in batches
            ]
        )
        error = 6 * share.std() / math.sqrt(BATCHES)
        assert 24.3 - error < share.mean() < 24.6 + error
        assert error < 0.1


def test_early_and_late_layers_are_empty_as_often_as_they_were(batches):
    wanted = [71.7, 52.5, 33.8, 21.8, 13.4, 8.3, 5.1, 3.2, 2.0, 1.2, 0.8, 0.5]
    wanted += [0.3, 0.2, 0.1, 0.1, 0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.8, 1.4, 3.6]
    wanted += [5.4, 10.6, 13.0]
    empty = [100 * (b.deposits == 0).double().mean(0) for b in batches]
    assert agrees(empty, wanted, slack=0.05)


def test_the_depth_is_that_of_the_reference(batches):
    """Quantiles at 0.1, 1, 16, 50, 84, 99 and 99.9 %, mean and deviation, in mm."""
    levels = torch.tensor([0.001, 0.01, 0.16, 0.5, 0.84, 0.99, 0.999]).double()
    found = []
    for b in batches:
        z = (b.deposits @ torch.tensor(POSITIONS).double()) / b.deposits.sum(1)
        found.append(
            torch.cat([z.quantile(levels), z.mean()[None], z.std()[None]])
        )
    # what was found for the stand-in itself was of the silicon's lower face
    before = [1862.8, 1870.0, 1883.1, 1893.3, 1906.4, 1936.1, 1961.0, 1894.9]
    before = torch.tensor([*before, 13.1]).double()
    before[:-1] += THICKNESS / 2
    assert agrees(found, before, slack=0.05)
    # the middle is right to a tenth of a millimetre, the tails are too long
    wanted = [1865.3, 1871.5, 1883.6, 1893.5, 1906.8, 1935.2, 1957.8, 1895.25]
    slack = torch.tensor([2.5, 1.5, 0.5, 0.2, 0.4, 2.0, 5.0, 0.1, 0.5])
    assert agrees(found, [*wanted, 12.80], slack=slack.double())


def test_the_centre_across_is_that_of_the_reference(batches):
    found = []
    for b in batches:
        x = b.cog[:, 0]
        found.append(torch.stack([x.std(), x.quantile(0.01), x.mean()]))
    assert agrees(found, [0.525, -1.38, 0.0], slack=0.005)
    assert agrees(found, [0.523, -1.36, 0.0], slack=0.02)  # the reference


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (10, 11, (7.6, 8.0, 12.8, 2.1)),
        (49, 51, (5.9, 5.4, 14.7, 1.9)),
        (89, 90, (5.8, 5.0, 15.3, 1.8)),
    ],
)
def test_the_resolution_at_one_energy(low, high, wanted):
    """Relative deviation of energy and clusters in percent, mean depth in layers and its deviation.

    They were found in 100,000 showers of all energies, of which a window holds few.
    """
    size, found = 2000, []
    for seed in range(BATCHES):
        g = seeded(seed)
        energy = low + (high - low) * torch.rand(size, generator=g).double()
        drawn = make_showers(size, energy=energy, generator=g)
        row = [
            100 * total.std() / total.mean()
            for total in (drawn.deposits.sum(1), drawn.clusters.sum(1))
        ]
        z = drawn.cog[:, 2]
        found.append(torch.stack([*row, z.mean(), z.std()]))
    others = 100_000 * (high - low) / 80
    assert agrees(found, wanted, slack=0.05, size=size, others=others)


def test_clusters_go_with_energy_as_in_the_reference(batches):
    """The curve of matched quantiles, N = 126 E^0.825, within 1.5 %; chance makes a tenth of that."""
    for e in (15.0, 30.0, 50.0, 85.0):
        near = [b[(b.energy - e).abs() < 1] for b in batches]
        found = torch.cat([b.clusters.sum(1) for b in near]).mean()
        assert abs(found / (126 * e**0.825) - 1) < 0.015, e


# randomness


def parts(showers):
    return showers.energy, showers.clusters, showers.deposits, showers.cog


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_showers(dtype):
    before = torch.get_rng_state()
    one, two, other = (
        make_showers(200, generator=seeded(seed), dtype=dtype)
        for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(*map(parts, (one, two, other))):
        assert a.dtype == dtype and torch.equal(a, b) and not torch.equal(a, c)


def test_without_a_generator_the_global_one_is_drawn_from():
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(parts(make_showers(50)))
    for a, b, c in zip(*found, parts(make_showers(50))):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_default_device_does_not_matter():
    check_under_a_default_device(
        lambda: parts(make_showers(20, generator=seeded()))
    )


def test_energies_are_kept():
    energy = torch.linspace(10, 90, 33, dtype=torch.float64)
    found = make_showers(33, energy=energy, generator=seeded())
    assert torch.equal(found.energy, energy)
    assert found.clusters.dtype == torch.float64
    found = make_showers(
        33, energy=energy, generator=seeded(), dtype=torch.float32
    )
    assert torch.equal(found.energy, energy.float())
    assert found.cog.dtype == torch.float32


def test_no_gradient_is_kept():
    energy = torch.full((3,), 20.0, requires_grad=True)
    for part in parts(make_showers(3, energy=energy)):
        assert not part.requires_grad


def test_no_showers():
    for energy in (None, torch.zeros(0)):
        found = make_showers(0, energy=energy)
        assert len(found) == 0 and found.clusters.shape == (0, 30)
        assert found.cog.shape == (0, 3)
    assert len(found[:5]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_photon_that_passes_through_leaves_nothing(monkeypatch, dtype):
    def late(energy, noise, conversion):
        return mean_deposits(energy, noise, conversion + 25)

    monkeypatch.setattr(module, "mean_deposits", late)
    found = make_showers(100, generator=seeded(), dtype=dtype)
    assert (found.deposits == 0).all() and (found.clusters == 0).all()
    assert (found.cog[:, 2] == 0).all() and found.cog.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_finite(dtype):
    found = make_showers(100_000, generator=seeded(8), dtype=dtype)
    for part in parts(found):
        assert part.isfinite().all()
    assert (found.deposits >= 0).all() and (found.clusters >= 0).all()
    assert found.energy.min() >= 10 and found.energy.max() <= 90
    some = found.deposits.sum(1) > 0
    z = found.cog[some, 2]
    assert z.min() >= 1 and z.max() <= 30


# the record


def test_showers_are_picked_moved_and_shown():
    found = make_showers(10, generator=seeded())
    order = torch.tensor([7, 1, 1])
    for index in (slice(2, 5), order, found.energy > 50, [3, 0]):
        for a, b in zip(parts(found[index]), parts(found)):
            assert torch.equal(a, b[index])
    assert len(found[order]) == 3
    for part in parts(found.to(torch.float64)):
        assert part.dtype == torch.float64
    assert {p.device.type for p in parts(found.to("meta"))} == {"meta"}
    assert repr(found) == "Showers(n=10, dtype=torch.float32, device='cpu')"


def made(**changes):
    n = 4
    whole = dict(
        energy=torch.ones(n),
        clusters=torch.ones(n, 30),
        deposits=torch.ones(n, 30),
        cog=torch.ones(n, 3),
    )
    return Showers(**(whole | changes))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: make_showers(-1), "n"),
        (lambda: make_showers(2.0), "n"),
        (lambda: make_showers(2, energy=[20.0, 30.0]), "energy"),
        (lambda: make_showers(2, energy=torch.tensor([20, 30])), "energy"),
        (lambda: make_showers(2, energy=torch.full((3,), 20.0)), "energy"),
        (lambda: make_showers(2, energy=torch.full((2, 1), 20.0)), "energy"),
        (lambda: make_showers(1, energy=torch.tensor([9.99])), "energy"),
        (lambda: make_showers(1, energy=torch.tensor([90.1])), "energy"),
        (lambda: make_showers(1, energy=torch.tensor([math.nan])), "energy"),
        (lambda: make_showers(1, energy=torch.tensor([-50.0])), "energy"),
        (lambda: make_showers(1, dtype=torch.float16), "dtype"),
        (lambda: make_showers(1, dtype=torch.int64), "dtype"),
        (lambda: make_showers(1, dtype="float32"), "dtype"),
        (lambda: make_showers(1, device="abacus"), "device"),
        (lambda: make_showers(1, generator=3), "generator"),
        (lambda: make_showers(5)[0], "index"),
        (lambda: make_showers(5)[torch.zeros(2, 2).long()], "index"),
        (lambda: made(energy=torch.ones(4, 1)), "energy"),
        (lambda: made(energy=torch.ones(())), "energy"),
        (lambda: made(energy=torch.ones(3)), "clusters"),
        (lambda: made(clusters=torch.ones(4, 30).long()), "clusters"),
        (lambda: made(deposits=torch.ones(4, 29)), "deposits"),
        (lambda: made(cog=torch.ones(4, 2)), "cog"),
    ],
)
def test_mistakes_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()


def test_energies_outside_are_counted():
    energy = torch.tensor([50.0, 91.0, 5.0])
    with pytest.raises(ValueError, match="got 2 outside, the first 91"):
        make_showers(3, energy=energy)
