#!/usr/bin/env python3
"""Record finished runs of the command line in `results/`: config, results and how the loss went.

`tools/record.py runs/dlgm.nf10.mnist ...` reads the folders that `flowcourse train` left and writes
`results/dlgm/dlgm.nf10.mnist.json`, small enough to commit: no weights, the loss averaged over every
thousand updates, and the command that repeats the run.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path

from flowcourse.cli import save_json
from flowcourse.configs import configs

RESULTS = Path(__file__).resolve().parents[1] / "results"


def command_for(name, config):
    """What to type for a run: the name, and every field that is not as the name has it."""
    words = ["flowcourse", "train", "--config", name]
    for key, as_named in configs[name].settings().items():
        value, option = config[key], key.replace("_", "-")
        if value == as_named:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            several = value if isinstance(value, tuple) else [value]
            words += [f"--{option}", *map(str, several)]
    return shlex.join(words)


def record(folder):
    """The record of one run."""
    run, result, history = (
        json.loads((folder / f"{part}.json").read_text())
        for part in ("run", "result", "history")
    )
    loss, ended = history["loss"], (folder / "model.pt").stat().st_mtime
    config = configs[run["name"]].replace(**run["config"]).settings()
    return {
        "name": run["name"],
        "command": command_for(run["name"], config),
        "config": config,
        "versions": run["versions"],
        "machine": f"{platform.machine()}, CPU",
        "date": time.strftime("%Y-%m-%d", time.localtime(ended)),
        "hours": round(sum(history["seconds"]) / 3600, 2),
        "result": result,
        "validation_step": history["validation_step"],
        "validation_loss": [
            round(value, 3) for value in history["validation_loss"]
        ],
        "loss": [
            round(sum(part) / len(part), 3)
            for part in (loss[i : i + 1000] for i in range(0, len(loss), 1000))
        ],
    }


def main():
    """Record the runs that were named."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        help="of runs that are trained and tested",
    )
    for folder in parser.parse_args().folders:
        found = record(folder)
        path = RESULTS / found["name"].split(".")[0] / f"{found['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, found, indent=1)
        print(path.relative_to(RESULTS.parent))


if __name__ == "__main__":
    sys.exit(main())
