"""How exported code looks on a page, whichever builder makes it: sources fold, and a lesson's outline names no API.

`before` runs on a notebook before nbdev's processing, `after` behind it: in `tools/build_docs` for
the site, in `tools/nbfilter` for a plain `quarto render`.
"""

import ast
import re
from functools import partial
from textwrap import dedent

LESSON = re.compile(r"\d\d-")
LIBRARY = "lib-"
LIBRARY_PART = re.compile(r"^## In the library\b", re.MULTILINE)
# what a reader of the site is told where the story ends
AFTER = (
    "::: {.after-the-lesson}\nThe lesson ends here. What follows is for looking things up: "
    "the definitions that the package has from this page, with their sources folded, "
    "an example of each, and what makes them fast and safe.\n:::\n"
)
SHOWN = re.compile(r"^show_doc\((\w+)", re.MULTILINE)
# as nbdev marks the source of an exported cell
OPEN = re.compile(
    r'^#\| code-fold: show\n#\| code-summary: "Exported source"\n'
)
SUBHEADING = re.compile(r"^###(?= )", re.MULTILINE)
# an example in a docstring, down to a blank line; the formatter indents only some
EXAMPLE = re.compile(r"^ *>>> .*(?:\n.*\S.*)*", re.MULTILINE)
FENCED = re.compile(r"^```python\n.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(`[^`\]]+`)\]\([^)]*\)")
# what stands before a name in a signature and says nothing to a reader
HOMES = re.compile(
    r"\b(?:__main__|collections\.abc|typing|torch\.(?:nn|optim|distributions)\.\w+(?:\.\w+)*)\.(?=[A-Z_])"
)
# the signature of a class that says nothing of how it is made
ANYTHING = r"\(\s*\*args, \*\*kwargs\s*\)"


def text_of(cell):
    """The source of a cell, which a file keeps in lines and nbdev may have removed."""
    return "".join(cell.get("source") or "")


def defined(source):
    """The classes, functions and constants that a cell defines, in order."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = getattr(node, "targets", None) or [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return names


def rewrite(
    cell,  # A code cell, changed in place
    change,  # From the text to the new one
):
    """Change the Markdown that a cell has put out."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = change("".join(data["text/markdown"]))


def plain(block):
    """A block of code, such as a signature, as a reader of Python would write it."""
    block = LINK.sub(r"\1", HOMES.sub("", block[0]))
    return block.replace("=<factory>", "=...")


def as_code(text):
    """Examples of docstrings as blocks of code, and plain signatures, where Markdown shows their source."""
    text = EXAMPLE.sub(lambda m: f"```python\n{dedent(m[0])}\n```", text)
    return FENCED.sub(plain, text)


def name_classes(
    cells,  # Of a processed notebook
    documents,  # Name -> the cell that documents it
):
    """Call a class a class, where nbdev shows the call that makes it."""
    for cell in cells:
        source = text_of(cell)
        if cell["cell_type"] == "code" and OPEN.match(source):
            for node in ast.parse(OPEN.sub("", source)).body:
                if isinstance(node, ast.ClassDef) and node.name in documents:
                    made = re.compile(rf"def {node.name}(?:{ANYTHING}|\b)")
                    rewrite(
                        documents[node.name],
                        partial(made.sub, f"class {node.name}", count=1),
                    )


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


def name_folds(
    cells,  # Of a processed notebook
):
    """Say what a closed cell of code holds, where nothing says it yet: imports, or the drawing of a figure."""
    for cell in cells:
        source = text_of(cell)
        if (
            cell["cell_type"] != "code"
            or not re.search(r"(?m)^#\| *code-fold: *true", source)
            or re.search(r"(?m)^#\| *code-summary:", source)
        ):
            continue
        kinds = {type(node) for node in ast.parse(source).body}
        imports = kinds <= {ast.Import, ast.ImportFrom}
        figure = re.search(r"(?m)^#\| *label: *fig-", source)
        what = (
            "Imports" if imports else "Code of the figure" if figure else "Code"
        )
        cell["source"] = f'#| code-summary: "{what}"\n{source}'


def lower(
    cells,  # Of a processed lesson
    documents,  # The cells that document a name
):
    """Move what belongs to the library below the headings that an outline shows."""
    for cell in documents:
        rewrite(cell, lambda text: SUBHEADING.sub("####", text))
    inside = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            story, *library = LIBRARY_PART.split(text_of(cell), maxsplit=1)
            if inside:
                cell["source"] = SUBHEADING.sub("####", story)
            elif library:
                inside = True
                library = SUBHEADING.sub("####", library[0])
                cell["source"] = (
                    f"{story}## In the library\n\n{AFTER}\n{library}"
                )


def before(
    nb,  # A notebook, changed in place
    name,  # Its file's name
):
    """Let a page of the library show the source of everything that it exports, shared names among them."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and name.startswith(LIBRARY):
            cell["source"] = re.sub(
                r"(?m)^#\| *exporti?\b", "#| exports", text_of(cell)
            )


def after(
    nb,  # A notebook that nbdev has processed, changed in place
    name,  # Its file's name
):
    """Fold the exported sources, show examples as code, and keep the library's names out of a lesson's outline."""
    documents = {
        found[1]: cell
        for cell in nb["cells"]
        if cell.get("has_sd") and (found := SHOWN.search(text_of(cell)))
    }
    for cell in nb["cells"]:
        rewrite(cell, as_code)
    name_classes(nb["cells"], documents)
    nb["cells"] = fold(nb["cells"], documents)
    name_folds(nb["cells"])
    if LESSON.match(name):
        lower(nb["cells"], documents.values())
