"""The trainer: exact resumption, safe checkpoints, processes, and what it says about mistakes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from train_child import (
    FULL,
    log_target,
    make_data,
    make_flow,
    run_blurred,
    run_likelihood,
    run_reverse,
)

from flowcourse.core import DiagonalGaussian, Flow, GaussianMixture
from flowcourse.training import (
    Annealing,
    CheckpointError,
    History,
    MaximumLikelihood,
    Objective,
    ReverseKL,
    TrainingDiverged,
    TrainingInterrupted,
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


def press():
    signal.raise_signal(signal.SIGINT)


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

    with pytest.raises(
        ValueError, match="start: expected a weight from 0 to 1, got 2"
    ):
        Annealing(2)
    with pytest.raises(ValueError, match="updates: expected at least 1, got 0"):
        Annealing(updates=0)


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


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    want = torch.randn(3)
    torch.manual_seed(5)
    run_reverse(steps=2)
    assert torch.equal(torch.randn(3), want)
    assert run_reverse(steps=3)[1] == run_reverse(steps=3)[1]
    assert run_reverse(steps=3)[1] != run_reverse(steps=3, seed=1)[1]


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


def test_ctrl_c_in_a_child(tmp_path):
    path = tmp_path / "run.pt"
    child = start_child(tmp_path)
    try:
        wait_for(lambda: steps_in(path) >= 10, child)
        child.send_signal(signal.SIGINT)
        message = child.communicate(timeout=30)[1]
    finally:
        child.kill()
        child.wait()
    assert "TrainingInterrupted: stopped by Ctrl-C after step" in message
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
    save_checkpoint(path, {"trap": Trap(sprung)})
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
    with pytest.raises(CheckpointError, match="another model"):
        fit(
            ReverseKL(Flow(nn_free()), log_target),
            steps=3,
            batch_size=33,
            lr=1e-2,
            checkpoint=path,
            resume=True,
            progress=False,
        )
    path = tmp_path / "data.pt"
    run_likelihood(steps=2, checkpoint=path)
    flow = make_flow(context_dim=1)
    x, context = make_data()
    x[3, 1] += 1e-3
    with pytest.raises(CheckpointError, match="data = .*crc32"):
        options = {**FULL, "steps": 2, "checkpoint": path, "resume": True}
        fit(MaximumLikelihood(flow), (x, context), **options)


def nn_free():
    from flowcourse.coupling import RealNVP

    return RealNVP(2, layers=4, hidden=(16,))


# ---------------------------------------------------------------- against a
# loop written by hand


def by_hand(flow, x, steps, batch, lr, clip, warmup, ema, validation, every):
    """The same training as plain torch; only the order of rows is taken from the trainer."""
    from flowcourse.training import _ORDER, _generator

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
    (dict(lr=-1e-3), "lr: expected a number above 0, got -0.001"),
    (dict(lr=math.nan), "lr: expected a number above 0, got nan"),
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
        "ema: expected a number of at least 0 and at most 1, got 2.0",
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


# ---------------------------------------------------------------- history


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
