"""The command line, in this process and in real ones."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from flowcourse.cli import main
from flowcourse.configs import configs
from flowcourse.training import load_checkpoint

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


def test_a_refused_run_leaves_the_record_of_the_one_before(tmp_path, capsys):
    assert run("train", "--config", NAME, "--out", tmp_path, *SHORT) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (
        run("train", "--config", NAME, "--out", tmp_path, "--seed", 9, *SHORT)
        != 0
    )
    assert "exists" in capsys.readouterr().err
    assert (
        run(
            "train",
            "--config",
            NAME,
            "--out",
            tmp_path,
            "--seed",
            9,
            "--resume",
            *SHORT,
        )
        != 0
    )
    assert "seed" in capsys.readouterr().err
    assert {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    } == before


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "realnvp.digit"], "'realnvp.digits'"),
        (["train", "--config", NAME, "--widht", "3"], "takes --config, --out"),
        (
            ["train", "--config", NAME, "--out", "/dev/null/x"],
            "out: expected a folder to write in",
        ),
        (
            ["train", "--config", NAME, "--steps", "0", "--out", "{}"],
            "steps: expected",
        ),
        (
            ["train", "--config", NAME, "--device", "tpu9", "--out", "{}"],
            "device: expected",
        ),
        (["train", "--config", NAME, "--resume", "--out", "{}"], "checkpoint"),
        (["test", "--config", NAME, "--out", "{}"], "model.pt"),
    ],
)
def test_a_mistake_is_answered_with_what_exists(
    words, message, tmp_path, capsys
):
    assert run(*(word.format(tmp_path) for word in words)) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("flowcourse: ")
        and message in error
        and "Traceback" not in error
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "--config"),
        (
            ["train", "--config", NAME, "--schedule", "linear"],
            "'constant', 'cosine'",
        ),
        (["train", "--config", NAME, "--steps", "many"], "steps"),
        (["tarin"], "{train,"),
    ],
)
def test_a_bad_value_is_answered_with_what_exists(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_another_runs_model_is_refused(tmp_path, capsys):
    run("train", "--config", NAME, "--out", tmp_path, *SHORT)
    capsys.readouterr()
    assert run("test", "--config", "realnvp.digits", "--out", tmp_path) == 2
    assert (
        f"is a run of '{NAME}', expected 'realnvp.digits'"
        in capsys.readouterr().err
    )
    assert run("test", "--config", NAME, "--out", tmp_path, "--layers", 4) == 2
    assert "holds another model" in capsys.readouterr().err


def test_the_options_are_the_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "--config", NAME, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in (
        "--hidden",
        "--seed",
        "--steps",
        "--device",
        "--resume",
        "Optimiser steps",
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
