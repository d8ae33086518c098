"""Likelihood, scores and flow matching at equal time, on four toys and the digits.

Every training has 20 seconds of the processor, on the digits 40, trials not counted. All velocities are networks of the
same width. Judged are held-out nats, by the differential equation where there is one; how far samples
are from held-out points; how well a classifier tells the two apart; and what samples are worth after a
few steps of Euler. The job "data" judges training rows as if they were samples: no model can hope for
more.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from flowcourse.checkpoint import load_checkpoint, save_checkpoint
from flowcourse.configs_flows import FlowConfig
from flowcourse.continuous import Continuous
from flowcourse.core import Flow
from flowcourse.metrics import classifier_auc, sliced_wasserstein
from flowcourse.recipe import Recipe
from flowcourse.schedules import SDE, VarianceExploding, VariancePreserving
from flowcourse.stochastic import FlowMatching, ScoreMatching, ScoreVelocity
from flowcourse.studies import fit_for_seconds, load_study

of_maps = load_study(str(Path(__file__).with_name("maps.py"))).run.__globals__

SEEDS = of_maps["SEEDS"]
REAL = ("optdigits",)
TOYS = ("moons", "rings", "checkerboard", "eight-gaussians")
# Of the processor
SECONDS = dict.fromkeys(TOYS, 20.0) | dict.fromkeys(REAL, 40.0)
POINTS = dict.fromkeys(TOYS, 10_000) | dict.fromkeys(REAL, 1188)  # to be judged
STEPS = (1, 2, 4, 8, 16, 32)  # of Euler: evaluations of the velocity
TOLERANCE = 1e-5  # of every solve, in training too
LR = 3e-3
# Of velocities that are learned without a solve. On the chessboard's validation
# rows, after 8 seconds, 0.99 was within 0.02 nats of none; 0.999, which averages
# over a thousand steps, was 0.2 nats worse where pairs make steps dear
EMA = 0.99
PAIRED = 256  # validation rows whose pairing is solved: its cost grows fast
# Of the classifier; it keeps the weights that are best on rows it has not seen
CLASSIFIER = Recipe(
    epochs=30,
    batch_size=256,
    lr=3e-3,
    optimizer="adamw",
    weight_decay=1e-2,
    schedule="cosine",
)
FEW = replace(CLASSIFIER, batch_size=64)  # for the digits: some 500 steps
SPLINE = {"scalar_map": "rational-quadratic-spline", "layers": 4}
SCHEDULES = {
    "score, variance preserving": VariancePreserving,
    "score, variance exploding": VarianceExploding,
}
PAIRINGS = {
    "matching, independent": "independent",
    "matching, optimal pairs": "optimal",
}
FAMILIES = ("spline coupling", "likelihood", *PAIRINGS, *SCHEDULES)

jobs = [
    {"data": data, "family": family, "seed": seed}
    for seed in SEEDS
    for data in (*TOYS, *REAL)
    for family in ("data", *FAMILIES)
]


def run(folder, data, family, seed):
    """Train a model of one family for the time of its data set, and judge it."""
    config = FlowConfig(
        data=data,
        kind="coupling" if family == "spline coupling" else "continuous",
        **SPLINE,
    ).replace(
        lr=LR,
        seed=seed,
        ema=EMA if family in (*PAIRINGS, *SCHEDULES) else None,
        **of_maps["DATA"][data],
    )
    rows = config.load()
    noise = torch.Generator().manual_seed(seed)
    if family == "data":
        found = far(rows.train[: POINTS[data]], rows, noise)
        if rows.truth is not None:
            truth = rows.truth.mean().item()
            found |= {"test log-likelihood [nat]": truth}
        return {"results": found, "settings": {"points": POINTS[data]}}
    objective, trained = train(folder, config, family, rows)
    flow = objective.flow
    settings = {
        "seconds": SECONDS[data],
        "hidden": config.hidden,
        "batch size": config.recipe.batch_size,
        "lr": LR,
        "ema": config.recipe.ema,
        "points": POINTS[data],
    }
    if config.kind == "continuous":
        settings["tolerance"] = flow.bijection.tolerance
    if family in SCHEDULES:
        settings["smoothing"] = objective.schedule.smoothing
    found = config.evaluate(objective) | judge(flow, POINTS[data], rows, noise)
    parameters = sum(p.numel() for p in objective.parameters())
    return (
        {"results": found, "settings": settings}
        | trained
        | {"parameters": parameters}
    )


def train(folder, config, family, rows):
    """Train for the time of the data set, unless the job was stopped after that."""
    kept = folder / "trained.pt"
    if kept.exists():
        state = load_checkpoint(kept)
        objective = make(config, family)
        objective.load_state_dict(state["weights"])
        return objective.eval(), state["found"]
    paired = PAIRINGS.get(family) == "optimal"
    objective, found = fit_for_seconds(
        partial(make, config, family),
        SECONDS[config.data],
        rows.train,
        rows.validation[: PAIRED if paired else None],
        config.recipe,
    )
    state = {"weights": objective.state_dict(), "found": found}
    save_checkpoint(kept, state)
    return objective.eval(), found


def make(config, family):
    """The objective of a family; the weights follow from the seed."""
    if family in PAIRINGS:
        flow = config.objective().flow
        return FlowMatching(flow, pairing=PAIRINGS[family])
    if family not in SCHEDULES:
        return config.objective()
    with torch.random.fork_rng():
        torch.manual_seed(config.recipe.seed)
        v = ScoreVelocity(config.dim, SCHEDULES[family](), hidden=config.hidden)
        return ScoreMatching(Flow(Continuous(v, tolerance=TOLERANCE), v.base()))


def judge(flow, n, rows, generator):
    """Samples of a flow against held-out points; of a velocity also those of a few steps."""
    found = far(flow.sample((n,), generator=generator), rows, generator)
    if isinstance(flow.bijection, Continuous):
        found["evaluations of a sample"] = flow.bijection.evaluations
        euler = SDE(flow.bijection.velocity, 0.0)
        with torch.no_grad():
            start = flow.base.sample((n,), generator=generator)
        found["sliced Wasserstein after steps of Euler"] = {
            str(steps): sliced(euler.sample(start, steps), rows)
            for steps in STEPS
        }
    return found


def far(points, rows, generator):
    """How far points are from held-out ones, and whether a classifier tells them apart."""
    told = classifier_auc(
        points,
        rows.test,
        network=with_waves if points.shape[1] == 2 else None,
        recipe=CLASSIFIER if len(rows.test) > 1000 else FEW,
        generator=generator,
    )
    return {
        "sliced Wasserstein": sliced(points, rows),
        "AUC": told.auc,
        "AUC, standard error": told.error,
    }


class Waves(nn.Module):
    """Points and waves along random directions, which show edges and rings to a network at once."""

    def __init__(self, dim, n=128, frequency=6.0):
        super().__init__()
        directions = torch.randn(n, dim) * frequency / dim**0.5
        self.directions = nn.Parameter(directions, requires_grad=False)

    def forward(self, x):
        phase = x @ self.directions.mT
        return torch.cat([x, phase.sin(), phase.cos()], 1)


def with_waves(dim):
    """A classifier of points in the plane; without waves it sees next to nothing of the rings."""
    waves = Waves(dim)
    inputs = dim + 2 * len(waves.directions)
    hidden = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 1))
    return nn.Sequential(waves, hidden)


def sliced(points, rows):
    """The distance in standard deviations of the training rows; along the same directions for all."""
    directions = torch.Generator().manual_seed(0)
    return sliced_wasserstein(points, rows.test, generator=directions).item()
