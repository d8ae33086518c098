"""`fit` against a loop written by hand, exact resumption, and what it says about mistakes."""

import math
import random

import numpy as np
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
    make_data,
    make_flow,
    press,
    run_blurred,
    run_likelihood,
    run_matched,
    run_reverse,
    run_scores,
)

from flowcourse.bases import DiagonalGaussian
from flowcourse.batches import _ORDER, _generator
from flowcourse.checkpoint import CheckpointError, load_checkpoint
from flowcourse.core import Compose, Flow
from flowcourse.elementwise import BatchNorm
from flowcourse.images import ActNorm
from flowcourse.objectives import MaximumLikelihood, Objective
from flowcourse.trainer import TrainingInterrupted, fit


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


@pytest.mark.parametrize(
    "run", [run_likelihood, run_reverse, run_blurred, run_matched, run_scores]
)
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
    path, cosine = tmp_path / "cosine.pt", dict(schedule="cosine")
    run_reverse(steps=6, checkpoint=path, **cosine)
    with pytest.raises(CheckpointError, match="steps = 6, but this run has 12"):
        run_reverse(steps=12, checkpoint=path, resume=True, **cosine)


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
