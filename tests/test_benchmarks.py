"""The benchmarks: our sides and the floors run, the measures measure, the records are complete."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases as table
import measure
import overheads
import run
from against import compare

RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
OWN = [
    (name, who)
    for name, case in table.cases.items()
    for who in (table.OURS, table.FLOOR)
    if who in case.builders()
]


@pytest.mark.parametrize(("name", "who"), OWN)
def test_our_sides_and_floors_run(name, who):
    case = table.cases[name]
    runner = run.build(case.builders()[who], case.tiny)
    measure.check(runner, case.modes)
    assert all(p.grad is not None for p in runner.model.parameters())


@pytest.mark.parametrize(
    "name", [name for name, who in OWN if who == table.OURS]
)
def test_ours_has_as_many_parameters_as_the_floor(name):
    case = table.cases[name]
    ours, floor = (
        sum(
            p.numel()
            for of, p in case.builders()[who]
            .build(**case.sizes)
            .named_parameters()
            # the matrices and norms of Glow, which are no networks
            if not (name.startswith("glow") and ".raw." in of)
        )
        for who in (table.OURS, table.FLOOR)
    )
    # of residual blocks, one more number for each hidden layer
    told = "a conditioner of another size would be other work"
    assert 0 <= ours - floor <= 1e-3 * floor, told


def test_continuous_flows_are_timed_at_equal_error():
    case = table.cases["cnf"]
    runner = run.build(case.contestants[table.OURS], case.tiny, steps=3)
    told = case.equalise(runner.model, runner.batch[0])
    assert told["log_density_error"] <= table.ALLOWED
    assert told["point_error"] <= table.ALLOWED
    assert told["tolerances"].keys() == {"train", "log_prob", "sample"}
    runner.model.tolerances["sample"] = 1e-2
    for mode, tolerance in runner.model.tolerances.items():
        runner.call(mode)
        assert runner.model.flow.bijection.tolerance == tolerance


def test_flow_matching_is_the_bare_loop():
    """With the floor's weights and no bound: its samples, and its loss summed over coordinates."""
    case = table.cases["flow-matching"]
    ours, floor = (
        case.builders()[who].build(**case.tiny)
        for who in (table.OURS, table.FLOOR)
    )
    ours.flow.bijection.velocity.bound = 1e6
    with torch.no_grad():
        for a, b in zip(ours.parameters(), floor.parameters(), strict=True):
            a.copy_(b)
    made = []
    for side in (ours, floor):
        torch.manual_seed(0)
        made.append(side.sample(5))
    torch.testing.assert_close(*made)
    x, dim = torch.randn(5, case.tiny["dim"]), case.tiny["dim"]
    uniform, z = ours.objective.draw(5, torch.Generator().manual_seed(0))
    t = uniform[:, :1]
    v = floor.net(torch.lerp(z, x, t), t)
    want = (v - (x - z)).square().mean()
    torch.testing.assert_close(ours.objective(x, (uniform, z)) / dim, want)


def test_a_trained_case_is_trained():
    case = table.cases["cnf-trained"]
    assert case.steps and not table.cases["cnf"].steps
    made, after = (
        run.build(case.contestants[table.OURS], case.tiny, steps=steps)
        for steps in (0, 3)
    )
    pairs = zip(made.model.parameters(), after.model.parameters())
    assert all((a != b).any() for a, b in pairs)


def test_ours_is_not_the_identity_when_timed():
    case = table.cases["rqs-coupling"]
    runner = run.build(case.contestants[table.OURS], case.tiny)
    z, ladj = runner.model.flow.bijection.inverse(*runner.batch)
    assert (z - runner.batch[0]).abs().max() > 1e-3
    assert ladj.abs().max() > 1e-3


def test_check_rejects_what_is_not_finite():
    case = table.cases["realnvp"]
    runner = run.build(case.contestants[table.OURS], case.tiny)
    with torch.no_grad():
        next(runner.model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="finite"):
        measure.check(runner, case.modes)


def test_peak_memory_of_a_known_allocation():
    n = 1 << 18

    def call():
        a = torch.empty(n)  # 1 MiB
        b = torch.empty(2 * n)  # and 2
        del a
        c = torch.empty(n // 2)  # and a half, when the first is gone
        return len(b) + len(c)

    assert measure.peak_memory(call) == 3 * 4 * n


def test_peak_memory_of_a_training_step_holds_gradients_and_activations():
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    x = torch.randn(512, 64)

    def step():
        net(x).sum().backward()

    count = sum(p.numel() for p in net.parameters())
    least = 4 * (count + 512 * 256)
    assert least <= measure.peak_memory(step) <= 3 * least


def test_rounds_are_interleaved():
    order = []
    calls = {
        name: lambda name=name: lambda: order.append(name) for name in "ab"
    }
    times = measure.interleaved(calls, rounds=3, threads=1, at_least=0)
    assert {name: len(seconds) for name, seconds in times.items()} == {
        "a": 3,
        "b": 3,
    }
    turns = "".join(
        name for name, before in zip(order, [None, *order]) if name != before
    )
    assert turns == "abababab", "once to choose numbers, then three rounds"


def test_ratios_are_taken_round_by_round():
    found = measure.ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0])
    assert found == {"ratio": 0.5, "q1": 0.5, "q3": 0.5}
    assert measure.summary([3.0, 1.0, 2.0])["median"] == 2.0


def test_the_best_peer_is_the_quickest_that_is_neither_ours_nor_the_floor():
    case = table.cases["realnvp"]
    times = {
        (who, kind, mode): [seconds] * 3
        for who, kind, seconds in [
            (table.OURS, "eager", 3.0),
            (table.OURS, "compiled", 1.0),
            (table.FLOOR, "eager", 0.5),
            ("zuko", "eager", 4.0),
            ("zuko", "compiled", 2.0),
            ("Pyro", "eager", 5.0),
        ]
        for mode in case.modes
    }
    found = run.compare(case, times)["train"]
    assert (found["eager"]["best_peer"], found["eager"]["ratio"]) == (
        "zuko",
        0.75,
    )
    assert (found["compiled"]["best_peer"], found["compiled"]["ratio"]) == (
        "zuko, compiled",
        0.5,
    )
    assert found["eager"]["best_peer_over_floor"] == 8
    assert found["eager"]["met"] and found["compiled"]["met"] is None


def complete(record):
    """Whether the page finds what it draws."""
    assert record["quick"] is False, "a record of tiny sizes says nothing"
    assert (
        record["threads"] > 0
        and record["rounds"] > 0
        and record["date"]
        and record["machine"]
    )
    assert {"torch", "flowcourse", "nflows", "normflows", "zuko"} <= record[
        "versions"
    ].keys()
    if "rows" in record:
        assert record["rows"].keys() == overheads.overheads.keys()
        for row in record["rows"].values():
            assert (
                0 < row["ours"]["median"] and 0 < row["bare_seconds"]["median"]
            )
            assert row["q1"] <= row["value"] <= row["q3"]
            assert row["met"] == (row["value"] <= row["target"])
        return
    if "axes" in record:
        for points in record["axes"].values():
            for point in points:
                assert all(
                    row["median"] > 0 for row in point["contestants"].values()
                )
        return
    assert record["contestants"].keys() >= {table.FLOOR}
    for who in record["contestants"].values():
        assert who["parameters"] > 0 and who["peak_bytes"] > 0
        for mode in record["modes"]:
            row = who["eager"][mode]
            assert 0 < row["q1"] <= row["median"] <= row["q3"]
            assert len(row["rounds"]) == record["rounds"]
            row = who["compiled"].get(mode)
            assert row is None or "failed" in row or row["median"] > 0
    for mode in record["modes"]:
        row = record["ratios"][mode]["eager"]
        assert (
            row["best_peer"] in record["contestants"]
            and row["best_peer_over_floor"] > 0
        )
        assert ("ratio" in row) == (table.OURS in record["contestants"])


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_are_complete(path):
    record = json.loads(path.read_text())
    assert record["case"] in {*table.cases, "overheads"}
    complete(record)


def test_a_case_without_densities_is_recorded(monkeypatch):
    case = table.cases["flow-matching"]
    stand_in = table.Contestant(table.BareMatching, package="flowcourse")
    entrants = {table.OURS: case.contestants[table.OURS], "stand-in": stand_in}
    monkeypatch.setattr(case, "contestants", entrants)
    options = run.arguments(["flow-matching", "--quick", "--threads", "1"])
    record = run.run_case("flow-matching", options)
    complete(record | {"quick": False})
    assert record["ratios"].keys() == {"train", "sample"}


def test_a_new_record_is_complete(tmp_path, monkeypatch):
    """Our side against a stand-in for a peer, so that no other library is needed."""
    case = table.cases["maf"]
    stand_in = table.Contestant(table.maf_ours, package="flowcourse")
    entrants = {table.OURS: case.contestants[table.OURS], "stand-in": stand_in}
    monkeypatch.setattr(case, "contestants", entrants)
    options = run.arguments(
        ["maf", "--quick", "--threads", "1", "--out", str(tmp_path)]
    )
    run.write(run.run_case("maf", options), tmp_path / "maf.json")
    run.write(run.run_curves("maf", options), tmp_path / "maf.curves.json")
    run.write(run.run_overheads(options), tmp_path / "overheads.json")
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["quick"] is True
        complete(record | {"quick": False})


def test_the_heads_alone_make_the_parameters_and_nothing_else():
    """What the planar stack is measured against has all of its parameters, and gives them gradients."""
    torch.manual_seed(0)
    stack = overheads.HeadsAlone(3, 4, context_dim=5, hidden=())
    z, features = torch.randn(6, 3), torch.randn(6, 5)
    same, total = stack(z, features)
    assert torch.equal(same, z)
    total.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in stack.parameters())


@pytest.mark.parametrize("name", overheads.overheads)
def test_both_sides_of_an_overhead_run(name):
    for call in overheads.overheads[name].calls(True):
        call()


def test_a_floor_that_compiles_is_the_floor_of_compiled_times():
    case = table.cases["realnvp"]
    seconds = {table.OURS: 3.0, table.FLOOR: 1.0, "zuko": 2.0}
    times = {
        (who, kind, mode): [t / (2 if kind == "compiled" else 1)]
        for who, t in seconds.items()
        for kind in ("eager", "compiled")
        for mode in case.modes
    }
    found = run.compare(case, times)["train"]
    assert found["eager"]["best_peer_over_floor"] == 2
    assert found["compiled"]["best_peer_over_floor"] == 2


class Steady:
    """A side whose calls take a given time, the first rounds disturbed."""

    def __init__(self, seconds, disturbed=0):
        self.seconds, self.disturbed, self.calls = seconds, disturbed, 0

    def time(self, name, mode, number):
        self.calls += 1
        return self.seconds * (10 if self.calls <= self.disturbed else 1)


def test_an_earlier_commit_is_compared_by_the_median_ratio():
    old, new = Steady(0.02), Steady(0.03, disturbed=4)
    middle, low, high, seconds = compare(old, new, "any", "train", rounds=15)
    assert middle == low == pytest.approx(1.5) and high >= middle
    assert seconds == pytest.approx(0.03)


def test_this_commit_beside_the_working_tree(tmp_path):
    """Both trees run in turn, and too high a ratio is an error."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [sys.executable, "benchmarks/against.py", "HEAD", "realnvp"]
    run = subprocess.run(
        [*command, "--rounds", "2", "--most", "0.001"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "slower than 0.001:" in run.stdout
    for mode in ("train", "log_prob", "sample"):
        assert f"realnvp {mode}" in run.stdout
