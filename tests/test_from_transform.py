"""Transforms of torch and Pyro as bijections: every learnable one against autograd."""

import copy
import functools
import math
import pickle

import pyro.distributions as pdist
import pyro.distributions.transforms as T
import pytest
import torch
import torch.distributions as D
from helpers import shaken
from pyro.nn import AutoRegressiveNN
from torch.testing import assert_close

from flowcourse.core import Compose, Flow, Inverse
from flowcourse.coupling import RealNVP
from flowcourse.distributions import TransformBijection, from_transform
from flowcourse.objectives import MaximumLikelihood
from flowcourse.testing import check_bijection
from flowcourse.trainer import fit

DIM, WIDTH = 4, 3
EXACT = 1e-11  # of float64, with room for the slopes of splines
# Pyro adds 1e-8 to what it takes a logarithm of; a polynomial's slope may be small
NEARLY, BARELY = 1e-6, 1e-4


def quadratic_spline_autoregressive(dim):
    """Pyro's own helper asks the network for one parameter too many."""
    return T.SplineAutoregressive(
        dim, AutoRegressiveNN(dim, [8], param_dims=[8, 8, 7]), order="quadratic"
    )


# name: how it is made of a dimension, error of its ladj in float64, whether it goes back
LEARNABLE = {
    "AffineAutoregressive": (T.affine_autoregressive, EXACT, True),
    "AffineAutoregressive stable": (
        lambda d: T.affine_autoregressive(d, stable=True),
        EXACT,
        True,
    ),
    "AffineCoupling": (T.affine_coupling, EXACT, True),
    "BatchNorm": (T.batchnorm, EXACT, True),
    **{
        f"BlockAutoregressive {activation} {residual}": (
            lambda d, a=activation, r=residual: T.block_autoregressive(
                d, activation=a, residual=r
            ),
            NEARLY,
            False,
        )
        for activation, residual in [
            ("tanh", None),
            ("tanh", "normal"),
            ("tanh", "gated"),
            ("ELU", None),
            ("LeakyReLU", None),
            ("sigmoid", None),
        ]
    },
    "GeneralizedChannelPermute": (
        lambda d: T.generalized_channel_permute(channels=d),
        EXACT,
        True,
    ),
    "Householder": (T.householder, EXACT, True),
    "MatrixExponential": (  # as exact as its number of terms allows
        lambda d: T.matrix_exponential(d, iterations=24),
        EXACT,
        True,
    ),
    **{
        f"NeuralAutoregressive {activation}": (
            lambda d, a=activation: T.neural_autoregressive(d, activation=a),
            NEARLY,
            False,
        )
        for activation in ("sigmoid", "ELU", "LeakyReLU", "tanh")
    },
    "Planar": (T.planar, EXACT, False),
    "Polynomial": (T.polynomial, BARELY, False),
    "Radial": (T.radial, EXACT, False),
    "Spline": (T.spline, EXACT, True),
    "Spline quadratic": (lambda d: T.spline(d, order="quadratic"), EXACT, True),
    "SplineAutoregressive": (T.spline_autoregressive, EXACT, True),
    "SplineAutoregressive quadratic": (
        quadratic_spline_autoregressive,
        EXACT,
        True,
    ),
    "SplineCoupling": (T.spline_coupling, EXACT, True),
    "Sylvester": (T.sylvester, NEARLY, False),
}
CONDITIONAL = {
    "ConditionalAffineAutoregressive": (
        T.conditional_affine_autoregressive,
        EXACT,
        True,
    ),
    "ConditionalAffineCoupling": (T.conditional_affine_coupling, EXACT, True),
    "ConditionalGeneralizedChannelPermute": (
        lambda d, c: T.conditional_generalized_channel_permute(c, d),
        EXACT,
        True,
    ),
    "ConditionalHouseholder": (T.conditional_householder, EXACT, True),
    "ConditionalHouseholder two": (
        lambda d, c: T.conditional_householder(d, c, count_transforms=2),
        EXACT,
        True,
    ),
    "ConditionalMatrixExponential": (
        lambda d, c: T.conditional_matrix_exponential(d, c, iterations=24),
        EXACT,
        True,
    ),
    "ConditionalNeuralAutoregressive": (
        T.conditional_neural_autoregressive,
        NEARLY,
        False,
    ),
    "ConditionalPlanar": (T.conditional_planar, EXACT, False),
    "ConditionalRadial": (T.conditional_radial, EXACT, False),
    "ConditionalSpline": (T.conditional_spline, EXACT, True),
    "ConditionalSpline quadratic": (
        lambda d, c: T.conditional_spline(d, c, order="quadratic"),
        EXACT,
        True,
    ),
    "ConditionalSplineAutoregressive": (
        T.conditional_spline_autoregressive,
        EXACT,
        True,
    ),
}


def normal(dim):
    """A standard normal of vectors, in Pyro's words."""
    return pdist.Normal(torch.zeros(dim), 1.0).to_event(1)


EVERY = [*LEARNABLE, *CONDITIONAL]
GO_BACK = [n for n in EVERY if (LEARNABLE | CONDITIONAL)[n][2]]


def made(name, dtype=torch.float64, seed=0):
    """A transform, its bijection, points, contexts, and the error allowed in float64."""
    torch.manual_seed(seed)
    if name in LEARNABLE:
        maker, error, _ = LEARNABLE[name]
        transform, width = maker(DIM), 0
    else:
        maker, error, _ = CONDITIONAL[name]
        transform, width = maker(DIM, WIDTH), WIDTH
    event = (DIM, 2, 2) if "Channel" in name else (DIM,)
    f = from_transform(transform, context_dim=width).to(dtype).eval()
    if name != "Sylvester":  # right for small parameters only
        shaken(f, 0.1)
    z = (torch.rand(5, *event) * 4 - 2).to(dtype)
    context = torch.randn(5, width).to(dtype) if width else None
    if width and "Channel" in name:
        context = context[0]
    return transform, f, z, context, error


def true_ladj(f, z, context):
    """log|det| of autograd's Jacobian, one point at a time."""
    rows = []
    for i, point in enumerate(z):
        c = context[i] if context is not None and context.dim() > 1 else context
        jacobian = torch.autograd.functional.jacobian(
            lambda p, c=c: f.push(p, c), point
        )
        n = point.numel()
        rows.append(torch.linalg.slogdet(jacobian.reshape(n, n)).logabsdet)
    return torch.stack(rows)


def test_every_learnable_transform_of_pyro_is_here():
    kinds = pdist.TransformModule, pdist.ConditionalTransformModule
    names = {
        name
        for name in T.__all__
        if isinstance(getattr(T, name), type)
        and issubclass(getattr(T, name), kinds)
    }
    assert names == {name.split()[0] for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_the_ladj_is_that_of_autograd(name):
    _, f, z, context, error = made(name)
    x, ladj = f.forward(z, context)
    assert x.shape == z.shape and ladj.shape == (5,)
    assert_close(ladj, true_ladj(f, z, context), atol=error, rtol=0)
    small = 1e-5 if name == "Sylvester" else 1e-3
    assert ladj.abs().max() > small or "Householder" in name
    assert torch.equal(f.push(z, context), x)


@pytest.mark.parametrize("name", GO_BACK)
def test_the_way_back(name):
    _, f, z, context, _ = made(name)
    x, ladj = f.forward(z, context)
    back, ladj_back = f.inverse(x, context)
    # the inverse of what autograd finds, and no copy of a pair
    assert back is not z
    assert_close(back, z, atol=1e-10, rtol=0)
    assert_close(ladj_back, -ladj, atol=1e-10, rtol=0)
    g = Inverse(f)
    assert_close(
        g.forward(x, context)[1], true_ladj(g, x, context), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("name", EVERY)
def test_float32_agrees_with_float64(name):
    _, f, z, context, _ = made(name, torch.float32)
    wide = copy.deepcopy(f).double()
    x, ladj = f.forward(z, context)
    c = None if context is None else context.double()
    truth, true = wide.forward(z.double(), c)
    assert x.dtype == ladj.dtype == torch.float32
    # the slopes of the splines' bins, up to some hundreds
    assert_close(x.double(), truth, atol=1e-4, rtol=1e-5)
    assert_close(ladj.double(), true, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in GO_BACK])
def test_what_has_no_inverse_says_what_has_one(name):
    _, f, z, context, _ = made(name)
    kind = name.removeprefix("Conditional").split()[0]
    with pytest.raises(
        ValueError, match=f"x: {kind} has no inverse, only forward; flowcourse"
    ):
        f.inverse(z, context)
    with pytest.raises(ValueError, match="x: .* has no inverse"):
        Flow(f, normal(DIM)).double().log_prob(z, context)
    assert f.inverse_cost == "numerical"


@pytest.mark.parametrize("name", EVERY)
def test_the_density_is_that_of_pyro(name):
    """A flow's samples score as in Pyro's own `TransformedDistribution`."""
    transform, f, _, context, _ = made(name)
    event = (DIM, 2, 2) if "Channel" in name else (DIM,)
    base = pdist.Normal(torch.zeros(event).double(), 1.0).to_event(len(event))
    flow = Flow(f, base)
    z = flow.base.sample(5)
    if context is not None:
        transform = transform.condition(context)
    theirs = pdist.TransformedDistribution(base, [transform])
    x, log_prob = flow.rsample_and_log_prob(
        5 if context is None or context.dim() == 1 else (), context, noise=z
    )
    assert_close(transform(z), x, atol=1e-12, rtol=1e-12)
    assert_close(theirs.log_prob(transform(z)), log_prob, atol=1e-9, rtol=0)
    if name in GO_BACK:
        assert_close(flow.log_prob(x, context), log_prob, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_no_answer_is_kept(name):
    _, f, z, context, _ = made(name)
    x, _ = f.forward(z, context)
    with torch.no_grad():
        for p in f.parameters():
            p.mul_(0.5).add_(0.1 * torch.randn_like(p))
    changed, ladj_changed = f.forward(z, context)
    assert not torch.equal(changed, x)
    # nothing of a call is left in the transform, nor in its parts
    left = [
        v
        for m in f.modules()
        if isinstance(m, D.Transform)
        for v in vars(m).values()
    ]
    left += [t for v in left if isinstance(v, tuple) for t in v]
    assert not any(isinstance(v, torch.Tensor) for v in left)
    twin = copy.deepcopy(f)
    fresh, ladj_fresh = twin.forward(z.clone(), context)
    assert_close(
        (changed, ladj_changed), (fresh, ladj_fresh), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("name", EVERY)
def test_copies_and_saved_states_are_the_map(name):
    transform, f, z, context, _ = made(name)
    x, ladj = f.forward(z, context)
    # what its owner's own calls keep must not stand in the way
    t = transform if context is None else transform.condition(context)
    t(z.requires_grad_())
    z = z.detach()
    anew = from_transform(transform, context_dim=f.context_dim)
    assert anew.state_dict().keys() == f.state_dict().keys()
    for twin in (anew, copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        again, ladj_again = twin.forward(z, context)
        assert_close((again, ladj_again), (x, ladj), atol=1e-12, rtol=1e-12)
        for p in twin.parameters() if twin is not anew else ():
            p.data.zero_()
    assert_close(f.push(z, context), x, atol=1e-12, rtol=1e-12)
    other = made(name, seed=1)[1]
    assert not torch.equal(other.push(z, context), x) or name == "BatchNorm"
    other.load_state_dict(f.state_dict())
    assert_close(other.push(z, context), x, atol=1e-12, rtol=1e-12)
    assert {p.dtype for p in f.float().parameters()} <= {torch.float32}
    assert (
        f.push(z.float(), None if context is None else context.float()).dtype
        == torch.float32
    )


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_every_parameter(name):
    _, f, z, context, _ = made(name)
    z.requires_grad_()
    x, ladj = f.forward(z, context)
    (x.square().sum() + ladj.sum()).backward()
    parameters = dict(f.named_parameters())
    assert parameters
    for key, p in parameters.items():
        assert p.grad is not None and p.grad.isfinite().all(), key
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_batch_shapes(name):
    _, f, z, context, _ = made(name)
    x, ladj = f.forward(z, context)
    deep = torch.stack([z, z.flip(0)], 1)  # batch (5, 2)
    c = context
    if context is not None and context.dim() > 1:
        c = torch.stack([context, context.flip(0)], 1)
    x2, ladj2 = f.forward(deep, c)
    assert ladj2.shape == (5, 2)
    for found, wanted in ((x2, x), (ladj2, ladj)):
        assert_close(found[:, 0], wanted, atol=1e-10, rtol=0)
        assert_close(found[:, 1], wanted.flip(0), atol=1e-10, rtol=0)
    # one point, one context
    one = None if c is None else context.reshape(-1, WIDTH)[0]
    x1, ladj1 = f.forward(z[0], one)
    assert ladj1.shape == ()
    assert_close(x1, x[0], atol=1e-10, rtol=0)
    if context is not None and context.dim() > 1:
        # one point under every context, and contexts that broadcast
        assert f.forward(z[0], context)[1].shape == (5,)
        wide = f.forward(deep, context[:, None])[0]
        assert_close(wide[:, 0], x, atol=1e-10, rtol=0)


def test_one_context_for_all_images():
    """Pyro's conditional channel mixing cannot take a batch of contexts."""
    _, f, z, context, _ = made("ConditionalGeneralizedChannelPermute")
    with pytest.raises(
        ValueError,
        match=r"context: .* expects one for all points, shape \(3,\), got \(5, 3\)",
    ):
        f.forward(z, context.expand(5, -1))


# --- what keeps the contract -------------------------------------------------

CLAMPED = {"gradients": "Pyro's clamp of log-scales has the gradient of none"}
KEEPING = {
    "AffineAutoregressive stable": {},
    "AffineCoupling": CLAMPED | {"batch": "Pyro's reshape of an empty batch"},
    "BatchNorm": {},
    "GeneralizedChannelPermute": {},
    "Householder": {},
    "Spline": {},
    "Spline quadratic": {},
    "SplineCoupling": {},
    "ConditionalHouseholder": {},
    "ConditionalMatrixExponential": {},
}


@pytest.mark.parametrize("name", KEEPING)
def test_the_contract_is_kept(name):
    _, f, z, context, _ = made(name)
    exempt = KEEPING[name] | {"identity": "a random start"}
    assert check_bijection(f, z, context, levels=(0.0,), exempt=exempt).ok


# --- plain transforms of torch -------------------------------------------------


def positive(*shape):
    return torch.rand(*shape) + 0.5


PLAIN = {
    "affine": lambda: T.AffineTransform(torch.randn(3), positive(3)),
    "affine of vectors": lambda: T.AffineTransform(0.5, -2.0, event_dim=1),
    "exp": T.ExpTransform,
    "power": lambda: T.ComposeTransform(
        [T.ExpTransform(), T.PowerTransform(positive(3))]
    ),
    "odd power": lambda: T.PositivePowerTransform(2),
    "sigmoid": T.SigmoidTransform,
    "tanh": T.TanhTransform,
    "softplus": T.SoftplusTransform,
    "leaky relu": T.LeakyReLUTransform,
    "haar": T.HaarTransform,
    "cosine": T.DiscreteCosineTransform,
    "permute": lambda: T.permute(3),
    "cdf": lambda: T.CumulativeDistributionTransform(
        D.Normal(torch.randn(3), positive(3))
    ),
    "cholesky affine": lambda: T.LowerCholeskyAffine(
        torch.randn(3), torch.eye(3) + torch.ones(3, 3).tril(-1)
    ),
    "ordered": T.OrderedTransform,
    "inverse": lambda: T.AffineTransform(torch.randn(3), positive(3)).inv,
    "learnable inverse": lambda: T.affine_autoregressive(3).inv,
    "chain": lambda: T.ComposeTransform(
        [
            T.AffineTransform(torch.randn(3), positive(3)),
            T.spline_coupling(3),
            T.permute(3),
            T.SigmoidTransform(),
        ]
    ),
    "chain of modules": lambda: pdist.ComposeTransformModule(
        [
            T.AffineTransform(torch.randn(3), positive(3)),
            T.affine_coupling(3),
            T.spline(3),
        ]
    ),
    "twice the same": lambda: T.ComposeTransform(
        [(t := T.affine_autoregressive(3)), t]
    ),
    "independent": lambda: T.IndependentTransform(
        T.AffineTransform(torch.randn(3), positive(3)), 1
    ),
    "side by side": lambda: T.CatTransform(
        [T.spline(2), T.AffineTransform(torch.randn(1), positive(1))],
        dim=-1,
        lengths=[2, 1],
    ),
    "one each": lambda: T.StackTransform(
        [
            T.ExpTransform(),
            T.TanhTransform(),
            T.AffineTransform(torch.tensor(1.0), 2.0),
        ],
        dim=-1,
    ),
    "ours": lambda: RealNVP(3).as_transform(),
    "ours in a chain": lambda: T.ComposeTransform(
        [RealNVP(3).as_transform(cache_size=1), T.ExpTransform()]
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transforms(name):
    torch.manual_seed(0)
    transform = PLAIN[name]()
    if "ours" == name:
        f = TransformBijection(transform).double()
    else:
        f = from_transform(transform).double()
    z = torch.randn(5, 3, dtype=torch.float64)
    x, ladj = f.forward(z)
    assert ladj.shape == (5,)
    assert_close(ladj, true_ladj(f, z, None), atol=1e-10, rtol=1e-10)
    back, ladj_back = f.inverse(x)
    assert_close(back, z, atol=1e-9, rtol=0)
    assert_close(ladj_back, -ladj, atol=1e-9, rtol=0)
    assert f.domain.check(z).all() and f.codomain.check(x).all()
    assert f.event_dim == f.event_dim_out == f.domain.event_dim == 1
    single = TransformBijection(PLAIN[name]())
    # nothing is left in torch's default format, and copies are the map
    tensors = [*f.parameters(), *f.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} <= {
        torch.float64
    }
    for twin in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert torch.equal(twin.push(z), x)
    single.double().load_state_dict(f.state_dict())
    assert torch.equal(single.push(z), x) or "permute" in name


# --- in our own hands ----------------------------------------------------------


def test_chains_of_both_kinds_learn_what_pyro_learns():
    """`fit` trains Pyro's parameters, those of the transform itself."""
    torch.manual_seed(0)
    spline, loc = T.conditional_spline(2, 1), torch.nn.Parameter(torch.zeros(2))
    affine = T.AffineTransform(loc, torch.tensor(1.0))
    flow = Flow(
        Compose(
            from_transform(
                T.affine_coupling(2, hidden_dims=[8]), event_shape=2
            ),
            RealNVP(2, 1, hidden=(8,)),
            from_transform(spline, context_dim=1),
            from_transform(affine),
        )
    )
    assert any(p is loc for p in flow.parameters())
    assert {id(p) for p in spline.parameters()} <= {
        id(p) for p in flow.parameters()
    }
    context = torch.rand(512, 1)
    rows = 3.0 + context + 0.5 * torch.randn(512, 2)
    before = [p.clone() for p in (loc, *spline.parameters())]
    fit(
        MaximumLikelihood(flow),
        (rows, context),
        steps=150,
        batch_size=256,
        lr=3e-2,
        progress=False,
    )
    # entropy of two normals of sd 0.5
    entropy = 1 + math.log(2 * math.pi * 0.25)
    loss = -flow.log_prob(rows, context).mean().item()
    assert entropy - 0.15 < loss < entropy + 0.35
    for old, new in zip(before, (loc, *spline.parameters())):
        assert not torch.equal(old, new)


def test_batch_norm_follows_its_mode():
    norm = T.batchnorm(3)
    f, x = from_transform(norm).double(), torch.randn(50, 3).double() + 2.0
    z, ladj = f.inverse(x)  # in training the batch's own mean and variance
    assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    assert_close(
        ladj,
        (1e-6 + 1 - 0.5 * (x.var(0) + 1e-5).log() * 0 + 0).new_zeros(50)
        if False
        else (math.log1p(1e-6) - 0.5 * (x.var(0) + 1e-5).log())
        .sum()
        .expand(50),
    )
    assert norm.moving_mean.abs().max() > 0.1
    moved = norm.moving_mean.clone()
    f.eval()
    assert not norm.training
    z, _ = f.inverse(x)
    assert z.mean() > 1.0 and torch.equal(norm.moving_mean, moved)
    norm.train()
    assert not torch.equal(f.inverse(x)[0], z)


def test_dimensions_of_a_point():
    scale = torch.tensor([1.0, 2.0, 3.0])
    f = from_transform(T.AffineTransform(0.0, scale))
    g = from_transform(T.AffineTransform(0.0, scale), event_dim=2)
    z = torch.randn(4, 2, 3)
    assert f.forward(z)[1].shape == (4, 2) and g.forward(z)[1].shape == (4,)
    assert_close(g.forward(z)[1], f.forward(z)[1].sum(-1))
    assert g.domain.event_dim == g.codomain.event_dim == 2
    split = from_transform(T.ReshapeTransform((6,), (2, 3)))
    assert (split.event_shape, split.event_dim_out) == ((6,), 2)
    flow = Flow(Compose(split, g))
    assert flow.event_shape == (2, 3) and flow.sample(5).shape == (5, 2, 3)
    assert_close(
        flow.log_prob(torch.zeros(2, 3)),
        torch.tensor(-3 * math.log(2 * math.pi) - 2 * math.log(6.0)),
    )
    grown = Flow(from_transform(T.StickBreakingTransform(), event_shape=2))
    assert grown.event_shape == (3,)
    x = grown.sample(5)
    theirs = D.TransformedDistribution(normal(2), [T.StickBreakingTransform()])
    assert_close(grown.log_prob(x), theirs.log_prob(x))
    matrix = from_transform(T.CorrCholeskyTransform(), event_shape=3)
    x, ladj = matrix.forward(torch.randn(5, 3))
    assert (
        x.shape == (5, 3, 3)
        and ladj.shape == (5,)
        and matrix.event_dim_out == 2
    )
    assert_close(matrix.inverse(x)[1], -ladj, atol=1e-5, rtol=0)


def test_densities_are_zero_where_no_point_comes():
    flow = Flow(from_transform(T.ExpTransform(), event_shape=2))
    x = torch.tensor([[1.0, -1.0], [1.0, 2.0]])
    mixed = T.CatTransform([T.identity_transform, T.ExpTransform()], dim=-1)
    for each in (flow, Flow(from_transform(mixed))):
        outside, inside = each.log_prob(x).tolist()
        assert outside == -math.inf and math.isfinite(inside)
    with pytest.raises(ValueError, match=r"bijections\[1\].*takes points"):
        Compose(
            from_transform(T.AffineTransform(0.0, 1.0)),
            from_transform(T.ExpTransform().inv),
        )


def test_what_as_transform_made_comes_back():
    f = RealNVP(2)
    assert from_transform(f.as_transform(cache_size=1)) is f
    back = from_transform(f.as_transform().inv)
    assert isinstance(back, Inverse) and back.bijection is f
    g = RealNVP(2, context_dim=1)
    fixed = from_transform(g.as_transform(torch.ones(1)))
    z = torch.randn(4, 2)
    assert fixed.context_dim == 0
    assert_close(fixed.forward(z), g.forward(z, torch.ones(1)))
    # there and back again, through Pyro
    spline = from_transform(T.spline(2))
    d = pdist.TransformedDistribution(normal(2), [spline.as_transform()])
    x = d.sample((5,))
    # the slopes of bins, times float32
    assert_close(d.log_prob(x), Flow(spline).log_prob(x), atol=1e-3, rtol=0)
    assert from_transform(spline.as_transform()) is spline


def test_conditional_chains():
    chain = pdist.conditional.ConditionalComposeTransformModule(
        [
            T.conditional_planar(2, 3),
            T.AffineTransform(torch.zeros(2), torch.ones(2)),
            T.conditional_affine_coupling(2, 3).inv,
        ]
    )
    f = from_transform(chain, context_dim=3).double()
    z, context = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    x, ladj = f.forward(z, context)
    assert_close(ladj, true_ladj(f, z, context), atol=1e-11, rtol=0)
    assert {b.dtype for b in f.buffers()} == {torch.float64}
    with pytest.raises(ValueError, match="x: Planar has no inverse"):
        f.inverse(x, context)


# --- what is refused -------------------------------------------------------------


class Hiding(D.Transform):
    """Holds its numbers where nobody can find them."""

    bijective = True
    domain = codomain = D.constraints.real

    def __init__(self, function):
        super().__init__()
        self.function = function


def adding(what):
    """A function that holds a tensor where nobody can find it."""
    return lambda x: x + what


moving = torch.zeros(2, requires_grad=True)
REFUSED = {
    "no transform": (
        (torch.exp,),
        {},
        "transform: expected a transform of torch or Pyro",
    ),
    "a class": ((T.ExpTransform,), {}, "transform: expected a transform"),
    "ours": ((RealNVP(2),), {}, "transform: expected a transform"),
    "abs": (
        (T.AbsTransform(),),
        {},
        "expected a bijective one, got AbsTransform",
    ),
    "softmax": ((T.SoftmaxTransform(),), {}, "expected a bijective one"),
    "in a chain": (
        (T.ComposeTransform([T.ExpTransform(), T.AbsTransform()]),),
        {},
        "expected a bijective one",
    ),
    "no width": (
        (T.conditional_planar(2, 3),),
        {},
        "context_dim: ConditionalPlanar expects 3 features, got 0",
    ),
    "wrong width": (
        (T.conditional_affine_coupling(2, 3),),
        {"context_dim": 4},
        "ConditionalAffineCoupling expects 3 features, got 4",
    ),
    "width for nothing": (
        (T.planar(2),),
        {"context_dim": 3},
        "context_dim: Planar expects 0 features, got 3",
    ),
    "conditioned": (
        (T.conditional_planar(2, 3).condition(torch.zeros(3)),),
        {},
        "transform: transform_params is a partial",
    ),
    "conditioned module": (
        (T.conditional_affine_coupling(2, 3).condition(torch.zeros(3)),),
        {},
        "transform: transform_nn is a partial",
    ),
    "too few dimensions": (
        (T.planar(2),),
        {"event_dim": 0},
        "event_dim: expected a whole number of at least 1, got 0",
    ),
    "fewer than its own": (
        (T.generalized_channel_permute(),),
        {"event_dim": 2},
        "event_dim: expected a whole number of at least 3",
    ),
    "another size": (
        (T.planar(2),),
        {"event_shape": 3},
        r"event_shape: Planar expects \(2,\), got \(3,\)",
    ),
    "another dimension": (
        (T.ExpTransform(),),
        {"event_shape": (2, 3)},
        "event_shape: ExpTransform expects 1 dimensions",
    ),
    "numbers of a batch": (
        (T.AffineTransform(torch.zeros(5, 2), 1.0),),
        {"event_shape": 2},
        "event_dim: AffineTransform makes",
    ),
    "counted from the left": (
        (T.CatTransform([T.ExpTransform()] * 2),),
        {},
        "CatTransform counts dim=0",
    ),
    "in front of a point": (
        (T.StackTransform([T.ExpTransform()] * 2, dim=-2),),
        {},
        "StackTransform counts dim=-2",
    ),
    "no parameter": (
        (T.AffineTransform(moving, 1.0),),
        {},
        "transform: transform_loc requires a gradient",
    ),
    "hidden": (
        (Hiding(adding(moving)),),
        {},
        "transform: transform_function is a function",
    ),
    "hidden in a partial": (
        (Hiding(functools.partial(torch.add, moving)),),
        {},
        "transform: transform_function is a partial",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    arguments, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        from_transform(*arguments, **settings)


def test_points_and_contexts_that_do_not_fit():
    f = from_transform(T.conditional_spline(2, 3), context_dim=3)
    for arguments, message in (
        (
            (torch.zeros(5, 3), torch.zeros(3)),
            "z: TransformBijection expects last dimension 2",
        ),
        (
            (torch.zeros(5, 2), torch.zeros(4)),
            "context: TransformBijection expects last dimension 3",
        ),
        (
            (torch.zeros(5, 2), None),
            r"context: TransformBijection expects shape \(\*batch, 3\)",
        ),
        ((torch.zeros(5, 2).double(), torch.zeros(3)), "holds torch.float32"),
        ((torch.zeros(5, 2), torch.zeros(4, 3)), "context: batch shape"),
    ):
        with pytest.raises(ValueError, match=message):
            f.forward(*arguments)
    wide = from_transform(T.AffineTransform(torch.zeros(5, 2), 1.0))
    with pytest.raises(
        ValueError, match="event_dim: AffineTransform leads from shape"
    ):
        wide.forward(torch.zeros(2))


@pytest.mark.parametrize(
    "name", ["Planar", "SplineCoupling", "ConditionalSpline"]
)
def test_other_parameters_can_be_lent(name):
    """As `torch.func` does it: for one call, without touching the module."""
    _, f, z, context, _ = made(name)
    x = f.push(z, context)
    lent = {k: 0.5 * p.detach() for k, p in f.named_parameters()}
    found = torch.func.functional_call(f, lent, (z, context))
    twin = copy.deepcopy(f)
    twin.load_state_dict(lent, strict=False)
    assert_close(found, twin.forward(z, context), atol=1e-12, rtol=1e-12)
    assert not torch.equal(found[0], x) and torch.equal(f.push(z, context), x)


def test_costs():
    iaf, planar = T.affine_autoregressive(3), T.planar(3)
    for transform, costs in (
        (T.affine_coupling(3), ("one pass", "one pass")),
        (iaf, ("one pass", "D passes")),
        (iaf.inv, ("D passes", "one pass")),
        (T.spline_autoregressive(3), ("one pass", "D passes")),
        (T.ComposeTransform([iaf, planar.inv]), ("numerical", "D passes")),
    ):
        f = from_transform(transform)
        assert (f.forward_cost, f.inverse_cost) == costs
    back = from_transform(planar.inv)
    x = planar(z := torch.randn(5, 3))
    with pytest.raises(
        ValueError, match="z: Planar has no forward, only inverse"
    ):
        back.forward(x)
    assert_close(back.inverse(z)[0], x)


def test_a_map_is_made_on_another_device():
    """Of transforms that can be made there: Pyro's networks cannot."""

    def create():
        return Compose(
            from_transform(T.householder(4)),
            from_transform(T.AffineTransform(torch.zeros(4), torch.ones(4))),
        )

    with torch.device("meta"):
        there = create()
    assert {t.device.type for t in there.state_dict().values()} == {"meta"}
    here, z = create(), torch.randn(5, 4)
    x, ladj = there.forward(z.to("meta"))
    assert x.is_meta and ladj.shape == (5,)
    there.load_state_dict(here.state_dict(), assign=True)
    assert_close(there.forward(z), here.forward(z))
