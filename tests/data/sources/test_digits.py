"""MNIST and Fashion-MNIST in miniature: the real code, with checksums of files that the test makes."""

import functools
import gzip
import hashlib
import http.server
import resource
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torchvision

from rcnn.config import DataConfig
from rcnn.data.sources import digits, open_source
from rcnn.data.sources.digits import FASHION_MNIST, MNIST, IdxFiles
from rcnn.data.sources.origin import Origin
from rcnn.errors import SourceError

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"
TORCHVISION = {"mnist": torchvision.datasets.MNIST, "fashion-mnist": torchvision.datasets.FashionMNIST}
TABLES = {"mnist": "MNIST", "fashion-mnist": "FASHION_MNIST"}
TRAIN_IMAGES, TEST_LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """An array as IDX: a magic number that tells its dimensions, its shape, its bytes."""
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def small_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    contents = {}
    for prefix, rows in (("train", 20), ("t10k", 10)):
        contents[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8))
        contents[f"{prefix}-labels-idx1-ubyte"] = idx((np.arange(rows) * 7 % 10).astype(np.uint8))
    return contents


@dataclass
class Miniature:
    """A folder of files that the code takes for the official ones."""

    source: str
    folder: Path
    patch: pytest.MonkeyPatch

    def publish(self, contents: dict[str, bytes]) -> None:
        """Writes the packed files, and makes their checksums the official ones."""
        self.folder.mkdir(exist_ok=True)
        checksums = {}
        for name, content in contents.items():
            packed = gzip.compress(content, mtime=0)
            (self.folder / f"{name}.gz").write_bytes(packed)
            checksums[name] = (hashlib.md5(packed).hexdigest(), hashlib.md5(content).hexdigest())
        table: IdxFiles = getattr(digits, TABLES[self.source])
        self.patch.setattr(digits, TABLES[self.source], replace(table, md5=checksums))

    def copy_to(self, folder: Path, *, packed: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            content = file.read_bytes()
            (folder / (file.name if packed else file.stem)).write_bytes(content if packed else gzip.decompress(content))

    def open(self, root: Path | None = None, **settings: str) -> Origin:
        data = DataConfig(source=self.source, root=str(root or ""), **settings)
        return open_source(data, self.folder.parent / "downloads")


@pytest.fixture(params=TABLES)
def official(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    """20 and 10 images of either data set."""
    miniature = Miniature(request.param, tmp_path / "official", monkeypatch)
    miniature.publish(small_files())
    return miniature


@pytest.fixture
def server(official: Miniature) -> Iterator[str]:
    """The folder over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(official.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def assert_same_as_torchvision(origin: Origin, source: str, root: Path) -> None:
    for part in ("train", "test"):
        expected = TORCHVISION[source](root, train=part == "train")
        block, skipped = origin.cut(part, np.arange(len(origin.labels[part]))).read()
        np.testing.assert_array_equal(block.images[..., 0], expected.data.numpy())
        np.testing.assert_array_equal(block.labels, expected.targets.numpy())
        assert block.images.dtype == np.uint8
        assert block.labels.dtype == np.int64
        assert skipped == []


@pytest.mark.parametrize(("files", "source"), [(MNIST, "mnist"), (FASHION_MNIST, "fashion-mnist")])
def test_checksums_addresses_and_classes_are_torchvisions(files: IdxFiles, source: str) -> None:
    theirs = TORCHVISION[source]
    assert [(f"{name}.gz", md5) for name, (md5, _) in files.md5.items()] == theirs.resources
    assert list(files.mirrors) == theirs.mirrors
    assert list(files.classes) == [name.split(" - ")[0] for name in theirs.classes]


def test_the_files_are_read_as_torchvision_reads_them(official: Miniature, tmp_path: Path) -> None:
    root = tmp_path / "root"
    official.copy_to(root / TORCHVISION[official.source].__name__ / "raw", packed=False)
    origin = official.open(root)
    assert origin.image_shape == (28, 28, 1)
    assert_same_as_torchvision(origin, official.source, root)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "{}/raw", "raw"])
def test_local_files_are_found_packed_or_not_where_torchvision_puts_them(
    official: Miniature, tmp_path: Path, below: str, packed: bool
) -> None:
    root = tmp_path / "root"
    official.copy_to(root / below.format(TORCHVISION[official.source].__name__), packed=packed)
    origin = official.open(root)
    assert {part: len(labels) for part, labels in origin.labels.items()} == {"train": 20, "test": 10}
    assert not (tmp_path / "downloads").exists()


def test_a_root_may_begin_in_the_home_folder(official: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(official.folder.parent))
    assert len(official.open(Path("~/official")).labels["test"]) == 10


def test_the_record_tells_the_checksum_of_each_content(official: Miniature) -> None:
    record = official.open(official.folder).record
    assert record.name == official.source
    assert record.url.startswith("http")
    expected = {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in small_files().items()}
    assert record.files == expected


def test_files_are_downloaded_from_the_mirror_checked_and_read(
    official: Miniature, server: str, tmp_path: Path
) -> None:
    origin = official.open(mirror=server)
    images = np.frombuffer(small_files()[TRAIN_IMAGES], np.uint8, offset=16).reshape(20, 28, 28, 1)
    np.testing.assert_array_equal(origin.cut("train", np.arange(20)).read()[0].images, images)
    assert len(list((tmp_path / "downloads" / official.source).glob("*.gz"))) == 4


def test_what_was_downloaded_is_not_fetched_again(official: Miniature, server: str) -> None:
    official.open(mirror=server)
    for file in official.folder.iterdir():
        file.unlink()
    assert len(official.open(mirror=server).labels["train"]) == 20


def test_a_download_with_another_checksum_is_named_and_removed(
    official: Miniature, server: str, tmp_path: Path
) -> None:
    (official.folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"something else")
    with pytest.raises(SourceError, match=rf"{TRAIN_IMAGES}\.gz: could not be downloaded .*MD5") as caught:
        official.open(mirror=server)
    assert caught.value.retryable
    assert list((tmp_path / "downloads").rglob(f"{TRAIN_IMAGES}.gz*")) == []


def test_a_folder_without_the_files_is_named(official: Miniature, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SourceError, match=rf"data\.root = {root}: holds none of the files of {official.source}"):
            official.open(root)


def test_a_missing_file_is_named(official: Miniature) -> None:
    (official.folder / f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(SourceError, match=rf"{TEST_LABELS}: is missing\. All four files of {official.source}"):
        official.open(official.folder)


def test_an_altered_packed_file_is_named(official: Miniature) -> None:
    (official.folder / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(small_files()[TRAIN_IMAGES] + b"x"))
    with pytest.raises(SourceError, match=rf"{TRAIN_IMAGES}\.gz: the MD5 of its content is .*, the official"):
        official.open(official.folder)


def test_an_altered_plain_file_is_named(official: Miniature, tmp_path: Path) -> None:
    official.copy_to(tmp_path / "root", packed=False)
    altered = bytearray(small_files()[TRAIN_IMAGES])
    altered[-1] ^= 1
    (tmp_path / "root" / TRAIN_IMAGES).write_bytes(altered)
    with pytest.raises(SourceError, match=rf"{TRAIN_IMAGES}: the MD5 of its content"):
        official.open(tmp_path / "root")


def test_files_of_the_other_data_set_are_recognised(official: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}[official.source]
    mistaken = Miniature(other, official.folder, monkeypatch)
    with pytest.raises(SourceError, match=f"it is a file of {official.source}, but data.source is {other}.*data.root"):
        mistaken.open(official.folder)


def test_files_that_were_packed_again_are_the_official_ones(official: Miniature) -> None:
    for file in official.folder.iterdir():
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=1, mtime=1_000_000))
    assert len(official.open(official.folder).labels["train"]) == 20


def test_of_two_files_the_plain_one_is_read(official: Miniature) -> None:
    official.copy_to(official.folder, packed=False)
    (official.folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"left over")
    assert len(official.open(official.folder).labels["train"]) == 20
    (official.folder / TRAIN_IMAGES).write_bytes(b"altered")
    with pytest.raises(SourceError, match="MD5"):
        official.open(official.folder)


def test_a_packed_file_that_unpacks_without_end_is_refused(official: Miniature) -> None:
    (official.folder / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(bytes(300_000_000), compresslevel=9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match=r"gz: the MD5 of its content"):
        official.open(official.folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


PACKED = gzip.compress(b"x" * 100)


@pytest.mark.parametrize("content", [b"no gzip", PACKED[:-9], PACKED[:-1], b""], ids=["other", "cut", "cut 1", "empty"])
def test_a_broken_packed_file_is_named(official: Miniature, content: bytes) -> None:
    (official.folder / f"{TEST_LABELS}.gz").write_bytes(content)
    with pytest.raises(SourceError, match=rf"{TEST_LABELS}\.gz: (cannot be read|the MD5)"):
        official.open(official.folder)


IMAGES = np.zeros((20, 28, 28), np.uint8)
LABELS = np.zeros(10, np.uint8)


FAULTS = {
    "cut off": (TRAIN_IMAGES, idx(IMAGES)[:-1], "is not the expected IDX file"),
    "too long": (TRAIN_IMAGES, idx(IMAGES) + b"\0", "is not the expected IDX file"),
    "half a header": (TRAIN_IMAGES, idx(IMAGES)[:15], "is not the expected IDX file"),
    "labels for images": (TRAIN_IMAGES, idx(LABELS), "is not the expected IDX file"),
    "images for labels": (TEST_LABELS, idx(IMAGES), "is not the expected IDX file"),
    "overflow": (TRAIN_IMAGES, struct.pack(">4I", 2051, 2**31, 2**31, 4), "is not the expected IDX file"),
    "empty": (TRAIN_IMAGES, b"", "is not the expected IDX file"),
    "one less": (TRAIN_IMAGES, idx(IMAGES[:19]), "holds 19 images, but there are 20 labels"),
    "narrow": (TRAIN_IMAGES, idx(IMAGES[:, :, :27]), "its images are 27x28, but must be 28x28"),
    "label 10": (TEST_LABELS, idx(LABELS + 10), f"{TEST_LABELS}: one of its labels is 10, but must be 0 to 9"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_headers_sizes_and_labels_are_checked(official: Miniature, fault: str) -> None:
    name, content, expected = FAULTS[fault]
    official.publish(small_files() | {name: content})
    with pytest.raises(SourceError, match=expected):
        official.open(official.folder)


@pytest.mark.skipif(not (SHARED_DATA / "MNIST").exists(), reason="the official files are not on this machine")
def test_the_official_files_are_recognised(tmp_path: Path) -> None:
    origin = open_source(DataConfig(source="mnist", root=str(SHARED_DATA)), tmp_path)
    assert {part: len(labels) for part, labels in origin.labels.items()} == {"train": 60000, "test": 10000}
    assert_same_as_torchvision(origin, "mnist", SHARED_DATA)
