"""Flows as distributions and bijections as transforms, in torch and in Pyro."""

import copy
import math
import re

import pyro
import pyro.distributions as pdist
import pytest
import torch
import torch.distributions as D
from helpers import Counted, affine, many
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.testing import assert_close

from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.distributions import BijectionTransform, FlowDistribution
from flowcourse.elementwise import Elementwise, SigmoidMap

inf, nan = math.inf, math.nan


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_flow_is_a_torch_distribution(context_dim, scramble):
    flow = scramble(Flow(RealNVP(3, 2, hidden=(4,), context_dim=context_dim)))
    context = torch.randn(5, 2) if context_dim else None
    batch = (5,) if context_dim else ()
    d = flow(context)
    assert (d.batch_shape, d.event_shape, d.has_rsample) == (batch, (3,), True)
    x = d.sample((7,))
    assert (
        x.shape == (7, *batch, 3)
        and not x.requires_grad
        and d.rsample().requires_grad
    )
    assert d.support.check(x).all()
    assert_close(d.log_prob(x), flow.log_prob(x, context))
    wide = d.expand((4, 5))
    assert wide.batch_shape == (4, 5) and wide.sample((2,)).shape == (
        2,
        4,
        5,
        3,
    )
    value = wide.sample()
    assert_close(wide.log_prob(value), flow.log_prob(value, context))
    assert wide.log_prob(value[0, 0]).shape == (4, 5)
    # compiling elsewhere turns the default of all distributions off
    checked = FlowDistribution(flow, context, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(torch.full((3,), math.nan))


def test_the_distribution_of_a_flow_speaks_of_data():
    flow = Flow(affine(2.0), many(D.Exponential, 1.0))
    x = torch.tensor([[1.0, 3.0]])  # of density zero, but a point of the plane
    assert flow().log_prob(x) == -inf
    flow = Flow(Elementwise(2, SigmoidMap()))
    d = FlowDistribution(flow, validate_args=True)
    with pytest.raises(ValueError, match=r"(?s)FlowDistribution.*1\.5"):
        d.log_prob(torch.full((2,), 1.5))


def test_a_flow_works_in_pyro_models_plates_and_guides(scramble):
    pyro.clear_param_store()
    data = torch.randn(40, 2) * 0.5 + torch.tensor([1.0, -1.0])

    def model(x):
        with pyro.plate("rows", len(x)):
            return pyro.sample("x", flow(), obs=x)

    flow = scramble(Flow(RealNVP(2, 2, hidden=(4,))), 0.1)
    trace = pyro.poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    assert_close(trace.nodes["x"]["log_prob"], flow.log_prob(data))

    def target():
        with pyro.plate("batch", 8):
            pyro.sample(
                "z", pdist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1)
            )

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("batch", 8):
            pyro.sample("z", flow.condition(None))

    svi = SVI(target, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    pyro.enable_validation(True)
    losses = [svi.step() / 8 for _ in range(300)]
    # zero is the optimum
    assert sum(losses[-20:]) / 20 < 0.1 < sum(losses[:20]) / 20

    conditional = Flow(RealNVP(2, 2, hidden=(4,), context_dim=3))
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 5, dim=-1):
        assert pyro.sample("y", conditional(torch.randn(5, 3))).shape == (
            4,
            5,
            2,
        )
    masked = conditional(torch.randn(5, 3)).mask(
        torch.zeros(5, dtype=torch.bool)
    )
    assert torch.equal(masked.log_prob(torch.randn(5, 2)), torch.zeros(5))


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("module", [D, pdist])
def test_transformed_distribution_accepts_the_transform(
    module, cache_size, scramble
):
    flow = scramble(Flow(RealNVP(2, 2, hidden=(4,), context_dim=1)))
    context = torch.randn(5, 1)
    base = module.Independent(module.Normal(torch.zeros(2), torch.ones(2)), 1)
    transform = flow.bijection.as_transform(context, cache_size)
    d = module.TransformedDistribution(base, [transform])
    assert (d.batch_shape, d.event_shape) == ((5,), (2,))
    x = d.rsample((4,))
    assert_close(d.log_prob(x), flow.log_prob(x, context), atol=1e-4, rtol=1e-5)
    z = transform.inv(x)
    assert_close(transform(z), x, atol=1e-5, rtol=1e-5)
    assert (
        transform.inverse_shape((5, 2)) == (5, 2)
        and transform.domain.event_dim == 1
    )


def test_a_cached_transform_does_not_compute_twice():
    f = Counted(2)
    d = D.TransformedDistribution(
        many(D.Normal, 0.0, 1.0), [f.as_transform(cache_size=1)]
    )
    x = d.rsample((3,))
    d.log_prob(x)
    assert f.calls == {"forward": 1, "inverse": 0}
    d.log_prob(x.clone())
    assert f.calls == {"forward": 1, "inverse": 1}
    assert f.as_transform().with_cache(1)._cache_size == 1


# --- a kept pair -------------------------------------------------------------


def gradient(d, f, x):
    """The gradient of a log-density in the parameters of a map."""
    return torch.autograd.grad(d.log_prob(x).sum(), list(f.parameters()))


def cached(f, cache_size=1):
    return D.TransformedDistribution(
        many(D.Normal, 0.0, 1.0), [f.as_transform(cache_size=cache_size)]
    )


def test_a_kept_pair_keeps_the_gradients():
    f = affine()
    d = cached(f)
    with torch.no_grad():
        x = d.rsample((50,))
    wanted = gradient(cached(f, 0), f, x)
    assert wanted[0].abs().max() > 1
    assert_close(gradient(d, f, x), wanted)
    # the same for a sample that never had a gradient, and for the inverse
    x = d.sample((50,))
    assert_close(gradient(d, f, x), gradient(cached(f, 0), f, x))
    transform = f.as_transform(cache_size=1)
    with torch.no_grad():
        z = transform.inv(x)
    assert transform(z).requires_grad
    assert transform.log_abs_det_jacobian(z, x).requires_grad


UPDATES = {
    "in place": lambda f: torch.no_grad()(
        lambda: f.thetas[0].value.add_(1.0)
    )(),
    "other numbers": lambda f: setattr(
        f.thetas[0].value, "data", f.thetas[0].value.data + 1
    ),
    "another parameter": lambda f: setattr(
        f.thetas[0], "value", nn.Parameter(f.thetas[0].value.detach() + 1)
    ),
    "loaded": lambda f: f.load_state_dict(
        {k: v + 1 for k, v in f.state_dict().items()}
    ),
}


def step(optimizer):
    def update(f):
        f.thetas[0].value.grad = torch.ones_like(f.thetas[0].value)
        optimizer(f.parameters(), lr=0.5).step()

    return update


UPDATES |= {
    "Adam": step(torch.optim.Adam),
    "fused Adam": step(lambda p, lr: torch.optim.Adam(p, lr, fused=True)),
    "Adam over all": step(lambda p, lr: torch.optim.Adam(p, lr, foreach=True)),
    "SGD": step(torch.optim.SGD),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_kept_pair_is_not_given_again_after_an_update(name, grad):
    f = affine()
    transform = f.as_transform(cache_size=1)
    z = torch.randn(5, 2)
    with torch.set_grad_enabled(grad):
        x = transform(z)
        ladj = transform.log_abs_det_jacobian(z, x)
        assert transform(z) is x and transform.inv(x) is z
        assert transform.log_abs_det_jacobian(z, x) is ladj
        with torch.enable_grad():
            UPDATES[name](f)
        assert_close(transform.inv(x), f.inverse(x)[0])
        x = transform(z)
        assert_close(x, f(z)[0])
        UPDATES["in place"](f)
        assert_close(transform.log_abs_det_jacobian(z, x), f(z)[1])


def test_a_kept_pair_hangs_on_points_context_and_mode():
    f = RealNVP(2, 2, hidden=(4,), context_dim=1)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.3 * torch.randn_like(p))
    c = torch.randn(1)
    transform = f.as_transform(c, cache_size=1)
    for change in (
        lambda z, x: z.add_(1.0),
        lambda z, x: c.add_(1.0),
        lambda z, x: f.train(not f.training),
        lambda z, x: z.requires_grad_(),
    ):
        z = torch.randn(5, 2)
        with torch.no_grad():
            x = transform(z)
            change(z, x)
            assert transform(z) is not x
            assert_close(transform(z), f(z, c)[0])
    with torch.inference_mode():
        z = torch.randn(5, 2)
        x = transform(z)
        z.add_(1.0)  # of which torch keeps no count
        assert_close(transform(z), f(z, c)[0])


def test_a_transform_with_a_kept_pair_can_be_copied():
    f = affine()
    transform = f.as_transform(cache_size=1)
    x = transform(torch.randn(5, 2))
    twin = copy.deepcopy(transform)
    assert_close(twin.inv(x), transform.inv(x))


# --- mistakes ----------------------------------------------------------------

f = RealNVP(2, 2, hidden=(4,))
flow, flow_c = Flow(f), Flow(RealNVP(2, 2, hidden=(4,), context_dim=3))
x, c = torch.zeros(5, 2), torch.zeros(4, 3)
MISTAKES = {
    "no sample of a distribution": (
        lambda: flow().sample(2.0),
        "shape: expected a whole number of at least 0, got 2.0",
    ),
    "no rsample of a distribution": (
        lambda: flow().rsample(-1),
        "shape: expected a whole number of at least 0, got -1",
    ),
    "a map as a flow": (
        lambda: FlowDistribution(f),
        "flow: expected a Flow, got RealNVP",
    ),
    "a flow as a transform": (
        lambda: BijectionTransform(flow),
        "bijection: expected a bijection, got Flow",
    ),
    "a transform without its context": (
        lambda: flow_c.bijection.as_transform(),
        "context: RealNVP expects shape (*batch, 3), got none",
    ),
    "too few dimensions": (
        lambda: f.as_transform().forward_shape(()),
        "shape: expected at least 1 dimensions, got ()",
    ),
    "a batch that does not fit": (
        lambda: flow_c.bijection.as_transform(c).forward_shape((5, 2)),
        "shape: expected a batch shape that broadcasts against (4,)",
    ),
    "a value of another size": (
        lambda: FlowDistribution(flow, validate_args=False).log_prob(
            torch.zeros(5, 3)
        ),
        "value: Flow expects last dimension 2, got shape (5, 3)",
    ),
    "a value of another batch": (
        lambda: FlowDistribution(flow_c, c, validate_args=False).log_prob(x),
        "value: expected a batch shape that broadcasts against (4,), got shape",
    ),
    # batch shapes
    "expand that shrinks": (
        lambda: flow().expand((3,)).expand((2,)),
        "batch_shape: expected an expansion of (3,), got (2,)",
    ),
    "expand that drops": (
        lambda: flow_c(c).expand(()),
        "batch_shape: expected an expansion of (4,), got ()",
    ),
    "expand in the wrong place": (
        lambda: flow_c(c).expand((4, 2)),
        "batch_shape: expected an expansion of (4,), got (4, 2)",
    ),
    "expand to less than nothing": (
        lambda: flow().expand((-1,)),
        "batch_shape: expected a whole number of at least 0, got -1",
    ),
    "a batch shape beside the context's": (
        lambda: FlowDistribution(flow_c, c, (3,)),
        "batch_shape: expected an expansion of (4,), got (3,)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
