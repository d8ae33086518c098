"""Normalizing flows: a bijection, and where its parameters come from."""

__version__ = "0.1.0"

from flowcourse.core import (
    Bijection,
    Compose,
    DiagonalGaussian,
    Flow,
    GaussianMixture,
    Inverse,
    StandardNormal,
    Uniform,
)
from flowcourse.coupling import AdditiveMap, AffineMap, Coupling, RealNVP
from flowcourse.training import MaximumLikelihood, Objective, ReverseKL, fit
from flowcourse.zoo import zoo
