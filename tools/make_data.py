"""Make the packaged data sets in flowcourse/files and print their sizes and checksums.

    python tools/make_data.py FOLDER             write the files
    python tools/make_data.py FOLDER --check     only compare their arrays with those there

FOLDER holds the four IDX files of MNIST, `train-images-idx3-ubyte.gz` and so on. Each packaged file
is an uncompressed .npz inside xz. Nothing here depends on time, platform or thread count, so the
same versions of numpy and liblzma write the same bytes, and other versions the same arrays.
"""

import argparse
import hashlib
import io
import lzma
from pathlib import Path

import numpy as np

from flowcourse.data import unpack
from flowcourse.mnist import MNIST_FILES, read_idx

FILES = Path(__file__).parents[1] / "flowcourse" / "files"
LIMIT = 2_400_000  # bytes in one file
SEEDS = {"train": 20150607, "test": 20150608}  # of the Bernoulli binarisation
GREY_SEED = 20180709  # of the order in which the grey test images are divided
GREY_SIZES = {"train": 8000, "validation": 1000, "test": 1000}

# Eruption and waiting time, in minutes, of `faithful` in R (Azzalini and Bowman
# 1990).
OLD_FAITHFUL = """
3.6,79 1.8,54 3.333,74 2.283,62 4.533,85 2.883,55 4.7,88 3.6,85 1.95,51 4.35,85 1.833,54
3.917,84 4.2,78 1.75,47 4.7,83 2.167,52 1.75,62 4.8,84 1.6,52 4.25,79 1.8,51 1.75,47 3.45,78
3.067,69 4.533,74 3.6,83 1.967,55 4.083,76 3.85,78 4.433,79 4.3,73 4.467,77 3.367,66 4.033,80
3.833,74 2.017,52 1.867,48 4.833,80 1.833,59 4.783,90 4.35,80 1.883,58 4.567,84 1.75,58 4.533,73
3.317,83 3.833,64 2.1,53 4.633,82 2,59 4.8,75 4.716,90 1.833,54 4.833,80 1.733,54 4.883,83
3.717,71 1.667,64 4.567,77 4.317,81 2.233,59 4.5,84 1.75,48 4.8,82 1.817,60 4.4,92 4.167,78
4.7,78 2.067,65 4.7,73 4.033,82 1.967,56 4.5,79 4,71 1.983,62 5.067,76 2.017,60 4.567,78
3.883,76 3.6,83 4.133,75 4.333,82 4.1,70 2.633,65 4.067,73 4.933,88 3.95,76 4.517,80 2.167,48
4,86 2.2,60 4.333,90 1.867,50 4.817,78 1.833,63 4.3,72 4.667,84 3.75,75 1.867,51 4.9,82 2.483,62
4.367,88 2.1,49 4.5,83 4.05,81 1.867,47 4.7,84 1.783,52 4.85,86 3.683,81 4.733,75 2.3,59 4.9,89
4.417,79 1.7,59 4.633,81 2.317,50 4.6,85 1.817,59 4.417,87 2.617,53 4.067,69 4.25,77 1.967,56
4.6,88 3.767,81 1.917,45 4.5,82 2.267,55 4.65,90 1.867,45 4.167,83 2.8,56 4.333,89 1.833,46
4.383,82 1.883,51 4.933,86 2.033,53 3.733,79 4.233,81 2.233,60 4.533,82 4.817,77 4.333,76
1.983,59 4.633,80 2.017,49 5.1,96 1.8,53 5.033,77 4,77 2.4,65 4.6,81 3.567,71 4,70 4.5,81
4.083,93 1.8,53 3.967,89 2.2,45 4.15,86 2,58 3.833,78 3.5,66 4.583,76 2.367,63 5,88 1.933,52
4.617,93 1.917,49 2.083,57 4.583,77 3.333,68 4.167,81 4.333,81 4.5,73 2.417,50 4,85 4.167,74
1.883,55 4.583,77 4.25,83 3.767,83 2.033,51 4.433,78 4.083,84 1.833,46 4.417,83 2.183,55 4.8,81
1.833,57 4.8,76 4.1,84 3.966,77 4.233,81 3.5,87 4.366,77 2.25,51 4.667,78 2.1,60 4.35,82
4.133,91 1.867,53 4.6,78 1.783,46 4.367,77 3.85,84 1.933,49 4.5,83 2.383,71 4.7,80 1.867,49
3.833,75 3.417,64 4.233,76 2.4,53 4.8,94 2,55 4.15,76 1.867,50 4.267,82 1.75,54 4.483,75 4,78
4.117,79 4.083,78 4.267,78 3.917,70 4.55,79 4.083,70 2.417,54 4.183,86 2.217,50 4.45,90 1.883,54
1.85,54 4.283,77 3.95,79 2.333,64 4.15,75 2.35,47 4.933,86 2.9,63 4.583,85 3.833,82 2.083,57
4.367,82 2.133,67 4.35,74 2.2,54 4.45,83 3.567,73 4.5,73 4.15,88 3.817,80 3.917,71 4.45,83 2,56
4.283,79 4.767,78 4.533,84 1.85,58 4.25,83 1.983,43 2.25,60 4.75,75 4.117,81 2.15,46 4.417,90
1.817,46 4.467,74
"""


def bernoulli(grey, seed):
    """One draw of Bernoulli(grey/255) a pixel, from the raw stream of a Philox generator.

    The raw 64-bit words are part of numpy's compatibility promise; its float draws are not.
    """
    bits = np.random.Philox(key=seed)
    out = np.empty(grey.shape, bool)
    # the words of all 60,000 images would fill 400 MB
    for i in range(0, len(grey), 5000):
        block = grey[i : i + 5000]
        uniform = (bits.random_raw(block.size) >> np.uint64(11)) * 2.0**-53
        out[i : i + 5000] = uniform.reshape(block.shape) < block / 255.0
    return out


def threshold(grey):
    """Whether grey/255 is above one half."""
    return grey > 127


def grey(folder):
    """The packed arrays of the grey test images, by file name, in a random order.

    The first half of MNIST's test file is cleaner than the second, so that its order
    would make the splits differ. The order sorts the raw stream of a Philox generator.
    """
    images, labels = (
        read_idx(Path(folder) / name) for name in MNIST_FILES["test"]
    )
    words = np.random.Philox(key=GREY_SEED).random_raw(len(images))
    order = np.argsort(words, kind="stable")
    parts = np.split(order, np.cumsum([*GREY_SIZES.values()])[:-1])
    return {
        f"mnist-grey-{split}.npz.xz": {"x": images[rows], "y": labels[rows]}
        for split, rows in zip(GREY_SIZES, parts, strict=True)
    }


def pack(**arrays):
    """The bytes of an .npz of these arrays, compressed by xz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def same(a, b):
    """Whether two dictionaries hold equal arrays."""
    return a.keys() == b.keys() and all(
        np.array_equal(a[key], b[key]) for key in a
    )


def mnist(folder, split):
    """The packed arrays of both binarisations of one split, by file name."""
    images, labels = (
        read_idx(Path(folder) / name) for name in MNIST_FILES[split]
    )
    binary = {
        "mnist": bernoulli(images, SEEDS[split]),
        "mnist-threshold": threshold(images),
    }
    return {
        f"{name}-{split}.npz.xz": {"bits": np.packbits(x, axis=-1), "y": labels}
        for name, x in binary.items()
    }


def small():
    """The arrays of the small sets, by file name."""
    from sklearn.datasets import load_breast_cancer, load_digits

    digits, cancer = load_digits(), load_breast_cancer()
    pairs = [pair.split(",") for pair in OLD_FAITHFUL.split()]
    return {
        "optdigits-all.npz.xz": {
            "x": digits.images.astype(np.uint8),
            "y": digits.target.astype(np.uint8),
        },
        "old-faithful-all.npz.xz": {"x": np.array(pairs, dtype=np.float64)},
        "breast-cancer-all.npz.xz": {
            "x": cancer.data,
            "y": cancer.target.astype(np.uint8),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the IDX files of MNIST are")
    parser.add_argument(
        "--check", action="store_true", help="compare arrays, write nothing"
    )
    args = parser.parse_args()
    contents = (
        mnist(args.folder, "train")
        | mnist(args.folder, "test")
        | grey(args.folder)
        | small()
    )
    total = 0
    for name, arrays in contents.items():
        packed = pack(**arrays)
        if len(packed) > LIMIT:
            raise SystemExit(f"{name}: {len(packed)} bytes, more than {LIMIT}")
        if not args.check:
            (FILES / name).write_bytes(packed)
        elif not same(arrays, unpack((FILES / name).read_bytes())):
            raise SystemExit(f"{name}: differs from what this script makes")
        total += len(packed)
        print(f"{len(packed):9,}  {hashlib.sha256(packed).hexdigest()}  {name}")
    print(f"{total:9,}  bytes together")


if __name__ == "__main__":
    main()
