"""Schedules and processes: derivatives, scores and marginals against closed forms."""

import math

import pytest
import torch
from helpers import noise
from torch.testing import assert_close

from flowcourse.schedules import (
    SDE,
    Schedule,
    Straight,
    VarianceExploding,
    VariancePreserving,
)

SCHEDULES = {
    "straight": Straight(),
    "noisy": Straight(0.1),
    "preserving": VariancePreserving(),
    "steep": VariancePreserving(epsilon=1e-5),
    "exploding": VarianceExploding(),
}
each_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES.values(), ids=SCHEDULES
)
timed = pytest.mark.parametrize(
    "schedule",
    [SCHEDULES["preserving"], SCHEDULES["steep"], SCHEDULES["exploding"]],
    ids=["preserving", "steep", "exploding"],
)
# the ends, near them, and between
TIMES = [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rates_are_the_derivatives_of_autograd(schedule, dtype):
    t = torch.tensor(TIMES, dtype=dtype, requires_grad=True)
    a, s, a_rate, s_rate = schedule.at(t)
    for value, rate in ((a, a_rate), (s, s_rate)):
        assert rate.dtype == dtype and rate.shape == t.shape
        wanted = torch.zeros_like(t)
        if value.requires_grad:
            total = value.sum()
            (wanted,) = torch.autograd.grad(total, t, retain_graph=True)
        # the exponent has a size of ten, which multiplies rounding
        rtol = 100 * torch.finfo(dtype).eps
        assert_close(rate, wanted, rtol=rtol, atol=rtol)


@each_schedule
def test_float32_loses_nothing_near_the_ends(schedule):
    t = torch.tensor(TIMES)
    for a, b in zip(schedule.at(t), schedule.at(t.double())):
        eps = torch.finfo(torch.float32).eps
        assert_close(a.double(), b, rtol=20 * eps, atol=0)


@each_schedule
def test_noise_over_data_falls(schedule):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    a, s, a_rate, s_rate = schedule.at(t)
    assert (a_rate * s - a * s_rate > 0).all()
    assert ((s / a).diff() < 0).all()


@timed
def test_the_time_of_a_ratio(schedule):
    t = torch.tensor(TIMES, dtype=torch.float64)
    a, s, a_rate, s_rate = schedule.at(t)
    found = schedule.time_of((s / a).log())
    assert_close(found, t, rtol=1e-12, atol=1e-12)
    single = schedule.time_of((s / a).log().float())
    # its own rounding, and that of the ratio over the slope of its logarithm
    slope = (a_rate * s - a * s_rate) / (a * s)
    lost = 1 + (s / a).log().abs() / slope
    eps = torch.finfo(torch.float32).eps
    assert ((single.double() - t).abs() <= 8 * eps * lost).all()


@each_schedule
@pytest.mark.parametrize("sd", [0.3, 2.0])
def test_the_score_of_normal_data_is_known(schedule, sd):
    """They move with v = m'/m x, and have the score -x / m²."""
    t = torch.tensor(TIMES[:-1], dtype=torch.float64)[:, None]
    a, s, a_rate, s_rate = schedule.at(t)
    m2 = a**2 * sd**2 + s**2
    x = noise(len(t), 3) * m2.sqrt()
    v = (a * a_rate * sd**2 + s * s_rate) / m2 * x
    # a v - a' x is small beside its parts where s is
    lost = (a_rate * x).abs().max() / (a_rate * s - a * s_rate) / s
    error = (schedule.score(t, x, v) + x / m2).abs()
    assert (error <= 1e-14 * (x / m2).abs() + 1e-14 * lost).all()


@pytest.mark.parametrize("name", ["preserving", "exploding"])
def test_the_diffusion_is_that_of_the_noise_process(name):
    """From data to noise dx = -(a'/a) x dτ + g dW: any variance a² σ² + s² follows it."""
    schedule = SCHEDULES[name]
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    for sd in (0.0, 1.5):
        a, s, a_rate, _ = schedule.at(t)
        variance = a**2 * sd**2 + s**2
        (rate,) = torch.autograd.grad(variance.sum(), t)
        g2 = -rate + 2 * a_rate / a * variance
        found = schedule.squared_diffusion(t)
        assert_close(found, g2, rtol=1e-9, atol=1e-12)


def test_the_diffusion_of_straight_lines_vanishes_at_the_data():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert_close(Straight().squared_diffusion(t), 2 * (1 - t))
    assert_close(Straight(0.2).squared_diffusion(t), 2 * (1 - 0.8 * t))


def test_what_is_left_at_the_ends():
    assert Straight().smoothing == 0 and Straight().base_sd == 1
    assert Straight(0.1).smoothing == pytest.approx(0.1)
    exploding = VarianceExploding(30.0, 0.02)
    assert exploding.base_sd == pytest.approx(30)
    assert exploding.smoothing == pytest.approx(0.02)
    preserving = VariancePreserving(0.2, 10.0, 0.01)
    total = 0.2 * 0.01 + 9.8 * 0.01**2 / 2  # of the rate, up to epsilon
    wanted = math.sqrt(math.expm1(total))
    assert preserving.smoothing == pytest.approx(wanted)
    start = 0.2 + 9.8 / 2
    assert preserving.base_sd == pytest.approx(math.sqrt(-math.expm1(-start)))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Straight(-0.1), "sigma"),
        (lambda: Straight(1.0), "sigma: expected below 1"),
        (lambda: VariancePreserving(0.0), "low"),
        (lambda: VariancePreserving(2.0, 1.0), "high"),
        (lambda: VariancePreserving(epsilon=0.0), "epsilon"),
        (lambda: VariancePreserving(epsilon=1.0), "epsilon: expected below 1"),
        (lambda: VarianceExploding(1.0, 1.0), "high"),
        (lambda: VarianceExploding(low=0.0), "low"),
        (lambda: SDE(1.0, 1.0), "drift: expected a function"),
        (lambda: SDE(torch.sin, -1.0), "diffusion"),
        (lambda: pull().sample(torch.zeros(()), 3), "x"),
        (lambda: pull().sample(torch.zeros(3, 1), 0), "steps"),
        (lambda: pull().sample(torch.zeros(3, 1), 2, every=0), "every"),
        (lambda: pull().sample(torch.zeros(3, 1), 2, end=math.inf), "end"),
        (lambda: Straight().reverse_sde(torch.sin, noise=-1.0), "noise"),
    ],
)
def test_arguments_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_schedule_of_ones_own_needs_its_numbers():
    with pytest.raises(NotImplementedError, match="Bare defines no at"):
        _ = type("Bare", (Schedule,), {})().base_sd
    assert repr(Straight(0.1)) == "Straight(sigma=0.1)"


# processes


def pull():
    """The process that has the standard normal."""
    return SDE(lambda t, x: -x, 2**0.5)


def test_a_pull_has_the_mean_and_variance_of_its_steps():
    n, steps, h = 100_000, 15, 0.2
    x = torch.full((n, 1), 2.0, dtype=torch.float64)
    end = pull().sample(x, steps, generator(), end=steps * h)
    keep = (1 - h) ** steps
    variance = (1 - keep**2) / (1 - h / 2)
    # five standard errors
    assert abs(end.mean() - 2 * keep) < 5 * (variance / n) ** 0.5
    assert abs(end.var() / variance - 1) < 5 * (2 / n) ** 0.5


def test_the_error_of_a_variance_falls_like_the_step():
    n, exact = 200_000, 1 - math.exp(-2)
    x = torch.zeros(n, 1, dtype=torch.float64)
    off = [
        pull().sample(x, steps, generator(steps)).var().item() - exact
        for steps in (4, 8, 16)
    ]
    # 0.164, 0.076 and 0.037, each known to 0.003
    for more, less in zip(off, off[1:]):
        assert 1.7 < more / less < 2.6


def test_time_moves_as_asked():
    seen = []
    process = SDE(lambda t, x: seen.append(float(t)) or x * 0 + 1, 0.0)
    x = process.sample(torch.zeros(2, 1), 4, start=1.0, end=3.0)
    assert seen == [1.0, 1.5, 2.0, 2.5]
    assert_close(x, torch.full((2, 1), 2.0))


def test_a_generator_decides():
    x = torch.zeros(5, 2, 3)
    a, b, c = (pull().sample(x, 4, generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    state = torch.random.get_rng_state()
    pull().sample(x, 4, generator(1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_few_steps_points_are_kept():
    x = noise(5, 2)
    kept = pull().sample(x, 7, generator(), every=3)
    assert kept.shape == (3, 5, 2)  # the start, and after 3 and 6 steps
    assert torch.equal(kept[0], x)
    every = pull().sample(x, 7, generator(), every=1)
    assert torch.equal(every[::3], kept)
    assert torch.equal(every[-1], pull().sample(x, 7, generator()))


def test_a_process_keeps_no_gradients():
    x = torch.zeros(3, 1, requires_grad=True)
    assert not pull().sample(x, 2).requires_grad


def test_with_an_infinite_diffusion_no_noise_is_none():
    class Circle(Schedule):
        """Without data at the base, g² = 2 w s / a is infinite there."""

        def at(self, t):
            h = math.pi / 2
            a, s = (h * t).sin(), (h * t).cos()
            return a, s, h * s, -h * a

    still = Circle().reverse_sde(lambda t, x: x, noise=0.0)
    end = still.sample(torch.ones(1, 1, dtype=torch.float64), 50)
    assert_close(end.item(), 1.02**50)


class Mixture:
    """Two bumps on a line, seen through a schedule: every density in closed form."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    loc = torch.tensor([-1.0, 0.8], dtype=torch.float64)
    scale = torch.tensor([0.2, 0.4], dtype=torch.float64)

    def __init__(self, schedule):
        self.schedule = schedule

    def parts(self, t):
        """Means and standard deviations of the bumps, and their rates."""
        a, s, a_rate, s_rate = self.schedule.at(t)
        m = (a**2 * self.scale**2 + s**2).sqrt()
        m_rate = (a * a_rate * self.scale**2 + s * s_rate) / m
        return a * self.loc, m, a_rate * self.loc, m_rate

    def velocity(self, t, x):
        """The mean of the bumps' own velocities, by how likely each is here."""
        mean, m, mean_rate, m_rate = self.parts(t)
        z = (x - mean) / m
        each = self.weights.log() - m.log() - z.square() / 2
        return (each.softmax(-1) * (mean_rate + m_rate * z)).sum(-1, True)

    def at(self, t, n):
        mean, m, *_ = self.parts(torch.tensor(t, dtype=torch.float64))
        k = torch.multinomial(self.weights, n, True, generator=generator(7))
        return (mean[k] + m[k] * noise(n, seed=8))[:, None]

    def cdf(self, t, x):
        mean, m, *_ = self.parts(torch.tensor(t, dtype=torch.float64))
        return torch.special.ndtr((x - mean) / m) @ self.weights


def distance(mixture, t, x):
    """The largest gap between the shares of points and of the density below a place."""
    x = x.sort(0).values
    share = (torch.arange(len(x)) + 0.5) / len(x)
    return (mixture.cdf(t, x) - share).abs().max().item()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["straight", "preserving", "exploding"])
def test_with_any_noise_points_have_the_densities_of_the_flow(name, strength):
    """Kolmogorov's distance, within what sampling and steps of 1/400 explain."""
    mixture, n = Mixture(SCHEDULES[name]), 10_000
    process = mixture.schedule.reverse_sde(mixture.velocity, noise=strength)
    paths = process.sample(mixture.at(0.0, n), 400, generator(), every=200)
    sampling = 1.95 / n**0.5  # exceeded once in a thousand times
    for t, x in zip((0.0, 0.5, 1.0), paths):
        assert distance(mixture, t, x) < sampling + (0.01 if t else 0)


def test_the_distance_would_notice():
    mixture = Mixture(SCHEDULES["preserving"])
    wrong = SDE(mixture.velocity, 1.0)  # noise without the score's pull
    x = wrong.sample(mixture.at(0.0, 10_000), 400, generator())
    assert distance(mixture, 1.0, x) > 0.05


def test_a_context_goes_to_the_velocity():
    def velocity(t, x, context):
        return context * x

    context, x = torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)
    process = Straight().reverse_sde(velocity, context, noise=0.0)
    assert_close(process.sample(x, 1), torch.tensor([[2.0], [3.0]]))
