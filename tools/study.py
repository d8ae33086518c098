#!/usr/bin/env python3
"""Studies of many trainings whose results are recorded in `results/`.

`tools/study.py maps` compares every scalar map in coupling and in autoregressive form on four toys
and two real sets: held-out nats, and steps within a fixed time of the processor. Three seeds are
trained side by side, in one process on one thread; a few steps are timed first, and the rest of the
time decides how many follow. `tools/study.py digits` varies one thing at a time in `spline.digits`.
`tools/study.py dlgm` trains short latent models of MNIST: planar layers with and without parameters
from the image, decoders with and without hidden units, and both binarisations.

Every training is written as a line of `results/NAME.jsonl` as soon as it is done, and a second call
goes on with what is missing. `--shard 0/2` and `--shard 1/2` share the work between two processes.
"""

import argparse
import copy
import json
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributions import constraints
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

from flowcourse.configs import SIZES, DLGMConfig, FlowConfig, configs
from flowcourse.data import dequantise, load, split, to_logit
from flowcourse.monotone import monotone_maps
from flowcourse.splines import spline_maps
from flowcourse.training import Objective, TrainingDiverged, fit
from flowcourse.zoo import scalar_maps

SEEDS = (0, 1, 2)
SECONDS = 20.0  # of processor time, for each training of `maps`
TOY = {"batch_size": 256, "hidden": (64, 64)}
REAL = {"batch_size": 100, "hidden": (128, 128), "dropout": 0.2, "partition": "random"}
DATA = {
    "moons": TOY,
    "rings": TOY,
    "checkerboard": TOY,
    "eight-gaussians": TOY,
    "optdigits": REAL,
    "breast-cancer": REAL | {"jitter": 0.2},
}
DIGITS = {  # what is changed in `spline.digits`
    "as it is": {},
    "affine map": {"scalar_map": "affine"},
    "alternating partition": {"partition": "alternating"},
    "half partition": {"partition": "half"},
    "no dropout": {"dropout": 0.0},
    "dropout 0.4": {"dropout": 0.4},
    "one noisy copy": {"copies": 1},
    "four layers": {"layers": 4},
    "twice the steps": {"steps": 1600},
    "twice the width": {"hidden": (256, 256)},
    "autoregressive": {"kind": "autoregressive", "layers": 4, "hidden": (256, 256)},
}


BASELINES = {  # components and noisy copies of a mixture of Gaussians, its ridge tuned
    "one Gaussian": (1, 1),
    "mixture of 10": (10, 1),
    "mixture of 10, 20 noisy copies": (10, 20),
}


class SideBySide(Objective):
    """Several objectives of one kind, trained at once: their parameters and rows are stacked."""

    def __init__(
        self,
        objectives: list[Objective],  # Equal but for the values of their parameters
    ):
        super().__init__()
        self.names = [name for name, _ in objectives[0].named_parameters()]
        stacked, self.fixed = stack_module_state(objectives)
        self.stacked = nn.ParameterList(stacked[name].detach() for name in self.names)
        self.template = [copy.deepcopy(objectives[0])]  # in a list: its parameters are not ours

    def train(self, mode=True):
        """Train mode or eval mode, of the stacked objectives too."""
        self.template[0].train(mode)
        return super().train(mode)

    def forward(self, batch, noise=None):
        """The sum of the losses; `batch` has shape `(n, seeds, *event)`."""

        def loss(parameters, fixed, rows):
            return functional_call(self.template[0], (parameters, fixed), (rows,))

        parameters = dict(zip(self.names, self.stacked, strict=True))
        over_seeds = vmap(loss, in_dims=(0, 0, 1), randomness="different")
        return over_seeds(parameters, self.fixed, batch).sum()

    @torch.no_grad()
    def unstack(self, objectives):
        """Put the trained parameters back."""
        for i, objective in enumerate(objectives):
            for name, p in zip(self.names, self.stacked, strict=True):
                objective.get_parameter(name).copy_(p[i])


def compare(data, kind, scalar_map):
    """Train three seeds of one flow for a fixed time, and judge them on their test rows."""
    config = FlowConfig(
        data=data, kind=kind, scalar_map=scalar_map, layers=4, lr=3e-3, **DATA[data]
    )
    seeded = [replace(config, seed=seed) for seed in SEEDS]
    objectives = [config.objective() for config in seeded]
    splits = [config.load() for config in seeded]
    train, validation = (torch.stack(parts, 1) for parts in zip(*(rows[:2] for rows in splits)))

    def run(steps):
        together, start = SideBySide(objectives), time.process_time()
        history = fit(
            together,
            train,
            validation=validation,
            validate_every=max(steps // 20, 20),
            steps=steps,
            batch_size=config.batch_size,
            lr=config.lr,
            schedule="cosine",
            progress=False,
        )
        return together, history, time.process_time() - start

    run(2)  # what is done once is not counted
    _, _, timed = run(20)
    steps = max(int(20 * SECONDS / timed), 20)
    together, history, took = run(steps)
    together.unstack(objectives)
    judged = [c.evaluate(o.eval()) for c, o in zip(seeded, objectives, strict=True)]
    return {
        "results": judged,
        "steps": steps,
        "best step": history.best_step,
        "seconds": round(took, 2),
        "parameters": sum(p.numel() for p in objectives[0].parameters()),
    }


def vary(change, seed):
    """Train `spline.digits` with something changed, and judge it on its test rows."""
    config = replace(configs["spline.digits"], seed=seed, **DIGITS[change])
    rows, objective, start = config.load(), config.objective(), time.process_time()
    history = fit(
        objective, rows.train, validation=rows.validation, **config.training, progress=False
    )
    return {
        "results": config.evaluate(objective.eval()),
        "steps": config.steps,
        "best step": history.best_step,
        "seconds": round(time.process_time() - start, 2),
        "parameters": sum(p.numel() for p in objective.parameters()),
    }


def baseline(change, seed):
    """Fit a mixture of Gaussians as the quick start does, its ridge tuned on the validation rows."""
    from sklearn.mixture import GaussianMixture

    (components, copies), start = BASELINES[change], time.process_time()
    noise = torch.Generator().manual_seed(seed)
    train, *others = split(load("optdigits").x.flatten(1), SIZES["optdigits"], seed)
    counts = (train.repeat(20, 1), *others)
    made = [to_logit(dequantise(part, generator=noise)) for part in counts]
    train, validation, test = (x.numpy() for x, _ in made)
    fitted = [
        GaussianMixture(components, reg_covar=ridge, random_state=seed).fit(
            train[: len(counts[0]) // 20 * copies]
        )
        for ridge in ((0.03, 0.1, 0.2, 0.3, 0.5) if copies == 1 else (0.05, 0.1))
    ]
    best = max(fitted, key=lambda mixture: mixture.score(validation))
    score = best.score(test) + made[-1][1].mean().item()
    seconds = round(time.process_time() - start, 2)
    return {"results": {"test log-likelihood [nat]": score}, "seconds": seconds}


def digits(change, seed):
    """One model of the digits: a baseline, or `spline.digits` with something changed."""
    return (baseline if change in BASELINES else vary)(change, seed)


LATENT = DLGMConfig(steps=4000, annealing=1000, judged=2000, trend=0, annealed=0)


def latent(seed, **change):
    """A short training of a latent model, judged on the first test images."""
    config, start = replace(LATENT, seed=seed, **change), time.process_time()
    rows, objective = config.load(), config.objective()
    history = fit(
        objective, rows.train, validation=rows.validation, **config.training, progress=False
    )
    took = round(time.process_time() - start, 2)
    return {
        "results": config.evaluate(objective.eval()),
        "steps": config.steps,
        "best step": history.best_step,
        "seconds": took,
        "parameters": sum(p.numel() for p in objective.parameters()),
    }


STUDIES = {
    "maps": (
        compare,
        [
            {"data": data, "kind": kind, "scalar_map": name}
            for name in ["additive", "affine", *spline_maps, *monotone_maps]
            if scalar_maps[name].domain is constraints.real
            for data in DATA
            for kind in ("coupling", "autoregressive")
        ],
    ),
    "digits": (
        digits,
        [{"change": name, "seed": seed} for seed in SEEDS for name in [*BASELINES, *DIGITS]],
    ),
    "dlgm": (
        latent,
        [
            {"seed": seed, "data": data, "decoder": decoder} | posterior
            for seed in SEEDS
            for data, decoder in (
                ("mnist", "maxout"),
                ("mnist", "linear"),
                ("mnist-threshold", "maxout"),
            )
            for posterior in (
                {"posterior": "gaussian", "length": 0},
                {"posterior": "planar", "length": 10, "amortised": True},
                {"posterior": "planar", "length": 10, "amortised": False},
            )
        ],
    ),
}


def recorded(path):
    """The jobs that are recorded already."""
    if not path.exists():
        return []
    return [json.loads(line)["job"] for line in path.read_text().splitlines()]


def main():
    """Train what is missing and record it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--shard", default="0/1", help="this process's part of the work")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, options.shard.split("/"))
    train, jobs = STUDIES[options.study]
    path = Path(__file__).resolve().parents[1] / "results" / f"{options.study}.jsonl"
    path.parent.mkdir(exist_ok=True)
    done = recorded(path)
    bar = tqdm([job for job in jobs[part::parts] if job not in done], unit="training")
    for job in bar:
        bar.set_postfix_str(" ".join(map(str, job.values())))
        try:
            found = train(**job)
        except TrainingDiverged as error:
            found = {"diverged": str(error)}
        found = (
            {"job": job}
            | found
            | {
                "command": shlex.join(["python", "tools/study.py", options.study]),
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
            }
        )
        with path.open("a") as file:  # one write, so that two processes may share the file
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
