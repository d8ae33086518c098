"""Eight affine couplings on four toys, in the time that the study of maps gives to four layers."""

from pathlib import Path

from flowcourse.studies import load_study

SECONDS = 20.0  # as in the study of maps
maps = load_study(str(Path(__file__).with_name("maps.py"))).run.__globals__

jobs = [
    {"data": data, "kind": "coupling", "scalar_map": "affine", "layers": 8}
    for data in ("moons", "eight-gaussians", "checkerboard", "rings")
]


def run(folder, **job):
    """Train and judge as the study of maps does."""
    maps["SECONDS"] = SECONDS
    return maps["run"](folder, **job)
