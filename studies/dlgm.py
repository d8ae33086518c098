"""Short latent models of MNIST: which part of the model makes the difference?

Planar layers with and without parameters from the image, decoders with and without hidden units,
and both binarisations; and planar layers that see the features of the image at their full size.
Three seeds of each, judged on the first test images. One training takes about a minute.
"""

import torch

from flowcourse.configs_dlgm import DLGMConfig
from flowcourse.studies import train_and_judge

torch.set_num_threads(1)  # small models; start several processes instead

CONFIG = DLGMConfig(judged=1000, trend=0, annealed=0).replace(steps=2500)
PLANAR = {"posterior": "planar", "length": 10}
POSTERIORS = (
    {"posterior": "gaussian", "length": 0},
    PLANAR | {"amortised": True},
    PLANAR | {"amortised": False},
)
MODELS = (
    {"data": "mnist", "decoder": "maxout"},
    {"data": "mnist", "decoder": "linear"},
    {"data": "mnist-threshold", "decoder": "maxout"},
)
FULL_SIZE = MODELS[0] | PLANAR | {"amortised": True, "context_scale": 1.0}

jobs = [
    {"seed": seed} | model | posterior
    for seed in range(3)
    for model in MODELS
    for posterior in POSTERIORS
] + [{"seed": seed} | FULL_SIZE for seed in range(3)]


def run(folder, **change):
    """Train a short latent model with something changed."""
    return train_and_judge(CONFIG.replace(**change), folder)
