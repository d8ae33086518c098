"""How far two samples are apart: each metric on cases whose answer is known."""

import math

import pytest
import scipy.stats
import torch
from helpers import check_under_a_default_device, noise
from torch import nn
from torch.testing import assert_close

from flowcourse.metrics import (
    _auc,
    _calibration,
    _divide,
    classifier_auc,
    energy_distance,
    mmd,
    sliced_wasserstein,
    wasserstein,
)
from flowcourse.recipe import Recipe
from flowcourse.testing import expect_fail

QUICK = Recipe(epochs=3, lr=1e-2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sliced(x, y, **settings):
    return sliced_wasserstein(x, y, generator=seeded(), **settings)


def mmd_of_width_1(x, y):
    return mmd(x, y, bandwidth=1.0)


DISTANCES = [sliced, energy_distance, mmd, mmd_of_width_1]


@pytest.mark.parametrize("p", [1, 1.5, 2, 7])
def test_wasserstein_of_a_shift_is_the_shift(p):
    x = noise(100)
    other = x[torch.randperm(100, generator=seeded())]
    for shift in (-3.0, 0.5):
        expected = torch.tensor(abs(shift)).double()
        assert_close(wasserstein(x, other + shift, p), expected)


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("sizes", [(1, 7), (6, 4), (12, 4), (25, 26)])
def test_wasserstein_of_samples_of_two_sizes(sizes, p):
    # each point repeated as often as the other sample has points: equal sizes,
    # and the plan that keeps the order
    n, m = sizes
    x, y = noise(n), 2 * noise(m, seed=1) + 1
    long = x.sort().values.repeat_interleave(m)
    other = y.sort().values.repeat_interleave(n)
    expected = (long - other).abs().pow(p).mean().pow(1 / p)
    assert_close(wasserstein(x, y, p), expected)
    assert_close(wasserstein(y, x, p), expected)
    if p == 1:
        theirs = scipy.stats.wasserstein_distance(x.numpy(), y.numpy())
        assert wasserstein(x, y).item() == pytest.approx(theirs)


def test_wasserstein_of_gaussians_and_of_uniforms():
    # W2 of N(0, 1) and N(3, 2): the root of 3² + 1²; the difference of the
    # means scatters by sqrt(5 / n), that of the scales by less
    n = 20_000
    x, y = noise(n), 2 * noise(n, seed=1) + 3
    found = wasserstein(x, y, p=2).item()
    assert found == pytest.approx(math.sqrt(10), abs=4 * math.sqrt(5 / n))
    # of U(0, 1) and U(0, s): (s - 1) / 2, and (s - 1) / sqrt(3)
    u = torch.rand(n, generator=seeded(), dtype=torch.float64)
    v = torch.rand(n, generator=seeded(1), dtype=torch.float64)
    for p, expected in ((1, 1.0), (2, 2 / math.sqrt(3))):
        found = wasserstein(u, 3 * v, p).item()
        assert found == pytest.approx(expected, abs=4 * math.sqrt(10 / 12 / n))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_wasserstein_has_a_gradient(p):
    x, y = noise(6).requires_grad_(), noise(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: wasserstein(x, y, p), (x, y))
    # where the samples are equal, the root has no slope
    found = wasserstein(x, x.detach(), p)
    (slope,) = torch.autograd.grad(found, x)
    assert found == 0 and (slope == 0).all()


def test_wasserstein_neither_overflows_nor_vanishes():
    x, y = noise(50), noise(30, seed=1)
    for p in (1, 3, 60):
        plain = wasserstein(x, y, p)
        for scale in (1e-200, 1e200):
            assert_close(wasserstein(scale * x, scale * y, p), scale * plain)
    far = torch.tensor([1e38, -1e38])
    assert_close(wasserstein(far, far.flip(0) / 2, p=2), far[0] / 2)


def test_one_dimension_has_one_slice():
    x, y = noise(40), noise(30, seed=1) + 1
    for p in (1, 2.5):
        assert_close(sliced(x[:, None], y[:, None], p=p), wasserstein(x, y, p))
        assert_close(sliced(x, y, p=p), wasserstein(x, y, p))


@pytest.mark.parametrize("p", [1, 3])
def test_sliced_wasserstein_is_the_power_mean_over_directions(p):
    x, y = noise(20, 3), noise(15, 3, seed=1) + 1
    theta = torch.randn(7, 3, generator=seeded(), dtype=torch.float64)
    each = [
        wasserstein(x @ t / t.norm(), y @ t / t.norm(), p) ** p for t in theta
    ]
    expected = torch.stack(each).mean() ** (1 / p)
    assert_close(sliced(x, y, projections=7, p=p), expected)


@pytest.mark.parametrize("d", [2, 5])
def test_sliced_wasserstein_of_a_shift(d):
    # theta_1² has mean 1 / d and variance 2 (d - 1) / (d² (d + 2))
    x, shift, many = noise(50, d), torch.zeros(d).double(), 20_000
    shift[1] = -3.0
    found = sliced(x, x + shift, projections=many, p=2) ** 2 / 9
    scatter = math.sqrt(2 * (d - 1) / (d**2 * (d + 2)) / many)
    assert found.item() == pytest.approx(1 / d, abs=4 * scatter)
    # |theta_1| has mean Gamma(d/2) / (sqrt(pi) Gamma((d + 1)/2))
    mean = math.gamma(d / 2) / math.gamma((d + 1) / 2) / math.sqrt(math.pi)
    found = sliced(x, x + shift, projections=many) / 3
    scatter = math.sqrt((1 / d - mean**2) / many)
    assert found.item() == pytest.approx(mean, abs=4 * scatter)


def test_directions_follow_from_the_generator():
    x, y = noise(20, 3), noise(30, 3, seed=1)
    assert torch.equal(sliced(x, y), sliced(x, y))
    other = sliced_wasserstein(x, y, generator=seeded(1))
    assert not torch.equal(sliced(x, y), other)
    # the same for either dtype
    assert_close(sliced(x.float(), y.float()), sliced(x, y).float())
    torch.manual_seed(0)
    first, second = sliced_wasserstein(x, y), sliced_wasserstein(x, y)
    torch.manual_seed(0)
    assert torch.equal(first, sliced_wasserstein(x, y)) and first != second


def test_energy_distance_of_points():
    x, y = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])
    assert_close(energy_distance(x, y), torch.tensor(10.0))
    # {0, 2} and {1}: 2 * 1 - 1 - 0, with pairs of a point with itself
    x, y = torch.tensor([0.0, 2.0]), torch.tensor([1.0])
    assert_close(energy_distance(x, y), torch.tensor(1.0))


def test_energy_distance_is_never_negative():
    for seed in range(30):
        x = noise(20, 2, seed=seed)
        found = energy_distance(x, x[torch.randperm(20, generator=seeded())])
        assert 0 <= found < 1e-14


def test_energy_distance_is_scipys_on_the_line():
    x, y = noise(40), 2 * noise(30, seed=1) + 1
    theirs = scipy.stats.energy_distance(x.numpy(), y.numpy())
    assert energy_distance(x, y).item() == pytest.approx(theirs**2)


def many_times(distance, shift, times=200, n=60, m=40):
    """Mean and its standard error over pairs of Gaussian samples in the plane."""
    a = torch.tensor([shift, 0.0], dtype=torch.float64)
    found = torch.stack([
        distance(noise(n, 2, seed=s), noise(m, 2, seed=1000 + s) + a)
        for s in range(times)
    ])  # fmt: skip
    return found.mean().item(), found.std().item() / math.sqrt(times)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_energy_distance_of_gaussians(shift):
    # |x - y| is Rice's, |x - x'| Rayleigh's of mean sqrt(pi); the pairs of a
    # point with itself add (1/n + 1/m) of that
    t = shift**2 / 8
    rice = (1 + 2 * t) * scipy.special.ive(0, t)
    rice += 2 * t * scipy.special.ive(1, t)
    expected = math.sqrt(math.pi) * (2 * rice - 2 + 1 / 60 + 1 / 40)
    mean, error = many_times(energy_distance, shift)
    assert mean == pytest.approx(expected, abs=4 * error)
    assert error < expected / 10


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_mmd_of_gaussians_is_unbiased(shift):
    h2, d = 0.8**2, 2
    expected = 2 * (h2 / (h2 + 2)) ** (d / 2)
    expected *= 1 - math.exp(-(shift**2) / (2 * (h2 + 2)))
    mean, error = many_times(lambda x, y: mmd(x, y, bandwidth=0.8), shift)
    assert mean == pytest.approx(expected, abs=4 * error)
    # the biased estimate would be too large by this, far more than the error
    bias = (1 / 60 + 1 / 40) * (1 - h2 / (h2 + 2))
    assert error < bias / 8


def test_mmd_by_hand():
    x, y = noise(9, 3), noise(7, 3, seed=1) + 1

    def mean(a, b, h):
        k = [
            math.exp(-(s - t).square().sum().item() / (2 * h**2))
            for i, s in enumerate(a)
            for j, t in enumerate(b)
            if a is not b or i != j
        ]
        return sum(k) / len(k)

    both = torch.cat([x, y])
    median = torch.stack([
        (s - t).norm() for i, s in enumerate(both) for t in both[:i]
    ]).median().item()  # fmt: skip
    for bandwidth in (None, 0.5, 3):
        h = bandwidth or median
        expected = mean(x, x, h) + mean(y, y, h) - 2 * mean(x, y, h)
        assert mmd(x, y, bandwidth).item() == pytest.approx(expected)


def test_mmd_needs_a_bandwidth_and_pairs():
    x = torch.zeros(9, 2)
    with expect_fail(ValueError, contains="bandwidth: most pairs"):
        mmd(x, x)
    for wrong in (0, -1.0, math.nan, "wide"):
        with expect_fail(ValueError, contains="bandwidth: expected"):
            mmd(x, x, bandwidth=wrong)
    for a, b, name in ((x[:1], x, "x"), (x, x[:1], "y")):
        with expect_fail(ValueError, contains=f"{name}: expected 2 points"):
            mmd(a, b, bandwidth=1)


def test_the_median_distance_is_of_2000_points_at_most(monkeypatch):
    x, y = noise(3000, 2), noise(1500, 2, seed=1)
    seen = []
    pdist = torch.pdist
    monkeypatch.setattr(
        torch, "pdist", lambda t: seen.append(len(t)) or pdist(t)
    )
    found = mmd(x, y)
    assert seen == [1500]
    # of unit Gaussians in the plane: the median of Rayleigh's, 2 sqrt(log 2)
    assert_close(
        found, mmd(x, y, 2 * math.sqrt(math.log(2))), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_know_neither_order_nor_side(distance):
    x, y = noise(30, 2, 3), noise(20, 2, 3, seed=1) + 0.5
    plain = distance(x, y)
    assert plain.shape == () and plain.dtype == torch.float64
    shuffled = x[torch.randperm(30, generator=seeded())], y.flip(0)
    assert_close(distance(*shuffled), plain)
    assert_close(distance(y, x), plain)
    assert_close(distance(x.flatten(1), y.flatten(1)), plain)
    assert_close(distance(x + 100, y + 100), plain)
    # what is rounded to float32 is off by eps of its size, about 1
    found = distance(x.float(), y.float())
    assert_close(found, plain.float(), atol=4 * 2**-23, rtol=4 * 2**-23)
    if distance is not mmd_of_width_1 and distance is not mmd:
        assert_close(distance(3 * x, 3 * y), 3 * plain)
        assert distance(x, x.flip(0)) < 1e-14


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_have_gradients(distance):
    x, y = noise(5, 2), noise(4, 2, seed=1) + 0.5
    if distance is mmd:  # whose bandwidth is a number to it
        slope = torch.autograd.functional.jacobian(lambda x: mmd(x, y), x)
        h = torch.pdist(torch.cat([x, y])).median().item()
        fixed = torch.autograd.functional.jacobian(lambda x: mmd(x, y, h), x)
        assert_close(slope, fixed)
        return
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance(x, y), x)


@pytest.mark.parametrize("distance", DISTANCES)
def test_memory_is_bounded(distance, monkeypatch):
    x, y = noise(50, 2), noise(40, 2, seed=1) + 1
    plain, sizes = distance(x, y), []
    for name in ("cdist", "matmul"):
        whole = getattr(torch, name)

        def counted(*args, whole=whole, **kwargs):
            found = whole(*args, **kwargs)
            sizes.append(found.numel())
            return found

        monkeypatch.setattr(torch, name, counted)
    monkeypatch.setattr(torch.Tensor, "__matmul__", torch.matmul)
    for block in (1, 170, 1000):
        monkeypatch.setattr("flowcourse.metrics.BLOCK", block)
        assert_close(distance(x, y), plain)
        # never less than a row
        assert 0 < max(sizes) <= max(block, 90)
        sizes.clear()


@pytest.mark.parametrize(
    "distance",
    [wasserstein, *DISTANCES, lambda x, y: classifier_auc(x, y, recipe=QUICK)],
)
def test_what_is_no_pair_of_samples_is_refused(distance):
    shape = (30,) if distance is wasserstein else (30, 2)
    x = noise(*shape)
    bad = x.clone()
    bad[7:9] = math.nan
    for wrong, told in (
        (x[:0], "expected shape"),
        (
            bad,
            "expected finite numbers, got 2 rows with NaN or infinite ones, the first of them row 7",
        ),
        (x / 0, "expected finite numbers"),
        (x.long(), "expected floating-point numbers"),
        (x.tolist(), "expected floating-point numbers"),
        (None, "expected floating-point numbers"),
        (torch.zeros(shape, device="meta"), "expected values"),
        (torch.tensor(1.0), "expected shape"),
    ):
        with expect_fail(ValueError, contains=f"x: {told}"):
            distance(wrong, x)
        with expect_fail(ValueError, contains=f"y: {told}"):
            distance(x, wrong)
    with expect_fail(ValueError, contains="y: expected torch.float64 on cpu"):
        distance(x, x.float())
    if distance is wasserstein:
        with expect_fail(ValueError, contains="x: expected shape (n,)"):
            distance(x[:, None], x)
        return
    with expect_fail(ValueError, contains="events of shape (2,) as in x"):
        distance(x, x[:, :1])
    with expect_fail(ValueError, contains="x: expected numbers, got shape"):
        distance(x[:, :0], x[:, :0])


def test_settings_of_distances_are_read():
    x = noise(30, 2)
    for p in (0.5, math.inf, "1", None):
        with expect_fail(ValueError, contains="p: expected"):
            wasserstein(x[:, 0], x[:, 1], p)
        with expect_fail(ValueError, contains="p: expected"):
            sliced_wasserstein(x, x, p=p)
    with expect_fail(ValueError, contains="projections: expected"):
        sliced_wasserstein(x, x, projections=0)
    with expect_fail(ValueError, contains="generator: expected"):
        sliced_wasserstein(x, x, generator=3)


def test_auc_counts_pairs_and_shares_ties():
    low, high = noise(40).round(decimals=1), noise(30, seed=1) + 0.5
    high = high.round(decimals=1)
    above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    # DeLong et al.: the variance of a score's own share, for either sample
    error = above.mean(1).var() / 30 + above.mean(0).var() / 40
    found = _auc(low, high)
    assert found == pytest.approx((above.mean().item(), math.sqrt(error)))
    turned = _auc(high, low)
    assert turned == pytest.approx((1 - found[0], found[1]))
    assert _auc(low, low)[0] == pytest.approx(0.5)
    assert _auc(low, low + 100) == (1.0, 0.0)


def test_the_error_of_an_auc_is_its_scatter():
    found = torch.tensor([
        _auc(noise(80, seed=s), noise(50, seed=1000 + s) + 1)
        for s in range(300)
    ])  # fmt: skip
    scatter, told = found[:, 0].std(), found[:, 1].mean()
    # a standard deviation of 300 is known to 1 / sqrt(600)
    assert (told / scatter).item() == pytest.approx(1, abs=4 / math.sqrt(600))
    expected = 0.5 * math.erfc(-1 / 2)
    assert found[:, 0].mean().item() == pytest.approx(
        expected, abs=4 * scatter.item() / math.sqrt(300)
    )


def test_calibration_of_known_probabilities():
    n = 100_000
    p = torch.rand(n, generator=seeded(), dtype=torch.float64)
    u = torch.rand(n, generator=seeded(1), dtype=torch.float64)
    *_, predicted, observed, count = _calibration(p, (u < p) * 1.0, 10)
    assert count.tolist() == [n // 10] * 10
    centers = (torch.arange(10) + 0.5).double() / 10
    assert_close(predicted, centers, atol=4 / math.sqrt(12 * n), rtol=0)
    scatter = (centers * (1 - centers) / count).sqrt()
    assert ((observed - centers).abs() < 4 * scatter).all()
    # half-normal deviations of many bins, whose mean is known to a few percent
    ece, level, *_ = _calibration(p, (u < p) * 1.0, 500)
    assert ece == pytest.approx(level, abs=4 * level * 0.756 / math.sqrt(500))
    # who says p where p² is true is off by p - p² on average, that is 1/6
    ece = _calibration(p, (u < p**2) * 1.0, 10)[0]
    assert ece == pytest.approx(1 / 6, abs=0.01)


def test_calibration_of_a_constant_is_one_bin():
    labels = torch.arange(10.0).double().clamp(max=3) / 3  # ordered
    labels = (labels == 1).double()
    p = torch.full((10,), 0.7, dtype=torch.float64)
    ece, _, predicted, observed, count = _calibration(p, labels, 5)
    assert count.tolist() == [10] and ece == pytest.approx(0)
    assert_close(predicted, p[:1])
    assert_close(observed, p[:1])
    # ties do not straddle an edge, and more bins than points do no harm
    p[:4] = 0.2
    assert _calibration(p, labels, 3)[-1].tolist() == [4, 6]
    assert _calibration(noise(3).sigmoid(), labels[:3], 50)[-1].sum() == 3


def gaussians(n, m, d, shift, seed=0):
    x, y = noise(n, d, seed=seed).float(), noise(m, d, seed=seed + 50).float()
    y[:, 0] += shift
    return x, y


@pytest.mark.parametrize("sizes", [(1500, 1500), (2000, 800)])
def test_equal_distributions_have_an_auc_of_a_half(sizes):
    found = classifier_auc(*gaussians(*sizes, 3, 0.0), generator=seeded())
    assert abs(found.auc - 0.5) < 3 * found.error
    # as Mann and Whitney's test without ties
    n, m = (round(0.4 * size) for size in sizes)
    assert found.error == pytest.approx(
        math.sqrt((n + m + 1) / (12 * n * m)), rel=0.1
    )
    share = sizes[1] / sum(sizes)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.chance == pytest.approx(entropy, rel=1e-3)
    assert found.log_loss == pytest.approx(entropy, abs=0.02)
    assert found.counts.sum() == n + m and len(found.counts) <= 10


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_gaussians_are_told_apart_as_well_as_can_be(shift):
    x, y = gaussians(3000, 3000, 2, shift)
    found = classifier_auc(x, y, generator=seeded())
    best = 0.5 * math.erfc(-shift / 2)  # Phi(shift / sqrt 2)
    assert abs(found.auc - best) < 3 * found.error
    assert found.ece < 2 * found.ece_noise
    assert found.log_loss < found.chance
    # the training ended by itself
    assert found.history.best_step < len(found.history) < 100 * 25
    # the other way round: the same points held out, by another judge
    turned = classifier_auc(y, x, generator=seeded())
    assert turned.auc == pytest.approx(found.auc, abs=found.error)


def test_what_only_a_network_sees():
    # the margins are the same, but y keeps to quadrants 1 and 3
    x, y = noise(2, 3000, 2).float()
    y = y.abs() * noise(3000, 1, seed=1).sign().float()
    found = classifier_auc(x, y, generator=seeded())
    # half of the points of x lie where y has none: 3/4 is the best, and the
    # edges of the quadrants are not learned quite
    assert 0.7 < found.auc < 0.75 + 3 * found.error


def test_a_classifier_follows_from_the_generator_alone():
    x, y = gaussians(60, 80, 2, 1.0)
    state = torch.get_rng_state()
    found = [
        classifier_auc(x, y, recipe=QUICK, generator=seeded(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert found[0].auc == found[1].auc
    assert found[0].log_loss == found[1].log_loss != found[2].log_loss
    torch.manual_seed(0)
    first = classifier_auc(x, y, recipe=QUICK)
    second = classifier_auc(x, y, recipe=QUICK)
    torch.manual_seed(0)
    again = classifier_auc(x, y, recipe=QUICK)
    assert first.log_loss == again.log_loss != second.log_loss


def test_features_are_standardised_with_the_training_points():
    x, y = gaussians(200, 200, 2, 1.0)
    x, y = x.double(), y.double()
    parts = _divide((x, y), 0.4, 3)
    assert [len(part[1]) for part in parts] == [192, 48, 160]
    assert [part[1].mean().item() for part in parts] == [0.5] * 3
    features = parts[0][0]
    assert features.dtype == torch.float32
    assert_close(features.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    assert_close(features.std(0), torch.ones(2))
    # units do not matter, nor does a feature that is constant
    scale, offset = torch.tensor([1e6, 1e-6]), torch.tensor([1e7, 3.0])
    for a, b in zip(
        parts, _divide((x * scale + offset, y * scale + offset), 0.4, 3)
    ):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    same = torch.full((200, 1), 0.1).double()
    wide = _divide([torch.cat([t, same], 1) for t in (x, y)], 0.4, 3)
    assert all(part[0].isfinite().all() for part in wide)


def test_pairs_fall_into_the_same_part():
    x = noise(50, 1)
    for features, labels in _divide((x, x), 0.3, 5):
        a, b = features[labels == 0], features[labels == 1]
        assert len(a) and torch.equal(a, b)
    rows = torch.cat(
        [part[0][part[1] == 0] for part in _divide((x, x), 0.3, 5)]
    )
    assert len(rows.unique()) == 50  # each once


def test_a_network_of_ones_own():
    x, y = gaussians(100, 100, 2, 4.0)
    images = x.reshape(100, 1, 2, 1), y.reshape(100, 1, 2, 1)
    found = classifier_auc(
        *images,
        network=lambda n: nn.Linear(n, 1),
        recipe=Recipe(steps=200, lr=0.1),
        generator=seeded(),
        bins=4,
        held_out=0.5,
    )
    assert found.auc > 0.95 and found.counts.tolist() == [25] * 4
    assert "predicted" not in repr(found)
    with expect_fail(ValueError, contains="network: expected one number"):
        classifier_auc(x, y, network=lambda n: nn.Linear(n, 2), recipe=QUICK)
    with expect_fail(ValueError, contains="network: expected what makes"):
        classifier_auc(x, y, network=lambda n: None, recipe=QUICK)


def test_settings_of_a_classifier_are_read():
    x, y = gaussians(30, 30, 2, 1.0)
    for name, wrong in (
        ("held_out", 0.05),
        ("held_out", 1.0),
        ("bins", 0),
        ("recipe", {"steps": 3}),
        ("generator", 3),
    ):
        with expect_fail(ValueError, contains=f"{name}: expected"):
            classifier_auc(x, y, **{name: wrong})
    for a, b, name in ((x[:19], y, "x"), (x, y[:19], "y")):
        with expect_fail(ValueError, contains=f"{name}: expected 20 points"):
            classifier_auc(a, b)
    for held_out in (0.1, 0.9):  # the smallest samples
        found = classifier_auc(
            x[:20], y[:20], held_out=held_out, recipe=QUICK, generator=seeded()
        )
        assert found.counts.sum() == round(20 * held_out) * 2


def test_a_default_device_does_not_reach_the_metrics():
    x, y = gaussians(40, 30, 2, 1.0)

    def look():
        found = classifier_auc(x, y, recipe=QUICK, generator=seeded())
        return (
            wasserstein(x[:, 0], y[:, 0]),
            *(distance(x, y) for distance in DISTANCES),
            found.predicted,
            found.observed,
        )

    check_under_a_default_device(look)


def test_a_device_without_float64_is_served(monkeypatch):
    # Apple's GPU, as far as this can be seen elsewhere
    x, y = gaussians(40, 30, 2, 1.0)
    plain = [distance(x, y) for distance in DISTANCES[1:]]
    monkeypatch.setattr("flowcourse.metrics.in_double", lambda t: t)

    def double(self):
        raise AssertionError("no float64")

    monkeypatch.setattr(torch.Tensor, "double", double)
    for distance, expected in zip(DISTANCES[1:], plain, strict=True):
        assert_close(distance(x, y), expected, atol=1e-4, rtol=1e-4)
    assert sliced(x, y) > 0
    classifier_auc(x, y, recipe=QUICK, generator=seeded())
