"""What the parts of Glow are worth on the 8 x 8 digits, at equal time.

Every training has 30 seconds of the processor, trials not counted, with new noise in every step. The
affine coupling of the lesson on coupling flows sees vectors; all others see images, and have networks of
the same width. Judged are held-out counts, by the bound with uniform noise.
"""

from dataclasses import replace
from functools import partial

import torch

from flowcourse.conditioners import convnet
from flowcourse.core import Compose, Flow
from flowcourse.coupling import Couplings, RealNVP, channel, checkerboard
from flowcourse.data import bits_per_dim, load, split
from flowcourse.elementwise import Elementwise
from flowcourse.images import (
    ActNorm,
    Dequantisation,
    Glow,
    GlowSteps,
    LogitMap,
    Squeeze,
)
from flowcourse.recipe import Recipe
from flowcourse.studies import fit_for_seconds

torch.set_num_threads(1)  # what is compared is time on one thread

SECONDS = 30.0  # of processor time
LEVELS = 17  # of grey
SHAPE = (1, 8, 8)
SIZES = (1300, 200, 297)  # rows to learn from, to choose by and to judge by
HIDDEN = (32, 32)
DRAWS = 10  # of noise, for each image that is judged
# Found in a few trials of the first seed; all have the same dropout
DROPOUT = 0.1
RECIPES = {
    "vectors": Recipe(batch_size=100, lr=3e-3, schedule="cosine"),
    "images": Recipe(batch_size=100, lr=1e-2, schedule="cosine"),
}


def couplings(shape, partition, layers):
    """Affine couplings with one kind of mask, which takes turns, each before an `ActNorm`."""
    found = []
    chain = Couplings(
        shape,
        layers=layers,
        hidden=HIDDEN,
        partition=partition,
        dropout=DROPOUT,
        conditioner=partial(convnet, kernel=(3, 1, 3)),
    )
    for one in chain.bijections:
        found += [one, ActNorm(shape)]
    return Compose(*found)


def one_size():
    """The steps of Glow without factoring out: all channels go on."""
    return Compose(
        GlowSteps((16, 2, 2), 4, hidden=HIDDEN, dropout=DROPOUT),
        Squeeze(),
        GlowSteps((4, 4, 4), 4, hidden=HIDDEN, dropout=DROPOUT),
        Squeeze(),
    )


GLOW = partial(Glow, SHAPE, 2, 4, hidden=HIDDEN, dropout=DROPOUT)
SQUEEZED = (4, 4, 4)
FAMILIES = {
    "affine coupling": lambda: Compose(
        RealNVP(64, 6, hidden=(128,), dropout=DROPOUT), ActNorm(64)
    ),
    "Glow": GLOW,
    "Glow, fixed permutations": partial(GLOW, mixing="permutation"),
    "Glow, nothing factored out": one_size,
    "checkerboards": lambda: couplings(SHAPE, checkerboard, 8),
    "channels": lambda: Compose(couplings(SQUEEZED, channel, 8), Squeeze()),
    "checkerboards and channels": lambda: Compose(
        couplings(SQUEEZED, channel, 4),
        Squeeze(),
        couplings(SHAPE, checkerboard, 4),
    ),
}

jobs = [
    {"family": family, "seed": seed} for seed in range(3) for family in FAMILIES
]


def run(folder, family, seed):
    """Train one family for the time, and judge it on the test rows."""
    vectors = family == "affine coupling"
    recipe = RECIPES["vectors" if vectors else "images"]
    counts = load("optdigits").x[:, None]
    rows = split(counts, SIZES, seed)
    if vectors:
        rows = [part.flatten(1) for part in rows]
    train, validation, test = rows
    objective, found = fit_for_seconds(
        partial(make, family, seed),
        SECONDS,
        train,
        validation,
        replace(recipe, seed=seed),
    )
    objective.eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nats = torch.stack(
            [objective.log_prob(test, generator=noise) for _ in range(DRAWS)]
        ).mean(0)
    log_p = nats + test[0].numel() * torch.tensor(float(LEVELS)).log()
    results = {
        "test log-probability [nat]": nats.mean().item(),
        "test bits per dimension": bits_per_dim(log_p, test[0].numel(), LEVELS)
        .mean()
        .item(),
    }
    parameters = sum(p.numel() for p in objective.parameters())
    settings = {"seconds": SECONDS, "lr": recipe.lr, "batch size": 100}
    return (
        {"results": results, "settings": settings}
        | found
        | {"parameters": parameters}
    )


def make(family, seed):
    """The objective of a family; the weights follow from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bijection = FAMILIES[family]()
        shape = 64 if family == "affine coupling" else SHAPE
        ends = Elementwise(shape, LogitMap(0.05))
        return Dequantisation(Flow(Compose(bijection, ends)), LEVELS)
