"""What is timed: each case, the models that compete in it, and the floor that none can go below.

Every model of a case does the same work: the same dimension, layers, hidden widths, bins, batch and
dtype, ReLU between layers, a standard normal base, no batch normalisation, no permutation that costs
something. Where a library's parts do not allow that, the contestant's `note` says what differs, and
the page shows it. Models are built from a library's layers and not by its ready-made constructors,
which choose residual networks and other sizes.

`log_prob` is the way from data to base and `sample` the way back. Autoregressive layers have one
direction of one pass, and every library's is put where `log_prob` needs it; normflows and Pyro name
their classes for the other arrangement.

Continuous flows are compared at equal error: each takes the loosest tolerance of `TOLERANCES` whose
largest error over rows is at most `ALLOWED`, of log-densities where those are timed and of points
where samples are. What a solver or a search costs depends on the weights, so such cases are timed
both as made and after some steps of training. Denormal numbers are flushed for everybody.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowcourse.autoregressive import MAF
from flowcourse.conditioners import convnet
from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Flow
from flowcourse.coupling import Couplings, RealNVP
from flowcourse.elementwise import AffineMap, mlp
from flowcourse.images import Glow
from flowcourse.planar import Planar
from flowcourse.residual import ResidualFlow
from flowcourse.schedules import SDE
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.stochastic import FlowMatching

OURS, FLOOR = "flowcourse", "floor"
PACKAGES = {
    "nflows": "nflows",
    "normflows": "normflows",
    "zuko": "zuko",
    "FrEIA": "FrEIA",
}
PACKAGES |= {"Pyro": "pyro", "torchdiffeq": "torchdiffeq", OURS: "flowcourse"}
PACKAGES |= {"flow_matching": "flow_matching"}
BOUND = 3.0  # of the box of every spline


class Density(nn.Module):
    """A model that is trained by maximum likelihood; a subclass says `log_prob` and `sample`."""

    def loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood of a batch."""
        return -self.log_prob(x).mean()

    def after_step(self):
        """What the library wants done after every step of the optimiser."""

    def prepare(self, mode: str):
        """What has to be set before a mode is timed; nothing by default."""


class Pushed(nn.Module):
    """A model whose samples come with their log-determinant; a subclass says `push`."""

    log_prob = None

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def loss(self, z: Tensor, *context: Tensor) -> Tensor:
        """Reverse Kullback-Leibler divergence to the standard normal, but for constants."""
        x, ladj = self.push(z, *context)
        return (x.square().sum(-1) / 2 - ladj).mean()

    def sample(self, n: int, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Draw points, and the log-determinants at them."""
        return self.push(torch.randn(n, self.dim), *context)

    def after_step(self):
        """Nothing."""

    prepare = Density.prepare


class Conditioner(nn.Sequential):
    """Two hidden layers and ReLU, for every library that takes a network from outside."""

    def __init__(self, n_in, n_out, hidden):
        super().__init__(
            nn.Linear(n_in, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, n_out),
        )
        # by its root nflows and normflows divide the raw sizes
        self.hidden_features = hidden

    def forward(self, x, context=None):
        return super().forward(x)


class ConvConditioner(nn.Sequential):
    """Glow's network: windows of 3, 1 and 3."""

    def __init__(self, n_in, n_out, hidden):
        super().__init__(
            nn.Conv2d(n_in, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, n_out, 3, padding=1),
        )

    def forward(self, x, context=None):
        return super().forward(x)


def awake(module: nn.Module) -> nn.Module:
    """Give weights that start at zero small random values, so that every spline has work to do."""
    for p in module.parameters():
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, std=0.1 / math.sqrt(p[0].numel()))
    return module


def turned(dim: int, i: int) -> Tensor:
    """The order of coordinates of autoregressive layer `i`: upwards, then downwards."""
    order = torch.arange(dim)
    return order if i % 2 == 0 else order.flip(0)


# --- The libraries' flows, each behind `log_prob` and `sample`
# -----------------------------------


class Ours(Density):
    """A flow of flowcourse."""

    def __init__(self, bijection):
        super().__init__()
        self.flow = Flow(bijection)

    def log_prob(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n)


class Nflows(Density):
    """A flow of nflows; its `forward` leads from data to base."""

    def __init__(self, transform, dim):
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow

        super().__init__()
        self.flow = Flow(transform, StandardNormal([dim]))

    def log_prob(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n)


class Normflows(Density):
    """A flow of normflows; samples come with their log-density, which it always computes."""

    def __init__(self, flows, dim, lipschitz=False):
        import normflows as nf

        super().__init__()
        base = nf.distributions.DiagGaussian(dim, trainable=False)
        self.flow, self.lipschitz = nf.NormalizingFlow(base, flows), lipschitz

    def log_prob(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n)[0]

    def after_step(self):
        if self.lipschitz:
            import normflows as nf

            nf.utils.update_lipschitz(self.flow, 5)


class Zuko(Density):
    """A flow of zuko; its transforms lead from data to base."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def log_prob(self, x):
        return self.flow().log_prob(x)

    def sample(self, n):
        return self.flow().sample((n,))


def zuko_flow(transforms, dim):
    """Put transforms of zuko before a standard normal base."""
    import zuko

    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal,
        torch.zeros(dim),
        torch.ones(dim),
        buffer=True,
    )
    return Zuko(zuko.lazy.Flow(transforms, base))


class Freia(Density):
    """A sequence of FrEIA before a standard normal base, which it leaves to the user."""

    def __init__(self, inn, dim):
        super().__init__()
        self.inn, self.dim = inn, dim

    def log_prob(self, x):
        z, ladj = self.inn(x)
        return ladj - (z.square() + math.log(2 * math.pi)).sum(-1) / 2

    def sample(self, n):
        return self.inn(torch.randn(n, self.dim), rev=True, jac=False)[0]


class Pyro(Density):
    """A transformed distribution of Pyro."""

    def __init__(self, transforms, dim, inverted=False):
        import pyro.distributions as dist

        super().__init__()
        self.parts = nn.ModuleList(transforms)
        base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
        steps = [t.inv for t in transforms] if inverted else list(transforms)
        self.flow = dist.TransformedDistribution(
            base, steps, validate_args=False
        )

    def log_prob(self, x):
        # its layers keep the last pair, known by identity
        return self.flow.log_prob(x.clone())

    def sample(self, n):
        return self.flow.sample((n,))


# --- Floors
# --------------------------------------------------------------------------------------


class Networks(Density):
    """The bare conditioners, each applied once: what a flow computes besides is its overhead."""

    def __init__(self, networks, n_in):
        super().__init__()
        self.networks, self.n_in = nn.ModuleList(networks), n_in

    def log_prob(self, x):
        total = 0.0
        for network in self.networks:
            total = total + network(x[..., : self.n_in]).sum(-1)
        return total

    def sample(self, n):
        return self.log_prob(torch.randn(n, self.n_in))


class Products(Pushed):
    """Two matrix products and a tanh: a planar stack could not do with less."""

    def __init__(self, dim, layers):
        super().__init__(dim)
        self.w, self.u = (
            nn.Parameter(torch.randn(layers, dim) / dim) for _ in range(2)
        )
        self.b = nn.Parameter(torch.zeros(layers))

    def push(self, z):
        h = torch.addmm(self.b, z, self.w.T).tanh()
        return z + h @ self.u, h.sum(-1)


class AmortisedProducts(Pushed):
    """The network that makes the parameters, and the same two products for every sample."""

    def __init__(self, dim, layers, features):
        super().__init__(dim)
        self.layers = layers
        self.net = nn.Linear(features, layers * (2 * dim + 1))

    def push(self, z, features):
        raw = self.net(features).unflatten(-1, (self.layers, -1))
        w, u, b = raw.split([self.dim, self.dim, 1], -1)
        h = torch.baddbmm(b, w, z.unsqueeze(-1)).tanh()
        return z + (u.mT @ h).squeeze(-1), h.sum((-1, -2))


# --- Couplings
# -----------------------------------------------------------------------------------


def coupling_floor(params, dim, layers, hidden, **_):
    """One conditioner for each layer, from half of the coordinates."""
    n_out = dim // 2 * params
    return Networks(
        [Conditioner(dim // 2, n_out, hidden) for _ in range(layers)], dim // 2
    )


def spline_params(bins):
    """Raw parameters of a rational-quadratic spline with linear tails, for each coordinate."""
    return 3 * bins - 1


def rqs_floor(bins, **sizes):
    return coupling_floor(spline_params(bins), **sizes)


def rqs_ours(dim, layers, hidden, bins, **_):
    conditioner = partial(mlp, activation=nn.ReLU)
    scalar_map = RationalQuadraticSplineMap(bins, BOUND)
    return Ours(
        Couplings(
            dim,
            layers,
            scalar_map=scalar_map,
            hidden=(hidden, hidden),
            conditioner=conditioner,
        )
    )


def rqs_nflows(dim, layers, hidden, bins, **_):
    from nflows import transforms

    steps = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            (torch.arange(dim) + i) % 2,
            lambda n_in, n_out: Conditioner(n_in, n_out, hidden),
            num_bins=bins,
            tails="linear",
            tail_bound=BOUND,
        )
        for i in range(layers)
    ]
    return Nflows(transforms.CompositeTransform(steps), dim)


def rqs_normflows(dim, layers, hidden, bins, **_):
    from normflows.flows.base import Reverse
    from normflows.flows.neural_spline.coupling import (
        PiecewiseRationalQuadraticCoupling,
    )

    steps = [
        Reverse(
            PiecewiseRationalQuadraticCoupling(
                (torch.arange(dim) + i) % 2,
                lambda n_in, n_out: Conditioner(n_in, n_out, hidden),
                num_bins=bins,
                tails="linear",
                tail_bound=BOUND,
            )
        )
        for i in range(layers)
    ]
    return Normflows(steps, dim)


def zuko_couplings(dim, layers, hidden, **options):
    from zuko.flows.coupling import GeneralCouplingTransform

    masks = [(torch.arange(dim) + i) % 2 == 0 for i in range(layers)]
    steps = [
        GeneralCouplingTransform(
            dim, mask=mask, hidden_features=(hidden, hidden), **options
        )
        for mask in masks
    ]
    return zuko_flow(steps, dim)


def zuko_spline(bins):
    from zuko.transforms import MonotonicRQSTransform

    univariate = partial(MonotonicRQSTransform, bound=BOUND)
    return {"univariate": univariate, "shapes": [(bins,), (bins,), (bins - 1,)]}


def rqs_zuko(dim, layers, hidden, bins, **_):
    return zuko_couplings(dim, layers, hidden, **zuko_spline(bins))


def rqs_pyro(dim, layers, hidden, bins, **_):
    from pyro.distributions.transforms import SplineCoupling
    from pyro.nn import DenseNN

    half = dim // 2
    outputs = [half * bins, half * bins, half * (bins - 1)]
    steps = [
        SplineCoupling(
            dim,
            half,
            DenseNN(half, [hidden, hidden], outputs),
            bins,
            BOUND,
            order="quadratic",
            identity=True,
        )
        for _ in range(layers)
    ]
    for step in steps:  # made in any case, and not used
        step.lower_spline = None
    return Pyro(steps, dim)


def nvp_ours(dim, layers, hidden, **_):
    return Ours(
        RealNVP(
            dim,
            layers,
            hidden=(hidden, hidden),
            conditioner=partial(mlp, activation=nn.ReLU),
        )
    )


def nvp_nflows(dim, layers, hidden, **_):
    from nflows import transforms

    steps = [
        transforms.AffineCouplingTransform(
            (torch.arange(dim) + i) % 2,
            lambda n_in, n_out: Conditioner(n_in, n_out, hidden),
        )
        for i in range(layers)
    ]
    return Nflows(transforms.CompositeTransform(steps), dim)


def nvp_normflows(dim, layers, hidden, **_):
    from normflows.flows import AffineCouplingBlock

    modes = ("channel", "channel_inv")
    steps = [
        AffineCouplingBlock(
            Conditioner(dim // 2, dim, hidden), split_mode=modes[i % 2]
        )
        for i in range(layers)
    ]
    return Normflows(steps, dim)


def nvp_freia(dim, layers, hidden, **_):
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock

    inn = SequenceINN(dim)
    for _ in range(layers // 2):
        inn.append(
            GLOWCouplingBlock,
            subnet_constructor=lambda n_in, n_out: Conditioner(
                n_in, n_out, hidden
            ),
            clamp_activation="TANH",
            clamp=3.0,
        )
    return Freia(inn, dim)


def nvp_pyro(dim, layers, hidden, **_):
    from pyro.distributions.transforms import AffineCoupling
    from pyro.nn import DenseNN

    half = dim // 2
    steps = [
        AffineCoupling(half, DenseNN(half, [hidden, hidden], [half, half]))
        for _ in range(layers)
    ]
    return Pyro(steps, dim)


# --- Autoregressive flows
# ------------------------------------------------------------------------


def autoregressive_floor(params, dim, layers, hidden, **_):
    """One network for each layer, its weights without masks."""
    return Networks(
        [Conditioner(dim, dim * params, hidden) for _ in range(layers)], dim
    )


def ar_rqs_floor(bins, **sizes):
    return autoregressive_floor(spline_params(bins), **sizes)


def maf_ours(dim, layers, hidden, scalar_map=None, **_):
    scalar_map = scalar_map or AffineMap()
    return Ours(
        MAF(
            dim,
            layers,
            hidden=(hidden, hidden),
            scalar_map=scalar_map,
            activation=nn.ReLU,
        )
    )


def ar_rqs_ours(bins, **sizes):
    return maf_ours(scalar_map=RationalQuadraticSplineMap(bins, BOUND), **sizes)


def plain_made(hidden):
    """What nflows and normflows want to hear for two hidden layers that are not residual."""
    return {
        "hidden_features": hidden,
        "num_blocks": 1,
        "use_residual_blocks": False,
    }


def maf_nflows(dim, layers, hidden, **_):
    from nflows import transforms

    make = transforms.MaskedAffineAutoregressiveTransform
    steps = [make(dim, **plain_made(hidden)) for _ in range(layers)]
    return Nflows(transforms.CompositeTransform(steps), dim)


def maf_normflows(dim, layers, hidden, **_):
    from normflows.flows import MaskedAffineAutoregressive
    from normflows.flows.base import Reverse

    make = MaskedAffineAutoregressive
    return Normflows(
        [Reverse(make(dim, **plain_made(hidden))) for _ in range(layers)], dim
    )


def maf_zuko(dim, layers, hidden, **options):
    from zuko.flows import MaskedAutoregressiveTransform

    options.pop("batch", None)
    steps = [
        MaskedAutoregressiveTransform(
            dim,
            order=turned(dim, i),
            hidden_features=(hidden, hidden),
            **options,
        )
        for i in range(layers)
    ]
    return zuko_flow(steps, dim)


def maf_pyro(dim, layers, hidden, **_):
    from pyro.distributions.transforms import AffineAutoregressive
    from pyro.nn import AutoRegressiveNN

    steps = [
        AffineAutoregressive(
            AutoRegressiveNN(dim, [hidden, hidden], permutation=turned(dim, i))
        )
        for i in range(layers)
    ]
    return Pyro(steps, dim, inverted=True)


def spline_options(bins):
    """What nflows and normflows want to hear for the splines of all others."""
    return {"num_bins": bins, "tails": "linear", "tail_bound": BOUND}


def ar_rqs_nflows(dim, layers, hidden, bins, **_):
    from nflows import transforms

    options = plain_made(hidden) | spline_options(bins)
    make = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    steps = [make(features=dim, **options) for _ in range(layers)]
    return Nflows(transforms.CompositeTransform(steps), dim)


def ar_rqs_normflows(dim, layers, hidden, bins, **_):
    from normflows.flows.base import Reverse
    from normflows.flows.neural_spline.autoregressive import (
        MaskedPiecewiseRationalQuadraticAutoregressive as Layer,
    )

    options = plain_made(hidden) | spline_options(bins)
    return Normflows(
        [Reverse(Layer(features=dim, **options)) for _ in range(layers)], dim
    )


def ar_rqs_zuko(bins, **sizes):
    return maf_zuko(**sizes, **zuko_spline(bins))


def ar_rqs_pyro(dim, layers, hidden, bins, **_):
    from pyro.distributions.transforms import SplineAutoregressive
    from pyro.nn import AutoRegressiveNN

    outputs = [bins, bins, bins - 1]
    steps = [
        SplineAutoregressive(
            dim,
            AutoRegressiveNN(
                dim,
                [hidden, hidden],
                param_dims=outputs,
                permutation=turned(dim, i),
            ),
            bins,
            BOUND,
            order="quadratic",
        )
        for i in range(layers)
    ]
    for step in steps:  # the same network under a second name
        del step.spline.nn
        step.spline.__dict__["nn"] = step.arn
    return Pyro(steps, dim, inverted=True)


# --- Planar flows
# --------------------------------------------------------------------------------


class OurPlanar(Pushed):
    """flowcourse's stack, with free or with amortised parameters."""

    def __init__(self, dim, layers, features=0):
        super().__init__(dim)
        self.stack = Planar(dim, layers, context_dim=features, hidden=())

    def push(self, z, *features):
        return self.stack.forward(z, *features)


class LayerByLayer(Pushed):
    """Layers that give their log-determinant with the point, as in normflows."""

    def __init__(self, dim, steps):
        super().__init__(dim)
        self.steps = nn.ModuleList(steps)

    def push(self, z):
        total = 0.0
        for step in self.steps:
            z, ladj = step(z)
            total = total + ladj
        return z, total


class PyroPlanar(Pushed):
    """Pyro's planar layers; conditional ones make their parameters one layer after another."""

    def __init__(self, dim, layers, features=0):
        from pyro.distributions.transforms import ConditionalPlanar, Planar

        super().__init__(dim)
        if features:
            self.nets = nn.ModuleList(
                PlanarParameters(dim, features) for _ in range(layers)
            )
            self.steps = [ConditionalPlanar(net) for net in self.nets]
        else:
            self.steps = nn.ModuleList(Planar(dim) for _ in range(layers))

    def push(self, z, *features):
        steps = (
            [s.condition(*features) for s in self.steps]
            if features
            else self.steps
        )
        return through(steps, z.clone())


class PyroPlanarAtOnce(Pushed):
    """Pyro's conditioned layers, fed by one product for all layers, which is quicker."""

    def __init__(self, dim, layers, features):
        super().__init__(dim)
        self.layers = layers
        self.net = nn.Linear(features, layers * (2 * dim + 1))

    def push(self, z, features):
        from pyro.distributions.transforms.planar import ConditionedPlanar

        raw = self.net(features).unflatten(-1, (self.layers, -1)).unbind(-2)
        steps = [
            ConditionedPlanar(r.split([1, self.dim, self.dim], -1)) for r in raw
        ]
        return through(steps, z.clone())


class PlanarParameters(nn.Linear):
    """A linear map from features to b, u and w of one layer."""

    def __init__(self, dim, features):
        super().__init__(features, 2 * dim + 1)
        self.dim = dim

    def forward(self, features):
        return super().forward(features).split([1, self.dim, self.dim], -1)


def through(steps, z):
    """Send points through transforms of torch's interface, and add their log-determinants."""
    total = 0.0
    for step in steps:
        x = step(z)
        total = total + step.log_abs_det_jacobian(z, x)
        z = x
    return z, total


def planar_normflows(dim, layers, **_):
    from normflows.flows import Planar

    return LayerByLayer(dim, [Planar((dim,)) for _ in range(layers)])


# --- Continuous flows
# ----------------------------------------------------------------------------


class Velocity(nn.Module):
    """The network of zuko's continuous flow: time as three sines and cosines, ELU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.register_buffer("freqs", torch.arange(1, 4) * math.pi)
        self.net = nn.Sequential(
            nn.Linear(dim + 6, hidden),
            nn.ELU(),
            nn.Linear(hidden, hidden),
            nn.ELU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, t, x):
        angle = self.freqs * t
        time = torch.cat([angle.cos(), angle.sin()]).expand(*x.shape[:-1], -1)
        return self.net(torch.cat([time, x], -1))


TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ALLOWED = 1e-3  # the largest error of a row


class Solved(Density):
    """A model with a solver inside; a subclass says `set_tolerance` and `push` as well."""

    tolerances: dict[str, float] | None = None  # Of each mode, once chosen
    exact = True  # Whether the trace is

    def prepare(self, mode):
        if self.tolerances:
            self.set_tolerance(self.tolerances[mode])

    def set_trace(self, exact: bool):
        """Take the exact trace, or the estimate if the model has one."""


class OurCNF(Solved):
    """flowcourse's continuous flow, its divergence in closed form."""

    def __init__(self, dim, hidden, **_):
        super().__init__()
        self.flow = Flow(Continuous(MLPVelocity(dim, hidden=(hidden, hidden))))

    def set_tolerance(self, tolerance):
        self.flow.bijection.tolerance = tolerance

    def log_prob(self, x):
        return self.flow.log_prob(x)

    def push(self, z):
        return self.flow.bijection.push(z)

    def sample(self, n):
        return self.flow.sample(n)


class TorchdiffeqFlow(Solved):
    """FFJORD as in torchdiffeq's example, with the exact trace and the adjoint method."""

    def __init__(self, dim, hidden, adjoint=True):
        super().__init__()
        self.velocity, self.dim, self.adjoint = (
            Velocity(dim, hidden),
            dim,
            adjoint,
        )
        self.set_tolerance(1e-5)

    def set_tolerance(self, tolerance):
        self.rtol, self.atol = tolerance, tolerance / 10

    def forward(self, t, state):
        """The velocity, and the trace of its Jacobian."""
        x = state[0]
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            velocity = self.velocity(t, x)
            trace = 0.0
            for i in range(self.dim):
                rows = torch.autograd.grad(
                    velocity[:, i].sum(),
                    x,
                    create_graph=graph,
                    retain_graph=True,
                )
                trace = trace + rows[0][:, i]
        return velocity, trace

    def _solve(self, field, state, times):
        from torchdiffeq import odeint, odeint_adjoint

        options = {"rtol": self.rtol, "atol": self.atol, "method": "dopri5"}
        if self.adjoint and torch.is_grad_enabled():
            return odeint_adjoint(
                field,
                state,
                times,
                adjoint_params=tuple(self.parameters()),
                **options,
            )
        return odeint(field, state, times, **options)

    def log_prob(self, x):
        times = torch.tensor([1.0, 0.0], dtype=x.dtype)
        z, lost = self._solve(self, (x, x.new_zeros(len(x))), times)
        z = z[-1]
        return -(z.square() + math.log(2 * math.pi)).sum(-1) / 2 + lost[-1]

    def push(self, z):
        times = torch.tensor([0.0, 1.0], dtype=z.dtype)
        return self._solve(self.velocity, z, times)[-1]

    def sample(self, n):
        return self.push(torch.randn(n, self.dim))


class ZukoCNF(Solved):
    """zuko's continuous flow, with the exact trace or with one random probe."""

    def __init__(self, dim, hidden, exact=True, **_):
        import zuko

        super().__init__()
        self.exact = exact
        self.flow = zuko.flows.CNF(
            dim, freqs=3, hidden_features=(hidden, hidden), exact=exact
        )

    def set_tolerance(self, tolerance):
        self.flow.transform.rtol = tolerance
        self.flow.transform.atol = tolerance / 10

    def set_trace(self, exact):
        self.flow.transform.exact = exact

    def log_prob(self, x):
        return self.flow().log_prob(x)

    def push(self, z):
        return self.flow().transform.inv(z)

    def sample(self, n):
        return self.flow().sample((n,))


@torch.no_grad()
def at_equal_error(model: Solved, x: Tensor) -> dict:
    """Choose each mode's tolerance, the loosest whose error is allowed; what to record.

    The error is the largest over rows, against a far more exact solution.
    """
    model.eval().set_trace(True)
    far = copy.deepcopy(model).double()
    far.set_tolerance(1e-10)
    found, errors = {}, {}
    for what, at in (("log_prob", x), ("push", torch.randn_like(x))):
        true = getattr(far, what)(at.double())
        for found[what] in TOLERANCES:
            model.set_tolerance(found[what])
            error = (getattr(model, what)(at) - true).abs().max().item()
            errors[what] = error
            if error <= ALLOWED:
                break
    model.set_trace(model.exact)
    density, points = found["log_prob"], found["push"]
    model.tolerances = {
        "train": density,
        "log_prob": density,
        "sample": points,
    }
    return {
        "tolerances": model.tolerances,
        "log_density_error": errors["log_prob"],
        "point_error": errors["push"],
    }


def curved(x: Tensor) -> Tensor:
    """Data that a trained flow has to bend for: each coordinate moved by the square of the one before."""
    return torch.cat([x[:, :1], x[:, 1:] + 0.6 * (x[:, :-1].square() - 1)], 1)


def trained(model: nn.Module, steps: int, x: Tensor) -> nn.Module:
    """Take steps of maximum likelihood on curved data."""
    sizes, generator = x.shape, torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    if isinstance(model, Solved):  # the weights count, not how they came about
        model.set_tolerance(1e-3)
        model.set_trace(x.shape[1] <= 8)
    model.train()
    for _ in range(steps):
        loss = model.loss(curved(torch.randn(sizes, generator=generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
    if isinstance(model, Solved):
        model.set_trace(model.exact)
    return model


class Evaluations(Density):
    """Six evaluations of a bare velocity of tanh units: one step of a method of order five."""

    def __init__(self, dim, hidden, **_):
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(
            nn.Linear(dim + 1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, dim),
        )

    def log_prob(self, x):
        for i in range(6):
            clock = x.new_full((len(x), 1), i / 6)
            x = self.net(torch.cat([x, clock], 1))
        return x.sum(-1)

    def sample(self, n):
        return self.log_prob(torch.randn(n, self.dim))


# --- Flow matching
# -------------------------------------------------------------------------------


class Matched(nn.Module):
    """A velocity learned by regression, and followed by equal steps of Euler; no density is asked for."""

    log_prob = None

    def __init__(self, dim, steps, net=None):
        super().__init__()
        self.dim, self.steps, self.net = dim, steps, net

    def after_step(self):
        """Nothing."""

    prepare = Density.prepare


class TanhNet(nn.Sequential):
    """A perceptron of tanh units on point and time, as `MLPVelocity` without its bound."""

    def __init__(self, dim, hidden):
        super().__init__(
            nn.Linear(dim + 1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x, t):
        return super().forward(
            torch.cat([x, t.view(-1, 1).expand(len(x), 1)], 1)
        )


class OurMatching(Matched):
    """flowcourse's objective, its noise drawn as `fit` draws it, and its Euler steps."""

    def __init__(self, dim, hidden, steps, **_):
        super().__init__(dim, steps)
        self.flow = Flow(Continuous(MLPVelocity(dim, hidden=(hidden, hidden))))
        self.objective = FlowMatching(self.flow)
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, x):
        return self.objective(x, self.objective.draw(len(x), self.generator))

    def sample(self, n):
        z = self.flow.base.sample((n,))
        return SDE(self.flow.bijection.velocity, 0.0).sample(z, self.steps)


class TheirMatching(Matched):
    """The path, the loss and the solver of the package flow_matching, as in its example."""

    def __init__(self, dim, hidden, steps, **_):
        from flow_matching.path import CondOTProbPath
        from flow_matching.solver import ODESolver

        super().__init__(dim, steps, TanhNet(dim, hidden))
        self.path, self.solver = CondOTProbPath(), ODESolver(self.net)

    def loss(self, x):
        t = torch.rand(len(x))
        at = self.path.sample(t=t, x_0=torch.randn_like(x), x_1=x)
        return (self.net(at.x_t, at.t) - at.dx_t).square().mean()

    def sample(self, n):
        z = torch.randn(n, self.dim)
        return self.solver.sample(
            x_init=z, step_size=1 / self.steps, method="euler"
        )


class BareMatching(Matched):
    """The network on a line between noise and data, and a loop of Euler steps."""

    def __init__(self, dim, hidden, steps, **_):
        super().__init__(dim, steps, TanhNet(dim, hidden))

    def loss(self, x):
        z, t = torch.randn_like(x), torch.rand(len(x), 1)
        return F.mse_loss(self.net(torch.lerp(z, x, t), t), x - z)

    def sample(self, n):
        x = torch.randn(n, self.dim)
        for i in range(self.steps):
            x = x + self.net(x, x.new_tensor(i / self.steps)) / self.steps
        return x


# --- Residual flows
# ------------------------------------------------------------------------------


def residual_ours(dim, layers, hidden, **_):
    return Ours(
        ResidualFlow(dim, layers, hidden=(hidden, hidden), lipschitz=0.9)
    )


def residual_normflows(dim, layers, hidden, **_):
    from normflows.flows import Residual
    from normflows.nets import LipschitzMLP

    widths = [dim, hidden, hidden, dim]
    nets = [
        LipschitzMLP(widths, init_zeros=False, lipschitz_const=0.9)
        for _ in range(layers)
    ]
    return Normflows([Residual(net) for net in nets], dim, lipschitz=True)


def residual_floor(dim, layers, hidden, **_):
    """One network for each layer, with neither log-determinant nor norm."""
    return Networks([Conditioner(dim, dim, hidden) for _ in range(layers)], dim)


# --- Glow
# ----------------------------------------------------------------------------------------


def glow_shapes(shape, levels):
    """Channels, height and width at each level, after its squeezing."""
    channels, height, width = shape
    shapes = []
    for _ in range(levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        shapes.append((channels, height, width))
        channels //= 2
    return shapes


class GlowNormflows(Density):
    """normflows' multi-scale Glow: affine couplings, 1x1 convolutions by LU, ActNorm."""

    def __init__(self, shape, levels, layers, hidden, **_):
        import normflows as nf

        super().__init__()
        bases, flows, merges = [], [], []
        for i, (channels, height, width) in enumerate(
            reversed(glow_shapes(shape, levels))
        ):
            steps = [
                nf.flows.GlowBlock(channels, hidden, init_zeros=False)
                for _ in range(layers)
            ]
            flows.append([*steps, nf.flows.Squeeze()])
            if i > 0:
                merges.append(nf.flows.Merge())
            part = (channels if i == 0 else channels // 2, height, width)
            bases.append(nf.distributions.DiagGaussian(part, trainable=False))
        self.flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def log_prob(self, x):
        return self.flow.log_prob(x, None)

    def sample(self, n):
        return self.flow.sample(n)[0]


def glow_nflows(shape, levels, layers, hidden, **_):
    from nflows import transforms as T

    multiscale = T.MultiscaleCompositeTransform(levels)
    for channels, height, width in glow_shapes(shape, levels):
        steps = [T.SqueezeTransform()]
        for _ in range(layers):
            steps += [
                T.ActNorm(channels),
                T.OneByOneConvolution(channels),
                T.AffineCouplingTransform(
                    torch.arange(channels) >= channels // 2,
                    lambda n_in, n_out: ConvConditioner(n_in, n_out, hidden),
                ),
            ]
        multiscale.add_transform(
            T.CompositeTransform(steps), (channels, height, width)
        )
    return Nflows(multiscale, math.prod(shape))


class GlowFreia(Density):
    """FrEIA's all-in-one blocks: affine couplings, fixed rotations, a scale for each channel."""

    memory_format = torch.contiguous_format

    def __init__(self, shape, levels, layers, hidden, **_):
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import AllInOneBlock, IRevNetDownsampling

        super().__init__()
        self.levels, self.parts = nn.ModuleList(), []
        for i, (channels, height, width) in enumerate(
            glow_shapes(shape, levels)
        ):
            inn = SequenceINN(channels // 4, 2 * height, 2 * width)
            inn.append(IRevNetDownsampling)
            for _ in range(layers):
                inn.append(
                    AllInOneBlock,
                    subnet_constructor=lambda n_in, n_out: ConvConditioner(
                        n_in, n_out, hidden
                    ),
                    permute_soft=True,
                )
            self.levels.append(inn)
            self.parts.append(
                (channels if i == levels - 1 else channels // 2, height, width)
            )

    def log_prob(self, x):
        total = -math.log(2 * math.pi) / 2 * x[0].numel()
        for i, inn in enumerate(self.levels):
            x, ladj = inn(x)
            total = total + ladj
            if i < len(self.levels) - 1:
                z, x = x.chunk(2, 1)
                total = total - z.square().flatten(1).sum(-1) / 2
        return total - x.square().flatten(1).sum(-1) / 2

    def sample(self, n):
        x = None
        for inn, part in zip(reversed(self.levels), reversed(self.parts)):
            z = torch.randn(n, *part).to(memory_format=self.memory_format)
            x = z if x is None else torch.cat([z, x], 1)
            x = inn(x, rev=True, jac=False)[0]
        return x


class GlowFreiaChannelsLast(GlowFreia):
    """The same, weights and data in the memory format in which convolutions are quicker."""

    memory_format = torch.channels_last

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.to(memory_format=self.memory_format)

    def log_prob(self, x):
        return super().log_prob(x.to(memory_format=self.memory_format))


def glow_ours(shape, levels, layers, hidden, **_):
    # the layers of ConvConditioner, in a chain that is known to be one
    return Ours(
        Glow(
            tuple(shape),
            levels,
            layers,
            hidden=(hidden, hidden),
            prior=False,
            conditioner=partial(convnet, activation=nn.ReLU, kernel=(3, 1, 3)),
        )
    )


class GlowFloor(Density):
    """The bare convolutional networks of all levels."""

    def __init__(self, shape, levels, layers, hidden, **_):
        super().__init__()
        self.shape = tuple(shape)
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ConvConditioner(c // 2, c, hidden) for _ in range(layers)
            )
            for c, _, _ in glow_shapes(shape, levels)
        )

    def log_prob(self, x):
        total = 0.0
        for networks in self.levels:
            x = F.pixel_unshuffle(x, 2)
            half = x.shape[1] // 2
            for network in networks:
                total = total + network(x[:, :half]).flatten(1).sum(-1)
            x = x[:, half:]
        return total

    def sample(self, n):
        return self.log_prob(torch.randn(n, *self.shape))


# --- The table
# -----------------------------------------------------------------------------------


@dataclass
class Contestant:
    """One library's side of a case."""

    build: Callable[..., nn.Module]  # From the case's sizes
    note: str = ""  # What it cannot do alike
    package: str = ""  # What must be installed, if the name does not say
    # Modes in which torch.compile ends the process by a memory error
    dies: tuple[str, ...] = ()

    def installed(self, name: str) -> bool:
        """Whether its library is there."""
        package = self.package or PACKAGES.get(name)
        return package is None or find_spec(package) is not None


@dataclass
class Case:
    """Models that do the same work."""

    title: str
    sizes: dict
    tiny: dict  # Sizes for a test of a moment
    floor: Callable[..., nn.Module]
    floor_note: str
    contestants: dict[str, Contestant]
    # Largest ratio to the best peer, eager against eager
    targets: dict[str, float]
    compiled_targets: dict[str, float] = field(default_factory=dict)
    # Contestants that are no peers of these targets but have their own
    beside: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""
    modes: tuple[str, ...] = ("train", "log_prob", "sample")
    # From a model and data: makes it as exact as the others; for the record
    equalise: Callable | None = None
    steps: int = 0  # Of training before it is timed

    def builders(self) -> dict[str, Contestant]:
        """All contestants, the floor last."""
        return self.contestants | {
            FLOOR: Contestant(self.floor, self.floor_note)
        }


def batch(sizes: dict) -> tuple[Tensor, ...]:
    """What `loss` takes: data, or base samples and features."""
    x = torch.randn(sizes["batch"], *sizes.get("shape", [sizes.get("dim")]))
    return (
        (x, torch.randn(sizes["batch"], sizes["features"]))
        if "features" in sizes
        else (x,)
    )


def only(*names):
    """A builder that gets the sizes named here."""
    return lambda make: (
        lambda **sizes: make(**{name: sizes[name] for name in names})
    )


SAME_HALF = (
    "without a permutation every layer moves the same half: the same arithmetic"
)
SAME_ORDER = (
    "without a permutation every layer has the same order: the same arithmetic"
)
HALVES = "masks are halves instead of alternating"
SIGMOID = "the scale is a sigmoid"
LINEAR_FIRST = "its MADE has no activation after the first layer"
WITH_DENSITY = "a sample comes with its log-density"
ONE_CLOCK = "time enters as one number, and hidden units are tanh"
FIXED_ROTATIONS = (
    "rotations of channels are fixed: less work than a 1x1 convolution"
)
EVALUATIONS = (
    "six evaluations of a velocity, one step of a method of order five"
)
EQUAL_ERROR = (
    "Dormand and Prince's steps, at the loosest tolerance that keeps every row's error "
    "below 1e-3"
)

cases: dict[str, Case] = {
    "planar": Case(
        title="Planar stack, D 40, 80 layers, batch 100",
        sizes={"dim": 40, "layers": 80, "batch": 100},
        tiny={"dim": 4, "layers": 3, "batch": 5},
        floor=only("dim", "layers")(Products),
        floor_note="two matrix products and a tanh for the whole stack",
        contestants={
            OURS: Contestant(only("dim", "layers")(OurPlanar)),
            "normflows": Contestant(planar_normflows),
            "Pyro": Contestant(only("dim", "layers")(PyroPlanar)),
        },
        targets={"train": 0.12, "sample": 0.15},
        modes=("train", "sample"),
        note="training pushes base samples through, as in variational inference; "
        "a sample comes with its log-determinant",
    ),
    "planar-amortised": Case(
        title="Planar stack whose parameters come from 400 features of each sample",
        sizes={"dim": 40, "layers": 80, "features": 400, "batch": 100},
        tiny={"dim": 4, "layers": 3, "features": 6, "batch": 5},
        floor=only("dim", "layers", "features")(AmortisedProducts),
        floor_note="one linear map from the features, two products for each sample and a tanh",
        contestants={
            OURS: Contestant(only("dim", "layers", "features")(OurPlanar)),
            "Pyro": Contestant(
                only("dim", "layers", "features")(PyroPlanar),
                "one linear map for each layer",
            ),
            "Pyro, one product": Contestant(
                only("dim", "layers", "features")(PyroPlanarAtOnce),
                "one linear map for all layers",
                "pyro",
            ),
        },
        targets={"train": 0.35, "sample": 0.30},
        modes=("train", "sample"),
        note="D 40, 80 layers, batch 100; the features enter through one linear map",
    ),
    "rqs-coupling": Case(
        title="Rational-quadratic spline couplings, D 16, 8 layers, width 64, 8 bins, batch 512",
        sizes={"dim": 16, "layers": 8, "hidden": 64, "bins": 8, "batch": 512},
        tiny={"dim": 4, "layers": 2, "hidden": 7, "bins": 3, "batch": 5},
        floor=rqs_floor,
        floor_note="the 8 conditioners",
        contestants={
            OURS: Contestant(rqs_ours),
            "nflows": Contestant(rqs_nflows),
            "normflows": Contestant(rqs_normflows, WITH_DENSITY),
            "zuko": Contestant(rqs_zuko),
            "Pyro": Contestant(rqs_pyro, SAME_HALF),
        },
        targets={"train": 0.60, "log_prob": 0.45, "sample": 0.45},
        compiled_targets={"train": 0.35, "log_prob": 0.20},
        note="FrEIA has no splines; flowcourse and Pyro solve the quadratic in log_prob, the others to "
        "sample",
    ),
    "rqs-autoregressive": Case(
        title="Rational-quadratic spline autoregressive, D 16, 5 layers, width 64, 8 bins, "
        "batch 512",
        sizes={"dim": 16, "layers": 5, "hidden": 64, "bins": 8, "batch": 512},
        tiny={"dim": 4, "layers": 2, "hidden": 7, "bins": 3, "batch": 5},
        floor=ar_rqs_floor,
        floor_note="the 5 networks, once, without masks",
        contestants={
            OURS: Contestant(ar_rqs_ours),
            "nflows": Contestant(ar_rqs_nflows, SAME_ORDER),
            "normflows": Contestant(
                ar_rqs_normflows,
                f"{SAME_ORDER}; {LINEAR_FIRST}; {WITH_DENSITY}",
            ),
            "zuko": Contestant(ar_rqs_zuko),
            "Pyro": Contestant(ar_rqs_pyro),
        },
        targets={"train": 0.60, "log_prob": 0.45, "sample": 0.10},
        note="FrEIA has no autoregressive layers; flowcourse solves the quadratic in log_prob, the "
        "others to sample",
    ),
    "maf": Case(
        title="Masked autoregressive flow, D 32, 5 layers, width 64, batch 256",
        sizes={"dim": 32, "layers": 5, "hidden": 64, "batch": 256},
        tiny={"dim": 4, "layers": 2, "hidden": 16, "batch": 5},
        floor=partial(autoregressive_floor, 2),
        floor_note="the 5 networks, once, without masks",
        contestants={
            OURS: Contestant(maf_ours, "the log-scale is bounded by a tanh"),
            "nflows": Contestant(
                maf_nflows, f"{SAME_ORDER}; the scale is a softplus"
            ),
            "normflows": Contestant(
                maf_normflows,
                f"{SAME_ORDER}; {LINEAR_FIRST}; {SIGMOID}; {WITH_DENSITY}",
            ),
            "zuko": Contestant(
                maf_zuko, "the log-scale is bounded by a softsign"
            ),
            "Pyro": Contestant(maf_pyro, "the log-scale is clipped"),
        },
        targets={"train": 0.90, "log_prob": 0.90, "sample": 0.15},
        note="FrEIA has no autoregressive layers",
    ),
    "realnvp": Case(
        title="RealNVP, D 16, 8 layers, width 64, batch 512",
        sizes={"dim": 16, "layers": 8, "hidden": 64, "batch": 512},
        tiny={"dim": 4, "layers": 2, "hidden": 7, "batch": 5},
        floor=partial(coupling_floor, 2),
        floor_note="the 8 conditioners",
        contestants={
            OURS: Contestant(nvp_ours, "the log-scale is bounded by a tanh"),
            "nflows": Contestant(nvp_nflows, SIGMOID),
            "normflows": Contestant(
                nvp_normflows,
                f"{HALVES}; the log-scale has no bound; {WITH_DENSITY}",
            ),
            "zuko": Contestant(
                only("dim", "layers", "hidden")(zuko_couplings),
                "the log-scale is bounded by a softsign",
                # torch 2.13, "malloc_consolidate(): invalid chunk size"
                dies=("train",),
            ),
            "FrEIA": Contestant(
                nvp_freia, f"{HALVES}; the log-scale is bounded by a tanh"
            ),
            "Pyro": Contestant(
                nvp_pyro, f"{SAME_HALF}; the log-scale is clipped"
            ),
        },
        targets={"train": 0.90, "log_prob": 0.80, "sample": 0.80},
    ),
    "cnf": Case(
        title="Continuous flow with exact trace, D 2, width 64, batch 256",
        sizes={"dim": 2, "hidden": 64, "batch": 256},
        tiny={"dim": 2, "hidden": 7, "batch": 5},
        floor=Evaluations,
        floor_note=EVALUATIONS,
        contestants={
            OURS: Contestant(OurCNF, ONE_CLOCK),
            "zuko": Contestant(ZukoCNF),
            "torchdiffeq": Contestant(only("dim", "hidden")(TorchdiffeqFlow)),
        },
        targets={"train": 0.18, "log_prob": 0.18, "sample": 0.50},
        note=EQUAL_ERROR,
        equalise=at_equal_error,
    ),
    "cnf-64": Case(
        title="Continuous flow with exact trace, D 64, width 64, batch 256",
        sizes={"dim": 64, "hidden": 64, "batch": 256},
        tiny={"dim": 3, "hidden": 7, "batch": 5},
        floor=Evaluations,
        floor_note=EVALUATIONS,
        contestants={
            OURS: Contestant(OurCNF, ONE_CLOCK),
            "zuko": Contestant(ZukoCNF),
        },
        targets={"train": 0.02, "log_prob": 0.05, "sample": 0.50},
        note=EQUAL_ERROR,
        equalise=at_equal_error,
    ),
    "cnf-64-hutchinson": Case(
        title="Continuous flow, D 64, width 64, batch 256: exact beside estimated trace",
        sizes={"dim": 64, "hidden": 64, "batch": 256},
        tiny={"dim": 3, "hidden": 7, "batch": 5},
        floor=Evaluations,
        floor_note=EVALUATIONS,
        contestants={
            OURS: Contestant(OurCNF, f"{ONE_CLOCK}; the trace is exact"),
            "zuko": Contestant(
                partial(ZukoCNF, exact=False),
                "the trace is estimated from one random probe",
            ),
        },
        targets={"train": 0.25, "log_prob": 0.30},
        modes=("train", "log_prob"),
        note=f"{EQUAL_ERROR}; the estimate's own noise does not count as an error",
        equalise=at_equal_error,
    ),
    "flow-matching": Case(
        title="Flow matching, D 64, width 256, batch 512; samples by 16 steps of Euler",
        sizes={"dim": 64, "hidden": 256, "steps": 16, "batch": 512},
        tiny={"dim": 3, "hidden": 7, "steps": 2, "batch": 5},
        floor=BareMatching,
        floor_note="the network on random lines, and a loop of Euler steps",
        contestants={
            OURS: Contestant(
                OurMatching,
                "the loss is a sum over coordinates, and each matrix is bounded",
            ),
            "flow_matching": Contestant(TheirMatching),
        },
        targets={"train": 1.05, "sample": 1.05},
        modes=("train", "sample"),
        note="tanh units; noise and times are drawn anew in every step",
    ),
    "residual": Case(
        title="Residual flow, D 8, 6 layers, width 64, batch 256",
        sizes={"dim": 8, "layers": 6, "hidden": 64, "batch": 256},
        tiny={"dim": 3, "layers": 2, "hidden": 7, "batch": 5},
        floor=residual_floor,
        floor_note="the 6 networks, once, without log-determinant and norms",
        contestants={
            OURS: Contestant(residual_ours, "the log-determinant is exact"),
            "normflows": Contestant(
                residual_normflows,
                "a training step ends with five power iterations; "
                "the number of terms of the series is random",
            ),
        },
        targets={"train": 0.40, "log_prob": 0.10, "sample": 0.35},
        note="FrEIA's layer does not differentiate its log-determinant, so it cannot be trained by "
        "maximum likelihood",
    ),
}

for size, targets, beside in (
    (8, {"train": 0.75, "log_prob": 0.75, "sample": 0.80}, 0.85),
    (28, {"train": 0.85, "log_prob": 0.90, "sample": 0.90}, 0.97),
):
    cases[f"glow-{size}"] = Case(
        title=f"Glow on images of 1 × {size} × {size}, 2 levels of 8 steps, width 64, batch 64",
        sizes={
            "shape": [1, size, size],
            "levels": 2,
            "layers": 8,
            "hidden": 64,
            "batch": 64,
        },
        tiny={
            "shape": [1, 4, 4],
            "levels": 2,
            "layers": 1,
            "hidden": 5,
            "batch": 3,
        },
        floor=GlowFloor,
        floor_note="the bare convolutional networks",
        contestants={
            OURS: Contestant(glow_ours, "the log-scale is bounded by a tanh"),
            "nflows": Contestant(glow_nflows, SIGMOID),
            "normflows": Contestant(
                GlowNormflows, f"{SIGMOID}; {WITH_DENSITY}"
            ),
            "FrEIA": Contestant(
                GlowFreia,
                FIXED_ROTATIONS,
            ),
            "FrEIA, channels_last": Contestant(
                GlowFreiaChannelsLast,
                f"{FIXED_ROTATIONS}; weights and data in channels_last",
                "FrEIA",
            ),
        },
        targets=targets,
        beside={"FrEIA, channels_last": {"train": beside}},
    )


for name in ("cnf", "cnf-64", "cnf-64-hutchinson", "residual"):
    cases[f"{name}-trained"] = replace(
        cases[name], title=f"{cases[name].title}, trained", steps=100
    )

# Scaling curves: the case, what is timed, and for each axis the size that
# varies and its values.
curves: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "rqs-coupling": (
        "train",
        {
            "dim": (4, 8, 16, 32, 64),
            "bins": (4, 8, 16, 32),
            "batch": (64, 256, 1024, 4096),
        },
    ),
    "planar": (
        "train",
        {
            "dim": (10, 20, 40, 80),
            "layers": (10, 20, 40, 80, 160),
            "batch": (25, 100, 400, 1600),
        },
    ),
    "maf": (
        "sample",
        {
            "dim": (8, 16, 32, 64),
            "layers": (2, 5, 10),
            "batch": (64, 256, 1024),
        },
    ),
}
