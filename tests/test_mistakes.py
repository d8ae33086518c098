"""Plausible mistakes: each error names the argument, what came, and what was expected.

So it is with mistakes of learners: here are those of the lesson on variational inference (the
others are tested beside their checkers), and what the checker says to each.
"""

import math

import pytest
import torch

from flowcourse.cli import main
from flowcourse.configs import DLGMConfig, FlowConfig, configs
from flowcourse.core import DiagonalGaussian, Flow
from flowcourse.coupling import RealNVP
from flowcourse.exercises import check_path_gradient, check_weights
from flowcourse.training import MaximumLikelihood, fit, load_checkpoint


def learn(data, **options):
    return fit(
        MaximumLikelihood(Flow(RealNVP(2, 2, hidden=(4,)))),
        data,
        steps=2,
        progress=False,
        **options,
    )


def foreign(folder):
    path = folder / "foreign.pt"
    path.write_bytes(b"not a checkpoint")
    return path


MISTAKES = {
    "wrong shape": (
        lambda folder: Flow(RealNVP(2)).log_prob(torch.zeros(5, 3)),
        [r"^x: ", r"last dimension 2", r"got shape \(5, 3\)"],
    ),
    "wrong dtype": (
        lambda folder: Flow(RealNVP(2)).log_prob(
            torch.zeros(5, 2, dtype=torch.float64)
        ),
        [r"^x: ", "float32", "float64"],
    ),
    "context missing": (
        lambda folder: Flow(RealNVP(2, context_dim=3)).sample(5),
        [r"^context: ", r"\(\*batch, 3\)", "got none"],
    ),
    "context not expected": (
        lambda folder: Flow(RealNVP(2)).sample(5, torch.zeros(3)),
        [r"^context: ", "expects none", r"got shape \(3,\)"],
    ),
    "dim 0": (lambda folder: RealNVP(0), [r"^dim: ", "at least 2", "got 0"]),
    "negative scale": (
        lambda folder: DiagonalGaussian(2, scale=-0.5),
        [r"^scale: ", "above 0", "got -0.5"],
    ),
    "NaN in the data": (
        lambda folder: learn(torch.tensor([[0.0, 1.0], [math.nan, 2.0]])),
        [r"^data: ", "finite", "(?i)nan"],
    ),
    "empty data": (
        lambda folder: learn(torch.zeros(0, 2)),
        [r"^data: ", "at least one row", "0"],
    ),
    "unknown config": (
        lambda folder: configs["realnvp.mnist"],
        [
            "^name: ",
            "expected one of .*'realnvp.digits'",
            "got 'realnvp.mnist'",
        ],
    ),
    "negative copies": (
        lambda folder: FlowConfig(copies=-1),
        ["^copies: ", "at least 1", "got -1"],
    ),
    "more held out than there is": (
        lambda folder: DLGMConfig(held_out=70_000),
        ["^held_out: ", "at most 59999", "got 70000"],
    ),
    "a setting that no experiment has": (
        lambda folder: configs["realnvp.digits"].replace(widht=8),
        ["^widht: ", "expected one of steps, .* hidden"],
    ),
    "a setting of the recipe": (
        lambda folder: configs["realnvp.digits"].replace(lr=math.inf),
        ["^lr: ", "finite", "got inf"],
    ),
    "unreadable checkpoint": (
        lambda folder: load_checkpoint(foreign(folder)),
        [r"^checkpoint: ", "foreign.pt", "expected", "not a checkpoint"],
    ),
    "unwritable output": (
        lambda folder: learn(
            torch.randn(4, 2), checkpoint=foreign(folder) / "below.pt"
        ),
        [r"^checkpoint: ", "below.pt|foreign.pt"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name, tmp_path):
    mistake, parts = MISTAKES[name]
    for part in parts:
        with pytest.raises(ValueError, match=part):
            mistake(tmp_path)


def test_the_command_line_explains_without_a_traceback(capsys):
    assert main(["train", "--config", "realnvp.mnist"]) == 2
    assert capsys.readouterr().err.startswith("flowcourse: ")


def weigh(log_w, shift=True, back=True, mean=True):
    """An answer to exercise 14.3, right by default."""
    largest = log_w.max() if shift else 0.0
    w = (log_w - largest).exp()
    log_z = (w.mean() if mean else w.sum()).log() + (largest if back else 0.0)
    return log_z, w.sum() ** 2 / w.square().sum() / len(w)


def path_gradient(m, s, eps, slope, sign_q=-1, sign_p=-1):
    """An answer to exercise 14.5, right by default."""
    along = sign_q * eps / s + sign_p * slope(m + s * eps)
    return along.mean(), (along * eps).mean()


ANSWERS = {  # the checker, a wrong answer, and what is said to it
    "10.3, overflow of log_z": (
        check_weights,
        lambda log_w: weigh(log_w, shift=False),
        [
            "log_z of large weights",
            "overflows",
            "subtract the largest log-weight",
        ],
    ),
    "10.3, overflow of the share": (
        check_weights,
        lambda log_w: (weigh(log_w)[0], weigh(log_w, shift=False)[1]),
        [
            "ess_share of large weights",
            "overflows",
            "subtract the largest log-weight",
        ],
    ),
    "10.3, largest weight not added": (
        check_weights,
        lambda log_w: weigh(log_w, back=False),
        ["log_z", "largest log-weight was subtracted", "add it again"],
    ),
    "10.3, a sum, and not added": (
        check_weights,
        lambda log_w: weigh(log_w, back=False, mean=False),
        ["log_z", "add the largest log-weight again", "subtract log n"],
    ),
    "10.5, sign of both slopes": (
        check_path_gradient,
        lambda *given: path_gradient(*given, sign_q=1, sign_p=1),
        ["by m", "wrong sign: log q - log p"],
    ),
    "10.5, sign of log q": (
        check_path_gradient,
        lambda *given: path_gradient(*given, sign_q=1),
        ["by m", "log q falls away from m"],
    ),
    "10.5, sign of log p": (
        check_path_gradient,
        lambda *given: path_gradient(*given, sign_p=1),
        ["by m", "wrong sign of the slope of log p"],
    ),
    "10.5, sign of both slopes by s": (
        check_path_gradient,
        lambda *given: (path_gradient(*given)[0], -path_gradient(*given)[1]),
        ["by s", "wrong sign: log q - log p"],
    ),
    "10.5, sign of log p by s": (
        check_path_gradient,
        lambda *given: (
            path_gradient(*given)[0],
            path_gradient(*given, sign_p=1)[1],
        ),
        ["by s", "wrong sign of the slope of log p"],
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_explained(name, capsys):
    check, answer, parts = ANSWERS[name]
    assert not check(answer)
    verdict = capsys.readouterr().out
    for part in parts:
        assert part in verdict


def test_the_right_answers_to_10_3_and_10_5_pass():
    assert check_weights(weigh) and check_path_gradient(path_gradient)
