"""The contributors' page leads from a clone to a new row of the zoo: its steps, done as it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "nbs", "flowcourse", "tools", "tests"
FILES = "settings.ini", "setup.py", "pyproject.toml", "_quarto.yml", "README.md"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def cell(kind, text):
    made = {"cell_type": kind, "id": f"swirl{len(text)}"}
    made |= {"metadata": {}, "source": text}
    return made | (
        {"outputs": [], "execution_count": None} if kind == "code" else {}
    )


def edit(path, change):
    """Change the sources of a notebook's cells."""
    nb = read(path)
    for part in nb["cells"]:
        part["source"] = change(source(part))
    path.write_text(json.dumps(nb))


@pytest.fixture(scope="module")
def page():
    """The cells of the page."""
    return read(ROOT / "nbs/ref-contributing.ipynb")["cells"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project, and a function that runs a command in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in (*FILES, "conftest.py"):
        shutil.copy(ROOT / name, folder)

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return folder, run


def test_the_page_leads_to_a_row(page, clone):
    folder, run = clone
    codes = [source(c) for c in page if c["cell_type"] == "code"]
    imports = next(c for c in codes if "import Conditional" in c)
    swirl = next(c for c in codes if c.startswith("class Swirl"))
    texts = [source(c) for c in page if c["cell_type"] == "markdown"]
    step = next(t for t in texts if "**4. The row.**" in t)
    row = re.search(r"```python\n(.*?)```", step, re.DOTALL)[1]

    # steps 2 to 4
    head = "# Swirl\n\n> Points turned round the origin, the more the nearer"
    nb = read(folder / "nbs/lib-bnaf.ipynb")
    nb["cells"] = [
        cell("markdown", head),
        cell("code", "#| default_exp swirl"),
        cell("code", f"#| export\n{imports}"),
        cell("code", f"#| export\n{swirl}"),
    ]
    (folder / "nbs/lib-swirl.ipynb").write_text(json.dumps(nb))

    def with_row(text):
        if text.startswith("#| export") and "import SMALL" in text:
            return f"{text}\nfrom flowcourse.swirl import Swirl"
        if "\nrows = {" in text:
            return f"{text.rstrip().removesuffix('}')}{row}}}"
        return text

    edit(folder / "nbs/lib-zoo-planar.ipynb", with_row)
    status, told = run("tools/prepare")
    assert status == 0, told

    # what is forgotten is named
    status, told = run("-m", "pytest", "-q", "tests/test_house.py")
    assert status == 1
    for place in ("_quarto.yml", "nbs/index.ipynb", "tests/public-names.txt"):
        assert re.search(rf"{place}.*swirl", told), told

    # step 5
    listed = folder / "tests/public-names.txt"
    names = sorted([*listed.read_text().split(), "swirl.Swirl"])
    listed.write_text("\n".join(names) + "\n")
    sidebar = folder / "_quarto.yml"
    line = "          - nbs/lib-bnaf.ipynb\n"
    both = line + line.replace("bnaf", "swirl")
    sidebar.write_text(sidebar.read_text().replace(line, both))
    link = re.compile(r"\[BNAF\]\((\S+)lib-bnaf.html\)")
    edit(
        folder / "nbs/index.ipynb",
        lambda text: link.sub(r"\g<0>, [swirl](\1lib-swirl.html)", text),
    )

    # step 6
    assert run("tools/prepare")[0] == 0
    tests = "tests/test_house.py", "tests/test_zoo.py"
    status, told = run("-m", "pytest", "-q", *tests, "-k", "swirl or house")
    assert status == 0, told
