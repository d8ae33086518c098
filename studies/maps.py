"""Every scalar map in coupling and in autoregressive form, on four toys and two real sets.

Held-out nats, and steps within a fixed time of the processor. Three seeds are trained side by side,
in one process on one thread; a few steps are timed first, and the rest of the time decides how many
follow. So let no more processes run than there are cores.
"""

import time

import torch
from torch.distributions import constraints

from flowcourse.configs_flows import FlowConfig
from flowcourse.monotone_maps import monotone_maps
from flowcourse.spline_maps import spline_maps
from flowcourse.studies import SideBySide
from flowcourse.trainer import fit
from flowcourse.zoo_scalar_maps import scalar_maps

torch.set_num_threads(1)  # what is compared is time on one thread

SEEDS = (0, 1, 2)
SECONDS = 20.0  # of processor time, for three seeds together
TOY = {"batch_size": 256, "hidden": (64, 64)}
REAL = {
    "batch_size": 100,
    "hidden": (128, 128),
    "dropout": 0.2,
    "partition": "random",
}
DATA = {
    "moons": TOY,
    "rings": TOY,
    "checkerboard": TOY,
    "eight-gaussians": TOY,
    "optdigits": REAL,
    "breast-cancer": REAL | {"jitter": 0.2},
}

jobs = [
    {"data": data, "kind": kind, "scalar_map": name}
    for name in ["additive", "affine", *spline_maps, *monotone_maps]
    if scalar_maps[name].domain is constraints.real
    for data in DATA
    for kind in ("coupling", "autoregressive")
]


def run(folder, data, kind, scalar_map, layers=4):
    """Train three seeds of one flow for a fixed time, and judge them on their test rows."""
    config = FlowConfig(
        data=data, kind=kind, scalar_map=scalar_map, layers=layers
    ).replace(lr=3e-3, **DATA[data])
    seeded = [config.replace(seed=seed) for seed in SEEDS]
    objectives = [config.objective() for config in seeded]
    splits = [config.load() for config in seeded]
    train, validation = (
        torch.stack(parts, 1) for parts in zip(*(rows[:2] for rows in splits))
    )

    def train_for(steps):
        together, start = SideBySide(objectives), time.process_time()
        history = fit(
            together,
            train,
            config.recipe,
            validation=validation,
            validate_every=max(steps // 20, 20),
            steps=steps,
            progress=False,
        )
        return together, history, time.process_time() - start

    train_for(2)  # what is done once is not counted
    _, _, timed = train_for(20)
    steps = max(int(20 * SECONDS / timed), 20)
    together, history, took = train_for(steps)
    together.unstack(objectives)
    judged = [
        c.evaluate(o.eval()) for c, o in zip(seeded, objectives, strict=True)
    ]
    return {
        "results": judged,
        "steps": steps,
        "best step": history.best_step,
        "seconds": round(took, 2),
        "parameters": sum(p.numel() for p in objectives[0].parameters()),
    }
