"""The named experiments are those that were reported."""

import pytest

from flowcourse.configs import configs
from flowcourse.configs_dlgm import DLGMConfig
from flowcourse.configs_flows import FlowConfig
from flowcourse.experiments import Config
from flowcourse.recipe import Recipe


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


def test_posteriors_are_of_the_sizes_that_were_reported():
    sizes = {"nice10": 2, "sylvester": 4, "iaf": 4, "spline": 4}
    made = {
        name: configs[f"dlgm.{name}.mnist"].objective().model.posterior
        for name in sizes
    }
    after = {name: flow.bijection.bijections[1] for name, flow in made.items()}
    assert len(after["nice10"].bijections[1].bijections) == 10
    assert (after["sylvester"].layers, after["sylvester"].units) == (4, 16)
    text = {name: repr(bijection) for name, bijection in after.items()}
    assert "in_features=20, out_features=40" in text["nice10"]
    assert "out_features=320" in text["iaf"]
    assert "bins=8" in text["spline"] and "out_features=160" in text["spline"]


def test_identity_is_what_decides_the_model_and_its_data():
    flow = {"data", "copies", "jitter", "kind", "scalar_map", "layers"}
    flow |= {"hidden", "partition", "dropout"}
    assert set(FlowConfig().identity) == flow
    latent = {"data", "posterior", "length", "amortised", "context_scale"}
    latent |= {"decoder", "latent_dim", "features", "window", "annealing"}
    assert set(DLGMConfig().identity) == latent | {"held_out"}


@pytest.mark.parametrize("name", configs)
def test_each_model_can_be_drawn_from(name):
    assert type(configs[name]).sampler is not Config.sampler
