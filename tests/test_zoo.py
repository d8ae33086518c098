"""Every row of the zoo keeps the contract, and a checkpoint restores it under another seed."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from helpers import noise, shaken
from torch import nn
from torch.distributions import biject_to, constraints
from torch.testing import assert_close

import flowcourse
from flowcourse.core import COSTS
from flowcourse.scalar_maps import elementwise_maps
from flowcourse.testing import check_bijection
from flowcourse.zoo import Row, Rows, rows

ROOT = Path(__file__).parents[1]
# of weights, points and noise; tools/contract.py draws another one with each commit
SEED = int(os.environ.get("CONTRACT_SEED", "0"))
cases = [
    pytest.param(
        row,
        shape,
        context_dim,
        id=f"{name}-{'x'.join(map(str, shape))}-{context_dim}",
    )
    for name, row in rows.items()
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


@pytest.mark.parametrize("name", rows)
def test_a_state_dict_restores_a_row_made_under_another_seed(name):
    row = rows[name]
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
    for name, row in rows.items():
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
        for name, row in rows.items()
        if not row.make(row.event_shapes[0], 2).context_dim
    }
    assert fixed == {
        name
        for name, scalar_map in elementwise_maps.items()
        if not scalar_map.n_params
    } | {"squeeze", "logit-margin"}


@pytest.mark.parametrize(
    "name", [name for name, row in rows.items() if "identity" in row.exempt]
)
def test_a_row_is_exempt_from_the_identity_because_it_is_not(name):
    row = rows[name]
    f = row.make(row.event_shapes[-1]).eval()
    z = biject_to(f.domain)(torch.randn(8, *row.event_shapes[-1]))
    x = f(z)[0]
    assert x.shape != z.shape or not torch.allclose(x, z, rtol=0, atol=1e-6)


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match="realnvp"):
        rows["realnpv"]
    assert "realnpv" not in rows and rows.get("realnpv") is None


def test_the_module_has_the_name_of_the_zoo_and_fills_its_table_when_asked():
    code = """
import sys
import flowcourse.zoo as zoo
assert "flowcourse.zoo_linear" not in sys.modules
assert zoo.rows["lu"].family == "linear"
assert "flowcourse.zoo_linear" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert flowcourse.zoo.rows is rows


def test_reading_the_table_makes_no_network_and_moves_no_seed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was made")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    before = torch.random.get_rng_state()
    for name, row in rows.items():
        assert row.forward_cost in COSTS and row.inverse_cost in COSTS, name
        assert row.domain and row.lesson and repr(row)
    assert repr(rows) and rows._repr_markdown_()
    assert torch.equal(torch.random.get_rng_state(), before)


def of_coordinates(domain):
    """The constraint on each coordinate of an event."""
    while isinstance(domain, constraints.independent):
        domain = domain.base_constraint
    parts = getattr(domain, "cseq", [domain])
    (found,) = {str(part) for part in parts}
    return found


@pytest.mark.parametrize("name", rows)
def test_a_row_states_what_its_map_declares(name):
    row = rows[name]
    for shape in row.event_shapes:
        f = row.make(shape)
        assert f.event_shape in (shape, None)
        assert (row.forward_cost, row.inverse_cost) == (
            f.forward_cost,
            f.inverse_cost,
        )
        assert f.estimated == row.estimated
        assert of_coordinates(f.domain) == str(row.domain)
    assert (ROOT / "nbs" / f"{row.lesson}.ipynb").exists()


@pytest.mark.parametrize("name", rows)
def test_a_push_is_the_point_of_forward(name):
    row = rows[name]
    f = shaken(row.make(row.event_shapes[0], 2).double(), 0.3)
    z = biject_to(f.domain)(noise(5, *row.event_shapes[0]))
    context = noise(2) if f.context_dim else None
    with torch.no_grad():
        point, _ = f(z, context)
        assert_close(f.push(z, context), point, rtol=1e-8, atol=1e-8)


def test_a_row_is_frozen():
    with pytest.raises(FrozenInstanceError):
        rows["realnvp"].family = "linear"


def test_the_table_prints_as_one():
    lines = repr(rows).splitlines()
    assert len(lines) == len(rows) + 2 and len(set(map(len, lines))) == 1
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[0] == "composition"
    linked = rows._repr_markdown_()
    assert "[coupling](06-coupling.ipynb)" in linked


def test_a_name_stands_once(monkeypatch):
    """A second row of a name in another family is a mistake that is told."""
    from flowcourse import zoo, zoo_linear

    twice = zoo_linear.rows | {"planar": rows["planar"]}
    monkeypatch.setattr(zoo_linear, "rows", twice)
    with pytest.raises(ValueError, match="'planar'"):
        len(Rows(zoo._gather))


def test_a_row_of_ones_own_makes_maps_of_its_kind():
    row = Row(rows["realnvp"].maker, "coupling", "coupling", "nobody")
    check_bijection(row.make(2, 3), torch.randn(8, 2), torch.randn(8, 3))
    with pytest.raises(ValueError, match="expected 1 dimensions"):
        row.make((1, 8, 8))
