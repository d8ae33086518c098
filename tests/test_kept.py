"""Checkpoints and models of earlier releases load for ever, and mean what they meant."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flowcourse.checkpoint import load_checkpoint
from flowcourse.cli import main
from flowcourse.runs import recorded

KEPT = Path(__file__).parent / "data"
EXPECTED = json.loads((KEPT / "expected.json").read_text())
CONFIGS = {"realnvp": "realnvp.faithful", "dlgm": "dlgm.nf10.mnist"}
ENDS = torch.linspace(-2, 2, 16, dtype=torch.float64).view(8, 2)


def realnvp(objective):
    """Log-densities of a flow of two coordinates."""
    return {"log_prob": objective.flow.log_prob(ENDS)}


def dlgm(objective):
    """Log-densities of latents and of images, for given noise."""
    images = (torch.arange(8 * 784) % 7 < 2).double().view(8, 784)
    z, log_posterior = objective.model.infer(images, ENDS)
    log_joint = objective.model.log_joint(images, z)
    return {"log_posterior": log_posterior, "log_joint": log_joint}


@pytest.mark.parametrize("file", ["model", "checkpoint"])
@pytest.mark.parametrize("log_densities", [realnvp, dlgm])
@torch.no_grad()
def test_an_old_file_gives_the_old_log_densities(log_densities, file):
    name = log_densities.__name__
    objective = recorded(CONFIGS[name], KEPT / name).objective()
    state = load_checkpoint(KEPT / name / f"{file}.pt")
    objective.load_state_dict(state["objective"])
    found = log_densities(objective.double().eval())
    for key, wanted in EXPECTED[name][file].items():
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(found[key], wanted, rtol=1e-10, atol=1e-10)


def test_an_old_run_goes_on(tmp_path):
    shutil.copytree(KEPT / "realnvp", tmp_path / "run")
    words = "--steps 210 --schedule constant --layers 2 --hidden 16 --resume"
    command = ["train", "--config", "realnvp.faithful", *words.split()]
    assert (
        main([*command, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    )
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history["loss"]) == 210


@pytest.mark.parametrize("name", CONFIGS)
def test_an_old_run_can_be_tested_again(name, tmp_path):
    shutil.copytree(KEPT / name, tmp_path / "run")
    command = [
        "test",
        "--config",
        CONFIGS[name],
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--device", "cpu"]) == 0
    assert (tmp_path / "run" / "result.json").exists()
