"""Derivatives carried forwards equal those carried backwards, for every row of the zoo."""

import pytest
import torch
from helpers import noise, shaken
from torch.autograd import forward_ad
from torch.distributions import biject_to
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vmap,
)
from torch.testing import assert_close

from flowcourse.coupling import Coupling, half
from flowcourse.planar import Planar
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.zoo import rows


class Direction(torch.nn.Module):
    """One direction of a bijection as a module of its own."""

    def __init__(self, bijection, way):
        super().__init__()
        self.bijection, self.way = bijection, way

    def forward(self, point):
        return getattr(self.bijection, self.way)(point)


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("name", rows)
def test_forward_mode_agrees_with_reverse_mode(name, way):
    row = rows[name]
    shape = row.event_shapes[0]
    f = shaken(row.make(shape).double().eval(), 0.5)
    point = biject_to(f.domain)(noise(*shape, seed=9))
    if way == "inverse":
        point = f(point)[0].detach()
    module = Direction(f, way)
    theta = {k: p.detach() for k, p in module.named_parameters()}

    def close(got, want):  # sums are taken in another order
        assert_close(got, want, rtol=1e-8, atol=1e-8)

    def ladj(point, theta):
        return functional_call(module, theta, (point,))[1]

    image = module(point)[0]
    velocity, weight = noise(*point.shape, seed=8), noise(*image.shape, seed=7)
    jacobians = jacrev(module)(point)
    close(jacfwd(module)(point), jacobians)
    _, moved = jvp(module, (point,), (velocity,))
    close(
        moved,
        tuple((j * velocity).flatten(-point.dim()).sum(-1) for j in jacobians),
    )

    def value(point):
        image, log_slope = module(point)
        return (image * weight).sum() + log_slope.square()

    close(hessian(value)(point), jacrev(jacrev(value))(point))
    if theta:
        mixed = jacfwd(grad(ladj, 1))(point, theta)
        other = jacrev(grad(ladj), 1)(point, theta)
        for key, p in theta.items():
            ahead = mixed[key].flatten(p.dim()).movedim(-1, 0)
            close(ahead.reshape(*point.shape, *p.shape), other[key])


QUICK = {  # maps whose gradients are written out, and so know no forward mode
    "planar": lambda: Planar(3, 5, context_dim=2, block=2),
    "spline": lambda: Coupling(
        half(3), RationalQuadraticSplineMap(4), context_dim=2
    ),
}


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("name", QUICK)
def test_forward_mode_with_a_batch_and_a_context(name, way):
    f = shaken(QUICK[name]().double(), 0.5)
    points, context = noise(4, 3), noise(4, 2, seed=1)
    velocities = noise(4, 3, seed=2), noise(4, 2, seed=3)
    go = getattr(f, way)

    def each(point, context):
        return torch.cat([t.reshape(-1) for t in go(point, context)])

    def along(derivative):
        return [
            torch.einsum("nij,nj->ni", d, v)
            for d, v in zip(derivative, velocities)
        ]

    want = sum(along(vmap(jacrev(each, (0, 1)))(points, context)))
    want = want[:, :3], want[:, 3]
    with torch.no_grad():
        found, moved = jvp(go, (points, context), velocities)
    assert_close(found, go(points, context))
    assert_close(moved, want)
    with forward_ad.dual_level():
        pairs = zip((points, context), velocities)
        duals = go(*(forward_ad.make_dual(t, v) for t, v in pairs))
        tangents = tuple(forward_ad.unpack_dual(t).tangent for t in duals)
    assert_close(tangents, want)
    second = vmap(jacfwd(jacfwd(each, 1), 0))(points, context)
    assert_close(second, vmap(jacrev(jacrev(each, 1), 0))(points, context))
