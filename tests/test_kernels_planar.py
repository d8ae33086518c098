"""Blocks of planar layers against a plain loop, and the last digits of their inverse."""

from functools import partial

import pytest
import torch
from helpers import noise, shaken
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from flowcourse.kernels_planar import newton_step, plain_block
from flowcourse.planar import LeakyUnit, LogisticUnit, Planar, TanhUnit

UNITS = [TanhUnit(), LogisticUnit(), LeakyUnit()]


def perturbed(f, scale=1.0, seed=0):
    return shaken(f.double(), scale, seed)


def loop(f, z, context=None):
    """A planar stack layer by layer."""
    w, u, b, _, log_steepest = f._per_layer(context)
    ladj = 0.0
    for k in range(f.layers):
        a = (w[..., k, :] * z).sum(-1) + b[..., k]
        z = z + u[..., k, :] * f.unit(a).unsqueeze(-1)
        ladj = ladj + f.unit.log_slope(a, log_steepest[..., k])
    return z, ladj


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize(
    "layers, block", [(1, 16), (7, 1), (7, 3), (7, 7), (20, 16)]
)
def test_blocks_give_the_numbers_and_gradients_of_the_loop(
    unit, context_dim, layers, block
):
    f = perturbed(
        Planar(4, layers, context_dim=context_dim, unit=unit, block=block), 0.5
    )
    z = noise(6, 4).requires_grad_()
    context = noise(6, 3, seed=1).requires_grad_() if context_dim else None
    leaves = [z, *f.parameters()] + ([context] if context_dim else [])
    weight = noise(6, 4, seed=2)
    grads = []
    for x, ladj in (f(z, context), loop(f, z, context)):
        value = (x * weight).sum() + ladj.sum()
        grads.append([x, ladj, *torch.autograd.grad(value, leaves)])
    for fast, plain in zip(*grads):
        assert_close(fast, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("unit", UNITS[:2], ids=str)
@pytest.mark.parametrize("context_dim", [0, 3])
def test_second_derivatives_are_those_of_the_loop(unit, context_dim):
    f = perturbed(
        Planar(4, 5, context_dim=context_dim, unit=unit, block=3), 0.5
    )
    z = noise(6, 4).requires_grad_()
    context = noise(6, 3, seed=1).requires_grad_() if context_dim else None
    leaves = [z, *f.parameters()] + ([context] if context_dim else [])
    found = []
    for way in (f, partial(loop, f)):
        x, ladj = way(z, context)
        value = (x * noise(6, 4, seed=2)).sum() + ladj.sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        total = sum((g * noise(*g.shape, seed=3)).sum() for g in grads)
        found.append(torch.autograd.grad(total, leaves, materialize_grads=True))
        at_first = partial(
            way, context=None if context is None else context.detach()[0]
        )
        hessians = torch.func.jacrev(torch.func.jacrev(at_first))(z.detach()[0])
        found[-1] += hessians
    for fast, plain in zip(*found):
        assert_close(fast, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_one_context_for_all_points_and_gradients_of_each_point(context_dim):
    f = perturbed(Planar(4, 5, context_dim=context_dim, block=3), 0.5)
    z, context = noise(2, 6, 4), noise(1, 3, seed=1) if context_dim else None

    class Value(torch.nn.Module):
        def __init__(self, way):
            super().__init__()
            self.f, self.way = f, way

        def forward(self, z):
            x, ladj = self.way(self.f, z, context)
            return x.square().sum() + ladj.sum()

    both = []
    for way in (Planar.forward, loop):
        value = Value(way)
        parameters = dict(value.named_parameters())
        gradient = torch.func.grad(partial(torch.func.functional_call, value))
        each = torch.func.vmap(gradient, (None, 0))(parameters, z)
        both.append([*gradient(parameters, z).values(), *each.values()])
    for fast, plain in zip(*both):
        assert_close(fast, plain, rtol=1e-10, atol=1e-10)


# functorch warns where it falls back to a loop
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "dims", [(0, 0), (0, None), (None, 0), (None, 1), (2, 1)]
)
@pytest.mark.parametrize("batch", [(), (4,)])
def test_vmap_over_layers_and_points(dims, batch):
    """An ensemble of stacks, on points of their own or the same, and one stack on many points."""
    n = 6
    dims = tuple(
        None if d is None else min(d, most)
        for d, most in zip(dims, (2, len(batch)))
    )
    f = perturbed(Planar(5, 7, block=3), 0.5)
    (name, raw), *_ = f.named_parameters()
    if dims[0] is not None:
        raw = torch.stack(
            [raw + noise(*raw.shape, seed=i) for i in range(n)], dims[0]
        )
    z = noise(*batch, 5)
    if dims[1] is not None:
        z = torch.stack(
            [z + noise(*z.shape, seed=i) for i in range(n)], dims[1]
        )

    def value(raw, z):
        x, ladj = torch.func.functional_call(f, {name: raw}, (z,))
        return x.square().sum() + ladj.square().sum()

    def one(i):
        pair = zip((raw, z), dims)
        return [t if d is None else t.select(d, i) for t, d in pair]

    for way in (value, torch.func.grad(value), torch.func.grad(value, 1)):
        want = torch.stack([way(*one(i)) for i in range(n)])
        assert_close(
            torch.vmap(way, dims)(raw, z), want, rtol=1e-10, atol=1e-10
        )
    with torch.no_grad():
        want = torch.stack([value(*one(i)) for i in range(n)])
        assert_close(
            torch.vmap(value, dims)(raw, z), want, rtol=1e-10, atol=1e-10
        )


def test_the_cost_is_linear_in_the_layers():
    def flops(layers):
        counter = FlopCounterMode(display=False)
        f = Planar(40, layers)
        with counter, torch.no_grad():
            f(torch.randn(100, 40))
        return counter.get_total_flops()

    assert flops(320) == 2 * flops(160) == 4 * flops(80)


def test_a_newton_step_across_a_kink_is_not_taken_where_it_leads_away():
    f = Planar(1, unit=LeakyUnit()).double()
    f.raw.value.data = torch.tensor([[1.0, 30.0, 0.0]], dtype=torch.float64)
    w, u, b, _, log_steepest = f._per_layer()
    products = w @ u.mT
    ahead = partial(plain_block, w=w, u=u, b=b, unit=f.unit)
    z = torch.tensor([0.01], dtype=torch.float64)
    for off, taken in ((-0.011, False), (0.02, True)):
        near = z + off
        found, a = newton_step(
            near, near, f(z)[0], ahead, w, u, products, f.unit, log_steepest
        )
        assert_close(found, z if taken else near)
        assert_close(a, z if taken else near)


@pytest.mark.parametrize("seed", range(5))
def test_the_inverse_keeps_its_last_digits_in_float32(seed):
    """Where |x| is far above |z|, `x - û h(a)` alone is off by 1e-4 to 2e-3 after a round trip."""
    torch.manual_seed(seed)
    f = perturbed(Planar(5, 3, unit=LeakyUnit()), 6.0, seed).float()
    x = f(noise(200, 5, seed=seed).float())[0].detach()
    again = f(f.inverse(x)[0])[0]
    error = (again - x).abs().amax(-1) / (1 + x.abs().amax(-1))
    assert error.median() < 2e-5
