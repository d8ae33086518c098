"""The site: what its builder refuses, and how the pages behave in a real browser."""

import configparser
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "_quarto.yml",
    "settings.ini",
    "references.bib",
    "nbs",
    "assets",
    "tools",
)
sys.path.insert(0, str(ROOT / "tools"))

GOOD = r"""
## Formulas {#sec-formulas}

$$
\log p(x) = \log p(z) - \log|\det J|
$$ {#eq-density}

By @eq-density, @thm-change, @tbl-numbers and [@rezende2015, sec. 3].
See `Flow.log_prob` and `Flow.__init__`.

::: {#thm-change}

## Change of variables

It holds as @papamakarios2021 show.
:::

| a | b |
|---|---|
| 1 | 2 |

: Two numbers {#tbl-numbers}

::: {.callout-tip collapse="true" title="Solution of exercise 1"}
The solution is $1$.
:::

[Home](index.ipynb), [here](#sec-formulas), [again](https://example.org/flowcourse/nbs/index.html).
"""
BAD = r"""
By @eq-absent and [@nobody1999]. [A page](02-absent.ipynb), [a place](index.ipynb#nowhere).

```{=html}
<script src="https://example.com/x.js"></script>
```
"""


def copy_project(folder):
    """What the site is made from, in a folder of its own."""
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)


def write_notebook(path, title, body):
    """A notebook with a title, one markdown cell and one code cell."""
    cells = [
        {
            "cell_type": "markdown",
            "id": "a",
            "metadata": {},
            "source": f"# {title}\n\n> A page",
        },
        {"cell_type": "markdown", "id": "b", "metadata": {}, "source": body},
        {
            "cell_type": "code",
            "id": "c",
            "metadata": {},
            "source": "#| code-fold: true\n1 + 1",
            "outputs": [],
            "execution_count": None,
        },
    ]
    nb = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(nb))


@pytest.fixture
def small(tmp_path):
    """A function that makes a project of three pages, the second with a given text."""

    def make(body):
        copy_project(tmp_path)
        shutil.rmtree(tmp_path / "nbs")
        (tmp_path / "nbs").mkdir()
        write_notebook(tmp_path / "nbs/index.ipynb", "Home", "Welcome.")
        write_notebook(tmp_path / "nbs/01-lesson.ipynb", "Lesson", body)
        write_notebook(
            tmp_path / "nbs/99-reference.ipynb",
            "Reference",
            "### Flow.log_prob",
        )
        config = yaml.safe_load((tmp_path / "_quarto.yml").read_text())
        config["website"]["navbar"] = {"left": ["nbs/index.ipynb"]}
        pages = [
            "nbs/index.ipynb",
            "nbs/01-lesson.ipynb",
            "nbs/99-reference.ipynb",
        ]
        config["website"]["sidebar"]["contents"] = pages
        (tmp_path / "_quarto.yml").write_text(yaml.safe_dump(config))
        (tmp_path / "_docs").mkdir()
        (tmp_path / "_docs/old.html").write_text("the site as it was")
        return tmp_path

    return make


def build(project, *arguments, **environment):
    """Run the documentation command of a project."""
    return subprocess.run(
        [sys.executable, "tools/build_docs", *arguments],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_numbers_citations_and_relative_links(small):
    project = small(GOOD)
    run = build(project, "--offline")
    assert run.returncode == 0, run.stdout + run.stderr
    assert not (project / "_docs/old.html").exists()
    page = (project / "_docs/nbs/01-lesson.html").read_text()
    for label, text in {
        "eq-density": "Equation 1",
        "thm-change": "Theorem 1",
    }.items():
        assert f'<a href="#{label}">{text}</a>' in page
    assert "Theorem 1 (Change of variables)." in page
    assert "Table 1: Two numbers" in page
    assert "Rezende and Mohamed" in page and "Papamakarios et al." in page
    assert re.search(r"<details[^>]*>", page), "a folded cell"
    assert 'href="index.html">again' in page, (
        "a link to our own address becomes relative"
    )
    assert 'href="99-reference.html#flow.log_prob"' in page, (
        "a method leads to the reference"
    )
    assert "flow.__init__" not in page, "a private name leads nowhere"
    assert "cdn" not in page


def test_every_fault_is_named_and_the_old_site_stays(small):
    project = small(BAD)
    run = build(project, "--offline")
    assert run.returncode == 1
    for fault in (
        "01-lesson.ipynb: unresolved reference @eq-absent",
        "01-lesson.ipynb: unresolved citation @nobody1999",
        "nbs/01-lesson.html: broken link 02-absent.html",
        "nbs/01-lesson.html: broken link index.html#nowhere (no such anchor)",
        "nbs/01-lesson.html: loads https://example.com/x.js from the network",
    ):
        assert fault in run.stdout
    assert [path.name for path in (project / "_docs").iterdir()] == ["old.html"]


def test_sidebar_and_notebooks_must_agree(small):
    project = small(GOOD)
    (project / "nbs/01-lesson.ipynb").rename(project / "nbs/02-other.ipynb")
    run = build(project, "--offline")
    assert run.returncode == 1
    assert (
        "the sidebar lists nbs/01-lesson.ipynb, which does not exist"
        in run.stdout
    )
    assert "the sidebar does not list nbs/02-other.ipynb" in run.stdout


@pytest.mark.parametrize(
    "warning", ["", "WARN: Unable to resolve crossref @fig-absent"]
)
def test_quarto_is_used_where_there_is_one(small, tmp_path_factory, warning):
    project, bin_ = small(GOOD), tmp_path_factory.mktemp("bin")
    render = f"mkdir -p _docs && echo '<p>new</p>' > _docs/index.html && echo '{warning}' >&2"
    (bin_ / "quarto").write_text(
        f'#!/bin/sh\n[ "$1" = inspect ] || {{ {render}; }}\n'
    )
    (bin_ / "quarto").chmod(0o755)
    run = build(project, PATH=f"{bin_}{os.pathsep}{os.environ['PATH']}")
    assert run.returncode == bool(warning), run.stdout + run.stderr
    assert warning in run.stdout
    assert (project / "_docs/old.html").exists() == bool(warning)


def test_config_files_agree():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    settings = ini["DEFAULT"]
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    website = config["website"]
    assert website["title"] == settings["title"]
    assert website["description"] == settings["description"]
    assert website["repo-url"] == settings["git_url"]
    assert website["repo-branch"] == settings["branch"]
    assert (
        website["site-url"]
        == settings["doc_host"] + settings["doc_baseurl"] + "/"
    )
    assert config["project"]["output-dir"] == settings["doc_path"]
    assert config["project"]["render"][0] == settings["readme_nb"]


def test_readme_reads_well_outside_the_site():
    readme = (ROOT / "README.md").read_text()
    assert readme.startswith("# flowcourse\n")
    assert "#|" not in readme
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(targets) > 5
    assert [
        t
        for t in targets
        if not t.startswith("https://") and not (ROOT / t).is_file()
    ] == []


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The whole site, built in a copy of the project."""
    project = tmp_path_factory.mktemp("project")
    copy_project(project)
    run = build(project, "--offline")
    assert run.returncode == 0, run.stdout + run.stderr
    return project / "_docs"


@pytest.fixture(scope="session")
def address(site):
    """The site, served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=site)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# its event loop must end with this file: others start their own
@pytest.fixture(scope="module")
def browser():
    """Chromium, or a skip with the reason."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed"
    )
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on PATH")
    from lab_smoke import launch_chromium

    with sync_api.sync_playwright() as playwright:
        chromium = launch_chromium(playwright)
        yield chromium
        chromium.close()


RAW_FORMULAS = """() => {
    const main = (document.querySelector('main') || document.body).cloneNode(true);
    main.querySelectorAll('pre, code, .katex, script').forEach((e) => e.remove());
    return main.textContent.match(/\\$\\$|\\\\\\(|\\\\\\[|\\\\begin\\{/g) || [];
}"""


def test_every_page_loads_alone_and_shows_its_formulas(browser, site, address):
    troubles, formulas = [], 0
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.on(
        "console",
        lambda m: m.type == "error" and troubles.append(f"console: {m.text}"),
    )
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on(
        "requestfailed",
        lambda request: troubles.append(f"failed: {request.url}"),
    )
    page.on(
        "response",
        lambda r: r.status >= 400 and troubles.append(f"{r.status}: {r.url}"),
    )
    page.on(
        "request",
        lambda request: (
            request.url.startswith((address, "data:", "blob:"))
            or troubles.append(f"outside: {request.url}")
        ),
    )
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(f"{address}/{name}", wait_until="networkidle")
        # a busy machine may set formulas after the network is idle
        for _wait in range(100):
            left = page.evaluate(RAW_FORMULAS)
            if not left:
                break
            page.wait_for_timeout(100)
        troubles += [f"raw {text} in the text" for text in left]
        troubles += ["a formula is broken"] * page.locator(
            ".katex-error"
        ).count()
        if page.evaluate("document.documentElement.scrollWidth") > 400:
            troubles.append("the page is wider than a phone")
        formulas += page.locator(".katex").count()
        assert troubles == [], name
    assert formulas > 20
    page.close()


def test_search_finds_a_lesson(browser, address):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(f"{address}/nbs/index.html")
    page.fill("#quarto-search input", "change of variables")
    page.locator(
        ".smalldocs-search-results a", has_text="variables"
    ).first.click()
    page.wait_for_url("**/01-change-of-variables*.html*")
    page.close()


def test_dark_mode_toggles_and_is_remembered(browser, address):
    context = browser.new_context(
        color_scheme="light", viewport={"width": 1300, "height": 900}
    )
    page = context.new_page()

    def brightness():
        page.wait_for_timeout(300)
        colour = page.evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    page.goto(f"{address}/nbs/index.html")
    assert brightness() > 200
    page.click(".quarto-color-scheme-toggle")
    assert brightness() < 80
    page.goto(f"{address}/nbs/99-reference.html")
    assert brightness() < 80
    context.close()
