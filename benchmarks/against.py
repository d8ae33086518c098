#!/usr/bin/env python3
"""Time the working tree beside an earlier commit, case by case and in turn, on the same work.

`python benchmarks/against.py COMMIT` prints, for each case and mode of `cases.py`, the median over
the rounds of new time over old time. Each tree has a process of its own, and the two take turns, so
that a disturbance of the machine meets both. With `--most 1.05` a median above it is an error.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AT_LEAST = 0.1  # seconds that one measurement takes


def serve(root, threads):
    """Answer each line `case mode number` with the seconds of one call; the first line is what there is."""
    # of this tree, and not of the one that is installed
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    import torch
    from cases import OURS, awake, batch, cases
    from measure import Runner

    import flowcourse

    if Path(flowcourse.__file__).parents[1] != root:
        raise ValueError(f"expected flowcourse of {root}")
    torch.set_flush_denormal(True)  # first: new threads take it over
    torch.set_num_threads(threads)
    ours = {
        name: case for name, case in cases.items() if OURS in case.contestants
    }
    print(json.dumps({n: list(c.modes) for n, c in ours.items()}), flush=True)
    runners = {}
    for line in sys.stdin:
        name, mode, number = line.split()
        if name not in runners:
            torch.manual_seed(0)
            model = awake(
                ours[name].contestants[OURS].build(**ours[name].sizes)
            )
            runners[name] = Runner(model, batch(ours[name].sizes))
        call = runners[name].call(mode)
        start = time.perf_counter()
        for _ in range(int(number)):
            call()
        print((time.perf_counter() - start) / int(number), flush=True)


class Side:
    """One tree, timed in a process of its own."""

    def __init__(self, root, threads):
        command = [sys.executable, __file__, "--serve", str(root)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.modes = json.loads(self._answer())

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that is timed has ended; see above")
        return line

    def time(self, name, mode, number):
        """Seconds of one of so many calls."""
        print(name, mode, number, file=self.process.stdin, flush=True)
        return float(self._answer())

    def stop(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(old, new, name, mode, rounds):
    """The median ratio of new to old, its quartiles, and the new median in seconds."""
    for side in (old, new):
        side.time(name, mode, 1)
    number = max(1, math.ceil(AT_LEAST / old.time(name, mode, 1)))
    ratios, seconds = [], []
    for i in range(rounds):
        order = (old, new) if i % 2 else (new, old)
        found = {side: side.time(name, mode, number) for side in order}
        ratios.append(found[new] / found[old])
        seconds.append(found[new])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high, statistics.median(seconds)


def main():
    """Compare, print, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("commit", nargs="?", help="to compare with")
    parser.add_argument(
        "cases", nargs="*", help="some of them; the default is all"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=float, default=math.inf)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads)
    if not args.commit:
        parser.error("expected the commit to compare with")
    slower = []
    with ExitStack() as stack:
        folder = (
            Path(stack.enter_context(tempfile.TemporaryDirectory())) / "old"
        )
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--quiet", "--detach", str(folder), args.commit],
            check=True,
        )
        stack.callback(subprocess.run, [*git, "remove", "--force", str(folder)])
        old, new = (
            Side(root, args.threads) for root in (folder.resolve(), ROOT)
        )
        stack.callback(old.stop)
        stack.callback(new.stop)
        print(f"{'case':24} {'mode':9} {'ratio':>6}  quartiles       new, ms")
        for name, modes in new.modes.items():
            if args.cases and name not in args.cases:
                continue
            for mode in modes:
                if mode not in old.modes.get(name, ()):
                    print(f"{name:24} {mode:9}  the old commit has none")
                    continue
                middle, low, high, seconds = compare(
                    old, new, name, mode, args.rounds
                )
                print(
                    f"{name:24} {mode:9} {middle:6.3f}  {low:.3f} to {high:.3f}"
                    f"  {1e3 * seconds:8.3f}",
                    flush=True,
                )
                if middle > args.most:
                    slower.append(f"{name} {mode} {middle:.3f}")
    if slower:
        print(f"slower than {args.most}:", *slower, sep="\n")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
