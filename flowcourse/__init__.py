"""Normalizing flows: a bijection, and where its parameters come from."""

__version__ = "0.1.0"

from flowcourse import _quiet  # first: what follows takes seconds
from flowcourse import zoo  # its `rows` are gathered when they are asked for
from flowcourse.autoregressive import IAF, MAF, NAF
from flowcourse.bases import DiagonalGaussian, GaussianMixture, Uniform
from flowcourse.bnaf import BNAF
from flowcourse.continuous import Continuous, MLPVelocity
from flowcourse.core import Bijection, Compose, Flow, Inverse, StandardNormal
from flowcourse.coupling import NICE, Coupling, Couplings, RealNVP
from flowcourse.data import load
from flowcourse.elementwise import AdditiveMap, AffineMap, Elementwise
from flowcourse.objectives import MaximumLikelihood, Objective, ReverseKL
from flowcourse.planar import Planar, Radial, Sylvester
from flowcourse.residual import ResidualFlow
from flowcourse.schedules import SDE
from flowcourse.splines import NSF
from flowcourse.stochastic import (
    FlowMatching,
    Guided,
    ScoreMatching,
    ScoreVelocity,
)
from flowcourse.testing import check_bijection
from flowcourse.toy_densities import toys
from flowcourse.trainer import Recipe, fit

# The package's own names: no module has one of them.
__all__ = [
    "BNAF",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SDE",
    "AdditiveMap",
    "AffineMap",
    "Bijection",
    "Compose",
    "Continuous",
    "Coupling",
    "Couplings",
    "DiagonalGaussian",
    "Elementwise",
    "Flow",
    "FlowMatching",
    "GaussianMixture",
    "Guided",
    "Inverse",
    "MLPVelocity",
    "MaximumLikelihood",
    "Objective",
    "Planar",
    "Radial",
    "RealNVP",
    "Recipe",
    "ResidualFlow",
    "ReverseKL",
    "ScoreMatching",
    "ScoreVelocity",
    "StandardNormal",
    "Sylvester",
    "Uniform",
    "check_bijection",
    "fit",
    "load",
    "toys",
]
