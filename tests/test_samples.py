"""Files of samples: what is written is what is read, in pieces, whole or not at all."""

import csv
import importlib.util
import tracemalloc

import h5py
import numpy as np
import pytest

from flowcourse import samples
from flowcourse.samples import require_kind, rows_to

KINDS = [".h5", ".npz", ".csv"]


def drawn(n, seed=0):
    """Rows of several shapes and dtypes, with numbers that need all their digits."""
    draw = np.random.default_rng(seed)
    return {
        "x": draw.standard_normal((n, 2, 3)).astype(np.float32),
        "energy": np.exp(30 * draw.standard_normal(n)),
        "counts": draw.integers(0, 256, (n, 2), dtype=np.uint8),
        "large": draw.integers(-(2**62), 2**62, n),
    }


def write(path, rows, cuts, about=None):
    """Write rows in pieces that end at the cuts."""
    n = len(rows["x"])
    with rows_to(path, n, about or {}) as to:
        for a, b in zip([0, *cuts], [*cuts, n]):
            to({name: x[a:b] for name, x in rows.items()})


def read(path, like):
    """The arrays of a file; those of a CSV file in the shapes and dtypes of others."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {name: x[:] for name, x in file.items()}
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    with open(path, newline="") as file:
        names, *lines = csv.reader(file)
    found = {}
    for name, x in like.items():
        columns = [
            k for k, word in enumerate(names) if word.split("_")[0] == name
        ]
        parse = int if x.dtype.kind in "iu" else float
        flat = [[parse(line[k]) for k in columns] for line in lines]
        found[name] = np.array(flat, dtype=x.dtype).reshape(x.shape)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[], [1], [40, 41, 99]])
def test_what_is_read_is_what_was_written(kind, cuts, tmp_path):
    path, rows = tmp_path / f"rows{kind}", drawn(100)
    write(path, rows, cuts)
    found = read(path, rows)
    assert list(found) == sorted(rows) if kind == ".h5" else list(rows)
    for name, x in rows.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert np.array_equal(found[name], x), name
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_columns_of_a_table_have_names(tmp_path):
    write(tmp_path / "rows.csv", drawn(3), [])
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    wanted = ["x_1", "x_2", "x_3", "x_4", "x_5", "x_6"]
    wanted += ["energy", "counts_1", "counts_2", "large"]
    assert lines[0].split(",") == wanted and len(lines) == 4


def test_hdf5_says_how_rows_were_drawn(tmp_path):
    path = tmp_path / "rows.h5"
    write(path, drawn(3), [], {"config": "realnvp.digits", "seed": 2**64 - 1})
    with h5py.File(path) as file:
        assert dict(file.attrs) == {
            "config": "realnvp.digits",
            "seed": 2**64 - 1,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_come_back(kind, tmp_path):
    x = np.array([[np.nan, np.inf], [-np.inf, -0.0]], dtype=np.float32)
    write(tmp_path / f"rows{kind}", {"x": x}, [1])
    found = read(tmp_path / f"rows{kind}", {"x": x})["x"]
    assert np.array_equal(found, x, equal_nan=True)
    assert np.signbit(found[1, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_block_that_is_stopped_leaves_what_there_was(kind, error, tmp_path):
    path, rows = tmp_path / f"rows{kind}", drawn(10)
    for before in (None, b"something else"):
        if before:
            path.write_bytes(before)
        with pytest.raises(error), rows_to(path, 20, {}) as to:
            to(rows)
            assert path.exists() == bool(before)
            raise error
        assert [file.read_bytes() for file in tmp_path.iterdir()] == (
            [before] if before else []
        )
    write(path, rows, [])
    assert np.array_equal(read(path, rows)["x"], rows["x"])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_rows(kind, tmp_path):
    """Fifty pieces take what five take, up to the space of one, where all rows are fifty."""
    piece = {"x": np.ones((200, 100))}  # 160 kB
    peaks = []
    for pieces in (5, 50):
        tracemalloc.start()
        with rows_to(tmp_path / f"rows{kind}", 200 * pieces, {}) as to:
            for _ in range(pieces):
                to(piece)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + piece["x"].nbytes


@pytest.mark.parametrize("name", ["rows", "rows.txt", "rows.h5.gz", ".npz"])
def test_another_ending_is_answered_with_those_that_are(name, tmp_path):
    told = r"^out: expected .* \.h5, \.npz, \.csv, got"
    with pytest.raises(ValueError, match=told):
        require_kind(tmp_path / name)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^out: .*pip install h5py"):
        require_kind(tmp_path / "rows.h5")
    require_kind(tmp_path / "rows.npz")
    assert importlib.util.find_spec("h5py")
