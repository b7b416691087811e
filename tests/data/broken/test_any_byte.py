"""Source files in which any byte may be another."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rcnn.data.sources import decode
from rcnn.errors import RcnnError, SourceError
from tests.data.broken.scene import (
    CLASSES,
    Scene,
    Settings,
    check_message,
    check_nothing_left,
    encoded,
    flip,
    ingest,
    picture,
    positions_of,
    sound_image,
    stored_rows,
)

pytestmark = pytest.mark.long

NUM_ROWS = b"\x16\x28"  # in a footer: the next field is a number, and it is 20 (in zigzag: 40)
COUNTS_IN_FOOTER = 5  # of the file, of its one row group, and of the values of three columns


@pytest.mark.parametrize("count", [0, 19, 21, 63])
@pytest.mark.parametrize("place", range(COUNTS_IN_FOOTER))
def test_a_parquet_file_that_miscounts_its_rows_is_named(scene: Scene, place: int, count: int) -> None:
    file = scene.write_table(scene.make_table())
    content = bytearray(file.read_bytes())
    places = [at for at in positions_of(bytes(content), NUM_ROWS) if at > len(content) - footer_size(content)]
    assert len(places) == COUNTS_IN_FOOTER
    content[places[place] + 1] = 2 * count
    file.write_bytes(content)
    error = error_of(scene, scene.settings("parquet"))
    if error is None:
        assert stored_rows(scene) == scene.rows
    else:
        assert type(error) is SourceError
        check_message(error, ["train.parquet"])


def footer_size(content: bytes) -> int:
    (size,) = struct.unpack("<I", content[-8:-4])
    return int(size) + 8


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_a_root_whose_name_is_no_utf8_is_taken_or_told(scene: Scene, source: str) -> None:
    scene.root = scene.root.parent / os.fsdecode(b"images-\xe9")
    try:
        scene.root.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    check_ingest_ends_well(scene, scene.tree() if source == "folder" else scene.table())


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_bit_anywhere_in_a_parquet_file_raises_nothing_else(scene: Scene, compression: str) -> None:
    file = scene.write_table(scene.make_table(), compression=compression)
    content = file.read_bytes()
    for position in range(0, len(content), 199):
        flip(file, position)
        check_ingest_ends_well(scene, scene.settings("parquet"))
        file.write_bytes(content)


def categories(scene: Scene) -> Path:
    table = scene.make_table(names=None)
    texts = pa.array([CLASSES[label] for label in table["label"].to_pylist()]).dictionary_encode()
    return scene.write_table(table.set_column(1, "label", texts), compression="none")


def external_images(scene: Scene) -> Path:
    for row in range(20):
        (scene.root / f"{row}.png").write_bytes(sound_image(row)[1])
    table = scene.make_table({row: {"bytes": None, "path": f"{row}.png"} for row in range(20)})
    return scene.write_table(table, compression="none")


def labels_of_folders(scene: Scene) -> Path:
    table = scene.make_table(names=None).drop_columns(["label"])
    files = [scene.write_table(table, f"label={name}/train.parquet") for name in CLASSES]
    return files[0]


def booleans(scene: Scene) -> Path:
    labels = {row: bool(row % 2) for row in range(20)}
    return scene.write_table(scene.make_table(labels=labels, label_type=pa.bool_(), names=None))


@pytest.mark.parametrize("layout", [categories, external_images, labels_of_folders, booleans])
def test_a_bit_anywhere_in_a_parquet_file_of_any_layout_raises_nothing_else(
    scene: Scene, layout: Callable[[Scene], Path]
) -> None:
    file = layout(scene)
    content = file.read_bytes()
    for position in range(0, len(content), 61):
        flip(file, position)
        check_ingest_ends_well(scene, scene.settings("parquet"))
        file.write_bytes(content)


@pytest.mark.parametrize("kind", decode.FORMATS)
def test_a_byte_anywhere_in_an_image_raises_nothing_else(scene: Scene, kind: str) -> None:
    settings = scene.tree()
    content = encoded(picture(0), kind)
    for position in range(0, len(content), 1 + len(content) // 6):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        (scene.root / "train/a/00.png").write_bytes(changed)
        check_ingest_ends_well(scene, settings)


def error_of(scene: Scene, settings: Settings, **more: Any) -> RcnnError | None:
    """What ingest raises, if it is one of ours; it leaves nothing behind."""
    try:
        ingest(scene, settings, **more)
    except RcnnError as error:
        check_nothing_left(scene)
        return error
    return None


def check_ingest_ends_well(scene: Scene, settings: Settings) -> None:
    """It succeeds, or tells in one line what is wrong."""
    error = error_of(scene, settings, on_error="skip")
    if error is not None:
        check_message(error, [])
    if Path(scene.storage).exists():  # not where the settings were refused
        shutil.rmtree(scene.storage)
