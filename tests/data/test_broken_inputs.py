"""Broken inputs, each made by a small function, and what a user is told of them.

Whatever is wrong: the error is the right one of ours, in one line that names the file, the row or the setting, what was
found there and what to do; nothing is left behind; and where one image is at fault, `data.on_error = skip` leaves out that
one and no other.
"""

import errno
import functools
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import socket
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data.catalog import find_faults
from rcnn.data.loader import load_training_data
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.sources import cifar, download, fingerprint, svhn
from rcnn.data.ingest import run_ingest
from rcnn.errors import ClusterError, ConfigError, DataError, RcnnError, SourceError
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

pytestmark = pytest.mark.timeout(20)  # whatever waits for a broken input waits for ever

Settings = dict[str, Any]

SIDE, PER_CLASS, CLASSES = 8, 10, ("a", "b")
BAD = 3  # the row that is broken, where one is
FOLDER_ROW, PARQUET_ROW = f"train/a/{BAD:02}.png", f"train.parquet#{BAD}"
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int, *shape: int) -> np.ndarray:
    """Random pixels, others for each number; grey 8x8 unless a shape is given."""
    return np.random.default_rng(number).integers(0, 256, shape or (SIDE, SIDE), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, kind, **options)
    return packed.getvalue()


def png_chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_by_hand(width: int, height: int, *more: bytes, data: bytes = b"", crc: int | None = None) -> bytes:
    """A grey PNG that claims a size; its pixels are what `data` holds (black 8x8 by default)."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", data or zlib.compress(bytes((SIDE + 1) * SIDE)), crc)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + png_chunk(b"IEND", b"")


@dataclass
class Scene:
    """A place for one broken input, and what its sound rows hold: label and pixels by row id."""

    root: Path
    storage: str
    patch: pytest.MonkeyPatch
    rows: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def tree(self, bad: bytes | None = None, *, parts: Sequence[str] = ("train",), row: int = BAD) -> Settings:
        """Writes train/<class>/<number>.png; `bad` is the content of one of them."""
        for part in parts:
            for label, name in enumerate(CLASSES):
                for number in range(PER_CLASS):
                    self.image_file(f"{part}/{name}/{number:02}.png", label)
        if bad is not None:
            (self.root / f"train/a/{row:02}.png").write_bytes(bad)
        return self.settings("folder")

    def image_file(self, row_id: str, label: int) -> Path:
        """Writes a sound image."""
        pixels = picture(len(self.rows))
        file = self.root / row_id
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels))
        self.rows[row_id] = (label, pixels.tobytes())
        return file

    def table(self, images: Mapping[int, Any] = {}, labels: Mapping[int, Any] = {}, **options: Any) -> Settings:
        """Writes a Parquet file in which these images and labels take the place of sound ones."""
        self.write_table(self.make_table(images, labels, **options))
        return self.settings("parquet")

    def make_table(
        self,
        images: Mapping[int, Any] = {},
        labels: Mapping[int, Any] = {},
        *,
        file: str = "train.parquet",
        names: Sequence[str] | None = CLASSES,
        label_type: pa.DataType = pa.int64(),
        num_rows: int = PER_CLASS * len(CLASSES),
    ) -> pa.Table:
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for row in range(num_rows):
            pixels, label = picture(row), row % len(CLASSES)
            self.rows[f"{file}#{row}"] = (label, pixels.tobytes())
            rows["image"].append(images.get(row, {"bytes": encoded(pixels), "path": f"{row}.png"}))
            rows["label"].append(labels.get(row, label))
        schema = pa.schema([("image", IMAGE_TYPE), ("label", label_type)], metadata=names and hugging_face(names))
        return pa.table(rows, schema=schema)

    def write_table(self, table: pa.Table, file: str = "train.parquet", **options: Any) -> Path:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
        return path

    def settings(self, source: str, **more: Any) -> Settings:
        return {"data.source": source, "data.root": str(self.root), **{f"data.{key}": more[key] for key in more}}


def hugging_face(names: Any) -> dict[str, str]:
    """The schema's metadata as the datasets library writes it."""
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    (tmp_path / "source").mkdir()
    return Scene(tmp_path / "source", str(tmp_path / "storage"), monkeypatch)


def ingest(scene: Scene, settings: Settings, **more: Any) -> Manifest:
    config = PipelineConfig().with_settings({**settings, **{f"data.{key}": more[key] for key in more}})
    storage = Storage(scene.storage)
    run_ingest(config, StageFolder(storage, "datasets/x"), NoTracker())
    return require_manifest(storage, "datasets/x")


def check_message(error: RcnnError, words: Sequence[str]) -> None:
    """In one line: what, where, what to do; the same after a journey between processes."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert error.remedy, message
    assert message.endswith(error.remedy), message
    for word in words:
        assert word in message
    assert message.encode()  # it can be printed
    assert str(pickle.loads(pickle.dumps(error))) == message


def check_nothing_left(scene: Scene) -> None:
    """No data set, no draft, no half file; but for locks."""
    above = scene.root.parent
    assert [str(file) for file in above.rglob("*.part")] == []
    kept = [path for path in Path(scene.storage).rglob("*") if not path.is_dir()]
    assert [path for path in kept if not path.name.endswith(".lock")] == []
    assert [str(path) for path in Path(scene.storage).glob("datasets/*")] == []


def contents(folder: Path) -> dict[str, object]:
    """All that is in a folder, links and pipes included."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path)] = (state.st_mode, path.read_bytes() if stat.S_ISREG(state.st_mode) else state.st_size)
    return found


def check_refused(scene: Scene, settings: Settings, kind: type[RcnnError], words: Sequence[str]) -> None:
    before = contents(scene.root)
    with pytest.raises(RcnnError) as caught:
        ingest(scene, settings)
    assert type(caught.value) is kind, repr(caught.value)
    check_message(caught.value, [word.format(root=scene.root) for word in words])
    check_nothing_left(scene)
    assert contents(scene.root) == before


def check_left_out(scene: Scene, settings: Settings, row: str, words: Sequence[str]) -> None:
    """One row is left out and listed; label and pixels of all the others are in the data set."""
    before = contents(scene.root)
    manifest = ingest(scene, settings, on_error="skip")
    assert [skipped.row_id for skipped in manifest.skipped] == [row]
    [reason] = [skipped.reason for skipped in manifest.skipped]
    assert len(reason.splitlines()) == 1
    for word in words:
        assert word in f"{row} {reason}"
    assert stored_rows(scene) == {name: content for name, content in scene.rows.items() if name != row}
    assert sum(split.rows for split in manifest.splits.values()) == len(scene.rows) - (row in scene.rows)
    assert list(find_faults(Storage(scene.storage), "datasets/x")) == []
    assert [path.name for path in Path(scene.storage, "datasets").iterdir()] == ["x"]
    assert contents(scene.root) == before


def stored_rows(scene: Scene) -> dict[str, tuple[int, bytes]]:
    found = {}
    for file in Path(scene.storage, "datasets/x").rglob("*.parquet"):
        table = pq.read_table(file)
        images = table["image"].combine_chunks().to_numpy_ndarray()
        for row_id, label, pixels in zip(table["row_id"].to_pylist(), table["label"].to_pylist(), images, strict=True):
            found[row_id] = (label, pixels.tobytes())
    return found


@dataclass(frozen=True)
class Case:
    """A broken input: what makes it, and what the message must hold besides a remedy."""

    make: Callable[..., Any]
    words: tuple[str, ...]
    kind: type[RcnnError] = DataError
    row: str = ""
    settings: Settings = field(default_factory=dict)
    is_always_bad: bool = False


def named(cases: Sequence[Case]) -> list[Any]:
    return [pytest.param(case, id=case.make.__name__) for case in cases]


# ------------------------------------------------------------------------------------------------------------------
# Images that cannot be taken: one among sound ones, in a folder and in a Parquet file.

IMAGES: list[Case] = []


def image(*words: str, is_always_bad: bool = True, **settings: Any) -> Callable[[Any], Any]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        given = {f"data.{key}": value for key, value in settings.items()}
        IMAGES.append(Case(functools.cache(make), words, settings=given, is_always_bad=is_always_bad))
        return make

    return register


@image("empty")
def no_bytes() -> bytes:
    return b""


@image("no image that can be read")
def random_bytes() -> bytes:
    return np.random.default_rng(0).bytes(300)


@image("no image that can be read")
def a_text() -> bytes:
    return b"this is not an image\n" * 20


@image("no image that can be read")
def a_zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.png", encoded(picture(0)))
    return packed.getvalue()


@image("no image that can be read")
def an_svg() -> bytes:
    return b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'


@image("no image that can be read")
def an_eps() -> bytes:
    return encoded(picture(0), "EPS")


@image("no image that can be read")
def a_picture_of_another_format() -> bytes:
    return encoded(picture(0), "ICO")


@image("no image that can be read")
def a_png_of_its_signature_alone() -> bytes:
    return encoded(picture(0))[:8]


@image("no image that can be read")
def a_png_with_a_broken_header_crc() -> bytes:
    content = bytearray(encoded(picture(0)))
    content[29] ^= 0xFF  # the CRC of IHDR
    return bytes(content)


@image("cannot be decoded", is_always_bad=False)
def a_png_with_a_broken_pixel_crc() -> bytes:
    data = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in picture(0)), 0))
    checksum = zlib.crc32(b"IDAT" + data)
    data[30] ^= 0x10  # a pixel
    return png_by_hand(SIDE, SIDE, data=bytes(data), crc=checksum)


@image("cannot be decoded", is_always_bad=False)
def a_png_with_corrupt_pixels() -> bytes:
    return png_by_hand(SIDE, SIDE, data=b"\xff" * 40)


@image("cannot be decoded", "truncated", is_always_bad=False)
def a_truncated_png() -> bytes:
    content = encoded(picture(0))
    return content[: len(content) - 40]


@image("cannot be decoded", "truncated", is_always_bad=False)
def a_truncated_jpeg() -> bytes:
    content = encoded(picture(0, SIDE, SIDE), "JPEG")
    return content[: len(content) - 20]


@image("no image that can be read")
def a_truncated_webp() -> bytes:
    content = encoded(picture(0, SIDE, SIDE, 3), "WEBP", lossless=True)
    return content[: len(content) - 60]


@image("cannot be decoded", is_always_bad=False)
def a_truncated_gif() -> bytes:
    content = encoded(picture(0), "GIF")
    return content[: len(content) - 40]


@image("cannot be decoded", is_always_bad=False)
def a_truncated_tiff() -> bytes:
    content = encoded(picture(0), "TIFF")
    return content[: len(content) - 20]


@image("cannot be decoded", is_always_bad=False)
def a_truncated_bmp() -> bytes:
    content = encoded(picture(0), "BMP")
    return content[: len(content) - 20]


@image("cannot be decoded", is_always_bad=False)
def a_truncated_pgm() -> bytes:
    content = encoded(picture(0), "PPM")
    return content[: len(content) - 20]


@image("30000x30000", "data.max_megapixels = 64")
def a_decompression_bomb() -> bytes:
    return png_by_hand(30_000, 30_000, data=zlib.compress(bytes(1_000_000)))


@image("12000x12000", "data.max_megapixels = 64")
def an_image_that_pillow_warns_of() -> bytes:
    return png_by_hand(12_000, 12_000)


@image("1001x1000", "data.max_megapixels = 1", max_megapixels=1)
def an_image_above_the_limit() -> bytes:
    return encoded(np.zeros((1000, 1001), np.uint8))


@image("can")
def a_png_with_a_bomb_of_a_comment() -> bytes:
    return png_by_hand(SIDE, SIDE, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000))))


@image("can", is_always_bad=False)
def a_png_with_broken_exif() -> bytes:
    return png_by_hand(SIDE, SIDE, png_chunk(b"eXIf", b"neither II nor MM"))


@image("9x8", "8x8", "data.image_size", is_always_bad=False)
def an_image_of_another_size() -> bytes:
    return encoded(picture(0, 8, 9))


@image("in colour", "data.color", is_always_bad=False)
def a_colour_image_among_grey_ones() -> bytes:
    return encoded(picture(0, SIDE, SIDE, 3))


@pytest.mark.parametrize("case", named(IMAGES))
def test_a_broken_image_file_is_named(scene: Scene, case: Case) -> None:
    check_refused(scene, scene.tree(case.make()) | case.settings, DataError, (FOLDER_ROW, *case.words))


@pytest.mark.parametrize("case", named(IMAGES))
def test_a_broken_image_file_is_left_out_on_demand(scene: Scene, case: Case) -> None:
    check_left_out(scene, scene.tree(case.make()) | case.settings, FOLDER_ROW, case.words)
