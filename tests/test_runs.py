"""Runs in their folders, and their records."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from flowcourse import runs
from flowcourse.cli import main, parse
from flowcourse.configs import configs
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
