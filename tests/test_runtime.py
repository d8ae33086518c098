"""Signals, processes, precision, devices and modes, all put back at the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from train_child import (
    Breaks,
    StopAt,
    X,
    affine,
    assert_same,
    fail,
    log_target,
    make_data,
    make_flow,
    press,
    run_blurred,
    run_likelihood,
    run_matched,
    run_reverse,
    run_scores,
)
from train_child import run_weighted as run_child_weighted

from flowcourse.checkpoint import CheckpointError, load_checkpoint
from flowcourse.objectives import (
    Annealing,
    MaximumLikelihood,
    Objective,
    ReverseKL,
)
from flowcourse.trainer import TrainingInterrupted, fit

CHILD = Path(__file__).with_name("train_child.py")


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
        "matched": run_matched()[1],
        "scores": run_scores()[1],
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
