"""Gradients beside difference quotients: how far they are doubted, and whose they are."""

import pytest
import torch
from torch import nn

from flowcourse.core import Bijection
from flowcourse.differences import Slopes, _against
from flowcourse.probes import Case


def test_a_slope_is_doubted_by_ten_times_what_the_quotients_disagree():
    quotients = torch.tensor([1.0, 1.1, 1.05, 1.0, 1.0])[:, None]
    error, doubt = _against(torch.tensor([2.0]), quotients)
    assert float(error) == pytest.approx(0.9)
    assert float(doubt) == pytest.approx(0.5)


class Named(Bijection):
    """A shift whose parameter has the name of an input; its gradient is off by `share`."""

    def __init__(self, share=1.0):
        super().__init__(2)
        self.z, self.share = nn.Parameter(torch.zeros(2)), share

    def _forward(self, z, context):
        moved = z + self.share * self.z + (1 - self.share) * self.z.detach()
        return moved, z.new_zeros(z.shape[:-1])

    def _inverse(self, x, context):
        return x - self.z, x.new_zeros(x.shape[:-1])


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_parameter_may_have_the_name_of_an_input(share):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    case = Case(Named(share).double(), z, None, 0.0, generator)
    slopes = Slopes(case, case.forward, torch.arange(5))
    assert slopes.not_finite(0) is None
    error, tolerance, words = slopes.in_input(0, "z", 1e-6)
    assert (error < tolerance).all() and words == "z"
    error, tolerance, words = slopes.in_parameters(0, 1e-6)
    assert bool(error < tolerance) == (share == 1.0)
    assert words == ("parameters" if share == 1.0 else "parameter z")
    assert not case.bijection.z.any()  # moved, and put back
