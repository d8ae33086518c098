"""Arguments of any library are read, and others refused in words."""

import math
import re

import numpy as np
import pytest
import torch
import torch.distributions as D
from helpers import many

from flowcourse.arguments import (
    as_float,
    as_int,
    as_shape,
    require_function,
    require_instance,
    require_numbers,
)
from flowcourse.bases import (
    DiagonalGaussian,
    GaussianMixture,
    TorchBase,
    Uniform,
)
from flowcourse.core import Bijection, Flow
from flowcourse.coupling import RealNVP
from flowcourse.toy_densities import Moons

inf, nan = math.inf, math.nan
KINDS = [int, np.int64, np.uint8, torch.tensor, np.array]


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_any_library_are_read(kind):
    two, three = kind(2), kind(3)
    assert type(as_int(three, "n")) is int and as_int(three, "n") == 3
    assert as_shape(three, "n") == (3,) and as_shape([three, 2], "n") == (3, 2)
    f = RealNVP(2, 2, hidden=(4,), context_dim=3)
    flow, c = Flow(f), torch.zeros(4, 3)
    assert Flow(RealNVP(2, 2, hidden=(4,))).sample(three).shape == (3, 2)
    assert flow.sample((three, two), c).shape == (3, 2, 4, 2)
    assert flow.rsample_and_log_prob(three, c)[1].shape == (3, 4)
    assert flow(c).sample((three,)).shape == flow(c).sample(three).shape
    assert flow(c).expand((three, 4)).batch_shape == (3, 4)
    base = Uniform(two)
    assert base.event_shape == (2,) and type(base.event_shape[0]) is int
    for b in (base, DiagonalGaussian(2), GaussianMixture(torch.zeros(1, 2))):
        assert b.sample(three).shape == b.sample((three,)).shape == (3, 2)
    assert TorchBase(many(D.Normal, 0.0, 1.0)).sample(three).shape == (3, 2)
    own = Bijection(two, three, two)
    assert type(own.context_dim) is int and own.event_shape == (2,)
    assert f.as_transform(c).forward_shape((three, 4, two)) == (3, 4, 2)


@pytest.mark.parametrize(
    "kind", [int, float, np.float32, np.int64, torch.tensor, np.array]
)
def test_numbers_of_any_library_are_read(kind):
    number = as_float(kind(3), "lr")
    assert type(number) is float and number == 3.0
    assert (DiagonalGaussian(2, kind(3), kind(3)).loc == 3).all()
    assert (Uniform(2, kind(3), kind(4)).low == 3).all()


def test_shapes_are_checked_in_words():
    x = torch.zeros(3, 2)
    require_numbers(x, "x", ("n", 2))
    require_numbers(x, "x", ("*batch", "n", 2))
    require_numbers(x[:0], "x", ("*n", 2))
    require_numbers(x, "x", ("n", "*d"))
    for value, shape, text in (
        (x, ("n", 3), r"x: expected shape \(n, 3\), got \(3, 2\)"),
        (x, ("n",), r"x: expected shape \(n,\), got \(3, 2\)"),
        (x[:0], ("n", 2), r"got \(0, 2\)"),
        (x[0, 0], ("*batch", 2), r"got \(\)"),
        (x, ("*batch", 5, 3, 2), "expected shape"),
        (x.long(), ("n", 2), r"floating-point numbers \(n, 2\), got torch.int"),
        (None, ("n", 2), "got NoneType"),
        (x.to("meta"), ("n", 2), "on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            require_numbers(value, "x", shape)


@pytest.mark.parametrize("module, fits", [("__main__", True), ("zuko", False)])
def test_a_class_that_a_notebook_defines_anew_counts_as_ours(module, fits):
    Again = type("Bijection", (), {"__module__": module})
    Map = type("Map", (Again,), {})
    for kind, value in ((Bijection, Map()), (Again, RealNVP(2))):
        if fits:
            require_instance(value, "f", kind, "a bijection")
        else:
            with pytest.raises(ValueError, match="f: expected a bijection"):
                require_instance(value, "f", kind, "a bijection")


MISTAKES = {
    "no integer": (lambda: as_int(2.0, "n"), "n: expected a whole number"),
    "bool": (lambda: as_int(True, "n"), "a whole number of at least 0"),
    "numpy bool": (lambda: as_int(np.True_, "n"), "n: expected a whole number"),
    "below": (lambda: as_int(-1, "n"), "of at least 0, got -1"),
    "no value": (
        lambda: as_int(torch.tensor(3, device="meta"), "n"),
        "n: expected a whole number",
    ),
    "several": (lambda: as_int(torch.ones(2).long(), "n"), "a whole number"),
    "text": (lambda: as_int("3", "n"), "a whole number of at least 0, got '3'"),
    "NaN": (lambda: as_float(nan, "lr"), "lr: expected a finite number, got"),
    "infinite": (lambda: as_float(inf, "lr"), "a finite number, got inf"),
    "numpy NaN": (lambda: as_float(np.float32(nan), "lr"), "a finite number"),
    "no number": (lambda: as_float("1", "lr"), "a finite number, got '1'"),
    "truth": (lambda: as_float(True, "lr"), "a finite number, got True"),
    "an end": (
        lambda: as_float(0, "lr", 0, strict=True),
        "a finite number above 0, got 0",
    ),
    "both ends": (
        lambda: as_float(2, "decay", 0, 1),
        "a finite number of at least 0 and at most 1, got 2",
    ),
    "bool in a shape": (
        lambda: as_shape((True, 2), "n"),
        "n: expected positive integers, got (True, 2)",
    ),
    "float as a shape": (lambda: as_shape(2.0, "n"), "positive integers"),
    "nothing as a shape": (lambda: as_shape(None, "n"), "positive integers"),
    "text as a shape": (lambda: as_shape("ab", "n"), "positive integers"),
    "a number as a function": (
        lambda: require_function(3, "f"),
        "f: expected a function, got 3",
    ),
    "a class as a function": (
        lambda: require_function(Moons, "f"),
        "f: expected a function, got <class",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
