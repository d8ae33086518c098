"""What flowcourse adds to work that has to be done anyway: two calls, timed in turn."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.dlgm import DLGM, FreeEnergy
from flowcourse.objectives import MaximumLikelihood
from flowcourse.planar import Planar
from flowcourse.trainer import fit


@dataclass
class Overhead:
    """One comparison with ourselves."""

    title: str
    bare: str  # What is done anyway
    # From `quick`: ours, and without us
    calls: Callable[[bool], tuple[Callable, Callable]]
    most: float  # The target
    kind: str = "ratio"  # Of the two times; or "difference", in seconds


class HeadsAlone(Planar):
    """A planar stack that makes the parameters of its layers and does nothing else with them."""

    def _forward(self, z, context):
        return z, self.raw(context).sum((-2, -1))


def training_step(
    objective: nn.Module, *batch: torch.Tensor
) -> Callable[[], None]:
    """Forward, backward and a step of Adam."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-7)

    def step():
        optimizer.zero_grad()
        objective(*batch).backward()
        optimizer.step()

    return step


def dlgm(quick: bool) -> tuple[Callable, Callable]:
    """A deep latent Gaussian model with 80 planar layers, and with their parameters alone."""
    pixels, latent, features, layers, n = (
        (6, 3, 4, 2, 5) if quick else (784, 40, 400, 80, 100)
    )
    batch = (torch.rand(n, pixels) < 0.5).float(), torch.randn(n, latent)

    def step(stack):
        torch.manual_seed(0)
        posterior = stack(
            latent,
            layers,
            context_dim=features,
            hidden=(),
            context_scale=features**-0.5,
        )
        model = DLGM(posterior, pixels, latent, features)
        return training_step(FreeEnergy(model), *batch)

    return step(Planar), step(HeadsAlone)


def trainer(quick: bool) -> tuple[Callable, Callable]:
    """`fit`, and a loop that draws, clips and steps as often."""
    steps, n, width = (3, 8, 5) if quick else (50, 1024, 64)
    x = torch.randn(20 * n, 16)

    def objective():
        torch.manual_seed(0)
        return MaximumLikelihood(Flow(RealNVP(16, 8, hidden=(width, width))))

    def loop(loss):
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-7, fused=True)
        rows = torch.cat(
            [torch.randperm(len(x)) for _ in range(steps * n // len(x) + 1)]
        )
        for i in range(steps):
            optimizer.zero_grad()
            loss(x[rows[i * n : (i + 1) * n]]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 5.0)
            optimizer.step()

    ours, bare = objective(), objective()
    options = {
        "steps": steps,
        "batch_size": n,
        "lr": 1e-7,
        "clip": 5.0,
        "progress": False,
    }
    return lambda: fit(ours, x, **options), lambda: loop(bare)


def imports(quick: bool) -> tuple[Callable, Callable]:
    """Start Python and import flowcourse; the same with torch."""

    def start(module):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    return lambda: start("flowcourse"), lambda: start("torch")


overheads = {
    "dlgm": Overhead(
        "Deep latent Gaussian model, 80 planar layers made of 400 features, D 40, batch 100",
        "the parameters of the layers are made, and added to the log-determinant",
        dlgm,
        1.25,
    ),
    "trainer": Overhead(
        "`fit`: 50 steps of RealNVP, D 16, 8 layers, width 64, batch 1024",
        "a loop that draws as many rows at random, with the same clipping and optimiser",
        trainer,
        1.05,
    ),
    "import": Overhead(
        "`import flowcourse` in a new process",
        "`import torch`",
        imports,
        0.7,
        "difference",
    ),
}
