"""Flows of particle showers: representations, forms of the flow, and other families at equal time.

The data are the stand-in of `flowcourse.showers`, the conditioners a fifth as wide as in the original.
A job of many steps keeps a trace of the training, the profile of what is drawn, distances for each range
of energies, and the verdict of two classifiers: one that can learn, and the deep and narrow one of the
original. "truth" is a second sample of the stand-in, "gaussian" a Gaussian whose mean is a cubic of ln E:
the best and the least to hope for. "speed" is best run on an idle machine.
"""

import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from flowcourse.configs_shower import (
    ShowerConfig,
    ShowerLikelihood,
    distances,
    from_rows,
    to_rows,
)
from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Flow
from flowcourse.metrics import classifier_auc
from flowcourse.objectives import Objective
from flowcourse.recipe import Recipe
from flowcourse.shower_features import SETS, features, from_features
from flowcourse.showers import make_showers
from flowcourse.stochastic import FlowMatching
from flowcourse.studies import fit_for_seconds
from flowcourse.trainer import fit

SEEDS = (0, 1, 2)
STEPS = 2400
EARLY = 700  # steps in which the gradient norm grows most
SECONDS = 140.0  # of the processor, for families at equal time
KINDS = ("max-normed", "fnorms", "softplus", "log")
BLOCKS = (1, 2, 4, 8)
BATCHES = (1, 10, 100, 1000, 10_000)  # showers drawn at once
ENDS = (10.0, 30.0, 50.0, 70.0, 90.0)  # of ranges of energy, in GeV
USED = torch.tensor(SETS[62])
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# Of the classifiers; both keep the weights that are best on rows they have not
# learned from
ABLE = Recipe(
    epochs=40,
    batch_size=256,
    lr=1e-3,
    optimizer="adamw",
    weight_decay=1e-2,
    schedule="cosine",
)
NARROW = Recipe(epochs=10, batch_size=32, lr=1e-4)


def flow_job(seed, steps, version, blocks, kind, base=False):
    """A job that trains ShowerFlow."""
    return {
        "model": "ShowerFlow",
        "version": version,
        "blocks": blocks,
        "representation": kind,
        "trained base": base,
        "steps": steps,
        "seed": seed,
    }


jobs = [
    {"model": name, "seed": s} for s in SEEDS for name in ("truth", "gaussian")
]
jobs += [flow_job(s, STEPS, "alt1", 1, kind) for s in SEEDS for kind in KINDS]
jobs += [
    {"model": family, "seconds": SECONDS, "seed": seed}
    for seed in SEEDS
    for family in ("affine coupling", "spline coupling", "flow matching")
]
jobs.append({"model": "speed", "seed": 0})


def run(folder, model, seed, **rest):
    """Train a model, if there is something to train, and judge what it draws."""
    noise = torch.Generator().manual_seed(seed)
    if model == "truth":
        test = from_rows(ShowerConfig().load().test)
        return {"results": judge(fresh(test.energy, seed), test, noise)}
    if model == "gaussian":
        splits = ShowerConfig().load()
        drawn = gaussian(splits.train, splits.test[:, 0], noise)
        return {"results": judge(drawn, from_rows(splits.test), noise)}
    if model == "speed":
        return {"results": {"showers a second": speeds_of_blocks(noise)}}
    if model == "ShowerFlow":
        return train(folder, seed, noise, **rest)
    return for_a_time(model, seed, noise, **rest)


def train(folder, seed, noise, **rest):
    """ShowerFlow for so many steps."""
    config = ShowerConfig(
        version=rest["version"],
        num_blocks=rest["blocks"],
        representation=rest["representation"],
        train_base=rest["trained base"],
    ).replace(seed=seed, steps=rest["steps"])
    whole = config.recipe.steps >= STEPS
    splits, objective = config.load(), config.objective()
    test = from_rows(splits.test)
    history = fit(
        objective,
        splits.train,
        config.recipe,
        validation=splits.validation,
        checkpoint=folder / "checkpoint.pt",
        checkpoint_every=config.checkpoint_every,
        resume="auto",
        callbacks=(config.watch, partial(look, test))
        if whole
        else (config.watch,),
        progress=False,
    )
    found = config.evaluate(objective.eval())
    if whole:
        drawn = draw(objective, test.energy, noise)
        found |= judge(drawn, test, noise)
    found["medians of fifths"] = fifths(history, config.recipe.steps)
    if whole:
        found[f"medians of fifths of {EARLY}"] = fifths(history, EARLY)
        found["trace"] = trace(history)
    return {
        "results": found,
        "settings": {"width": config.width, "rows": config.rows}
        | {"batch size": config.recipe.batch_size, "lr": config.recipe.lr},
        "steps": config.recipe.steps,
        "best step": history.best_step,
        "seconds": round(sum(history.seconds), 2),
        "parameters": sum(p.numel() for p in objective.parameters()),
    }


def for_a_time(model, seed, noise, seconds):
    """A family for so many seconds, on the inverse softplus of dequantised numbers."""
    version = "spline" if model == "spline coupling" else "alt1"
    config = ShowerConfig(
        version=version, num_blocks=1, representation="softplus"
    ).replace(seed=seed)
    splits, make = config.load(), config.objective
    if model == "flow matching":
        make = partial(matching, config)
    objective, trained = fit_for_seconds(
        make, seconds, splits.train, splits.validation, config.recipe
    )
    test = from_rows(splits.test)
    drawn = draw(objective.eval(), test.energy, noise)
    parameters = sum(p.numel() for p in objective.parameters())
    found = judge(drawn, test, noise)
    found["showers a second"] = speeds(objective.sample, noise, (1000,))
    return {"results": found} | trained | {"parameters": parameters}


class ShowerMatching(Objective):
    """Flow matching of the points of showers, given the energy."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood = likelihood
        self.matching = FlowMatching(likelihood.flow)

    def draw(self, n, generator):
        """The noise that dequantises, and that of the paths."""
        return (
            self.likelihood.draw(n, generator),
            self.matching.draw(n, generator),
        )

    def losses(self, batch, noise):
        """Squared distance of velocities."""
        single, paths = noise
        representation = self.likelihood.representation
        points = representation.encode(from_rows(batch), single)
        context = representation.context(batch[:, 0])
        return self.matching.losses((points, context), paths)

    def sample(self, energy, generator=None):
        """Draw showers of given photons."""
        return self.likelihood.sample(energy, generator)


def speeds(sample, generator, batches):
    """Showers a second that a model draws, by the number drawn at once: medians of five."""
    found = {}
    for batch in batches:
        energy = torch.linspace(*ENDS[:: len(ENDS) - 1], batch)
        sample(energy, generator)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            sample(energy, generator)
            times.append(time.perf_counter() - start)
        found[str(batch)] = float(f"{batch / sorted(times)[2]:.4g}")
    return found


def speeds_of_blocks(generator):
    """How fast a flow of some blocks draws, with one thread; its weights do not matter."""
    found = {}
    for blocks in BLOCKS:
        config = ShowerConfig(num_blocks=blocks, representation="softplus")
        objective = config.objective().eval()
        found[str(blocks)] = speeds(objective.sample, generator, BATCHES)
    return found


def matching(config):
    """Flow matching on the representation of a config; weights follow from the seed."""
    representation = config.objective().representation
    with torch.random.fork_rng():
        torch.manual_seed(config.recipe.seed)
        velocity = MLPVelocity(config.dim, hidden=(512, 512), context_dim=1)
        flow = Flow(Continuous(velocity))
    return ShowerMatching(ShowerLikelihood(flow, representation))


def fresh(energy, seed):
    """A second sample of the stand-in, for the same photons."""
    # the data have seeds 0 to 2
    generator = torch.Generator().manual_seed(100 + seed)
    return make_showers(len(energy), energy=energy, generator=generator)


def gaussian(train, energy, generator):
    """A Gaussian of 62 features, given the energy: means are cubics of ln E."""
    x = features(from_rows(train))[:, USED].double()
    powers = torch.arange(4)
    basis = train[:, :1].double().log() ** powers
    weights = torch.linalg.lstsq(basis, x).solution
    rest = x - basis @ weights
    noise = torch.randn(len(energy), x.shape[1], generator=generator).double()
    root = torch.linalg.cholesky(rest.T.cov())
    drawn = energy[:, None].double().log() ** powers @ weights + noise @ root.T
    whole = drawn.new_zeros(len(drawn), len(USED))
    whole[:, USED] = drawn
    made = from_features(energy, whole.to(train))
    return replace(
        made,
        clusters=made.clusters.round().clamp(min=0),
        deposits=made.deposits.clamp(min=0),
    )


def draw(objective, energy, generator):
    """Showers of given photons, in pieces."""
    parts = [objective.sample(e, generator) for e in energy.split(1000)]
    return from_rows(torch.cat([to_rows(part) for part in parts]))


def judge(drawn, test, generator):
    """Distances, for each range of energies too, classifiers, profiles."""
    found = distances(drawn, test, generator)
    of_ranges = {}
    for low, high in zip(ENDS, ENDS[1:]):
        within = (test.energy >= low) & (test.energy < high)
        of_ranges[f"{low:g} to {high:g} GeV"] = distances(
            drawn[within], test[within], generator
        )
    rows, truth = (
        torch.cat([s.energy[:, None], features(s)[:, USED]], -1)
        for s in (drawn, test)
    )
    finite = rows.isfinite().all(-1)
    told = partial(classifier_auc, generator=generator)
    able = told(rows[finite], truth, recipe=ABLE)
    deep = told(rows[finite], truth, recipe=NARROW, network=narrow)
    return found | {
        "of energies": of_ranges,
        "AUC": able.auc,
        "AUC, standard error": able.error,
        "calibration": {
            "error": able.ece,
            "of noise": able.ece_noise,
            "log-loss": able.log_loss,
            "of chance": able.chance,
            "predicted": rounded(able.predicted),
            "observed": rounded(able.observed),
            "rows": able.counts.tolist(),
        },
        "AUC of ten layers of 20": deep.auc,
        "the same, log-loss": deep.log_loss,
        "profile": profile(drawn),
        "profile of the test": profile(test),
    }


def narrow(dim):
    """The original's classifier: ten hidden layers of twenty units."""
    layers = [nn.Linear(dim, 20), nn.ReLU()]
    for _ in range(9):
        layers += [nn.Linear(20, 20), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(20, 1))


def profile(showers):
    """Mean and quantiles of every layer."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return {
        name: {
            "mean": rounded(part.double().mean(0)),
            "quantiles": [
                rounded(q) for q in part.double().quantile(levels, 0)
            ],
        }
        for name, part in (
            ("clusters", showers.clusters),
            ("energy", showers.deposits),
            ("cog", showers.cog),
        )
    }


def rounded(x):
    """Numbers of four digits."""
    return [float(f"{value:.4g}") for value in x.tolist()]


def look(test, step, objective, history, every=100):
    """Draw some showers now and then, and keep how far they are from the truth."""
    if step % every:
        return
    n = 2000
    generator = torch.Generator().manual_seed(step)
    objective.eval()
    drawn = draw(objective, test.energy[:n], generator)
    objective.train()
    far = distances(drawn, test[:n], generator)
    x = drawn.cog[:, 0].double()
    for name, value in (
        ("step", step),
        (
            "sliced Wasserstein distance [sd]",
            far["sliced Wasserstein distance [sd]"],
        ),
        ("sd of cog x [mm]", x.std().item()),
        ("largest cog x [mm]", (x - x.mean()).abs().max().item()),
    ):
        history.tracked.setdefault(f"seen: {name}", []).append(value)


def fifths(history, steps):
    """Medians of loss and gradient norm in successive fifths of the first steps."""
    return {
        name: rounded(
            torch.tensor(values[:steps]).view(5, -1).median(-1).values
        )
        for name, values in (
            ("loss", history.loss),
            ("gradient norm", history.gradient_norm),
        )
    }


def trace(history, windows=60):
    """Medians over short stretches of a training, and what was looked at now and then."""
    series = {"loss": history.loss, "gradient norm": history.gradient_norm}
    seen = {}
    for name, values in history.tracked.items():
        if name.startswith("seen: "):
            seen[name.removeprefix("seen: ")] = rounded(torch.tensor(values))
        else:
            series[name] = values
    return {
        "stretch": len(history) // windows,
        "series": {
            name: rounded(torch.tensor(v).view(windows, -1).median(-1).values)
            for name, v in series.items()
        },
        "seen": seen,
        "validation": {
            "step": list(history.validation_step),
            "loss": rounded(torch.tensor(history.validation_loss)),
        },
    }
