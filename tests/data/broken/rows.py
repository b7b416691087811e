"""Rows that cannot be taken, for more than their image."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.broken.images import a_truncated_png, an_svg
from tests.data.broken.scene import BAD, CLASSES, FOLDER_ROW, PARQUET_ROW, Case, Scene, Settings, encoded, picture

ROWS: list[Case] = []


def bad_row(row: str, *words: str, seconds: int = 20) -> Callable[[Any], Any]:
    def register(make: Callable[[Scene], Settings]) -> Callable[[Scene], Settings]:
        ROWS.append(Case(make, words, row=row, seconds=seconds))
        return make

    return register


@bad_row(PARQUET_ROW, "image.bytes is null")
def image_bytes_and_path_null(scene: Scene) -> Settings:
    return scene.table({BAD: {"bytes": None, "path": None}})


def external(scene: Scene, path: str) -> Settings:
    return scene.table({BAD: {"bytes": None, "path": path}})


@bad_row(PARQUET_ROW, "image is not embedded: its bytes are null and its path '3.png' does not exist")
def image_file_missing(scene: Scene) -> Settings:
    return external(scene, "3.png")


@bad_row(PARQUET_ROW, "its bytes are null and its path '../outside.png' leads outside data.root")
def image_file_above_the_root(scene: Scene) -> Settings:
    (scene.root.parent / "outside.png").write_bytes(encoded(picture(0)))
    return external(scene, "../outside.png")


@bad_row(PARQUET_ROW, "its path '/", "outside.png' leads outside data.root")
def image_file_of_an_absolute_path_outside(scene: Scene) -> Settings:
    (scene.root.parent / "outside.png").write_bytes(encoded(picture(0)))
    return external(scene, str(scene.root.parent / "outside.png"))


@bad_row(PARQUET_ROW, "its path 'link.png' leads outside data.root")
def image_file_that_is_a_link_to_one_outside(scene: Scene) -> Settings:
    (scene.root.parent / "outside.png").write_bytes(encoded(picture(0)))
    (scene.root / "link.png").symlink_to("../outside.png")
    return external(scene, "link.png")


@bad_row(PARQUET_ROW, "its path 'folder/outside.png' leads outside data.root")
def image_file_behind_a_link_to_a_folder_outside(scene: Scene) -> Settings:
    (scene.root.parent / "outside").mkdir()
    (scene.root.parent / "outside/outside.png").write_bytes(encoded(picture(0)))
    (scene.root / "folder").symlink_to("../outside")
    return external(scene, "folder/outside.png")


@bad_row(PARQUET_ROW, "its path '../source-2/x.png' leads outside data.root")
def image_file_in_a_folder_whose_name_begins_like_the_root(scene: Scene) -> Settings:
    (scene.root.parent / "source-2").mkdir()
    (scene.root.parent / "source-2/x.png").write_bytes(encoded(picture(0)))
    return external(scene, "../source-2/x.png")


@bad_row(PARQUET_ROW, "its path 'link.png' does not exist")
def image_file_that_is_a_link_to_itself(scene: Scene) -> Settings:
    (scene.root / "link.png").symlink_to("link.png")
    return external(scene, "link.png")


@bad_row(PARQUET_ROW, "its path 'pipe.png' is not a file", seconds=3)
def image_file_that_is_a_pipe(scene: Scene) -> Settings:
    os.mkfifo(scene.root / "pipe.png")
    return external(scene, "pipe.png")


@bad_row(PARQUET_ROW, "its path '.' is not a file")
def image_file_that_is_the_root_itself(scene: Scene) -> Settings:
    return external(scene, ".")


@bad_row(PARQUET_ROW, "its path 'folder' is not a file")
def image_file_that_is_a_folder(scene: Scene) -> Settings:
    (scene.root / "folder").mkdir()
    return external(scene, "folder")


@bad_row(PARQUET_ROW, "its path 'train.parquet/0.png' does not exist")
def image_file_in_a_file(scene: Scene) -> Settings:
    return external(scene, "train.parquet/0.png")


@bad_row(PARQUET_ROW, "its file 'train.parquet' is not an image")
def image_file_that_is_the_parquet_file(scene: Scene) -> Settings:
    return external(scene, "train.parquet")


@bad_row(PARQUET_ROW, "its path 'https://a/b.png' is a URL")
def image_file_in_the_web(scene: Scene) -> Settings:
    return external(scene, "https://a/b.png")


@bad_row(PARQUET_ROW, "cannot be a path")
def image_file_with_a_zero_byte_in_its_name(scene: Scene) -> Settings:
    return external(scene, "a\0b")


@bad_row(PARQUET_ROW, "'nnnnnnnnnn", "nnn...' does not exist")
def image_file_of_too_long_a_name(scene: Scene) -> Settings:
    return external(scene, "n" * 100_000)


@bad_row(PARQUET_ROW, "its file 'broken.png' cannot be decoded")
def image_file_that_is_broken(scene: Scene) -> Settings:
    (scene.root / "broken.png").write_bytes(a_truncated_png())
    return external(scene, "broken.png")


@bad_row(PARQUET_ROW, "its path is not UTF-8")
def image_path_not_utf8(scene: Scene) -> Settings:
    table = scene.make_table({BAD: {"bytes": None, "path": "\u00e9.png"}})
    file = scene.write_table(table, compression="none", use_dictionary=False)
    file.write_bytes(file.read_bytes().replace("\u00e9.png".encode(), b"\xff\xff.png"))
    return scene.settings("parquet")


@bad_row(PARQUET_ROW, "label is null, but must be text")
def text_label_null(scene: Scene) -> Settings:
    return text_labels(scene, {BAD: None})


@bad_row(PARQUET_ROW, "label is empty, but must be text")
def text_label_empty(scene: Scene) -> Settings:
    return text_labels(scene, {BAD: ""})


@bad_row(PARQUET_ROW, "label is 'fox', which is not one of the 2 names in the metadata")
def text_label_that_the_metadata_does_not_name(scene: Scene) -> Settings:
    return text_labels(scene, {BAD: "fox"}, names=CLASSES)


@bad_row(PARQUET_ROW, "label is b'\\xff\\xff', which is not UTF-8")
def text_label_not_utf8(scene: Scene) -> Settings:
    settings = text_labels(scene, {BAD: "\u00e9"}, compression="none")
    file = scene.root / "train.parquet"
    file.write_bytes(file.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    return settings


@bad_row(PARQUET_ROW, "label is null, but must be false or true")
def boolean_label_null(scene: Scene) -> Settings:
    labels = {row: bool(row % 2) for row in range(20)} | {BAD: None}
    return scene.table(labels=labels, label_type=pa.bool_(), names=None)


@bad_row(PARQUET_ROW, "label is null, but must be 0 to 1")
def label_null_that_made_pandas_write_floats(scene: Scene) -> Settings:
    return scene.table(labels={BAD: float("nan")}, label_type=pa.float64())


def text_labels(scene: Scene, labels: Mapping[int, Any] = {}, *, names: Any = None, **options: Any) -> Settings:
    """Labels are the classes' names."""
    texts = {row: CLASSES[row % len(CLASSES)] for row in range(20)} | dict(labels)
    table = scene.make_table(labels=texts, label_type=pa.string(), names=names)
    scene.write_table(table, use_dictionary=False, write_statistics=False, **options)
    return scene.settings("parquet")


@bad_row(PARQUET_ROW, "is null")
def image_null(scene: Scene) -> Settings:
    return scene.table({BAD: None})


@bad_row(PARQUET_ROW, "label is null", "0 to 1")
def label_null(scene: Scene) -> Settings:
    return scene.table(labels={BAD: None})


@bad_row("train.parquet#0", "label is null", "0 to 1")
def first_label_null(scene: Scene) -> Settings:
    return scene.table(labels={0: None})


@bad_row(PARQUET_ROW, "label is null", "0 to 1")
def label_null_among_unsigned_ones(scene: Scene) -> Settings:
    return scene.table(labels={BAD: None}, label_type=pa.uint8())


@bad_row(PARQUET_ROW, "label is null", "0 or above")
def label_null_without_names(scene: Scene) -> Settings:
    return scene.table(labels={BAD: None}, names=None)


@bad_row(PARQUET_ROW, "label is -1", "0 to 1")
def label_negative(scene: Scene) -> Settings:
    return scene.table(labels={BAD: -1})


@bad_row(PARQUET_ROW, "label is -7", "0 or above")
def label_negative_without_names(scene: Scene) -> Settings:
    return scene.table(labels={BAD: -7}, names=None)


@bad_row(PARQUET_ROW, "label is 2", "0 to 1")
def label_beyond_the_names(scene: Scene) -> Settings:
    return scene.table(labels={BAD: 2})


@bad_row(PARQUET_ROW, "label is 18446744073709551615", "0 to 1")
def label_beyond_all_numbers(scene: Scene) -> Settings:
    return scene.table(labels={BAD: 2**64 - 1}, label_type=pa.uint64())


@bad_row("deep/train-00001.parquet#3", "label is 5")
def label_in_the_second_of_two_files(scene: Scene) -> Settings:
    scene.write_table(scene.make_table(file="deep/train-00000.parquet"), "deep/train-00000.parquet")
    second = scene.make_table(labels={BAD: 5}, file="deep/train-00001.parquet")
    scene.write_table(second, "deep/train-00001.parquet", row_group_size=2)
    return scene.settings("parquet")


def tree_with_link(scene: Scene, name: str, *, to: str | Path) -> Settings:
    """A whole tree of images, and a link in it."""
    settings = scene.tree()
    (scene.root / name).symlink_to(to)
    return settings


def tree_with_file(scene: Scene, name: str, content: bytes) -> Settings:
    """A whole tree of images, and a file in it."""
    settings = scene.tree()
    (scene.root / name).write_bytes(content)
    return settings


@bad_row("train/a/link.png", "outside data.root", "outside.png")
def link_to_a_file_outside(scene: Scene) -> Settings:
    outside = scene.root.parent / "outside.png"
    outside.write_bytes(encoded(picture(0)))
    return tree_with_link(scene, "train/a/link.png", to=outside)


@bad_row("train/a/link.png", "nothing.png")
def link_to_nothing(scene: Scene) -> Settings:
    return tree_with_link(scene, "train/a/link.png", to="nothing.png")


@bad_row("train/a/link.png", "is not a file")
def link_to_a_folder(scene: Scene) -> Settings:
    return tree_with_link(scene, "train/a/link.png", to="../b")


@bad_row("train/a/link.png", "link")
def link_to_itself(scene: Scene) -> Settings:
    return tree_with_link(scene, "train/a/link.png", to="link.png")


@bad_row("train/a/more", "more", "outside data.root")
def link_to_a_folder_outside(scene: Scene) -> Settings:
    outside = scene.root.parent / "outside"
    outside.mkdir()
    (outside / "00.png").write_bytes(encoded(picture(0)))
    return tree_with_link(scene, "train/a/more", to=outside)


@bad_row(r"train/b/\udce9.png", "not UTF-8")
def name_not_utf8(scene: Scene) -> Settings:
    settings = scene.tree()
    try:
        (scene.root / "train/b" / os.fsdecode(b"\xe9.png")).write_bytes(encoded(picture(0)))
    except OSError:
        pytest.skip("this file system takes no such name")
    return settings


@bad_row("train/a/03.svg", "is an SVG file")
def file_of_another_kind(scene: Scene) -> Settings:
    return tree_with_file(scene, "train/a/03.svg", an_svg())


@bad_row("train/a/03", "is empty")
def file_without_an_ending(scene: Scene) -> Settings:
    return tree_with_file(scene, "train/a/03", b"")


@bad_row("train/03.png", "is not in a class folder")
def file_without_a_class(scene: Scene) -> Settings:
    return tree_with_file(scene, "train/03.png", encoded(picture(0)))


@bad_row("train/a/loop", "is circular")
def link_in_circles(scene: Scene) -> Settings:
    return tree_with_link(scene, "train/a/loop", to="../..")


@bad_row("train/a/loop", "is circular")
def followed_link_in_circles(scene: Scene) -> Settings:
    return link_in_circles(scene) | {"data.follow_links": True}


@bad_row(FOLDER_ROW, "cannot be read")
def file_unreadable(scene: Scene) -> Settings:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    settings = scene.tree()
    (scene.root / FOLDER_ROW).chmod(0)
    return settings


@bad_row("train/a/socket.png", "cannot be read")
def socket_for_an_image(scene: Scene) -> Settings:
    settings = scene.tree()
    scene.patch.chdir(scene.root / "train/a")  # the address of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.png")
    return settings


@bad_row("train/a/pipe.png", seconds=3)
def pipe_for_an_image(scene: Scene) -> Settings:
    settings = scene.tree()
    os.mkfifo(scene.root / "train/a/pipe.png")
    return settings
