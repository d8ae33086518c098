"""The packaged data, the grey originals without a network, the preparation and the toys."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from flowcourse import data
from flowcourse.data import datasets, dequantise, load, mnist_grey, toys
from flowcourse.plots import grid_points

ROOT = Path(__file__).parents[1]
DEAD = "http://127.0.0.1:9/"  # the discard port, where nothing listens
EVERY_SPLIT = [
    (name, split)
    for name, record in datasets.items()
    for split in record.shapes
]


@pytest.fixture(scope="module")
def make_data():
    spec = importlib.util.spec_from_file_location(
        "make_data", ROOT / "tools" / "make_data.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- packaged files ---


@pytest.mark.parametrize("name,split", EVERY_SPLIT)
def test_every_split_has_the_shape_and_type_of_its_record(name, split):
    x, y = load(name, split)
    shape = datasets[name].shapes[split]
    assert tuple(x.shape) == shape
    assert x.dtype == (
        torch.uint8 if len(shape) == 3 else torch.get_default_dtype()
    )
    assert (
        y is None
        if name == "old-faithful"
        else (y.dtype, len(y)) == (torch.int64, len(x))
    )


def test_the_files_are_those_of_the_table_and_small():
    paths = {datasets[name].path(split) for name, split in EVERY_SPLIT}
    folder = next(iter(paths)).parent
    assert paths == set(folder.glob("*.xz"))
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) < 2_400_000 and sum(sizes) < 5_000_000


def test_one_flipped_bit_is_noticed(tmp_path, monkeypatch):
    damaged = tmp_path / "old-faithful-all.npz.xz"
    content = bytearray(datasets["old-faithful"].path("all").read_bytes())
    content[500] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setattr(data.Record, "path", lambda self, split: damaged)
    with pytest.raises(
        RuntimeError, match="old-faithful-all.npz.xz: this file is damaged"
    ):
        load("old-faithful")


def test_tables_follow_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        x = load("breast-cancer").x
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.dtype == torch.float64 and x[0, 0] == 17.99


def test_small_sets_are_what_the_script_makes(make_data):
    pytest.importorskip("sklearn")
    for name, arrays in make_data.small().items():
        assert make_data.same(
            arrays, data.unpack((make_data.FILES / name).read_bytes())
        ), name


@pytest.mark.parametrize("split", ["train", "test"])
def test_binary_mnist_is_what_the_script_makes(make_data, split):
    if "FLOWCOURSE_DATA" not in os.environ:
        pytest.skip(
            "FLOWCOURSE_DATA does not name a folder with the IDX files of MNIST"
        )
    folder = data._find_mnist(data.MNIST_FILES[split][0]).parent
    for name, arrays in make_data.mnist(folder, split).items():
        assert make_data.same(
            arrays, data.unpack((make_data.FILES / name).read_bytes())
        ), name


def test_binarisation_is_fair_and_its_stream_is_fixed(make_data):
    grey = np.tile(np.arange(256, dtype=np.uint8), (6000, 1))
    drawn = make_data.bernoulli(grey, seed=1)
    share = drawn.mean(0)
    assert share[0] == 0 and share[255] == 1
    assert np.abs(share - np.arange(256) / 255).max() < 4.5 * 0.5 / math.sqrt(
        6000
    )
    # Blocks of 5,000 rows continue one stream: the first rows do not know how
    # many follow.
    assert np.array_equal(drawn[:10], make_data.bernoulli(grey[:10], seed=1))
    digest = hashlib.sha256(np.packbits(drawn[:100]).tobytes()).hexdigest()
    assert digest.startswith("ff6fe4d20af9f617")
    assert make_data.threshold(np.array([0, 127, 128, 255])).tolist() == [
        False,
        False,
        True,
        True,
    ]


# --- the grey originals ---


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A folder of four small IDX files that pass for MNIST, and an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    checksums = {}
    for split, names in data.MNIST_FILES.items():
        n = {"train": 6, "test": 3}[split]
        arrays = np.arange(n * 28 * 28).reshape(n, 28, 28) % 251, np.arange(n)
        for name, array in zip(names, arrays, strict=True):
            header = (
                bytes([0, 0, 8, array.ndim])
                + np.array(array.shape, ">i4").tobytes()
            )
            content = header + array.astype(np.uint8).tobytes()
            packed = gzip.compress(content, mtime=0)
            (folder / name).write_bytes(packed)
            checksums[name] = tuple(
                hashlib.sha256(part).hexdigest() for part in (packed, content)
            )
    monkeypatch.setattr(data, "MNIST_SHA256", checksums)
    monkeypatch.setattr(data, "MNIST_MIRRORS", (DEAD,))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("FLOWCOURSE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def server(idx):
    """The address of a server of that folder on this machine."""
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=idx
    )
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("inside", ["", "mnist"])
def test_grey_images_from_a_folder(idx, tmp_path, monkeypatch, inside):
    given = tmp_path / "given"
    given.mkdir()
    idx.rename(given / inside) if inside else given.rmdir() or idx.rename(given)
    monkeypatch.setenv("FLOWCOURSE_DATA", str(given))
    x, y = mnist_grey("test")
    assert (
        x.shape == (3, 28, 28)
        and x.dtype == torch.uint8
        and x[0, 0, :3].tolist() == [0, 1, 2]
    )
    assert y.tolist() == [0, 1, 2] and y.dtype == torch.int64
    assert len(mnist_grey().x) == 6


def test_offline_the_error_says_what_to_do(idx):
    with pytest.raises(RuntimeError) as error:
        mnist_grey()
    message = str(error.value)
    for part in (
        "train-images-idx3-ubyte.gz",
        DEAD,
        "FLOWCOURSE_DATA",
        'load("mnist")',
    ):
        assert part in message


def test_the_next_mirror_is_tried_and_the_file_kept(idx, server, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", (DEAD, server))
    assert mnist_grey("test").y.tolist() == [0, 1, 2]
    monkeypatch.setattr(data, "MNIST_MIRRORS", ())
    assert mnist_grey("test").y.tolist() == [0, 1, 2]


def test_a_download_with_another_checksum_is_refused(idx, server, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", (server,))
    name = data.MNIST_FILES["test"][0]
    (idx / name).write_bytes((idx / name).read_bytes()[:-1] + b"?")
    with pytest.raises(
        RuntimeError, match="could not be downloaded(.|\n)*hash"
    ):
        mnist_grey("test")


@pytest.mark.parametrize("damage", ["another set", "truncated", "not gzip"])
def test_a_wrong_file_in_the_folder_is_refused(idx, monkeypatch, damage):
    monkeypatch.setenv("FLOWCOURSE_DATA", str(idx))
    images, labels = (idx / name for name in data.MNIST_FILES["test"])
    content = {
        "another set": labels.read_bytes(),
        "truncated": images.read_bytes()[:-20],
        "not gzip": b"<html>not found</html>",
    }[damage]
    images.write_bytes(content)
    with pytest.raises(
        RuntimeError,
        match="t10k-images-idx3-ubyte.gz: (the contents|not a whole)",
    ):
        mnist_grey("test")


def test_unknown_split():
    with pytest.raises(
        ValueError, match="split: expected train or test, got 'valid'"
    ):
        mnist_grey("valid")


# --- preparation ---


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantised_counts_stay_in_their_cell(levels):
    # rounding up has a chance of about 1e-6 each
    top = torch.full((4_000_000,), levels - 1)
    p = dequantise(top, levels, torch.Generator().manual_seed(0))
    assert p.max() < 1 and (p * levels).floor().min() == levels - 1
    assert abs(p.mean() - (levels - 0.5) / levels) < 1e-4


def test_without_the_hair_rounding_does_leave_the_cell():
    u = torch.rand(8_000_000, generator=torch.Generator().manual_seed(0))
    assert (16 + u).max() == 17


def test_noise_follows_the_generator_alone():
    counts = load("optdigits").x[:5]
    before = torch.get_rng_state()
    a, b = (
        dequantise(counts, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(a, b) and torch.equal(before, torch.get_rng_state())


# --- toys ---


def check_toy(toy):
    """Complain where mass, entropy, draws and density do not agree."""
    bins, low, high = 240, -6.0, 6.0
    cell = ((high - low) / bins) ** 2
    points = grid_points(low, high, bins, dtype=torch.float64)
    log_p = torch.cat([toy.log_prob(part) for part in points.split(20)])
    p = log_p.exp()
    mass, entropy = (
        (p.sum() * cell).item(),
        (torch.special.entr(p).sum() * cell).item(),
    )
    assert abs(mass - 1) < 1e-3, f"mass {mass}"
    assert abs(entropy - toy.entropy) < 1e-3, f"entropy {entropy}"
    x = toy.sample(100_000, torch.Generator().manual_seed(0), torch.float64)
    # 24 x 24 cells of a histogram; the expected count sums the density over 10
    # x 10 fine cells.
    index = ((x - low) / (high - low) * 24).floor().long().clamp(0, 23)
    count = torch.bincount(
        index[:, 1] * 24 + index[:, 0], minlength=576
    ).double()
    coarse = p.reshape(24, 10, 24, 10).sum((1, 3)).flatten() * cell
    expected = coarse * len(x)
    seen = expected > 5
    chi2 = ((count - expected)[seen].square() / expected[seen]).sum().item()
    freedom = int(seen.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), (
        f"chi2 {chi2} for {freedom} cells"
    )


@pytest.mark.parametrize("name", toys)
def test_toy(name):
    check_toy(toys[name])


def test_the_check_rejects():
    class Heavy(data.Rings):
        def _log_prob(self, x):
            return super()._log_prob(x) + 0.01

    class Wide(data.EightGaussians):
        def _place(self, u, e):
            return super()._place(u, 1.1 * e)

    class Lopsided(data.Moons):
        def _place(self, u, e):
            return super()._place(u**1.1, e)

    class Vague(data.Pinwheel):
        entropy = 2.33

    for toy, complaint in (
        (Heavy, "mass"),
        (Wide, "chi2"),
        (Lopsided, "chi2"),
        (Vague, "entropy"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            check_toy(toy())


@pytest.mark.parametrize("name", toys)
def test_toys_keep_type_and_shape_and_the_global_generator(name):
    toy = toys[name]
    before = torch.get_rng_state()
    a, b = (
        toy.sample(7, torch.Generator().manual_seed(1), torch.float64)
        for _ in range(2)
    )
    assert torch.equal(a, b) and a.dtype == torch.float64 and a.shape == (7, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert toy.sample(0).shape == (0, 2)
    log_p = toy.log_prob(a.expand(3, 7, 2))
    assert log_p.shape == (3, 7) and log_p.dtype == torch.float64
    assert toy.log_prob(a[0].float()).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(toys) - {"checkerboard"}))
def test_log_density_and_slope_are_finite_and_right_far_out(name):
    x = torch.tensor(
        [[0.0, 0.0], [30.0, -40.0], [1e-3, 0.0], [2.0, 2.0]], requires_grad=True
    )
    toys[name].log_prob(x).sum().backward()
    assert toys[name].log_prob(x).isfinite().all() and x.grad.isfinite().all()
    y = torch.tensor(
        [[1.3, -0.4], [0.2, 2.1]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(toys[name].log_prob, y)


def test_every_draw_from_the_board_has_a_density():
    x = toys["checkerboard"].sample(3_000_000, torch.Generator().manual_seed(0))
    assert (toys["checkerboard"].log_prob(x) == -math.log(32)).all()


def test_a_ring_is_its_own_quadrature():
    points, sd = (
        data._circle(torch.arange(4000) * 2 * math.pi / 4000),
        data.Rings.sd,
    )
    circles = torch.cat([radius * points for radius in data.Rings.radii])
    x = toys["rings"].sample(50, torch.Generator().manual_seed(0)).double()
    by_sum = data._blurred(
        x, circles.double(), torch.full((16000,), -math.log(16000)), sd
    )
    torch.testing.assert_close(
        toys["rings"].log_prob(x), by_sum, atol=1e-4, rtol=0
    )
