"""Studies run, stop, go on, share their jobs among processes, and record each job once."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pyro.poutine import condition, trace

from flowcourse import studies
from flowcourse.checkpoint import load_checkpoint
from flowcourse.cli import main
from flowcourse.studies import (
    SideBySide,
    Study,
    load_study,
    read_records,
    run_study,
    train_and_judge,
)
from flowcourse.trainer import TrainingDiverged
from flowcourse.variational import assess

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["board", "depth", "digits", "dlgm", "families", "guides", "images"]
NAMES += ["maps", "matching", "shower", "variational"]


def study_of(path, run, *jobs):
    """A study of a function."""
    return Study("x", path / "x.py", list(jobs), run)


def quietly(study, out):
    return run_study(study, out, progress=False)


def test_what_is_done_is_skipped(tmp_path):
    done = []

    def run(folder, a):
        done.append(a)
        return {"results": {"twice": 2 * a}}

    out = tmp_path / "deep" / "x.jsonl"
    two = study_of(tmp_path, run, {"a": 1}, {"a": 2})
    assert quietly(two, out) == {"recorded": 2, "failed": 0, "elsewhere": 0}
    assert quietly(two, out)["recorded"] == 2 and done == [1, 2]
    # a job that is added is run, whatever the order of the list
    three = study_of(tmp_path, run, {"a": 3}, {"a": 1}, {"a": 2})
    assert quietly(three, out)["recorded"] == 3 and done == [1, 2, 3]
    assert [r["job"]["a"] for r in read_records(out)] == [1, 2, 3]
    assert [r["results"]["twice"] for r in read_records(out)] == [2, 4, 6]
    # nothing is left but the records
    assert [path.name for path in out.parent.iterdir()] == ["x.jsonl"]


def test_a_record_says_where_it_is_from(tmp_path):
    out = tmp_path / "x.jsonl"
    study = study_of(tmp_path, lambda folder, a: {"found": a}, {"a": 1})
    run_study(study, out, "flowcourse study x", progress=False)
    (record,) = read_records(out)
    keys = "job seconds found commit dirty versions machine date command"
    assert list(record) == keys.split()
    assert record["command"] == "flowcourse study x"


def test_what_a_run_says_of_its_seconds_is_kept(tmp_path):
    out = tmp_path / "x.jsonl"
    quietly(study_of(tmp_path, lambda folder: {"seconds": 7}, {}), out)
    assert read_records(out)[0]["seconds"] == 7


def test_draws_follow_from_the_job(tmp_path):
    def run(folder, a):
        return {"drawn": torch.rand(()).item()}

    jobs = [{"a": 1}, {"a": 2}]
    drawn = []
    for name, order in (("up", jobs), ("down", jobs[::-1])):
        out = tmp_path / f"{name}.jsonl"
        quietly(study_of(tmp_path, run, *order), out)
        drawn.append({r["job"]["a"]: r["drawn"] for r in read_records(out)})
    assert drawn[0] == drawn[1] and drawn[0][1] != drawn[0][2]


def test_a_training_that_diverges_is_a_result(tmp_path):
    def run(folder):
        raise TrainingDiverged("step 3: the loss is nan", None)

    out = tmp_path / "x.jsonl"
    assert quietly(study_of(tmp_path, run, {}), out)["recorded"] == 1
    assert read_records(out)[0]["diverged"] == "step 3: the loss is nan"


def test_a_job_that_fails_is_told_and_tried_again(tmp_path, capsys):
    broken = [True]

    def run(folder, a):
        if a == 1 and broken[0]:
            raise RuntimeError("no such thing")
        return {}

    study, out = (
        study_of(tmp_path, run, {"a": 1}, {"a": 2}),
        tmp_path / "x.jsonl",
    )
    assert quietly(study, out) == {"recorded": 1, "failed": 1, "elsewhere": 0}
    error = capsys.readouterr().err
    assert "{'a': 1} failed:" in error and "no such thing" in error
    broken[0] = False
    assert quietly(study, out) == {"recorded": 2, "failed": 0, "elsewhere": 0}


def test_a_job_that_another_process_has_is_left_to_it(tmp_path):
    """While a job is done, a second call of the same study does the other one."""
    out, found = tmp_path / "x.jsonl", []

    def other(folder, a):
        return {"by": "the second"}

    def run(folder, a):
        found.append(quietly(study_of(tmp_path, other, *jobs), out))
        return {"by": "the first"}

    jobs = [{"a": 1}, {"a": 2}]
    assert quietly(study_of(tmp_path, run, *jobs), out)["recorded"] == 2
    assert found == [{"recorded": 1, "failed": 0, "elsewhere": 1}]
    by = {r["job"]["a"]: r["by"] for r in read_records(out)}
    assert by == {1: "the first", 2: "the second"}


def test_a_crash_while_writing_loses_no_record(tmp_path, monkeypatch):
    out = tmp_path / "x.jsonl"
    out.write_text('{"job": {"a": 1}}')  # by hand, without an end of line
    study = study_of(tmp_path, lambda folder, a: {}, {"a": 1}, {"a": 2})

    def crash(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert quietly(study, out)["failed"] == 1
    assert out.read_text() == '{"job": {"a": 1}}'
    assert quietly(study, out)["recorded"] == 2
    assert [r["job"]["a"] for r in read_records(out)] == [1, 2]


@pytest.mark.parametrize("line", ["{", "[]", '{"a": 1}', "3"])
def test_a_file_of_something_else_is_refused(line, tmp_path):
    out = tmp_path / "x.jsonl"
    out.write_text(f'{{"job": {{}}}}\n{line}\n')
    with pytest.raises(ValueError, match="out: expected a record .* in line 2"):
        quietly(study_of(tmp_path, lambda folder: {}, {}), out)
    assert out.read_text().endswith(f"{line}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no jobs"),
        ("jobs = [{}]", "defines no run"),
        ("jobs = [{}]; run = 3", "expected a function run"),
        ("jobs = []; run = print", "expected a list of dictionaries"),
        ("jobs = [3]; run = print", "expected a list of dictionaries"),
        ("jobs = [{'a': 1}, {'a': 1}]; run = print", "has the job .* twice"),
        ("jobs = [{'a': print}]; run = print", "cannot be written"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text, message, tmp_path):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ValueError, match=f"study: .*{message}"):
        load_study(str(tmp_path / "x.py"))


def test_a_study_has_a_name_or_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a name in studies/, or the path"):
        load_study("x")
    Path("studies").mkdir()
    Path("studies/x.py").write_text("jobs = [{}]\ndef run(folder): return {}")
    assert load_study("x").name == "x"
    assert load_study(str(tmp_path / "studies/x.py")).jobs == [{}]
    with pytest.raises(ValueError, match="expected one of x, or the path"):
        load_study("y")


TRAINING = """
from flowcourse.configs import configs
from flowcourse.studies import train_and_judge

jobs = [{"seed": 0}, {"seed": 1}]

def run(folder, seed):
    config = configs["realnvp.faithful"].replace(
        seed=seed, steps=120, layers=2, hidden=(8,), checkpoint_every=20
    )
    return train_and_judge(config, folder)
"""


def test_ctrl_c_loses_nothing_of_a_training(tmp_path, capsys):
    """The run that was stopped and goes on finds what the whole one finds."""
    (tmp_path / "x.py").write_text(TRAINING)
    out, over = tmp_path / "broken.jsonl", threading.Event()
    words = ["study", str(tmp_path / "x.py"), "--out", str(out)]

    def kept():
        return list(tmp_path.glob(".broken/*/checkpoint.pt"))

    def press():
        while not (over.wait(0.01) or kept()):
            pass
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    try:
        status = main(words)
    finally:
        over.set()
        finger.join()
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert status == 130
    assert last.startswith("flowcourse: stopped with ")
    assert last.endswith("; the same command goes on")
    assert kept()
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"2 of 2 jobs are recorded in {out}"
    quietly(load_study(words[1]), tmp_path / "whole.jsonl")
    broken, whole = (
        {r["job"]["seed"]: r["results"] for r in read_records(tmp_path / name)}
        for name in ("broken.jsonl", "whole.jsonl")
    )
    assert broken == whole


def test_processes_share_a_study(tmp_path):
    (tmp_path / "x.py").write_text("""
import os
import time

jobs = [{"a": a} for a in range(8)]

def run(folder, a):
    time.sleep(0.2)
    return {"by": os.getpid()}
""")
    out = tmp_path / "x.jsonl"
    words = ["study", str(tmp_path / "x.py"), "--out", str(out)]
    command = [sys.executable, "-m", "flowcourse", *words]
    other = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not out.exists():
        assert other.poll() is None
        time.sleep(0.01)
    assert main(words) == 0
    assert other.wait(timeout=120) == 0
    assert main(words) == 0  # what the other was at when one was through
    records = read_records(out)
    assert sorted(record["job"]["a"] for record in records) == list(range(8))
    assert {record["by"] for record in records} == {other.pid, os.getpid()}


def test_the_command_says_what_failed(tmp_path, capsys):
    (tmp_path / "x.py").write_text("jobs = [{}]\ndef run(folder): return 1 / 0")
    out = tmp_path / "x.jsonl"
    assert main(["study", str(tmp_path / "x.py"), "--out", str(out)]) == 1
    told = capsys.readouterr().out
    assert told == f"0 of 1 jobs are recorded in {out}, 1 failed\n"


def small(name):
    """A study of the repository whose jobs take seconds."""
    path = ROOT / "studies" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "digits":
        module.CONFIG = module.CONFIG.replace(steps=10)
        jobs = [job for job in module.jobs if job["change"] == "four layers"][
            :1
        ]
        jobs += [module.jobs[0]]
    elif name == "dlgm":
        few = {"steps": 4, "validate_every": 4, "held_out": 100, "judged": 10}
        module.CONFIG = module.CONFIG.replace(**few)
        jobs = module.jobs[1:2]
    elif name == "board":
        module.RECIPE["steps"] = 4
        jobs = module.jobs[:2]
    elif name == "guides":
        module.CHAINS, module.WARM_UP, module.KEPT = 2, 5, 5
        module.STEPS, module.DRAWS, module.PART = 20, 60, 30
        module.PAIRS = 5
        first = {job["method"]: job for job in module.jobs[::-1]}
        jobs = [*first.values(), module.jobs[-1]]
    elif name == "images":
        module.SECONDS = 0.1
        jobs = module.jobs[: len(module.FAMILIES)]
    elif name == "matching":
        module.SECONDS = dict.fromkeys(module.SECONDS, 0.1)
        module.POINTS = dict.fromkeys(module.POINTS, 100)
        first = {job["family"]: job for job in module.jobs[::-1]}
        jobs = list(first.values())
    elif name == "shower":
        module.SECONDS, module.STEPS, module.EARLY = 0.1, 60, 20
        module.ABLE = module.NARROW = replace(module.ABLE, epochs=1)
        module.BATCHES, train = (1, 10), module.train
        few = {"rows": 600, "held_out": 300}
        module.ShowerConfig = partial(module.ShowerConfig, **few)
        module.train = lambda *args, steps, **rest: train(
            *args, steps=60, **rest
        )
        timed = module.for_a_time
        module.for_a_time = lambda *args, seconds: timed(*args, seconds=0.1)
        first = {
            (job["model"], job.get("representation")): job
            for job in module.jobs[::-1]
        }
        jobs = list(first.values())
    else:
        module.SECONDS = 0.1
        jobs = [module.jobs[0], module.jobs[-1]]
    if name == "families":
        for_long = module.train_for
        module.train_for = lambda *args, seconds, **options: for_long(
            *args, seconds=0.1, **options
        )
    if name == "variational":
        module.RECIPE["steps"] = module.FAMILY_STEPS = 4
        module.assess = lambda flow, log_prob, n, **options: assess(
            flow, log_prob, n // 100, **options
        )
    return Study(name, path, jobs, module.run)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_of_each_study_finds_what_its_record_has(name, tmp_path):
    study, out = small(name), tmp_path / f"{name}.jsonl"
    assert quietly(study, out)["recorded"] == len(study.jobs)
    recorded = read_records(ROOT / "results" / out.name)
    of_job = {json.dumps(r["job"], sort_keys=True): r for r in recorded}
    for new in read_records(out):
        old = of_job[json.dumps(new["job"], sort_keys=True)]
        assert set(new) == set(old) | {"commit", "dirty", "versions"}
        assert type(new["results"]) is type(old["results"])


def guides_record():
    """The records of the study of guides, by posterior and method; several seeds of a guide."""
    found = {}
    for record in read_records(ROOT / "results" / "guides.jsonl"):
        job = record["job"]
        found.setdefault((job["posterior"], job["method"]), []).append(record)
    return found


def test_the_flow_is_the_best_guide_of_the_funnel():
    """By more than two standard errors of fresh draws, in each seed."""
    found, centred = guides_record(), "eight schools, centred"
    of = {
        method: [
            (r["results"]["ELBO [nat]"], r["results"]["standard error [nat]"])
            for r in found[centred, method]
        ]
        for method in ("mean field", "full rank", "flow")
    }
    assert all(len(seeds) == 3 for seeds in of.values())
    for method in ("mean field", "full rank"):
        for (flow, error), (other, its) in zip(of["flow"], of[method]):
            assert flow - other > 2 * math.hypot(error, its)


def test_marginals_of_the_flow_are_those_of_the_chains():
    """The mean distance of quantiles, in deviations of the chains."""
    found = guides_record()
    for posterior, chains in (
        ("eight schools, centred", "eight schools"),
        ("eight schools", "eight schools"),
        ("logistic regression", "logistic regression"),
    ):
        (reference,) = found[chains, "NUTS"]
        assert max(reference["results"]["R-hat"]) < 1.02
        wanted, sd = (
            torch.tensor(reference["marginals"][key])
            for key in ("quantiles", "sd")
        )
        for record in found[posterior, "flow"]:
            mine = torch.tensor(record["marginals"]["quantiles"])
            off = (mine - wanted).abs().mean(1) / sd
            if "centred" in posterior:  # it leaves out the funnel's neck
                assert off[1] < 0.3
                off[1] = 0
            assert off.max() < 0.1


def test_the_study_of_guides_weighs_and_counts_as_it_says():
    module = small("guides").run.__globals__
    y, sigma = module["POSTERIORS"]["eight schools"][1]()
    mu, tau, eta = y[0] / 7, y[1] / 3, y / 20
    log_p = []
    for name, own in (
        ("schools", {"eta": eta}),
        ("schools_centred", {"theta": mu + tau * eta}),
    ):
        latents = {"mu": mu, "tau": tau} | own
        model = condition(module[name], latents)
        log_p.append(trace(model).get_trace(y, sigma).log_prob_sum())
        rows = {k: v.expand(4, *v.shape) for k, v in latents.items()}
        found = module["coordinates"](rows)
        wanted = torch.cat([mu[None], tau.log()[None], mu + tau * eta])
        torch.testing.assert_close(found, wanted.expand(4, 10))
    # the two forms are one model, in other coordinates
    torch.testing.assert_close(log_p[0] - 8 * tau.log(), log_p[1])
    x, labels = module["tumours"]()
    assert x.shape == (569, 31) and labels.sum() == 357
    w = torch.linspace(-1, 1, 31, dtype=torch.float64)
    logits = x @ w
    by_hand = (labels * logits - torch.log1p(logits.exp())).sum()
    by_hand = by_hand - (w.square() / 2 + math.log(2 * math.pi) / 2).sum()
    model = condition(module["logistic"], {"weights": w})
    found = trace(model).get_trace(x, labels).log_prob_sum()
    torch.testing.assert_close(found, by_hand)
    draws = torch.arange(101.0, dtype=torch.float64)[:, None]
    kept = module["marginals"](["a"], draws)
    assert kept["mean"] == [50.0] and kept["quantiles"][0][0] == 2.0
    assert kept["quantiles"][0][12] == 50.0


def test_a_training_is_kept_until_its_job_is_recorded(tmp_path, monkeypatch):
    """The study of matching goes on from what a broken judge left, and finds the same."""
    study, out = small("matching"), tmp_path / "matching.jsonl"
    module = study.run.__globals__
    wanted = {"family": "matching, independent"}
    jobs = [job for job in study.jobs if job.items() >= wanted.items()]
    one = Study(study.name, study.path, jobs, study.run)

    def broken(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setitem(module, "far", broken)
        assert quietly(one, out)["failed"] == 1
    (kept,) = tmp_path.glob(".matching/*/trained.pt")
    weights = load_checkpoint(kept)["weights"]
    with monkeypatch.context() as patch:
        patch.setitem(module, "fit_for_seconds", broken)
        seen = []
        patch.setitem(module, "judge", lambda flow, *_: seen.append(flow) or {})
        assert quietly(one, out)["recorded"] == 1
    trained = seen[0].state_dict()
    assert trained.keys() == {n.removeprefix("flow.") for n in weights}
    for name, value in trained.items():
        assert torch.equal(value, weights[f"flow.{name}"])


@pytest.mark.parametrize("name", NAMES)
def test_the_records_of_the_repository_are_those_of_its_studies(name):
    study = load_study(str(ROOT / "studies" / f"{name}.py"))
    done = studies._done(ROOT / "results" / f"{name}.jsonl")
    assert done == set(map(studies._key, study.jobs))


def test_models_side_by_side_are_each_by_itself():
    losses = []

    class Quadratic(torch.nn.Module):
        def __init__(self, at):
            super().__init__()
            self.x = torch.nn.Parameter(torch.tensor(0.0))
            self.register_buffer("at", torch.tensor(at))

        def forward(self, batch):
            return (self.x - self.at * batch.mean()).square()

    models = [Quadratic(1.0), Quadratic(2.0)]
    together = SideBySide(models)
    batch = torch.ones(4, 2)
    optimizer = torch.optim.SGD(together.parameters(), lr=0.25)
    for _ in range(30):
        optimizer.zero_grad()
        loss = together(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.0)
    together.unstack(models)
    found = [model.x.item() for model in models]
    assert found == pytest.approx([1.0, 2.0], abs=1e-4)
    together.eval()
    assert not together.training and not together.template[0].training


@pytest.mark.parametrize("kind", ["coupling", "autoregressive", "affine"])
def test_flows_with_random_masks_are_stacked(kind):
    """The four masks begin with what passes through and with what moves."""
    from flowcourse.configs_flows import FlowConfig

    of_kind = {"kind": "coupling"} if kind == "affine" else {"kind": kind}
    if kind != "affine":
        of_kind["scalar_map"] = "rational-quadratic-spline"
    config = FlowConfig(
        data="breast-cancer", partition="random", hidden=(8,), **of_kind
    )
    several = [
        config.replace(seed=seed).objective().double().eval()
        for seed in range(4)
    ]
    if "coupling" in of_kind.values():
        masks = [next(m for _, m in one.named_buffers()) for one in several]
        assert {bool(mask[0]) for mask in masks} == {True, False}
    draw = torch.Generator().manual_seed(0)
    for one in several:
        for p in one.parameters():
            with torch.no_grad():
                p.normal_(0, 0.2, generator=draw)
    x = torch.randn(16, 4, 30, generator=draw, dtype=torch.float64)
    alone = torch.stack([one(x[:, i]) for i, one in enumerate(several)])
    together = SideBySide(several).eval().each(x)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_stacked_is_refused():
    from flowcourse.core import Flow
    from flowcourse.coupling import Couplings, half
    from flowcourse.objectives import MaximumLikelihood

    partitions = half, lambda dim: ~half(dim)
    several = [
        MaximumLikelihood(Flow(Couplings(6, partition=partition)))
        for partition in partitions
    ]
    with pytest.raises(ValueError, match="kept_first True and False"):
        SideBySide(several)


def test_a_time_is_kept_by_what_gets_slower():
    """The first thirty steps cost a millisecond each, the later ones four."""
    import time

    from flowcourse.objectives import Objective
    from flowcourse.recipe import Recipe

    class Tiring(Objective):
        def __init__(self):
            super().__init__()
            self.x, self.calls = torch.nn.Parameter(torch.zeros(())), 0

        def forward(self, batch, noise=None):
            self.calls += self.training
            until = time.process_time() + (0.001 if self.calls < 30 else 0.004)
            while time.process_time() < until:
                pass
            return (self.x - batch.mean()).square()

    rows = torch.ones(8, 1)
    recipe = Recipe(batch_size=8)
    _, found = studies.fit_for_seconds(Tiring, 1.0, rows, rows, recipe)
    assert found["steps"] < 500  # the speed of the first gives nearly 1,000
    assert found["seconds"] < 2.0


def test_a_config_is_trained_and_judged(tmp_path):
    from flowcourse.configs import configs

    config = configs["realnvp.faithful"].replace(
        steps=20, layers=2, hidden=(8,), validate_every=10
    )
    found = train_and_judge(config, tmp_path)
    assert list(found) == [
        "results",
        "steps",
        "best step",
        "seconds",
        "parameters",
    ]
    assert found["steps"] == 20 and found["best step"] in (10, 20)
    objective = config.objective()
    assert found["parameters"] == sum(p.numel() for p in objective.parameters())
    untrained = config.evaluate(objective.eval())
    key = "test log-likelihood [nat]"
    assert found["results"][key] > untrained[key]
    # it goes on from what it kept: no step is done twice
    assert train_and_judge(config, tmp_path) == found


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch):
    import filelock

    def refuse(lock, timeout):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with (
        pytest.warns(UserWarning, match="cannot be locked here"),
        studies._claimed(tmp_path / "job.lock") as ours,
    ):
        assert ours
