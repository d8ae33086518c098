#!/usr/bin/env python3
"""Run the quick start for real, build the site, and say what was learned.

The saved notebook is not touched: a copy in memory is executed. Its picture and its results go to
the folder that FLOWCOURSE_OUT names, `_course` by default. The exit status is 1 if a cell fails.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LESSON = ROOT / "nbs" / "00-quick-start.ipynb"


def headings(
    cells,  # All cells of a notebook
):  # For each cell, the section that it is in
    """Find the section of every cell."""
    found, current = [], "Start"
    for cell in cells:
        if cell.cell_type == "markdown":
            current = (
                [current] + re.findall(r"^#+ (.*)", cell.source, re.MULTILINE)
            )[-1]
        found.append(current)
    return found


async def execute(
    nb,  # A notebook, executed in place
    bar,  # Progress over its code cells
):
    """Execute a notebook in the folder of the lessons, a section's name beside the bar."""
    sections = headings(nb.cells)

    async def tick():
        # a cell that trains takes a while: the clock shows that it is alive
        while True:
            bar.refresh()
            await asyncio.sleep(1)

    client = NotebookClient(
        nb,
        timeout=1800,
        resources={"metadata": {"path": str(LESSON.parent)}},
        on_cell_start=lambda cell, cell_index: bar.set_description(
            sections[cell_index]
        ),
        on_cell_complete=lambda cell, cell_index: bar.update(),
    )
    clock = asyncio.create_task(tick())
    try:
        await client.async_execute()
    finally:
        clock.cancel()


def show(
    results,  # For each data set, a number of each model
):
    """Print what was learned."""
    for name, models in results.items():
        print(f"\n  {name}")
        for model, value in models.items():
            print(f"    {model:<36}{value:8.2f}")


def main():
    """Run the lesson, build the site, report."""
    started = time.monotonic()
    out = Path(
        os.environ.setdefault("FLOWCOURSE_OUT", str(ROOT / "_course"))
    ).resolve()
    # the notebook runs in another folder
    os.environ["FLOWCOURSE_OUT"] = str(out)
    nb = nbformat.read(LESSON, as_version=4)
    print(
        f"Running {LESSON.relative_to(ROOT)}: it trains four flows, in about half a minute"
    )
    try:
        cells = sum(cell.cell_type == "code" for cell in nb.cells)
        with tqdm(total=cells, unit="cell") as bar:
            asyncio.run(execute(nb, bar))
    except CellExecutionError as error:
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        sys.exit(
            f"\n{LESSON.relative_to(ROOT)} failed in this cell:\n{message}"
        )
    learned = time.monotonic()
    print("Building the site")
    site = subprocess.run(
        [sys.executable, ROOT / "tools" / "build_docs"], cwd=ROOT, check=False
    )
    if site.returncode:
        sys.exit("The lesson ran, but the site could not be built: see above")
    show(json.loads((out / "quick-start.json").read_text()))
    took = time.monotonic() - started
    print(
        f"\nThe lesson took {learned - started:.0f} s, with the site {took:.0f} s."
    )
    print(f"The picture: {out / 'quick-start.png'}")
    print("Open the lessons with  make lab  and the site with  make site-serve")


if __name__ == "__main__":
    main()
