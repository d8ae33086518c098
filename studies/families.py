"""Whole families of flows at equal time, on four toys and two real sets, at 20 and at 120 seconds.

Couplings and autoregressive layers train three seeds side by side in that time. The fast paths of
residual and continuous flows cannot be stacked: each of their seeds has the time to itself, one
after another, and so three times as much in all.
"""

from pathlib import Path

from flowcourse.studies import load_study

train_for = load_study(str(Path(__file__).with_name("maps.py"))).run

TIMES = (20.0, 120.0)  # seconds of processor time
SETS = ("moons", "rings", "checkerboard", "eight-gaussians")
SETS += ("optdigits", "breast-cancer")
SPLINE = "rational-quadratic-spline"
ALONE = {"together": False}
FAMILIES = {
    "affine coupling": {"kind": "coupling"},
    "spline coupling": {"kind": "coupling", "scalar_map": SPLINE},
    "affine autoregressive": {"kind": "autoregressive"},
    "spline autoregressive": {"kind": "autoregressive", "scalar_map": SPLINE},
    "residual": {"kind": "residual", "layers": 8} | ALONE,
    "continuous": {"kind": "continuous"} | ALONE,
}

jobs = [
    {"data": data, "family": family, "seconds": seconds}
    for family in FAMILIES
    for seconds in TIMES
    for data in SETS
]


def run(folder, data, family, seconds):
    """Train three seeds of a family for a time, and judge them on their test rows."""
    return train_for(folder, data, seconds=seconds, **FAMILIES[family])
