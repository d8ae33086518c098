"""Autoregressive layers that several test files share."""

import copy

import torch
from helpers import shaken

from flowcourse.autoregressive import Autoregressive
from flowcourse.elementwise import AffineMap


def shuffled(dim, seed=0):
    """An order of coordinates."""
    return torch.randperm(dim, generator=torch.Generator().manual_seed(seed))


def perturbed(f, scale=0.3, seed=0):
    """The map in float64, with noise on its parameters."""
    return shaken(f.double(), scale, seed)


def sample_by(f, way, tolerance=None):
    """A copy of a map whose autoregressive layers sample in another way."""
    f = copy.deepcopy(f)
    for layer in f.modules():
        if isinstance(layer, Autoregressive):
            layer.sampling, layer.tolerance = way, tolerance
    return f


def one_layer(
    dim=5, context_dim=0, scalar_map=AffineMap(), seed=0, scale=0.3, **options
):
    """One layer in a random order, with noise on its parameters."""
    torch.manual_seed(seed)
    options.setdefault("order", shuffled(dim, seed))
    options.setdefault("hidden", (16, 12))
    f = Autoregressive(dim, scalar_map, context_dim=context_dim, **options)
    return perturbed(f, scale, seed)
