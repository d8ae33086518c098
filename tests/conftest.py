"""Shared by all tests: one thread where none are asked for, one seed, and no progress bars."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet_and_reproducible(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scramble():
    """Give every parameter of a module a value away from its start."""

    def scrambled(module, sd=0.3):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(sd * torch.randn_like(p))
        return module

    return scrambled
