"""The package as a stranger installs it: quick to import, and whole without notebook tools."""

import json
import pkgutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import flowcourse

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


# what a first program is made of
TOP = set(
    """
    Bijection Compose Inverse Flow StandardNormal DiagonalGaussian
    GaussianMixture Uniform Elementwise AffineMap AdditiveMap Coupling Couplings
    NICE RealNVP NSF MAF IAF NAF BNAF Planar Radial Sylvester ResidualFlow Continuous
    MLPVelocity check_bijection load toys
    ScoreVelocity Guided SDE fit Recipe Objective MaximumLikelihood ReverseKL
    FlowMatching ScoreMatching
    """.split()
)


@pytest.fixture(scope="module")
def modules():
    """The modules of the package by name, but for the command."""
    names = {m.name for m in pkgutil.iter_modules(flowcourse.__path__)}
    return {
        name: import_module(f"flowcourse.{name}")
        for name in names - {"__main__"}
    }


def test_the_names_at_the_top_are_few_and_public_at_home(modules):
    assert set(flowcourse.__all__) == TOP
    for name in TOP:
        thing = getattr(flowcourse, name)
        assert any(
            vars(module).get(name) is thing
            and name in getattr(module, "__all__", ())
            for module in modules.values()
        ), name


def test_no_name_at_the_top_shadows_a_module(modules):
    assert not set(modules) & TOP
    for name, module in modules.items():
        assert getattr(flowcourse, name) is module
    import flowcourse.zoo as z

    assert isinstance(z, ModuleType) and isinstance(z.rows, Mapping)


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
        path.relative_to(ROOT).as_posix() in names
        for path in (ROOT / "flowcourse").rglob("*.py")
    )
    assert any(name.endswith("LICENSE") for name in names)
    assert "flowcourse/py.typed" in names
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


def ranges(*keys):
    """The requirements in settings.ini."""
    from packaging.requirements import Requirement

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return [
        Requirement(r) for key in keys for r in config["DEFAULT"][key].split()
    ]


def test_the_lock_satisfies_the_ranges():
    lock = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    keys = "requirements", "dev_requirements", "lessons_requirements"
    for requirement in ranges(*keys):
        version = lock[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), requirement


def test_the_lower_bounds_are_the_oldest_that_the_ranges_allow():
    command = [sys.executable, str(ROOT / "tools/lower_bounds.py")]
    oldest, but_torch = (
        subprocess.run(
            [*command, *names], check=True, capture_output=True, text=True
        ).stdout.split()
        for names in ([], ["torch"])
    )
    assert [p for p in oldest if not p.startswith("torch==")] == but_torch
    pins = dict(pin.split("==") for pin in oldest)
    for requirement in ranges("requirements", "dev_requirements"):
        ends = [s for s in requirement.specifier if s.operator == ">="]
        assert pins.get(requirement.name) == (ends[0].version if ends else None)
        if ends:
            assert requirement.specifier.contains(pins[requirement.name])


def test_the_workflow_runs_each_python_that_we_name(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from matrix import PYTHONS

    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    jobs = workflow["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    assert PYTHONS[0] == config["DEFAULT"]["min_python"]
