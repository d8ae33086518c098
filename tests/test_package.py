"""The package as a stranger installs it: quick to import, and whole without notebook tools."""

import json
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK_TOOLS = [
    "nbdev",
    "fastcore",
    "execnb",
    "IPython",
    "jupyter_core",
    "ipykernel",
    "sklearn",
]


def seconds(statement):
    """Time of an import in a new process, start of Python not included."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True
        ).stdout
    )


def test_import_takes_at_most_0_7_s_more_than_torch():
    pairs = [
        (seconds("import flowcourse"), seconds("import torch"))
        for _ in range(5)
    ]
    ours, torch = map(min, zip(*pairs))  # the least disturbed of each
    assert ours - torch < 0.7


def test_heavy_packages_are_imported_where_they_are_used():
    code = (
        "import flowcourse, sys, json; print(json.dumps(sorted(sys.modules)))"
    )
    modules = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True
        ).stdout
    )
    heavy = {
        "matplotlib",
        "accelerate",
        "tyro",
        "torchdiffeq",
        "pooch",
        *NOTEBOOK_TOOLS,
    }
    assert not heavy & set(modules)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_is_small_and_complete(wheel):
    names = {
        info.filename: info.compress_size
        for info in zipfile.ZipFile(wheel).infolist()
    }
    data = [name for name in names if name.startswith("flowcourse/files/")]
    assert len(data) == len(list((ROOT / "flowcourse/files").iterdir()))
    assert sum(names[name] for name in data) < 5e6
    assert all(
        f"flowcourse/{path.name}" in names
        for path in (ROOT / "flowcourse").glob("*.py")
    )
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(
        name.startswith(("tests/", "nbs/", "tools/")) for name in names
    )


def test_the_wheel_trains_without_notebook_tools(wheel, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path / "lib"),
            str(wheel),
        ],
        check=True,
    )
    code = f"""
import sys
for name in {NOTEBOOK_TOOLS}:
    sys.modules[name] = None  # an import of it fails
import flowcourse
assert flowcourse.__file__.startswith({str(tmp_path)!r}), flowcourse.__file__
from flowcourse.cli import main
sys.exit(main(["train", "--config", "realnvp.faithful", "--steps", "20", "--out", {str(tmp_path / "run")!r}]))
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lib")},
    )
    assert json.loads((tmp_path / "run/result.json").read_text())


def test_the_lock_satisfies_the_ranges():
    from packaging.requirements import Requirement

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    lock = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for key in ("requirements", "dev_requirements", "lessons_requirements"):
        for requirement in map(Requirement, config["DEFAULT"][key].split()):
            version = lock[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(version), requirement
