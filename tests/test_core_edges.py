"""Arguments at the edge: numpy's and torch's numbers, what is not finite, what is no map at all."""

import math
import re

import numpy as np
import pytest
import torch

from flowcourse.core import as_float, as_int, as_shape


@pytest.mark.parametrize(
    "kind", [int, np.int64, np.uint8, torch.tensor, np.array]
)
def test_integers_of_any_library_are_read(kind):
    assert type(as_int(kind(3), "n")) is int and as_int(kind(3), "n") == 3
    shape = as_shape(kind(3), "n")
    assert shape == (3,) and type(shape[0]) is int
    assert as_shape([kind(3), 2], "n") == (3, 2)


@pytest.mark.parametrize(
    "kind", [int, float, np.float32, np.int64, torch.tensor, np.array]
)
def test_numbers_of_any_library_are_read(kind):
    number = as_float(kind(3), "lr")
    assert type(number) is float and number == 3.0


REFUSED = {
    "integer": (lambda: as_int(2.0, "n"), "n: expected an integer of at least"),
    "bool": (lambda: as_int(True, "n"), "an integer of at least 1, got True"),
    "numpy bool": (lambda: as_int(np.True_, "n"), "an integer of at least 1"),
    "below": (lambda: as_int(-1, "n", 0), "of at least 0, got -1"),
    "above": (lambda: as_int(2**64, "seed", 0, 9), "an integer from 0 to 9"),
    "meta": (
        lambda: as_int(torch.tensor(3, device="meta"), "n"),
        "n: expected an integer",
    ),
    "several": (lambda: as_int(torch.ones(2).long(), "n"), "an integer"),
    "text": (lambda: as_int("3", "n"), "an integer of at least 1, got '3'"),
    "NaN": (lambda: as_float(math.nan, "lr"), "lr: expected a finite number,"),
    "infinite": (lambda: as_float(math.inf, "lr"), "a finite number, got inf"),
    "numpy NaN": (lambda: as_float(np.float32("nan"), "lr"), "a finite number"),
    "not a number": (lambda: as_float("1", "lr"), "a finite number, got '1'"),
    "truth": (lambda: as_float(True, "lr"), "a finite number, got True"),
    "an end": (
        lambda: as_float(0, "lr", 0, strict=True),
        "a finite number above 0, got 0",
    ),
    "both ends": (
        lambda: as_float(2, "decay", 0, 1),
        "a finite number of at least 0 and of at most 1, got 2",
    ),
    "bool in a shape": (
        lambda: as_shape((True, 2), "n"),
        "n: expected positive integers, got (True, 2)",
    ),
    "float as a shape": (lambda: as_shape(2.0, "n"), "positive integers"),
    "nothing as a shape": (lambda: as_shape(None, "n"), "positive integers"),
    "text as a shape": (lambda: as_shape("ab", "n"), "positive integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
