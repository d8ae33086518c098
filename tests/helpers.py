"""What several test files do to a bijection before they test it."""

import torch


def noise(*shape, seed=0):
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def shaken(f, sd=1.0, seed=0):
    """The map with noise on its parameters, each with its own."""
    with torch.no_grad():
        for i, p in enumerate(f.parameters()):
            p.add_(sd * noise(*p.shape, seed=seed + i).to(p))
    return f
