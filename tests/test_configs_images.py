"""Experiments of images: settings, data, objectives and how they judge, against numbers made by hand."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from flowcourse import configs_images as module
from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.configs_images import ImageConfig, MatchedImages
from flowcourse.data import Data, load, split
from flowcourse.images import ActNorm, Dequantisation, Glow
from flowcourse.residual import ResidualFlow
from flowcourse.trainer import fit

KINDS = ("glow", "residual", "matching")
SMALL = ImageConfig(data="optdigits", layers=2, hidden=(8, 8), alpha=0.01)
BITS = "test bits per dimension, bound"
WRONG = [
    ("data", "mnist", "'mnist-grey'"),
    ("kind", "maf", "'glow'"),
    ("noise", "gaussian", "'uniform'"),
    ("mixing", "lu", "'permutation'"),
    ("levels", 0, "at least 1"),
    ("levels", 3, "fewer"),
    ("layers", 0, "at least 1"),
    ("hidden", (), "positive integers"),
    ("hidden", (8, 0), "positive integers"),
    ("alpha", 0.0, "above 0"),
    ("alpha", 0.5, "less than 0.5"),
    ("lipschitz", 0.0, "above 0"),
    ("lipschitz", 1.0, "less than 1"),
    ("tolerance", 0.0, "above 0"),
    ("dropout", 1.5, "at most 1"),
    ("judged", 0, "at least 1"),
    ("samples", 0, "at least 1"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_wrong_setting_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected.*{expected}"):
        ImageConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "matching", "hidden": (8,)}, "^hidden: expected 2 numbers"),
        ({"kind": "matching", "noise": "variational"}, "^noise: expected"),
        ({"kind": "matching", "samples": 2}, "^samples: expected 1"),
        ({"kind": "residual", "samples": 2}, "^samples: expected 1"),
        ({"kind": "residual", "levels": 4}, "^levels: expected fewer"),
        ({"levels": 4, "data": "optdigits"}, "^levels: expected fewer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ImageConfig(**settings)
    # what only this kind cannot do
    ImageConfig(kind="glow", noise="variational", samples=2)


# --- data ---


def test_the_splits_of_the_package_are_taken_as_they_are():
    rows = ImageConfig(data="mnist-grey").load()
    for name, part in zip(("train", "validation", "test"), rows):
        assert torch.equal(part, load("mnist-grey", name).x[:, None])
    assert torch.equal(rows.test_ladj, torch.zeros(1000))


def test_digits_are_split_by_the_seed():
    rows = SMALL.replace(seed=3).load()
    parts = split(load("optdigits").x, module.SIZES["optdigits"], 3)
    for part, wanted in zip(rows, parts):
        assert torch.equal(part, wanted[:, None])
    assert SMALL.counts == int(rows.train.max()) + 1 == 17


def test_the_last_sixth_of_the_original_is_held_out(monkeypatch):
    n = {"train": 12, "test": 3}
    made = {
        name: Data(torch.rand(n[name], 28, 28).mul(256).byte(), None)
        for name in n
    }
    monkeypatch.setattr(module, "mnist_grey", made.get)
    rows = ImageConfig().load()
    assert torch.equal(rows.train, made["train"].x[:10, None])
    assert torch.equal(rows.validation, made["train"].x[10:, None])
    assert torch.equal(rows.test, made["test"].x[:, None])


def test_without_the_original_a_line_says_what_to_do(monkeypatch, capsys):
    def missing(split):
        raise RuntimeError("not on this machine;\nset FLOWCOURSE_DATA")

    monkeypatch.setattr(module, "mnist_grey", missing)
    assert main(["train", "--config", "glow.mnist", "--out", "/tmp/none"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        "flowcourse: --data: not on this machine; set FLOWCOURSE_DATA"
    )


# --- objectives ---


def test_settings_reach_glow():
    config = SMALL.replace(levels=3, layers=2, hidden=(5, 7), dropout=0.25)
    config = config.replace(mixing="permutation", noise="variational")
    objective = config.objective()
    glow, logit = objective.flow.bijection.bijections
    assert type(glow) is Glow and len(glow.levels) == 3
    norms = [m for m in objective.modules() if isinstance(m, ActNorm)]
    assert len(norms) == 3 * 2
    widths = {m.out_channels for m in glow.modules() if hasattr(m, "stride")}
    assert {5, 7} < widths
    drops = [
        m.p for m in objective.modules() if isinstance(m, torch.nn.Dropout)
    ]
    assert set(drops) == {0.25}
    assert "Permutation" in repr(glow) and "PLU" not in repr(glow)
    assert objective.levels == 17 and objective.noise is not None
    assert "PLU" in repr(SMALL.objective()) and SMALL.objective().noise is None
    low, high = (logit.push(torch.full((1, 8, 8), z)) for z in (-50.0, 50.0))
    assert_close(low, torch.full_like(low, -0.01 / 0.98))
    assert_close(high, torch.full_like(low, 1 + 0.01 / 0.98))


def test_settings_reach_residual_blocks():
    config = SMALL.replace(kind="residual", levels=3, lipschitz=0.75)
    blocks, _ = config.objective().flow.bijection.bijections
    flows = [f for f in blocks.bijections if isinstance(f, ResidualFlow)]
    shapes = [f.event_shape for f in flows]
    assert shapes == [(16, 2, 2), (4, 4, 4), (1, 8, 8)]
    assert {(f.layers, f.hidden, f.lipschitz) for f in flows} == {
        (2, (8, 8), 0.75)
    }


def test_settings_reach_the_velocity():
    config = SMALL.replace(kind="matching", hidden=(4, 8), tolerance=0.01)
    objective = config.objective()
    along = objective.matching.flow.bijection
    assert along.velocity.hidden == (4, 8) and along.tolerance == 0.01
    assert objective.bound.flow.bijection.bijections[0] is along
    assert objective.levels == objective.bound.levels == 17


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_makes_the_weights(kind):
    config = SMALL.replace(kind=kind)
    torch.manual_seed(1)
    one, two = config.objective(), config.objective()
    other = config.replace(seed=1).objective()
    pairs = [*zip(one.parameters(), two.parameters(), other.parameters())]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_matching_regresses_where_the_base_lives():
    """The loss of a velocity of zero, by hand from the same noise."""
    objective = SMALL.replace(kind="matching").objective()
    counts = SMALL.load().train[:64]
    u, uniform, z = noise = objective.draw(64, torch.Generator().manual_seed(0))
    assert u.shape == z.shape == (64, 1, 8, 8) and uniform.shape == (64, 2)
    objective.start(counts, noise)
    p = 0.01 + 0.98 * (counts + u) / 17
    y = p.logit()
    x = (y - y.mean()) / y.std(correction=0)
    wanted = (x - z).flatten(1).square().sum(-1)
    assert_close(objective.losses(counts, noise), wanted, atol=0.05, rtol=1e-3)


def test_counts_out_of_range_are_refused():
    for kind in KINDS:
        objective = SMALL.replace(kind=kind).objective()
        with pytest.raises(ValueError, match="counts: expected 0 to 16"):
            fit(objective, torch.full((8, 1, 8, 8), 17), steps=1)


# --- judging ---


def by_hand(counts, alpha, levels, generator):
    """The bound of each image under a standard normal behind the logit."""
    u = torch.rand(counts.shape, generator=generator)
    p = alpha + (1 - 2 * alpha) * (counts + u) / levels
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(p.logit())
    slope = (1 - 2 * alpha) / (p * (1 - p))
    return (log_prob + slope.log() - math.log(levels)).flatten(1).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_flow_is_judged_by_hand(kind, monkeypatch):
    """All three begin as a volume-preserving map of the base."""
    monkeypatch.setattr(module, "ROWS", 20)
    config = SMALL.replace(kind=kind, judged=50, seed=2)
    result = config.evaluate(config.objective().eval())
    generator = torch.Generator().manual_seed(2)
    parts = config.load().test[:50].split(20)
    log_prob = torch.cat([by_hand(x, 0.01, 17, generator) for x in parts])
    bits = -log_prob / 64 / math.log(2)
    assert result == {
        "test log-likelihood, bound [nat]": pytest.approx(
            log_prob.mean().item(), 1e-4
        ),
        BITS: pytest.approx(bits.mean().item(), 1e-4),
        "standard error over images [bit]": pytest.approx(
            bits.std().item() / math.sqrt(50), 1e-3
        ),
        "test images": 50,
        "draws of noise": 1,
    }


def test_more_draws_of_noise_tighten_the_bound():
    config = SMALL.replace(judged=20, samples=5)
    result = config.evaluate(config.objective().eval())
    generator = torch.Generator().manual_seed(0)
    x = config.load().test[:20]
    found = torch.stack([by_hand(x, 0.01, 17, generator) for _ in range(5)])
    tight = found.logsumexp(0) - math.log(5)
    nats = result["test log-likelihood, bound [nat]"]
    assert nats == pytest.approx(tight.mean().item(), 1e-4)
    assert nats > found.mean().item() and result["draws of noise"] == 5


def shaken(kind):
    """An objective whose log-determinant has to be estimated, with some weights."""
    # the exact divergence takes a pass for each pixel
    judged = 200 if kind == "residual" else 16
    config = SMALL.replace(kind=kind, judged=judged)
    objective = config.objective().eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, p in objective.named_parameters():
            if p.requires_grad and "raw" not in name:
                p.data += (
                    0.5 * torch.randn_like(p) / max(1, p[0].numel()) ** 0.5
                )
    return config, objective


@pytest.mark.parametrize("kind", ["residual", "matching"])
def test_probes_are_drawn_anew_for_every_test_image(kind, monkeypatch):
    """The mean of estimates is that of the exact log-determinants, within its error."""
    config, objective = shaken(kind)
    fresh, log_prob = [], Dequantisation.log_prob

    def noted(bound, *given):
        parts = [m for m in bound.modules() if m is not bound]
        chains = [m for m in parts if hasattr(m, "fixed_probes")]
        fresh.extend(m.training for m in chains)
        return log_prob(bound, *given)

    monkeypatch.setattr(Dequantisation, "log_prob", noted)
    found = config.evaluate(objective)["test log-likelihood, bound [nat]"]
    assert fresh and all(fresh)
    assert not any(m.training for m in objective.modules())
    monkeypatch.undo()
    bound = objective.bound if kind == "matching" else objective
    for m in bound.modules():
        if isinstance(m, ResidualFlow):
            m.ladj = "exact"
        elif hasattr(m, "divergence"):
            m.divergence = "exact"
    x = config.load().test[: config.judged]
    with torch.no_grad():
        exact = bound.log_prob(x, generator=torch.Generator().manual_seed(0))
        wanted = exact.mean().item()
    assert 0 < abs(found - wanted) < 0.5
    before = config.evaluate(config.objective().eval())
    assert abs(before["test log-likelihood, bound [nat]"] - wanted) > 1


# --- training ---


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns_the_digits(kind):
    config = SMALL.replace(kind=kind, judged=50, steps=60, batch_size=64)
    config = config.replace(lr=5e-3, warmup=0, hidden=(16, 16))
    objective, rows = config.objective(), config.load()
    before = config.evaluate(objective.eval())[BITS]
    fit(objective.train(), rows.train, config.recipe, progress=False)
    after = config.evaluate(objective.eval())[BITS]
    # the digits have an entropy above zero
    assert 1.5 < after < before - 0.4
    starts = [m.started for m in objective.modules() if isinstance(m, ActNorm)]
    assert starts and all(starts)


def test_the_maps_behind_a_velocity_stay_as_they_started():
    config = SMALL.replace(kind="matching", steps=3, batch_size=64, ema=0.9)
    objective, rows = config.objective(), config.load()
    assert isinstance(objective, MatchedImages)
    assert isinstance(objective.bound, Dequantisation)
    fit(objective, rows.train, config.recipe, progress=False)
    (norm,) = [m for m in objective.modules() if isinstance(m, ActNorm)]
    other = config.objective()
    fit(other, rows.train, config.recipe, steps=1, progress=False)
    assert norm.started
    for a, b in zip(objective.opening.parameters(), other.opening.parameters()):
        assert torch.equal(a, b)
    # one velocity, saved once
    names = [n for n in objective.state_dict() if n.endswith("enter.weight")]
    assert len(names) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_one_that_was_never_cut(kind, tmp_path):
    config = SMALL.replace(kind=kind, steps=4, batch_size=32, validate_every=4)
    rows, path = config.load(), tmp_path / "run.pt"
    settings = dict(validation=rows.validation[:50], progress=False)

    def stop(step, objective, history):
        if step == 2:
            raise KeyboardInterrupt

    whole, cut, resumed = (config.objective() for _ in range(3))
    fit(whole, rows.train, config.recipe, **settings)
    saved = dict(checkpoint=path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(
            cut,
            rows.train,
            config.recipe,
            callbacks=(stop,),
            **saved,
            **settings,
        )
    fit(resumed, rows.train, config.recipe, resume=True, **saved, **settings)
    wanted = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, wanted[name]), name


NARROW = {
    "glow.mnist": ["--layers", "1", "--hidden", "4", "4"],
    # a loose bound is a short series
    "residual.mnist": "--layers 1 --hidden 4 --lipschitz 0.5".split(),
    "fm.mnist": ["--hidden", "2", "4"],
    "glow.digits": ["--layers", "1", "--hidden", "4", "4"],
}


@pytest.mark.parametrize("name", NARROW)
def test_the_command_line_trains_judges_and_draws(name, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "--config", name, "--out", str(out), *NARROW[name]]
    words += ["--steps", "3", "--batch-size", "8", "--judged", "6"]
    words += ["--device", "cpu"]
    if name != "glow.digits":
        words += ["--data", "mnist-grey"]
    assert main(words) == 0
    told = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert 0 < result[BITS] < 10 and result["test images"] == 6
    assert f"{BITS}: {result[BITS]:.4f}" in told
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--resume"]) == 0
    assert json.loads((out / "result.json").read_text()) == result
    if name == "glow.mnist":
        again = ["test", "--config", name, "--out", str(out), "--samples", "3"]
        assert main(again) == 0
        tighter = json.loads((out / "result.json").read_text())
        assert tighter[BITS] != result[BITS] and tighter["draws of noise"] == 3


def test_the_named_configs_are_of_28_by_28_and_run_on_the_original():
    for name in ("glow.mnist", "residual.mnist", "fm.mnist"):
        config = configs[name]
        assert config.event_shape == (1, 28, 28) and config.counts == 256
        assert config.data == "mnist-original" and config.samples == 1
    assert configs["glow.mnist"].levels == 2


# --- samples ---


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_drawn(kind):
    config = SMALL.replace(kind=kind)
    draw = config.sampler(config.objective().eval())
    x, again, other = (
        draw(20, torch.Generator().manual_seed(seed))["x"] for seed in (0, 0, 1)
    )
    assert x.dtype == torch.uint8 and x.shape == (20, 1, 8, 8)
    assert x.max() <= 16
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_drawn_counts_have_the_probability_that_is_judged():
    """A new velocity is zero, so that a pixel is the base behind a logit, cut into cells."""
    config = SMALL.replace(kind="matching")
    draw = config.sampler(config.objective().eval())
    x = draw(500, torch.Generator().manual_seed(0))["x"]
    edges = 0.01 + 0.98 * torch.arange(18) / 17
    below = torch.distributions.Normal(0.0, 1.0).cdf(edges.logit())
    below[0], below[-1] = 0.0, 1.0  # what is beyond has the end cells
    p = below.diff()
    share = torch.bincount(x.flatten().long(), minlength=17) / x.numel()
    assert ((share - p).abs() < 5 * (p * (1 - p) / x.numel()).sqrt()).all()
