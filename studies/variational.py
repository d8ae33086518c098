"""Flows trained on energies by reverse KL.

Planar and additive flows of several lengths, seven families and a Gaussian for the same number of
steps, and what goes wrong. All energies and seeds of a job are trained side by side, in one process
on one thread; continuous flows, whose fast path cannot be stacked, one after another. The density of
the first seed is kept as a picture.
"""

import base64
import math
import time
import zlib
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from flowcourse.autoregressive import IAF
from flowcourse.bases import DiagonalGaussian
from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Flow
from flowcourse.coupling import NICE, Couplings, RealNVP
from flowcourse.linear import Triangular
from flowcourse.objectives import Annealing, ReverseKL
from flowcourse.planar import Planar, Radial, Sylvester
from flowcourse.plots import grid_points
from flowcourse.splines import RationalQuadraticSplineMap
from flowcourse.studies import SideBySide
from flowcourse.trainer import fit
from flowcourse.variational import Ridges, assess, energies

torch.set_num_threads(1)  # seconds are of the processor, on one thread

SEEDS = {"lengths": range(3), "gallery": range(3), "families": range(5)}
CLIP = 1.0  # largest gradient norm of each flow
RECIPE = {"steps": 2000, "batch_size": 400, "lr": 2e-2, "schedule": "cosine"}
FAMILY_STEPS = 1000
ANNEALED = 0.3  # share of the steps in which beta rises from 0.01 to 1
# each about as a user would size it; first a Gaussian of any covariance,
# which finds its best place from a narrow start and without annealing
FAMILIES = {
    "Gaussian": partial(Triangular, 2),
    "planar": partial(Planar, 2, 16),
    "radial": partial(Radial, 2, 16),
    "Sylvester": partial(Sylvester, 2, 8),
    "RealNVP": partial(RealNVP, 2, 8, hidden=(32, 32)),
    "spline": partial(
        Couplings,
        2,
        scalar_map=RationalQuadraticSplineMap(8, 5.0),
        layers=4,
        hidden=(32, 32),
    ),
    "IAF": partial(IAF, 2, 6, hidden=(32, 32)),
    "continuous": lambda: Continuous(MLPVelocity(2, hidden=(64, 64))),
}
ALONE = ("continuous",)  # not side by side
LENGTHS = {"planar": Planar, "NICE": partial(NICE, hidden=(32,))}
PAPER = ("U1", "U2", "U3", "U4")
KINDS = {  # the energies that each flow is trained on
    "lengths": {"planar": tuple(energies), "NICE": PAPER},
    "families": dict.fromkeys(FAMILIES, PAPER),
    "gallery": {"planar": ("U2", "U1-radius-4")},
}
GALLERY = {  # what is changed in the recipe, for 16 planar layers
    "flat wall": {},
    "no annealing": {},
    "large step": {"lr": 0.2},
    "w / |w|": {},
    "flat wall, no annealing": {},
}

jobs = [
    {"kind": "lengths", "family": family, "length": length}
    for family, lengths in (
        ("planar", (2, 4, 8, 16, 32)),
        ("NICE", (2, 8, 32)),
    )
    for length in lengths
]
jobs += [{"kind": "gallery", "change": change} for change in GALLERY]
jobs += [{"kind": "families", "family": family} for family in FAMILIES]


class BuggyPlanar(Planar):
    """Planar layers whose correction of u is divided by |w|, not by its square."""

    def margins(self):
        """1 + w'u of each layer, which must be above 0."""
        w, u, _ = self.raw(None).split([2, 2, 1], -1)
        product, size = (w * u).sum(-1), w.norm(dim=-1)
        return (
            1 + product + (nn.functional.softplus(product) - 1 - product) * size
        )

    def _forward(self, z, context):
        w, u, b = self.raw(context).split([2, 2, 1], -1)
        product, size = (
            (w * u).sum(-1, keepdim=True),
            w.norm(dim=-1, keepdim=True),
        )
        u = u + (nn.functional.softplus(product) - 1 - product) * w / size
        ladj = 0.0
        for k in range(self.layers):
            h = (z @ w[k] + b[k]).tanh()
            z = z + u[k] * h.unsqueeze(-1)
            # as published
            ladj = ladj + (1 + (1 - h.square()) * (w[k] @ u[k])).abs().log()
        return z, ladj


def flat_wall(energy, z):
    """A floor below the density, and a hard box in place of a wall: the gradient there is zero."""
    inside = (
        z[..., 0].abs() <= (4 if isinstance(energy, Ridges) else math.inf)
    ).to(z)
    return (1e-7 + inside * energy.log_density(z).exp()).log()


def apart(bijection):
    """The bijection, the hidden units of which do not all bend space at the origin."""
    raw = (
        bijection.raw.value.data
        if isinstance(bijection, (Planar, Sylvester))
        else None
    )
    if isinstance(bijection, Planar):
        raw[:, -1].normal_()
    elif raw is not None:
        raw.split(bijection.sizes, -1)[2].normal_()
    return bijection


def clipped_adam(params, lr, weight_decay):
    """Adam, on gradients clipped for each of the stacked flows by itself."""

    def clip(optimizer, *_):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        norms = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
        for g in gradients:
            g.mul_(
                (CLIP / (norms + 1e-6))
                .clamp(max=1)
                .view(-1, *[1] * (g.dim() - 1))
            )

    optimizer = torch.optim.Adam(
        params, lr, weight_decay=weight_decay, fused=True
    )
    optimizer.register_step_pre_hook(clip)
    return optimizer


class Draws(nn.Module):
    """A flow, asked for draws and their log-density."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, noise):
        """Points and log q."""
        return self.flow.rsample_and_log_prob(noise=noise)


class ReverseSideBySide(SideBySide):
    """Reverse KL of several flows at once, as many for each target, the targets annealed."""

    def __init__(
        self,
        flows: list[Flow],  # Equal but for the values of their parameters
        # Each from `x` to log p up to a constant, for as many flows in turn
        log_targets: list,
        annealing: Annealing | None,  # The weight of log p
    ):
        super().__init__([Draws(flow) for flow in flows])
        self.log_targets, self.annealing = log_targets, annealing
        self.n = len(flows)

    def draw(self, n, generator):
        """Noise of all flows, shape `(n, flows, 2)`."""
        return torch.randn(n, self.n, 2, generator=generator)

    def forward(self, batch, noise):
        """The sum of the losses."""
        x, log_q = self.each(noise)
        shares = x.chunk(len(self.log_targets))
        log_p = torch.cat(
            [f(part) for f, part in zip(self.log_targets, shares, strict=True)]
        )
        weight = 1.0 if self.annealing is None else self.annealing()
        return (log_q - weight * log_p).mean(-1).sum()


def picture(flow, window, bins=100):
    """The density on a square around the origin: bytes as text, and the value of byte 255."""
    with torch.no_grad():
        density = flow.log_prob(
            grid_points(-window, window, bins).reshape(-1, 2)
        ).exp()
    top = density.max()
    pixels = zlib.compress(
        (255 * density / top).round().to(torch.uint8).numpy().tobytes(), 9
    )
    return {
        "bins": bins,
        "top": top.item(),
        "pixels": base64.b64encode(pixels).decode(),
    }


def judge(flow, energy, seed):
    """The true KL of a trained flow, and what else may have gone wrong."""
    noise = torch.Generator().manual_seed(seed)
    found = asdict(assess(flow, energy.log_prob, 200_000, generator=noise))
    x = flow.sample(20_000, generator=noise)
    found["beyond the walls"] = (x[:, 0].abs() > 4).double().mean().item()
    if isinstance(flow.bijection, BuggyPlanar):
        found["folded layers"] = int((flow.bijection.margins() <= 0).sum())
    return found


def run(folder, kind, family="planar", length=16, change=None):
    """Train several seeds of a flow on each of several energies by reverse KL."""
    targets, seeds = KINDS[kind][family], SEEDS[kind]
    if kind == "families":
        make, steps = FAMILIES[family], FAMILY_STEPS
    else:
        maker = BuggyPlanar if change == "w / |w|" else LENGTHS[family]
        make, steps = partial(maker, 2, length), RECIPE["steps"]
    narrow = family == "Gaussian"
    flows = []
    for _ in targets:
        for seed in seeds:
            torch.manual_seed(seed)
            base = DiagonalGaussian(2, scale=0.5 if narrow else 2.0)
            flows.append(Flow(apart(make()), base))
    log_targets = [energies[target].log_density for target in targets]
    changes = (change or "").split(", ")
    if "flat wall" in changes:
        log_targets = [
            partial(flat_wall, energies[target]) for target in targets
        ]
    make_annealing = (
        (lambda: None)
        if narrow or "no annealing" in changes
        else partial(Annealing, 0.01, round(ANNEALED * steps))
    )
    recipe = RECIPE | GALLERY.get(change, {}) | {"steps": steps}
    start = time.process_time()
    if family in ALONE:
        for i, flow in enumerate(flows):
            log_target = log_targets[i // len(seeds)]
            alone = ReverseKL(flow, log_target, make_annealing())
            seed = seeds[i % len(seeds)]
            fit(alone, **recipe, clip=CLIP, seed=seed, progress=False)
    else:
        together = ReverseSideBySide(flows, log_targets, make_annealing())
        fit(together, **recipe, optimizer=clipped_adam, progress=False)
        together.unstack([Draws(flow) for flow in flows])
    took = time.process_time() - start
    found, pictures = {}, {}
    for i, target in enumerate(targets):
        own = flows[len(seeds) * i : len(seeds) * (i + 1)]
        found[target] = [
            judge(f, energies[target], s)
            for s, f in zip(seeds, own, strict=True)
        ]
        if not isinstance(own[0].bijection, BuggyPlanar):
            pictures[target] = picture(own[0], energies[target].window)
    return {
        "results": found,
        "steps": steps,
        "seconds": round(took, 2),
        "parameters": sum(p.numel() for p in flows[0].parameters()),
        "pictures": pictures,
    }
