#!/usr/bin/env python3
"""Check the zoo's contract with each set of kernels that this processor has, on one thread and on two.

Which kernels multiply matrices decides how results round. `tools/contract.py 8` checks 8 rows that
follow from the commit, and `tools/contract.py` all of them. Each set needs a process of its own.
"""

import hashlib
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
# of ATEN_CPU_CAPABILITY, each a part of the next
KERNELS = ["default", "avx2", "avx512"]


def kernels():
    """The sets that this processor has."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    return KERNELS[: KERNELS.index(own) + 1] if own in KERNELS else [own]


def commit():
    """The commit, or the version where there is no git."""
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.check_output(
            git, cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        from flowcourse import __version__

        return f"version {__version__}"


def check(settings, tests):
    """Run the tests with these settings of the environment: the verdict in words, and whether it is good."""
    command = [sys.executable, "-m", "pytest", "--quiet", *tests]
    run = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    words = " ".join(f"{key}={value}" for key, value in settings.items())
    told = run.stdout.strip() if run.returncode else ""
    last = (run.stdout + run.stderr).strip().splitlines()[-1]
    return f"{words}: {last}\n{told}".strip(), run.returncode == 0


def main(size=None):
    """Check `size` rows, or all."""
    from test_zoo import cases

    names = [case.id for case in cases]
    chance = random.Random(commit())
    seed = int(hashlib.sha256(commit().encode()).hexdigest()[:6], 16)
    which = "all rows"
    if size:
        names = sorted(chance.sample(names, int(size)))
        which = f"rows {', '.join(names)}"
    print(f"The contract at {commit()}: {which}", flush=True)
    tests = ["tests/test_zoo.py::test_kernels_and_threads_are_those_asked_for"]
    tests += [
        f"tests/test_zoo.py::{test}[{name}]"
        for name in names
        for test in ("test_as_made", "test_the_contract")
    ]
    settings = [
        {
            "ATEN_CPU_CAPABILITY": name,
            "OMP_NUM_THREADS": str(threads),
            "CONTRACT_SEED": str(seed),
            # or two threads that wait for each other eat the processor
            "OMP_WAIT_POLICY": "passive",
        }
        for name in kernels()
        for threads in (1, 2)
    ]
    good = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for verdict, fine in pool.map(check, settings, [tests] * len(settings)):
            print(verdict, flush=True)
            good &= fine
    return not good


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
