"""Every module knows the notebook that it comes from."""

import re
from pathlib import Path

import pytest

from flowcourse.pages import home, page

ROOT = Path(__file__).resolve().parents[1]
# as nbdev writes it into the module
HEADER = re.compile(r"File to edit: \S*?([\w-]+)\.ipynb")
EXPORTED = {
    path: found[1]
    for path in sorted((ROOT / "flowcourse").rglob("*.py"))
    if (found := HEADER.search(path.read_text()))
}


@pytest.mark.parametrize("path", EXPORTED, ids=lambda path: path.stem)
def test_every_exported_module_has_its_page(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert page(module) == EXPORTED[path]


def test_a_module_without_a_page_is_named():
    for module in ("flowcourse", "flowcourse.exercises", "__main__"):
        with pytest.raises(ValueError, match=f"^module: .*got '{module}'"):
            page(module)


def test_a_name_with_two_homes_is_refused(monkeypatch):
    import flowcourse.pages

    twice = {"a": {"f": "nbs/01-a"}, "b": {"f": "nbs/02-b", "g": "nbs/02-b"}}
    monkeypatch.setattr(flowcourse.pages, "_index", lambda: twice)
    assert home("g") == "b" and home("h") is None
    with pytest.raises(ValueError, match=r"^name: .*'f' of \['a', 'b'\]"):
        home("f")
