"""Every row of the zoo keeps the contract, and a checkpoint restores it under another seed."""

import os

import pytest
import torch
from helpers import noise, shaken
from torch.distributions import biject_to

from flowcourse.elementwise import elementwise_maps
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


def test_no_two_rows_are_the_same_map():
    seen = {}
    for name, row in zoo.items():
        torch.manual_seed(0)
        f = shaken(row.make(row.event_shapes[-1]))
        z = biject_to(f.domain)(noise(3, *row.event_shapes[-1])).float()
        image, _ = f(z)
        words = f"{f!r} {image.detach().numpy().round(4).tolist()}"
        assert words not in seen, f"{name} is {seen[words]}"
        seen[words] = name


def test_every_row_whose_numbers_can_come_from_a_context_has_one():
    fixed = {
        name
        for name, row in zoo.items()
        if not row.make(row.event_shapes[0], 2).context_dim
    }
    assert fixed == {
        name
        for name, scalar_map in elementwise_maps.items()
        if not scalar_map.n_params
    }


@pytest.mark.parametrize(
    "name", [name for name, row in zoo.items() if "identity" in row.exempt]
)
def test_a_row_is_exempt_from_the_identity_because_it_is_not(name):
    row = zoo[name]
    f = row.make(row.event_shapes[-1]).eval()
    z = biject_to(f.domain)(torch.randn(8, *row.event_shapes[-1]))
    assert not torch.allclose(f(z)[0], z, rtol=0, atol=1e-6)


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match="realnvp"):
        zoo["realnpv"]
