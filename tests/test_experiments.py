"""What every experiment has: its settings, and weights that follow from the seed."""

import dataclasses

import pytest
import torch

from flowcourse.configs import configs
from flowcourse.configs_dlgm import DLGMConfig
from flowcourse.configs_flows import FlowConfig
from flowcourse.experiments import Config


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


SMALL = {"latent_dim": 4, "features": 6, "window": 2, "length": 3}


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
