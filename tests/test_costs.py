"""Calls of torch's operators, which decide the speed of small flows and are the same on any machine.

Each limit is what was counted when it was written, with one twentieth on top: a change that asks
for more calls shows here before it shows on a clock. Sizes hardly matter, so they are small.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowcourse.autoregressive import MAF
from flowcourse.core import Flow
from flowcourse.coupling import Couplings, RealNVP
from flowcourse.objectives import MaximumLikelihood
from flowcourse.planar import Planar
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.trainer import fit


class Calls(TorchDispatchMode):
    """Count operators that compute; views are free on every device."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.n += not operator.is_view
        return operator(*args, **(kwargs or {}))


def calls(work):
    """How many operators a function calls."""
    with Calls() as counted:
        work()
    return counted.n


def spline():
    return RationalQuadraticSplineMap(8)


FLOWS = {  # a flow, and its calls for loss and gradient, log_prob and sample
    "planar, 40 layers": (lambda: Planar(4, 40), 276, None, 139),
    "planar, 80 layers": (lambda: Planar(4, 80), 384, None, 226),
    "planar, 80 layers, from a context": (
        lambda: Planar(4, 80, context_dim=3, hidden=()),
        395,
        None,
        234,
    ),
    "RealNVP": (lambda: RealNVP(4, 8, hidden=(8, 8)), 288, 105, 92),
    "spline coupling": (
        lambda: Couplings(4, 8, scalar_map=spline(), hidden=(8, 8)),
        1544,
        569,
        476,
    ),
    "MAF": (lambda: MAF(4, 5, hidden=(8, 8)), 217, 85, 335),
    "spline autoregressive": (
        lambda: MAF(4, 5, hidden=(8, 8), scalar_map=spline()),
        1004,
        375,
        1295,
    ),
}


def works(make):
    """The three works of a flow."""
    flow = Flow(make())
    context = torch.zeros(6, flow.context_dim) if flow.context_dim else None
    x, noise = torch.randn(6, 4), torch.randn(6, 4)
    numerical = flow.bijection.inverse_cost == "numerical"

    def train():
        if numerical:
            z, ladj = flow.bijection(noise, context)
            loss = (z.square().sum(-1) - ladj).mean()
        else:
            loss = -flow.log_prob(x, context).mean()
        loss.backward()

    return (
        train,
        None
        if numerical
        else torch.no_grad()(lambda: flow.log_prob(x, context)),
        torch.no_grad()(lambda: flow.bijection(noise, context)),
    )


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_asks_for_no_more_calls_than_it_did(name):
    make, *limits = FLOWS[name]
    for work, limit in zip(works(make), limits, strict=True):
        assert (work is None) == (limit is None)
        if work is not None:
            assert calls(work) <= 1.05 * limit


def test_the_calls_of_a_planar_stack_grow_by_blocks_and_hardly_by_layers():
    one, two, four = (
        calls(works(lambda n=n: Planar(4, n))[0]) for n in (40, 80, 160)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    # the arithmetic of a layer alone is more than five calls
    assert two - one < 5 * 40


def test_a_step_of_the_trainer_adds_few_calls():
    x = torch.randn(6, 4)

    def step(flow, optimizer):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()

    def trained(steps):
        flow = Flow(RealNVP(4, 8, hidden=(8, 8)))
        options = dict(steps=steps, batch_size=6, clip=5.0, progress=False)
        return calls(lambda: fit(MaximumLikelihood(flow), x, **options))

    flow = Flow(RealNVP(4, 8, hidden=(8, 8)))
    optimizer = torch.optim.Adam(flow.parameters(), fused=True)
    step(flow, optimizer)  # makes the optimiser's state
    bare = calls(lambda: step(flow, optimizer))
    assert (trained(12) - trained(2)) / 10 - bare <= 10
