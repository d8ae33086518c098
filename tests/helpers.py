"""Maps, distributions and showers that several test files make, and what they do to a bijection before they test it."""

import math

import torch
import torch.distributions as D

from flowcourse.core import Bijection
from flowcourse.elementwise import AffineMap, Elementwise
from flowcourse.showers import Showers


def noise(*shape, seed=0):
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def showers_by_hand(n=500, seed=0, dtype=torch.float64):
    """Showers of random numbers, a tenth of their layers empty."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(generator=generator, dtype=torch.float64)
    energy = 10 + 80 * torch.rand(n, **options)
    clusters = (300 * torch.rand(n, 30, **options)).floor()
    clusters *= torch.rand(n, 30, **options) > 0.1
    deposits = 200 * torch.rand(n, 30, **options) * (clusters > 0)
    layer = torch.arange(1, 31, dtype=torch.float64)
    z = (deposits * layer).sum(-1) / deposits.sum(-1)
    across = 3 + 0.5 * torch.randn(n, 2, **options)
    cog = torch.cat([across, z[:, None]], -1)
    return Showers(energy, clusters, deposits, cog).to(dtype)


def shaken(f, sd=1.0, seed=0):
    """The map with noise on its parameters, each with its own."""
    with torch.no_grad():
        for i, p in enumerate(f.parameters()):
            p.add_(sd * noise(*p.shape, seed=seed + i).to(p))
    return f


def check_beside_another_device(create, context_dim):
    """A map is made and run on the default device, and one of the CPU runs beside it."""
    here = shaken(create(), 0.3)
    with torch.device("meta"):
        there = create()
    state = [*there.state_dict().values(), *there.buffers()]
    assert {t.device.type for t in state} == {"meta"}
    # nothing is left behind on the CPU, nor made anew on the other device
    z = noise(5, *here.event_shape).float()
    context = noise(5, context_dim).float() if here.context_dim else None
    meta = [t if t is None else t.to("meta") for t in (z, context)]
    for way in ("forward", "inverse"):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                wanted = getattr(here, way)(z, context)
                away = getattr(there, way)(*meta)
                assert [t.device.type for t in away] == ["meta"] * 2
                with torch.device("meta"):
                    found = getattr(here, way)(z, context)
            for a, b in zip(found, wanted):
                assert torch.equal(a, b)
    # as large models are loaded: made without memory, then filled
    there.load_state_dict(here.state_dict(), assign=True)
    for a, b in zip(there(z, context), here(z, context)):
        assert torch.equal(a, b)


class Counted(Bijection):
    """Multiplies by two, and counts how often each direction runs."""

    def __init__(self, dim):
        super().__init__(dim)
        self.calls = {"forward": 0, "inverse": 0}

    def _forward(self, z, context):
        self.calls["forward"] += 1
        return 2 * z, z.new_full(z.shape[:-1], z.shape[-1] * math.log(2))

    def _inverse(self, x, context):
        self.calls["inverse"] += 1
        return x / 2, x.new_full(x.shape[:-1], -x.shape[-1] * math.log(2))


def affine(shift=0.0):
    """A map of the plane onto itself with a parameter."""
    f = Elementwise(2, AffineMap())
    with torch.no_grad():
        f.thetas[0].value[:, 1] = shift  # after the raw scale
    return f


def many(make, *args):
    """Two independent coordinates of a distribution of torch or Pyro."""
    return D.Independent(make(*(torch.full((2,), a) for a in args)), 1)


def check_under_a_default_device(look):
    """What `look` gives, several tensors, does not depend on torch's default device."""
    plain = look()
    with torch.device("meta"):
        found = look()
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)
