"""A place for one broken input, and what is asked of the error that it causes.

Whatever is wrong: the error is the right one of ours, in one line that names the file, the row or the setting, what was
found there and what to do; nothing is left behind; and where one image is at fault, `data.on_error = skip` leaves out that
one and no other.
"""

import functools
import io
import json
import pickle
import stat
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data.catalog import find_faults
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.errors import ClusterError, DataError, RcnnError
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

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


@functools.cache
def sound_image(number: int) -> tuple[bytes, bytes]:
    """Pixels, and the PNG of them."""
    return picture(number).tobytes(), encoded(picture(number))


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
        pixels, content = sound_image(len(self.rows))
        file = self.root / row_id
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self.rows[row_id] = (label, pixels)
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
        names: Any = CLASSES,
        label_type: pa.DataType = pa.int64(),
        num_rows: int = PER_CLASS * len(CLASSES),
    ) -> pa.Table:
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for row in range(num_rows):
            (pixels, content), label = sound_image(row), row % len(CLASSES)
            self.rows[f"{file}#{row}"] = (label, pixels)
            rows["image"].append(images.get(row, {"bytes": content, "path": f"{row}.png"}))
            rows["label"].append(labels.get(row, label))
        schema = pa.schema([("image", IMAGE_TYPE), ("label", label_type)], metadata=names and hugging_face(names))
        return pa.table(rows, schema=schema)

    def write_table(self, table: pa.Table, file: str = "train.parquet", **options: Any) -> Path:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            pq.write_table(table, stream, **options)
        return path

    def settings(self, source: str, **more: Any) -> Settings:
        return {"data.source": source, "data.root": str(self.root), **{f"data.{key}": more[key] for key in more}}


def hugging_face(names: Any) -> dict[str, str]:
    """The schema's metadata as the datasets library writes it."""
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}


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
    assert ": : " not in message
    assert message.encode()  # it can be printed
    assert str(pickle.loads(pickle.dumps(error))) == message


def kept(scene: Scene) -> set[str]:
    """All data sets, drafts and files of a storage, but for the locks."""
    storage = Path(scene.storage)
    files = {path for path in storage.rglob("*") if not path.is_dir() and path.suffix != ".lock"}
    return {str(path) for path in files | set(storage.glob("datasets/*"))}


def check_nothing_left(scene: Scene, before: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """No data set, no draft, no half file; what was there before is there still."""
    assert kept(scene) == before
    assert [str(file) for file in scene.root.parent.rglob("*.part")] == []


def check_finished_shards(scene: Scene) -> set[str]:
    """The files of a draft, which is there only if a shard of it is finished."""
    draft = Path(scene.storage, "datasets", ".draft-x")
    files = {str(path) for path in draft.rglob("*") if path.is_file()}
    assert bool(files) == draft.exists() == bool(list(draft.glob("records/*.json")))
    return files | {str(path) for path in [draft] if path.exists()}


def contents(below: Path) -> dict[str, object]:
    """All that is in a folder, links and pipes included."""
    found: dict[str, object] = {}
    for path in below.rglob("*"):
        state = path.lstat()
        found[str(path)] = (state.st_mode, path.read_bytes() if stat.S_ISREG(state.st_mode) else state.st_size)
    return found


def check_refused(scene: Scene, settings: Settings, kind: type[RcnnError], words: Sequence[str]) -> None:
    images_before, storage_before = contents(scene.root), kept(scene)
    with pytest.raises(RcnnError) as caught:
        ingest(scene, settings)
    assert type(caught.value) is kind, repr(caught.value)
    check_message(caught.value, [word.format(root=scene.root, storage=scene.storage) for word in words])
    if kind is ClusterError:  # the storage is at fault: what is finished is kept for the next run
        storage_before |= check_finished_shards(scene)
    check_nothing_left(scene, storage_before)
    assert contents(scene.root) == images_before


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
    seconds: int = 20
    remedy: str = ""


def named(cases: Sequence[Case]) -> list[Any]:
    return [
        pytest.param(case, id=case.make.__name__, marks=pytest.mark.timeout(case.seconds))  # a pipe may wait for ever
        for case in cases
    ]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x01
    file.write_bytes(content)


def positions_of(content: bytes, word: bytes) -> list[int]:
    found, position = [], content.find(word)
    while position >= 0:
        found.append(position)
        position = content.find(word, position + 1)
    return found
