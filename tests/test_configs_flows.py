"""Experiments of maximum likelihood: settings, data and how they judge, against numbers made by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from flowcourse import configs_flows as module
from flowcourse.configs_flows import FlowConfig
from flowcourse.continuous import Continuous
from flowcourse.data import bits_per_dim, from_logit, load, split
from flowcourse.elementwise import InverseMap
from flowcourse.residual import ResidualFlow
from flowcourse.stochastic import FlowMatching
from flowcourse.toy_densities import toys
from flowcourse.trainer import fit

WRONG = [
    ("data", "mnist", "'old-faithful'"),
    ("scalar_map", "afine", "'affine'"),
    ("kind", "maf", "'autoregressive'"),
    ("partition", "odd", "'alternating'"),
    ("copies", 0, "at least 1"),
    ("copies", -1, "at least 1"),
    ("copies", 2.0, "whole number"),
    ("copies", True, "whole number"),
    ("layers", 0, "at least 1"),
    ("hidden", (8, 0), "positive integers"),
    ("hidden", (-8,), "positive integers"),
    ("jitter", -0.1, "at least 0"),
    ("jitter", math.inf, "finite"),
    ("dropout", 1.5, "at most 1"),
    ("dropout", math.nan, "finite"),
    ("checkpoint_every", 0, "at least 1"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_wrong_setting_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected.*{expected}"):
        FlowConfig(**{name: value})


def normal(x):
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)


@pytest.fixture
def standardised(monkeypatch):
    """The mean and the standard deviations that a `load` used."""
    found = {}
    inside = module.standardise

    def noted(*parts):
        made = inside(*parts)
        found.update(raw=parts, mean=made.mean, sd=made.sd)
        return made

    monkeypatch.setattr(module, "standardise", noted)
    return found


@pytest.mark.parametrize("data", ["breast-cancer", "old-faithful"])
def test_tables_are_standardised_by_their_training_rows(data):
    config = FlowConfig(data=data, copies=3, jitter=0.1)
    rows = config.replace(seed=4).load()
    raw = split(load(data).x, module.SIZES[data], seed=4)
    mean, sd = raw[0].mean(0), raw[0].std(0, correction=0)
    assert_close(rows.validation, (raw[1] - mean) / sd, atol=1e-4, rtol=1e-4)
    assert_close(rows.test, (raw[2] - mean) / sd, atol=1e-4, rtol=1e-4)
    assert_close(rows.test_ladj, -sd.log().sum().expand(len(rows.test)))
    assert rows.truth is None
    # three copies of each training row, each with noise of its own
    noise = rows.train.unflatten(0, (3, -1)) - (raw[0] - mean) / sd
    n = noise[0].numel()
    for part, size in (
        (noise[0], 0.1),
        (noise[2], 0.1),
        (noise[0] - noise[1], 0.1 * math.sqrt(2)),
    ):
        # five standard errors of each
        assert abs(part.std().item() / size - 1) < 5 / math.sqrt(2 * n)
        assert abs(part.mean().item()) < 5 * size / math.sqrt(n)


def test_digits_are_counted_in_the_unit_cube(standardised):
    config = FlowConfig(data="optdigits", copies=2).replace(seed=3)
    rows = config.load()
    assert [len(part) for part in rows[:3]] == [2600, 200, 297]
    raw = split(load("optdigits").x.flatten(1), module.SIZES["optdigits"], 3)
    mean, sd = standardised["mean"], standardised["sd"]
    for part, counts in zip(rows[:3], (raw[0].repeat(2, 1), *raw[1:])):
        p, ladj = from_logit((part * sd + mean).double())
        assert torch.equal((p * 17).floor(), counts.double())
    assert_close(
        rows.test_ladj.double(),
        -ladj - sd.double().log().sum(),
        rtol=1e-4,
        atol=1e-2,
    )
    # other noise for each copy
    assert not torch.equal(rows.train[:1300], rows.train[1300:])


def test_toys_are_judged_against_the_truth(standardised):
    config = FlowConfig(data="moons", layers=1, hidden=(4,))
    rows = config.load()
    assert [len(part) for part in rows[:3]] == [20_000, 2_000, 10_000]
    raw, sd = standardised["raw"][-1], standardised["sd"]
    assert_close(rows.test * sd + standardised["mean"], raw)
    assert_close(rows.truth, toys["moons"].log_prob(raw))
    assert_close(rows.test_ladj, -sd.log().sum().expand(10_000))
    # a flow begins as the standard normal
    result = config.evaluate(config.objective())
    log_prob = normal(rows.test) - sd.log().sum()
    assert result == {
        "test log-likelihood [nat]": pytest.approx(
            log_prob.mean().item(), 1e-4
        ),
        "gap to the true density [nat]": pytest.approx(
            (rows.truth - log_prob).mean().item(), 1e-4
        ),
    }
    assert result["gap to the true density [nat]"] > 0


def test_digits_are_judged_in_bits_too():
    config = FlowConfig(data="optdigits", copies=1, layers=1, hidden=(4,))
    rows, result = config.load(), config.evaluate(config.objective())
    log_prob = normal(rows.test) + rows.test_ladj
    bits = bits_per_dim(log_prob, 64).mean().item()
    assert result["test log-likelihood [nat]"] == pytest.approx(
        log_prob.mean().item(), 1e-4
    )
    assert result["test bits per dimension"] == pytest.approx(bits, 1e-4)


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
def test_settings_reach_the_flow(kind):
    config = FlowConfig(
        kind=kind,
        layers=3,
        hidden=(5, 7),
        dropout=0.25,
        scalar_map="rational-quadratic-spline",
    )
    flow = config.objective().flow
    every = flow.named_modules(remove_duplicate=False)
    modules = [m for _, m in every if isinstance(m, torch.nn.Dropout)]
    # after each of two hidden layers; MADE applies the one that it has to both
    after = 2 if kind == "coupling" else 1
    assert [m.p for m in modules] == [0.25] * after * 3
    text = repr(flow)
    assert "RationalQuadraticSplineMap" in text
    widths = {
        m.out_features for m in flow.modules() if hasattr(m, "out_features")
    }
    assert {5, 7} < widths


def test_the_partition_is_the_one_that_was_named():
    def masks(partition, seed=0):
        config = FlowConfig(data="breast-cancer", partition=partition, layers=2)
        flow = config.replace(seed=seed).objective().flow
        found = [
            b.flatten()
            for n, b in flow.named_buffers()
            if b.dtype == torch.bool
        ]
        return found or [b.flatten() for n, b in flow.named_buffers()]

    first = {name: masks(name) for name in ("half", "alternating", "random")}
    assert all(
        torch.equal(a, b) for a, b in zip(first["random"], masks("random"))
    )
    different = [first["half"], first["alternating"], first["random"]]
    different.append(masks("random", seed=1))
    for i, one in enumerate(different):
        for two in different[:i]:
            assert not all(torch.equal(a, b) for a, b in zip(one, two))


def test_a_density_needs_no_numerical_inverse():
    """A map with a formula one way only is turned so that it leads to the base."""
    real = torch.distributions.constraints.real
    for name, scalar_map in module.scalar_maps.items():
        if scalar_map.domain is not real or scalar_map.codomain is not real:
            continue
        flow = FlowConfig(scalar_map=name, layers=1).objective().flow
        turned = any(isinstance(m, InverseMap) for m in flow.modules()) or (
            "InverseMap" in repr(flow)
        )
        assert turned == (scalar_map.inverse_cost == "numerical"), name


@pytest.mark.parametrize(
    ("kind", "bijection", "told"),
    [
        ("residual", ResidualFlow, "residual flow on moons by maximum"),
        ("continuous", Continuous, "continuous flow on moons by maximum"),
        ("matching", Continuous, "continuous flow on moons by flow matching"),
    ],
)
def test_a_family_without_a_scalar_map_learns_too(kind, bijection, told):
    config = FlowConfig(
        data="moons", kind=kind, layers=2, hidden=(16, 16)
    ).replace(steps=20, batch_size=64, lr=1e-2)
    assert config.about.startswith(told)
    objective, rows = config.objective(), config.load()
    made = objective.flow.bijection
    assert isinstance(objective, FlowMatching) == (kind == "matching")
    assert type(made) is bijection and made.event_shape == (2,)
    gap = "gap to the true density [nat]"
    before = config.evaluate(objective.eval())[gap]
    fit(objective.train(), rows.train, config.recipe, progress=False)
    assert 0 < config.evaluate(objective.eval())[gap] < before - 0.05


class Told:
    """An objective whose flow gives rows that were told, and notes how many were asked for."""

    def __init__(self, x):
        self.x, self.flow, self.asked = x, self, []

    def sample(self, shape, context=None, generator=None):
        self.asked.append((shape, context, generator))
        return self.x[: shape[0]]


@pytest.mark.parametrize(
    "data", ["moons", "old-faithful", "breast-cancer", "optdigits"]
)
def test_rows_are_drawn_in_the_units_of_the_data(data):
    """What the test rows were made to for training is undone, in that row's shape."""
    config = FlowConfig(data=data, jitter=0.1).replace(seed=3)
    draw = torch.Generator().manual_seed(3)
    if data in toys:
        raw = [toys[data].sample(n, draw) for n in (20_000, 2_000, 10_000)][-1]
    else:
        raw = split(load(data).x, module.SIZES[data], seed=3)[-1]
    told, noise = Told(config.load().test), torch.Generator()
    found = config.sampler(told)(50, noise)
    assert list(found) == ["x"] and told.asked == [((50,), None, noise)]
    if data == "optdigits":
        assert found["x"].dtype == torch.uint8
        assert torch.equal(found["x"], raw[:50].to(torch.uint8))
    else:
        # rounded a few times, at the size of the largest number
        off = (found["x"] - raw[:50]).abs() / raw.abs().amax(0)
        assert off.max() < 8 * torch.finfo(torch.float32).eps


def test_draws_of_a_new_flow_are_normal_with_the_mean_and_sd_of_training():
    config = FlowConfig(data="old-faithful", layers=2, hidden=(8,))
    draw = config.sampler(config.objective().eval())
    x, again, other = (
        draw(4000, torch.Generator().manual_seed(seed))["x"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(x, again) and not torch.equal(x, other)
    raw = split(load("old-faithful").x, module.SIZES["old-faithful"], seed=0)
    mean, sd = raw[0].mean(0), raw[0].std(0, correction=0)
    z = (x - mean) / sd
    assert (z.mean(0).abs() < 5 / 4000**0.5).all()
    assert ((z.std(0) - 1).abs() < 5 / 8000**0.5).all()
