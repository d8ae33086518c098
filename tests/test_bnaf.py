"""Block autoregressive networks: bounds of their slopes, their start, and that they are onto."""

import math

import pytest
import torch
from helpers import noise
from masked import perturbed, shuffled
from torch import nn
from torch.testing import assert_close

from flowcourse.bnaf import BNAF, BlockAutoregressive, BlockLayer, _steepness
from flowcourse.core import Flow
from flowcourse.quadrature import total_mass


def test_what_a_block_layer_makes_of_raw_numbers_of_any_size():
    layer = BlockLayer(2, 3, 4, bend=0.5)
    assert_close(layer.mask.max(), torch.tensor(1 / math.sqrt(2 * 3)))
    assert_close(
        layer.below.unflatten(0, (2, 4)).mean(1),
        torch.zeros(2, 6),
        rtol=0,
        atol=1e-6,
    )
    shift, raw, _ = layer.units()
    assert_close(shift.mean(1), torch.zeros(2, 1), rtol=0, atol=1e-6)
    scale = layer.settings(None, torch.float32)[2]
    assert_close(scale.mean(1), torch.ones(2, 1))
    assert raw.std() > 0.05
    with torch.no_grad():
        layer.units.value.fill_(1e9)
        layer.within[..., 0], layer.within[..., 1:] = 1e9, -1e9
    weights, _, scale, bend = layer.settings(None, torch.float32)
    assert_close(scale, torch.full((2, 4, 1), math.exp(1.5)))
    assert_close(bend, torch.full((2, 4, 1), 0.5))
    most = 1 / (1 + 2 * math.exp(-6))
    assert_close(weights[..., 0], torch.full((2, 4), most))


def test_a_function_is_applied_to_every_module():
    f, seen = BNAF(2, 1, hidden=(3,)), []
    f.apply(seen.append)
    assert set(seen) == {*f.modules()}


def test_the_steepness_of_a_block_network_is_a_bound():
    f = perturbed(BlockAutoregressive(3, hidden=(4, 4), bend=0.8), 2.0)
    settings = [layer.settings(None, torch.float64) for layer in f.layers]
    least, most = _steepness(settings)
    x = 10 * noise(500, 3)
    slopes = torch.func.vmap(torch.func.jacrev(lambda t: f.inverse(t)[0]))(x)
    slopes = slopes.diagonal(dim1=-2, dim2=-1)
    least, most = least.flatten(), most.flatten()
    assert (slopes >= least - 1e-12).all() and (slopes <= most + 1e-12).all()
    assert (least < 0.9 * slopes.amin(0).clamp(max=1)).any()
    plain = f.layers[-1].settings(None, torch.float64)
    only_scales = _steepness([(*s[:3], None) for s in settings[:-1]] + [plain])
    assert (least < only_scales[0].flatten()).all()
    assert (most > only_scales[1].flatten()).all()


def test_block_networks_work_under_vmap_and_compile():
    f = perturbed(
        BlockAutoregressive(2, hidden=(3,), context_dim=2, order=shuffled(2))
    )
    z, context = noise(3, 2), noise(3, 2, seed=1)
    for direction in (f.forward, f.inverse):
        wanted = direction(z, context)
        got = torch.func.vmap(direction)(z, context)
        assert_close(got[0], wanted[0])
        assert_close(got[1], wanted[1])
        second = torch.func.jacrev(
            torch.func.jacrev(lambda z: direction(z, context[0])[1])
        )(z[0])
        assert_close(second, second.T)
        assert second.any()
    f, z = perturbed(BlockAutoregressive(1, hidden=(2,))), noise(3, 1)
    for direction in (f.forward, f.inverse):
        got = torch.compile(direction, backend="aot_eager", fullgraph=True)(z)
        for a, b in zip(got, direction(z)):
            assert_close(a, b)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_block_networks_are_onto_and_have_mass_one(scale, context_dim):
    flow = Flow(
        perturbed(BNAF(2, 2, hidden=(6,), context_dim=context_dim), scale)
    ).double()
    context = noise(context_dim) if context_dim else None
    mass = total_mass(
        lambda x: flow.log_prob(x, context), 2, dtype=torch.float64
    )
    assert abs(mass - 1) < 1e-3
    far = torch.tensor([[1e6, -1e6], [-1e8, 3.0]], dtype=torch.float64)
    x, _ = flow.bijection(far, context)
    assert x.isfinite().all()
    assert_close(
        flow.bijection.inverse(x, context)[0], far, rtol=1e-9, atol=1e-6
    )


def test_a_block_network_starts_at_the_identity_with_units_that_differ():
    torch.manual_seed(0)
    f = BlockAutoregressive(3, hidden=(8, 8)).double()
    x = noise(500, 3)
    z, ladj = f.inverse(x)
    assert_close(z, x, rtol=1e-6, atol=1e-6)
    assert_close(ladj, torch.zeros_like(ladj), rtol=0, atol=1e-6)
    target = torch.stack(
        [x[:, 0].sinh(), x[:, 1] + x[:, 0] ** 2, x[:, 2].tanh()], 1
    )
    (z - target).square().mean().backward()
    for layer in f.layers:
        first_block = layer.units.value.grad[1:, 0].squeeze(-1)  # scales, bends
        if first_block.shape[-1] > 1:
            assert first_block.std(-1).min() > 1e-6
        assert layer.units.value.grad.isfinite().all()
        assert layer.below.grad[layer.mask == 0].eq(0).all()
        assert layer.below.grad[layer.mask != 0].ne(0).all()


def test_a_bounded_network_would_not_be_onto():
    """What the leak is for: without it the same network misses most of the plane."""
    f = BlockAutoregressive(1, hidden=(8,)).double()
    assert f.inverse(torch.tensor([[1e9]]).double())[0] > 1e6
    squashed = nn.Sequential(
        nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)
    ).double()
    with torch.no_grad():
        for p in squashed.parameters():
            p.abs_()
        assert squashed(torch.tensor([[1e9]]).double()) < 10
