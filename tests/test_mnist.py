"""The grey originals of MNIST, without a network."""

import functools
import gzip
import hashlib
import http.server
import threading

import numpy as np
import pytest
import torch

from flowcourse import mnist
from flowcourse.mnist import mnist_grey

DEAD = "http://127.0.0.1:9/"  # the discard port, where nothing listens


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A folder of four small IDX files that pass for MNIST, and an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    checksums = {}
    for split, names in mnist.MNIST_FILES.items():
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
    monkeypatch.setattr(mnist, "MNIST_SHA256", checksums)
    monkeypatch.setattr(mnist, "MNIST_MIRRORS", (DEAD,))
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
    monkeypatch.setattr(mnist, "MNIST_MIRRORS", (DEAD, server))
    assert mnist_grey("test").y.tolist() == [0, 1, 2]
    monkeypatch.setattr(mnist, "MNIST_MIRRORS", ())
    assert mnist_grey("test").y.tolist() == [0, 1, 2]


def test_a_download_with_another_checksum_is_refused(idx, server, monkeypatch):
    monkeypatch.setattr(mnist, "MNIST_MIRRORS", (server,))
    name = mnist.MNIST_FILES["test"][0]
    (idx / name).write_bytes((idx / name).read_bytes()[:-1] + b"?")
    with pytest.raises(
        RuntimeError, match="could not be downloaded(.|\n)*hash"
    ):
        mnist_grey("test")


@pytest.mark.parametrize("damage", ["another set", "truncated", "not gzip"])
def test_a_wrong_file_in_the_folder_is_refused(idx, monkeypatch, damage):
    monkeypatch.setenv("FLOWCOURSE_DATA", str(idx))
    images, labels = (idx / name for name in mnist.MNIST_FILES["test"])
    content = {
        "another set": labels.read_bytes(),
        "truncated": images.read_bytes()[:-20],
        "not gzip": b"<html>not found</html>",
    }[damage]
    images.write_bytes(content)
    with pytest.raises(
        ValueError,
        match="t10k-images-idx3-ubyte.gz: (the contents|not a whole)",
    ):
        mnist_grey("test")


def test_another_name_than_those_of_mnist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="path: expected a file named train-"):
        mnist.read_idx(tmp_path / "images.gz")


def test_unknown_split():
    with pytest.raises(
        ValueError, match="split: expected train or test, got 'valid'"
    ):
        mnist_grey("valid")


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: mnist_grey(["train"]), "split"),
        (lambda: mnist_grey(np.zeros(2)), "split"),
        (lambda: mnist.read_idx(0), "path"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(ValueError, match=f"^{text}: "):
        call()
