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
