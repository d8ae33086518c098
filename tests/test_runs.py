"""Runs in their folders, and their records."""

import json
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from flowcourse import runs
from flowcourse.arguments import Table
from flowcourse.cli import main, parse
from flowcourse.configs import configs
from flowcourse.configs_flows import FlowConfig
from flowcourse.runs import command_for, is_main, record

NAME = "realnvp.faithful"
KEPT = Path(__file__).parent / "data" / "realnvp"


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_process_alone_writes_whatever_its_rank(rank, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert is_main()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert is_main() == (rank == "0")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (NAME, {"hidden": [16, 8], "clip": None, "seed": 3, "lr": 0.01}),
        (NAME, {"hidden": [], "scalar_map": "affine-tanh"}),
        ("dlgm.nf10.mnist", {"amortised": False, "judged": 7}),
    ],
)
def test_a_record_says_what_to_type(name, changed):
    config = configs[name].replace(**changed)
    words = shlex.split(command_for(name, config))
    assert words[0] == "flowcourse" and parse(words[1:]).fields == config
    # what is as the name has it need not be typed
    assert sum(word.startswith("--") for word in words) == 1 + len(changed)


@pytest.fixture
def finished(tmp_path):
    """A short run that is trained and tested."""
    out = tmp_path / "run"
    config = configs[NAME].replace(steps=20, layers=2, hidden=(8,))
    runs.train(NAME, config, out, device="cpu", progress=False)
    runs.test(config, out, device="cpu")
    return out


def test_a_record_is_of_the_run(finished, tmp_path, capsys):
    out = tmp_path / "results"
    (finished / "samples.png").write_bytes(b"picture")
    assert main(["record", str(finished), "--out", str(out)]) == 0
    path = out / "realnvp" / f"{NAME}.json"
    picture = path.with_name(f"{NAME}.samples.png")
    assert capsys.readouterr().out == f"{path}\n{picture}\n"
    assert picture.read_bytes() == b"picture"
    found = json.loads(path.read_text())
    run = json.loads((finished / "run.json").read_text())
    for key in ("name", "config", "commit", "dirty", "versions", "machine"):
        assert found[key] == run[key], key
    assert found["result"] == json.loads((finished / "result.json").read_text())
    assert found["command"] == (
        f"flowcourse train --config {NAME} --steps 20 --layers 2 --hidden 8"
    )
    history = json.loads((finished / "history.json").read_text())
    assert found["loss"] == [round(sum(history["loss"]) / 20, 3)]
    # the keys that the lessons read, of records that were made before too
    (old,) = [
        json.loads(p.read_text())
        for p in Path(__file__)
        .parents[1]
        .glob("results/dlgm/*.nf10.mnist.json")
    ]
    assert set(found) == set(old) | {"commit", "dirty"}


def test_a_run_of_an_earlier_release_is_recorded(tmp_path):
    run = Path(shutil.copytree(KEPT, tmp_path / "run"))
    config = runs.recorded(NAME, run)
    runs.test(config, run, device="cpu")
    plain = {"name": NAME, "config": config.settings(), "versions": {}}
    (run / "run.json").write_text(json.dumps(plain))
    history = {"loss": ["nan", 1.0], "seconds": [3600.0]}
    history |= {"validation_step": [], "validation_loss": []}
    (run / "history.json").write_text(json.dumps(history))
    found = record(run)
    assert "commit" not in found and found["hours"] == 1.0


def test_an_unfinished_run_has_no_record(finished):
    (finished / "result.json").unlink()
    with pytest.raises(ValueError, match=r"folders: .*finished.*result\.json"):
        record(finished)


def drawn(run, out, n, **options):
    runs.sample(NAME, run, out, n, device="cpu", progress=False, **options)
    return np.load(out)["x"]


@pytest.mark.parametrize("n", [1, 500, 1201])
def test_rows_are_those_of_the_model_in_pieces(finished, tmp_path, n):
    """By hand: the trained flow, five hundred rows at a time, from one source of noise."""
    x = drawn(finished, tmp_path / "x.npz", n, seed=7)
    config = runs.recorded(NAME, finished)
    objective = config.objective().eval()
    state = runs.load_checkpoint(finished / "model.pt")["objective"]
    objective.load_state_dict(state)
    draw = config.sampler(objective)
    noise = torch.Generator().manual_seed(7)
    sizes = [min(500, n - k) for k in range(0, n, 500)]
    wanted = torch.cat([draw(size, noise)["x"] for size in sizes])
    assert x.shape == (n, 2) and np.array_equal(x, wanted.numpy())
    # the weights matter, and so does the seed
    untrained = config.sampler(config.objective().eval())
    noise = torch.Generator().manual_seed(7)
    assert not np.allclose(untrained(sizes[0], noise)["x"], x[: sizes[0]])
    assert not np.array_equal(drawn(finished, tmp_path / "y.npz", n), x)
    assert np.array_equal(drawn(finished, tmp_path / "y.npz", n, seed=7), x)


def test_no_more_is_asked_for_at_once(finished, tmp_path, monkeypatch):
    asked = []

    def sampler(self, objective, context=()):
        assert not objective.training

        def rows(n, generator):
            asked.append(n)
            return {"x": torch.zeros(n, 2)}

        return rows

    monkeypatch.setattr(FlowConfig, "sampler", sampler)
    assert drawn(finished, tmp_path / "x.npz", 1201).shape == (1201, 2)
    assert asked == [500, 500, 201]


class Warm(FlowConfig):
    """Draws that tell the context they were given."""

    context = ("energy [GeV]", "angle")

    def sampler(self, objective, context=()):
        def rows(n, generator):
            own = torch.rand(n, 2, generator=generator)
            energy = torch.tensor(context).expand(n, 2) if context else own
            return {"x": torch.ones(n, 3), "context": energy}

        return rows


def test_a_context_is_what_the_config_names(finished, tmp_path, monkeypatch):
    for context in ((1.0,), (1.0, 2.0)):
        with pytest.raises(ValueError, match="^context: expected none, since"):
            drawn(finished, tmp_path / "x.npz", 3, context=context)
    warm = Warm().replace(**configs[NAME].settings())
    monkeypatch.setattr(runs, "configs", Table({NAME: warm}))
    for context in ((1.0,), (1.0, 2.0, 3.0)):
        told = r"^context: expected energy \[GeV\], angle, got"
        with pytest.raises(ValueError, match=told):
            drawn(finished, tmp_path / "x.npz", 3, context=context)
    with pytest.raises(ValueError, match="^context: expected a finite number"):
        drawn(finished, tmp_path / "x.npz", 3, context=(1.0, float("nan")))
    assert not list(tmp_path.glob("x*"))
    drawn(finished, tmp_path / "x.npz", 3, context=(1.0, 2))
    found = np.load(tmp_path / "x.npz")["context"]
    assert np.array_equal(found, [[1.0, 2.0]] * 3)
    drawn(finished, tmp_path / "x.npz", 3)
    assert len(np.unique(np.load(tmp_path / "x.npz")["context"])) == 6


def test_hdf5_says_what_was_typed(finished, tmp_path, capsys):
    out = tmp_path / "new" / "rows.h5"  # in a folder that is made
    words = ["sample", "--config", NAME, "--run", str(finished), "--n", "600"]
    words += ["--seed", "3", "--device", "cpu", "--out", str(out)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"600 rows of {NAME} are in {out}\n"
    with h5py.File(out) as file:
        assert list(file) == ["x"] and file["x"].shape == (600, 2)
        assert dict(file.attrs) == {
            "config": NAME,
            "seed": 3,
            "command": shlex.join(["flowcourse", *words]),
        }
        wanted = drawn(finished, tmp_path / "x.npz", 600, seed=3)
        assert np.array_equal(file["x"], wanted)
