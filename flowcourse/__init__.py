"""Normalizing flows: a bijection, and where its parameters come from."""

__version__ = "0.1.0"

from flowcourse import _quiet  # first: what follows takes seconds
from flowcourse import zoo
from flowcourse.bases import DiagonalGaussian, GaussianMixture, Uniform
from flowcourse.core import Bijection, Compose, Flow, Inverse, StandardNormal
from flowcourse.coupling import NICE, Coupling, Couplings, RealNVP
from flowcourse.elementwise import AdditiveMap, AffineMap, Elementwise
from flowcourse.objectives import MaximumLikelihood, Objective, ReverseKL
from flowcourse.trainer import Recipe, fit
