"""The packaged data, and the steps that prepare them."""

import hashlib
import importlib.util
import io
import lzma
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flowcourse import data, mnist
from flowcourse.cli import main
from flowcourse.data import (
    bits_per_dim,
    datasets,
    dequantise,
    from_logit,
    load,
    standardise,
    to_logit,
)

ROOT = Path(__file__).parents[1]
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
        ValueError, match="old-faithful-all.npz.xz: this file is damaged"
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
def test_mnist_is_what_the_script_makes(make_data, split):
    if "FLOWCOURSE_DATA" not in os.environ:
        pytest.skip(
            "FLOWCOURSE_DATA does not name a folder with the IDX files of MNIST"
        )
    folder = mnist._find_mnist(mnist.MNIST_FILES[split][0]).parent
    made = make_data.mnist(folder, split)
    made |= make_data.grey(folder) if split == "test" else {}
    for name, arrays in made.items():
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


def test_grey_digits_are_the_test_images_each_once():
    parts = [
        load("mnist-grey", split) for split in ("train", "validation", "test")
    ]
    x, y = (torch.cat(part) for part in zip(*parts))
    binary = load("mnist-threshold", "test")
    # each thresholded image, with its label, has a partner among the binary
    rows, wanted = (
        torch.cat([images.flatten(1), labels[:, None]], 1)
        for images, labels in (((x > 127).long(), y), binary)
    )
    assert len(torch.unique(x, dim=0)) == 10_000
    for found, expected in zip(
        torch.unique(rows, dim=0, return_counts=True),
        torch.unique(wanted, dim=0, return_counts=True),
    ):
        assert torch.equal(found, expected)
    for part in parts:
        share = part.y.bincount() / len(part.y)
        assert 0.08 < share.min() and share.max() < 0.12


def test_the_order_of_the_grey_digits_is_fixed(make_data, monkeypatch):
    arrays = {
        "t10k-images-idx3-ubyte.gz": np.arange(10_000)[:, None, None],
        "t10k-labels-idx1-ubyte.gz": np.arange(10_000),
    }
    monkeypatch.setattr(make_data, "read_idx", lambda path: arrays[path.name])
    made = make_data.grey("nowhere")
    assert [len(part["y"]) for part in made.values()] == [8000, 1000, 1000]
    for part in made.values():
        assert np.array_equal(part["x"].ravel(), part["y"])
    order = np.concatenate([part["y"] for part in made.values()])
    assert np.array_equal(np.sort(order), np.arange(10_000))
    # as many from the first half, which is cleaner, within four standard errors
    halves = [(part["y"] < 5000).mean() for part in made.values()]
    assert np.abs(np.array(halves) - 0.5).max() < 4 * 0.5 / math.sqrt(1000)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("1585322b78d1f451")


# --- damaged files ---


def test_the_command_line_says_in_a_line_that_a_file_is_damaged(
    tmp_path, monkeypatch, capsys
):
    damaged = tmp_path / "old-faithful-all.npz.xz"
    damaged.write_bytes(b"no archive")
    monkeypatch.setattr(data.Record, "path", lambda self, split: damaged)
    words = ["train", "--config", "realnvp.faithful", "--out", str(tmp_path)]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("flowcourse: old-faithful-all.npz.xz: this file is ")
    assert "\n" not in said


@pytest.mark.parametrize("damage", ["cut", "flip", "not xz", "array", "empty"])
def test_damaged_contents_are_refused_in_a_line(damage):
    packed = datasets["old-faithful"].path("all").read_bytes()
    plain = bytearray(lzma.decompress(packed))
    plain[100] ^= 1  # in the deflated numbers
    array = io.BytesIO()
    np.save(array, np.arange(3))
    broken = {
        "cut": packed[:-100],
        "flip": lzma.compress(plain),
        "not xz": b"<html>",
        "array": lzma.compress(array.getvalue()),
        "empty": b"",
    }[damage]
    with pytest.raises(ValueError, match="packed: expected an .npz file"):
        data.unpack(broken)


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


WHOLE = [
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("levels", [17, 100, 256, np.int64(65536)])
def test_counts_of_every_dtype_are_spread(dtype, levels):
    counts = torch.arange(17).to(dtype)
    p = dequantise(counts, levels, torch.Generator().manual_seed(0))
    assert p.dtype == torch.float32
    assert (p * int(levels)).floor().tolist() == list(range(17))
    with pytest.raises(ValueError, match="expected 0 to 15, got 0(.0)? to 16"):
        dequantise(counts, 16)


def test_grey_images_are_counts_of_256_levels():
    grey = torch.arange(256, dtype=torch.uint8)
    p = dequantise(grey, 256)
    assert (p * 256).floor().tolist() == list(range(256))
    with pytest.raises(ValueError, match="expected 0 to 254, got 0 to 255"):
        dequantise(grey, 255)
    assert dequantise(grey.bool(), 2).floor().sum() == 0


def test_what_is_no_count_is_refused():
    for counts, levels, text in (
        (torch.tensor([-1]), 5, "expected 0 to 4, got -1"),
        (torch.tensor([math.nan]), 5, "got nan"),
        (torch.tensor([1.5]), 5, "whole numbers"),
        (torch.tensor([1j]), 5, "a tensor of counts"),
        ([1], 5, "a tensor of counts"),
        (torch.zeros(2, device="meta"), 5, "a tensor of counts"),
        (torch.tensor([1]), 0, "levels"),
        (torch.tensor([1]), 5.0, "levels"),
        (torch.tensor([1]), "5", "levels"),
        (torch.tensor([1]), 2**23, "levels: torch.float32 has room for"),
    ):
        with pytest.raises(ValueError, match=text):
            dequantise(counts, levels)
    most = 2**22  # at the limit, every count keeps its cell
    p = dequantise(torch.tensor([0, 1, most - 2, most - 1]), most)
    assert (p.double() * most).floor().tolist() == [0, 1, most - 2, most - 1]


def test_logits_are_those_of_the_formula_and_come_back():
    p = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).double()
    p[0] = torch.tensor([0.0, 1.0, 0.5])
    x, ladj = to_logit(p, 0.05)
    # 0 goes to logit(0.05), and 1 to its mirror image
    edge = math.log(0.05 / 0.95)
    torch.testing.assert_close(x[0], torch.tensor([edge, -edge, 0.0]).double())
    t = p.clone().requires_grad_()
    slopes = torch.autograd.grad((0.05 + 0.9 * t).logit().sum(), t)[0]
    torch.testing.assert_close(ladj, slopes.log().sum(-1))
    again, back = from_logit(x, 0.05)
    torch.testing.assert_close(again, p)
    torch.testing.assert_close(back, -ladj)


def test_past_the_walls_of_the_cube_the_margin_leads_there_and_back():
    x = torch.tensor([[-8.0, 8.0]], dtype=torch.float64)
    p, ladj = from_logit(x, 0.1)
    # sigmoid(±8) is nearly 0 or 1, and the cube ends at 0.1 and 0.9
    margin = (0.1 - torch.sigmoid(x[0, 0])) / 0.8
    torch.testing.assert_close(p[0], torch.stack([-margin, 1 + margin]))
    again, back = to_logit(p, 0.1)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(back, -ladj)


@pytest.mark.parametrize("bad", [3.0, -1.0, 255.0, math.nan, math.inf])
def test_what_is_outside_the_cube_has_no_logit(bad):
    p = torch.rand(4, 3)
    p[2, 1] = bad
    with pytest.raises(ValueError, match=r"p: expected numbers in \[0, 1\]"):
        to_logit(p)


@pytest.mark.parametrize("bad", [0, 0.5, -1, math.nan, math.inf, "0.1", None])
def test_the_margin_is_a_number_below_one_half(bad):
    for f in (to_logit, from_logit):
        with pytest.raises(ValueError, match="alpha"):
            f(torch.rand(2, 3), alpha=bad)


def test_bits_per_dimension_by_hand():
    # 2 nats in 4 dimensions of 8 levels: 3 bits, less half a nat in bits
    found = bits_per_dim(torch.tensor(2.0), np.int64(4), 8)
    assert found.item() == pytest.approx(3 - 0.5 / math.log(2))
    for options in ((0, 8), (2.0, 8), (4, 0), (4, "8")):
        with pytest.raises(ValueError, match="dim|levels"):
            bits_per_dim(torch.tensor(0.0), *options)


def test_held_out_rows_are_standardised_by_the_training_rows():
    train = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    other = torch.tensor([[5.0, 20.0], [9.0, 80.0], [2.0, 0.0]])
    (a, b), mean, sd = standardise(train, other)
    assert mean.tolist() == [2, 20] and sd.tolist() == [1, 10]
    assert a.tolist() == [[-1, -1], [1, 1]]
    assert b.tolist() == [[3, 0], [7, 6], [0, -2]]


def test_a_constant_column_is_named():
    x = torch.rand(1797, 3)
    x[:, 1] = 0.1
    with pytest.raises(ValueError, match=r"columns \[1\] are constant"):
        standardise(x)


def test_rows_that_cannot_be_standardised_are_named():
    rows = torch.rand(4, 2)
    for parts, text in (
        ((torch.zeros(4, 2, dtype=torch.uint8),), "train: .*floating"),
        ((rows[:0],), r"train: expected shape \(n, \*d\)"),
        ((rows.tolist(),), "train: .*list"),
        ((torch.full((3, 2), math.nan),), "train: 6 values are not finite"),
        ((rows, rows[:, :1]), r"others\[0\]: expected shape \(\*n, 2\)"),
        ((rows, rows, "rows"), r"others\[1\]"),
    ):
        with pytest.raises(ValueError, match=text):
            standardise(*parts)
    assert standardise(rows, rows[:0]).parts[1].shape == (0, 2)


def test_parts_are_rows_of_the_data_each_once_and_follow_the_seed():
    x = torch.arange(100)
    sizes = np.array([60, 30])
    parts = data.split(x, sizes, np.int64(3))
    assert [len(part) for part in parts] == [60, 30]
    both = torch.cat(parts)
    assert len(both.unique()) == 90 and not both.equal(both.sort().values)
    assert torch.equal(both, torch.cat(data.split(x, (60, 30), 3)))
    assert not torch.equal(both, torch.cat(data.split(x, (60, 30), 4)))
    for options, text in (
        ({"sizes": (60, 41)}, "at most 100 rows"),
        ({"sizes": (-1,)}, "sizes"),
        ({"sizes": ()}, "sizes"),
        ({"sizes": 60}, "sizes"),
        ({"sizes": "60"}, "sizes"),
        ({"sizes": (0.5, 0.5)}, "sizes"),
        ({"sizes": (60,), "seed": 0.5}, "seed"),
        ({"sizes": (60,), "seed": 2**64}, "seed"),
        ({"x": [1, 2], "sizes": (1,)}, "x"),
        ({"x": torch.tensor(1.0), "sizes": (0,)}, "x"),
    ):
        with pytest.raises(ValueError, match=f"^{text}|{text}"):
            data.split(**{"x": x} | options)


def test_a_default_device_does_not_reach_the_data():
    x = torch.arange(9)
    expected = data.split(x, (5, 4))[0]
    with torch.device("meta"):
        found = data.split(x, (5, 4))[0]
        spread = dequantise(x, 10, torch.Generator().manual_seed(0))
        faithful = load("old-faithful").x
    assert torch.equal(found, expected) and not spread.is_meta
    assert not faithful.is_meta


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: load(["mnist"]), "name"),
        (lambda: load("mnist", ["train"]), "split"),
        (lambda: load("mnist", 0), "split"),
        (lambda: load("mnist", np.zeros(2)), "split"),
        (lambda: bits_per_dim(None, 2), "log_prob"),
        (lambda: data.split(torch.zeros(2), torch.tensor(1)), "sizes"),
        (lambda: dequantise(torch.zeros(2), 2, 0), "generator"),
        (lambda: to_logit(0.5), "p"),
        (lambda: to_logit(torch.tensor(0.5)), "p"),
        (lambda: to_logit(torch.ones(3, 2).long()), "p"),
        (lambda: from_logit(None), "x"),
        (lambda: from_logit(torch.tensor(0.5)), "x"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=f"^{text}: "):
        call()


@pytest.mark.parametrize("levels", [1, 2, 17, 256])
def test_counts_come_back_from_anywhere_in_their_cells(levels):
    counts = torch.arange(levels).expand(3, levels)
    for dtype in (torch.float32, torch.float64):
        u = torch.tensor([0.0, 0.5, 1 - torch.finfo(dtype).eps], dtype=dtype)
        p = data.within_cells(counts, u[:, None].expand(3, levels), levels)
        found = data.to_counts(p, levels)
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), counts)
        beyond = torch.tensor([-1.0, -1e-6, 1.0, 1 + 1e-6, math.inf])
        ends = [0, 0, levels - 1, levels - 1, levels - 1]
        assert data.to_counts(beyond.to(dtype), levels).tolist() == ends
    with pytest.raises(ValueError, match="^p: expected numbers, got 2 NaN"):
        data.to_counts(torch.tensor([0.5, math.nan, math.nan]), levels)
