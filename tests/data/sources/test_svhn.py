"""SVHN in miniature: MATLAB files that scipy writes, and that torchvision reads too."""

import functools
import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from scipy.io import savemat

from rcnn.config import DataConfig
from rcnn.data.sources import open_source, svhn
from rcnn.data.sources.origin import Origin
from rcnn.data.sources.svhn import URL
from rcnn.errors import SourceError

ROWS = {"train": 12, "test": 7, "extra": 5}
SPLITS = torchvision.datasets.SVHN.split_list


def matlab_file(tree: dict[str, Any], *, is_packed: bool = True) -> bytes:
    stream = io.BytesIO()
    savemat(stream, tree, do_compression=is_packed)
    return stream.getvalue()


def small_tree(part: str) -> dict[str, np.ndarray]:
    """Images as SVHN keeps them, (H, W, C, N), and labels 1 to 10 as a column."""
    rng = np.random.default_rng(ROWS[part])
    labels = (np.arange(ROWS[part], dtype=np.uint8) % 10 + 1)[:, None]
    return {"X": rng.integers(0, 256, (32, 32, 3, ROWS[part]), dtype=np.uint8), "y": labels}


def publish(folder: Path, part: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a part's file, and makes its checksum the official one, for torchvision too."""
    (folder / f"{part}_32x32.mat").write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(svhn.MD5, part, md5)
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, part, [*SPLITS[part][:2], md5])


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "official"
    folder.mkdir()
    for part in ROWS:
        publish(folder, part, matlab_file(small_tree(part)), monkeypatch)
    return folder


@pytest.fixture
def server(official: Path) -> Iterator[str]:
    """The folder over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(official))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def opened(root: Path | str, downloads: Path = Path("unused"), **settings: Any) -> Origin:
    return open_source(DataConfig(source="svhn", root=str(root), **settings), downloads)


def assert_same_as_torchvision(origin: Origin, folder: Path, part: str, their_parts: list[str]) -> None:
    theirs = [torchvision.datasets.SVHN(folder, split=name) for name in their_parts]
    block = origin.cut(part, np.arange(len(origin.labels[part]))).read()[0]
    np.testing.assert_array_equal(block.images, np.concatenate([of.data for of in theirs]).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(block.labels, np.concatenate([of.labels for of in theirs]))
    assert block.images.flags.c_contiguous
    assert block.labels.dtype == np.int64


def test_checksums_and_addresses_are_torchvisions() -> None:
    ours = {part: [f"{URL}{part}_32x32.mat", f"{part}_32x32.mat", md5] for part, md5 in svhn.MD5.items()}
    assert ours == SPLITS


@pytest.mark.parametrize("is_packed", [True, False])
def test_pixels_and_labels_are_torchvisions(official: Path, monkeypatch: pytest.MonkeyPatch, is_packed: bool) -> None:
    publish(official, "train", matlab_file(small_tree("train"), is_packed=is_packed), monkeypatch)
    origin = opened(official)
    assert {part: len(labels) for part, labels in origin.labels.items()} == {"train": 12, "test": 7}
    assert origin.image_shape == (32, 32, 3)
    for part in ("train", "test"):
        assert_same_as_torchvision(origin, official, part, [part])


def test_label_10_stands_for_the_digit_0(official: Path) -> None:
    origin = opened(official)
    assert origin.labels["train"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert origin.classes == tuple("0123456789")


def test_the_extra_part_is_added_to_the_training_rows(official: Path) -> None:
    origin = opened(official, svhn_extra=True)
    assert {part: len(labels) for part, labels in origin.labels.items()} == {"train": 17, "test": 7}
    assert_same_as_torchvision(origin, official, "train", ["train", "extra"])
    assert_same_as_torchvision(origin, official, "test", ["test"])
    assert set(origin.record.files) == {"train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"}


def test_without_the_extra_part_its_file_is_not_needed(official: Path) -> None:
    (official / "extra_32x32.mat").unlink()
    assert set(opened(official).record.files) == {"train_32x32.mat", "test_32x32.mat"}
    with pytest.raises(SourceError, match=r"extra_32x32\.mat: is missing"):
        opened(official, svhn_extra=True)


def test_files_are_downloaded_once_from_the_mirror(official: Path, server: str, tmp_path: Path) -> None:
    origin = opened("", tmp_path / "downloads", mirror=server)
    assert_same_as_torchvision(origin, official, "train", ["train"])
    names = [file.name for file in (tmp_path / "downloads" / "svhn").glob("*.mat")]
    assert sorted(names) == ["test_32x32.mat", "train_32x32.mat"]
    for file in official.iterdir():
        file.unlink()
    assert len(opened("", tmp_path / "downloads", mirror=server).labels["train"]) == 12


def test_the_record_tells_address_and_checksums(official: Path) -> None:
    record = opened(official).record
    assert (record.name, record.url) == ("svhn", URL)
    assert (
        record.files["test_32x32.mat"] == f"md5:{hashlib.md5((official / 'test_32x32.mat').read_bytes()).hexdigest()}"
    )


def test_a_missing_file_is_named(official: Path, tmp_path: Path) -> None:
    (official / "test_32x32.mat").unlink()
    with pytest.raises(SourceError, match=rf"{official}/test_32x32\.mat: is missing\. Point data\.root"):
        opened(official)
    with pytest.raises(SourceError, match=r"nowhere/train_32x32\.mat: is missing"):
        opened(tmp_path / "nowhere")


def test_an_altered_file_is_named(official: Path) -> None:
    file = official / "train_32x32.mat"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(SourceError, match=rf"{file}: the MD5 of its content is .*, the official file's is"):
        opened(official)


TREE = small_tree("train")
WHOLE = matlab_file(TREE)
NO_MATLAB_FILE = "is not a MATLAB file with X and y"
FAULTS = {
    "empty": (b"", NO_MATLAB_FILE),
    "other": (b"no MATLAB file" * 100, NO_MATLAB_FILE),
    "version 7.3": (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", NO_MATLAB_FILE),
    "half": (WHOLE[: len(WHOLE) // 2], NO_MATLAB_FILE),
    "almost whole": (WHOLE[:-1], NO_MATLAB_FILE),
    "no y": (matlab_file({"X": TREE["X"]}), NO_MATLAB_FILE),
    "no X": (matlab_file({"y": TREE["y"]}), NO_MATLAB_FILE),
    "text": (matlab_file(TREE | {"y": "labels"}), NO_MATLAB_FILE),
    "one label less": (matlab_file(TREE | {"y": TREE["y"][1:]}), "y has 11 labels"),
    "grey": (matlab_file(TREE | {"X": TREE["X"][:, :, :1]}), r"X is uint8 \(32, 32, 1, 12\)"),
    "small": (matlab_file(TREE | {"X": TREE["X"][1:]}), r"X is uint8 \(31, 32, 3, 12\)"),
    "floats": (matlab_file(TREE | {"X": TREE["X"] / 255}), "X is float64"),
    "label 11": (matlab_file(TREE | {"y": TREE["y"] + 1}), "its labels are 2 to 11, but must be 0 to 10"),
    "label -1": (matlab_file(TREE | {"y": TREE["y"] * -1.0}), "its labels are -10 to -1, but must be 0 to 10"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_something_else_is_named(official: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    content, expected = FAULTS[fault]
    publish(official, "train", content, monkeypatch)
    with pytest.raises(SourceError, match=rf"train_32x32\.mat: .*{expected}"):
        opened(official)
