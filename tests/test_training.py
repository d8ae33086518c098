"""The trainer: exact resumption, safe checkpoints, processes, and what it says about mistakes."""

import dataclasses
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from torch import nn
from train_child import (
    FULL,
    Blurred,
    log_target,
    make_data,
    make_flow,
    run_blurred,
    run_likelihood,
    run_reverse,
)
from train_child import run_weighted as run_child_weighted

from flowcourse.bases import DiagonalGaussian, GaussianMixture, Uniform
from flowcourse.core import Compose, Flow
from flowcourse.elementwise import (
    ActNorm,
    AffineMap,
    BatchNorm,
    Elementwise,
    SigmoidMap,
)
from flowcourse.training import (
    _MAGIC,
    _NOISE,
    _ORDER,
    _SPLIT,
    OPTIMIZERS,
    Annealing,
    CheckpointError,
    History,
    MaximumLikelihood,
    Objective,
    Recipe,
    ReverseKL,
    TrainingDiverged,
    TrainingInterrupted,
    _generator,
    _stream,
    fit,
    learning_rate_factor,
    load_checkpoint,
    save_checkpoint,
)

CHILD = Path(__file__).with_name("train_child.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def assert_same(got, want):
    """The same flow and history, to the last bit."""
    assert got[1] == want[1]
    for (name, a), b in zip(
        got[0].state_dict().items(), want[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


class StopAt:
    """Presses Ctrl-C, or fails, in the middle of a run."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def __call__(self, step, objective, history):
        if step == self.step:
            self.action()


def press(number=signal.SIGINT):
    signal.raise_signal(number)


def fail():
    raise RuntimeError("power cut")


# ---------------------------------------------------------------- resumption


@pytest.mark.parametrize("run", [run_likelihood, run_reverse, run_blurred])
@pytest.mark.parametrize("at", [1, 9])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, run, at):
    want = run()
    path = tmp_path / "run.pt"
    with pytest.raises(TrainingInterrupted, match="after step") as stopped:
        run(checkpoint=path, callbacks=(StopAt(at, press),))
    assert at <= len(stopped.value.history) <= at + 1
    # nothing may depend on the global state
    torch.manual_seed(random.randrange(2**31))
    assert_same(run(checkpoint=path, resume=True), want)
    # a finished run stays as it is
    assert_same(run(checkpoint=path, resume=True), want)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_is_like_ctrl_c(tmp_path, name):
    number, path = getattr(signal, name), tmp_path / "run.pt"

    def mine(number, frame):
        raise AssertionError("fit did not take this signal")

    before = signal.signal(number, mine)
    try:
        stop = StopAt(9, lambda: press(number))
        with pytest.raises(
            TrainingInterrupted, match=f"stopped by {name} after"
        ) as stopped:
            run_reverse(checkpoint=path, callbacks=(stop,))
        assert signal.getsignal(number) is mine
        assert stopped.value.signal == number
    finally:
        signal.signal(number, before)
    assert_same(run_reverse(checkpoint=path, resume=True), run_reverse())


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopAt(2, lambda: press(signal.SIGHUP))
        assert len(run_reverse(callbacks=(stop,))[1]) == 12
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lost_steps_are_done_again(tmp_path):
    want = run_likelihood()
    path = tmp_path / "run.pt"
    with pytest.raises(RuntimeError, match="power cut"):
        run_likelihood(
            checkpoint=path, checkpoint_every=10, callbacks=(StopAt(25, fail),)
        )
    assert len(load_checkpoint(path)["history"]["loss"]) == 20
    assert_same(run_likelihood(checkpoint=path, resume=True), want)


def test_early_stopped_run_resumes_as_it_was(tmp_path):
    options = dict(lr=0.5, ema=None, clip=None, patience=2, validate_every=3)
    want = run_likelihood(**options)
    assert len(want[1]) < 60
    path = tmp_path / "run.pt"
    with pytest.raises(TrainingInterrupted):
        run_likelihood(
            **options, checkpoint=path, callbacks=(StopAt(4, press),)
        )
    assert_same(run_likelihood(**options, checkpoint=path, resume=True), want)
    assert_same(run_likelihood(**options, checkpoint=path, resume="auto"), want)


def test_longer_run_goes_on_and_shorter_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_reverse(steps=6, checkpoint=path)
    assert_same(
        run_reverse(steps=12, checkpoint=path, resume=True),
        run_reverse(steps=12),
    )
    with pytest.raises(CheckpointError, match="steps = 12, but this run has 6"):
        run_reverse(steps=6, checkpoint=path, resume=True)
    path, cosine = tmp_path / "cosine.pt", dict(schedule="cosine")
    run_reverse(steps=6, checkpoint=path, **cosine)
    with pytest.raises(CheckpointError, match="steps = 6, but this run has 12"):
        run_reverse(steps=12, checkpoint=path, resume=True, **cosine)


def test_annealing_counts_updates_and_resumes(tmp_path):
    def run(**options):
        flow = make_flow()
        objective = ReverseKL(flow, log_target, Annealing(0.0, 20))
        history = fit(
            objective,
            steps=12,
            batch_size=33,
            lr=1e-2,
            progress=False,
            **options,
        )
        assert objective.annealing.done == len(history)
        return flow, history

    path, want = tmp_path / "run.pt", run()
    with pytest.raises(RuntimeError, match="power cut"):
        run(checkpoint=path, checkpoint_every=4, callbacks=(StopAt(7, fail),))
    assert_same(run(checkpoint=path, resume=True), want)
    assert want[1].loss != run_reverse()[1].loss  # the weight matters

    with pytest.raises(ValueError, match="start: expected .* at most 1, got 2"):
        Annealing(2)
    with pytest.raises(
        ValueError, match="updates: expected .* at least 1, got 0"
    ):
        Annealing(updates=0)


def test_annealing_weighs_the_target_and_is_1_in_eval_mode():
    flow = make_flow().double()
    objective = ReverseKL(flow, log_target, Annealing(0.25, 8))
    noise = objective.draw(50, _generator(0, _NOISE, 0))
    x, log_q = flow.rsample_and_log_prob(noise=noise)
    for weight in (0.25, 0.375, 0.5):  # 1/4, and 1/8 more each time
        want = (log_q - weight * log_target(x)).mean()
        assert objective(None, noise) == want
    objective.eval()
    assert objective(None, noise) == (log_q - log_target(x)).mean()
    assert objective.annealing.done == 3
    weights = Annealing(0.5, 2)
    assert [weights().item() for _ in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_the_path_gradient_leaves_the_density_alone():
    """By hand for `x = m + s z`: of the gradient of log q(x) only the way through x is left."""
    flow = affine().double()
    noise = torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 2)
    objective = ReverseKL(flow, log_target, path=True)
    objective(None, noise).backward()
    got = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    x = flow.rsample_and_log_prob(noise=noise)[0]
    other = affine().double()
    other.load_state_dict(flow.state_dict())
    other.requires_grad_(False)
    (other.log_prob(x) - log_target(x)).mean().backward()
    for p, g in zip(flow.parameters(), got, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-14)
    flow.zero_grad()
    ReverseKL(flow, log_target)(None, noise).backward()
    assert any(
        (p.grad - g).abs().max() > 1e-3
        for p, g in zip(flow.parameters(), got, strict=True)
    )


def test_draws_inside_the_objective_resume_too(tmp_path):
    class Noisy(Objective):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(
                nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)
            )

        def forward(self, batch, noise=None):
            return (
                (self.layer(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            )

    def run(**options):
        torch.manual_seed(0)
        objective = Noisy()
        return objective, fit(
            objective, make_data()[0], steps=20, progress=False, **options
        )

    want, path = run(), tmp_path / "run.pt"
    with pytest.raises(TrainingInterrupted):
        run(checkpoint=path, callbacks=(StopAt(7, press),))
    assert_same(run(checkpoint=path, resume=True), want)


def test_draws_inside_the_objective_are_fresh_in_each_step():
    class Draws(Breaks):
        def __init__(self):
            super().__init__(99)
            self.drawn = []

        def forward(self, batch, noise=None):
            self.drawn.append(torch.rand(()).item())
            return super().forward(batch)

    first, again, other = Draws(), Draws(), Draws()
    for objective, seed in ((first, 0), (again, 0), (other, 1)):
        fit(objective, steps=5, seed=seed, progress=False)
    assert len(set(first.drawn + other.drawn)) == 10
    assert first.drawn == again.drawn


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    want = torch.randn(3)
    torch.manual_seed(5)
    run_reverse(steps=2)
    assert torch.equal(torch.randn(3), want)
    assert run_reverse(steps=3)[1] == run_reverse(steps=3)[1]
    assert run_reverse(steps=3)[1] != run_reverse(steps=3, seed=1)[1]


def test_noise_is_fresh_in_each_step_and_the_same_in_each_validation():
    class Recorded(Blurred):
        drawn = []

        def draw(self, n, generator):
            self.drawn.append(super().draw(n, generator))
            return self.drawn[-1]

    x = make_data(1700)[0]
    objective = Recorded(make_flow())
    options = dict(steps=4, batch_size=17, validate_every=2, progress=False)
    fit(objective, x[:200], validation=x[200:], **options)
    sizes = [len(noise) for noise in objective.drawn]
    assert sizes == [17, 17, 1000, 500, 17, 17, 1000, 500]
    d = objective.drawn
    assert torch.equal(d[2], d[6]) and torch.equal(d[3], d[7])
    starts = [tuple(d[k][0].tolist()) for k in (0, 1, 2, 3, 4, 5)]
    assert len(set(starts)) == 6
    # each use of randomness has a stream of its own
    assert len({_stream(0, k) for k in (_ORDER, _NOISE, _SPLIT)}) == 3


def wait_for(condition, child, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < end, "the child did not get there"
        time.sleep(0.02)


def steps_in(path):
    try:
        return len(load_checkpoint(path)["history"]["loss"])
    except CheckpointError:
        return -1


def start_child(folder):
    return subprocess.Popen(
        [sys.executable, CHILD, "slow", folder],
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigkill_in_mid_run(tmp_path):
    path = tmp_path / "run.pt"
    child = start_child(tmp_path)
    try:
        wait_for(lambda: steps_in(path) >= 20, child)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert 20 <= steps_in(path) < 60
    assert_same(run_likelihood(checkpoint=path, resume=True), run_likelihood())


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")],
)
def test_signals_to_a_child(tmp_path, number, name):
    path = tmp_path / "run.pt"
    child = start_child(tmp_path)
    try:
        wait_for(lambda: steps_in(path) >= 10, child)
        with pytest.raises(ValueError, match="run.pt is being written by"):
            run_likelihood(checkpoint=path, resume=True)
        child.send_signal(number)
        message = child.communicate(timeout=30)[1]
    finally:
        child.kill()
        child.wait()
    assert f"TrainingInterrupted: stopped by {name} after step" in message
    assert "resume=True" in message and str(path) in message
    assert child.returncode != 0
    done = int(message.split("after step ")[1].split()[0])
    assert steps_in(path) == done < 60
    assert_same(run_likelihood(checkpoint=path, resume=True), run_likelihood())


def test_second_ctrl_c_stops_at_once_and_the_handler_comes_back(tmp_path):
    def twice():
        press()
        press()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_reverse(callbacks=(StopAt(2, twice),))
    assert not isinstance(stopped.value, TrainingInterrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_outside_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(run_reverse(steps=2)[1])
    )
    thread.start()
    thread.join()
    assert found == [run_reverse(steps=2)[1]]


# ---------------------------------------------------------------- checkpoints


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


def test_numbers_of_numpy_make_a_checkpoint_that_can_be_read(tmp_path):
    path = tmp_path / "run.pt"
    options = dict(
        steps=np.int64(6),
        batch_size=np.int32(33),
        lr=np.float64(1e-2),
        clip=np.float32(2.0),
        ema=np.float64(0.9),
        weight_decay=torch.tensor(0.0),
        seed=np.uint8(3),
    )
    want = run_reverse(**options, checkpoint=path)
    recipe = load_checkpoint(path)["recipe"]
    for name in options:
        assert type(recipe[name]) in (int, float), name
    plain = {name: value.item() for name, value in options.items()}
    assert_same(run_reverse(**plain, checkpoint=path, resume=True), want)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_large_seeds(tmp_path, seed):
    path = tmp_path / "run.pt"
    want = run_likelihood(steps=3, seed=seed, checkpoint=path)
    options = dict(steps=3, seed=seed, checkpoint=path, resume=True)
    assert_same(run_likelihood(**options), want)


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


def test_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_reverse(steps=3, checkpoint=path)
    with pytest.raises(ValueError, match="exists; resume=True"):
        run_reverse(steps=3, checkpoint=path)
    with pytest.raises(
        CheckpointError, match="lr = 0.01, but this run has 0.5"
    ):
        run_reverse(steps=3, checkpoint=path, resume=True, lr=0.5)
    with pytest.raises(
        CheckpointError, match="of another experiment: objective"
    ):
        fit(
            ReverseKL(Flow(nn_free()), log_target),
            steps=3,
            batch_size=33,
            lr=1e-2,
            checkpoint=path,
            resume=True,
            progress=False,
        )
    save_checkpoint(tmp_path / "model.pt", {"objective": {}})
    with pytest.raises(CheckpointError, match="no run to go on with, but obj"):
        run_reverse(steps=3, checkpoint=tmp_path / "model.pt", resume=True)
    path = tmp_path / "data.pt"
    run_likelihood(steps=2, checkpoint=path)
    flow = make_flow(context_dim=1)
    x, context = make_data()
    options = {**FULL, "steps": 2, "checkpoint": path, "resume": True}
    for k in range(2):
        parts = x.clone(), context.clone()
        parts[k][3] += 1e-3
        with pytest.raises(CheckpointError, match="data = .*crc32"):
            fit(MaximumLikelihood(flow), parts, **options)


def nn_free():
    from flowcourse.coupling import RealNVP

    return RealNVP(2, layers=4, hidden=(16,))


def test_another_experiment_with_the_same_shapes_is_refused(tmp_path):
    path = tmp_path / "run.pt"

    def run(start=0.0, **options):
        objective = ReverseKL(make_flow(), log_target, Annealing(start, 20))
        return fit(objective, steps=3, progress=False, **options)

    identity = {"flow": {"layers": (2, 3), "bend": None}, "name": "a"}
    run(checkpoint=path, identity=identity)
    again = dict(checkpoint=path, resume=True)
    assert len(run(**again, identity=identity)) == 3
    # what one of the two does not say is not compared
    assert len(run(**again)) == len(run(**again, identity={"more": 1})) == 3
    with pytest.raises(
        CheckpointError,
        match="another experiment: flow.layers = .2, 3., but this run has .2, 4.; "
        "flow.bend = None, but this run has 1$",
    ):
        changed = {"flow": {"layers": [2, 4], "bend": 1}, "name": "a"}
        run(**again, identity=changed)
    with pytest.raises(
        CheckpointError,
        match="objective = .*start=0, .*but this run has .*start=0.5, ",
    ):
        run(0.5, **again)
    # another release may word it in another way
    old = load_checkpoint(path)
    old["versions"]["flowcourse"] = "0.0.1"
    save_checkpoint(path, old)
    with pytest.warns(UserWarning, match="objective = .*start=0"):
        assert len(run(0.5, **again)) == 3
    # and earlier ones said nothing
    del old["identity"]
    save_checkpoint(path, old)
    assert len(run(0.5, **again, identity=changed)) == 3


def test_where_a_function_lies_is_no_difference(tmp_path):
    class Shown(Breaks):
        def extra_repr(self):
            return repr(lambda: None)

    path = tmp_path / "run.pt"
    kept = []  # two that live at once lie at two addresses
    for resume in (False, True):
        kept.append(Shown(99))
        kept.append(object())
        fit(kept[-2], steps=2, checkpoint=path, resume=resume, progress=False)


# ---------------------------------------------------------------- against a
# loop written by hand


def by_hand(flow, x, steps, batch, lr, clip, warmup, ema, validation, every):
    """The same training as plain torch; only the order of rows is taken from the trainer."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
    losses, norms, checked, kept, average = [], [], [], [], None
    for step in range(steps):
        epoch, i = divmod(step, math.ceil(len(x) / batch))
        order = torch.randperm(len(x), generator=_generator(0, _ORDER, epoch))
        optimizer.zero_grad()
        loss = -flow.log_prob(x[order[i * batch : (i + 1) * batch]]).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(flow.parameters(), clip)
        for group in optimizer.param_groups:
            if step < warmup:
                group["lr"] = lr * ((step + 1) / (warmup + 1))
            else:
                t = (step - warmup) / (steps - warmup)
                group["lr"] = lr * (0.5 * (1 + math.cos(math.pi * t)))
        optimizer.step()
        now = [p.detach().clone() for p in flow.parameters()]
        average = now if average is None else average
        average = [
            a.lerp(p, 1 - ema) for a, p in zip(average, now, strict=True)
        ]
        losses.append(loss.item())
        norms.append(norm.item())
        if (step + 1) % every == 0:
            with torch.no_grad():
                for p, a in zip(flow.parameters(), average, strict=True):
                    p.copy_(a)
                checked.append((-flow.log_prob(validation).mean()).item())
                for p, q in zip(flow.parameters(), now, strict=True):
                    p.copy_(q)
            kept.append(average)
    return losses, norms, checked, kept[checked.index(min(checked))]


def test_equals_a_loop_written_by_hand():
    x, y = make_data(100)[0], make_data(130)[0][100:]
    flow, other = make_flow(), make_flow()
    options = dict(lr=1e-2, clip=1.5, warmup=4, ema=0.8)
    history = fit(
        MaximumLikelihood(flow),
        x,
        validation=y,
        validate_every=10,
        steps=30,
        batch_size=32,
        schedule="cosine",
        progress=False,
        **options,
    )
    losses, norms, checked, best = by_hand(
        other, x, 30, 32, validation=y, every=10, **options
    )
    assert history.loss == losses
    assert history.gradient_norm == norms and min(norms) < 1.5 < max(norms)
    assert history.validation_loss == checked and history.validation_step == [
        10,
        20,
        30,
    ]
    for p, a in zip(flow.parameters(), best, strict=True):
        assert torch.equal(p, a)


def test_best_weights_come_back_after_early_stopping():
    x, y = make_data(100)[0], make_data(130)[0][100:]
    flow, seen = make_flow(), {}

    def remember(step, objective, history):
        seen[step] = {k: v.clone() for k, v in objective.state_dict().items()}

    history = fit(
        MaximumLikelihood(flow),
        x,
        validation=y,
        validate_every=1,
        patience=5,
        steps=500,
        lr=0.3,
        callbacks=(remember,),
        progress=False,
    )
    assert len(history) == history.best_step + 5 < 500
    assert history.best_validation == min(history.validation_loss)
    for key, value in seen[history.best_step].items():
        assert torch.equal(value, flow.state_dict()[key.removeprefix("flow.")])
    with torch.no_grad():
        assert -flow.log_prob(y).mean() == history.best_validation


def test_schedule():
    assert [learning_rate_factor(k, 10) for k in (0, 9)] == [1.0, 1.0]
    assert [learning_rate_factor(k, 10, warmup=3) for k in range(4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]
    assert learning_rate_factor(5, 10, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(10, 10, "cosine") == pytest.approx(0.0)
    history = run_likelihood()[1]
    assert history.lr[5] == 1e-2 and history.lr[-1] < 1e-4


def test_own_optimizer_and_trainable_base():
    flow = Flow(make_flow().bijection, DiagonalGaussian(2))
    before = flow.base.loc.clone()
    fit(
        ReverseKL(flow, log_target),
        steps=3,
        optimizer=torch.optim.RMSprop,
        progress=False,
    )
    assert not torch.equal(flow.base.loc, before)


BY_NAME = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": lambda p, **options: torch.optim.RMSprop(
        p, momentum=0.9, **options
    ),
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_by_name_are_torchs(name):
    x, options = make_data(20)[0], dict(lr=1e-2, weight_decay=0.3)
    flow, other = affine(), affine()
    objective = MaximumLikelihood(flow)
    fit(objective, x, steps=3, optimizer=name, progress=False, **options)
    optimizer = BY_NAME[name](other.parameters(), **options)
    for epoch in range(3):
        order = torch.randperm(20, generator=_generator(0, _ORDER, epoch))
        optimizer.zero_grad()
        (-other.log_prob(x[order]).mean()).backward()
        optimizer.step()
    for p, q in zip(flow.parameters(), other.parameters(), strict=True):
        # fused kernels round in another order: a few of the last digits
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_each_group_keeps_its_share_of_the_rate():
    flow = Flow(affine().bijection, DiagonalGaussian(2))

    def halves(params, lr, weight_decay):
        base = list(flow.base.parameters())
        rest = [p for p in params if all(p is not q for q in base)]
        groups = [dict(params=rest), dict(params=base, lr=0.0)]
        return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)

    before = [p.clone() for p in flow.parameters()]
    options = dict(steps=3, optimizer=halves, warmup=2, progress=False)
    history = fit(MaximumLikelihood(flow), make_data()[0], **options)
    assert history.lr == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    base = {id(p) for p in flow.base.parameters()}
    for p, q in zip(flow.parameters(), before, strict=True):
        assert torch.equal(p, q) == (id(p) in base)


def test_the_average_is_kept_without_validation():
    flow, seen = affine(), []

    def note(step, objective, history):
        seen.append([p.detach().clone() for p in flow.parameters()])

    options = dict(steps=3, ema=0.75, lr=0.1, progress=False)
    fit(MaximumLikelihood(flow), make_data()[0], callbacks=(note,), **options)
    for k, p in enumerate(flow.parameters()):
        one, two, three = (parameters[k] for parameters in seen)
        want = 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three
        torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-7)


def test_epochs_and_fractions_count_rows(tmp_path):
    path = tmp_path / "run.pt"
    x = make_data(55)[0]
    options = dict(validation=0.5, epochs=2, batch_size=5, progress=False)
    history = fit(MaximumLikelihood(affine()), x, checkpoint=path, **options)
    # 27.5 rows are held out, rounded to 28; the other 27 make 6 batches
    assert load_checkpoint(path)["recipe"]["validation"].startswith("(28, 2)")
    assert len(history) == 12 and history.validation_step == [6, 12]


def test_data_with_a_graph_are_only_read():
    scale = torch.ones(2, requires_grad=True)
    x = make_data(50)[0] * scale
    fit(
        MaximumLikelihood(affine()),
        x,
        validation=x,
        steps=3,
        weights=torch.ones(50, requires_grad=True),
        progress=False,
    )
    assert scale.grad is None


def test_parameters_without_gradient_stay():
    flow = Flow(
        make_flow().bijection, DiagonalGaussian(2, scale=2.0)
    ).requires_grad_(False)
    flow.base.requires_grad_(True)
    frozen = [p.clone() for p in flow.bijection.parameters()]
    fit(MaximumLikelihood(flow), make_data()[0], steps=5, progress=False)
    for p, q in zip(flow.bijection.parameters(), frozen, strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(flow.base.loc, torch.zeros(2))


# ---------------------------------------------------------------- recipes


def test_a_recipe_is_what_the_keywords_say():
    recipe = Recipe(steps=5, lr=1e-2, schedule="cosine", ema=0.9)
    options = dict(steps=5, lr=1e-2, schedule="cosine", ema=0.9)

    def run(*recipe, **settings):
        flow = make_flow()
        objective = MaximumLikelihood(flow)
        x = make_data()[0]
        return flow, fit(objective, x, *recipe, progress=False, **settings)

    want = run(**options)
    assert_same(run(recipe), want)
    assert_same(run(Recipe(steps=9, lr=1e-2), **options), want)
    assert recipe.steps == 5  # frozen, and not changed by a call
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.steps = 6
    assert dataclasses.replace(recipe, steps=np.int64(6)).steps == 6


def test_a_recipe_is_plain_and_documented():
    settings = [f.name for f in dataclasses.fields(Recipe)]
    assert len(settings) == 14
    words = set(re.findall("`([a-z_]+)`", fit.__doc__))
    assert set(settings) <= words  # help(fit) names them all
    hints = typing.get_type_hints(Recipe)
    assert list(typing.get_args(hints["optimizer"])) == list(OPTIMIZERS)
    assert json.loads(json.dumps(Recipe().to_dict())) == Recipe().to_dict()
    own = Recipe(optimizer=torch.optim.Adagrad)
    assert own.to_dict()["optimizer"] == "Adagrad"
    # as the command line reads it
    assert tyro.cli(Recipe, args=["--clip", "3"]) == Recipe(clip=3.0)


def test_numbers_become_pythons_own():
    recipe = Recipe(
        steps=np.int64(3), seed=np.uint8(200), lr=np.float32(0.5), clip=1
    )
    for name, kind in (
        ("steps", int),
        ("seed", int),
        ("lr", float),
        ("clip", float),
    ):
        assert type(getattr(recipe, name)) is kind


WRONG_SETTINGS = [
    dict(steps=True),
    dict(steps=np.float64(3)),
    dict(steps=None),
    dict(epochs=0),
    dict(batch_size="8"),
    dict(patience=0),
    dict(validate_every=-1),
    dict(warmup=-1),
    dict(seed=2**64),
    dict(seed=None),
    dict(lr=math.inf),
    dict(lr=0),
    dict(lr="1e-3"),
    dict(lr=np.float64("nan")),
    dict(weight_decay=math.inf),
    dict(weight_decay=math.nan),
    dict(weight_decay=-1e-9),
    dict(clip=math.inf),
    dict(clip=math.nan),
    dict(clip=0.0),
    dict(ema=-0.1),
    dict(ema=math.nan),
    dict(schedule=["cosine"]),
    dict(schedule=None),
    dict(amp=True),
    dict(optimizer=None),
    dict(optimizer=["adam"]),
]


@pytest.mark.parametrize("wrong", WRONG_SETTINGS, ids=str)
def test_wrong_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        Recipe(**wrong)


def test_unknown_arguments_are_answered_with_those_that_exist():
    objective = MaximumLikelihood(make_flow())
    for wrong, meant in (
        ("stpes", "steps"),
        ("batchsize", "batch_size"),
        ("callback", "callbacks"),
        ("learning_rate", None),
    ):
        hint = f"; did you mean {meant}" if meant else ". It takes steps"
        with pytest.raises(
            ValueError, match=f"{wrong}: fit has no such argument{hint}"
        ):
            fit(objective, X, **{wrong: 1})
    with pytest.raises(ValueError, match="recipe: expected a Recipe, got dict"):
        fit(objective, X, {"steps": 3})


# ---------------------------------------------------------------- weights


COUNTS = torch.arange(40) % 4  # some rows count three times, some not at all


def run_weighted(x, weights=None, **options):
    """Full batches of float64, with plain steps: what rounding leaves is small."""
    flow = make_flow().double()
    options = {"steps": 20, "batch_size": 200, "optimizer": "sgd", **options}
    objective = MaximumLikelihood(flow)
    return flow, fit(
        objective, x, weights=weights, lr=1e-2, progress=False, **options
    )


def assert_close_runs(got, want):
    # sums in another order: the rounding of float64, a hundredfold for 20 steps
    close = dict(rtol=1e-12, atol=1e-12)
    for name in ("loss", "gradient_norm", "validation_loss"):
        a, b = (torch.tensor(getattr(run[1], name)) for run in (got, want))
        torch.testing.assert_close(a, b, **close)
    for p, q in zip(got[0].parameters(), want[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)


@pytest.mark.parametrize("scale", [1, 0.37])
def test_a_weight_is_a_number_of_copies(scale):
    x, y = make_data(80)[0].double().split(40)
    copies = [rows.repeat_interleave(COUNTS, 0) for rows in (x, y)]
    want = run_weighted(copies[0], validation=copies[1])
    got = run_weighted(x, (COUNTS * scale, COUNTS * scale), validation=y)
    assert_close_runs(got, want)
    alone = run_weighted(x, COUNTS * scale, validation=y)  # y counts alike
    assert alone[1].loss == got[1].loss
    assert alone[1].validation_loss != got[1].validation_loss


def test_rows_without_weight_are_not_looked_at():
    x = make_data(40)[0].double()
    far = x.clone()
    far[COUNTS == 0] = 1e200  # its density is zero
    want = run_weighted(x, COUNTS)
    assert_close_runs(run_weighted(far, COUNTS), want)


def test_held_out_rows_take_their_weights_along():
    # in batches of 1000, of which the last is small
    x = make_data(3000)[0].double()
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    flow, history = run_weighted(
        x, weights, validation=0.4, steps=1, validate_every=1
    )
    order = torch.randperm(3000, generator=_generator(0, _SPLIT, 0))[:1200]
    with torch.no_grad():
        each = -flow.log_prob(x[order])
    w = weights[order].double()
    want = ((w * each).sum() / w.sum()).item()
    assert history.validation_loss == [pytest.approx(want, rel=1e-13)]
    assert abs(want - each.mean()) > 1e-4


def test_small_batches_are_right_in_the_mean():
    x = make_data(40)[0].double()
    weights = 1.0 + COUNTS
    # with so small a rate the weights stay, to the last bit
    options = dict(steps=10, batch_size=4, optimizer="sgd", progress=False)
    flow = make_flow().double()
    history = fit(
        MaximumLikelihood(flow), x, weights=weights, lr=1e-300, **options
    )
    with torch.no_grad():
        each = -flow.log_prob(x)
    want = (weights * each).sum() / weights.sum()
    assert np.mean(history.loss) == pytest.approx(want.item(), rel=1e-13)


def test_weights_resume_and_are_compared(tmp_path):
    x, path = make_data(40)[0].double(), tmp_path / "run.pt"
    want = run_weighted(x, COUNTS, batch_size=7)
    stop = dict(checkpoint=path, callbacks=(StopAt(9, press),), batch_size=7)
    with pytest.raises(TrainingInterrupted):
        run_weighted(x, COUNTS, **stop)
    again = dict(checkpoint=path, resume=True, batch_size=7)
    assert_same(run_weighted(x, COUNTS, **again), want)
    with pytest.raises(CheckpointError, match="made with weights = .*crc32"):
        run_weighted(x, (COUNTS > 0) * (1.0 + COUNTS), **again)


def test_a_run_without_weights_is_not_one_with_them(tmp_path):
    x, path = make_data(40)[0].double(), tmp_path / "run.pt"
    run_weighted(x, checkpoint=path)
    with pytest.raises(CheckpointError, match="weights = 'none', but"):
        run_weighted(
            x, 1.0 + COUNTS, checkpoint=path, resume=True, batch_size=200
        )
    path = tmp_path / "with.pt"
    run_weighted(x, 1.0 + COUNTS, checkpoint=path)
    with pytest.raises(CheckpointError, match="weights = .*crc32.* has 'none'"):
        run_weighted(x, checkpoint=path, resume=True)


WRONG_WEIGHTS = [
    (torch.ones(3), r"weights: expected one for each row, shape \(4,\), got"),
    (torch.ones(4, 1), r"weights: expected one for each row, shape \(4,\)"),
    (torch.tensor([1.0, -1, 1, 1]), "weights: expected numbers of at least 0"),
    (torch.tensor([1.0, math.nan, 1, 1]), "weights: expected finite numbers"),
    (torch.tensor([1.0, math.inf, 1, 1]), "weights: expected finite numbers"),
    (torch.zeros(4), "weights: expected one above 0 .* only zeros"),
    ([1.0] * 4, "weights: expected a tensor, got list; torch.as_tensor makes"),
    ((torch.ones(4), torch.ones(4)), "weights: expected one tensor, or a pair"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS, ids=str)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(make_flow()), X, weights=weights, progress=False)


def test_weights_need_one_loss_for_each_row():
    with pytest.raises(
        ValueError, match="weights: .*Blurred defines forward and not losses"
    ):
        fit(Blurred(make_flow()), X, weights=torch.ones(4), progress=False)
    with pytest.raises(
        ValueError, match="weights: expected None, because there is no data"
    ):
        run_reverse(weights=torch.ones(4))

    class Sum(MaximumLikelihood):
        def losses(self, batch, noise=None):
            return super().losses(batch).sum()

    with pytest.raises(
        ValueError, match=r"Sum.losses .* 4 rows, got shape \(\)"
    ):
        fit(Sum(make_flow()), X, weights=torch.ones(4), progress=False)
    with pytest.raises(NotImplementedError, match="neither losses nor forward"):
        Objective()(X)


# ---------------------------------------------------------------- processes,
# precision, devices


def test_two_processes_equal_one(tmp_path):
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [sys.executable, *command, CHILD, "processes", tmp_path],
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.pop("processes") == 2
    saved = two.pop("saved")
    one = {
        "likelihood": run_likelihood(steps=12)[1],
        "one row left": run_likelihood(
            steps=12, batch_size=17, validation=None
        )[1],
        "reverse": run_reverse()[1],
        "blurred": run_blurred()[1],
        "weighted": run_child_weighted()[1],
    }
    for name, history in one.items():
        for key in (
            "loss",
            "gradient_norm",
            "parameter_norm",
            "validation_loss",
        ):
            assert two[name][key] == pytest.approx(
                getattr(history, key), rel=1e-5
            ), (name, key)
    # what two processes saved, one can go on from
    assert saved["loss"] == two["likelihood"]["loss"]
    resumed = run_likelihood(
        steps=12, checkpoint=tmp_path / "two.pt", resume=True
    )[1]
    assert resumed.loss == saved["loss"]


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_bf16_and_then_full_precision_in_one_process():
    full = run_reverse(steps=5)[1]
    half = run_reverse(steps=5, amp="bf16")[1]
    assert full.loss != half.loss
    # bfloat16 has 8 bits: 0.4 % on a number, and the first loss is a mean of 33
    # of size 1
    assert half.loss[0] == pytest.approx(full.loss[0], abs=0.05)
    assert run_reverse(steps=5)[1] == full


def test_half_precision_holds_for_steps_and_validation():
    class Asks(Breaks):
        def forward(self, batch, noise=None):
            assert torch.is_autocast_enabled("cpu")
            return super().forward(batch)

    options = dict(amp="bf16", steps=2, validate_every=1, progress=False)
    assert len(fit(Asks(99), X, validation=X, **options)) == 2


def test_an_accelerator_of_the_caller_is_left_alone():
    from accelerate import Accelerator

    mine = Accelerator(cpu=True, mixed_precision="bf16")
    want = run_reverse(steps=3)[1]
    assert mine.mixed_precision == "bf16"
    mine.state._reset_state(True)
    assert run_reverse(steps=3)[1] == want


def test_compile():
    plain, compiled = (
        run_reverse(steps=4)[1],
        run_reverse(steps=4, compile="aot_eager")[1],
    )
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_cuda(tmp_path, amp):
    cpu = run_likelihood()
    gpu = run_likelihood(device="cuda", amp=amp)
    assert gpu[0].base.loc.device.type == "cpu"  # it comes back to where it was
    close = dict(rel=1e-3) if amp == "no" else dict(abs=0.2)
    assert gpu[1].loss == pytest.approx(cpu[1].loss, **close)
    path = tmp_path / "run.pt"
    with pytest.raises(TrainingInterrupted):
        run_likelihood(
            device="cuda",
            amp=amp,
            checkpoint=path,
            callbacks=(StopAt(9, press),),
        )
    assert_same(
        run_likelihood(device="cuda", amp=amp, checkpoint=path, resume=True),
        gpu,
    )
    flow = make_flow().cuda()
    fit(ReverseKL(flow, log_target), steps=3, progress=False)
    assert flow.base.loc.device.type == "cuda"


# ---------------------------------------------------------------- mistakes


class Breaks(Objective):
    """Its loss, or its gradient alone, is not finite at one step."""

    def __init__(self, step, gradient_only=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls, self.step, self.gradient_only = 0, step, gradient_only

    def forward(self, batch, noise=None):
        self.calls += 1
        loss = self.weight.square().sum()
        if self.calls < self.step:
            return loss
        if self.gradient_only:  # d sqrt(w - w) / dw
            return loss + (self.weight - self.weight.detach()).sqrt().sum()
        return loss * math.nan


@pytest.mark.parametrize("gradient_only", [False, True])
def test_divergence_stops_at_once(tmp_path, gradient_only):
    path = tmp_path / "run.pt"
    objective = Breaks(15, gradient_only)
    with pytest.raises(TrainingDiverged) as found:
        fit(objective, checkpoint=path, checkpoint_every=10, progress=False)
    message = str(found.value)
    assert message.startswith(
        "step 15: the loss is " + ("0." if gradient_only else "nan")
    )
    assert "gradient norm" in message and f"{path}, after step 10" in message
    assert objective.weight.isfinite().all()
    assert len(found.value.history) == 14 and objective.calls == 15
    assert len(load_checkpoint(path)["history"]["loss"]) == 10


def unit_rows(n=40):
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_row_outside_the_support_is_named(held_out):
    x = unit_rows()
    x[17, 1] = 1.5
    flow = Flow(
        Compose(Elementwise(2, AffineMap()), Elementwise(2, SigmoidMap()))
    )
    options = dict(steps=12, batch_size=7, lr=1e-3, progress=False)
    if held_out:
        # wherever it falls
        order = torch.randperm(40, generator=_generator(0, _SPLIT, 0))
        share = (int((order == 17).nonzero()) + 1) / 40
        with pytest.warns(
            UserWarning,
            match="validation: the loss after step .* is (inf|nan), which never "
            "counts as the best; data: row 17: its density is zero, because it "
            "lies outside the codomain of Elementwise, .*0.0.*1.0",
        ) as seen:
            history = fit(
                MaximumLikelihood(flow),
                x,
                validation=share,
                validate_every=1,
                **options,
            )
        assert len(seen) == 1  # once
        assert history.best_step is None and history.best_validation is None
        assert len(history) == 12 and history.stale == 12
        return
    with pytest.raises(TrainingDiverged) as found:
        fit(MaximumLikelihood(flow), x, **options)
    message = str(found.value)
    assert "row 17: its density is zero" in message
    assert "codomain of Elementwise" in message
    assert "Remove such rows" in message and "smaller lr" not in message


def test_a_row_outside_the_support_of_the_base_is_named():
    flow = Flow(Elementwise(2, AffineMap()), Uniform(2, -1.0, 2.0))
    x = unit_rows()
    x[5, 0] = 4.0
    with pytest.raises(
        TrainingDiverged,
        match="data: row 5: its density is zero, because it lies outside the "
        "support of Uniform, .*Remove such rows",
    ):
        fit(MaximumLikelihood(flow), x, batch_size=9, progress=False)


def test_a_row_that_only_underflows_is_named_with_the_usual_advice():
    x = unit_rows()
    x[5, 0] = 1e30  # its square is above float32
    with pytest.raises(
        TrainingDiverged,
        match="data: row 5: its loss is inf. The weights are.*smaller lr",
    ):
        fit(MaximumLikelihood(make_flow()), x, batch_size=9, progress=False)


@pytest.mark.parametrize(
    ("losses", "best", "lowest", "stale"),
    [
        ([2.0, math.nan, 1.0], 3, 1.0, 0),
        ([2.0, math.nan], 1, 2.0, 1),
        ([2.0, -math.inf, math.inf, 1.5, 3.0], 4, 1.5, 1),
        ([math.nan, 2.0, 2.0], 2, 2.0, 1),
        ([math.nan, math.inf], None, None, 2),
        ([math.inf, -math.inf], None, None, 2),
        ([], None, None, 0),
    ],
)
def test_a_validation_that_is_not_finite_never_wins(
    losses, best, lowest, stale
):
    steps = list(range(1, len(losses) + 1))
    history = History(loss=[1.0], validation_loss=losses, validation_step=steps)
    assert history.best_step == best
    assert history.best_validation == lowest
    assert history.stale == stale
    assert ("best validation" in repr(history)) == (best is not None)


class Judged(Objective):
    """Its validation losses are given, one after another."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.coming = list(losses)

    def forward(self, batch, noise=None):
        if self.training:
            return self.weight.square()
        return torch.tensor(self.coming.pop(0))


def test_not_finite_is_no_improvement_for_patience():
    coming = [3.0, math.nan, 2.0, math.nan, -math.inf, math.inf, 1.0]
    objective, seen = Judged(coming), []

    def note(step, objective, history):
        seen.append(objective.weight.item())

    with pytest.warns(UserWarning, match="after step 2 is nan, .*the best$"):
        history = fit(
            objective,
            X,
            validation=X,
            validate_every=1,
            patience=3,
            callbacks=(note,),
            progress=False,
        )
    assert len(history) == 6 and history.best_step == 3
    assert objective.weight.item() == seen[2]


class Leaps(Objective):
    """Its weights overflow at one step, though its loss and gradient are finite."""

    def __init__(self, step):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0))
        self.calls, self.step = 0, step

    def forward(self, batch, noise=None):
        # the optimiser multiplies by 1e30
        self.calls += self.training
        return (1e15 if self.calls == self.step else 1e-25) * self.weight.sum()


@pytest.mark.parametrize("every", [3, 10, 500])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_last_good_checkpoint_is_good(tmp_path, every, ema):
    path = tmp_path / "run.pt"
    options = dict(optimizer="sgd", lr=1e30, ema=ema, progress=False)
    with pytest.raises(TrainingDiverged) as found:
        fit(
            Leaps(9),
            checkpoint=path,
            checkpoint_every=every,
            steps=40,
            **options,
        )
    message = str(found.value)
    saved = {3: 6, 10: 0, 500: 0}[every]
    assert f"last good checkpoint: {path}, after step {saved}" in message
    kept = load_checkpoint(path)
    assert len(kept["history"]["loss"]) == saved
    assert kept["objective"]["weight"].isfinite().all()
    cause = {
        3: "step 9: it left weight NaN or infinite",
        10: "step 10: the loss is -inf.*after the step before broke the weights",
        500: "step 10: the loss is -inf",
    }
    assert re.match(cause[every], message)
    # and nothing else is left behind by the last step
    with pytest.raises(TrainingDiverged, match="step 9: it left weight"):
        fit(Leaps(9), steps=9, **options)


def test_weights_are_looked_at_before_they_are_judged_or_trained():
    objective = Leaps(2)
    with pytest.raises(TrainingDiverged, match="step 2: it left weight"):
        fit(
            objective,
            X,
            validation=X,
            validate_every=2,
            steps=40,
            optimizer="sgd",
            lr=1e30,
            progress=False,
        )
    with pytest.raises(
        ValueError, match="objective: expected finite weights .* in weight$"
    ):
        fit(objective, X, progress=False)


def test_a_checkpoint_with_broken_weights_is_not_gone_on_from(tmp_path):
    path = tmp_path / "run.pt"
    run_reverse(steps=2, checkpoint=path)
    broken = load_checkpoint(path)
    name = next(iter(dict(make_flow().named_parameters())))
    broken["objective"][f"flow.{name}"].fill_(math.nan)
    save_checkpoint(path, broken)
    with pytest.raises(
        ValueError, match="checkpoint: .*run.pt: expected finite weights"
    ):
        run_reverse(steps=2, checkpoint=path, resume=True)


X = torch.zeros(4, 2)
NAN = torch.tensor([[0.0, 1.0], [math.nan, 1.0]])
MISTAKES = [
    (dict(data=NAN), "data: expected finite numbers, got 1 .* row 1"),
    (
        dict(data=torch.zeros(0, 2)),
        r"data: expected at least one row, got shape \(0, 2\)",
    ),
    (dict(data=[[0.0, 1.0]]), "data: expected a tensor, got list"),
    (
        dict(data=(X, X[:3])),
        r"data\[1\]: expected 4 rows as in data\[0\], got 3",
    ),
    (
        dict(data=torch.zeros(4, 3)),
        r"x: .* expects last dimension 2, got shape \(4, 3\)",
    ),
    (dict(data=X.double()), "float32.*float64|float64.*float32"),
    (dict(data=(X, X)), "context: "),
    (
        dict(validation=torch.zeros(3, 3)),
        r"validation: expected rows like .*\(4, 2\).*got \(3, 3\)",
    ),
    (
        dict(validation=1.5),
        "validation: expected a fraction that splits 4 rows in two, got 1.5",
    ),
    (
        dict(batch_size=0),
        "batch_size: expected a whole number of at least 1, got 0",
    ),
    (dict(steps=0), "steps: expected a whole number of at least 1, got 0"),
    (dict(steps=2.5), "steps: expected a whole number of at least 1, got 2.5"),
    (dict(lr=-1e-3), "lr: expected a finite number above 0, got -0.001"),
    (dict(lr=math.nan), "lr: expected a finite number above 0, got nan"),
    (
        dict(optimizer="adma"),
        "optimizer: expected one of 'adam', .*, got 'adma'",
    ),
    (
        dict(schedule="linear"),
        "schedule: expected one of 'constant', 'cosine', got 'linear'",
    ),
    (
        dict(ema=2.0),
        "ema: expected a finite number of at least 0 and at most 1, got 2.0",
    ),
    (dict(amp="half"), "amp: expected one of 'no', 'bf16', 'fp16', got 'half'"),
    (dict(amp="fp16"), "amp: expected 'no' or 'bf16' on the CPU"),
    (dict(patience=3), "patience: early stopping needs held-out rows"),
    (dict(resume=True), "resume: True needs a checkpoint"),
    (dict(device="gpu"), "device: expected one that is present, got 'gpu'"),
    (dict(compile="fast"), "compile: expected one of .* got 'fast'"),
    (dict(seed=-1), "seed: expected a whole number of at least 0, got -1"),
]


@pytest.mark.parametrize(
    ("wrong", "message"),
    MISTAKES,
    ids=[str(*m[0]) + str(k) for k, m in enumerate(MISTAKES)],
)
def test_mistakes_are_named(wrong, message):
    options = {"data": X, "steps": 1, "progress": False, **wrong}
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(make_flow()), options.pop("data"), **options)


def test_wrong_objectives_are_named():
    with pytest.raises(
        ValueError, match="objective: expected an Objective.*got Flow"
    ):
        fit(make_flow(), X)
    with pytest.raises(
        ValueError, match=r"such as Flow\(bijection\), got RealNVP"
    ):
        MaximumLikelihood(make_flow().bijection)
    with pytest.raises(
        ValueError, match="whose draws carry gradients, got GaussianMixture"
    ):
        ReverseKL(
            Flow(make_flow().bijection, GaussianMixture(X[:2])), log_target
        )
    with pytest.raises(
        ValueError, match="objective: expected parameters to train"
    ):
        fit(MaximumLikelihood(make_flow().requires_grad_(False)), X)
    with pytest.raises(
        ValueError, match="epochs: expected None, because there is no data"
    ):
        fit(ReverseKL(make_flow(), log_target), epochs=3)


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


def returns(what):
    """An objective whose forward gives what a function of its weight gives."""

    class Returns(Objective):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, batch, noise=None):
            return what(self.weight)

    return Returns()


WRONG_LOSSES = [
    (
        lambda w: w,
        r"one number, a tensor of shape \(\), got shape \(3,\); .mean",
    ),
    (lambda w: w.sum(0, keepdim=True), r"got shape \(1,\)"),
    (lambda w: None, "got NoneType"),
    (lambda w: 2.0, "got float"),
    (lambda w: (w.sum(),), "got tuple"),
    (lambda w: w.sum().detach(), "one without a graph"),
    (lambda w: torch.tensor(1.0), "one without a graph"),
    (
        lambda w: torch.ones((), requires_grad=True) * 2,
        "one without a gradient for any of them",
    ),
]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("what", "message"), WRONG_LOSSES)
def test_wrong_losses_are_named(what, message, clip):
    objective = returns(what)
    with pytest.raises(ValueError, match=f"^objective: expected .*{message}"):
        fit(objective, clip=clip, progress=False)
    assert torch.equal(objective.weight, torch.ones(3))


@pytest.mark.parametrize(
    "wrong", [print, (print, 3), "print", [None], {print}, None]
)
def test_wrong_callbacks_are_refused_before_a_step(wrong):
    objective = Breaks(99)
    with pytest.raises(
        ValueError, match=r"callbacks: expected functions .* such as \(print,\)"
    ):
        fit(objective, callbacks=wrong, progress=False)
    assert objective.calls == 0
    fit(objective, steps=1, callbacks=[lambda *_: None], progress=False)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return X[k]


WRONG_DATA = [
    (np.zeros((4, 2)), "data: expected a tensor, got ndarray; torch.as_tensor"),
    ([X, X], "data: expected a tensor, got list; several tensors go into a"),
    (Rows(), "data: .* got Rows; fit draws the batches itself"),
    (
        torch.utils.data.DataLoader(Rows()),
        "got DataLoader; fit draws the batch",
    ),
    ((), r"data: expected at least one tensor, got \(\)"),
    ((X,), "data: MaximumLikelihood takes x or the pair .* got tuple of 1"),
    ((X, X, X), "got tuple of 3"),
    ((X, None), r"data\[1\]: expected a tensor, got NoneType"),
    (None, "data: MaximumLikelihood takes x or the pair .* got NoneType"),
    (X.to("meta"), "data: expected a dense tensor .* on the meta device"),
    (X.to_sparse(), "data: expected a dense tensor .* of layout torch.sparse"),
    (torch.zeros(4, 2, dtype=torch.int64), "floating-point .* torch.int64"),
    (torch.zeros(4, 2, dtype=torch.bool), "floating-point .* torch.bool"),
    (torch.zeros(4), "x: .* last dimension 2"),
    (torch.tensor(1.0), r"data: expected at least one row, got shape \(\)"),
]


@pytest.mark.parametrize(
    ("data", "message"), WRONG_DATA, ids=[m for _, m in WRONG_DATA]
)
def test_wrong_data_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(make_flow()), data, steps=1, progress=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_rows_of_different_lengths_are_named():
    nested = torch.nested.nested_tensor([X, X[:2]])
    with pytest.raises(ValueError, match="data: .* got one that is nested"):
        fit(MaximumLikelihood(make_flow()), nested, progress=False)


WRONG_OPTIONS = [
    (dict(resume="yes"), "resume: expected one of False, True, 'auto', got 'y"),
    (dict(resume=None), "resume: expected one of False, True, 'auto'"),
    (dict(resume="auto"), "resume: 'auto' needs a checkpoint"),
    (dict(checkpoint=3), "checkpoint: expected a path, got int"),
    (dict(checkpoint=True), "checkpoint: expected a path, got bool"),
    (dict(checkpoint_every=0), "checkpoint_every: expected .* at least 1"),
    (dict(checkpoint_every=math.inf), "checkpoint_every: expected"),
    (dict(device="meta"), "device: expected one that computes, got 'meta'"),
    (dict(device=1.5), "device: expected one that is present, got 1.5"),
    (dict(compile=None), "compile: expected one of"),
    (dict(compile=["inductor"]), "compile: expected one of"),
    (dict(identity="a"), "identity: expected a dictionary, got str"),
    (dict(identity={"a": print}), "identity: expected plain values, as JSON"),
    (dict(identity={"a": math.nan}), "identity: expected plain values"),
    (dict(validation=True), "validation: expected"),
    (dict(validation=math.nan), "validation: expected"),
    (dict(validation=0.0), "a fraction that splits 4 rows in two, got 0.0"),
    (dict(validation=0), "a fraction that splits 4 rows in two, got 0"),
    (dict(validation=np.float32(1.5)), "a fraction that splits 4 rows"),
    (
        dict(optimizer=lambda p: None),
        "optimizer: expected a function of .* got TypeError",
    ),
    (
        dict(optimizer=lambda *_, **__: None),
        "optimizer: expected a function of .* got None from",
    ),
    (dict(validation="some"), "validation: expected a tensor, got str"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), WRONG_OPTIONS, ids=[m for _, m in WRONG_OPTIONS]
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(make_flow()), X, steps=1, progress=False, **wrong)


def test_a_fraction_of_numpy_is_a_fraction():
    options = dict(steps=4)
    assert_same(
        run_likelihood(validation=np.float64(0.2), **options),
        run_likelihood(validation=0.2, **options),
    )


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="data: expected finite numbers"):
        fit(
            MaximumLikelihood(make_flow()),
            NAN,
            checkpoint=tmp_path / "a" / "run.pt",
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_weights_without_values_are_named():
    for objective in (
        MaximumLikelihood(make_flow().to("meta")),
        MaximumLikelihood(make_flow()).to("meta"),
    ):
        with pytest.raises(
            ValueError,
            match="objective: expected weights with values, got flow",
        ):
            fit(objective, X, progress=False)


def test_classes_in_the_place_of_instances_are_named():
    with pytest.raises(ValueError, match="got the class MaximumLikelihood"):
        fit(MaximumLikelihood, X)
    with pytest.raises(ValueError, match="flow: .* got the class Flow"):
        MaximumLikelihood(Flow)
    with pytest.raises(ValueError, match="flow: .* got the class Flow"):
        ReverseKL(Flow, log_target)
    with pytest.raises(ValueError, match="got the class DiagonalGaussian"):
        ReverseKL(make_flow(), DiagonalGaussian)
    with pytest.raises(ValueError, match="annealing: .* got float"):
        ReverseKL(make_flow(), log_target, 0.5)
    with pytest.raises(ValueError, match="schedule: expected one of"):
        learning_rate_factor(1, 10, "linear")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x: -x.square().sum(),
            r"shape \(33,\), got shape \(\); sum over",
        ),
        (lambda x: -x.square(), r"got shape \(33, 2\)"),
        (lambda x: -x.square().sum(-1, True), r"got shape \(33, 1\)"),
        (lambda x: 0.0, "got float"),
        (lambda x: None, "got NoneType"),
    ],
)
def test_a_target_gives_one_number_for_each_draw(wrong, message):
    objective = ReverseKL(make_flow(), wrong)
    with pytest.raises(
        ValueError, match=f"log_target: expected one number .*{message}"
    ):
        fit(objective, batch_size=33, progress=False)


def test_a_density_gives_one_number_for_each_row():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def log_prob(self, x, context=None):
            return -(x - self.loc).square().sum()

    with pytest.raises(
        ValueError, match=r"flow: expected log_prob .* 4 rows, got shape \(\)"
    ):
        fit(MaximumLikelihood(Summed()), X, progress=False)


def test_draws_where_the_target_is_not_finite_are_counted():
    def target(x):
        log_p = -x.square().sum(-1)
        log_p = torch.where(x[..., 0] > 1, math.nan, log_p)
        return torch.where(x[..., 0] < -1, -math.inf, log_p)

    objective = ReverseKL(make_flow(), target)
    x = objective.flow.rsample_and_log_prob(
        noise=objective.draw(128, _generator(0, _NOISE, 0))
    )[0][:, 0]
    nan, infinite = int((x > 1).sum()), int((x < -1).sum())
    assert nan > 5 < infinite
    with pytest.raises(
        TrainingDiverged,
        match=f"step 1: the loss is nan.*; log_target is NaN at {nan} and "
        f"infinite at {infinite} of 128 draws. .*Mend it there",
    ) as found:
        fit(objective, progress=False)
    assert "smaller lr" not in str(found.value)


# ---------------------------------------------------------------- modes and
# devices


class Norm(Objective):
    """A network with a part that behaves otherwise in eval mode."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.seen = []

    def forward(self, batch, noise=None):
        self.seen.append((self.training, self.norm.training))
        return self.drop(self.norm(self.first(batch))).square().mean()


def modes(objective):
    return [m.training for m in objective.modules()]


def test_a_part_in_eval_mode_stays_in_it():
    objective = Norm()
    objective.norm.eval()
    before = modes(objective)
    mean = objective.norm.running_mean.clone()
    x = make_data(40)[0]
    fit(objective, x, validation=0.2, steps=5, validate_every=2, progress=False)
    assert (True, False) in objective.seen and (
        True,
        True,
    ) not in objective.seen
    assert torch.equal(objective.norm.running_mean, mean)
    assert modes(objective) == before


@pytest.mark.parametrize("whole", [lambda o: o, nn.Module.children])
def test_a_model_left_in_eval_mode_is_trained_and_given_back_so(whole):
    objective, x = Norm(), make_data(40)[0]
    parts = whole(objective)
    for module in [parts] if isinstance(parts, nn.Module) else parts:
        module.eval()
    before = modes(objective)
    fit(objective, x, validation=0.2, steps=5, validate_every=2, progress=False)
    assert set(objective.seen) == {(True, True), (False, False)}
    assert modes(objective) == before
    # also when the run fails
    with pytest.raises(RuntimeError, match="power cut"):
        options = dict(steps=5, validation=0.2, validate_every=1)
        stop = (StopAt(1, fail),)
        fit(objective, x, callbacks=stop, progress=False, **options)
    assert modes(objective) == before


def test_an_average_is_judged_in_eval_mode():
    objective, x = Norm(), make_data(40)[0]
    fit(
        objective,
        x,
        validation=0.2,
        steps=4,
        ema=0.5,
        validate_every=1,
        progress=False,
    )
    assert modes(objective) == modes(Norm())


def test_a_last_batch_of_one_row():
    """A flow with batch statistics meets an epoch that ends with one row."""
    for layer in (ActNorm(2), BatchNorm(2)):
        flow = Flow(Compose(layer, make_flow().bijection))
        history = fit(
            MaximumLikelihood(flow),
            make_data(129)[0],
            batch_size=128,
            steps=4,
            progress=False,
        )
        assert len(history) == 4


def affine():
    return Flow(Elementwise(2, AffineMap()))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_default_device_changes_nothing(tmp_path, reverse):
    def run(**options):
        flow = affine()
        if reverse:
            objective, data = ReverseKL(flow, log_target, Annealing()), None
        else:
            objective, data = MaximumLikelihood(flow), make_data()[0]
            options |= dict(validation=0.2, weights=torch.ones(150))
        options |= dict(steps=8, batch_size=33, ema=0.9, progress=False)
        return flow, fit(objective, data, **options)

    want = run()
    with Elsewhere():
        got = run(checkpoint=tmp_path / "run.pt", checkpoint_every=3)
        again = run(checkpoint=tmp_path / "run.pt", resume=True)
    assert_same(got, want)
    assert_same(again, want)


class Elsewhere(torch.overrides.TorchFunctionMode):
    """Inside `fit`, any tensor that is made without a device goes where there are no values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        while frame and frame.f_code is not fit.__code__:
            frame = frame.f_back
        makes = function in torch.utils._device._device_constructors()
        if frame and makes and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


# ---------------------------------------------------------------- history


def test_a_history_with_numbers_that_are_not_finite_is_json(tmp_path):
    path = tmp_path / "history.json"
    numbers = [1.0, math.nan, math.inf, -math.inf]
    history = History(
        loss=numbers, gradient_norm=numbers[::-1], validation_step=[1, 2]
    )
    history.save(path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    again = History.load(path)
    assert repr(again.to_dict()) == repr(history.to_dict())
    # as earlier releases wrote it
    path.write_text(json.dumps(history.to_dict()))
    assert repr(History.load(path).to_dict()) == repr(history.to_dict())


def test_history_is_tidy(tmp_path, capsys):
    history = run_likelihood(steps=10)[1]
    assert len(history) == 10 and all(
        len(v) == 10 for v in list(history.to_dict().values())[:4]
    )
    assert history.validation_step == [7, 10] and history.best_step in (7, 10)
    assert len(history.seconds) == 10 and min(history.seconds) > 0
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    assert repr(history).startswith("History(10 steps, loss ")
    assert repr(History()) == "History(0 steps)" and History().best_step is None
    axes = history.plot()
    assert (
        axes[0].get_ylabel() == "loss [nat]" and axes[1].get_yscale() == "log"
    )
    run_likelihood(steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "grad=" in shown
    run_likelihood(steps=3)
    assert not capsys.readouterr().err
