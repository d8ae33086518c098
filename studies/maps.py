"""Every scalar map in coupling and in autoregressive form, on four toys and two real sets.

Held-out nats, and steps within a fixed time of the processor. Three seeds are trained side by side,
in one process on one thread; a few steps are timed first, and the rest of the time decides how many
follow. So let no more processes run than there are cores.
"""

import copy
from functools import partial

import torch
from torch.distributions import constraints

from flowcourse.configs_flows import FlowConfig
from flowcourse.monotone_maps import monotone_maps
from flowcourse.spline_maps import spline_maps
from flowcourse.studies import SideBySide, fit_for_seconds
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


def run(
    folder,
    data,
    kind,
    scalar_map="affine",
    layers=4,
    seconds=None,
    together=True,
):
    """Train three seeds of one flow for a fixed time, and judge them on their test rows.

    The time is that of all seeds `together`, side by side, or that of each, one after another.
    """
    seconds = SECONDS if seconds is None else seconds
    config = FlowConfig(
        data=data, kind=kind, scalar_map=scalar_map, layers=layers
    ).replace(lr=3e-3, **DATA[data])
    seeded = [config.replace(seed=seed) for seed in SEEDS]
    objectives = [config.objective() for config in seeded]
    splits = [config.load()[:2] for config in seeded]
    recipe = config.recipe
    if together:
        rows = [torch.stack(part, 1) for part in zip(*splits, strict=True)]
        make = partial(SideBySide, objectives)
        trained, found = fit_for_seconds(make, seconds, *rows, recipe)
        trained.unstack(objectives)
    else:
        runs = [
            fit_for_seconds(partial(copy.deepcopy, one), seconds, *rows, recipe)
            for one, rows in zip(objectives, splits, strict=True)
        ]
        objectives = [trained for trained, _ in runs]
        found = {key: [run[key] for _, run in runs] for key in runs[0][1]}
    judged = [
        c.evaluate(o.eval()) for c, o in zip(seeded, objectives, strict=True)
    ]
    parameters = sum(p.numel() for p in objectives[0].parameters())
    return {"results": judged} | found | {"parameters": parameters}
