"""How exported code looks on a page, whichever builder makes it: sources fold, and a lesson's outline names no API.

`before` runs on a notebook before nbdev's processing, `after` behind it: in `tools/build_docs` for
the site, in `tools/nbfilter` for a plain `quarto render`.
"""

import ast
import re
from textwrap import dedent

LESSON = re.compile(r"\d\d-")
LIBRARY = "lib-"
LIBRARY_PART = re.compile(r"^## In the library\b", re.MULTILINE)
SHOWN = re.compile(r"^show_doc\((\w+)", re.MULTILINE)
# as nbdev marks the source of an exported cell
OPEN = re.compile(
    r'^#\| code-fold: show\n#\| code-summary: "Exported source"\n'
)
# an example in a docstring, down to a blank line; the formatter indents only some
EXAMPLE = re.compile(r"^ *>>> .*(?:\n.*\S.*)*", re.MULTILINE)
SUBHEADING = re.compile(r"^###(?= )", re.MULTILINE)


def text_of(cell):
    """The source of a cell, which a file keeps in lines and nbdev may have removed."""
    return "".join(cell.get("source") or "")


def defined(source):
    """The classes, functions and constants that a cell defines, in order."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names


def fold(
    cells,  # Of a processed notebook
    documents,  # Name -> the cell that documents it
):  # The cells in the order of reading
    """Close each exported source, and put it below what documents its names."""
    order, sources, owned = [], {}, set()
    for cell in cells:
        source = text_of(cell)
        if cell["cell_type"] == "code" and OPEN.match(source):
            names = defined(OPEN.sub("", source))
            public = [name for name in names if not name.startswith("_")]
            what = ", ".join(public or names)
            summary = f"Source: {what}" if what else "Imports"
            closed = f'#| code-fold: true\n#| code-summary: "{summary}"\n'
            cell["source"] = OPEN.sub(lambda _, text=closed: text, source)
            sources[id(cell)] = [documents[n] for n in names if n in documents]
            owned |= {id(document) for document in sources[id(cell)]}
    for cell in cells:
        if id(cell) not in owned:
            order += [*sources.get(id(cell), []), cell]
    return order


def enclose(
    documents,  # The cells that document a name
):
    """Make a block of code of each example; bare prompts would be nested quotations."""
    for cell in documents:
        for output in cell["outputs"]:
            text = "".join(output["data"]["text/markdown"])
            output["data"]["text/markdown"] = EXAMPLE.sub(
                lambda found: f"```python\n{dedent(found[0])}\n```", text
            )


def lower(
    cells,  # Of a processed lesson
    documents,  # The cells that document a name
):
    """Move what belongs to the library below the headings that an outline shows."""
    for cell in documents:
        for output in cell["outputs"]:
            lines = "".join(output["data"]["text/markdown"])
            output["data"]["text/markdown"] = SUBHEADING.sub("####", lines)
    inside = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            story, *library = LIBRARY_PART.split(text_of(cell), maxsplit=1)
            if inside:
                cell["source"] = SUBHEADING.sub("####", story)
            elif library:
                inside = True
                library = SUBHEADING.sub("####", library[0])
                cell["source"] = f"{story}## In the library{library}"


def before(
    nb,  # A notebook, changed in place
    name,  # Its file's name
):
    """Let a page of the library show what modules share among themselves like all else that it defines."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and name.startswith(LIBRARY):
            cell["source"] = re.sub(
                r"(?m)^#\| *exporti\b", "#| exports", text_of(cell)
            )


def after(
    nb,  # A notebook that nbdev has processed, changed in place
    name,  # Its file's name
):
    """Fold the exported sources, and keep the library's names out of a lesson's outline."""
    documents = {
        found[1]: cell
        for cell in nb["cells"]
        if cell.get("has_sd") and (found := SHOWN.search(text_of(cell)))
    }
    nb["cells"] = fold(nb["cells"], documents)
    enclose(documents.values())
    if LESSON.match(name):
        lower(nb["cells"], documents.values())
