"""Deep latent Gaussian models: the published parameter counts, estimators against a model solved by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F
from torch.testing import assert_close

from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.core import StandardNormal
from flowcourse.dlgm import (
    DLGM,
    FreeEnergy,
    Maxout,
    active_units,
    annealed_importance,
    importance_weights,
    log_mean_weight,
)
from flowcourse.planar import Planar
from flowcourse.training import Annealing


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
        Planar(3, 4, 8, hidden=()),
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
    for w, u, b in zip(
        *(
            t.unbind(1)
            for t in model.posterior.bijection.bijections[1].layers(features)[
                :3
            ]
        )
    ):
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


def test_mistakes_are_named():
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

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
    from record import record

    found = record(out)
    assert found["result"] == result and len(found["loss"]) == 1
    assert found["command"].startswith(
        "flowcourse train --config dlgm.nf10.mnist-threshold --steps 3 "
    )
    assert str(tmp_path) not in json.dumps(found)
