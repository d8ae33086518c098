"""Experiments of latent models: settings, data and how they judge, against numbers made by hand."""

import math

import pytest
import torch

from flowcourse import configs_dlgm as module
from flowcourse.configs_dlgm import DLGMConfig
from flowcourse.data import load

SMALL = {"latent_dim": 4, "features": 6, "window": 2, "length": 3}


WRONG = [
    ("data", "optdigits", "'mnist'"),
    ("posterior", "gausian", "'gaussian'"),
    ("decoder", "deep", "'maxout'"),
    ("amortised", "no", "True, False"),
    ("length", 0, "at least 1"),
    ("context_scale", 0.0, "above 0"),
    ("latent_dim", 0, "at least 1"),
    ("features", 0, "at least 1"),
    ("window", 0, "at least 1"),
    ("annealing", 0, "at least 1"),
    ("held_out", 0, "at least 1"),
    ("held_out", 60_000, "at most 59999"),
    ("judged", 0, "at least 1"),
    ("judged", 10_001, "at most 10000"),
    ("trend", -1, "at least 0"),
    ("annealed", 20_000, "at most 10000"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_wrong_setting_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected.*{expected}"):
        DLGMConfig(**{name: value})


@pytest.mark.parametrize("posterior", ["nice", "spline"])
def test_couplings_need_two_latents(posterior):
    with pytest.raises(ValueError, match="^latent_dim: .* at least 2, got 1"):
        DLGMConfig(posterior=posterior, latent_dim=1)


def test_the_last_training_images_are_held_out():
    train, test = (
        load("mnist", part).x.flatten(1) for part in ("train", "test")
    )
    rows = DLGMConfig(held_out=100).load()
    assert torch.equal(rows.train, train[:-100])
    assert torch.equal(rows.validation, train[-100:])
    assert torch.equal(rows.test, test)
    assert torch.equal(rows.test_ladj, torch.zeros(len(test)))


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


def test_additive_posteriors_cut_at_random():
    def masks(seed):
        config = DLGMConfig(posterior="nice", latent_dim=12, length=4)
        config = config.replace(seed=seed, features=6, window=2)
        after = config.objective().model.posterior.bijection.bijections[1]
        return [b.flatten().tolist() for b in after.buffers()]

    assert masks(0) == masks(0) != masks(1)


def test_pixels_are_drawn_given_a_latent():
    config = DLGMConfig(decoder="linear", **SMALL)
    objective = config.objective().eval()
    decoder, n = objective.model.decoder, 300
    with (
        torch.no_grad()
    ):  # all pixels of an image, but the first, as its latent is
        decoder.weight.zero_()[1:, 0] = 1000.0
        decoder.bias.zero_()[0] = math.log(3)
    draw = config.sampler(objective)
    x, again, other = (
        draw(n, torch.Generator().manual_seed(seed))["x"] for seed in (0, 0, 1)
    )
    assert x.dtype == torch.uint8 and x.shape == (n, 28, 28)
    assert torch.equal(x, again) and not torch.equal(x, other)
    pixels = x.flatten(1).float()
    first, rest = pixels[:, 0].mean(), pixels[:, 1:].mean(1)
    assert abs(first - 0.75) < 5 * (0.75 * 0.25 / n) ** 0.5
    # but for latents near zero, of which there are few: |z| < 0.01
    assert ((rest == 0) | (rest == 1)).float().mean() > 0.95
    assert abs(rest.mean() - 0.5) < 5 * 0.5 / n**0.5
