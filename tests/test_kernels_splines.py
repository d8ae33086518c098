"""The fused rational-quadratic spline is the plain one: values, derivatives, transforms of functions."""

import math

import pytest
import torch
from torch.testing import assert_close

from flowcourse.splines import RationalQuadraticSplineMap, SplineMap

BOXES = {"linear": 3.0, "box": (0.0, 1.0), "circular": math.pi}
boxes = pytest.mark.parametrize("tails", BOXES)
ways = pytest.mark.parametrize("way", ["forward", "inverse"])


class Plain(RationalQuadraticSplineMap):
    """The map without its kernel."""

    _in_box = SplineMap._in_box


def points_and_parameters(scalar_map, *shape):
    """Points of the box, shape `(50, 3)`, and raw parameters of this shape."""
    generator = torch.Generator().manual_seed(1)
    low, high = scalar_map.ends
    share = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    theta = torch.randn(
        *shape, scalar_map.n_params, generator=generator, dtype=torch.float64
    )
    return low + (high - low) * share, 2 * theta


@pytest.mark.parametrize("shape", [(50, 3), (3,), (1,)], ids=str)
@ways
@boxes
def test_values_gradients_and_second_derivatives(tails, way, shape):
    quick = RationalQuadraticSplineMap(5, BOXES[tails], tails)
    t, theta = points_and_parameters(quick, *shape)
    t, theta = t.requires_grad_(), theta.requires_grad_()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    found = []
    for scalar_map in (quick, Plain(5, BOXES[tails], tails)):
        image, log_slope = getattr(scalar_map, way)(t, theta)
        total = (weight[0] * image + weight[1] * log_slope).sum()
        first = torch.autograd.grad(total, (t, theta), retain_graph=True)
        graph = torch.autograd.grad(total, (t, theta), create_graph=True)
        second = torch.autograd.grad(
            (graph[0] * weight[0]).sum() + graph[1].square().sum(), (t, theta)
        )
        found.append((image, log_slope, first, graph, second))
    for got, want in zip(*found):
        assert_close(got, want, rtol=1e-9, atol=1e-10)


@ways
@boxes
def test_without_gradients_and_under_vmap(tails, way):
    quick = RationalQuadraticSplineMap(5, BOXES[tails], tails)
    t, theta = points_and_parameters(quick, 50, 3)
    want = getattr(Plain(5, BOXES[tails], tails), way)(t, theta)
    go = getattr(quick, way)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_close(go(t, theta), want)
            assert_close(torch.func.vmap(go)(t, theta), want)
            shared = torch.func.vmap(go, (0, None))(t, theta[0])
            assert_close(shared, go(t, theta[0]))
