"""Plausible mistakes: each error names the argument, what came, and what was expected.

Mistakes of learners are tested beside the checkers that name them, on the pages with the solutions.
"""

import math

import pytest
import torch

from flowcourse.bases import DiagonalGaussian
from flowcourse.checkpoint import load_checkpoint
from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.configs_dlgm import DLGMConfig
from flowcourse.configs_flows import FlowConfig
from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.objectives import MaximumLikelihood
from flowcourse.trainer import fit


def learn(data, **options):
    return fit(
        MaximumLikelihood(Flow(RealNVP(2, 2, hidden=(4,)))),
        data,
        steps=2,
        progress=False,
        **options,
    )


def foreign(folder):
    path = folder / "foreign.pt"
    path.write_bytes(b"not a checkpoint")
    return path


MISTAKES = {
    "wrong shape": (
        lambda folder: Flow(RealNVP(2)).log_prob(torch.zeros(5, 3)),
        [r"^x: ", r"last dimension 2", r"got shape \(5, 3\)"],
    ),
    "wrong dtype": (
        lambda folder: Flow(RealNVP(2)).log_prob(
            torch.zeros(5, 2, dtype=torch.float64)
        ),
        [r"^x: ", "float32", "float64"],
    ),
    "context missing": (
        lambda folder: Flow(RealNVP(2, context_dim=3)).sample(5),
        [r"^context: ", r"\(\*batch, 3\)", "got none"],
    ),
    "context not expected": (
        lambda folder: Flow(RealNVP(2)).sample(5, torch.zeros(3)),
        [r"^context: ", "expects none", r"got shape \(3,\)"],
    ),
    "dim 0": (lambda folder: RealNVP(0), [r"^dim: ", "at least 2", "got 0"]),
    "negative scale": (
        lambda folder: DiagonalGaussian(2, scale=-0.5),
        [r"^scale: ", "above 0", "got -0.5"],
    ),
    "NaN in the data": (
        lambda folder: learn(torch.tensor([[0.0, 1.0], [math.nan, 2.0]])),
        [r"^data: ", "finite", "(?i)nan"],
    ),
    "empty data": (
        lambda folder: learn(torch.zeros(0, 2)),
        [r"^data: ", "at least one row", "0"],
    ),
    "unknown config": (
        lambda folder: configs["realnvp.mnist"],
        [
            "^name: ",
            "expected one of .*'realnvp.digits'",
            "got 'realnvp.mnist'",
        ],
    ),
    "negative copies": (
        lambda folder: FlowConfig(copies=-1),
        ["^copies: ", "at least 1", "got -1"],
    ),
    "more held out than there is": (
        lambda folder: DLGMConfig(held_out=70_000),
        ["^held_out: ", "at most 59999", "got 70000"],
    ),
    "a setting that no experiment has": (
        lambda folder: configs["realnvp.digits"].replace(widht=8),
        ["^widht: ", "expected one of steps, .* hidden"],
    ),
    "a setting of the recipe": (
        lambda folder: configs["realnvp.digits"].replace(lr=math.inf),
        ["^lr: ", "finite", "got inf"],
    ),
    "unreadable checkpoint": (
        lambda folder: load_checkpoint(foreign(folder)),
        [r"^checkpoint: ", "foreign.pt", "expected", "not a checkpoint"],
    ),
    "unwritable output": (
        lambda folder: learn(
            torch.randn(4, 2), checkpoint=foreign(folder) / "below.pt"
        ),
        [r"^checkpoint: ", "below.pt|foreign.pt"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name, tmp_path):
    mistake, parts = MISTAKES[name]
    for part in parts:
        with pytest.raises(ValueError, match=part):
            mistake(tmp_path)


def test_the_command_line_explains_without_a_traceback(capsys):
    assert main(["train", "--config", "realnvp.mnist"]) == 2
    assert capsys.readouterr().err.startswith("flowcourse: ")
