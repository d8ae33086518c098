"""The marked path: the line below a lesson's title that says where it stands and what comes before and after it.

The order is that of the sidebar in `_quarto.yml`: its sections "Core path" and "Further lessons".
"""

import re
from pathlib import Path

import yaml
from execnb.nbio import mk_cell, read_nb, write_nb

CORE, FURTHER = "Core path", "Further lessons"
MARK = "course-path"  # id of the cell


def sections():
    """The names of the lessons' notebooks, in order, for each of the two sections."""
    config = yaml.safe_load(Path("_quarto.yml").read_text(encoding="utf-8"))
    items = config["website"]["sidebar"]["contents"]
    listed = {
        item["section"]: item["contents"] for item in items if "section" in item
    }
    return {
        name: [Path(page).stem for page in listed.get(name, [])]
        for name in (CORE, FURTHER)
    }


def link(
    lesson,  # Name of a notebook
):  # Its title, with a link to it
    """Link to a lesson by its title."""
    first = next(
        c.source
        for c in read_nb(f"nbs/{lesson}.ipynb").cells
        if c.cell_type == "markdown"
    )
    return f"[{re.match(r'# (.+)', first)[1]}]({lesson}.ipynb)"


def lines():
    """The line of each lesson."""
    found = sections()
    core, further = found[CORE], found[FURTHER]
    for i, lesson in enumerate(core):
        parts = [f"**Core path**, lesson {i + 1} of {len(core)}"]
        parts += [f"before: {link(core[i - 1])}"] if i else []
        parts += [f"next: {link(core[i + 1])}"] if i + 1 < len(core) else []
        yield lesson, " · ".join(parts)
    for lesson in further:
        earlier = [c for c in core if c < lesson]
        later = [c for c in core if c > lesson]
        parts = ["**Further lesson**, beside the core path"]
        parts += [f"after: {link(earlier[-1])}"] if earlier else []
        parts += [f"back to the path: {link(later[0])}"] if later else []
        yield lesson, " · ".join(parts)


def mark_path():
    """Write the line of each lesson into its notebook, behind the cell with the title."""
    for lesson, line in lines():
        path = f"nbs/{lesson}.ipynb"
        nb = read_nb(path)
        before = [(c.get("id"), c.source) for c in nb.cells]
        cells = [c for c in nb.cells if c.get("id") != MARK]
        cell = mk_cell(line, "markdown")
        cell.id = MARK
        nb.cells = [cells[0], cell, *cells[1:]]
        if before != [(c.get("id"), c.source) for c in nb.cells]:
            write_nb(nb, path)
