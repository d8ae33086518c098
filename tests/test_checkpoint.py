"""Files that survive a crash, damage, and a second writer."""

import hashlib
import io
import os
import re
import stat
import warnings

import numpy as np
import pytest
import torch
from train_child import Breaks, StopAt, fail, run_reverse

from flowcourse.checkpoint import (
    _MAGIC,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from flowcourse.trainer import fit


def test_two_runs_into_one_file_are_refused(tmp_path):
    path = tmp_path / "run.pt"

    def again(step, objective, history):
        with pytest.raises(
            ValueError, match="checkpoint: .*run.pt is being written by another"
        ):
            run_reverse(checkpoint=path, resume=True)
        assert len(
            run_reverse(checkpoint=tmp_path / "own.pt", resume="auto")[1]
        )

    run_reverse(checkpoint=path, steps=1, callbacks=(again,))
    # let go at the end, whatever the end
    with pytest.raises(RuntimeError, match="power cut"):
        run_reverse(
            checkpoint=path, resume=True, steps=2, callbacks=(StopAt(2, fail),)
        )
    # what a killed run left half written is removed
    (tmp_path / "run.pt.0123abcd.tmp").touch()
    (tmp_path / "run.pt2.0123abcd.tmp").touch()
    run_reverse(checkpoint=path, resume=True, steps=3)
    left = [p.name for p in tmp_path.glob("*.tmp")]
    assert left == ["run.pt2.0123abcd.tmp"]


def test_names_of_two_writers_never_meet(tmp_path, monkeypatch):
    path, seen, real = tmp_path / "run.pt", [], os.replace

    def note(a, b):
        seen.append(str(a))
        real(a, b)

    monkeypatch.setattr(os, "replace", note)
    save_checkpoint(path, state(1.0))
    save_checkpoint(path, state(2.0))
    temporary = [name for name in seen if name != str(path)]
    assert len(set(temporary)) == len(temporary) == 2


def test_the_folder_is_synced_after_the_names_have_changed(
    tmp_path, monkeypatch
):
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(
        os, "replace", lambda a, b: (calls.append("name"), replace(a, b))
    )

    def sync(number):
        kind = os.fstat(number).st_mode
        calls.append("folder" if stat.S_ISDIR(kind) else "file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", sync)
    save_checkpoint(tmp_path / "run.pt", state(1.0))
    assert calls == ["file", "name", "folder"]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (np.float64(1.0), "numpy.float64 at state['a'][1]['b']"),
        (np.ones(2), "numpy.ndarray at"),
        (print, "builtins.builtin_function_or_method at"),
        (lambda: None, "builtins.function at"),
    ],
    ids=["number", "array", "function", "lambda"],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, wrong, name):
    path = tmp_path / "run.pt"
    save_checkpoint(path, state(1.0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(name)):
        save_checkpoint(path, {"a": [1.0, {"b": wrong}]})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def state(value):
    return {"value": torch.full((100,), value), "name": "x"}


def two_checkpoints(folder):
    path = folder / "run.pt"
    save_checkpoint(path, state(1.0))
    save_checkpoint(path, state(2.0))
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:10])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_foreign(path):
    torch.save(state(3.0), path)


def remove(path):
    path.unlink()


DAMAGES = {
    truncate: "truncated or damaged",
    flip_bit: "truncated or damaged",
    cut_header: "not written by this version",
    make_foreign: "not written by this version",
    remove: "cannot read",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_previous_one(tmp_path, damage):
    path = two_checkpoints(tmp_path)
    assert load_checkpoint(path)["value"][0] == 2
    damage(path)
    with pytest.warns(UserWarning, match=DAMAGES[damage]) as seen:
        assert load_checkpoint(path)["value"][0] == 1
    assert "run.pt.previous" in str(seen[0].message)
    # the next checkpoint must not push the damaged one into the place of the
    # good one
    save_checkpoint(path, state(4.0))
    remove(path)
    with pytest.warns(UserWarning):
        assert load_checkpoint(path)["value"][0] == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_without_a_previous_one_is_refused(tmp_path, damage):
    path = tmp_path / "run.pt"
    save_checkpoint(path, state(1.0))
    damage(path)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        load_checkpoint(path)


def test_every_flipped_bit_of_a_small_file_is_found(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"a": 1})
    content = path.read_bytes()
    for k in range(0, len(content), 7):
        path.write_bytes(
            content[:k] + bytes([content[k] ^ (1 << k % 8)]) + content[k + 1 :]
        )
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_crash_at_any_moment_of_saving_leaves_a_good_one(tmp_path, monkeypatch):
    path = two_checkpoints(tmp_path)
    real = os.replace
    for calls in range(2):
        left = [calls]

        def crash(a, b, left=left):
            if not left[0]:
                raise RuntimeError("power cut")
            left[0] -= 1
            real(a, b)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            save_checkpoint(path, state(5.0))
        monkeypatch.setattr(os, "replace", real)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load_checkpoint(path)["value"][0] == 2


class Trap:
    """A pickle that would create a file when loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, sprung = tmp_path / "run.pt", tmp_path / "sprung"
    payload = io.BytesIO()
    torch.save({"trap": Trap(sprung)}, payload)
    payload = payload.getvalue()
    path.write_bytes(_MAGIC + hashlib.sha256(payload).digest() + payload)
    with pytest.raises(CheckpointError, match="more than tensors.* refused"):
        load_checkpoint(path)
    assert not sprung.exists()


def test_output_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run.pt", tmp_path):
        objective = Breaks(1)
        with pytest.raises(
            ValueError, match="checkpoint: expected a path that can be written"
        ):
            fit(objective, checkpoint=path, progress=False)
        assert objective.calls == 0
    with pytest.raises(CheckpointError, match="cannot read .*nothing.pt"):
        run_reverse(checkpoint=tmp_path / "nothing.pt", resume=True)
    assert (
        len(
            run_reverse(
                checkpoint=tmp_path / "nothing.pt", resume="auto", steps=2
            )[1]
        )
        == 2
    )
