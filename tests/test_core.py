"""Maps, chains and flows as modules, compiled, and under torch's function transforms."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.distributions as D
from helpers import Counted
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing import assert_close

from flowcourse import zoo
from flowcourse.bases import DiagonalGaussian, GaussianMixture, Uniform
from flowcourse.core import (
    Base,
    Bijection,
    Compose,
    Flow,
    Inverse,
    StandardNormal,
)
from flowcourse.coupling import RealNVP
from flowcourse.elementwise import AffineMap
from flowcourse.images import Glow


class Flatten(Bijection):
    """Turns images into vectors: a map that changes the event's shape."""

    event_dim_out = 1

    def event_shape_out(self, event_shape):
        return (math.prod(event_shape),)

    def event_shape_in(self, event_shape):
        return self.event_shape

    def _forward(self, z, context):
        return z.flatten(-3), z.new_zeros(z.shape[:-3])

    def _inverse(self, x, context):
        return x.unflatten(-1, self.event_shape), x.new_zeros(x.shape[:-1])


def test_compose_runs_in_generative_order_and_adds_the_ladjs():
    f, g = RealNVP(3, 1, hidden=(4,)), Counted(3)
    z = torch.randn(5, 3)
    y, first = f(z)
    x, second = g(y)
    both, ladj = Compose(f, g)(z)
    assert torch.equal(both, x) and torch.equal(ladj, first + second)
    back, reverse = Inverse(Compose(f, g)).forward(x)
    assert_close(back, z) and assert_close(reverse, -ladj)


def test_compose_carries_shapes_through_maps_that_change_them():
    f = Compose(Flatten((1, 2, 2)), Counted(4))
    assert (f.event_shape, f.event_dim, f.event_dim_out) == ((1, 2, 2), 3, 1)
    assert f.event_shape_out((1, 2, 2)) == (4,)
    flow = Flow(f)
    assert flow.event_shape == (4,) and flow.sample(3).shape == (3, 4)
    assert flow.log_prob(torch.randn(3, 4)).shape == (3,)
    back = Inverse(f)
    assert (back.event_shape, back.event_shape_out((4,))) == ((4,), (1, 2, 2))
    z, ladj = back.forward(torch.randn(6, 4))
    assert z.shape == (6, 1, 2, 2) and ladj.shape == (6,)


def test_log_prob_computes_one_inverse():
    flow = Flow(Counted(2))
    x = torch.randn(6, 2)
    flow().log_prob(x)
    assert flow.bijection.calls == {"forward": 0, "inverse": 1}
    flow.rsample_and_log_prob(5)
    assert flow.bijection.calls == {"forward": 1, "inverse": 1}


def test_rsample_and_log_prob_agree_with_log_prob_and_carry_gradients(scramble):
    flow = scramble(
        Flow(RealNVP(2, 2, hidden=(4,)), DiagonalGaussian(2))
    ).double()
    x, log_prob = flow.rsample_and_log_prob(
        9, generator=torch.Generator().manual_seed(0)
    )
    assert_close(log_prob, flow.log_prob(x))
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    noise = flow.base.noise((9,), torch.Generator().manual_seed(0))
    assert torch.equal(flow.rsample_and_log_prob(noise=noise)[0], x)
    with pytest.raises(ValueError, match="no reparametrised sample"):
        Flow(
            RealNVP(2), GaussianMixture(torch.randn(2, 2))
        ).rsample_and_log_prob(3)


def test_the_dtype_and_device_are_the_bases(scramble):
    flow = scramble(Flow(RealNVP(2, 2, hidden=(4,)))).double()
    assert flow.sample(3).dtype == torch.float64
    assert isinstance(flow.base, Base) and flow.base.loc.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_flow_moves_to_the_gpu():
    flow = Flow(
        RealNVP(2, 2, hidden=(4,)),
        D.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ).cuda()
    x = flow.sample(5, generator=torch.Generator().manual_seed(0))
    assert x.is_cuda and flow.log_prob(x).is_cuda


# --- compiled and transformed ------------------------------------------------

rows = [
    # with context where the row takes one: then its parameters come out of a
    # network
    pytest.param(
        row,
        row.event_shapes[0],
        row.make(row.event_shapes[0], 2).context_dim,
        id=name,
    )
    for name, row in zoo.rows.items()
]


@pytest.mark.parametrize(("row", "shape", "context_dim"), rows)
def test_both_directions_compile_without_a_graph_break(
    row, shape, context_dim, scramble
):
    torch._dynamo.reset()
    f = scramble(row.make(shape, context_dim)).eval()
    # Glow runs another form where it is not compiled, and rounds otherwise
    dtype = torch.float64 if isinstance(f, Glow) else torch.float32
    f = f.to(dtype)
    z = D.biject_to(f.domain)(torch.randn(5, *shape, dtype=dtype))
    context = torch.randn(5, context_dim, dtype=dtype) if context_dim else None
    x = f.forward(z, context)[0].detach()
    for direction, start in ((f.forward, z), (f.inverse, x)):
        fast = torch.compile(direction, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(fast(start, context), direction(start, context)):
            assert_close(got, wanted)


@pytest.mark.skipif(
    not shutil.which("g++"), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("name", ["affine-coupling", "realnvp"])
def test_inductor_compiles_training(name, scramble):
    torch._dynamo.reset()
    flow = scramble(Flow(zoo.rows[name].make(2)))
    x = torch.randn(16, 2)
    fast = torch.compile(lambda x: flow.log_prob(x).mean(), fullgraph=True)
    assert_close(fast(x), flow.log_prob(x).mean())
    wanted = torch.autograd.grad(
        flow.log_prob(x).mean(), list(flow.parameters())
    )
    got = torch.autograd.grad(fast(x), list(flow.parameters()))
    assert_close(got, wanted)


def test_a_compiled_map_is_a_map():
    assert Flow(torch.compile(RealNVP(2))).sample(3).shape == (3, 2)


@pytest.mark.parametrize(("row", "shape", "context_dim"), rows)
def test_function_transforms(row, shape, context_dim, scramble):
    f = scramble(row.make(shape, context_dim)).double().eval()
    z = D.biject_to(f.domain)(torch.randn(4, *shape, dtype=torch.float64))
    c = (
        torch.randn(4, context_dim, dtype=torch.float64)
        if context_dim
        else None
    )
    dims = (0, None if c is None else 0)
    x = f.forward(z, c)[0].detach()
    for direction, start in ((f.forward, z), (f.inverse, x)):
        each = vmap(direction, in_dims=dims)(start, c)
        for got, wanted in zip(each, direction(start, c)):
            assert_close(got, wanted)

        def point(z, c):
            return direction(z, c)[0].sum()

        hessian = vmap(jacrev(jacrev(point)), in_dims=dims)(start, c)
        assert hessian.isfinite().all()
        assert_close(
            vmap(grad(point), in_dims=dims)(start, c), jacrev(point)(start, c)
        )

    def loss(parameters):
        x, ladj = functional_call(f, parameters, (z, c))
        return x.square().sum() + ladj.sum()

    parameters = dict(f.named_parameters())
    if not parameters:
        return
    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_close(list(grad(loss)(parameters).values()), list(wanted))


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compose(), "bijections: Compose expects at least one"),
        (
            lambda: Compose(Counted(2), Counted(3)),
            r"bijections\[1\]: .* shape \(3,\), got \(2,\)",
        ),
        (
            lambda: Compose(Flatten((1, 2, 2)), Flatten((1, 2, 2))),
            r"bijections\[1\]: .* 3 dimensions",
        ),
        (
            lambda: Compose(
                RealNVP(2, context_dim=1), RealNVP(2, context_dim=2)
            ),
            "one context_dim",
        ),
        (
            lambda: Flow(Counted(2), StandardNormal(3)),
            r"base: expected event shape \(2,\)",
        ),
        (lambda: Flow(Bijection()), "base: expected one"),
        (
            lambda: Bijection(0),
            "event_shape: expected positive integers, got 0",
        ),
        (
            lambda: Bijection(2, -1),
            "context_dim: expected a whole number of at least 0, got -1",
        ),
        (
            lambda: DiagonalGaussian(2, scale=-1.0),
            r"scale: expected finite numbers above 0, got -1.0",
        ),
        (lambda: Uniform(1, 1.0, 0.0), "high: expected above low"),
        (
            lambda: GaussianMixture(torch.zeros(3)),
            r"loc: expected shape \(components",
        ),
        (
            lambda: RealNVP(2)(torch.zeros(4, 3)),
            r"z: RealNVP expects last dimension 2, got .*\(4, 3\)",
        ),
        (
            lambda: RealNVP(2).inverse(torch.zeros(2).double()),
            "x: RealNVP holds torch.float32, got",
        ),
        (
            lambda: RealNVP(2)(torch.zeros(2, dtype=torch.long)),
            "floating-point tensor, got a torch.int64",
        ),
        (lambda: RealNVP(2)([0.0, 0.0]), "floating-point tensor, got list"),
        (
            lambda: RealNVP(2)(torch.zeros(2), torch.zeros(1)),
            "context: RealNVP expects none, got shape",
        ),
        (
            lambda: RealNVP(2, context_dim=3)(torch.zeros(2)),
            r"context: .*\(\*batch, 3\), got none",
        ),
        (
            lambda: Flow(RealNVP(2, context_dim=3))(),
            r"context: Flow expects shape \(\*batch, 3\)",
        ),
        (
            lambda: RealNVP(2, context_dim=1)(
                torch.zeros(4, 2), torch.zeros(3, 1)
            ),
            r"context: batch shape \(3,\) does not broadcast against \(4,\)",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Unfinished(Bijection):
    pass


class NoDensity(Base):
    pass


f = RealNVP(2, 2, hidden=(4,))
flow, flow_c = Flow(f), Flow(RealNVP(2, 2, hidden=(4,), context_dim=3))
g = torch.Generator()
x, c = torch.zeros(5, 2), torch.zeros(4, 3)
MISTAKES = {
    # samples
    "sample(-1)": (lambda: flow.sample(-1), "shape: expected a whole number"),
    "sample(2.0)": (
        lambda: flow.sample(2.0),
        "shape: expected a whole number of at least 0, got 2.0",
    ),
    "sample(True)": (lambda: flow.sample(True), "shape: expected a whole"),
    "sample(None)": (lambda: flow.sample(None), "shape: expected a whole"),
    "sample of points": (lambda: flow.sample(x), "shape: expected a whole"),
    "a generator as a context": (
        lambda: flow.sample(3, g),
        "context: Flow expects none, got Generator; write generator=...",
    ),
    "a generator as features": (
        lambda: flow_c.sample(3, g),
        "context: Flow expects a floating-point tensor, got Generator; write",
    ),
    "a generator in rsample_and_log_prob": (
        lambda: flow.rsample_and_log_prob(3, g),
        "write generator=...",
    ),
    "a seed as a generator": (
        lambda: flow.sample(3, generator=0),
        "generator: expected a torch.Generator, got int",
    ),
    "numpy's generator": (
        lambda: flow.sample(3, generator=np.random.default_rng()),
        "generator: expected a torch.Generator",
    ),
    # maps
    "a list of maps": (
        lambda: Compose([f, f]),
        "bijections[0]: expected a bijection, got list; give its entries one",
    ),
    "a flow in a chain": (
        lambda: Compose(f, flow),
        "bijections[1]: expected a bijection, got Flow; the map in it is",
    ),
    "a class in a chain": (
        lambda: Compose(RealNVP, f),
        "bijections[0]: expected a bijection, got the class RealNVP; make one",
    ),
    "a scalar map in a chain": (
        lambda: Compose(f, AffineMap()),
        "bijections[1]: expected a bijection, got AffineMap; a scalar map",
    ),
    "a flow turned round": (
        lambda: Inverse(flow),
        "bijection: expected a bijection, got Flow; the map in it is",
    ),
    "a layer turned round": (
        lambda: Inverse(nn.Linear(2, 2)),
        "bijection: expected a bijection, got Linear",
    ),
    "a layer as a map": (
        lambda: Flow(nn.Linear(2, 2)),
        "bijection: expected a bijection, got Linear",
    ),
    "a class as a map": (
        lambda: Flow(RealNVP),
        "bijection: expected a bijection, got the class RealNVP; make one",
    ),
    "a list as a map": (
        lambda: Flow([f, f]),
        "bijection: expected a bijection, got list; give its entries one by",
    ),
    "a flow as a map": (lambda: Flow(flow), "bijection: expected a bijection"),
    "a class as a base": (
        lambda: Flow(f, base=StandardNormal),
        "base: expected a Base or a torch distribution, got the class Standard",
    ),
    "torch's class as a base": (
        lambda: Flow(f, base=D.Normal),
        "base: expected a Base or a torch distribution, got the class Normal",
    ),
    "a flow as a base": (
        lambda: Flow(f, base=flow),
        "base: expected a Base or a torch distribution, got Flow",
    ),
    "a float as a width": (
        lambda: Bijection(2, 1.5),
        "context_dim: expected a whole number of at least 0, got 1.5",
    ),
    "a float of dimensions": (
        lambda: Bijection(None, event_dim=1.0),
        "event_dim: expected a whole number of at least 0, got 1.0",
    ),
    # points and contexts
    "no tensor": (
        lambda: flow.log_prob(np.zeros((5, 2))),
        "x: RealNVP expects a floating-point tensor, got ndarray",
    ),
    "integers": (
        lambda: flow.log_prob(x.long()),
        "got a torch.int64 tensor; convert it, for example with .float()",
    ),
    "a point without values": (
        lambda: flow.log_prob(x.to("meta")),
        "x: RealNVP is on the device cpu, got a tensor on meta",
    ),
    "a map without values": (
        lambda: Flow(RealNVP(2).to("meta")).log_prob(x),
        "got a tensor on cpu; move one, for example with .to",
    ),
    "labels as a context": (
        lambda: flow_c.log_prob(x, torch.tensor([1, 2, 0, 1, 1])),
        "context: RealNVP expects a floating-point tensor, got a torch.int64",
    ),
    "a context without values": (
        lambda: flow_c.sample(3, c.to("meta")),
        "context: Flow is on the device cpu, got a tensor on meta",
    ),
    "an array as a context": (
        lambda: flow_c(c.numpy()),
        "context: Flow expects a floating-point tensor, got ndarray",
    ),
    "a number as a context": (
        lambda: flow.sample(3, 4),
        "context: Flow expects none, got int",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Unfinished(2)(x), "Unfinished defines no _forward"),
        (lambda: Unfinished(2).inverse(x), "Unfinished defines no _inverse"),
        (lambda: NoDensity(2).log_prob(x), "NoDensity defines no _log_prob"),
    ],
)
def test_what_a_class_of_ones_own_lacks_is_said(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()
