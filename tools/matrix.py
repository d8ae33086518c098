#!/usr/bin/env python3
"""Run the fast tier on each Python on PATH, and at the lower ends of the ranges in settings.ini.

Each has an environment of its own, which pip fills as its settings say. Torch is large, so it is not taken
at its lower end. What did not run is said, with the reason.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lower_bounds import lower_bounds

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.11", "3.12", "3.13"]


def run(*command):
    """Run a command, its output on ours: why it failed, or nothing."""
    code = subprocess.run(command, check=False, cwd=ROOT).returncode
    return f"`{' '.join(command)}` ended with {code}" if code else ""


def usable(version):
    """The Python of this version on PATH, or None. A shim of a version manager may be there and not run."""
    path = shutil.which(f"python{version}")
    if path is None:
        return None
    probe = [path, "-c", "import ensurepip, venv"]
    fine = subprocess.run(probe, check=False, capture_output=True)
    return None if fine.returncode else path


def tried(python, folder, constraints):
    """Install and run: the verdict."""
    if python is None:
        return "did not run: it is not on PATH, or has no venv"
    bin_ = f"{folder}/bin"
    why = run(python, "-m", "venv", folder) or run(
        *(f"{bin_}/pip", "install", "--quiet"),
        *("--constraint", constraints, "--editable", ".[dev]"),
    )
    if why:
        return f"did not run: {why}"
    why = run("make", "--no-print-directory", "fast", f"BIN={bin_}")
    return f"failed: {why}" if why else "passed"


def main():
    """Try everything; 1 where something failed, and not where it could not run."""
    found = {version: usable(version) for version in PYTHONS}
    verdicts = {
        f"Python {version}, the locked packages": tried(
            python, f".venv-{version}", "constraints.txt"
        )
        for version, python in found.items()
    }
    oldest = next(filter(found.get, PYTHONS), PYTHONS[0])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        print(*lower_bounds(["torch"]), sep="\n", file=constraints, flush=True)
        verdicts[f"Python {oldest}, the oldest packages but for torch"] = tried(
            found[oldest], ".venv-lower", constraints.name
        )
    print()
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    return any(verdict.startswith("failed") for verdict in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
