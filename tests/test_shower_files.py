"""Files of points, read in chunks: against a plain loop, in bounded memory, and whatever can be wrong with them."""

import sys
import tracemalloc

import h5py
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from flowcourse.shower_files import ShowerFile
from flowcourse.showers import POSITIONS, Showers


def cloud(n=23, points=40, seed=0):
    """Points and photons of `n` showers, in the file's units, with gaps among the points."""
    rng = np.random.default_rng(seed)
    photons = rng.uniform(10, 90, n)
    x, y = rng.normal(0, 20, (2, n, points))
    # in the silicon, or half a thickness outside
    z = rng.choice(POSITIONS, (n, points)) + rng.uniform(-0.5, 0.5, (n, points))
    share = rng.uniform(0, 0.048, (n, points)) / points
    e = photons[:, None] * share * (rng.uniform(size=(n, points)) < 0.7)
    return np.stack([x, y, z, e], -1).astype(np.float32), photons


def write(path, events, energy, **options):
    """A file of that layout."""
    with h5py.File(path, "w") as file:
        file.create_dataset("events", data=events, **options)
        file["energy"] = energy
    return path


def looped(events, energy):
    """The showers, point by point."""
    rows = []
    for points, photon in zip(events.astype(float), energy):
        clusters, deposits = np.zeros(30), np.zeros(30)
        moment = np.zeros(3)
        for x, y, z, e in points:
            if e == 0:
                continue
            layer = next(
                k for k, middle in enumerate(POSITIONS) if abs(z - middle) < 1
            )
            clusters[layer] += 1
            deposits[layer] += 1000 * e
            moment += 1000 * e * np.array([x, y, layer + 1])
        cog = moment / deposits.sum() if deposits.sum() else np.zeros(3)
        rows.append((photon, clusters, deposits, cog))
    columns = (torch.tensor(np.array(column)) for column in zip(*rows))
    return Showers(*columns)


def parts(showers):
    return showers.energy, showers.clusters, showers.deposits, showers.cog


def joined(chunks):
    return Showers(*map(torch.cat, zip(*map(parts, chunks))))


def same(found, wanted):
    for a, b in zip(parts(found), parts(wanted), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "photons.hdf5"


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_showers_are_those_of_a_plain_loop(path, chunk):
    events, energy = cloud()
    reader = ShowerFile(write(path, events, energy), chunk, dtype=torch.float64)
    chunks = list(reader)
    assert len(chunks) == len(reader) == -(-23 // chunk) and reader.n == 23
    assert all(len(part) == chunk for part in chunks[:-1])
    wanted = looped(events, energy)
    assert (wanted.clusters.sum(1) > 15).all()
    same(joined(chunks), wanted)
    same(joined(reader), wanted)  # a second time


def test_the_older_layout_is_read_too(path):
    events, energy = cloud()
    options = dict(chunk=10, dtype=torch.float64)
    turned = write(path, events.swapaxes(1, 2), energy[:, None])
    same(joined(ShowerFile(turned, **options)), looped(events, energy))


def test_points_of_no_energy_are_nowhere(path):
    """They may stand anywhere in the row, and hold any place."""
    events, energy = cloud()
    none = events[..., 3] == 0
    places = (np.zeros(3), np.array([5.0, 5.0, -1e6]))
    for place in places:
        events[none, :3] = place
        found = ShowerFile(write(path, events, energy), dtype=torch.float64)
        same(joined(found), looped(events, energy))


def test_a_shower_without_points(path):
    events, energy = cloud(5)
    events[2] = 0
    for chunk in (1, 5):  # a chunk of its own too
        reader = ShowerFile(write(path, events, energy), chunk)
        found = joined(reader)
        assert (found.deposits[2] == 0).all() and (found.cog[2] == 0).all()
        assert found.deposits[[0, 1, 3, 4]].sum(1).min() > 0
    (none,) = ShowerFile(write(path, events[:, :0], energy))
    assert (none.clusters == 0).all() and len(none) == 5


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_the_dtype_is_that_asked_for(path, dtype):
    file = write(path, *cloud(4))
    (found,) = ShowerFile(file, dtype=dtype)
    for part in parts(found):
        assert part.dtype == (dtype or torch.get_default_dtype())


def test_other_axes_units_and_positions(path):
    events, energy = cloud()
    wanted = looped(events, energy)
    for depth, order in (("y", [1, 2, 0, 3]), ("x", [2, 0, 1, 3])):
        # column `c` of the file is the column `order[c]` of the shower
        file = write(path, events[..., order], energy)
        found = ShowerFile(file, depth=depth, dtype=torch.float64)
        same(joined(found), wanted)
    moved = events.copy()
    moved[..., 2] -= 1811.34
    moved[..., 3] *= 1000
    found = ShowerFile(
        write(path, moved, energy),
        positions=torch.tensor(POSITIONS) - 1811.34,
        unit="MeV",
    )
    found = joined(found)
    assert_close(found.clusters, wanted.clusters.float())
    assert_close(found.deposits, wanted.deposits.float())
    numbered = events.copy()
    distance = np.abs(events[..., 2:3] - np.array(POSITIONS))
    aside = np.random.default_rng(1).uniform(-0.49, 0.49, events.shape[:2])
    numbered[..., 2] = distance.argmin(-1) + aside
    found = ShowerFile(
        write(path, numbered, energy),
        positions=range(30),
        within=0.5,
        dtype=torch.float64,
    )
    same(joined(found), wanted)


# memory


class Spy:
    """A data set of which the rows taken at once are counted."""

    def __init__(self, data):
        self.data, self.rows = data, []
        self.shape, self.dtype = data.shape, data.dtype

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        found = self.data[index]
        self.rows.append(len(found))
        return found


def test_no_more_rows_are_read_than_a_chunk_has(path, monkeypatch):
    file, spies = write(path, *cloud(50)), []
    whole = ShowerFile._data

    def watched(self, *args):
        spies.append(Spy(whole(self, *args)))
        return spies[-1]

    monkeypatch.setattr(ShowerFile, "_data", watched)
    reader = ShowerFile(file, 12)
    assert [spy.rows for spy in spies] == [[], []]  # nothing yet
    del spies[:]
    rows = iter(reader)
    next(rows)
    assert [spy.rows for spy in spies] == [[12], [12]]  # not ahead
    assert len(list(rows)) == 4
    assert [spy.rows for spy in spies] == [[12, 12, 12, 12, 2]] * 2


def test_memory_is_that_of_a_chunk(path):
    points, chunk = 500, 20
    events, energy = cloud(800, points)
    write(path, events, energy)
    size = events.nbytes
    del events
    peaks = []
    for n in (chunk, 800):
        tracemalloc.start()
        for k, _ in enumerate(ShowerFile(path, chunk), 1):
            if k * chunk >= n:
                break
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one = size * chunk / 800
    # a chunk, its points in float64 and their places
    assert peaks[0] < 10 * one
    assert peaks[1] < 1.5 * peaks[0] < size / 2


def test_the_file_is_closed(path):
    file = write(path, *cloud(30))
    reader = ShowerFile(file, 10)
    rows = iter(reader)
    next(rows)
    rows.close()
    list(reader)
    with h5py.File(file, "r+") as free:  # h5py refuses where it is open to read
        assert "events" in free


# what is wrong with files


def refused(file, *words, **options):
    with pytest.raises(ValueError) as error:
        list(ShowerFile(file, **options))
    for word in (str(file), *words):
        assert word in str(error.value), (word, error.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ShowerFile(tmp_path / "none.hdf5")
    with pytest.raises(IsADirectoryError):
        ShowerFile(tmp_path)


def test_an_empty_file(path):
    path.write_bytes(b"")
    refused(path, "not an HDF5 file, or not a whole one")
    with h5py.File(path, "w"):
        pass
    refused(path, "expected a data set 'events', found nothing")


def test_a_file_of_no_showers(path):
    reader = ShowerFile(write(path, np.zeros((0, 40, 4)), np.zeros(0)))
    assert len(reader) == reader.n == 0 and list(reader) == []


@pytest.mark.parametrize("left", [0.01, 0.5, 0.99])
def test_a_truncated_file(path, left):
    whole = write(path, *cloud(100)).read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    refused(path, "not an HDF5 file, or not a whole one")


def test_a_file_of_something_else(path):
    path.write_bytes(b"<html>not found</html>" * 100)
    refused(path, "not an HDF5 file, or not a whole one")


def test_a_damaged_chunk_is_named(path):
    events, energy = cloud(40)
    write(path, events, energy, chunks=(10, 40, 4), compression="gzip")
    with h5py.File(path) as file:
        where = file["events"].id.get_chunk_info(2).byte_offset
    content = bytearray(path.read_bytes())
    content[where : where + 50] = bytes(50)
    path.write_bytes(content)
    refused(path, "showers 20 to 29 cannot be read", chunk=10)
    rows = iter(ShowerFile(path, 10))
    assert len(next(rows)) == len(next(rows)) == 10  # the others before it


def test_a_missing_or_misplaced_data_set(path):
    events, energy = cloud(3)
    with h5py.File(path, "w") as file:
        file["showers"], file["energy"] = events, energy
    refused(path, "a data set 'events'", "'energy', 'showers'")
    with h5py.File(path, "w") as file:
        file["events"] = events
    refused(path, "a data set 'energy'")
    with h5py.File(path, "w") as file:
        file.create_group("events")
        file["energy"] = energy
    refused(path, "a data set 'events'")


def wrong_shapes():
    events, energy = cloud(6)
    yield "events", events[..., :3], energy
    yield "events", events[..., 3], energy
    yield "events", events[None], energy
    yield "energy", events, energy[:5]
    yield "energy", events, energy[None]
    yield "energy", events, np.stack([energy, energy], 1)
    yield "energy", events, energy[0]
    yield "events", events.astype("S8"), energy
    yield "energy", events, [b"many"] * 6
    yield "events", 1.0, energy


@pytest.mark.parametrize(("key", "events", "energy"), [*wrong_shapes()])
def test_a_wrong_shape_or_type(path, key, events, energy):
    refused(write(path, events, energy), f"{key}: expected numbers of shape")


def spoiled():
    """What is spoiled, the shower that it is in, the words that name it."""
    inf, nan = np.inf, np.nan
    for value in (0.0, -20.0, nan, inf, 45_000.0):
        yield "energy", (13,), value, "energy: expected more than 0"
    for value in (-1e-6, nan, inf):
        yield "events", (13, 5, 3), value, "events: expected finite points"
    for axis in range(3):
        yield "events", (13, 5, axis), nan, "events: expected finite points"
    wrong = "events: a point at z = "
    for z in (POSITIONS[3] + 0.6, POSITIONS[3] - 0.6, 1800.0, 2011.0, 12.0):
        yield "events", (13, 5, 2), z, f"{wrong}{z:g} is in no layer"


@pytest.mark.parametrize(("key", "index", "value", "words"), [*spoiled()])
def test_a_wrong_number_is_refused_and_its_shower_named(
    path, key, index, value, words
):
    events, energy = cloud()
    events[13, 5, 3] = 0.001
    data = {"events": events, "energy": energy}
    list(ShowerFile(write(path, **data), 5))  # right so far
    data[key][index] = value
    refused(write(path, **data), "shower 13: ", words, chunk=5)


def test_wrong_units_are_noticed(path):
    events, energy = cloud()
    in_mev = events * np.array([1, 1, 1, 1000], np.float32)
    words = "MeV in the layers for each GeV", "is unit="
    refused(write(path, in_mev, energy), *words)
    refused(write(path, events, energy), *words, unit="MeV")
    # photons in MeV, alone or with the points
    photons = "energy: expected more than 0 and at most 1000 GeV"
    refused(write(path, events, 1000 * energy), photons)
    refused(write(path, in_mev, 1000 * energy), photons)


def test_a_file_that_was_never_filled(path):
    """Its maker stopped: the rest of the rows are zeros."""
    events, energy = cloud(20)
    events[12:], energy[12:] = 0, 0
    refused(write(path, events, energy), "shower 12: energy: expected")


# arguments


def test_without_h5py_it_is_named(path, monkeypatch):
    file = write(path, *cloud(3))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install flowcourse\[showers\]"):
        ShowerFile(file)


def test_a_path_may_be_text(path):
    file = str(write(path, *cloud(3)))
    assert repr(ShowerFile(file)) == f"ShowerFile({file!r}, n=3, chunk=500)"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", 3),
        ("path", None),
        ("chunk", 0),
        ("chunk", 2.5),
        ("positions", POSITIONS[:29]),
        ("positions", POSITIONS[::-1]),
        ("positions", [*POSITIONS[:29], np.nan]),
        ("positions", [*POSITIONS[:29], np.inf]),
        ("positions", "z"),
        ("positions", [[1.0], [2.0, 3.0]]),
        ("positions", 3.0),
        ("within", 0.0),
        ("within", "wide"),
        ("depth", "zy"),
        ("depth", 2),
        ("unit", "keV"),
        ("dtype", torch.float16),
        ("dtype", "float32"),
    ],
)
def test_mistakes_are_named(path, name, value):
    file = write(path, *cloud(3))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ShowerFile(**({"path": file} | {name: value}))
