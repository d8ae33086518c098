"""Each lesson's exercises, checkers and solutions belong together, and take their numbers from one place."""

import re
from importlib import import_module
from inspect import signature
from pathlib import Path

import nbformat
import pytest

from flowcourse.pages import page

NBS = Path(__file__).resolve().parents[1] / "nbs"
SOLUTIONS = "-solutions"
LESSONS = sorted(
    path.stem.removesuffix(SOLUTIONS)
    for path in NBS.glob(f"*{SOLUTIONS}.ipynb")
)
# as a heading or in bold, where an exercise begins
EXERCISE = re.compile(
    r"^(?:## |\*\*(?:Exercise )?)(\d+\.\d+)\b.*", re.MULTILINE
)


def module_of(lesson):
    """The module with the checkers of a lesson."""
    name = lesson.split("-", 1)[1].replace("-", "_")
    return import_module(f"flowcourse.exercises.{name}")


def cells(notebook, kind):
    """The cells of a notebook with text, or those with code."""
    nb = nbformat.read(NBS / f"{notebook}.ipynb", as_version=4)
    return [cell for cell in nb.cells if cell.cell_type == kind]


def source(notebook, kind):
    """The text or the code of a notebook."""
    return "\n".join(cell.source for cell in cells(notebook, kind))


def exercises(notebook):
    """The exercises of a notebook: the number of each, and the line on which it begins."""
    found = EXERCISE.finditer(source(notebook, "markdown"))
    return {line[1]: line[0] for line in found}


def checkers(module, capsys):
    """The checkers of a module: their names, and the number that each prints."""
    numbers = {}
    for name in module.__all__:
        assert name.startswith("check_"), f"{name} is no checker"
        assert not getattr(module, name)(None)
        number, verdict = capsys.readouterr().out.strip().split(": ")
        assert verdict == "not attempted yet"
        numbers[name] = number
    return numbers


def test_each_module_of_checkers_belongs_to_a_lesson():
    package = Path(import_module("flowcourse.exercises").__file__).parent
    modules = {path.stem for path in package.glob("*.py")}
    of_lessons = {module_of(lesson).__name__ for lesson in LESSONS}
    assert of_lessons == {
        f"flowcourse.exercises.{name}"
        for name in modules - {"__init__", "common"}
    }


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_solutions_export_the_checkers(lesson):
    assert page(module_of(lesson).__name__) == lesson + SOLUTIONS


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_checker_says_that_it_returns_a_verdict(lesson):
    module = module_of(lesson)
    for name in module.__all__:
        assert signature(getattr(module, name)).return_annotation is bool


@pytest.mark.parametrize("lesson", LESSONS)
def test_numbers_are_those_of_the_file_and_have_no_gaps(lesson, capsys):
    stated = exercises(lesson)
    n = range(1, len(stated) + 1)
    assert list(stated) == [f"{int(lesson[:2])}.{i}" for i in n]
    assert list(exercises(lesson + SOLUTIONS)) == list(stated)
    checked = list(checkers(module_of(lesson), capsys).values())
    assert checked == [number for number in stated if number in checked]
    for number in set(stated) - set(checked):
        assert re.search("open|No checker", stated[number]), number


@pytest.mark.parametrize(
    "lesson", [name for name in LESSONS if name != "15-dlgm"]
)
def test_each_lesson_has_four_to_six_exercises_a_fit_and_an_explain(lesson):
    """The lesson on latent models trains for an evening: its exercise with a fit is an open one."""
    stated = exercises(lesson)
    assert 4 <= len(stated) <= 6
    for kind in ("fit", "explain"):
        found = [line for line in stated.values() if kind in line.lower()]
        assert found, f"{lesson}: no exercise is marked as {kind}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_stub_says_nothing_before_it_is_edited(lesson):
    names = "|".join(module_of(lesson).__all__)
    for cell in cells(lesson, "code"):
        if re.search(rf"^(?:_ = )?(?:{names})\(", cell.source, re.MULTILINE):
            said = "".join(o.get("text", "") for o in cell.outputs)
            assert re.fullmatch(r"\d+\.\d+: not attempted yet\n", said), said
            shown = [o for o in cell.outputs if "data" in o]
            assert not shown, f"a bare value stands under {cell.source[:60]}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_lesson_calls_each_checker_and_the_solution_passes_it(
    lesson, capsys
):
    asked = cells(lesson, "code")
    solved = source(lesson + SOLUTIONS, "code")
    for name, number in checkers(module_of(lesson), capsys).items():
        # the notebook of the solutions is run as a test as well
        assert re.search(rf"^assert {name}\(", solved, re.MULTILINE), name
        stub = [
            c
            for c in asked
            if re.search(rf"^(?:_ = )?{name}\(", c.source, re.MULTILINE)
        ]
        assert len(stub) == 1, name
        said = "".join(o.get("text", "") for o in stub[0].outputs)
        assert said.startswith(f"{number}: "), name


@pytest.mark.parametrize("lesson", LESSONS)
def test_no_answer_is_exported(lesson):
    code = [cell.source for cell in cells(lesson + SOLUTIONS, "code")]
    answers = {
        name
        for source in code
        if not source.startswith("#| ")
        for name in re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE)
    }
    assert answers.isdisjoint(vars(module_of(lesson)))
