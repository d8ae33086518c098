"""The last step of both builders: one site, whoever built it, that needs no network.

`finish` makes the links to our own pages relative, drops what would be loaded from elsewhere, gives
the pages what a theme leaves out (`dress`), and checks every link, anchor and loaded file.
`python tools/finish_site.py _docs` checks a built site.
"""

import base64
import os
import re
import struct
import sys
from configparser import ConfigParser
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "nbs/ref-api.html"

# What themes, Quarto and matplotlib's player ask of the network and the pages
# work without: web fonts, require.js and jquery (for widgets in outputs), Font
# Awesome.
WEB_FONT = re.compile(
    r"""@import\s*(?:url\(["']?https?:[^)]*\)|"https?:[^"]*"|'https?:[^']*')\s*;?"""
)
FOREIGN = re.compile(
    r"""<script[^>]*src="https?://[^"]*/(?:require|jquery)[^"]*"[^>]*>\s*</script>"""
    r"""|<script[^>]*>\s*define\('jquery'[^<]*</script>"""
    r"""|<link[^>]*href="https?://[^"]*font-awesome[^"]*"[^>]*>"""
)
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "video": "src",
    "audio": "src",
}
LOADS |= {"source": "src", "embed": "src", "link": "href"}

# A picture wider than this (in its own pixels) keeps a readable size on a
# phone and scrolls there; assets/site.css says how.
WIDE = 640
# Links of the bar and of the margin stay in their tab.
OWN_PLACE = r'class="[^"]*(?:nav-link|toc-action)'
# The inside of a tag, whose attributes may hold a `>`.
INSIDE = r"""(?:[^<>"]|"[^"]*")*"""
SILENT = ("code", "pre", "script", "style", "textarea", "title")
FORMULA = re.compile(r"\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
# Markdown and TeX that stand in the text as they were written.
RAW = re.compile(r"^#{1,6} \S.*|\$?\\[a-zA-Z]{2,}.{,20}", re.MULTILINE)


class Page(HTMLParser):
    """The anchors of a page, its links, the files it loads, and its text outside code and formulas."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads, self.tabs = set(), [], [], []
        self.text, self.silent, self.depth = [], None, 0
        self.feed(text)
        self.close()
        self.text = FORMULA.sub("", "".join(self.text))

    def handle_data(self, data):
        """Keep what a reader reads as prose."""
        if self.silent is None:
            self.text.append(data)

    def handle_endtag(self, tag):
        """Leave code or a formula, or a paragraph."""
        if tag == self.silent:
            self.depth -= 1
            self.silent = self.silent if self.depth else None
        if tag in ("p", "li", "td", "div"):
            self.text.append("\n")

    def handle_starttag(self, tag, attributes):
        """Note what one tag defines and asks for."""
        a = dict(attributes)
        formula = "math" in (a.get("class") or "").split()
        if self.silent is None and (formula or tag in SILENT):
            self.silent = tag
        self.depth += tag == self.silent
        self.anchors |= {a[key] for key in ("id", "name") if a.get(key)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
            if a.get("target") == "_blank":
                self.tabs.append(a["href"])
        if a.get(LOADS.get(tag)) and a.get("rel") != "canonical":
            self.loads.append(a[LOADS[tag]])


def own_address():
    """The address the site is published at, from settings.ini, without a slash at its end."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return (
        config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"]
    ).rstrip("/")


def localise(
    text,  # HTML of a page
    page,  # Path of the page in the site, such as `nbs/index.html`
    address,  # Where the site is published
    anchors,  # Anchors of each page of the site
):  # The HTML, which needs no network and leads to other pages by relative links
    """Make links to our own pages relative, and drop what is loaded from elsewhere.

    nbdev gives every name an address on its page. The page shows classes and functions; a method is
    in the reference, and what is no public name may be nowhere, so that it is not a link.
    """

    def relative(m):
        before, path, after, inside = m.groups()
        target, _, anchor = (path or "").lstrip("/").partition("#")
        target = target or "index.html"
        if anchor and anchor not in anchors.get(target, ()):
            if anchor in anchors.get(REFERENCE, ()):
                target = REFERENCE
            elif inside.startswith("<code"):
                return inside
        href = os.path.relpath(target, Path(page).parent).replace(os.sep, "/")
        tag = f'{before}href="{href}{"#" + anchor if anchor else ""}"{after}'
        return tag + inside + "</a>"

    own = rf'(<a\b[^>]*?)href="{re.escape(address)}(/[^"]*)?"([^>]*>)(.*?)</a>'
    return re.sub(own, relative, FOREIGN.sub("", text), flags=re.DOTALL)


def picture_width(
    src,  # A picture's address, as the page gives it
    folder,  # Folder of the page
):  # Its width in its own pixels; 0 for what is not a PNG
    """Read the width of a PNG, which stands in the page or beside it."""
    inside = src.startswith("data:image/png;base64,")
    file = folder / unquote(src)
    if inside:
        head = base64.b64decode(src.split(",", 1)[1][:32])
    elif file.suffix == ".png" and file.is_file():
        with file.open("rb") as f:
            head = f.read(24)
    else:
        return 0
    return struct.unpack(">I", head[16:20])[0]


def dress(
    text,  # HTML of a page
    path,  # The page's file
    site,  # Folder of the site
):  # The HTML, with the same manners whichever builder wrote it
    """Give a page what the builders do not: manners for keys, phones and screen readers.

    Only links that leave the site open a tab, the top bar marks no page but the one that is open,
    an icon beside a name is silent, a title that folds is a button, a citation says under the
    pointer what it cites, and a wide picture is named so.
    """

    def link(m):
        tag = re.sub(r' (?:target="_blank"|rel="noopener[^"]*")', "", m[0])
        if re.search(r'href="https?:', tag) and not re.search(OWN_PLACE, tag):
            tag = tag[:-1] + ' target="_blank" rel="noopener">'
        return tag

    def bar(m):
        tag = re.sub(r' aria-current="[^"]*"', "", m[0])
        tag = re.sub(r'(class="[^"]*?) active\b', r"\1", tag)
        href = re.search(r'href="([^"#?]*)"', tag)
        if (
            href
            and (path.parent / unquote(href[1])).resolve() == path.resolve()
        ):
            tag = tag.replace("nav-link", "nav-link active", 1)
            tag = tag[:-1] + ' aria-current="page">'
        return tag

    def citation(m):
        entry = entries.get(m[1])
        if entry is None or "title=" in m[0]:
            return m[0]
        return f'{m[0][:-1]} title="{escape(entry)}">'

    def fold(m):
        if 'data-bs-toggle="collapse"' not in m[0]:
            return m[0]
        # its title names it
        tag = re.sub(r' aria-label="[^"]*"', "", m[0])
        return tag.replace("<div", '<div role="button" tabindex="0"')

    def picture(m):
        src = re.search(r'src="([^"]*)"', m[0])
        if (
            not src
            or 'class="wide' in m[0]
            or picture_width(src[1], path.parent) <= WIDE
        ):
            return m[0]
        if 'class="' in m[0]:
            return m[0].replace('class="', 'class="wide ', 1)
        return m[0].replace("<img", '<img class="wide"', 1)

    text = re.sub(rf"<a\b{INSIDE}>", link, text)
    head, navbar, rest = text.partition('id="quarto-header"')
    inside, end, rest = rest.partition("</header>")
    inside = re.sub(r'<a\b[^>]*class="nav-link[^>]*>', bar, inside)
    # Quarto calls the button of the folded bar a menu
    inside = inside.replace(' role="menu"', "")
    text = head + navbar + inside + end + rest
    text = re.sub(
        r'(<i class="bi[^"]*") role="img"(?![^>]*aria-label)',
        r'\1 aria-hidden="true"',
        text,
    )
    text = re.sub(rf'<div class="callout-header[^"]*"{INSIDE}>', fold, text)
    # Quarto's own pop-ups do it better
    if "tippy" not in text:
        entries = {
            key: " ".join(unescape(re.sub(r"<[^>]+>", "", entry)).split())
            for key, entry in re.findall(
                r'<div id="(ref-[^"]+)"[^>]*>(.*?)</div>', text, re.DOTALL
            )
        }
        text = re.sub(
            r'<a href="#(ref-[^"]+)"[^>]*role="doc-biblioref"[^>]*>',
            citation,
            text,
        )
    text = re.sub(rf"<img\b{INSIDE}>", picture, text)
    script = os.path.relpath(site / "assets/site.js", path.parent)
    tag = f'<script src="{Path(script).as_posix()}" defer></script>'
    if "</body>" in text and tag not in text:
        text = text.replace("</body>", tag + "</body>")
    return text


def check(
    site,  # Folder of a built site
):  # A line for each fault that a reader would meet
    """Check every link, anchor and loaded file of a site; nothing may lead out of its folder."""
    site = site.resolve()
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for raw in RAW.findall(page.text):
            problems.append(f"{name}: source stands in the text: {raw}")
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loads and parts.scheme not in ("data", "blob"):
                    problems.append(f"{name}: loads {url} from the network")
                continue
            if url in page.tabs:
                problems.append(f"{name}: {url} opens a tab")
            target = (
                (path.parent / unquote(parts.path)).resolve()
                if parts.path
                else path
            )
            target = target / "index.html" if target.is_dir() else target
            if parts.path.startswith("/") or site not in target.parents:
                problems.append(f"{name}: {url} leads out of the site")
            elif not target.is_file():
                problems.append(f"{name}: broken link {url}")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                problems.append(f"{name}: broken link {url} (no such anchor)")
    return sorted(set(problems))


def finish(
    site,  # Folder of a site that Quarto or the offline builder has rendered
):  # A line for each problem that is left
    """Make a rendered site independent of the network and of its address, and check it."""
    for path in site.rglob("*.css"):
        path.write_text(WEB_FONT.sub("", path.read_text()))
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    name = {path: path.relative_to(site).as_posix() for path in pages}
    anchors = {name[path]: Page(text).anchors for path, text in pages.items()}
    for path, text in pages.items():
        text = localise(text, name[path], own_address(), anchors)
        path.write_text(dress(text, path, site))
    return check(site)


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print(*found, sep="\n")
    sys.exit(bool(found))
