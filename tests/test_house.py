"""The house: which notebook exports which module, how large it is, what it may import, and which names are public."""

import ast
import io
import json
import re
import tokenize
from collections import Counter
from importlib import import_module
from inspect import Parameter, getdoc, isclass, isfunction, signature
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flowcourse"
BY_HAND = {"__init__.py", "__main__.py", "_quiet.py", "_modidx.py"}
NAMES = ROOT / "tests/public-names.txt"
ROOM = re.compile(r"(\d\d-|lib-|ref-)[a-z0-9-]+|index")
# `#| default_exp name`, `#| export name`
EXPORTS = re.compile(r"(?m)^#\| *(default_exp|exports?i?) +([\w.]+)")


def modules():
    """The path of each module that notebooks export, by its name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in BY_HAND
    }


def notebooks():
    """The text of each notebook's code, by its file's name."""
    return {
        path.stem: "\n".join(
            "".join(cell["source"])
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == "code"
        )
        for path in sorted((ROOT / "nbs").glob("*.ipynb"))
    }


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path):
    """The names that a module defines at its top level."""
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (
                    n.id for n in ast.walk(target) if isinstance(n, ast.Name)
                )


def code_lines(path):
    """How many lines of code a module has, without comments, docstrings and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines, silent = set(), (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
    silent += (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0])
        value = getattr(node, "value", None)
        words = isinstance(node, ast.Expr) and isinstance(value, ast.Constant)
        if named == "__all__" or (words and isinstance(value.value, str)):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def below(name, path):
    """The modules of ours that a module imports when it is imported."""
    package = name.rsplit(".", 1)[0].split(".")
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom):
            base = (
                package[: len(package) + 1 - node.level] if node.level else []
            )
            parts = [*base, *([node.module] if node.module else [])]
            found = ".".join(parts)
            yield from (m for m in modules() if m == found)
            for alias in node.names:
                yield from (
                    m for m in modules() if m == f"{found}.{alias.name}"
                )


def public(module):
    """The public names of a module and what they are."""
    found = import_module(module)
    return {name: vars(found)[name] for name in found.__all__}


def test_a_notebook_has_a_room_and_one_or_two_modules():
    homes = Counter()
    for stem, code in notebooks().items():
        assert ROOM.fullmatch(stem), stem
        assert "auto" not in stem, f"nbdev's index passes over {stem}"
        exported = dict.fromkeys(name for _, name in EXPORTS.findall(code))
        homes.update([*exported])
        words = stem.removesuffix("-solutions").removeprefix("lib-")
        words = re.sub(r"^\d\d-", "", words).replace("-", "_")
        if stem.startswith("ref-") or stem == "index":
            assert not exported, stem
        elif stem.endswith("-solutions"):
            assert list(exported) == [f"exercises.{words}"], stem
        elif stem.startswith("lib-") and stem != "lib-exercises":
            told = (
                f"{stem} exports {[*exported]}, where its name asks for {words}"
            )
            assert list(exported) == [words], told
    assert set(homes.values()) == {1}, "a module has one home"
    exported = {f"flowcourse.{name}" for name in homes}
    assert exported == set(modules())


def test_a_number_is_given_once():
    numbers = Counter(
        stem[:2]
        for stem in notebooks()
        if stem[0].isdigit() and not stem.endswith("-solutions")
    )
    assert set(numbers.values()) == {1}
    for stem in notebooks():
        if stem.endswith("-solutions"):
            assert stem.removesuffix("-solutions") in notebooks()


def test_imports_stand_in_cells_of_their_own():
    """The site's build runs cells with an import and those that export, and no other."""
    mixed = []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            code = "".join(cell["source"])
            if cell["cell_type"] != "code" or re.match(
                r"#\| *(hide|export)", code
            ):
                continue
            kinds = {
                isinstance(node, (ast.Import, ast.ImportFrom))
                for node in ast.parse(code).body
            }
            if kinds == {True, False}:
                mixed.append(f"{path.name}: {code[:60]!r}")
    assert not mixed, mixed


def test_packages_within_are_empty():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not path.read_text().strip(), path


@pytest.mark.parametrize("name", modules())
def test_a_module_is_one_screen_of_thought(name):
    assert code_lines(modules()[name]) <= 420
    first = (ast.get_docstring(tree(modules()[name])) or "").split("\n")[0]
    told = 'the first cell needs a title and "> " with one sentence'
    assert 10 < len(first) < 120, f"{name}: {told}; got {first!r}"


def test_each_definition_stands_once():
    """No public name has two homes, and no function or class is written twice."""
    homes, bodies = {}, {}
    for name, path in modules().items():
        for found in public(name):
            homes.setdefault(found, []).append(name)
        for node in tree(path).body:
            long = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if long and node.end_lineno - node.lineno > 3:
                body = "".join(map(ast.dump, node.body))
                bodies.setdefault(body, []).append(f"{name}.{node.name}")
    homes.pop("rows")  # each family's, which flowcourse.zoo gathers
    assert [f"{n}: {w}" for n, w in homes.items() if len(w) > 1] == []
    assert [where for where in bodies.values() if len(where) > 1] == []


def test_modules_stand_on_one_another_without_a_circle():
    graph = {name: set(below(name, path)) for name, path in modules().items()}
    while graph:
        ground = {name for name, others in graph.items() if not others}
        assert ground, f"a circle among {sorted(graph)}"
        graph = {n: o - ground for n, o in graph.items() if n not in ground}


def test_public_names_are_those_that_are_listed():
    listed = NAMES.read_text().split()
    found = {
        f"{name.removeprefix('flowcourse.')}.{thing}"
        for name in modules()
        if ".exercises." not in name
        for thing in public(name)
    }
    new, gone = sorted(found - {*listed}), sorted({*listed} - found)
    told = f"in tests/public-names.txt, add {new} and remove {gone}"
    assert not (new or gone), told
    assert listed == sorted(listed), "tests/public-names.txt is not in order"
    # few enough to know; the page for contributors adds one
    assert len(listed) <= 200


def test_the_sidebar_lists_every_page():
    def entries(items):
        for item in items:
            if isinstance(item, str):
                yield Path(item).stem
            else:
                yield from entries(item.get("contents", []))

    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    listed = {*entries(config["website"]["sidebar"]["contents"])}
    missing = sorted(notebooks().keys() - listed)
    assert not missing, f"add to the sidebar in _quarto.yml: {missing}"


def test_the_home_page_lists_every_page():
    """All but the solutions, to which the lessons lead."""
    table = (ROOT / "README.md").read_text().partition("## The course")[2]
    missing = [
        stem
        for stem in notebooks()
        if f"/{stem}.html)" not in table
        and stem != "index"
        and not stem.endswith("-solutions")
    ]
    told = f"add links to the table in nbs/index.ipynb, then make prepare: {missing}"
    assert not missing, told


@pytest.mark.parametrize("name", modules())
def test_a_public_name_says_what_it_takes(name):
    """Every public class, method and function has a docstring and a type for each parameter."""
    bare = []
    for label, thing in public(name).items():
        if not (isclass(thing) or isfunction(thing)):
            continue
        parts = {label: thing}
        if isclass(thing):
            parts |= {
                f"{label}.{key}": value
                for key, value in vars(thing).items()
                if isfunction(value) and not key.startswith("_")
            }
            if isfunction(vars(thing).get("__init__")):
                parts[f"{label}.__init__"] = vars(thing)["__init__"]
        for key, part in parts.items():
            if not part.__doc__ and not key.endswith(
                ("__init__", "extra_repr")
            ):
                bare.append(f"{key}: no docstring")
            if isclass(part):
                continue
            bare += [
                f"{key}({p.name})"
                for p in signature(part).parameters.values()
                if p.annotation is Parameter.empty
                and p.name not in ("self", "cls")
                and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            ]
    assert not bare, f"without a docstring or a type: {bare}"


@pytest.mark.parametrize("name", modules())
def test_what_users_build_with_is_told_in_three_paragraphs(name):
    """What it is; source, cost and limits; an example, which runs as a doctest."""
    from flowcourse.core import Base, Bijection, Flow
    from flowcourse.elementwise import ScalarMap
    from flowcourse.objectives import Objective
    from flowcourse.recipe import Recipe
    from flowcourse.trainer import fit

    kinds = (Bijection, ScalarMap, Base, Objective, Flow, Recipe)
    for label, thing in public(name).items():
        if thing is fit or (isclass(thing) and issubclass(thing, kinds)):
            paragraphs = getdoc(thing).split("\n\n")
            told = (
                "what it is; source, cost and limits; an example of >>> lines"
            )
            assert len(paragraphs) >= 3, f"{label}: its docstring needs {told}"
            example = paragraphs[-1].lstrip().startswith(">>> ")
            assert example, f"{label}: its docstring ends without >>> lines"
