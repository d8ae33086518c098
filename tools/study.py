#!/usr/bin/env python3
"""Studies of many trainings whose results are recorded in `results/`.

`tools/study.py maps` compares every scalar map in coupling and in autoregressive form on four toys
and two real sets: held-out nats, and steps within a fixed time of the processor. Three seeds are
trained side by side, in one process on one thread; a few steps are timed first, and the rest of the
time decides how many follow. `tools/study.py digits` varies one thing at a time in `spline.digits`.
`tools/study.py dlgm` trains short latent models of MNIST: planar layers with and without parameters
from the image, decoders with and without hidden units, and both binarisations; and planar layers
that see the features of the image at their full size.
`tools/study.py variational` trains flows on energies by reverse KL, all energies and three seeds of
each side by side: planar and additive flows of several lengths, six families for the same time, and
what goes wrong. The density of the first seed is kept as a picture.

Every training is written as a line of `results/NAME.jsonl` as soon as it is done, and a second call
goes on with what is missing. `--shard 0/2` and `--shard 1/2` share the work between two processes.
"""

import argparse
import base64
import copy
import json
import math
import platform
import shlex
import sys
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributions import constraints
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

from flowcourse.autoregressive import IAF
from flowcourse.cli import to_json
from flowcourse.configs import SIZES, DLGMConfig, FlowConfig, configs
from flowcourse.core import DiagonalGaussian, Flow
from flowcourse.coupling import NICE, Couplings, RealNVP
from flowcourse.data import dequantise, load, split, to_logit
from flowcourse.monotone import monotone_maps
from flowcourse.planar import Planar, Radial, Sylvester
from flowcourse.plots import grid_points
from flowcourse.splines import RationalQuadraticSplineMap, spline_maps
from flowcourse.training import Annealing, Objective, TrainingDiverged, fit
from flowcourse.variational import Ridges, assess, energies
from flowcourse.zoo import scalar_maps

SEEDS = (0, 1, 2)
SECONDS = 20.0  # of processor time, for three seeds together
REVERSE_SECONDS = 18.0  # the same for four energies and three seeds together
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
    "autoregressive": {
        "kind": "autoregressive",
        "layers": 4,
        "hidden": (256, 256),
    },
}


# components and noisy copies of a mixture of Gaussians, its ridge tuned
BASELINES = {
    "one Gaussian": (1, 1),
    "mixture of 10": (10, 1),
    "mixture of 10, 20 noisy copies": (10, 20),
}


class SideBySide(Objective):
    """Several objectives of one kind, trained at once: their parameters and rows are stacked."""

    def __init__(
        self,
        # Equal but for the values of their parameters
        objectives: list[Objective],
    ):
        super().__init__()
        self.names = [name for name, _ in objectives[0].named_parameters()]
        stacked, self.fixed = stack_module_state(objectives)
        self.stacked = nn.ParameterList(
            stacked[name].detach() for name in self.names
        )
        # in a list: its parameters are not ours
        self.template = [copy.deepcopy(objectives[0])]

    def train(self, mode=True):
        """Train mode or eval mode, of the stacked objectives too."""
        self.template[0].train(mode)
        return super().train(mode)

    def forward(self, batch, noise=None):
        """The sum of the losses; `batch` has shape `(n, seeds, *event)`."""

        def loss(parameters, fixed, rows):
            return functional_call(
                self.template[0], (parameters, fixed), (rows,)
            )

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
        data=data, kind=kind, scalar_map=scalar_map, layers=4
    ).replace(lr=3e-3, **DATA[data])
    seeded = [config.replace(seed=seed) for seed in SEEDS]
    objectives = [config.objective() for config in seeded]
    splits = [config.load() for config in seeded]
    train, validation = (
        torch.stack(parts, 1) for parts in zip(*(rows[:2] for rows in splits))
    )

    def run(steps):
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

    run(2)  # what is done once is not counted
    _, _, timed = run(20)
    steps = max(int(20 * SECONDS / timed), 20)
    together, history, took = run(steps)
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


def vary(change, seed):
    """Train `spline.digits` with something changed, and judge it on its test rows."""
    config = configs["spline.digits"].replace(seed=seed, **DIGITS[change])
    rows, objective, start = (
        config.load(),
        config.objective(),
        time.process_time(),
    )
    history = fit(
        objective,
        rows.train,
        config.recipe,
        validation=rows.validation,
        progress=False,
    )
    return {
        "results": config.evaluate(objective.eval()),
        "steps": config.recipe.steps,
        "best step": history.best_step,
        "seconds": round(time.process_time() - start, 2),
        "parameters": sum(p.numel() for p in objective.parameters()),
    }


def baseline(change, seed):
    """Fit a mixture of Gaussians as the quick start does, its ridge tuned on the validation rows."""
    from sklearn.mixture import GaussianMixture

    (components, copies), start = BASELINES[change], time.process_time()
    noise = torch.Generator().manual_seed(seed)
    train, *others = split(
        load("optdigits").x.flatten(1), SIZES["optdigits"], seed
    )
    counts = (train.repeat(20, 1), *others)
    made = [to_logit(dequantise(part, generator=noise)) for part in counts]
    train, validation, test = (x.numpy() for x, _ in made)
    fitted = [
        GaussianMixture(components, reg_covar=ridge, random_state=seed).fit(
            train[: len(counts[0]) // 20 * copies]
        )
        for ridge in (
            (0.03, 0.1, 0.2, 0.3, 0.5) if copies == 1 else (0.05, 0.1)
        )
    ]
    best = max(fitted, key=lambda mixture: mixture.score(validation))
    score = best.score(test) + made[-1][1].mean().item()
    seconds = round(time.process_time() - start, 2)
    return {"results": {"test log-likelihood [nat]": score}, "seconds": seconds}


def digits(change, seed):
    """One model of the digits: a baseline, or `spline.digits` with something changed."""
    return (baseline if change in BASELINES else vary)(change, seed)


LATENT = DLGMConfig(judged=1000, trend=0, annealed=0).replace(steps=2500)


def latent(seed, **change):
    """A short training of a latent model, judged on the first test images."""
    config, start = LATENT.replace(seed=seed, **change), time.process_time()
    rows, objective = config.load(), config.objective()
    history = fit(
        objective,
        rows.train,
        config.recipe,
        validation=rows.validation,
        progress=False,
    )
    took = round(time.process_time() - start, 2)
    return {
        "results": config.evaluate(objective.eval()),
        "steps": config.recipe.steps,
        "best step": history.best_step,
        "seconds": took,
        "parameters": sum(p.numel() for p in objective.parameters()),
    }


CLIP = 1.0  # largest gradient norm of each flow
RECIPE = {"steps": 2000, "batch_size": 400, "lr": 2e-2, "schedule": "cosine"}
ANNEALED = 0.3  # share of the steps in which beta rises from 0.01 to 1
# of the comparison at equal time, each about as a user would size it
FAMILIES = {
    "planar": partial(Planar, 2, 16),
    "radial": partial(Radial, 2, 16),
    "Sylvester": partial(Sylvester, 2, length=8),
    "RealNVP": partial(RealNVP, 2, 8, hidden=(32, 32)),
    "spline": partial(
        Couplings,
        2,
        4,
        scalar_map=RationalQuadraticSplineMap(8, 5.0),
        hidden=(32, 32),
    ),
    "IAF": partial(IAF, 2, 6, hidden=(32, 32)),
}
LENGTHS = {"planar": Planar, "NICE": partial(NICE, hidden=(32,))}
PAPER = ("U1", "U2", "U3", "U4")
KINDS = {  # the energies that each flow is trained on
    "lengths": {"planar": tuple(energies), "NICE": PAPER},
    "families": dict.fromkeys(FAMILIES, PAPER),
    "gallery": {"planar": ("U2", "U1-radius-4")},
}
GALLERY = {  # what is changed in the recipe, for 16 planar layers
    "flat wall": {},
    "no annealing": {},
    "large step": {"lr": 0.2},
    "w / |w|": {},
    "flat wall, no annealing": {},
}


class BuggyPlanar(Planar):
    """Planar layers whose correction of u is divided by |w|, not by its square."""

    def margins(self):
        """1 + w'u of each layer, which must be above 0."""
        w, u, _ = self.raw(None).split([2, 2, 1], -1)
        product, size = (w * u).sum(-1), w.norm(dim=-1)
        return (
            1 + product + (nn.functional.softplus(product) - 1 - product) * size
        )

    def _forward(self, z, context):
        w, u, b = self.raw(context).split([2, 2, 1], -1)
        product, size = (
            (w * u).sum(-1, keepdim=True),
            w.norm(dim=-1, keepdim=True),
        )
        u = u + (nn.functional.softplus(product) - 1 - product) * w / size
        ladj = 0.0
        for k in range(self.length):
            h = (z @ w[k] + b[k]).tanh()
            z = z + u[k] * h.unsqueeze(-1)
            # as published
            ladj = ladj + (1 + (1 - h.square()) * (w[k] @ u[k])).abs().log()
        return z, ladj


def flat_wall(energy, z):
    """A floor below the density, and a hard box in place of a wall: the gradient there is zero."""
    inside = (
        z[..., 0].abs() <= (4 if isinstance(energy, Ridges) else math.inf)
    ).to(z)
    return (1e-7 + inside * energy.log_density(z).exp()).log()


def apart(bijection):
    """The bijection, the hidden units of which do not all bend space at the origin."""
    raw = (
        bijection.raw.value.data
        if isinstance(bijection, (Planar, Sylvester))
        else None
    )
    if isinstance(bijection, Planar):
        raw[:, -1].normal_()
    elif raw is not None:
        raw.split(bijection.sizes, -1)[2].normal_()
    return bijection


def clipped_adam(params, lr, weight_decay):
    """Adam, on gradients clipped for each of the stacked flows by itself."""

    def clip(optimizer, *_):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        norms = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
        for g in gradients:
            g.mul_(
                (CLIP / (norms + 1e-6))
                .clamp(max=1)
                .view(-1, *[1] * (g.dim() - 1))
            )

    optimizer = torch.optim.Adam(
        params, lr, weight_decay=weight_decay, fused=True
    )
    optimizer.register_step_pre_hook(clip)
    return optimizer


class Draws(nn.Module):
    """A flow, asked for draws and their log-density."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, noise):
        """Points and log q."""
        return self.flow.rsample_and_log_prob(noise=noise)


class ReverseSideBySide(SideBySide):
    """Reverse KL of several flows at once, as many for each target, the targets annealed."""

    def __init__(
        self,
        flows: list[Flow],  # Equal but for the values of their parameters
        # Each from `x` to log p up to a constant, for as many flows in turn
        log_targets: list,
        annealing: Annealing | None,  # The weight of log p
    ):
        super().__init__([Draws(flow) for flow in flows])
        self.log_targets, self.annealing, self.n = (
            log_targets,
            annealing,
            len(flows),
        )

    def draw(self, n, generator):
        """Noise of all flows, shape `(n, flows, 2)`."""
        return torch.randn(n, self.n, 2, generator=generator)

    def forward(self, batch, noise):
        """The sum of the losses."""

        def draws(parameters, fixed, noise):
            return functional_call(
                self.template[0], (parameters, fixed), (noise,)
            )

        parameters = dict(zip(self.names, self.stacked, strict=True))
        x, log_q = vmap(draws, in_dims=(0, 0, 1))(parameters, self.fixed, noise)
        shares = x.chunk(len(self.log_targets))
        log_p = torch.cat(
            [f(part) for f, part in zip(self.log_targets, shares, strict=True)]
        )
        weight = 1.0 if self.annealing is None else self.annealing()
        return (log_q - weight * log_p).mean(-1).sum()


def picture(flow, window, bins=100):
    """The density on a square around the origin: bytes as text, and the value of byte 255."""
    with torch.no_grad():
        density = flow.log_prob(
            grid_points(-window, window, bins).reshape(-1, 2)
        ).exp()
    top = density.max()
    pixels = zlib.compress(
        (255 * density / top).round().to(torch.uint8).numpy().tobytes(), 9
    )
    return {
        "bins": bins,
        "top": top.item(),
        "pixels": base64.b64encode(pixels).decode(),
    }


def judge(flow, energy, seed):
    """The true KL of a trained flow, and what else may have gone wrong."""
    noise = torch.Generator().manual_seed(seed)
    found = asdict(assess(flow, energy.log_prob, 200_000, generator=noise))
    x = flow.sample(20_000, generator=noise)
    found["beyond the walls"] = (x[:, 0].abs() > 4).double().mean().item()
    if isinstance(flow.bijection, BuggyPlanar):
        found["folded layers"] = int((flow.bijection.margins() <= 0).sum())
    return found


def variational(kind, family="planar", length=16, change=None):
    """Train three seeds of a flow on each of several energies by reverse KL."""
    targets = KINDS[kind][family]
    if kind == "families":
        make = FAMILIES[family]
    else:
        maker = BuggyPlanar if change == "w / |w|" else LENGTHS[family]
        make = partial(maker, 2, length)
    flows = []
    for seed in SEEDS * len(targets):
        torch.manual_seed(seed)
        flows.append(Flow(apart(make()), DiagonalGaussian(2, scale=2.0)))
    log_targets = [energies[target].log_density for target in targets]
    changes = (change or "").split(", ")
    if "flat wall" in changes:
        log_targets = [
            partial(flat_wall, energies[target]) for target in targets
        ]

    def run(steps):
        rising = (
            None
            if "no annealing" in changes
            else Annealing(0.01, round(ANNEALED * steps))
        )
        together = ReverseSideBySide(flows, log_targets, rising)
        recipe = RECIPE | GALLERY.get(change, {}) | {"steps": steps}
        start = time.process_time()
        fit(together, **recipe, optimizer=clipped_adam, progress=False)
        return together, time.process_time() - start

    steps = RECIPE["steps"]
    if kind == "families":
        run(2)  # what is done once is not counted
        steps = max(int(20 * REVERSE_SECONDS / run(20)[1]), 20)
    together, took = run(steps)
    together.unstack([Draws(flow) for flow in flows])
    found, pictures = {}, {}
    for i, target in enumerate(targets):
        own = flows[len(SEEDS) * i : len(SEEDS) * (i + 1)]
        found[target] = [
            judge(f, energies[target], s)
            for s, f in zip(SEEDS, own, strict=True)
        ]
        if not isinstance(own[0].bijection, BuggyPlanar):
            pictures[target] = picture(own[0], energies[target].window)
    return {
        "results": found,
        "steps": steps,
        "seconds": round(took, 2),
        "parameters": sum(p.numel() for p in flows[0].parameters()),
        "pictures": pictures,
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
        [
            {"change": name, "seed": seed}
            for seed in SEEDS
            for name in [*BASELINES, *DIGITS]
        ],
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
        ]
        + [
            {
                "seed": seed,
                "data": "mnist",
                "decoder": "maxout",
                "posterior": "planar",
            }
            | {"length": 10, "amortised": True, "context_scale": 1.0}
            for seed in SEEDS
        ],
    ),
    "variational": (
        variational,
        [
            {"kind": "lengths", "family": family, "length": length}
            for family, lengths in {
                "planar": (2, 4, 8, 16, 32),
                "NICE": (2, 8, 32),
            }.items()
            for length in lengths
        ]
        + [{"kind": "gallery", "change": change} for change in GALLERY]
        + [{"kind": "families", "family": family} for family in FAMILIES],
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
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument(
        "--shard", default="0/1", help="this process's part of the work"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, options.shard.split("/"))
    train, jobs = STUDIES[options.study]
    path = (
        Path(__file__).resolve().parents[1]
        / "results"
        / f"{options.study}.jsonl"
    )
    path.parent.mkdir(exist_ok=True)
    done = recorded(path)
    bar = tqdm(
        [job for job in jobs[part::parts] if job not in done], unit="training"
    )
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
                "command": shlex.join(
                    ["python", "tools/study.py", options.study]
                ),
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
            }
        )
        # one write, so that two processes may share the file
        with path.open("a") as file:
            file.write(to_json(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
