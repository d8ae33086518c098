"""What is written down is whole, is JSON, and says where it is from."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

import flowcourse
from flowcourse.records import origin, save_json


def test_what_is_written_is_json_and_whole(tmp_path, monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    path = tmp_path / "x.json"
    numbers = {"a": math.nan, "b": [1.5, math.inf], "c": {"d": (-math.inf, 2)}}
    save_json(path, numbers)
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"a": "nan", "b": [1.5, "inf"], "c": {"d": ["-inf", 2]}}

    def crash(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="the disk is gone"):
        save_json(path, {"a": 1})
    assert json.loads(path.read_text()) == found
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def git(folder, *words):
    """Git in a folder, whoever runs it."""
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *who, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_a_record_carries_the_commit_and_whether_it_tells_all(tmp_path):
    study = tmp_path / "studies" / "x.py"
    study.parent.mkdir()
    study.write_text("jobs = []")
    (tmp_path / "results").mkdir()
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "Begin")

    def dirty(out=None):
        found = origin(study, out)
        assert found["commit"] == git(tmp_path, "rev-parse", "HEAD")
        return found["dirty"]

    assert dirty() is False
    # results of earlier jobs are not what is run
    (tmp_path / "results" / "x.jsonl").write_text("{}")
    assert dirty() is False
    (tmp_path / "y.jsonl").write_text("{}")
    assert dirty() is True
    assert dirty(tmp_path / "y.jsonl") is False
    assert dirty(tmp_path.parent / "elsewhere.jsonl") is True
    (tmp_path / "y.jsonl").unlink()
    study.write_text("jobs = [1]")
    assert dirty() is True


def test_what_no_repository_holds_has_no_commit(tmp_path, monkeypatch):
    path = tmp_path / "x.py"
    path.write_text("")
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("x.py")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-m", "Begin")
    nothing = {"commit": None, "dirty": None}
    assert origin(path).items() >= nothing.items()  # as in site-packages
    monkeypatch.setenv("PATH", "")  # without git
    assert origin(path).items() >= nothing.items()


def test_a_record_carries_versions_machine_and_date():
    found = origin(Path(flowcourse.__file__))
    assert found["versions"]["flowcourse"] == flowcourse.__version__
    assert found["versions"]["torch"] == str(torch.__version__)
    assert "1 thread" in found["machine"] and len(found["date"]) == 10
