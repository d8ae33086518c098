#!/usr/bin/env python3
"""Time flowcourse beside other libraries, and write one JSON file for each case.

`python benchmarks/run.py` runs all cases, or those that are named, each in a process of its own, and
writes to `benchmarks/results/`; `overheads` is what flowcourse adds itself. With `--compile` every
model is also timed behind torch.compile, in the same rounds; with `--curves` the time is also
recorded against dimension, layers and batch.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

# the profiler's lines, which are no result
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Compile here and not in workers, which would go on beside the timings where
# the limit is reached.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from cases import FLOOR, OURS, awake, batch, cases, curved, curves, trained
from measure import (
    Runner,
    check,
    interleaved,
    peak_memory,
    quartiles,
    ratio,
    summary,
)
from overheads import overheads

RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES = (
    "torch",
    "flowcourse",
    "nflows",
    "normflows",
    "zuko",
    "FrEIA",
    "pyro-ppl",
)
SEED = 0


def surroundings(options):
    """What the numbers depend on besides the code."""
    versions = {"python": platform.python_version()}
    for name in (*LIBRARIES, "torchdiffeq", "flow_matching"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None  # its contestants are left out
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "dtype": "float32",
        "flush_denormal": True,
        "quick": options.quick,
        "versions": versions,
    }


class TooLong(BaseException):
    """Compiling took too long; no `Exception`, since torch.compile swallows many of those."""


@contextmanager
def limit(seconds):
    """Raise `TooLong` in a block that takes longer."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build(contestant, sizes, compiled=False, steps=0):
    """A runner of a contestant; all start from the same seed and see the same data."""
    torch.manual_seed(SEED)
    data = batch(sizes)
    torch.manual_seed(SEED)
    model = awake(contestant.build(**sizes))
    if steps:
        model, data = trained(model, steps, data[0]), (curved(data[0]),)
    return Runner(model, data, compiled)


def compile_all(case, entrants, sizes, seconds, steps):
    """Compiled runners, and for each mode that did not compile the name of what was raised."""
    # a library's layers share their code
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # breaks of the graph are counted instead
    torch._logging.set_logs(all=logging.ERROR)
    # looks at the compiler, outside any limit
    torch.compile(torch.sin)(torch.ones(8))
    runners, notes = {}, {}
    for name, contestant in entrants.items():
        runners[name] = build(contestant, sizes, compiled=True, steps=steps)
        if case.equalise and name != FLOOR:
            case.equalise(runners[name].model, runners[name].batch[0])
        notes[name] = {}
        for mode in case.modes:
            if mode in contestant.dies:
                notes[name][mode] = {"failed": "memory error"}
                continue
            started, graphs = time.monotonic(), _graphs()
            try:
                with limit(seconds):
                    for _ in range(2):
                        runners[name].call(mode)()
            except (Exception, TooLong) as error:  # noqa: BLE001 (whatever it is, it is recorded and shown)
                notes[name][mode] = {"failed": type(error).__name__}
                print(
                    f"  {name}, {mode}: {type(error).__name__} while compiling",
                    flush=True,
                )
            else:
                spent = round(time.monotonic() - started, 1)
                notes[name][mode] = {
                    "compile_seconds": spent,
                    "graphs": _graphs() - graphs,
                }
                print(f"  {name}, {mode}: compiled in {spent} s", flush=True)
    return runners, notes


def _graphs():
    "How many graphs torch.compile has made so far; more than one per call are breaks."
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def best(case, times, mode, kinds):
    """The quickest peer by its median."""
    others = (OURS, FLOOR, *case.beside)
    peers = [
        k
        for k in times
        if k[0] not in others and k[1] in kinds and k[2] == mode
    ]
    return min(peers, key=lambda k: quartiles(times[k])[1], default=None)


def compare(case, times):
    """For each mode: the best peer over the floor, and ours over the best peer with its target."""
    found = {}
    for mode in case.modes:
        found[mode] = {}
        kinds = {"eager": ("eager",), "compiled": ("eager", "compiled")}
        for kind, allowed in kinds.items():
            peer = best(case, times, mode, allowed)
            if peer is None or (
                kind == "compiled" and not any(k[1] == kind for k in times)
            ):
                continue
            floor = min(
                (
                    times[FLOOR, k, mode]
                    for k in allowed
                    if (FLOOR, k, mode) in times
                ),
                key=lambda seconds: quartiles(seconds)[1],
            )
            entry = {
                "best_peer": f"{peer[0]}, {peer[1]}"
                if kind == "compiled"
                else peer[0]
            }
            entry["best_peer_over_floor"] = ratio(times[peer], floor)["ratio"]
            target = (
                case.targets if kind == "eager" else case.compiled_targets
            ).get(mode)
            entry["target"] = target
            if (OURS, kind, mode) in times:
                ours = times[OURS, kind, mode]
                entry |= ratio(ours, times[peer])
                entry["ours_over_floor"] = ratio(ours, floor)["ratio"]
                entry["met"] = (
                    None if target is None else entry["ratio"] <= target
                )
            found[mode][kind] = entry
    return found


def compare_beside(case, times):
    """For each contestant with targets of its own: ours over it, mode by mode."""
    found = {}
    for name, targets in case.beside.items():
        found[name] = {}
        for mode in case.modes:
            pair = (OURS, "eager", mode), (name, "eager", mode)
            if not all(key in times for key in pair):
                continue
            row = ratio(*(times[key] for key in pair))
            target = targets.get(mode)
            met = None if target is None else row["ratio"] <= target
            found[name][mode] = row | {"target": target, "met": met}
    return found


def run_case(name, options):
    """Time one case; the record."""
    case = cases[name]
    sizes = case.tiny if options.quick else case.sizes
    entrants = {n: c for n, c in case.builders().items() if c.installed(n)}
    absent = [n for n, c in case.builders().items() if not c.installed(n)]
    print(
        f"{name}: {', '.join(entrants)}"
        + (f"; absent: {', '.join(absent)}" if absent else "")
    )
    steps = min(case.steps, 2) if options.quick else case.steps
    runners = {
        (n, "eager"): build(c, sizes, steps=steps) for n, c in entrants.items()
    }
    record = {
        "case": name,
        "title": case.title,
        "sizes": sizes,
        "modes": list(case.modes),
        "steps": steps,
    }
    record |= {"note": case.note, "rounds": options.rounds, "absent": absent}
    record |= surroundings(options) | {"contestants": {}}
    base = None
    # the floor first: its count is the measure
    for n, c in reversed(entrants.items()):
        runner = runners[n, "eager"]
        equal = {}
        if case.equalise and n != FLOOR:
            equal = case.equalise(runner.model, runner.batch[0])
        check(runner, case.modes)
        count = sum(
            p.numel() for p in runner.model.parameters() if p.requires_grad
        )
        base = base or count
        entry = {
            "note": c.note,
            "parameters": count,
            "parameters_over_floor": count / base,
        }
        # so that the step makes its gradients anew
        runner.optimizer.zero_grad()
        entry["peak_bytes"] = peak_memory(runner.call("train"))
        entry |= equal
        record["contestants"][n] = entry | {"eager": {}, "compiled": {}}
    if options.compile:
        more, notes = compile_all(
            case, entrants, sizes, options.compile_limit, steps
        )
        runners |= {(n, "compiled"): runner for n, runner in more.items()}
        for n, modes in notes.items():
            record["contestants"][n]["compiled"] = modes
    times = {}
    for mode in case.modes:
        calls = {
            (n, kind, mode): lambda runner=runner, mode=mode: runner.call(mode)
            for (n, kind), runner in runners.items()
            if kind == "eager"
            or "failed" not in record["contestants"][n]["compiled"][mode]
        }
        times |= interleaved(
            calls, options.rounds, options.threads, options.at_least
        )
    for (n, kind, mode), seconds in times.items():
        row = record["contestants"][n][kind]
        row[mode] = row.get(mode, {}) | summary(seconds)
    record["contestants"] = {n: record["contestants"][n] for n in entrants}
    record["ratios"] = compare(case, times)
    if case.beside:
        record["beside"] = compare_beside(case, times)
    return record


def run_curves(name, options):
    """Time one mode of a case while one size varies; the record."""
    mode, axes = curves[name]
    case = cases[name]
    start = case.tiny if options.quick else case.sizes
    entrants = {n: c for n, c in case.builders().items() if c.installed(n)}
    rounds = min(options.rounds, 5)
    record = {
        "case": name,
        "title": case.title,
        "sizes": start,
        "mode": mode,
        "rounds": rounds,
    }
    record |= surroundings(options) | {"axes": {}}
    for axis, values in axes.items():
        points = []
        for value in values[:2] if options.quick else values:
            sizes = start | {axis: value}
            runners = {n: build(c, sizes) for n, c in entrants.items()}
            calls = {
                n: lambda runner=runner: runner.call(mode)
                for n, runner in runners.items()
            }
            times = interleaved(
                calls, rounds, options.threads, options.at_least
            )
            rows = {n: summary(seconds) for n, seconds in times.items()}
            points.append({"value": value, "contestants": rows})
            print(f"{name}: {axis} {value}", flush=True)
        record["axes"][axis] = points
    return record


def run_overheads(options):
    """Time what flowcourse adds to work that has to be done anyway; the record."""
    record = (
        {"case": "overheads", "rounds": options.rounds}
        | surroundings(options)
        | {"rows": {}}
    )
    for name, row in overheads.items():
        calls = dict(
            zip(("ours", "bare"), row.calls(options.quick), strict=True)
        )
        calls = {who: lambda call=call: call for who, call in calls.items()}
        times = interleaved(
            calls, options.rounds, options.threads, options.at_least
        )
        pairs = list(zip(times["ours"], times["bare"], strict=True))
        found = [a / b if row.kind == "ratio" else a - b for a, b in pairs]
        low, middle, high = quartiles(found)
        entry = {
            "title": row.title,
            "bare": row.bare,
            "kind": row.kind,
            "target": row.most,
        }
        entry |= {
            "value": middle,
            "q1": low,
            "q3": high,
            "met": middle <= row.most,
        }
        entry |= {
            "ours": summary(times["ours"]),
            "bare_seconds": summary(times["bare"]),
        }
        record["rows"][name] = entry
        print(
            f"  {name}: {row.kind} {middle:.2f}, at most {row.most:.2f}",
            flush=True,
        )
    return record


def write(record, path):
    """Put a record into its file, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    text = json.dumps(record, indent=1, allow_nan=False)
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, path)
    print(f"wrote {path}", flush=True)


def report(record):
    """Print one line for each ratio."""
    for mode, kinds in record["ratios"].items():
        for kind, row in kinds.items():
            ours = (
                f"{row['ratio']:.2f} of it"
                if "ratio" in row
                else "none of ours"
            )
            target = (
                "no target"
                if row["target"] is None
                else f"target {row['target']:.2f}"
            )
            over = f"{row['best_peer_over_floor']:.1f} x floor"
            print(
                f"  {mode:<9}{kind:<9} best peer {row['best_peer']} ({over}): {ours}, {target}"
            )
    for name, modes in record.get("beside", {}).items():
        for mode, row in modes.items():
            wanted = row["target"]
            told = "no target" if wanted is None else f"target {wanted:.2f}"
            print(f"  {mode:<9}beside {name}: {row['ratio']:.2f}, {told}")


def arguments(words=None):
    """Read the command line."""
    names = [*cases, "overheads"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of torch"
    )
    parser.add_argument(
        "--rounds", type=int, help="measurements of each; 15, or 2 with --quick"
    )
    parser.add_argument(
        "--compile", action="store_true", help="time torch.compile too"
    )
    parser.add_argument(
        "--compile-limit",
        type=int,
        default=600,
        help="seconds for one model in one mode",
    )
    parser.add_argument(
        "--curves", action="store_true", help="record scaling curves too"
    )
    parser.add_argument(
        "--only-curves", action="store_true", help="record scaling curves alone"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: does it run at all?"
    )
    parser.add_argument(
        "--out", type=Path, help="folder; _bench with --quick, else the results"
    )
    options = parser.parse_args(words)
    unknown = [name for name in options.cases if name not in names]
    if unknown:
        parser.error(
            f"CASE: expected some of {', '.join(names)}, got {', '.join(unknown)}"
        )
    options.cases = options.cases or names
    options.rounds = options.rounds or (2 if options.quick else 15)
    options.at_least = 0.0005 if options.quick else 0.02
    options.out = options.out or (Path("_bench") if options.quick else RESULTS)
    return options


def main():
    """Run one case here, or several in a process each."""
    options = arguments()
    if len(options.cases) > 1:
        words = [w for w in sys.argv[1:] if w not in options.cases]
        failed = [
            name
            for name in options.cases
            if subprocess.run(
                [sys.executable, __file__, *words, name], check=False
            ).returncode
        ]
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")
        return
    (name,) = options.cases
    # of the peers, about functions that torch will drop
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)  # first: new threads take it over
    torch.set_num_threads(options.threads)
    if name == "overheads":
        write(run_overheads(options), options.out / f"{name}.json")
    elif not options.only_curves:
        record = run_case(name, options)
        report(record)
        write(record, options.out / f"{name}.json")
    if name in curves and (options.curves or options.only_curves):
        write(run_curves(name, options), options.out / f"{name}.curves.json")


if __name__ == "__main__":
    main()
