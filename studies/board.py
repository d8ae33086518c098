"""Twelve affine couplings and two spline couplings on the chessboard, for 5,000 steps.

The flows, the recipe and the learning rates are those of the lesson on splines, where each flow gets
500 steps. A seed decides the points, the first weights and the order of the rows.
"""

from functools import partial

import torch

from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.objectives import MaximumLikelihood
from flowcourse.splines import NSF
from flowcourse.toy_densities import Checkerboard
from flowcourse.trainer import fit

torch.set_num_threads(1)  # seconds are those of one thread

SEEDS = (0, 1, 2)
RECIPE = {"steps": 5000, "batch_size": 256, "schedule": "cosine"}
RATES = {"twelve affine": 1e-2, "two spline": 2e-2}
FLOWS = {
    "twelve affine": partial(RealNVP, 2, layers=12, hidden=(32, 32)),
    "two spline": partial(NSF, 2, layers=2, hidden=(32, 32), bound=5.0),
}

jobs = [
    {"couplings": couplings, "seed": seed}
    for seed in SEEDS
    for couplings in FLOWS
]


def run(folder, couplings, seed):
    """Train one flow, or go on with it, and judge it on fresh points."""
    board, draws = Checkerboard(), torch.Generator().manual_seed(seed)
    points, fresh = board.sample(8000, draws), board.sample(20_000, draws)
    torch.manual_seed(seed)
    flow = Flow(FLOWS[couplings]())
    history = fit(
        MaximumLikelihood(flow),
        points,
        **RECIPE,
        lr=RATES[couplings],
        seed=seed,
        checkpoint=folder / "checkpoint.pt",
        checkpoint_every=500,
        resume="auto",
        progress=False,
    )
    with torch.no_grad():
        nats = flow.eval().log_prob(fresh).mean().item()
    return {
        "results": {
            "test log-likelihood [nat]": nats,
            "gap to the true density [nat]": -nats - board.entropy,
        },
        "steps": RECIPE["steps"],
        "seconds": round(sum(history.seconds), 2),
        "parameters": sum(p.numel() for p in flow.parameters()),
    }
