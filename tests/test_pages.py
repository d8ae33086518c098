"""Every module knows the notebook that it comes from."""

import re
from pathlib import Path

import pytest

from flowcourse.pages import home, page

ROOT = Path(__file__).resolve().parents[1]
EXPORT = re.compile(r'"#\| *default_exp +([\w.]+)')
EXPORTED = {
    f"flowcourse.{found[1]}": path.stem
    for path in sorted((ROOT / "nbs").glob("*.ipynb"))
    if (found := EXPORT.search(path.read_text(encoding="utf-8")))
}


@pytest.mark.parametrize("module", EXPORTED)
def test_every_exported_module_has_its_page(module):
    assert page(module) == EXPORTED[module]


def test_a_module_without_a_page_is_named():
    for module in ("flowcourse", "flowcourse.exercises", "__main__"):
        with pytest.raises(ValueError, match=f"^module: .*got '{module}'"):
            page(module)


def test_a_name_with_two_homes_is_refused(monkeypatch):
    import flowcourse.pages

    twice = {"f": ["a", "b"], "g": ["b"]}
    monkeypatch.setattr(flowcourse.pages, "_homes", lambda: twice)
    assert home("g") == "b" and home("h") is None
    with pytest.raises(ValueError, match=r"^name: .*'f' of \['a', 'b'\]"):
        home("f")
