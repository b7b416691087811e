"""The official files of MNIST, in miniature: the real code, with checksums of files that the test makes."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rcnn.config import DataConfig
from rcnn.data import sources
from rcnn.data.sources import read_source
from rcnn.errors import SourceError

SHARED_MNIST = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four packed files of 20 and 10 digits, which the code takes for the official ones."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    checksums = {}
    for prefix, rows in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        labels = (np.arange(rows) % 10).astype(np.uint8)
        contents = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">IIII", 2051, rows, 28, 28) + images.tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">II", 2049, rows) + labels.tobytes(),
        }
        for name, content in contents.items():
            packed = gzip.compress(content)
            (folder / f"{name}.gz").write_bytes(packed)
            checksums[name] = (hashlib.md5(packed).hexdigest(), hashlib.md5(content).hexdigest())
    monkeypatch.setattr(sources, "MNIST_FILES", checksums)
    return folder


@pytest.fixture
def server(small_mnist: Path) -> Iterator[str]:
    """The folder over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(small_mnist))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_the_sample_holds_500_of_each_digit(tmp_path: Path) -> None:
    images, labels = read_source(DataConfig(source="mnist-sample"), tmp_path).arrays["train"]
    assert images.shape == (5000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [500] * 10
    assert list(tmp_path.iterdir()) == []


def test_mnist_is_downloaded_checked_and_read(server: str, tmp_path: Path) -> None:
    images = read_source(DataConfig(source="mnist", mirror=server), tmp_path / "downloads")
    assert {split: arrays[0].shape for split, arrays in images.arrays.items()} == {
        "train": (20, 28, 28, 1),
        "test": (10, 28, 28, 1),
    }
    assert images.arrays["test"][1].tolist() == list(range(10))


def test_what_was_downloaded_is_not_fetched_again(server: str, small_mnist: Path, tmp_path: Path) -> None:
    data = DataConfig(source="mnist", mirror=server)
    read_source(data, tmp_path / "downloads")
    for file in small_mnist.iterdir():
        file.unlink()
    assert len(read_source(data, tmp_path / "downloads").arrays["train"][1]) == 20


def test_a_download_with_another_checksum_is_named_and_removed(server: str, small_mnist: Path, tmp_path: Path) -> None:
    (small_mnist / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(SourceError, match=r"train-images-idx3-ubyte\.gz: could not be downloaded .*corrupted"):
        read_source(DataConfig(source="mnist", mirror=server), tmp_path / "downloads")
    assert list((tmp_path / "downloads").rglob("*.gz")) == []


def test_a_mirror_without_the_file_is_named_and_may_be_tried_again(server: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="404") as caught:
        read_source(DataConfig(source="mnist", mirror=f"{server}/nowhere"), tmp_path / "downloads")
    assert caught.value.retryable


@pytest.mark.parametrize("below", ["", "MNIST/raw", "raw"])
def test_a_local_root_is_read_where_it_is(small_mnist: Path, tmp_path: Path, below: str) -> None:
    root = tmp_path / "root"
    (root / below).mkdir(parents=True)
    for file in small_mnist.iterdir():
        (root / below / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert len(read_source(DataConfig(source="mnist", root=str(root)), tmp_path).arrays["test"][1]) == 10


def test_wrong_local_files_are_named(small_mnist: Path, tmp_path: Path) -> None:
    data = DataConfig(source="mnist", root=str(small_mnist))
    with pytest.raises(SourceError, match=r"data\.root = .*holds none of MNIST's files"):
        read_source(DataConfig(source="mnist", root=str(tmp_path / "empty")), tmp_path)
    (small_mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(SourceError, match="MD5"):
        read_source(data, tmp_path)
    (small_mnist / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(SourceError, match="cannot be read"):
        read_source(data, tmp_path)
    (small_mnist / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(SourceError, match="train-images-idx3-ubyte: is missing"):
        read_source(data, tmp_path)


@pytest.mark.skipif(not SHARED_MNIST.exists(), reason="the official files are not on this machine")
def test_the_official_files_are_recognised(tmp_path: Path) -> None:
    images = read_source(DataConfig(source="mnist", root=str(SHARED_MNIST)), tmp_path)
    assert images.arrays["train"][0].shape == (60000, 28, 28, 1)
    assert images.arrays["test"][1][:5].tolist() == [7, 2, 1, 0, 4]
