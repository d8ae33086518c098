"""The last step of both builders: the site needs no network, and every link leads somewhere.

`finish` makes the links to our own pages relative, drops what would be loaded from elsewhere, and
checks every link, anchor and loaded file. `python tools/finish_site.py _docs` checks a built site.
"""

import os
import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "nbs/99-reference.html"

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


class Page(HTMLParser):
    """The anchors of a page, its links, and the files it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Note what one tag defines and asks for."""
        a = dict(attributes)
        self.anchors |= {a[key] for key in ("id", "name") if a.get(key)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
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

    nbdev gives every name an address in its lesson. The lesson shows classes and functions; a
    method is in the reference, and a private name nowhere, so that it is not a link.
    """

    def relative(m):
        before, path, after, inside = m.groups()
        target, _, anchor = (path or "").lstrip("/").partition("#")
        target = target or "index.html"
        if anchor and anchor not in anchors.get(target, ()):
            if anchor in anchors.get(REFERENCE, ()):
                target = REFERENCE
            elif re.search(r"(^|\.)_", anchor):
                return inside
        href = os.path.relpath(target, Path(page).parent).replace(os.sep, "/")
        tag = f'{before}href="{href}{"#" + anchor if anchor else ""}"{after}'
        return tag.replace(' target="_blank"', "") + inside + "</a>"

    own = rf'(<a\b[^>]*?)href="{re.escape(address)}(/[^"]*)?"([^>]*>)(.*?)</a>'
    return re.sub(own, relative, FOREIGN.sub("", text), flags=re.DOTALL)


def check(
    site,  # Folder of a built site
):  # A line for each link that leads nowhere and each file from the network
    """Check every link, anchor and loaded file of a site."""
    pages = {
        path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")
    }
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve()).as_posix()
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loads and parts.scheme not in ("data", "blob"):
                    problems.append(f"{name}: loads {url} from the network")
                continue
            target = (
                (path.parent / unquote(parts.path)).resolve()
                if parts.path
                else path
            )
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
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
        path.write_text(localise(text, name[path], own_address(), anchors))
    return check(site)


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print(*found, sep="\n")
    sys.exit(bool(found))
