"""The command line, in this process and in real ones."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowcourse import runs
from flowcourse.checkpoint import load_checkpoint, save_checkpoint
from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.configs_flows import FlowConfig
from flowcourse.data import datasets
from flowcourse.history import History
from flowcourse.trainer import TrainingDiverged

NAME = "realnvp.faithful"
SHORT = [
    "--steps",
    "30",
    "--layers",
    "2",
    "--hidden",
    "8",
    "--validate-every",
    "10",
]


def run(*words):
    return main([str(word) for word in words])


def command(*words):
    return [sys.executable, "-m", "flowcourse", *map(str, words)]


def start(*words, **options):
    """The command in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(command(*words), text=True, env=env, **options)


def told(error):
    """The one line that a mistake is answered with."""
    assert error.startswith("flowcourse: ") and error.count("\n") == 1, error
    return error.removeprefix("flowcourse: ")


def kept(folder):
    """What is in a folder, but for locks."""
    files = (path for path in folder.iterdir() if path.suffix != ".lock")
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is trained and tested; copy it to change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run("train", "--config", NAME, "--out", out, *SHORT) == 0
    return out


def finished_config():
    """The config of that run."""
    return configs[NAME].replace(
        steps=30, layers=2, hidden=(8,), validate_every=10
    )


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_list_names_every_config(capsys):
    assert run("list") == 0
    assert [
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    ] == list(configs)


def test_train_writes_a_run_and_test_judges_it(tmp_path, capsys):
    assert (
        run("train", "--config", NAME, "--out", tmp_path, "--seed", 3, *SHORT)
        == 0
    )
    record = json.loads((tmp_path / "run.json").read_text())
    assert (
        record["name"] == NAME
        and record["config"]["steps"] == 30
        and record["config"]["seed"] == 3
    )
    assert record["versions"]["torch"] == str(torch.__version__)
    assert {"commit", "dirty", "machine", "date"} <= set(record)
    assert record["command"].startswith(f"flowcourse train --config {NAME}")
    assert (
        len(json.loads((tmp_path / "history.json").read_text())["loss"]) == 30
    )
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").unlink()
    capsys.readouterr()
    # the fields that the run was trained with need not be said again
    assert run("test", "--config", NAME, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert all(key in capsys.readouterr().out for key in result)


def test_a_refused_run_leaves_what_there_was(copied, capsys):
    before = kept(copied)
    words = ["train", "--config", NAME, "--out", copied, "--seed", 9, *SHORT]
    assert run(*words) == 2
    error = told(capsys.readouterr().err.splitlines(True)[-1])
    # the words of the command line, not those of Python
    assert "exists; --resume goes on from it" in error
    assert run(*words, "--resume") == 2
    assert "seed = 0, but this run has 9" in capsys.readouterr().err
    assert kept(copied) == before


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capsys):
    train = ["train", "--config", NAME, *SHORT, "--out"]
    for words in (
        [*train, tmp_path / "a/b/c", "--resume"],
        [*train, tmp_path / "a", "--device", "meta"],
        ["test", "--config", NAME, "--out", tmp_path / "a/b"],
    ):
        assert run(*words) == 2
        assert not list(tmp_path.iterdir()), words
    (tmp_path / "a").mkdir()  # it was there before
    for out in ("a", "a/b"):
        assert run(*train, tmp_path / out, "--resume") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not kept(tmp_path / "a")


def test_the_seed_decides(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            "train",
            "--config",
            NAME,
            "--out",
            tmp_path / folder,
            "--seed",
            seed,
            *SHORT,
        )
    a, b, c = (
        load_checkpoint(tmp_path / x / "model.pt")["objective"] for x in "abc"
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


TRAIN = ["train", "--config", NAME, "--out", "{}", *SHORT]
# as many as there are in the folder
STUDIES = ", ".join(
    sorted(
        path.stem
        for path in Path(__file__).resolve().parents[1].glob("studies/*.py")
    )
)
SAMPLE = ["sample", "--config", NAME, "--run", "{}", "--out"]
LATENT = ["train", "--config", "dlgm.nf10.mnist", "--out", "{}"]
MISTAKES = [
    (
        ["tset"],
        "expected one of train, test, sample, list, study, record first",
    ),
    (["--config", NAME, "train"], "--config: expected one of train"),
    (["list", "extra"], "extra: unknown option; flowcourse list takes no"),
    (["train", "--config", "realnvp.digit"], "--config: expected one of"),
    (["train", "--config", "realnvp.digit"], "'realnvp.digits'"),
    (["train", "--config", ""], "config: expected a name, got ''"),
    ([*TRAIN, "--config", "realnvp.digits"], "config: expected once, got"),
    ([*TRAIN, "--out", "elsewhere"], "out: expected once, got"),
    (["train", "--config", NAME, "--out", ""], "out: expected a name"),
    ([*TRAIN, "--layer", "3"], "--layer: unknown option (perhaps --layers)"),
    ([*TRAIN, "--widht", "3"], "takes --config, --out"),
    ([*TRAIN, "resume=True"], "resume=True: unknown option (perhaps --resume)"),
    ([*TRAIN, "--resume=True"], "True: not expected after --resume, which"),
    ([*TRAIN, "--resume", "yes"], "yes: not expected after --resume, which"),
    ([*LATENT, "--amortised", "no"], "after --amortised, which takes no value"),
    ([*TRAIN, "--steps", "3", "4"], "4: not expected after --steps"),
    ([*TRAIN[:4], "/dev/null/x"], "--out: expected a folder to write in"),
    ([*TRAIN[:4], __file__], "--out: expected a folder to write in"),
    ([*TRAIN[:4], "a\0b"], "--out: expected a folder to write in"),
    ([*TRAIN[:4], "x" * 300], "--out: expected a folder to write in"),
    ([*TRAIN, "--steps", "0"], "--steps: expected a whole number"),
    ([*TRAIN, "--batch-size", "-1"], "--batch-size: expected a whole number"),
    ([*TRAIN, "--lr", "inf"], "--lr: expected a finite number"),
    ([*TRAIN, "--clip", "nan"], "--clip: expected a finite number"),
    ([*TRAIN, "--seed", str(2**64)], "--seed: expected"),
    ([*TRAIN, "--copies", "-1"], "--copies: expected a whole number"),
    ([*TRAIN, "--jitter", "-1"], "--jitter: expected a finite number"),
    ([*TRAIN, "--dropout", "1.5"], "--dropout: expected a finite number"),
    ([*TRAIN, "--hidden", "0"], "--hidden: expected positive integers"),
    ([*TRAIN, "--data", "mnist"], "--data: expected one of"),
    ([*TRAIN, "--scalar-map", "afine"], "--scalar-map: expected one of"),
    ([*TRAIN, "--checkpoint-every", "0"], "--checkpoint-every: expected"),
    ([*TRAIN, "--device", "tpu9"], "--device: expected"),
    ([*TRAIN, "--device", "meta"], "--device: expected one that computes"),
    ([*TRAIN, "--hidden", str(10**15)], "not enough memory"),
    ([*TRAIN, "--resume"], "checkpoint"),
    ([*LATENT, "--held-out", "70000"], "--held-out: expected at most 59999"),
    ([*LATENT, "--judged", "0"], "--judged: expected a whole number"),
    ([*LATENT, "--window", "0"], "--window: expected a whole number"),
    (["test", "--config", NAME, "--out", "{}"], "model.pt"),
    (["study"], f"study: expected one of {STUDIES}, or"),
    (["study", "map"], f"study: expected one of {STUDIES}, or"),
    (["study", "{}/x.py"], "or the path of a .py file, got"),
    (["study", "maps", "--shard", "0/2"], "--shard: unknown option"),
    (["study", "maps", "digits"], "digits: unknown option"),
    ([*SAMPLE, "{}.h5"], "--run: expected a folder with the trained model of"),
    ([*SAMPLE, "{}.h5"], "train it first"),
    (
        [*SAMPLE, "{}.txt"],
        "--out: expected a file that ends in .h5, .npz, .csv",
    ),
    ([*SAMPLE, "{}"], "--out: expected a file that ends in .h5, .npz, .csv"),
    (
        [*SAMPLE, "{}.h5", "--n", "0"],
        "--n: expected a whole number of at least",
    ),
    ([*SAMPLE, "{}.h5", "--n", "-1"], "--n: expected a whole number of at"),
    ([*SAMPLE, "{}.h5", "--seed", str(2**64)], "--seed: expected a whole"),
    ([*SAMPLE, "{}.h5", "--device", "meta"], "--device: expected one that"),
    ([*SAMPLE, "{}.h5", "--layers", "3"], "--layers: unknown option"),
    ([*SAMPLE, "{}.h5", "--run", "a", "--run", "b"], "--run: expected once"),
    (
        [*SAMPLE[:2], "realnvp.digit", "--out", "{}.h5"],
        "--config: expected one",
    ),
    (["record"], "folders: expected one run or more, got none"),
    (["record", "{}"], "folders: expected runs that `flowcourse train` fin"),
    (["record", "--ot", "x"], "flowcourse record takes --out"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_answered_in_a_line(words, message, tmp_path, capsys):
    assert run(*(word.format(tmp_path / "run") for word in words)) == 2
    assert message in told(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "--config"),
        (["train", "--config"], "--config"),
        ([*TRAIN, "--schedule", "linear"], "'constant', 'cosine'"),
        ([*TRAIN, "--steps", "many"], "steps"),
        ([*TRAIN, "--device"], "--device"),
        (["sample", "--config", NAME], "--out"),
        (["sample", "--out", "x.h5"], "--config"),
        ([*SAMPLE, "x.h5", "--n", "many"], "--n"),
    ],
)
def test_a_bad_value_is_answered_with_what_exists(words, message, capsys):
    assert run(*words) == 2 and message in capsys.readouterr().err


def test_another_runs_model_is_refused(finished, capsys):
    before = kept(finished)
    assert run("test", "--config", "realnvp.digits", "--out", finished) == 2
    error = told(capsys.readouterr().err)
    assert f"is a run of '{NAME}', expected 'realnvp.digits'" in error
    test = ["test", "--config", NAME, "--out", finished]
    for option, was, now in (("layers", 2, 4), ("jitter", 0.2, 0.5)):
        assert run(*test, f"--{option}", now) == 2
        error = told(capsys.readouterr().err)
        assert f"--{option}: " in error
        assert f"was trained with {was}, got {now}" in error
    # another seed would choose other rows to test on
    assert run(*test, "--seed", 1) == 2
    assert "trained with 0, got 1" in told(capsys.readouterr().err)
    assert kept(finished) == before


@pytest.mark.parametrize(
    "other",
    [
        {"partition": "half"},
        {"jitter": 0.1},
        {"copies": 19},
        {"dropout": 0.5},
        {"scalar_map": "affine-tanh"},
        {"data": "moons"},
    ],
)
def test_another_experiment_does_not_go_on(other, copied, capsys):
    """All but the last have weights of the same names and shapes."""
    before = kept(copied)
    (name, value), *_ = other.items()
    changed = ["--" + name.replace("_", "-"), value]
    words = ["train", "--config", NAME, "--out", copied, *SHORT, *changed]
    assert run(*words, "--resume") == 2
    error = capsys.readouterr().err.splitlines(True)[-1]
    assert name in told(error) or "data = " in error
    assert kept(copied) == before


def test_a_longer_run_goes_on(tmp_path):
    words = ["train", "--config", NAME, "--out", tmp_path, *SHORT]
    words += ["--schedule", "constant", "--checkpoint-every", "9"]
    assert run(*words) == 0
    more = ["--steps", "40", "--checkpoint-every", "7", "--resume"]
    assert run(*words, *more) == 0
    assert len(History.load(tmp_path / "history.json")) == 40
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["steps"] == 40
    assert load_checkpoint(tmp_path / "model.pt")["config"]["steps"] == 40


FOREIGN = {
    "of another kind": lambda state: {"recipe": {}, "history": {}},
    "no dictionary": lambda state: [1, 2],
    "no weights": lambda state: state | {"objective": [1.0]},
    "weights of something else": lambda state: state | {"objective": {"w": 1}},
    "a setting we do not have": lambda state: (
        state | {"config": state["config"] | {"width": 3}}
    ),
    "a value that we refuse": lambda state: (
        state | {"config": state["config"] | {"layers": "two"}}
    ),
    "no settings": lambda state: state | {"config": 3},
    "no name": lambda state: state | {"name": [NAME]},
}


@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_model_is_refused_in_a_line(how, copied, capsys):
    path = copied / "model.pt"
    state = load_checkpoint(path)
    path.unlink()
    save_checkpoint(path, FOREIGN[how](state))
    assert run("test", "--config", NAME, "--out", copied) == 2
    error = told(capsys.readouterr().err)
    assert error.startswith("checkpoint: ") and "model.pt" in error
    with pytest.raises(ValueError, match="model.pt"):
        runs.test(finished_config(), copied)


def test_damaged_data_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(datasets["old-faithful"].sha256, "all", "0" * 64)
    words = ["train", "--config", NAME, *SHORT, "--out", tmp_path / "run"]
    assert run(*words) == 2
    assert "this file is damaged" in told(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_result_that_is_not_a_number_is_json(copied, monkeypatch, capsys):
    monkeypatch.setattr(FlowConfig, "evaluate", lambda *_: {"gap": math.nan})
    assert run("test", "--config", NAME, "--out", copied) == 0
    assert json.loads((copied / "result.json").read_text()) == {"gap": "nan"}
    assert "gap: nan" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["load", "objective", "evaluate"])
def test_ctrl_c_anywhere_is_a_line(when, tmp_path, monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowConfig, when, pressed)
    words = ["train", "--config", NAME, *SHORT, "--out", tmp_path / "run"]
    assert run(*words) == 130
    error = capsys.readouterr().err.splitlines(True)[-1]
    assert told(error) == "stopped by Ctrl-C\n"
    assert (tmp_path / "run").exists() == (when == "evaluate")


def test_ctrl_c_while_importing_is_a_line(tmp_path):
    """A module that the command imports late says so, and takes its time."""
    (tmp_path / "tyro.py").write_text(
        "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = start("list", env={"PYTHONPATH": path}, **pipes)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    assert told(error) == "stopped by Ctrl-C\n" and child.returncode == 130


def test_who_reads_no_further_ends_the_command_quietly():
    child = start("--help", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 128 + signal.SIGPIPE


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_no_color_sends_no_codes():
    ours, theirs = os.openpty()
    env = {"NO_COLOR": "1", "TERM": "xterm"}
    child = start("train", "--help", env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while part := read(ours):
        text += part
    assert child.wait(timeout=60) == 0
    assert b"--config" in text and b"\x1b" not in text


def read(terminal):
    """The next bytes of a terminal; Linux says its end by an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_the_command_imports_nothing_that_it_may_not_need():
    heavy = "matplotlib accelerate pooch scipy sklearn pandas IPython"
    code = "import sys, flowcourse.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(heavy.split()) & set(done.stdout.split())


def test_one_run_has_its_folder_alone(tmp_path, capsys):
    """A second run, and a test, are refused while the first is at work; SIGTERM ends that one well."""
    words = ["train", "--config", NAME, "--out", tmp_path, *SHORT]
    words[-1] = "1000"  # no validation
    child = start(*words, "--steps", "1000000", stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    before = (tmp_path / "run.json").read_bytes()
    for other in (["--resume"], [], ["--resume", "--seed", "3"]):
        assert run(*words, *other) == 2
        error = capsys.readouterr().err.splitlines(True)[-1]
        assert "another run" in told(error)
    assert (tmp_path / "run.json").read_bytes() == before
    child.send_signal(signal.SIGTERM)
    text = child.communicate(timeout=120)[1]
    last = told(text.replace("\r", "\n").splitlines(True)[-1])
    assert child.returncode == 143 and "Traceback" not in text
    assert "SIGTERM" in last and "--resume goes on from it" in last


def test_the_options_are_the_fields(capsys):
    assert run("train", "--config", NAME, "--help") == 0
    text = capsys.readouterr().out
    for word in (
        "--hidden",
        "--seed",
        "--steps",
        "--device",
        "--resume",
        "Optimiser steps",
        "{constant,cosine}",
    ):
        assert word in text


def test_ctrl_c_and_resume_give_the_uninterrupted_run(tmp_path):
    slow = [
        "--steps",
        "400",
        "--layers",
        "4",
        "--hidden",
        "32",
        "--validate-every",
        "20",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("train", "--config", NAME, "--out", whole, *slow) == 0
    words = command("train", "--config", NAME, "--out", broken, *slow)
    child = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while (
        not (broken / "checkpoint.pt").exists() and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    time.sleep(0.3)  # into the run
    child.send_signal(signal.SIGINT)
    text = child.communicate(timeout=120)[1].decode()
    assert (
        child.returncode == 130 and "resume" in text and "Traceback" not in text
    )
    assert not (broken / "model.pt").exists()
    assert (
        run("train", "--config", NAME, "--out", broken, *slow, "--resume") == 0
    )
    one, two = (
        load_checkpoint(x / "model.pt")["objective"] for x in (whole, broken)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_torchrun_trains_on_two_processes(tmp_path):
    words = ["train", "--config", NAME, "--device", "cpu", *SHORT]
    assert run(*words, "--out", tmp_path / "one") == 0
    done = subprocess.run(
        # by its address: the name of a machine need not resolve
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
        ]
        + [
            "--nproc-per-node",
            "2",
            "-m",
            "flowcourse",
            *words,
            "--out",
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / x / "history.json").read_text())["loss"]
        for x in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-5)


def test_settings_reach_fit(tmp_path, monkeypatch, capsys):
    given = {}

    def fit(*_, **options):
        given.update(options)
        raise TrainingDiverged("step 1: the loss is nan", None)

    monkeypatch.setattr(runs, "fit", fit)
    words = ["train", "--config", NAME, *SHORT, "--out", tmp_path / "run"]
    assert run(*words, "--checkpoint-every", 7) == 1
    assert told(capsys.readouterr().err) == "step 1: the loss is nan\n"
    assert given["checkpoint_every"] == 7 and not given["resume"]
    validation = finished_config().load().validation
    assert torch.equal(given["validation"], validation)


def test_the_trained_weights_are_judged_in_eval_mode(copied, monkeypatch):
    judged = []

    def evaluate(self, objective):
        judged.append((objective.training, objective.state_dict()))
        return {}

    monkeypatch.setattr(FlowConfig, "evaluate", evaluate)
    # what only matters to a trained model may be given otherwise
    monkeypatch.setattr(FlowConfig, "judging", ("seed",))
    assert run("test", "--config", NAME, "--out", copied, "--seed", 5) == 0
    [(training, weights)] = judged
    trained = load_checkpoint(copied / "model.pt")["objective"]
    assert not training and weights.keys() == trained.keys()
    assert all(torch.equal(weights[key], trained[key]) for key in trained)


def test_a_file_of_samples_must_have_a_place(finished, tmp_path, capsys):
    words = ["sample", "--config", NAME, "--run", finished, "--n", 3, "--out"]
    (tmp_path / "folder.csv").mkdir()
    for out in (
        tmp_path / "folder.csv",
        "/dev/null/x.csv",
        "x" * 300 + ".csv",
        "a\0b.csv",
    ):
        assert run(*words, out) == 2
        assert "--out: expected a file" in told(capsys.readouterr().err)
    assert run(*words, tmp_path / "folder.csv" / "x.csv") == 0
    capsys.readouterr()
    # the run of another experiment, and one that is not finished
    words[2] = "realnvp.digits"
    assert run(*words, tmp_path / "x.csv") == 2
    error = told(capsys.readouterr().err)
    assert f"is a run of '{NAME}', expected 'realnvp.digits'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]
    assert sum(1 for _ in tmp_path.rglob("*")) == 2


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_the_drawing_has_no_half_file(finished, tmp_path, ending):
    out = tmp_path / "a" / "b" / "rows.csv"
    words = ["sample", "--config", NAME, "--run", finished, "--out", out]
    child = start(*words, "--n", 10**9, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not any(
        path.stat().st_size for path in out.parent.glob("rows.csv.*")
    ):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(ending)
    text = child.communicate(timeout=120)[1]
    last = told(text.replace("\r", "\n").splitlines(True)[-1])
    name = "Ctrl-C" if ending == signal.SIGINT else "SIGTERM"
    assert last.startswith(f"stopped by {name} with ")
    assert last.endswith(f" of 1000000000 rows drawn; {out} is as it was\n")
    assert child.returncode == 128 + ending and "Traceback" not in text
    assert not list(tmp_path.iterdir())  # no folder either


def test_the_options_of_sample_are_few(capsys):
    assert run("sample", "--config", NAME, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--run", ".npz", "by default runs/NAME", "--n", "--context"):
        assert word in text
    assert "--layers" not in text
