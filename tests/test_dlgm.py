"""Deep latent Gaussian models: the published parameter counts, estimators against a model solved by hand."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F
from torch.testing import assert_close

from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.core import StandardNormal
from flowcourse.data import load
from flowcourse.dlgm import (
    DLGM,
    FreeEnergy,
    Maxout,
    active_units,
    annealed_importance,
    importance_weights,
    interpolate,
    log_mean_weight,
    reconstruct,
)
from flowcourse.objectives import Annealing
from flowcourse.planar import Planar
from flowcourse.runs import record
from flowcourse.trainer import fit


class LinearGaussian(nn.Module):
    """x = A z + noise: posterior and evidence are Gaussian, so every estimate has a true value."""

    def __init__(self, blur=1.3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, 2, generator=generator))
        # q is wider than the posterior by `blur`
        self.prior, self.blur = StandardNormal(2), blur
        covariance = torch.linalg.inv(torch.eye(2) + self.a.T @ self.a / 0.25)
        self.root = blur * torch.linalg.cholesky(covariance)
        self.to_mean = covariance @ self.a.T / 0.25

    def log_likelihood(self, x, z):
        return Normal(z @ self.a.T, 0.5).log_prob(x).sum(-1)

    def log_joint(self, x, z):
        return self.log_likelihood(x, z) + self.prior.log_prob(z)

    def infer(self, x, noise):
        q = MultivariateNormal(x @ self.to_mean.T, scale_tril=self.root)
        z = q.loc + noise @ self.root.T
        return z, q.log_prob(z)

    def log_prob(self, x):
        covariance = self.a @ self.a.T + 0.25 * torch.eye(5)
        return MultivariateNormal(torch.zeros(5), covariance).log_prob(x)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return LinearGaussian(), torch.randn(7, 5, generator=generator), generator


def test_importance_sampling_is_exact_on_a_linear_gaussian(images):
    model, x, generator = images
    with torch.no_grad():
        weights = importance_weights(model, x, 5000, generator, rows=900)
        truth = model.log_prob(x)
    assert weights.shape == (5000, 7)
    assert_close(log_mean_weight(weights, 5000), truth, atol=0.02, rtol=0)
    # fewer samples estimate less, in expectation; 5000 latents of 7 images
    # leave no doubt about it
    means = [
        log_mean_weight(weights, n).mean().item()
        for n in (1, 5, 50, 1000, 5000)
    ]
    assert means == sorted(means) and means[0] < truth.mean() - 0.05
    with pytest.raises(
        ValueError, match="samples: expected a divisor of 5000, got 3"
    ):
        log_mean_weight(weights, 3)


def test_many_images_are_weighed_in_parts_one_by_one():
    model = LinearGaussian(blur=1.0)
    x = torch.randn(230, 5, generator=torch.Generator().manual_seed(2))
    # of parts of 100, and of latents that do not fill the last block
    weights = importance_weights(model, x, 7, rows=300)
    truth = model.log_prob(x).detach().expand(7, 230)
    # the posterior itself: every weight is the evidence
    assert_close(weights, truth, atol=1e-3, rtol=0)


def test_exact_posterior_has_constant_weights(images):
    _, x, generator = images
    model = LinearGaussian(blur=1.0)
    weights = importance_weights(model, x, 8, generator)
    assert_close(
        weights, model.log_prob(x).detach().expand(8, 7), atol=1e-4, rtol=0
    )


def test_annealed_importance_agrees_with_the_evidence(images):
    model, x, generator = images
    with torch.no_grad():
        truth = model.log_prob(x)
    fine = annealed_importance(model, x, 1000, 200, 5, generator)
    assert_close(fine, truth, atol=0.1, rtol=0)
    coarse = annealed_importance(model, x, 1000, 3, 1, generator)
    assert (coarse - truth).abs().mean() > 3 * (fine - truth).abs().mean()


@pytest.mark.parametrize(
    "name, size",
    [
        ("dc", 1_668_064),
        ("nf10", 1_992_874),
        ("nf20", 2_317_684),
        ("nf40", 2_967_304),
        ("nf80", 4_266_544),
    ],
)
@pytest.mark.parametrize("data", ["mnist", "mnist-threshold"])
def test_parameter_counts_are_the_published_ones(name, size, data):
    objective = configs[f"dlgm.{name}.{data}"].objective()
    assert sum(p.numel() for p in objective.parameters()) == size


def test_maxout_takes_the_largest_of_each_window():
    layer = Maxout(3, 2, window=4)
    x = torch.randn(5, 6, 3)
    out = layer(x)
    assert out.shape == (5, 6, 2)
    affine = x @ layer.affine.weight.T + layer.affine.bias
    assert torch.equal(out[..., 0], affine[..., :4].amax(-1))
    assert torch.equal(out[..., 1], affine[..., 4:].amax(-1))
    # the order inside a window does not matter
    within = torch.tensor([3, 1, 0, 2, 6, 7, 5, 4])
    with torch.no_grad():
        layer.affine.weight.copy_(layer.affine.weight[within])
        layer.affine.bias.copy_(layer.affine.bias[within])
    assert_close(layer(x), out)


@pytest.mark.parametrize("annealing", [None, Annealing(0.25, 100)])
def test_free_energy_equals_the_hand_formula(annealing):
    torch.manual_seed(0)
    model = DLGM(
        Planar(3, 4, context_dim=8, hidden=()),
        pixels=10,
        latent_dim=3,
        features=8,
        window=2,
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randint(2, (6, 10), dtype=torch.uint8)
    noise = torch.randn(6, 3)
    features = model.encoder(x.float())
    log_scale, mean = (
        model.posterior.bijection.bijections[0].thetas[0](features).unbind(-1)
    )
    z0 = mean + log_scale.exp() * noise
    log_q0 = Normal(mean, log_scale.exp()).log_prob(z0).sum(-1)
    z, ladj = z0, 0.0
    planar = model.posterior.bijection.bijections[1]
    for w, u, b in zip(*(t.unbind(1) for t in planar.parameters_of(features))):
        slope = 1 - ((w * z).sum(-1) + b).tanh().square()
        ladj = ladj + (1 + slope * (w * u).sum(-1)).log()
        z = z + u * ((w * z).sum(-1) + b).tanh().unsqueeze(-1)
    likelihood = -F.binary_cross_entropy_with_logits(
        model.decoder(z), x.float(), reduction="none"
    ).sum(-1)
    log_p = likelihood + Normal(0, 1).log_prob(z).sum(-1)
    beta = 1.0 if annealing is None else 0.25
    objective = FreeEnergy(model, annealing)
    assert_close(objective(x, noise), (log_q0 - ladj - beta * log_p).mean())
    assert_close(objective.eval()(x, noise), (log_q0 - ladj - log_p).mean())


def test_every_posterior_learns_from_every_parameter():
    for name, config in configs.items():
        if not name.startswith("dlgm.") or not name.endswith(".mnist"):
            continue
        objective = config.objective()
        with torch.no_grad():
            for p in objective.parameters():
                p.add_(
                    0.05
                    * torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(0)
                    )
                )
        x = torch.randint(2, (8, 784), dtype=torch.uint8)
        loss = objective(x, objective.draw(8, torch.Generator().manual_seed(0)))
        loss.backward()
        assert loss.isfinite(), name
        for key, p in objective.named_parameters():
            assert (
                p.grad is not None and p.grad.isfinite().all() and p.grad.any()
            ), (name, key)


def test_active_units_counts_what_depends_on_the_image():
    torch.manual_seed(0)
    model = DLGM(pixels=12, latent_dim=4, features=8)
    x = torch.randint(2, (200, 12), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    assert active_units(model, x, 64, generator) == 0  # the heads start at zero
    head = model.posterior.bijection.thetas[0].net[-1]
    with torch.no_grad():
        head.weight.unflatten(0, (4, 2))[:2, 1] = 1.0
    assert active_units(model, x, 64, generator) == 2


@pytest.mark.parametrize("blur", [1.0, 1.3])
def test_the_mean_weight_is_that_of_its_groups(blur):
    log_w = blur * torch.randn(12, 5, dtype=torch.float64)
    for samples in (1, 3, 12):
        means = log_w.exp().reshape(-1, samples, 5).mean(1).log()
        assert_close(log_mean_weight(log_w, samples), means.mean(0))
    one = log_w.clone()
    one[1:] = -torch.inf  # one latent of twelve has all the weight
    assert_close(log_mean_weight(one, 12), log_w[0] - math.log(12))
    assert (log_mean_weight(one, np.int64(3)) == -torch.inf).all()


class Follower(nn.Module):
    """A posterior whose mean is the image times `pull`, and whose noise is the prior's."""

    def __init__(self, pull):
        super().__init__()
        self.pull, self.prior = torch.tensor(pull), StandardNormal(len(pull))

    def infer(self, x, noise):
        return self.pull * x + noise, None


def test_a_unit_is_active_from_a_variance_of_a_hundredth():
    generator = torch.Generator().manual_seed(0)
    # of mean 3 and variance 1
    x = 3 + torch.randn(20_000, 4, generator=generator)
    model = Follower([0.0, 0.09, 0.11, 1.0])
    # the noise's covariance of 20 000 images and halves of 16: 4 standard
    # errors are 4 / (16 sqrt(20 000)), a fifth of the way to either side
    assert active_units(model, x, 32, generator) == 2
    assert active_units(Follower([0.09]), x[:, :1], 2000, generator) == 0
    # few draws, whose own variance is far above a hundredth
    assert active_units(Follower([0.0] * 4), x, 2, generator) == 0


def small():
    torch.manual_seed(0)
    return DLGM(pixels=12, latent_dim=3, features=8, window=2)


WRONG_IMAGES = [
    (
        torch.zeros(5, 3, 4),
        r"images of shape .*12\), got \(5, 3, 4\); .flatten",
    ),
    (torch.zeros(5, 11), r"images of shape .*12\), got \(5, 11\)"),
    (torch.zeros(12), r"got \(12,\)"),
    (torch.zeros(0, 12), r"got \(0, 12\)"),
    (torch.full((5, 12), 255.0), r"pixels in \[0, 1\], got 255 to 255"),
    (torch.full((5, 12), 16, dtype=torch.uint8), "got 16 to 16; divide"),
    (torch.full((5, 12), -0.1), r"pixels in \[0, 1\], got -0.1"),
    (torch.full((5, 12), math.nan), r"pixels in \[0, 1\], got nan"),
    (torch.zeros(5, 12, dtype=torch.complex64), "with real values"),
    ([[0.0] * 12], "got list"),
    (None, "got NoneType"),
]


@pytest.mark.parametrize("wrong, text", WRONG_IMAGES)
def test_images_are_rows_of_pixels_between_zero_and_one(wrong, text):
    model, right = small(), torch.zeros(5, 12)
    for call in (
        lambda: FreeEnergy(model)(wrong, torch.zeros(5, 3)),
        lambda: importance_weights(model, wrong),
        lambda: annealed_importance(model, wrong),
        lambda: active_units(model, wrong),
        lambda: reconstruct(model, wrong),
        lambda: interpolate(model, wrong, right),
        lambda: interpolate(model, right, wrong),
    ):
        with pytest.raises(ValueError, match=f"(x|batch|first|last): .*{text}"):
            call()


def test_images_as_they_are_loaded_are_refused_by_fit():
    x = load("mnist", "test").x[:64]
    objective = FreeEnergy(DLGM(latent_dim=2, features=8))
    options = dict(steps=1, batch_size=32, progress=False)
    with pytest.raises(ValueError, match=r"\(64|32, 28, 28\); .flatten\(1\)"):
        fit(objective, x, **options)
    grey = x.flatten(1) * 255
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\], got 0 to 255"):
        fit(objective, grey, **options)
    for right in (x.flatten(1), x.flatten(1).bool(), grey / 255):
        assert fit(objective, right, **options).loss[0] > 0
    # compiled, the shape is still looked at
    with pytest.raises(ValueError, match="flatten"):
        fit(objective, x, compile="eager", **options)


def test_shapes_inside_a_model_are_looked_at_always():
    model, x, z = small(), torch.zeros(5, 12), torch.zeros(5, 3)
    objective = FreeEnergy(model)
    objective(x, z)
    for call, text in (
        (lambda: objective(x[:, :11], z), "x: "),
        (lambda: model.infer(x[:, :11], z), "x: "),
        (lambda: model.infer(x, z[:, :2]), "noise: "),
        (lambda: model.infer(x, None), "noise: "),
        (lambda: model.log_likelihood(x[:, :11], z), "x: "),
        (lambda: model.log_joint(x, z[:, :2]), "z: "),
        (lambda: model.log_joint(x, z.long()), "z: "),
        (lambda: model.log_joint(x, z[:0]), "z: "),
        (lambda: model.log_joint(x[:2], z), "z: "),
        (lambda: model.infer(x, z.double()), "x: Maxout holds torch.float32"),
        (lambda: Maxout(3, 2)(torch.zeros(4, 5)), "x: Maxout expects"),
        (lambda: Maxout(3, 2)([0.0] * 3), "x: Maxout expects"),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            call()
    assert model.infer(x.bool(), torch.zeros(4, 5, 3))[0].shape == (4, 5, 3)


def test_counts_are_whole_numbers_above_zero():
    model, x = small(), torch.zeros(5, 12)
    for bad in (0, -1, 2.0, "2", None, True):
        for f, name in (
            (importance_weights, "samples"),
            (importance_weights, "rows"),
            (annealed_importance, "chains"),
            (annealed_importance, "temperatures"),
            (annealed_importance, "leapfrog"),
            (active_units, "samples"),
            (functools.partial(interpolate, last=x), "steps"),
            (functools.partial(interpolate, last=x), "samples"),
            (lambda _, x, samples: log_mean_weight(x, samples), "samples"),
            (lambda _, x, **size: DLGM(**size), "pixels"),
            (lambda _, x, **size: DLGM(**size), "latent_dim"),
            (lambda _, x, **size: DLGM(**size), "features"),
            (lambda _, x, **size: DLGM(**size), "window"),
            (lambda _, x, window: Maxout(3, 2, window), "window"),
        ):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                f(model, x, **{name: bad})
    two = np.int64(2)
    assert importance_weights(model, x, two, rows=two).shape == (2, 5)
    assert annealed_importance(model, x, two, two, two).shape == (5,)
    assert active_units(model, x, two) == 0
    assert interpolate(model, x, x, two, two).shape == (5, 2, 12)
    assert DLGM(None, two, two, two, two).pixels == 2


def test_pictures_are_what_the_decoder_says():
    model = small()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    first, last = torch.randint(2, (2, 4, 12)).float()

    def seeded():
        return torch.Generator().manual_seed(0)

    noise = model.prior.noise((4,), seeded())
    expected = model.decoder(model.infer(first, noise)[0]).sigmoid()
    assert_close(reconstruct(model, first, seeded()), expected)
    generator = seeded()
    ends = [
        model.infer(x, model.prior.noise((500, 4), generator))[0].mean(0)
        for x in (first, last)
    ]
    way = interpolate(model, first, last, 5, 500, seeded())
    for k in range(5):
        place = ends[0] + k / 4 * (ends[1] - ends[0])
        assert_close(way[:, k], model.decoder(place).sigmoid())


def test_a_default_device_does_not_reach_a_model(images):
    model, x, _ = images

    def look():
        generator = torch.Generator().manual_seed(0)
        weights = importance_weights(model, x, 4, generator)
        annealed = annealed_importance(model, x, 3, 4, 2, generator)
        return weights, log_mean_weight(weights, 2), annealed

    plain = look()
    # a device on which nothing has a value
    with torch.device("meta"):
        found = look()
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)


def test_mistakes_are_named():
    model, x = small(), torch.zeros(5, 12)
    for call, text in (
        (lambda: DLGM(decoder=["linear"]), "decoder"),
        (lambda: DLGM("planar"), "transform"),
        (lambda: DLGM(Planar), "transform"),
        (lambda: DLGM(Planar(3, 1), latent_dim=4), "transform"),
        (
            lambda: DLGM(Planar(4, 1, context_dim=9), latent_dim=4, features=8),
            "transform",
        ),
        (lambda: FreeEnergy("dlgm"), "model"),
        (lambda: FreeEnergy(model, 0.5), "annealing"),
        (lambda: importance_weights(None, x), "model"),
        (lambda: active_units(model, x, 3), "samples"),
        (lambda: interpolate(model, x, x[:2]), "last"),
        (lambda: log_mean_weight([[0.0]], 1), "log_weights"),
        (lambda: log_mean_weight(torch.zeros(0, 5), 1), "log_weights"),
        (lambda: log_mean_weight(torch.tensor(0.0), 1), "log_weights"),
        (lambda: importance_weights(model, x.to("meta")), "x"),
    ):
        with pytest.raises(ValueError, match=f"^{text}: expected"):
            call()
    with pytest.raises(
        ValueError, match="decoder: expected 'maxout' or 'linear', got 'deep'"
    ):
        DLGM(decoder="deep")
    config = configs["dlgm.dc.mnist"]
    with pytest.raises(
        ValueError, match="posterior: expected one of 'gaussian', 'planar'"
    ):
        type(config)(posterior="gausian").objective()


def test_command_line_trains_judges_and_records(tmp_path, capsys):
    out = tmp_path / "run"
    small = [
        "--steps",
        "3",
        "--held-out",
        "59800",
        "--features",
        "8",
        "--trend",
        "4",
    ]
    words = [
        "train",
        "--config",
        "dlgm.nf10.mnist-threshold",
        "--out",
        str(out),
        *small,
    ]
    assert main([*words, "--judged", "20", "--annealed", "2"]) == 0
    result = json.loads((out / "result.json").read_text())
    trend = [
        result[f"-log p(x), {n} samples, 4 images [nat]"]
        for n in (1, 50, 200, 1000, 5000)
    ]
    assert trend == sorted(trend, reverse=True)
    bound, evidence = (
        result["free energy [nat]"],
        result["-log p(x), 200 samples [nat]"],
    )
    gap = result["KL(q || p(z|x)), 200 samples [nat]"]
    assert gap == pytest.approx(bound - evidence, abs=1e-3) and gap > 0
    assert "active units: " in capsys.readouterr().out
    for name in ("samples", "reconstructions", "interpolations"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    found = record(out)
    assert found["result"] == result and len(found["loss"]) == 1
    assert found["command"].startswith(
        "flowcourse train --config dlgm.nf10.mnist-threshold --steps 3 "
    )
    assert str(tmp_path) not in json.dumps(found)
