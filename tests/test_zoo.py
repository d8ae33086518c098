"""Every row of the zoo keeps the contract, and a checkpoint restores it under another seed."""

import os

import pytest
import torch
from torch.distributions import biject_to

from flowcourse.testing import check_bijection
from flowcourse.zoo import zoo

# of weights, points and noise; tools/contract.py draws another one with each commit
SEED = int(os.environ.get("CONTRACT_SEED", "0"))
cases = [
    pytest.param(
        row,
        shape,
        context_dim,
        id=f"{name}-{'x'.join(map(str, shape))}-{context_dim}",
    )
    for name, row in zoo.items()
    for shape in row.event_shapes
    for context_dim in (0, 2)
    if row.make(shape, context_dim).context_dim
    == context_dim  # a fixed map takes none
]


@pytest.mark.parametrize(("row", "shape", "context_dim"), cases)
def test_as_made(row, shape, context_dim):
    check(row, shape, context_dim, levels=(0.0,))


@pytest.mark.parametrize(("row", "shape", "context_dim"), cases)
def test_the_contract(row, shape, context_dim):
    check(row, shape, context_dim, levels=(1.0, 3.0))


def check(row, shape, context_dim, levels):
    """The contract at some levels of noise on the parameters."""
    torch.manual_seed(SEED)
    f = row.make(shape, context_dim)
    context = torch.randn(8, context_dim) if context_dim else None
    z = biject_to(f.domain)(torch.randn(8, *shape))
    check_bijection(f, z, context, levels=levels, exempt=row.exempt, seed=SEED)


def test_kernels_and_threads_are_those_asked_for():
    kernels = os.environ.get("ATEN_CPU_CAPABILITY")
    if kernels is not None:
        assert torch.backends.cpu.get_cpu_capability().lower() == kernels
    threads = os.environ.get("OMP_NUM_THREADS")
    assert torch.get_num_threads() == int(threads or 1)


@pytest.mark.parametrize("name", zoo)
def test_a_state_dict_restores_a_row_made_under_another_seed(name):
    row = zoo[name]
    torch.manual_seed(1)
    one = row.make(row.event_shapes[-1]).eval()
    torch.manual_seed(2)
    other = row.make(row.event_shapes[-1]).eval()
    other.load_state_dict(one.state_dict())
    z = biject_to(one.domain)(torch.randn(4, *row.event_shapes[-1]))
    for got, wanted in zip(other(z), one(z)):
        assert torch.equal(got, wanted)


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match="realnvp"):
        zoo["realnpv"]
