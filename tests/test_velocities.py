"""The velocity of images: what it starts as, what it is called with, and its derivatives."""

import pytest
import torch
from torch.testing import assert_close

from flowcourse.continuous import Continuous
from flowcourse.core import Flow
from flowcourse.stochastic import FlowMatching, Guided
from flowcourse.velocities import UNetVelocity


@pytest.fixture(params=[0, 3], ids=["plain", "context"])
def made(request):
    """A velocity with some weights in float64, images and features."""
    generator = torch.Generator().manual_seed(0)
    v = UNetVelocity((2, 4, 8), hidden=(4, 8), context_dim=request.param)
    v = v.double()
    for p in v.parameters():
        more = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data += 0.1 * more
    x = torch.randn(5, 2, 4, 8, generator=generator, dtype=torch.float64)
    c = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return v, x, (c,) if request.param else ()


@pytest.mark.parametrize("hidden", [(4,), (6, 8), (4, 8, 8)])
def test_a_new_flow_is_its_base(hidden):
    v = UNetVelocity((1, 8, 8), hidden=hidden)
    z, ladj = Continuous(v).inverse(x := torch.randn(3, 1, 8, 8))
    assert torch.equal(z, x) and torch.equal(ladj, torch.zeros(3))


def test_a_time_may_be_a_number_or_one_for_each_image(made):
    v, x, c = made
    want = v(0.3, x, *c)
    assert want.dtype == torch.float64 and want.shape == x.shape
    for shape in ((), (5,), (5, 1), (5, 1, 1, 1)):
        t = torch.full(shape, 0.3, dtype=torch.float64)
        assert_close(v(t, x, *c), want)
    assert not torch.allclose(v(0.31, x, *c), want)


def test_images_do_not_see_one_another(made):
    v, x, c = made
    alone = [
        v(0.3, x[i : i + 1], *(part[i : i + 1] for part in c)) for i in range(5)
    ]
    assert_close(v(0.3, x, *c), torch.cat(alone))


def test_the_divergence_is_that_of_the_jacobian(made):
    v, x, c = made
    f = Continuous(v)
    field = f._field(c[0] if c else None, None)
    value, divergence = field(0.3, x)
    jacobian = torch.autograd.functional.jacobian(lambda y: v(0.3, y, *c), x)
    traces = [jacobian[i, :, :, :, i].reshape(64, 64).trace() for i in range(5)]
    assert_close(value, v(0.3, x, *c))
    assert_close(divergence, torch.stack(traces))


def test_every_weight_learns_from_matching(made):
    v, x, c = made
    objective = FlowMatching(Flow(Continuous(v)).double())
    noise = objective.draw(5, torch.Generator().manual_seed(0))
    objective((x, *c) if c else x, noise).backward()
    assert all(p.grad.abs().sum() > 0 for p in v.parameters())


def test_it_can_be_guided():
    v = UNetVelocity((1, 4, 4), hidden=(4,), context_dim=2)
    flow = Flow(Continuous(Guided(v, 2.0), divergence="hutchinson"))
    assert flow.sample((3,), torch.eye(2)[0]).shape == (3, 1, 4, 4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"event_shape": 8}, "^event_shape: expected .channels, height"),
        ({"event_shape": (1, 8, 6), "hidden": (4, 4, 4)}, "divisible by 4"),
        ({"event_shape": (1, 8, 8), "hidden": (4, 0)}, "^hidden: expected"),
        ({"event_shape": (1, 8, 8), "context_dim": -1}, "^context_dim: "),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, told):
    with pytest.raises(ValueError, match=told):
        UNetVelocity(**settings)
