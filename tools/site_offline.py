"""Render notebooks that nbdev has processed where there is no Quarto, by pandoc and smalldocs.

It reads the `_quarto.yml` that Quarto reads and adds what smalldocs lacks: numbered references
(@eq-, @fig-, @tbl-, @thm- and the like), citations with a list of references, and formulas and a
start page that need no network. `tools/build_docs` calls it.
"""

import json
import os
import re
import subprocess
from html import escape
from pathlib import Path

import pypandoc
import yaml

THEOREMS = {
    "thm": "Theorem",
    "lem": "Lemma",
    "cor": "Corollary",
    "prp": "Proposition",
    "def": "Definition",
    "exm": "Example",
    "exr": "Exercise",
}
NAMES = {
    "eq": "Equation",
    "fig": "Figure",
    "tbl": "Table",
    "sec": "Section",
    **THEOREMS,
}
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
REFERENCE = re.compile(rf"(?<![\w@])@((?:{'|'.join(NAMES)})-[\w-]*\w)")
CITATION_LEFT = re.compile(r"(?<![\w@/`.])@[A-Za-z][\w:-]+")

# Keys of _quarto.yml that smalldocs does not know and this builder serves or
# can do without.
SERVED = (
    "bibliography",
    "ipynb-filters",
    "execute.enabled",
    "html-math-method",
    "output-file",
)


class Numbers:
    """The labels of one page, numbered by kind in the order they stand."""

    def __init__(self):
        self.text, self.count, self.problems = {}, {}, []

    def add(
        self,
        label,  # Such as `eq-affine`
        title=None,  # Text of a link to it; the default is its kind and number
    ):  # The number
        """Number a label, once."""
        kind = label.split("-")[0]
        self.count[kind] = self.count.get(kind, 0) + 1
        if label in self.text:
            self.problems.append(f"label {label} is given twice")
        self.text[label] = title or f"{NAMES[kind]} {self.count[kind]}"
        return self.count[kind]

    def link(self, match):
        """A link for a reference, or the reference itself and a problem."""
        if match[1] in self.text:
            return f"[{self.text[match[1]]}](#{match[1]})"
        self.problems.append(f"unresolved reference @{match[1]}")
        return match[0]


def prose(f, text):
    """Apply `f` to a text outside its code."""
    return "".join(s if i % 2 else f(s) for i, s in enumerate(CODE.split(text)))


def label_markdown(text, numbers):
    """Number the equations, theorems, headings, pictures and tables that carry a label."""

    def equation(m):
        tag = numbers.add(m[2])
        return f"::: {{#{m[2]}}}\n$$\n{m[1].strip()} \\tag{{{tag}}}\n$$\n:::"

    def theorem(m):
        label, title = m[1], m[2]
        numbers.add(label)
        name = numbers.text[label] + (f" ({title.strip()})" if title else "")
        return f"::: {{#{label} .theorem}}\n**{name}.** "

    def picture(m):
        caption = f"Figure {numbers.add(m[3])}: {m[1]}"
        return f"![{caption}]({m[2]}){{#{m[3]}{m[4]}}}"

    def table(m):
        return f": Table {numbers.add(m[2])}: {m[1]} {{#{m[2]}{m[3]}}}"

    def heading(m):
        numbers.add(m[2], m[1])
        return m[0]

    multiline = re.MULTILINE | re.DOTALL
    theorems = "|".join(THEOREMS)
    text = re.sub(
        r"\$\$(.+?)\$\$[ \t]*\{#(eq-[\w-]+)\}", equation, text, flags=re.DOTALL
    )
    text = re.sub(
        r"^\\begin\{align(\*?)\}(.+?)\\end\{align\1\}",
        r"$$\n\\begin{aligned}\2\\end{aligned}\n$$",
        text,
        flags=multiline,
    )
    text = re.sub(
        rf"^:{{3,}} *\{{#((?:{theorems})-[\w-]+)[^}}]*\}}\s*(?:^#+ +(.+)$\s*)?",
        theorem,
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(
        r"^:{3,} *\{\.proof\}\s*",
        "::: {.proof}\n*Proof.* ",
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(
        r"^#+ +(.+?) *\{#(sec-[\w-]+)[^}]*\}", heading, text, flags=re.MULTILINE
    )
    text = re.sub(
        r"^: +(.*?) *\{#(tbl-[\w-]+)([^}]*)\}", table, text, flags=re.MULTILINE
    )
    return re.sub(
        r"!\[([^\]]*)\]\(([^)]*)\)\{#(fig-[\w-]+)([^}]*)\}", picture, text
    )


def label_code(cell, numbers):
    """Number the figure or table that a code cell makes, and put the number into its caption."""
    lines = cell["source"].split("\n")
    options = [line for line in lines if line.startswith("#|")]
    values = (
        yaml.safe_load(
            "\n".join(line[2:].removeprefix(" ") for line in options)
        )
        or {}
    )
    label = values.get("label", "") if isinstance(values, dict) else ""
    kind = label.split("-")[0]
    if kind not in ("fig", "tbl"):
        return
    numbers.add(label)
    caption = numbers.text[label]
    if f"{kind}-cap" in values:
        caption += f": {values[f'{kind}-cap']}"
    values[f"{kind}-cap"] = re.sub(r"\$([^$]+)\$", r"\\(\1\\)", caption)
    head = [f"#| {key}: {json.dumps(value)}" for key, value in values.items()]
    cell["source"] = "\n".join(
        head + [line for line in lines if not line.startswith("#|")]
    )
    for output in cell["outputs"]:
        data = output.get("data", {})
        if kind == "tbl" and "text/markdown" in data:
            data["text/markdown"] = (
                "".join(data["text/markdown"]) + f"\n\n: {caption}\n"
            )
        # pictures get their captions from smalldocs, a player from here
        if kind == "fig" and "text/html" in data:
            data["text/html"] = (
                f'<figure class="figure">{"".join(data["text/html"])}'
                f"<figcaption>{escape(values['fig-cap'])}</figcaption></figure>"
            )


def cite(texts, bib, problems):
    """Fill the citations of a page by pandoc's citeproc: the texts, and the list of references."""
    keys = "|".join(
        map(
            re.escape,
            re.findall(r"^@\w+\{([^,\s]+)", bib.read_text(), re.MULTILINE),
        )
    )
    citation = re.compile(
        rf"\[[^\]\[]*-?@(?:{keys})\b[^\]\[]*\](?!\()"
        rf"|(?<![\w@`\[])@(?:{keys})\b(?: \[[^\]\[]+\](?!\())?"
    )
    parts = [s for text in texts for s in CODE.split(text)[::2]]
    found = [m[0] for s in parts for m in citation.finditer(s)]
    if not found:
        return texts, ""
    command = [
        pypandoc.get_pandoc_path(),
        "-f",
        "markdown",
        "-t",
        "html",
        "--citeproc",
    ]
    command += [f"--bibliography={bib}", "-M", "link-citations", "--wrap=none"]
    run = subprocess.run(
        command,
        input="\n\n".join(found),
        capture_output=True,
        text=True,
        check=True,
    )
    problems += run.stderr.splitlines()
    body, _, references = run.stdout.partition('<div id="refs"')
    done = iter(re.findall(r"<p>(.*?)</p>", body, re.DOTALL))
    filled = [
        prose(lambda s: citation.sub(lambda m: next(done), s), text)
        for text in texts
    ]
    return filled, f'<div id="refs"{references}'


def number_page(
    path,  # A notebook that nbdev has processed; rewritten in place
    bib,  # The BibTeX file
):  # What could not be resolved, a line each
    """Fill the references and citations of one notebook."""
    nb, numbers = json.loads(path.read_text()), Numbers()
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = prose(
                lambda s: label_markdown(s, numbers), cell["source"]
            )
        elif cell["cell_type"] == "code":
            label_code(cell, numbers)
    texts = [cell for cell in nb["cells"] if cell["cell_type"] == "markdown"]
    for cell in texts:
        cell["source"] = prose(
            lambda s: REFERENCE.sub(numbers.link, s), cell["source"]
        )
    filled, references = cite(
        [cell["source"] for cell in texts], bib, numbers.problems
    )
    for cell, text in zip(texts, filled):
        cell["source"] = text
        for part in CODE.split(text)[::2]:
            for left in CITATION_LEFT.findall(part):
                if not REFERENCE.match(left):
                    numbers.problems.append(f"unresolved citation {left}")
    if references:
        raw, place = (
            f"```{{=html}}\n{references}\n```",
            r"^:{3,} *\{#refs\}\s*:{3,}",
        )
        own = next(
            (
                cell
                for cell in texts
                if re.search(place, cell["source"], re.MULTILINE)
            ),
            None,
        )
        if own:
            own["source"] = re.sub(
                place, lambda m: raw, own["source"], flags=re.MULTILINE
            )
        else:
            source = f"## References\n\n{raw}"
            nb["cells"].append(
                {"cell_type": "markdown", "metadata": {}, "source": source}
            )
    path.write_text(json.dumps(nb))
    return [f"{path.name}: {problem}" for problem in numbers.problems]


def render(
    tree,  # Folder with `_quarto.yml` and the processed notebooks
):  # What could not be resolved, a line each
    """Render the site of a project into the project's output folder."""
    from smalldocs.site import build

    config = yaml.safe_load((tree / "_quarto.yml").read_text())
    problems = []
    for path in sorted((tree / "nbs").glob("*.ipynb")):
        problems += number_page(path, tree / config["bibliography"])
    warnings = build(tree, quiet=True).warnings
    problems += [w for w in warnings if not any(key in w for key in SERVED)]
    site = tree / config["project"]["output-dir"]
    katex = config["format"]["html"]["html-math-method"]["url"].rstrip("/")
    for page in site.rglob("*.html"):
        # the address is one in the project, as Quarto takes it
        address = os.path.relpath(site / katex, page.parent).replace(
            os.sep, "/"
        )
        page.write_text(
            re.sub(
                r"https://[^\"'\s]*/katex@[\d.]+/dist",
                address,
                page.read_text(),
            )
        )
    title = config["website"]["title"]
    first = Path(config["project"]["render"][0]).with_suffix(".html").as_posix()
    (site / "index.html").write_text(
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="refresh" content="0;url={first}"><a href="{first}">{title}</a>\n'
    )
    return problems
