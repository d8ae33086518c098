"""The experiments: their settings, their data and how they judge, against numbers made by hand."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from flowcourse import configs as module
from flowcourse.configs import Config, DLGMConfig, FlowConfig, configs
from flowcourse.data import bits_per_dim, from_logit, load, split, toys
from flowcourse.elementwise import InverseMap
from flowcourse.training import Recipe


def normal(x):
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)


def test_a_setting_is_the_experiments_or_the_recipes():
    config = configs["realnvp.faithful"]
    settings = config.settings()
    own = [f.name for f in dataclasses.fields(config) if f.name != "recipe"]
    assert list(settings) == [*config.recipe.to_dict(), *own]
    assert len(settings) == len(set(settings))  # no name twice
    changed = config.replace(seed=7, layers=2, hidden=[8], lr=0.1)
    assert changed.recipe == dataclasses.replace(config.recipe, seed=7, lr=0.1)
    assert changed.layers == 2 and changed.hidden == (8,)
    assert changed.replace(**settings) == config
    assert config.layers == 6 and config.recipe.seed == 0
    with pytest.raises(ValueError, match="^width: expected one of steps, .*"):
        config.replace(width=3)


@pytest.mark.parametrize("name", configs)
def test_the_settings_of_a_config_make_it_again(name):
    config = configs[name]
    assert type(config)().replace(**config.settings()) == config


def test_the_recipes_of_the_table_are_those_that_were_reported():
    digits = Recipe(
        steps=800,
        batch_size=100,
        lr=3e-3,
        schedule="cosine",
        clip=10.0,
        validate_every=100,
    )
    assert configs["realnvp.digits"].recipe == digits
    assert configs["spline.digits"].recipe == digits
    assert configs["realnvp.faithful"].recipe == Recipe(
        steps=400,
        batch_size=172,
        lr=3e-3,
        optimizer="adamw",
        weight_decay=0.1,
        schedule="cosine",
        clip=5.0,
        validate_every=20,
    )
    latent = Recipe(
        steps=60_000,
        batch_size=100,
        schedule="cosine",
        clip=50.0,
        validate_every=1000,
    )
    for name, config in configs.items():
        if name.startswith("dlgm."):
            assert config.recipe == latent and config.checkpoint_every == 2000


def test_identity_is_what_decides_the_model_and_its_data():
    flow = {"data", "copies", "jitter", "kind", "scalar_map", "layers"}
    flow |= {"hidden", "partition", "dropout"}
    assert set(FlowConfig().identity) == flow
    latent = {"data", "posterior", "length", "amortised", "context_scale"}
    latent |= {"decoder", "latent_dim", "features", "window", "annealing"}
    assert set(DLGMConfig().identity) == latent | {"held_out"}


WRONG = [
    (FlowConfig, "data", "mnist", "'old-faithful'"),
    (FlowConfig, "scalar_map", "afine", "'affine'"),
    (FlowConfig, "kind", "maf", "'autoregressive'"),
    (FlowConfig, "partition", "odd", "'alternating'"),
    (FlowConfig, "copies", 0, "at least 1"),
    (FlowConfig, "copies", -1, "at least 1"),
    (FlowConfig, "copies", 2.0, "whole number"),
    (FlowConfig, "copies", True, "whole number"),
    (FlowConfig, "layers", 0, "at least 1"),
    (FlowConfig, "hidden", (8, 0), "positive integers"),
    (FlowConfig, "hidden", (-8,), "positive integers"),
    (FlowConfig, "jitter", -0.1, "at least 0"),
    (FlowConfig, "jitter", math.inf, "finite"),
    (FlowConfig, "dropout", 1.5, "at most 1"),
    (FlowConfig, "dropout", math.nan, "finite"),
    (FlowConfig, "checkpoint_every", 0, "at least 1"),
    (DLGMConfig, "data", "optdigits", "'mnist'"),
    (DLGMConfig, "posterior", "gausian", "'gaussian'"),
    (DLGMConfig, "decoder", "deep", "'maxout'"),
    (DLGMConfig, "amortised", "no", "True, False"),
    (DLGMConfig, "length", 0, "at least 1"),
    (DLGMConfig, "context_scale", 0.0, "above 0"),
    (DLGMConfig, "latent_dim", 0, "at least 1"),
    (DLGMConfig, "features", 0, "at least 1"),
    (DLGMConfig, "window", 0, "at least 1"),
    (DLGMConfig, "annealing", 0, "at least 1"),
    (DLGMConfig, "held_out", 0, "at least 1"),
    (DLGMConfig, "held_out", 60_000, "at most 59999"),
    (DLGMConfig, "judged", 0, "at least 1"),
    (DLGMConfig, "judged", 10_001, "at most 10000"),
    (DLGMConfig, "trend", -1, "at least 0"),
    (DLGMConfig, "annealed", 20_000, "at most 10000"),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), WRONG)
def test_a_wrong_setting_is_refused_by_name(kind, name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected.*{expected}"):
        kind(**{name: value})


@pytest.mark.parametrize("posterior", ["nice", "spline"])
def test_couplings_need_two_latents(posterior):
    with pytest.raises(ValueError, match="^latent_dim: .* at least 2, got 1"):
        DLGMConfig(posterior=posterior, latent_dim=1)


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


def test_the_last_training_images_are_held_out():
    train, test = (
        load("mnist", part).x.flatten(1) for part in ("train", "test")
    )
    rows = DLGMConfig(held_out=100).load()
    assert torch.equal(rows.train, train[:-100])
    assert torch.equal(rows.validation, train[-100:])
    assert torch.equal(rows.test, test)
    assert torch.equal(rows.test_ladj, torch.zeros(len(test)))


SMALL = {"latent_dim": 4, "features": 6, "window": 2, "length": 3}


@pytest.mark.parametrize(
    ("posterior", "layer"),
    [
        ("planar", "Planar"),
        ("nice", "NICE"),
        ("sylvester", "Sylvester"),
        ("iaf", "IAF"),
        ("spline", "Couplings"),
    ],
)
def test_settings_reach_the_latent_model(posterior, layer):
    config = DLGMConfig(posterior=posterior, annealing=77, **SMALL)
    objective = config.objective()
    model = objective.model
    assert objective.annealing.updates == 77
    assert model.prior.event_shape == (4,)
    assert model.encoder.affine.out_features == 6 * 2  # features, window
    after = model.posterior.bijection.bijections[1]
    assert type(after).__name__ == layer
    assert getattr(after, "length", 3) == 3
    # additive couplings never see the image
    assert after.context_dim == (0 if posterior == "nice" else 6)
    blind = config.replace(amortised=False).objective().model.posterior
    assert blind.bijection.bijections[1].context_dim == 0


def test_features_are_scaled_in_linear_layers():
    for posterior in ("planar", "sylvester"):
        config = DLGMConfig(posterior=posterior, context_scale=0.125, **SMALL)
        after = config.objective().model.posterior.bijection.bijections[1]
        assert after.raw.context_scale == 0.125


def test_latent_models_are_judged_by_their_weights(monkeypatch):
    """Weights that are known give every number by hand."""
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(5000, 6, generator=generator)
    asked = []

    def weights(model, x, samples, generator, progress=False):
        asked.append((len(x), samples))
        return log_w[:samples, : len(x)]

    def annealed(model, x, **options):
        return torch.arange(1.0, len(x) + 1)

    monkeypatch.setattr(module, "importance_weights", weights)
    monkeypatch.setattr(module, "annealed_importance", annealed)
    monkeypatch.setattr(module, "active_units", lambda *a, **k: 3)
    config = DLGMConfig(judged=6, trend=4, annealed=2, **SMALL)
    result = config.evaluate(config.objective())
    assert asked == [(6, 200), (4, 5000), (2, 5000)]

    def log_p(rows, n):
        groups = log_w[:, :rows].unflatten(0, (-1, n))
        return groups.logsumexp(1) - math.log(n)

    first = log_w[:200]
    evidence = first.logsumexp(0) - math.log(200)
    wanted = {
        "free energy [nat]": -first.mean(),
        "-log p(x), 200 samples [nat]": -evidence.mean(),
        "standard error over images [nat]": evidence.std() / math.sqrt(6),
        "KL(q || p(z|x)), 200 samples [nat]": evidence.mean() - first.mean(),
        "active units": 3,
        **{
            f"-log p(x), {n} samples, 4 images [nat]": -log_p(4, n).mean()
            for n in (1, 50, 200, 1000, 5000)
        },
        "-log p(x), annealed, 2 images [nat]": -1.5,
        "-log p(x), 5000 samples, 2 images [nat]": -log_p(2, 5000).mean(),
    }
    assert list(result) == list(wanted)
    for key, value in wanted.items():
        assert result[key] == pytest.approx(float(value), 1e-4), key


def test_what_an_experiment_must_define_is_said():
    for name, arguments in (
        ("load", ()),
        ("objective", ()),
        ("evaluate", (None,)),
    ):
        with pytest.raises(
            NotImplementedError, match=f"Config defines no {name}"
        ):
            getattr(Config(), name)(*arguments)
    assert Config().pictures(None) == {}


@pytest.mark.parametrize(
    "config", [FlowConfig(layers=1, hidden=(4,)), DLGMConfig(**SMALL)]
)
def test_first_weights_follow_from_the_seed_alone(config):
    def weights(seed):
        objective = config.replace(seed=seed).objective()
        return torch.nn.utils.parameters_to_vector(objective.parameters())

    before = torch.random.get_rng_state()
    one = weights(1)
    # what others draw goes on as if nothing had been made
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(weights(1), one)
    assert not torch.equal(weights(2), one)


def test_posteriors_are_of_the_sizes_that_were_reported():
    sizes = {"nice10": 2, "sylvester": 4, "iaf": 4, "spline": 4}
    made = {
        name: module.configs[f"dlgm.{name}.mnist"].objective().model.posterior
        for name in sizes
    }
    after = {name: flow.bijection.bijections[1] for name, flow in made.items()}
    assert len(after["nice10"].bijections[1].bijections) == 10
    assert (after["sylvester"].layers, after["sylvester"].units) == (4, 16)
    text = {name: repr(bijection) for name, bijection in after.items()}
    assert "in_features=20, out_features=40" in text["nice10"]
    assert "out_features=320" in text["iaf"]
    assert "bins=8" in text["spline"] and "out_features=160" in text["spline"]


def test_additive_posteriors_cut_at_random():
    def masks(seed):
        config = DLGMConfig(posterior="nice", latent_dim=12, length=4)
        config = config.replace(seed=seed, features=6, window=2)
        after = config.objective().model.posterior.bijection.bijections[1]
        return [b.flatten().tolist() for b in after.buffers()]

    assert masks(0) == masks(0) != masks(1)
