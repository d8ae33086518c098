"""Whatever torch's default device is, every bijection can be made, run and trained there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from flowcourse.core import Flow
from flowcourse.coupling import RealNVP
from flowcourse.objectives import MaximumLikelihood
from flowcourse.trainer import fit
from flowcourse.zoo import rows

CHILD = Path(__file__).with_name("devices_child.py")


@pytest.mark.parametrize("name", rows)
def test_a_row_is_made_where_no_number_can_be_read(name):
    row = rows[name]
    for shape in row.event_shapes:
        for context_dim in (0, 2):
            with torch.device("meta"):
                f = row.make(shape, context_dim)
            assert all(t.is_meta for t in f.state_dict().values())


@pytest.fixture(scope="module")
def failed():
    """What fails on the emulated device, by name."""
    if not hasattr(
        backend_registration, "_setup_privateuseone_for_python_backend"
    ):
        pytest.skip("this torch cannot emulate a device in Python")
    child = subprocess.run(
        [sys.executable, str(CHILD)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_the_emulated_device_refuses_what_a_device_refuses(failed):
    assert "the device" not in failed, failed["the device"]


@pytest.mark.parametrize("name", [*rows, "fit", "metrics"])
def test_it_works_on_an_emulated_default_device(failed, name):
    assert name not in failed, failed[name]


def test_fit_trains_what_lies_on_the_cpu_beside_another_default_device():
    flow, x = Flow(RealNVP(2, 2, hidden=(8,))), torch.randn(64, 2)
    with torch.device("meta"):
        fit(
            MaximumLikelihood(flow),
            x,
            validation=x,
            steps=3,
            batch_size=16,
            progress=False,
        )
    assert flow.log_prob(x).isfinite().all()
