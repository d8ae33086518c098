"""The experiment `spline.digits` and its baselines, one thing changed at a time.

Three seeds of each. One training takes about a minute.
"""

import time

import torch

from flowcourse.configs import configs
from flowcourse.configs_flows import SIZES
from flowcourse.data import dequantise, load, split, to_logit
from flowcourse.studies import train_and_judge

torch.set_num_threads(1)  # small models; start several processes instead

CHANGES = {  # in `spline.digits`
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
CONFIG = configs["spline.digits"]

jobs = [
    {"change": change, "seed": seed}
    for seed in range(3)
    for change in [*BASELINES, *CHANGES]
]


def run(folder, change, seed):
    """One model of the digits: a baseline, or `spline.digits` with something changed."""
    if change in BASELINES:
        return baseline(*BASELINES[change], seed)
    return train_and_judge(CONFIG.replace(seed=seed, **CHANGES[change]), folder)


def baseline(components, copies, seed):
    """Fit a mixture of Gaussians as the quick start does, its ridge tuned on the validation rows."""
    from sklearn.mixture import GaussianMixture

    start = time.process_time()
    noise = torch.Generator().manual_seed(seed)
    train, *others = split(
        load("optdigits").x.flatten(1), SIZES["optdigits"], seed
    )
    counts = (train.repeat(20, 1), *others)
    made = [to_logit(dequantise(part, generator=noise)) for part in counts]
    train, validation, test = (x.numpy() for x, _ in made)
    ridges = (0.03, 0.1, 0.2, 0.3, 0.5) if copies == 1 else (0.05, 0.1)
    fitted = [
        GaussianMixture(components, reg_covar=ridge, random_state=seed).fit(
            train[: len(counts[0]) // 20 * copies]
        )
        for ridge in ridges
    ]
    best = max(fitted, key=lambda mixture: mixture.score(validation))
    score = best.score(test) + made[-1][1].mean().item()
    seconds = round(time.process_time() - start, 2)
    return {"results": {"test log-likelihood [nat]": score}, "seconds": seconds}
