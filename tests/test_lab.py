"""The quick start in a real JupyterLab, run by a real browser."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def test_quick_start_runs_in_jupyterlab():
    pytest.importorskip("playwright", reason="playwright is not installed")
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on PATH")
    from lab_smoke import run_in_lab

    cells, done, errors, labels = run_in_lab("nbs/00-quick-start.ipynb")
    assert errors == []
    assert done == cells > 0
    assert len(set(labels)) == 2, "a key moves the player from step to step"
