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
import tomllib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from matplotlib.image import imsave

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
By @eq-absent, $x$ and [@nobody1999]. [A page](02-absent.ipynb), [a place](index.ipynb#nowhere).

```{=html}
<script src="https://example.com/x.js"></script>
```
"""


def copy_project(folder):
    """What the site is made from, in a folder of its own."""
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)


def write_notebook(path, title, body, *outputs):
    """A notebook with a title, a cell of text, a folded cell, and one that writes Markdown."""
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
        {
            "cell_type": "code",
            "id": "d",
            "metadata": {},
            "source": "#| echo: false\n#| output: asis\nwrite()",
            "outputs": [
                {
                    "output_type": "display_data",
                    "data": {"text/markdown": text},
                    "metadata": {},
                }
                for text in outputs
            ],
            "execution_count": None,
        },
    ]
    nb = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(nb))


@pytest.fixture
def small(tmp_path):
    """A function that makes a project of three pages, the second with a given text."""

    def make(body, *outputs):
        copy_project(tmp_path)
        shutil.rmtree(tmp_path / "nbs")
        (tmp_path / "nbs").mkdir()
        write_notebook(tmp_path / "nbs/index.ipynb", "Home", "Welcome.")
        write_notebook(
            tmp_path / "nbs/01-lesson.ipynb", "Lesson", body, *outputs
        )
        write_notebook(
            tmp_path / "nbs/ref-api.ipynb",
            "Reference",
            "### Flow.log_prob",
        )
        config = yaml.safe_load((tmp_path / "_quarto.yml").read_text())
        config["website"]["navbar"] = {"left": ["nbs/index.ipynb"]}
        pages = [
            "nbs/index.ipynb",
            "nbs/01-lesson.ipynb",
            "nbs/ref-api.ipynb",
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
    assert 'href="ref-api.html#flow.log_prob"' in page, (
        "a method leads to the reference"
    )
    assert "flow.__init__" not in page, "a private name leads nowhere"
    assert "cdn" not in page


def test_every_fault_is_named_and_the_old_site_stays(small):
    project = small(BAD, "## One", "## Two")
    config = project / "_quarto.yml"
    config.write_text(
        config.read_text().replace("assets/katex", "../assets/katex")
    )
    run = build(project, "--offline")
    assert run.returncode == 1
    for fault in (
        "01-lesson.ipynb: a cell with `output: asis` has 2 outputs",
        "nbs/01-lesson.html: ../../assets/katex/katex.min.js leads out of the site",
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
    "warning, page, fault",
    [
        ("", "<p>new</p>", ""),
        ("WARN: Unable to resolve crossref @fig-absent", "<p>new</p>", "WARN"),
        # a file that stands beside the copy, not beside the site
        (
            "",
            '<script src="../assets/katex/katex.min.js"></script>',
            "index.html: ../assets/katex/katex.min.js leads out of the site",
        ),
    ],
)
def test_quarto_is_used_where_there_is_one(
    small, tmp_path_factory, warning, page, fault
):
    project, bin_ = small(GOOD), tmp_path_factory.mktemp("bin")
    render = f"mkdir -p _docs && echo '{page}' > _docs/index.html && echo '{warning}' >&2"
    (bin_ / "quarto").write_text(
        f'#!/bin/sh\n[ "$1" = inspect ] || {{ {render}; }}\n'
    )
    (bin_ / "quarto").chmod(0o755)
    run = build(project, PATH=f"{bin_}{os.pathsep}{os.environ['PATH']}")
    assert run.returncode == bool(fault), run.stdout + run.stderr
    assert fault in run.stdout
    assert (project / "_docs/old.html").exists() == bool(fault)


@pytest.mark.parametrize(
    "outputs, good",
    [
        (["## One", "## Two"], False),
        (["## One\n\n", "## Two"], True),
        (["## One\n\n## Two"], True),
    ],
)
def test_markdown_outputs_do_not_run_together(tmp_path, outputs, good):
    write_notebook(tmp_path / "a.ipynb", "A", "Words.", *outputs)
    # its name has no ending
    loader = SourceFileLoader("build_docs", str(ROOT / "tools/build_docs"))
    build_docs = ModuleType("build_docs")
    build_docs.__file__ = loader.path
    loader.exec_module(build_docs)
    assert (build_docs.joined_outputs(tmp_path) == []) == good


@pytest.mark.parametrize(
    "html, fault",
    [
        (
            "<p>Words\n## flowcourse.core</p>",
            "source stands in the text: ## flowcourse.core",
        ),
        (
            r"<p>so $\log\sigma' $ is it</p>",
            r"source stands in the text: $\log\sigma' $ is it",
        ),
        ('<a href="a.html" target="_blank">a</a>', "a.html opens a tab"),
        ('<a href="/b.html">b</a>', "/b.html leads out of the site"),
        (r'<span class="math"><span>\log</span>\det</span><p>\(\det\)</p>', ""),
        (r"<pre><code># \log</code></pre><script>'\log'</script>", ""),
        ("<h2>Two</h2><p>a # b</p>", ""),
    ],
)
def test_a_built_page_is_read_as_a_reader_would(tmp_path, html, fault):
    import finish_site

    (tmp_path / "a.html").write_text(html)
    found = finish_site.check(tmp_path)
    assert found == ([f"a.html: {fault}"] if fault else [])


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
    # it is decided in the browser, by the address that the site is served at
    assert "link-external-newwindow" not in config["format"]["html"]


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
def address(site, tmp_path_factory):
    """The site, served on this machine below a path, as it is published."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "flowcourse").symlink_to(site)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/flowcourse"
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


DESK, PHONE = 1280, 390
AXE = (ROOT / "tests/vendor/axe.min.js").read_text()
# What a reader meets at the width that the page is shown at.
FACTS = """() => {
    const all = (css, root = document) => [...root.querySelectorAll(css)];
    const text = (document.querySelector('main') || document.body).cloneNode(true);
    all('pre, code, .katex, script', text).forEach((e) => e.remove());
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
        && a.top < b.bottom && b.top < a.bottom;
    const over = (tag) => all('.base', tag.parentElement).some((base) => !tag.contains(base)
        && meet(tag.getBoundingClientRect(), base.getBoundingClientRect()));
    const tags = all('.katex-display .tag');
    const columns = all('main pre.sourceCode').filter((e) => e.clientWidth).slice(0, 1).map((pre) => {
        const ten = document.createElement('span'), style = getComputedStyle(pre);
        ten.textContent = '0'.repeat(10);
        pre.firstElementChild.append(ten);
        const one = ten.getBoundingClientRect().width / 10;
        ten.remove();
        return Math.floor((pre.clientWidth - parseFloat(style.paddingLeft)
            - parseFloat(style.paddingRight)) / one);
    });
    return {
        raw: text.textContent.match(/\\$\\$|\\\\[(]|\\\\\\[|\\\\[a-zA-Z]{2,}/g) || [],
        // pandoc has set what stands in a list of references
        formulas: all('span.math:not(:has(em))').length,
        drawn: all('span.math:has(.katex)').length,
        broken: all('.katex-error').length,
        numbers: tags.length,
        covered: tags.filter(over).map((e) => e.textContent),
        columns,
        width: document.documentElement.scrollWidth,
        text: document.querySelector('main')?.getBoundingClientRect().width,
        pictures: all('main img.wide').filter((e) => e.clientWidth).map((e) => e.clientWidth),
        captions: all('main figure:has(img.wide) figcaption').map((e) => e.scrollWidth),
        marked: all('#quarto-header .nav-link.active').map((e) => e.textContent.trim()),
    };
}"""
SERIOUS = """async (options) => {
    // the insides of formulas are half of a page's elements, and have the colour of the text
    document.querySelectorAll('.katex').forEach((e) => e.replaceWith('x'));
    return (await axe.run(options)).violations
    .filter((v) => ['serious', 'critical'].includes(v.impact))
    .map((v) => `${v.id}: ${v.nodes[0].html.slice(0, 200)} and ${v.nodes.length - 1} more`);
}"""


def facts(page, width):
    """What the page shows at a width, once its formulas are drawn."""
    page.set_viewport_size({"width": width, "height": 900})
    # a busy machine may set formulas after the page has loaded
    for _wait in range(100):
        found = page.evaluate(FACTS)
        if found["drawn"] == found["formulas"] and not found["raw"]:
            break
        page.wait_for_timeout(100)
    return found


def serious(page, *rules):
    """What axe finds on a page that is serious or critical; by some of its rules only, if any."""
    page.evaluate(AXE)
    options = {"resultTypes": ["violations"], "preload": False}
    if rules:
        options["runOnly"] = {"type": "rule", "values": list(rules)}
    return page.evaluate(SERIOUS, options)


@pytest.fixture(scope="module")
def visit(browser, site, address):
    """Every page, seen once at the widths of a desk, a tablet and a phone."""
    troubles, seen = [], {}
    page = browser.new_page(color_scheme="light", reduced_motion="reduce")
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
    for path in sorted(site.glob("nbs/*.html")):
        name = path.relative_to(site).as_posix()
        page.set_viewport_size({"width": DESK, "height": 900})
        page.goto(f"{address}/{name}")
        widths = {"desk": DESK, "tablet": 1024, "phone": PHONE}
        seen[name] = {key: facts(page, width) for key, width in widths.items()}
        page.set_viewport_size({"width": DESK, "height": 900})
        seen[name]["light"] = serious(page)
        page.emulate_media(color_scheme="dark")
        page.wait_for_selector("html.quarto-dark")
        # all else is the same in the dark
        seen[name]["dark"] = serious(
            page, "color-contrast", "link-in-text-block"
        )
        page.emulate_media(color_scheme="light")
        seen[name]["troubles"], troubles[:] = troubles[:], []
    page.close()
    return seen


def test_every_page_loads_alone_and_shows_its_formulas(visit):
    for name, seen in visit.items():
        assert seen["troubles"] == [], name
        assert seen["desk"]["raw"] == [], name
        assert seen["desk"]["drawn"] == seen["desk"]["formulas"], name
        assert seen["desk"]["broken"] == 0, name
    assert sum(seen["desk"]["drawn"] for seen in visit.values()) > 500


def test_the_start_page_leads_to_the_first(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/")
    page.wait_for_url("**/flowcourse/nbs/index.html")
    page.close()


def test_no_page_has_a_serious_fault(visit):
    for name, seen in visit.items():
        assert seen["light"] == [], name
        assert seen["dark"] == [], name


def test_numbers_stand_beside_their_formulas(visit):
    for name, seen in visit.items():
        for screen in ("desk", "tablet", "phone"):
            assert seen[screen]["covered"] == [], f"{name} on a {screen}"
    assert sum(seen["desk"]["numbers"] for seen in visit.values()) > 20


def test_lines_of_code_fit_the_page(visit):
    line = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    for name, seen in visit.items():
        assert seen["desk"]["text"] >= 778, name
        # of the first block that stands open
        assert min(seen["desk"]["columns"], default=83) >= line["line-length"]


def test_a_phone_shows_all_and_at_a_size_to_read(visit):
    for name, seen in visit.items():
        phone = seen["phone"]
        assert phone["width"] <= PHONE, f"{name} is wider than a phone"
        assert min(phone["pictures"], default=600) >= 600, name
        assert max(phone["captions"], default=0) < PHONE, name
    assert sum(len(seen["phone"]["pictures"]) for seen in visit.values()) > 30


def test_the_top_bar_marks_the_open_page_alone(visit):
    marked = {
        n: s["desk"]["marked"] for n, s in visit.items() if s["desk"]["marked"]
    }
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    bar = config["website"]["navbar"]["left"]
    assert marked == {
        item["href"].replace(".ipynb", ".html"): [item["text"]] for item in bar
    }
    assert len(bar) > 3


def test_the_reference_names_every_public_name(site):
    """What `__all__` of a module lists has a heading on the page, or stands among its constants."""
    from flowcourse._modidx import d

    page = (site / "nbs/ref-api.html").read_text()
    page = page[page.index("<main") : page.index("</main>")]
    sections = re.split(r"<h2[^>]*>(flowcourse(?:\.\w+)+)", page)[1:]
    found = {}
    for module, text in zip(sections[::2], sections[1::2]):
        constants = re.search(r"<p>Constants: (.*?)</p>", text)
        found[module] = re.findall(r"<h3[^>]*>(\w+)", text)
        if constants:
            found[module] += re.findall(r"<code>(\w+)", constants[1])
    wanted = {
        module: sorted(import_module(module).__all__) for module in d["syms"]
    }
    assert {m: sorted(names) for m, names in found.items()} == {
        m: names for m, names in wanted.items() if names
    }


def test_exported_sources_are_folded_below_what_they_define(site):
    """No page opens a source by itself, and a class comes before its code."""
    for path in site.glob("nbs/*.html"):
        assert "<details open" not in path.read_text(), path.name
    page = (site / "nbs/06-coupling.html").read_text()
    source = page.index("<summary>Source: Coupling</summary>")
    assert page.index('id="coupling"') < source
    heading = r'<h4[^>]*id="coupling"'
    assert re.search(heading, page), "an API name is a heading of level 4"
    outline = re.search(r'<nav[^>]*id="TOC".*?</nav>', page, re.DOTALL)[0]
    assert "#what-breaks" in outline and '#coupling"' not in outline


def test_a_page_of_the_library_shows_all_that_it_defines(site):
    """Sources of public, shared and private names fold, a class is called one, an example is code."""
    page = (site / "nbs/lib-testing.html").read_text()
    page = page[page.index("<main") : page.index("</main>")]
    for names in ("expect_fail", "_numbers, _rows_of, _settings"):
        assert f"<summary>Source: {names}" in page
    assert "A wrong log-determinant does not crash" in page
    text = re.sub(r"<[^>]+>", "", page)
    assert "class ContractReport(" in text and "def check_bijection(" in text
    for path in site.glob("nbs/*.html"):
        page = path.read_text()
        assert not re.search(r"<blockquote[^>]*>\s*<blockquote", page), (
            path.name
        )


def test_signatures_and_examples_are_code(site):
    """No link shows its source in a signature, no name its long home, and no prompt is a quotation."""
    for path in site.glob("nbs/*.html"):
        for block in re.findall(r"<pre.*?</pre>", path.read_text(), re.DOTALL):
            plain = re.sub(r"<[^>]+>", "", block)
            for word in (
                "`](http",
                "__main__.",
                "&lt;factory&gt;",
                ":collections.abc.",
            ):
                assert word not in plain, f"{path.name}: {plain}"
    page = (site / "nbs/05-planar.html").read_text()
    assert "&gt;&gt;&gt; " in page and "<blockquote" not in page


def test_no_heading_stands_twice_in_a_row(site):
    """A name that has a section of its own is not announced once more by the entry below it."""
    for path in site.glob("nbs/*.html"):
        main = re.search(r"<main.*?</main>", path.read_text(), re.DOTALL)[0]
        found = re.findall(r"<h([1-6])\b[^>]*>(.*?)</h\1>", main, re.DOTALL)
        headings = [re.sub(r"<[^>]+>", "", text).strip() for _, text in found]
        twice = [a for a, b in zip(headings, headings[1:]) if a == b]
        assert not twice, f"{path.name}: {twice}"


def test_a_player_moves_by_keys_and_by_its_button(browser, site):
    """A page from the disk, without a server: the slider, its label, the button, and the end of the play."""
    page = browser.new_page()
    page.goto((site / "nbs/lib-player.html").as_uri())
    player = page.locator(".flow-player")
    picture, slider = player.locator("img"), player.locator("input")
    button, label = player.locator("button"), player.locator("output")
    assert player.count() == 1 and label.inner_text() == "step 0"
    seen = [picture.get_attribute("src")]
    slider.focus()
    for key, step in (("ArrowRight", 1), ("End", 5), ("Home", 0)):
        page.keyboard.press(key)
        assert label.inner_text() == f"step {step}"
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        seen.append(picture.get_attribute("src"))
    assert seen[0] == seen[3] and len(set(seen)) == 3
    page.keyboard.press(" ")
    assert button.get_attribute("aria-label") == "stop"
    page.keyboard.press(" ")
    assert button.get_attribute("aria-label") == "play"
    button.click()
    page.wait_for_function(
        "document.querySelector('output').textContent === 'step 5'"
    )
    page.wait_for_function(
        "document.querySelector('.flow-player button').ariaLabel === 'play'"
    )
    page.close()


def test_without_scripts_a_player_is_a_picture(browser, site):
    """Where no script runs, the first picture is shown and nothing that does not work."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / "nbs/lib-player.html").as_uri())
    assert page.locator(".flow-player img").is_visible()
    assert not page.locator(".flow-player input").is_visible()
    context.close()


def test_players_are_small_and_have_captions(site):
    """Each holds at most 200 kB; its caption and what it shows are there in words."""
    found = 0
    for path in site.glob("nbs/*.html"):
        for part in path.read_text().split('<div class="flow-player"')[1:]:
            found += 1
            html, _, rest = part.partition("</script>")
            assert len(html) < 200_000, path.name
            assert re.search(r'alt="[^"]{20,}"', html), path.name
            if path.name != "lib-player.html":
                caption = r"\s*</div>\s*<figcaption>Figure \d+: .{20,}"
                assert re.match(caption, rest), path.name
    assert found > 2


def test_a_plain_quarto_render_folds_them_too():
    """Quarto's filter gives the notebook that our own build makes pages of."""
    run = subprocess.run(
        [sys.executable, "../tools/nbfilter"],
        cwd=ROOT / "nbs",
        input=(ROOT / "nbs/06-coupling.ipynb").read_text(),
        capture_output=True,
        text=True,
        check=True,
    )
    cells = json.loads(run.stdout)["cells"]
    sources = ["".join(cell.get("source") or "") for cell in cells]
    folded = [s for s in sources if '#| code-summary: "Source: ' in s]
    assert folded and all("#| code-fold: true" in s for s in folded)
    assert not any("code-fold: show" in s for s in sources)
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    texts = [
        "".join(o.get("data", {}).get("text/markdown", "")) for o in outputs
    ]
    assert any("\n#### Coupling\n" in text for text in texts)


def test_links_and_citations(site):
    page = (site / "nbs/06-coupling.html").read_text()
    main = page[page.index("<main") : page.index("</main>")]
    for link in re.findall(r"<a [^>]*>", main):
        outside = bool(re.search(r'href="https?:', link)) and "toc-" not in link
        assert ('target="_blank"' in link) == outside, link
    citations = re.findall(r'<a [^>]*role="doc-biblioref"[^>]*>', main)
    assert citations
    assert [c for c in citations if 'title="' not in c] == []
    assert re.search(r'title="Dinh, Laurent, Jascha[^"]*Real NVP', main)


def test_search_finds_a_lesson_and_a_definition_first(browser, address):
    page = browser.new_page(viewport={"width": DESK, "height": 900})
    page.goto(f"{address}/nbs/index.html")
    results = page.locator(".smalldocs-search-results a")
    for name in ("RealNVP", "Flow", "fit", "Coupling"):
        page.fill("#quarto-search input", name)
        page.wait_for_function(
            "name => document.querySelector('.search-result-section')?.textContent == name",
            arg=name,
            timeout=5000,
        )
        assert f"ref-api.html#{name.lower()}" in results.first.get_attribute(
            "href"
        )
    page.fill("#quarto-search input", "change of variables")
    page.locator(
        ".smalldocs-search-results a", has_text="variables"
    ).first.click()
    page.wait_for_url("**/01-change-of-variables*.html*")
    page.close()


def test_copy_buttons_show_where_nothing_can_hover(browser, address):
    phone = browser.new_context(
        has_touch=True, is_mobile=True, viewport={"width": PHONE, "height": 800}
    )
    shown = """e => getComputedStyle(e).opacity"""
    page = phone.new_page()
    page.goto(f"{address}/nbs/index.html")
    assert page.locator(".code-copy-button").first.evaluate(shown) == "1"
    phone.close()


def test_a_box_that_folds_is_a_button(browser, address):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(f"{address}/nbs/01-change-of-variables.html")
    button = page.locator('.callout-header[role="button"]').first
    assert button.get_attribute("aria-expanded") == "false"
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector('.callout-header[aria-expanded="true"]')
    page.close()


@pytest.mark.parametrize(
    "scheme, theme", [("light", "cosmo"), ("dark", "darkly")]
)
def test_the_markup_of_quarto_gets_the_same_manners(
    browser, site, tmp_path, scheme, theme
):
    """A page as Quarto writes it, with the faults of its themes, finished and looked at."""
    import finish_site

    template = (ROOT / "tests/data/quarto-page.html").read_text()
    for part in ("assets", "site_libs"):
        shutil.copytree(site / part, tmp_path / part)
    (tmp_path / "nbs/lesson_files/figure-html").mkdir(parents=True)
    imsave(
        tmp_path / "nbs/lesson_files/figure-html/fig-a-output-1.png",
        [[0.0] * 837] * 324,
    )
    for name in ("index", "lesson"):
        text = template.replace("PAGE", name if name == "lesson" else "lesson")
        text = text.replace("SCHEME", scheme).replace("THEME", theme)
        (tmp_path / f"nbs/{name}.html").write_text(text)
    assert finish_site.finish(tmp_path) == []
    lesson = tmp_path / "nbs/lesson.html"
    text = lesson.read_text()
    assert finish_site.dress(text, lesson, tmp_path) == text, "done once"
    for link in re.findall(r"<a [^>]*>", text[text.index("<main") :]):
        assert ('target="_blank"' in link) == ("pytorch.org" in link), link
    assert (
        "Density Estimation"
        in re.search(r'role="doc-biblioref" title="(.*?)"', text)[1]
    )
    tippy = template.replace(
        "</head>", '<script src="tippy.js"></script></head>'
    )
    assert (
        "title="
        not in re.search(
            r'<a [^>]*role="doc-biblioref"[^>]*>',
            finish_site.dress(tippy, lesson, tmp_path),
        )[0]
    ), "Quarto's pop-up is there already"

    page = browser.new_page(color_scheme=scheme, reduced_motion="reduce")
    # a page from the disk is one site with its files
    page.goto(lesson.as_uri())
    for width in (DESK, 1024, PHONE):
        seen = facts(page, width)
        assert seen["drawn"] == seen["formulas"] == 2
        assert seen["covered"] == [] and seen["numbers"] == 1
        assert seen["width"] <= width
        assert seen["marked"] == ["Lesson"]
    assert min(seen["pictures"]) >= 600 and max(seen["captions"]) < PHONE
    # axe passes a link over that says it is a citation
    lines = "e => getComputedStyle(e).textDecorationLine"
    assert page.locator(".citation a").evaluate(lines) == "underline"
    for width in (PHONE, DESK):
        page.set_viewport_size({"width": width, "height": 900})
        # what scrolls is found after a change of width
        page.wait_for_timeout(200)
        assert serious(page) == []
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
    page.goto(f"{address}/nbs/ref-api.html")
    assert brightness() < 80
    context.close()
