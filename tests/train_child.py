"""Small trainings for `test_training.py`: in its process, in a child to be killed, on two."""

import json
import sys
import time
from pathlib import Path

import torch

from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.training import MaximumLikelihood, Objective, ReverseKL, fit


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
            "saved": run_likelihood(steps=12, checkpoint=folder / "two.pt")[1],
        }
        if torch.distributed.get_rank() == 0:
            counted = {
                name: history.to_dict() for name, history in histories.items()
            }
            counted["processes"] = torch.distributed.get_world_size()
            (folder / "two.json").write_text(json.dumps(counted))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
