"""Experiments of showers: settings, data, the objective, how it judges, and a few steps by every road."""

import csv
import json
import math
from dataclasses import fields

import pytest
import torch
from helpers import shaken
from torch.testing import assert_close

from flowcourse import configs_shower as module
from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.configs_shower import (
    ShowerConfig,
    ShowerLikelihood,
    distances,
    from_rows,
    to_rows,
)
from flowcourse.linear import Permutation
from flowcourse.shower import ShowerFlow
from flowcourse.shower_features import SETS, features
from flowcourse.shower_points import represent
from flowcourse.showers import Showers, make_showers
from flowcourse.trainer import fit

SMALL = ShowerConfig(
    num_blocks=1, width=1, rows=300, held_out=100, representation="softplus"
).replace(steps=4, batch_size=64, validate_every=2)
KINDS = ("max-normed", "fnorms", "softplus", "log")
MEAN, MOST, SLICED, FAR = (
    f"{name} [sd]"
    for name in (
        "mean Wasserstein distance",
        "largest Wasserstein distance",
        "sliced Wasserstein distance",
        "farthest number drawn",
    )
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- settings ---


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("version", "alt5", "'alt1'"),
        ("representation", "fixed", "'fnorms'"),
        ("num_blocks", 0, "at least 1"),
        ("width", 0, "at least 1"),
        ("spline_width", 0, "at least 1"),
        ("rows", 1, "at least 2"),
        ("held_out", 1, "at least 2"),
        ("cog", 1, "True"),
        ("train_base", "yes", "True"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected.*{expected}"):
        ShowerConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"version": "log1", "representation": "softplus"},
            "^representation: expected 'max-normed' or 'fnorms' for log1",
        ),
        (
            {"version": "alt3", "num_blocks": 1, "representation": "log"},
            "^representation: expected 'max-normed' or 'fnorms' for alt3",
        ),
        ({"version": "alt3"}, "^num_blocks: expected 1 for alt3, got 2"),
        ({"cog": False}, "^cog: expected True for 'max-normed'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ShowerConfig(**settings)


def test_the_settings_of_training_are_those_that_were_measured():
    config = ShowerConfig()
    recipe = config.recipe
    assert (recipe.steps, recipe.batch_size, recipe.lr) == (2400, 512, 1e-3)
    assert recipe.optimizer == "adam" and recipe.schedule == "constant"
    assert recipe.clip is None and recipe.weight_decay == 0
    assert (config.width, config.spline_width) == (2, 1)
    assert (config.rows, config.held_out) == (60_000, 10_000)


def test_names_say_what_they_are():
    found = {n: c for n, c in configs.items() if n.startswith("shower.")}
    for name, config in found.items():
        _, version, blocks, *rest = name.split(".")
        kind = next(iter({*rest} - {"tbase"}), "max-normed")
        assert config == ShowerConfig(
            version=version,
            num_blocks=int(blocks.removeprefix("nb")),
            representation=kind,
            train_base="tbase" in rest,
        )
        assert config.about.startswith(f"ShowerFlow {version}, ")
    assert {c.version for c in found.values()} == {
        *("original", "alt1", "alt2", "alt3", "log1", "spline")
    }
    for ending in ("", ".fnorms", ".softplus", ".log"):
        assert {f"shower.alt1.nb{n}{ending}" for n in (1, 2, 4, 8, 10)} < {
            *found
        }
    assert "shower.alt1.nb2.fnorms.tbase" in found and len(found) < 60


def test_a_run_has_the_name_that_the_original_would_give_it():
    def short(**settings):
        return ShowerConfig(**settings).run_name.short

    assert short(representation="fnorms") == "alt1_nb2_fnorms_dhist_wo[0, 1, 4]"
    assert short(version="original", num_blocks=10) == "original_nb10_dhist"
    without = dict(representation="softplus", cog=False, train_base=True)
    wanted = "alt1_nb2_tbase_dhist_softplus_wo[0, 1, 2, 3, 4]"
    assert short(**without) == wanted
    decayed = ShowerConfig().replace(weight_decay=1e-4).run_name
    assert str(decayed).endswith("_dhist_wd1p0e-04_best")


# --- data ---


def test_the_data_are_the_same_for_every_seed_and_never_twice():
    rows, again = SMALL.load(), SMALL.replace(seed=7).load()
    sizes = [len(part) for part in rows[:3]]
    assert sizes == [300, 100, 100]
    for part, other in zip(rows[:3], again[:3]):
        assert torch.equal(part, other)
    energies = torch.cat([part[:, 0] for part in rows[:3]])
    assert len({*energies.tolist()}) > 490
    wanted = make_showers(100, generator=generator(2))
    assert torch.equal(rows.test, to_rows(wanted))


def test_rows_are_showers():
    showers = make_showers(20, generator=generator())
    rows = to_rows(showers)
    assert torch.equal(rows[:, 0], showers.energy)
    assert torch.equal(rows[:, 1:], features(showers))
    again = from_rows(rows)
    for field in fields(Showers):
        assert torch.equal(
            getattr(again, field.name), getattr(showers, field.name)
        )


# --- the objective ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_points_made_by_hand(kind):
    config = SMALL.replace(representation=kind)
    objective, rows = config.objective(), config.load().train[:50]
    flow = shaken(objective.flow, 0.1)
    noise = objective.draw(50, generator(3))
    assert (noise is None) == (kind in ("max-normed", "fnorms"))
    form = represent(
        kind, from_rows(config.load().train), generator=generator(0)
    )
    points = form.encode(from_rows(rows), noise)
    unit = 127 if kind == "fnorms" else 100
    wanted = -flow.log_prob(points, rows[:, :1] / unit)
    assert_close(objective.losses(rows, noise), wanted)
    assert_close(objective(rows, noise), wanted.mean())


def test_settings_reach_the_flow():
    config = SMALL.replace(
        version="original", num_blocks=3, width=2, spline_width=3, cog=False
    )
    config = config.replace(train_base=True, seed=5)
    wanted = ShowerFlow(
        "original",
        3,
        60,
        train_base=True,
        width=2,
        spline_width=3,
        generator=generator(5),
    ).state_dict()
    found = config.objective().flow.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert config.dim == 60
    assert [ShowerConfig(representation=k).dim for k in KINDS] == [
        *(65, 62, 62, 62)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_makes_weights_and_permutations(kind):
    config = SMALL.replace(representation=kind)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two = config.objective(), config.objective()
    other = config.replace(seed=1).objective()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    orders = [
        [f.order for f in o.modules() if isinstance(f, Permutation)]
        for o in (one, other)
    ]
    assert not any(torch.equal(*pair) for pair in zip(*orders))
    # constants are the data's
    for name, value in one.representation.state_dict().items():
        assert torch.equal(value, other.representation.state_dict()[name])


def test_a_flow_of_another_size_is_refused():
    form = represent("fnorms", make_showers(9, generator=generator()))
    for d, context_dim in ((60, 1), (62, 4)):
        flow = ShowerFlow("alt2", 1, d, context_dim, width=1)
        with pytest.raises(ValueError, match=r"^flow: expected events \(62,\)"):
            ShowerLikelihood(flow, form)
    with pytest.raises(ValueError, match="^flow: expected a Flow"):
        ShowerLikelihood(flow.bijection, form)


# --- judging ---


def test_distances_are_those_made_by_hand():
    truth, drawn = (make_showers(40, generator=generator(s)) for s in (0, 1))
    found = distances(drawn, truth, generator(3))
    used = [i for i in range(65) if i not in (0, 1, 4)]
    x, y = (features(part).double()[:, used] for part in (drawn, truth))
    x, y = ((t - y.mean(0)) / y.std(0, correction=0) for t in (x, y))
    # of as many points: the mean distance of those of equal rank
    each = (x.sort(0).values - y.sort(0).values).abs().mean(0)
    assert found[MEAN] == pytest.approx(each.mean().item())
    assert found[MOST] == pytest.approx(each.max().item())
    assert found[FAR] == pytest.approx(x.abs().max().item())
    theta = torch.randn(500, 62, generator=generator(3), dtype=torch.float64)
    theta = theta / theta.norm(dim=-1, keepdim=True)
    a, b = (t @ theta.T for t in (x, y))
    lines = (a.sort(0).values - b.sort(0).values).abs().mean(0)
    assert found[SLICED] == pytest.approx(lines.mean().item())
    assert found["rows not finite"] == 0 and found["showers"] == 40
    same = distances(truth, truth, generator())
    assert same[MEAN] == same[MOST] == same[SLICED] == 0


def test_a_shift_of_one_deviation_is_a_distance_of_one():
    truth = make_showers(200, generator=generator())
    x = features(truth)
    moved = x.clone()
    moved[:, 19] += x[:, 19].std(correction=0)  # clusters of layer 15
    drawn = from_rows(torch.cat([truth.energy[:, None], moved], -1))
    found = distances(drawn, truth, generator())
    assert found[MOST] == pytest.approx(1, rel=1e-5)
    assert found[MEAN] == pytest.approx(1 / 62, rel=1e-5)


def test_what_is_not_finite_is_counted_and_left_out():
    truth = make_showers(60, generator=generator())
    rows = to_rows(make_showers(60, generator=generator(1)))
    clean = distances(from_rows(rows[3:]), truth, generator())
    rows[0, 6], rows[1, 40], rows[2, 40] = math.nan, math.inf, -math.inf
    found = distances(from_rows(rows), truth, generator())
    assert found["rows not finite"] == 3
    assert found == clean | {"rows not finite": 3}
    rows[:, 6] = math.nan
    nothing = distances(from_rows(rows), truth, generator())
    assert nothing["rows not finite"] == 60
    assert all(math.isnan(nothing[name]) for name in (MEAN, MOST, SLICED, FAR))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_flow_is_judged_by_hand(kind, monkeypatch):
    """It permutes, so that its density is the base's at the point itself."""
    monkeypatch.setattr(module, "_BLOCK", 40)
    config = SMALL.replace(representation=kind, seed=2)
    objective = config.objective().eval()
    result = config.evaluate(objective)
    noise, form = generator(2), objective.representation
    log_prob, in_units, drawn = [], [], []
    for rows in config.load().test.split(40):
        u = form.draw(len(rows), noise)
        points = form.encode(from_rows(rows), u)
        log_prob.append(
            torch.distributions.Normal(0.0, 1.0).log_prob(points).sum(-1)
        )
        if kind != "max-normed":
            in_units.append(log_prob[-1] - form.ladj(points))
        drawn.append(to_rows(objective.sample(rows[:, 0], noise)))
    wanted = torch.cat(log_prob).mean().item()
    told = result["test log-likelihood of points [nat]"]
    assert told == pytest.approx(wanted, rel=1e-4)
    units = "the same of counts, MeV and mm [nat]"
    if kind == "max-normed":
        assert units not in result
    else:
        wanted = torch.cat(in_units).mean().item()
        assert result[units] == pytest.approx(wanted, rel=1e-4)
    truth, made = from_rows(config.load().test), from_rows(torch.cat(drawn))
    for name, value in distances(made, truth, noise).items():
        assert result[name] == pytest.approx(value)
    assert torch.equal(made.energy, truth.energy)


def test_a_likelihood_of_features_counts_every_slope():
    showers = make_showers(300, generator=generator())
    form = represent("softplus", showers, generator=generator(1))
    u = form.draw(300, generator(2))
    points = form.encode(showers, u)
    # by the slopes from features to points, at the features
    grain = torch.cat([torch.ones(30), 0.05 * form.unit[30:]])
    x = torch.cat([showers.clusters, showers.deposits], -1) + grain * u
    slope = -(-x / form.unit).expm1().neg().log()
    slope = slope - form.unit.log() - form.layer_sd.log()
    wanted = slope.sum(-1) - form.cog_sd[:2].log().sum()
    assert_close(-form.ladj(points), wanted, rtol=1e-4, atol=1e-2)


# --- training ---


@pytest.mark.parametrize("kind", KINDS)
def test_each_representation_is_learned(kind):
    """Two rounds over a few showers bring the layers' means closer."""
    config = SMALL.replace(representation=kind, rows=2000, held_out=500)
    config = config.replace(steps=60, batch_size=128, lr=2e-3)
    objective, rows = config.objective(), config.load()
    before = config.evaluate(objective.eval())
    fit(objective.train(), rows.train, config.recipe, progress=False)
    after = config.evaluate(objective.eval())
    name = "test log-likelihood of points [nat]"
    assert after[name] > before[name] + 10
    assert after[MEAN] < before[MEAN]


@pytest.mark.parametrize(
    ("version", "kind"),
    [("original", "max-normed"), ("alt2", "log"), ("alt3", "max-normed"),
     ("log1", "fnorms"), ("spline", "softplus")],
)  # fmt: skip
def test_each_form_takes_a_few_steps(version, kind):
    config = SMALL.replace(version=version, representation=kind, rows=1000)
    config = config.replace(steps=40, batch_size=128, lr=2e-3)
    objective, rows = config.objective(), config.load()
    name = "test log-likelihood of points [nat]"
    before = config.evaluate(objective.eval())[name]
    history = fit(
        objective.train(),
        rows.train,
        config.recipe,
        validation=rows.validation,
        progress=False,
    )
    assert all(map(math.isfinite, history.loss + history.validation_loss))
    assert config.evaluate(objective.eval())[name] > before + 5


def test_the_mean_and_the_largest_parameter_are_tracked():
    """Of all of them, after each step, the largest with its sign."""
    config = SMALL.replace(representation="fnorms")
    objective, rows = config.objective(), config.load()
    wanted = []

    def by_hand(step, objective, history):
        flat = torch.cat([p.detach().flatten() for p in objective.parameters()])
        wanted.append([flat.double().mean().item(), flat.max().item()])

    watch = (by_hand, config.watch)
    history = fit(
        objective, rows.train, config.recipe, callbacks=watch, progress=False
    )
    assert [*history.tracked] == ["mean parameter", "max parameter"]
    found = torch.tensor([*history.tracked.values()]).T
    assert_close(found, torch.tensor(wanted), rtol=1e-3, atol=1e-7)
    for p in objective.parameters():
        p.data.fill_(-3.0)
    config.watch(5, objective, history)
    ends = [values[-1] for values in history.tracked.values()]
    assert ends == pytest.approx([-3.0, -3.0])


@pytest.mark.parametrize("kind", ["max-normed", "softplus"])
def test_a_resumed_run_equals_one_that_was_never_cut(kind, tmp_path):
    config = SMALL.replace(representation=kind)
    rows, path = config.load(), tmp_path / "run.pt"
    settings = dict(validation=rows.validation, progress=False)

    def stop(step, objective, history):
        if step == 2:
            raise KeyboardInterrupt

    whole, cut, resumed = (config.objective() for _ in range(3))
    watched = dict(callbacks=(config.watch,), **settings)
    first = fit(whole, rows.train, config.recipe, **watched)
    saved = dict(checkpoint=path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(
            cut,
            rows.train,
            config.recipe,
            callbacks=(config.watch, stop),
            **saved,
            **settings,
        )
    again = fit(
        resumed, rows.train, config.recipe, resume=True, **saved, **watched
    )
    assert again == first
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


NARROW = "--width 1 --rows 300 --held-out 60 --steps 3 --batch-size 32".split()


@pytest.mark.parametrize(
    "name", ["shower.alt1.nb2.fnorms", "shower.alt1.nb1.softplus"]
)
def test_the_command_line_trains_judges_and_draws(name, tmp_path, capsys):
    run, drawn = tmp_path / "run", tmp_path / "showers.csv"
    words = ["--config", name, "--out", str(run), "--device", "cpu"]
    assert main(["train", *words, *NARROW]) == 0
    result = json.loads((run / "result.json").read_text())
    assert 0 < result[MEAN] <= result[MOST] and result["showers"] == 60
    assert f"{MEAN}: {result[MEAN]:.4f}" in capsys.readouterr().out
    history = json.loads((run / "history.json").read_text())
    assert [*map(len, history["tracked"].values())] == [3, 3]
    assert main(["test", *words]) == 0
    assert json.loads((run / "result.json").read_text()) == result
    words = ["sample", "--config", name, "--run", str(run), "--device", "cpu"]
    words += ["--n", "7", "--out", str(drawn)]
    assert main(words) == 0
    with open(drawn) as file:
        table = [*csv.DictReader(file)]
    assert len(table) == 7 and len(table[0]) == 66
    assert all(10 <= float(row["energy"]) <= 90 for row in table)
    for row in table:
        counts = [float(row[f"x_{k}"]) for k in range(6, 36)]
        assert all(n == round(n) >= 0 for n in counts)
        assert float(row["x_1"]) == sum(counts)
    assert main([*words, "--context", "50"]) == 0
    with open(drawn) as file:
        assert {row["energy"] for row in csv.DictReader(file)} == {"50"}
    assert main([*words, "--context", "5"]) == 2
    assert "context: expected 10 to 90 GeV" in capsys.readouterr().err


def test_rows_are_drawn_in_the_units_of_the_data():
    config = SMALL.replace(representation="log")
    objective = config.objective().eval()
    rows = config.sampler(objective)(50, generator(1))
    assert rows["x"].shape == (50, 65) and rows["energy"].shape == (50,)
    u = 10 + 80 * torch.rand(50, generator=generator(1))
    assert_close(rows["energy"], u)
    noise = generator(1)
    torch.rand(50, generator=noise)
    wanted = features(objective.sample(rows["energy"], noise))
    assert torch.equal(rows["x"], wanted)
    assert torch.equal(rows["x"][:, 0], rows["x"][:, 5:35].sum(-1))
    assert config.context == ("energy [GeV]",)
    assert sum(SETS[config.dim]) == objective.flow.event_shape[0]
