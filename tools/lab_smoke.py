#!/usr/bin/env python3
"""Open a notebook in a real JupyterLab in headless Chromium, run all its cells, check the result.

usage: python tools/lab_smoke.py nbs/00-quick-start.ipynb [screenshot.png]
needs: pip install jupyterlab playwright; apt-get install chromium
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RUN_ALL = """async (seconds) => {
    const app = window.jupyterapp, panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;  // the kernel has answered
    const late = new Promise((_, reject) =>
        setTimeout(() => reject(new Error(`not done in ${seconds} s`)), 1000 * seconds));
    await Promise.race([app.commands.execute('notebook:run-all-cells'), late]);
    await panel.context.save();
}"""


def launch_chromium(playwright):
    """The system's Chromium, without a window and without traffic of its own."""
    return playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS
    )


def start_lab(folder, log):
    """JupyterLab over a folder, with settings of its own: the process and its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
    ]
    command += ["--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="]
    command += [
        f"--ServerApp.root_dir={folder / 'repo'}",
        "--LabApp.news_url=None",
    ]
    command += ["--expose-app-in-browser"]
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    return subprocess.Popen(
        command, env=env, stdout=log, stderr=log
    ), f"http://127.0.0.1:{port}"


def wait_for(address, process, seconds=60):
    """Wait until a server answers."""
    for _ in range(4 * seconds):
        try:
            return urllib.request.urlopen(f"{address}/api", timeout=1).close()
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.25)
    raise RuntimeError(f"JupyterLab does not answer at {address}")


def move_player(
    page,  # The browser's page with a notebook that has run
):  # What the first player says before and after; none without a player
    """Press a key on the slider of the first player of a notebook."""
    player = page.locator(".flow-player").first
    if not player.count():
        return []
    label, slider = player.locator("output"), player.locator("input")
    labels = []
    for key in ("Home", "ArrowRight"):
        slider.press(key)
        labels.append(label.inner_text())
    return labels


def run_in_lab(
    notebook,  # Path of the notebook in the repository
    shot=None,  # File for a screenshot of the finished notebook
    timeout=600,  # Seconds the cells may take
):  # Code cells, those that ran, the errors they raised, and two labels of a player
    """Run a copy of a notebook in JupyterLab, as a reader would, and read what was saved."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        # JupyterLab saves and nbdev exports: use a copy
        for part in ("nbs", "flowcourse"):
            shutil.copytree(ROOT / part, folder / "repo" / part)
        for part in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / part, folder / "repo" / part)
        with open(folder / "log", "w") as log:
            lab, address = start_lab(folder, log)
            try:
                wait_for(address, lab)
                with sync_playwright() as playwright:
                    browser = launch_chromium(playwright)
                    page = browser.new_page(
                        viewport={"width": 1300, "height": 1000}
                    )
                    page.goto(f"{address}/lab/tree/{notebook}?reset")
                    page.wait_for_selector(
                        ".jp-Notebook .jp-Cell", timeout=60_000
                    )
                    page.evaluate(RUN_ALL, timeout)
                    labels = move_player(page)
                    if shot:
                        page.screenshot(path=shot)
                    browser.close()
            finally:
                lab.terminate()
                lab.wait(30)
        cells = json.loads((folder / "repo" / notebook).read_text())["cells"]
    code = [
        c
        for c in cells
        if c["cell_type"] == "code" and "".join(c["source"]).strip()
    ]
    errors = [
        f"{output['ename']}: {output['evalue']}"
        for cell in code
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
    return (
        len(code),
        sum(cell["execution_count"] is not None for cell in code),
        errors,
        labels,
    )


if __name__ == "__main__":
    n, done, errors, labels = run_in_lab(*sys.argv[1:])
    print(
        *errors,
        f"the first player, moved by a key: {' -> '.join(labels) or 'none'}",
        f"{sys.argv[1]}: {done} of {n} code cells ran in JupyterLab",
        sep="\n",
    )
    sys.exit(bool(errors) or done < n)
