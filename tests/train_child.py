"""Small trainings for several test files: in their process, in a child to be killed, on two."""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.elementwise import AffineMap, Elementwise
from flowcourse.objectives import MaximumLikelihood, Objective, ReverseKL
from flowcourse.stochastic import FlowMatching, ScoreMatching, ScoreVelocity
from flowcourse.trainer import fit


def make_flow(**options):
    """A small flow that always starts from the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Flow(RealNVP(2, layers=2, hidden=(16,), **options))


def make_data(n=150):
    """Rows on a bent line, with a context that says where."""
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(n, 1, generator=generator)
    noise = torch.randn(n, 2, generator=generator)
    return torch.cat([context, context.square()], 1) + 0.3 * noise, context


def log_target(x):
    """Two bumps, not normalised."""
    return torch.logsumexp(
        torch.stack([-(x - 1).square().sum(-1), -2 * (x + 1).square().sum(-1)]),
        0,
    )


# all that has state at once: moments, average, schedule, best weights, uneven
# batches
FULL = dict(
    steps=60,
    batch_size=32,
    lr=1e-2,
    schedule="cosine",
    warmup=5,
    clip=1.0,
    ema=0.9,
    validation=0.2,
    validate_every=7,
    progress=False,
)


def run_likelihood(**options):
    """Maximum likelihood with context: the flow and its history."""
    flow = make_flow(context_dim=1)
    return flow, fit(
        MaximumLikelihood(flow), make_data(), **{**FULL, **options}
    )


def run_reverse(**options):
    """Reverse KL, which draws noise: the flow and its history."""
    flow = make_flow()
    options = {
        "steps": 12,
        "batch_size": 33,
        "lr": 1e-2,
        "progress": False,
        **options,
    }
    return flow, fit(ReverseKL(flow, log_target), **options)


def run_weighted(**options):
    """Maximum likelihood of weighted rows, with an uneven last batch: the flow and its history."""
    weights = torch.arange(150) % 4
    options = {"steps": 12, "batch_size": 17, "weights": weights, **options}
    return run_likelihood(**options)


class Blurred(Objective):
    """Maximum likelihood of rows that get fresh noise in each step: it takes data and noise."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def draw(self, n, generator):
        return 0.1 * torch.randn(n, 2, generator=generator)

    def forward(self, batch, noise):
        return -self.flow.log_prob(batch + noise).mean()


def run_blurred(**options):
    """Data and noise together, with an uneven last batch: the flow and its history."""
    flow = make_flow()
    options = {
        "steps": 12,
        "batch_size": 17,
        "validation": 0.1,
        "progress": False,
        **options,
    }
    return flow, fit(Blurred(flow), make_data()[0], **options)


def run_matched(**options):
    """Flow matching with context, of which some is dropped: the flow and its history."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = Flow(Continuous(MLPVelocity(2, hidden=(8,), context_dim=1)))
    options = {"steps": 12, "validate_every": 5, **options}
    objective = FlowMatching(flow, drop=0.2)
    return flow, fit(objective, make_data(), **{**FULL, **options})


def run_scores(**options):
    """Score matching with an uneven last batch: the flow and its history."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        v = ScoreVelocity(2, hidden=(8,))
    flow = Flow(Continuous(v), v.base())
    options = {"steps": 12, "batch_size": 17, "validate_every": 5, **options}
    objective = ScoreMatching(flow, "likelihood")
    return flow, fit(objective, make_data()[0], **{**FULL, **options})


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


def affine():
    return Flow(Elementwise(2, AffineMap()))


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


# four rows, all alike
X = torch.zeros(4, 2)


def main(kind, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    if kind == "slow":  # killed or interrupted from outside
        pause = lambda step, objective, history: time.sleep(
            0.02 if step < 30 else 10
        )
        run_likelihood(
            checkpoint=folder / "run.pt",
            checkpoint_every=10,
            callbacks=(pause,),
        )
    if kind == "processes":
        histories = {
            "likelihood": run_likelihood(steps=12)[1],
            "one row left": run_likelihood(
                steps=12, batch_size=17, validation=None
            )[1],
            "reverse": run_reverse()[1],
            "blurred": run_blurred()[1],
            "weighted": run_weighted()[1],
            "matched": run_matched()[1],
            "scores": run_scores()[1],
            "saved": run_likelihood(steps=12, checkpoint=folder / "two.pt")[1],
        }
        if torch.distributed.get_rank() == 0:
            counted = {
                name: history.to_dict() for name, history in histories.items()
            }
            counted["processes"] = torch.distributed.get_world_size()
            (folder / "two.json").write_text(json.dumps(counted))


if __name__ == "__main__":
    main(*sys.argv[1:])
