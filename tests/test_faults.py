"""Which row, target or weight broke a run, and which checkpoint is good."""

import math
import re

import pytest
import torch
from torch import nn
from train_child import Breaks, X, make_flow, run_reverse

from flowcourse.bases import Uniform
from flowcourse.batches import _NOISE, _SPLIT, _generator
from flowcourse.checkpoint import load_checkpoint, save_checkpoint
from flowcourse.core import Compose, Flow
from flowcourse.elementwise import AffineMap, Elementwise, SigmoidMap
from flowcourse.objectives import MaximumLikelihood, Objective, ReverseKL
from flowcourse.trainer import TrainingDiverged, fit


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
