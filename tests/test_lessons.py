"""Lessons read like lessons: a story of a length that a person reads in half an hour, then the library, along a marked path."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
sys.path.insert(0, str(ROOT / "tools"))

import course_path

from flowcourse.pages import symbols

CORE = ["00-quick-start", "01-change-of-variables", "02-training", "06-coupling",
        "07-splines", "09-masked-flows", "14-variational"]  # fmt: skip
FURTHER = ["03-elementwise", "04-linear", "05-planar", "08-monotone",
           "10-residual", "11-continuous", "12-stochastic",
           "13-images", "15-dlgm", "16-pyro", "17-shower"]  # fmt: skip
LIBRARY = re.compile(r"^## In the library\b", re.MULTILINE)
FORMULA = re.compile(r"\$\$.*?\$\$", re.DOTALL)
HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
WIDTH = 80  # columns of code that a page shows


def text(cell):
    return "".join(cell["source"])


def cells(stem):
    return json.loads((NBS / f"{stem}.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]


def options(cell):
    """The lines of a code cell that begin with `#|`."""
    found = re.findall(r"^#\| *(.*)", text(cell), re.MULTILINE)
    return [line.strip() for line in found]


def body(cell):
    """The lines of a code cell that a reader reads."""
    lines = text(cell).splitlines()
    return [s for s in lines if s.strip() and not s.startswith("#|")]


def exported(cell):
    return any(re.match(r"exports?i?\b", line) for line in options(cell))


def is_open(cell):
    """Whether a page shows the code of a cell without being asked to."""
    hidden = r"(hide|exports?i?|default_exp|include: *false|echo: *false|code-fold: *true)\b"
    shut = any(re.match(hidden, line) for line in options(cell))
    return cell["cell_type"] == "code" and bool(body(cell)) and not shut


def story(stem):
    """The cells of a lesson before its library part."""
    for cell in cells(stem):
        if cell["cell_type"] == "markdown" and LIBRARY.search(text(cell)):
            yield cell | {"source": [LIBRARY.split(text(cell))[0]]}
            return
        yield cell


def open_cells(stem):
    return [cell for cell in story(stem) if is_open(cell)]


def counts(stem):
    """Words, displayed equations and lines of open code of a story."""
    # the line that `tools/prepare` writes is a signpost, not a part of the story
    markdown = [c for c in story(stem) if c["cell_type"] == "markdown"]
    prose = [text(c) for c in markdown if c.get("id") != course_path.MARK]
    words = sum(len(FORMULA.sub(" ", part).split()) for part in prose)
    equations = sum(len(FORMULA.findall(part)) for part in prose)
    return words, equations, sum(len(body(c)) for c in open_cells(stem))


def test_counting_counts():
    """What is counted is what stands open: neither folds nor hidden cells, nor the library part."""
    folded = {"cell_type": "code", "source": ["#| code-fold: true\n", "x = 1"]}
    assert not is_open(folded)
    assert is_open(
        {"cell_type": "code", "source": ["#| label: fig-x\n", "x = 1"]}
    )
    for line in (
        "#| export",
        "#| exporti",
        "#| exports",
        "#| hide",
        "#| echo: false",
    ):
        assert not is_open({"cell_type": "code", "source": [line, "\nx = 1"]})
    assert len(FORMULA.findall("$$a$$ and $b$ and\n$$\nc\n$$ {#eq-c}")) == 2


def test_the_path_is_marked():
    """The sidebar's sections are the path; every page of it says so, and where it leads."""
    assert course_path.sections() == {
        course_path.CORE: CORE,
        course_path.FURTHER: FURTHER,
    }
    for stem, line in course_path.lines():
        assert text(cells(stem)[1]) == line, stem
    for here, after in zip(CORE, CORE[1:]):
        end = "\n".join(text(c) for c in list(story(here))[-4:])
        assert re.search(rf"\*\*Next.*{after}\.ipynb", end), here
    home = "\n".join(text(cell) for cell in cells("index"))
    places = [home.index(f"{stem}.html") for stem in (*CORE, *FURTHER)]
    assert places == sorted(places), "the home page shows the path in its order"


@pytest.mark.parametrize("stem", CORE)
def test_a_story_is_read_in_half_an_hour(stem):
    words, equations, lines = counts(stem)
    assert words <= 2200 and equations <= 12 and lines <= 200
    assert words / 180 + equations + lines / 25 <= 35


@pytest.mark.parametrize("stem", CORE)
def test_a_story_exports_nothing(stem):
    assert LIBRARY.search("\n".join(text(c) for c in cells(stem)))
    assert not [
        c["id"] for c in story(stem) if c["cell_type"] == "code" and exported(c)
    ]


@pytest.mark.parametrize("stem", CORE)
def test_open_cells_are_small(stem):
    """At most 9 % over 20 lines, none over 40, one class a cell."""
    found = open_cells(stem)
    sizes = [len(body(cell)) for cell in found]
    assert max(sizes) <= 40
    assert sum(size > 20 for size in sizes) <= 0.09 * len(sizes)
    for cell in found:
        assert sum(s.startswith("class ") for s in body(cell)) <= 1, cell["id"]


@pytest.mark.parametrize("stem", CORE + FURTHER)
def test_open_code_is_no_wider_than_the_page(stem):
    wide = [s for c in open_cells(stem) for s in body(c) if len(s) > WIDTH]
    assert not wide


@pytest.mark.parametrize("stem", CORE)
def test_a_picture_comes_before_the_code(stem):
    for cell in story(stem):
        kinds = {k for o in cell.get("outputs", []) for k in o.get("data", {})}
        if kinds & {"image/png", "text/html"} or "![" in text(cell):
            return
        assert not is_open(cell), f"{cell['id']}: code before the first picture"
    pytest.fail("no picture")


@pytest.mark.parametrize("stem", CORE + FURTHER)
def test_figures_have_captions_and_words(stem):
    for cell in cells(stem):
        kinds = {k for o in cell.get("outputs", []) for k in o.get("data", {})}
        if "image/png" in kinds:
            named = {line.split(":")[0] for line in options(cell)}
            assert {"label", "fig-cap", "fig-alt"} <= named, cell["id"]


@pytest.mark.parametrize(
    "path", sorted(NBS.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_colours_are_named_in_one_place(path):
    if path.stem != "lib-plots":
        found = [c["id"] for c in cells(path.stem) if HEX.search(text(c))]
        assert not found, "take a colour from flowcourse.plots.COLORS"


@pytest.mark.parametrize("stem", [*CORE[1:], *FURTHER, "ref-notation"])
def test_symbols_occur_in_code(stem):
    """The third column of a table of symbols names what the page's code uses, or is a dash."""
    code = "\n".join(text(c) for c in cells(stem) if c["cell_type"] == "code")
    if stem == "ref-notation":
        code = "\n".join(
            p.read_text() for p in (ROOT / "flowcourse").glob("*.py")
        )
    rows = list(symbols(NBS / f"{stem}.ipynb"))
    assert rows, "a table with the columns: symbol, meaning, in code"
    for symbol, _, name in rows:
        names = re.findall(r"`([^`]+)`", name)
        assert names or name in ("-", "–", "—"), f"{symbol}: {name}"
        for each in names:
            first = re.escape(each.split("(")[0])
            assert re.search(rf"(?<!\w){first}(?!\w)", code), (
                f"{symbol}: {each}"
            )


def test_the_notation_page_has_every_symbol():
    """The page is executed again when a lesson's table changes."""
    outputs = [o for c in cells("ref-notation") for o in c.get("outputs", [])]
    saved = "".join(
        "".join(o["data"]["text/markdown"])
        for o in outputs
        if "text/markdown" in o.get("data", {})
    )
    for stem in CORE + FURTHER:
        for symbol, meaning, name in symbols(NBS / f"{stem}.ipynb"):
            assert f"| {symbol} | {meaning} | {name} |" in saved, stem
