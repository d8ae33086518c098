"""Studies on a Dask cluster of two worker processes: the same records, each once, whatever is lost or stopped."""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed import Client, LocalCluster

from flowcourse import cluster as module
from flowcourse import studies
from flowcourse.cli import main
from flowcourse.cluster import completed, connected
from flowcourse.studies import load_study, read_records, run_study

QUIET = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
# how often a job is begun shows in the files that it leaves
STUDY = """
import os, time
from pathlib import Path

import torch

here, KIND = Path({here!r}), {kind!r}
jobs = [{{"a": a}} for a in range({n})]


def begin(a):
    (here / f"{{a}} {{time.time_ns()}}").write_text(str(os.getpid()))
    return len(list(here.glob(f"{{a}} *")))


def run(folder, a):
    times = begin(a)
    (folder / "seen").touch()
    if KIND == "killed" and a == 1 and times == 1:
        time.sleep(120)  # until it is killed
    if KIND == "stopped" and a > 0:
        while not (here / "go").exists():
            time.sleep(0.02)
    if KIND == "failing" and a == 1 and not (here / "go").exists():
        raise RuntimeError("no such thing")
    threads = torch.get_num_threads()
    found = {{"drawn": torch.rand(()).item(), "pid": os.getpid()}}
    return found | {{"threads": threads, "folder": str(folder)}}
"""


@pytest.fixture(scope="module")
def two():
    """The address of two workers in processes of their own, each with one thread."""
    with LocalCluster(n_workers=2, threads_per_worker=1, **QUIET) as cluster:
        yield cluster.scheduler_address


def study(folder, kind, n=4):
    """The path of a study, which needs no file on the workers."""
    here = folder / "begun"
    here.mkdir()
    path = folder / "x.py"
    path.write_text(STUDY.format(here=str(here), kind=kind, n=n))
    return path, here


def begun(here, a="*"):
    """When jobs were begun, and by which process."""
    return sorted(here.glob(f"{a} *"))


def wait_for(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_records_are_those_of_one_process(two, tmp_path, capsys):
    path, here = study(tmp_path, "plain")
    out, alone = tmp_path / "x.jsonl", tmp_path / "alone" / "x.jsonl"
    words = ["study", str(path), "--out", str(out), "--dask", two]
    torch.set_num_threads(2)  # here, which is not where the work is done
    assert main(words) == 0
    told = capsys.readouterr().out
    assert told == f"4 of 4 jobs are recorded in {out}\n"
    assert main(words) == 0 and len(begun(here)) == 4  # nothing is done twice
    run_study(load_study(str(path)), alone, progress=False)
    found, wanted = (
        {record["job"]["a"]: record for record in read_records(file)}
        for file in (out, alone)
    )
    assert found.keys() == wanted.keys() == {0, 1, 2, 3}
    for a, record in found.items():
        assert [*record] == [*wanted[a]]
        for key in ("job", "drawn", "commit", "dirty", "versions"):
            assert record[key] == wanted[a][key], key
        # in the folder of the records, where a checkpoint would be found again
        assert Path(record["folder"]).parent == tmp_path / ".x"
        assert record["threads"] == 1
        assert record["machine"].endswith(", 1 thread")
        assert record["command"] == f"flowcourse {' '.join(words)}"
        assert record["pid"] != os.getpid() == wanted[a]["pid"]
        assert wanted[a]["machine"].endswith(", 2 threads")
    # nothing is left beside the records
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"x.py", "x.jsonl", "alone", "begun"}
    assert [file.name for file in alone.parent.iterdir()] == ["x.jsonl"]


def test_ctrl_c_cancels_what_has_not_begun(two, tmp_path, capsys):
    path, here = study(tmp_path, "stopped", n=8)
    out = tmp_path / "x.jsonl"
    words = ["study", str(path), "--out", str(out), "--dask", two]

    def press():
        wait_for(lambda: out.exists() and len(begun(here)) == 3)
        os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    status = main(words)
    finger.join()
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert status == 130 and last == (
        f"flowcourse: stopped with 1 of 8 jobs recorded in {out}; "
        "the same command goes on"
    )
    # the scheduler knows no job but those that the workers are at
    with Client(two, set_as_default=False) as client:
        wait_for(lambda: sum(map(len, client.processing().values())) <= 2)
        (here / "go").touch()
        wait_for(lambda: not sum(map(len, client.processing().values())))
    assert len(begun(here)) == 3
    assert len(read_records(out)) == 1
    assert main(words) == 0
    jobs = [record["job"]["a"] for record in read_records(out)]
    assert sorted(jobs) == list(range(8)) and jobs[0] == 0
    assert len(begun(here, 0)) == 1
    assert capsys.readouterr().out.startswith("8 of 8 jobs are recorded")


def test_a_job_waits_for_the_worker_that_is_still_at_it(two, tmp_path):
    """Two calls of one study, the first of them stopped, never work in one folder at a time."""
    path, here = study(tmp_path, "stopped", n=2)
    out = tmp_path / "x.jsonl"
    words = ["study", str(path), "--out", str(out), "--dask", two]

    def press():
        wait_for(lambda: out.exists() and len(begun(here)) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    assert main(words) == 130
    finger.join()
    # job 1 goes on where nobody listens; its lock is held by that worker
    second = threading.Thread(
        target=run_study, args=(load_study(str(path)), out, "", False, two)
    )
    second.start()
    time.sleep(1)
    assert len(begun(here, 1)) == 1
    (here / "go").touch()
    second.join()
    assert len(begun(here, 1)) == 2
    assert [r["job"]["a"] for r in read_records(out)] == [0, 1]


def test_a_job_that_fails_is_told_and_tried_again(two, tmp_path, capsys):
    path, here = study(tmp_path, "failing")
    out = tmp_path / "x.jsonl"
    words = ["study", str(path), "--out", str(out), "--dask", two]
    assert main(words) == 1
    told = capsys.readouterr()
    assert told.out == f"3 of 4 jobs are recorded in {out}, 1 failed\n"
    assert "{'a': 1} failed:" in told.err
    assert "RuntimeError: no such thing" in told.err
    # where it happened, in the study's file on the worker
    assert 'x.py", line' in told.err
    (here / "go").touch()
    assert main(words) == 0
    assert len(begun(here, 1)) == 2 and len(begun(here)) == 5


def test_jobs_that_another_process_has_are_left_to_it(two, tmp_path):
    path, here = study(tmp_path, "plain")
    out, found = tmp_path / "x.jsonl", []
    whole = load_study(str(path))

    def run(folder, a):
        found.append(run_study(whole, out, progress=False, dask=two))
        return {}

    first = whole.jobs[:1]
    mine = type(whole)("x", path, first, run)
    assert run_study(mine, out, progress=False)["recorded"] == 1
    assert found == [{"recorded": 3, "failed": 0, "elsewhere": 1}]
    assert not begun(here, 0) and len(begun(here)) == 3


def test_a_folder_that_workers_do_not_see_is_done_without(
    two, tmp_path, monkeypatch
):
    """As if on another machine: what they look for is not there."""
    path, here = study(tmp_path, "plain", n=2)
    out = tmp_path / "x.jsonl"
    seen = []
    real = Path.write_text

    def unseen(self, text, *args, **options):
        if self.name == ".gitignore":
            seen.append(self)
            return 0
        return real(self, text, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", unseen)
        found = run_study(load_study(str(path)), out, progress=False, dask=two)
    assert found["recorded"] == 2 and seen
    for record in read_records(out):
        assert not Path(record["folder"]).is_relative_to(tmp_path)
        assert not Path(record["folder"]).exists()  # it went with the job
    assert len(begun(here)) == 2


def test_a_training_goes_to_a_worker(two, tmp_path):
    path = tmp_path / "x.py"
    path.write_text("""
from flowcourse.configs import configs
from flowcourse.studies import train_and_judge

jobs = [{"seed": 3}]

def run(folder, seed):
    config = configs["realnvp.faithful"].replace(
        seed=seed, steps=20, layers=2, hidden=(8,), validate_every=10
    )
    return train_and_judge(config, folder)
""")
    found = []
    for dask in (two, None):
        out = tmp_path / f"{len(found)}.jsonl"
        run_study(load_study(str(path)), out, progress=False, dask=dask)
        found += read_records(out)
    there, here = (record["results"] for record in found)
    assert there == here


def test_jobs_recorded_meanwhile_are_not_done_again(two, tmp_path, monkeypatch):
    path, here = study(tmp_path, "plain", n=3)
    out, whole = tmp_path / "x.jsonl", load_study(str(path))
    two_jobs = type(whole)("x", path, whole.jobs[:2], whole.run)
    run_study(two_jobs, out, progress=False)
    done, looks = studies._done, []

    def late(path):
        looks.append(path)
        return done(path) if len(looks) > 1 else set()

    monkeypatch.setattr(studies, "_done", late)
    assert run_study(whole, out, progress=False, dask=two)["recorded"] == 3
    assert len(begun(here)) == 3 and len(read_records(out)) == 3


def test_calls_that_nobody_listens_to_are_cancelled():
    """The client goes on, and the calls that have not begun are none of its worker's."""
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
    with (
        LocalCluster(**options, **QUIET) as cluster,
        connected(cluster.scheduler_address) as client,
    ):
        results = completed(client, time.sleep, [(0.2,)] * 50)
        next(results)
        results.close()
        wait_for(lambda: len(cluster.scheduler.tasks) <= 1, 5)


# --- the last to use both workers, as a new one needs seconds for its imports ---


def test_jobs_of_a_killed_worker_are_done_by_others(two, tmp_path):
    path, here = study(tmp_path, "killed", n=6)
    out = tmp_path / "x.jsonl"

    def kill():
        (first,) = wait_for(lambda: begun(here, 1))
        pid = int(wait_for(first.read_text))
        assert pid != os.getpid()
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = run_study(load_study(str(path)), out, progress=False, dask=two)
    killer.join()
    assert found == {"recorded": 6, "failed": 0, "elsewhere": 0}
    records = read_records(out)
    assert sorted(r["job"]["a"] for r in records) == list(range(6))
    lost, again = (int(file.read_text()) for file in begun(here, 1))
    by = {r["job"]["a"]: r["pid"] for r in records}
    assert by[1] == again != lost
    # what had been recorded was not done again, and draws are the job's own
    alone = tmp_path / "alone.jsonl"
    run_study(load_study(str(path)), alone, progress=False)
    drawn, wanted = (
        {r["job"]["a"]: r["drawn"] for r in read_records(file)}
        for file in (out, alone)
    )
    assert drawn == wanted


def test_one_call_at_a_time_runs_in_a_process():
    """A worker of three threads: calls take turns, each with three of torch's threads."""

    def call(k):
        import torch

        start = time.monotonic()
        time.sleep(0.05)
        return start, time.monotonic(), torch.get_num_threads()

    options = {"processes": False, "n_workers": 1, "threads_per_worker": 3}
    with (
        LocalCluster(**options, **QUIET) as cluster,
        connected(cluster.scheduler_address) as client,
    ):
        calls = [(k,) for k in range(6)]
        found = {k: give() for k, give in completed(client, call, calls)}
    assert [*sorted(found)] == [*range(6)]
    assert {threads for _, _, threads in found.values()} == {3}
    times = sorted((start, end) for start, end, _ in found.values())
    assert all(first[1] <= then[0] for first, then in zip(times, times[1:]))


class Server(threading.Thread):
    """Takes connections, and says something or nothing."""

    def __init__(self, says):
        super().__init__(daemon=True)
        self.says, self.taken = says, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp://127.0.0.1:{}".format(
            *self.socket.getsockname()[1:]
        )
        self.start()

    def run(self):
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                self.taken.append(self.socket.accept()[0])
                self.taken[-1].sendall(self.says)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("digits", None),
        ("", None),
        ("tcp://127.0.0.1", None),
        ("xyz://127.0.0.1:1", None),
        ("nobody", None),
        ("server", b""),
        ("server", b"HTTP/1.0 400 Bad Request\r\n\r\n"),
    ],
)
def test_an_address_that_does_not_answer_is_told(
    address, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    server = Server(says or b"")
    if address in ("nobody", "server"):
        address, kind = server.address, address
        if kind == "nobody":
            server.socket.close()
    (tmp_path / "x.py").write_text("jobs = [{}]\ndef run(folder): return {}")
    words = ["study", str(tmp_path / "x.py"), "--dask", address]
    start = time.monotonic()
    assert main([*words, "--out", str(tmp_path / "new" / "x.jsonl")]) == 2
    assert time.monotonic() - start < 60
    error = capsys.readouterr().err
    server.socket.close()
    told = (
        "flowcourse: --dask: expected the address of a scheduler that answers"
    )
    assert error.startswith(told) and error.count("\n") == 1
    assert repr(address) in error
    assert [file.name for file in tmp_path.iterdir()] == ["x.py"]


def test_the_package_that_is_missing_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    (tmp_path / "x.py").write_text("jobs = [{}]\ndef run(folder): return {}")
    words = ["study", str(tmp_path / "x.py"), "--out", str(tmp_path / "y")]
    assert main([*words, "--dask", "tcp://127.0.0.1:8786"]) == 2
    error = capsys.readouterr().err
    assert "--dask: a cluster needs the package distributed" in error
    assert "flowcourse[cluster]" in error
    assert main(words) == 0  # without a cluster nothing is missing
    assert json.loads((tmp_path / "y").read_text())["job"] == {}
