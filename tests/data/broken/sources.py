"""Sources that cannot be taken as a whole."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcnn.errors import DataError, RcnnError, SourceError
from tests.data.broken.images import a_zip
from tests.data.broken.rows import text_labels
from tests.data.broken.scene import BAD, CLASSES, Case, Scene, Settings, encoded, picture

SOURCES: list[Case] = []


def source(kind: type[RcnnError], *words: str) -> Callable[[Any], Any]:
    def register(make: Callable[[Scene], Settings]) -> Callable[[Scene], Settings]:
        SOURCES.append(Case(make, words, kind))
        return make

    return register


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_truncated(scene: Scene) -> Settings:
    settings = scene.table()
    file = scene.root / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return settings


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_without_its_end(scene: Scene) -> Settings:
    settings = scene.table()
    file = scene.root / "train.parquet"
    content = file.read_bytes()
    (size,) = struct.unpack("<I", content[-8:-4])
    file.write_bytes(content[: len(content) // 3] + content[-size - 8 :])  # a footer that points beyond the end
    return settings


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_of_no_bytes(scene: Scene) -> Settings:
    (scene.root / "train.parquet").touch()
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_that_is_a_text(scene: Scene) -> Settings:
    (scene.root / "train.parquet").write_text("image,label\n1.png,0\n" * 50)
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_with_a_huge_footer(scene: Scene) -> Settings:
    settings = scene.table()
    file = scene.root / "train.parquet"
    file.write_bytes(file.read_bytes()[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1")
    return settings


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file", "codec can't decode byte 0xff")
def parquet_with_a_column_name_that_is_not_utf8(scene: Scene) -> Settings:
    file = scene.write_table(scene.make_table(names=None))
    file.write_bytes(file.read_bytes().replace(b"label", b"l\xffbel"))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "row group 0", "{root}", "not a valid Parquet file")
def parquet_with_a_damaged_page_of_images(scene: Scene) -> Settings:
    file = scene.write_table(scene.make_table(), compression="gzip")
    overwrite_column(file, 0)
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_with_a_damaged_page_of_labels(scene: Scene) -> Settings:
    file = scene.write_table(scene.make_table(), compression="gzip")
    overwrite_column(file, 2)
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "{root}", "not a valid Parquet file")
def parquet_with_a_label_page_that_its_checksum_tells(scene: Scene) -> Settings:
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    file = scene.write_table(scene.make_table(), **options)
    content = file.read_bytes()
    labels = b"".join(struct.pack("<q", row % 2) for row in range(20))
    assert content.count(labels) == 1
    file.write_bytes(content.replace(labels, labels[:8] + labels[:8] + labels[16:]))  # row 1 changes its class
    return scene.settings("parquet")


def overwrite_column(file: Path, number: int) -> None:
    """Puts nonsense into the middle of a column chunk."""
    column = pq.read_metadata(file).row_group(0).column(number)
    content = bytearray(file.read_bytes())
    middle = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    content[middle : middle + 8] = b"\xff" * 8
    file.write_bytes(content)


@source(
    SourceError,
    "train.parquet in",
    "none of its first 2 images is embedded or found",
    "the path '0.png' does not exist",
)
def image_column_of_strings_without_the_files(scene: Scene) -> Settings:
    scene.write_table(pa.table({"image": ["0.png", "1.png"], "label": [0, 1]}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet in", "none of its first 20 images", "its path '0.png' does not exist", "{root}")
def images_that_are_all_elsewhere(scene: Scene) -> Settings:
    return scene.table({row: {"bytes": None, "path": f"{row}.png"} for row in range(20)})


@source(SourceError, "test-0.parquet in", "is embedded or found, nor of 1 more files", "(test-0.parquet#0: ")
def images_of_two_test_files_that_are_all_elsewhere(scene: Scene) -> Settings:
    settings = scene.table()
    for number in range(2):
        lost = scene.make_table({row: {"bytes": None, "path": f"{row}.png"} for row in range(20)})
        scene.write_table(lost, f"test-{number}.parquet")
    return settings


@source(SourceError, "train.parquet", "'image'", "list<element: struct<bytes: binary", "one image a row")
def image_column_of_lists(scene: Scene) -> Settings:
    images = [[{"bytes": encoded(picture(row)), "path": None}] for row in range(2)]
    scene.write_table(pa.table({"image": images, "label": [0, 1]}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'image'", "extension<arrow.fixed_shape_tensor")
def image_column_of_pixels(scene: Scene) -> Settings:
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([picture(0), picture(1)]))
    scene.write_table(pa.table({"image": pixels, "label": [0, 1]}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'label'", "list<element: int64>", "one label a row")
def label_column_of_lists(scene: Scene) -> Settings:
    scene.write_table(pa.table({"image": [encoded(picture(0))], "label": [[0, 1]]}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'image'", "string")
def image_struct_of_strings(scene: Scene) -> Settings:
    scene.write_table(pa.table({"image": [{"bytes": "0"}, {"bytes": "1"}], "label": [0, 1]}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'image'", "list")
def image_struct_of_numbers(scene: Scene) -> Settings:
    scene.write_table(pa.table({"image": [{"bytes": [1, 2]}, {"bytes": [3]}], "label": [0, 1]}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'image'", "struct<size: int64>")
def image_struct_without_bytes_and_path(scene: Scene) -> Settings:
    scene.write_table(pa.table({"image": [{"size": 1}, {"size": 2}], "label": [0, 1]}))
    return scene.settings("parquet")


@source(
    SourceError, "train.parquet", "row 3 of column 'label' (double) is 0.5, not a whole number", "data.label_column"
)
def label_column_of_floats(scene: Scene) -> Settings:
    return scene.table(labels={BAD: 0.5}, label_type=pa.float64()) | {"data.on_error": "skip"}


@source(SourceError, "train.parquet", "row 3 of column 'label' (float) is inf, not a whole number")
def label_that_is_infinite(scene: Scene) -> Settings:
    return scene.table(labels={BAD: float("inf")}, label_type=pa.float32())


@source(SourceError, "column 'label' in data.root = {root}", "every row has the label 'cat'", "two or more")
def text_labels_all_alike(scene: Scene) -> Settings:
    return text_labels(scene, dict.fromkeys(range(20), "cat"))


@source(SourceError, "column 'label' in data.root = {root}", "every row has the label 'true'", "two or more")
def boolean_labels_all_alike(scene: Scene) -> Settings:
    return scene.table(labels=dict.fromkeys(range(20), True), label_type=pa.bool_(), names=None)


@source(DataError, "train.parquet#0", "label is 'cat'", "not one of the 2 names", "(the first of 20 bad rows)")
def text_labels_that_the_metadata_does_not_name(scene: Scene) -> Settings:
    return text_labels(scene, dict.fromkeys(range(20), "cat"), names=CLASSES)


@source(
    SourceError,
    "column 'label' in",
    "more than 10 different labels in 20 rows ('0.png', '1.png', ",
    "data.label_column",
)
def text_labels_that_name_rows(scene: Scene) -> Settings:
    return text_labels(scene, {row: f"{row}.png" for row in range(20)})


@source(SourceError, "column 'label' in", "more than 10 different labels in 20 rows ('0', '1', ", "data.label_column")
def numbers_that_name_rows(scene: Scene) -> Settings:
    return scene.table(labels={row: row for row in range(20)}, names=None)


@source(SourceError, "train-2.parquet in", "its labels are int64, but string in train-1.parquet")
def labels_of_other_types_between_files(scene: Scene) -> Settings:
    text_labels(scene)
    (scene.root / "train.parquet").rename(scene.root / "train-1.parquet")
    scene.write_table(scene.make_table(names=None), "train-2.parquet")
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'image' or 'img', only picture, label. Set data.image_column to 'picture'")
def image_column_missing(scene: Scene) -> Settings:
    scene.write_table(scene.make_table().rename_columns(["picture", "label"]))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'label'", "only image, class, id. Set data.label_column to 'class' or 'id'")
def label_column_missing(scene: Scene) -> Settings:
    table = scene.make_table().rename_columns(["image", "class"])
    scene.write_table(table.append_column("id", [[str(row) for row in range(20)]]))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "no column 'lable' (data.label_column), only image, label. Did you mean 'label'?")
def label_column_misspelt(scene: Scene) -> Settings:
    return scene.table() | {"data.label_column": "lable"}


@source(
    SourceError,
    "train.parquet",
    "no column 'x' (data.image_column), only image, label. Set data.image_column to 'image'",
)
def image_column_of_another_name(scene: Scene) -> Settings:
    return scene.table() | {"data.image_column": "x"}


@source(
    SourceError,
    "no column 'x' (data.label_column), only image, c0, c1, ",
    "c8, ... (201 in all). Set ",
    "'c9', ... (200 in all)",
)
def label_column_missing_among_many(scene: Scene) -> Settings:
    table = scene.make_table().drop_columns(["label"])
    for number in range(200):
        table = table.append_column(f"c{number}", [list(range(20))])
    scene.write_table(table)
    return scene.settings("parquet", label_column="x")


@source(
    SourceError, "train.parquet", "no column 'image' or 'img', only x", "Give files with a column of encoded images"
)
def columns_of_which_none_fits(scene: Scene) -> Settings:
    scene.write_table(pa.table({"x": [0.5]}))
    return scene.settings("parquet")


@source(SourceError, "data.label_column", "'image'", "data.image_column")
def one_column_for_images_and_labels(scene: Scene) -> Settings:
    return scene.table() | {"data.image_column": "image", "data.label_column": "image"}


@source(SourceError, "kind=a/0.parquet in", "'fine_label', only image, kind (folders). Set data.label_column to 'kind'")
def label_in_the_folders_of_another_key(scene: Scene) -> Settings:
    for name in CLASSES:
        scene.write_table(scene.make_table().drop_columns(["label"]), f"kind={name}/0.parquet")
    return scene.settings("parquet")


@source(SourceError, "rest.parquet in", "no column 'label'", "only image", "Give files with a column of labels")
def label_in_the_folders_of_some_files(scene: Scene) -> Settings:
    for name in (*(f"label={name}/0.parquet" for name in CLASSES), "rest.parquet"):
        scene.write_table(scene.make_table().drop_columns(["label"]), name)
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "'label'")
def label_column_twice(scene: Scene) -> Settings:
    table = scene.make_table()
    scene.write_table(table.append_column("label", table["label"]))
    return scene.settings("parquet")


@source(SourceError, "{root}", "no rows")
def parquet_without_rows(scene: Scene) -> Settings:
    return scene.table(num_rows=0)


@source(SourceError, "{root}", "no rows")
def parquet_without_rows_and_names(scene: Scene) -> Settings:
    return scene.table(num_rows=0, names=None)


@source(DataError, "train.parquet#0", "label is null")
def labels_all_null(scene: Scene) -> Settings:
    return scene.table(labels=dict.fromkeys(range(20)))


@source(DataError, "train.parquet#0", "label is null")
def labels_all_null_without_names(scene: Scene) -> Settings:
    return scene.table(labels=dict.fromkeys(range(20)), names=None)


@source(DataError, "train.parquet#0", "label is -1")
def labels_of_an_unlabelled_test_set(scene: Scene) -> Settings:
    return scene.table(labels=dict.fromkeys(range(20), -1))


@source(SourceError, "{root}", "the label 2", "1000000000000")
def label_huge_without_names(scene: Scene) -> Settings:
    return scene.table(labels={BAD: 10**12}, names=None)


@source(SourceError, "{root}", "the label 2", "3")
def label_gap_without_names(scene: Scene) -> Settings:
    return scene.table(labels={BAD: 3}, names=None)


@source(SourceError, "{root}", "the label 0", "2")
def labels_from_one_without_names(scene: Scene) -> Settings:
    return scene.table(labels={row: row % 2 + 1 for row in range(20)}, names=None)


@source(SourceError, "{root}", "the label 1", "0")
def labels_all_alike_without_names(scene: Scene) -> Settings:
    return scene.table(labels=dict.fromkeys(range(20), 0), names=None)


@source(SourceError, "{root}", "one class")
def one_name(scene: Scene) -> Settings:
    return scene.table(labels=dict.fromkeys(range(20), 0), names=["a"])


@source(SourceError, "train.parquet", "'a'")
def one_name_twice(scene: Scene) -> Settings:
    return scene.table(names=["a", "a"])


@source(SourceError, "train.parquet", "huggingface")
def names_that_are_one_string(scene: Scene) -> Settings:
    return scene.table(names="ab")


@source(SourceError, "train.parquet", "huggingface")
def names_that_are_a_table(scene: Scene) -> Settings:
    return scene.table(names={"0": "a", "1": "b"})


@source(SourceError, "train.parquet", "huggingface")
def names_that_are_a_number(scene: Scene) -> Settings:
    return scene.table(names=7)


@source(SourceError, "train.parquet", "huggingface")
def metadata_that_is_no_json(scene: Scene) -> Settings:
    scene.write_table(scene.make_table().replace_schema_metadata({"huggingface": '{"info": {\n'}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "huggingface")
def metadata_that_is_no_text(scene: Scene) -> Settings:
    scene.write_table(scene.make_table().replace_schema_metadata({"huggingface": b"\xff\xfe\n\x00"}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "huggingface", "nested too deeply")
def metadata_that_is_nested_too_deeply(scene: Scene) -> Settings:
    scene.write_table(scene.make_table().replace_schema_metadata({"huggingface": "[" * 200_000}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "huggingface", "it names 'info' twice")
def metadata_with_a_key_twice(scene: Scene) -> Settings:
    scene.write_table(scene.make_table().replace_schema_metadata({"huggingface": '{"info": {}, "info": {}}'}))
    return scene.settings("parquet")


@source(SourceError, "train.parquet", "huggingface", "surrogates not allowed")
def name_that_is_half_a_surrogate_pair(scene: Scene) -> Settings:
    return scene.table(names=["a", "\ud83d"])


@source(
    SourceError, "train.parquet", "huggingface", "the class '\u00e9' twice, in two Unicode forms (0 and 2)", "Rename"
)
def one_name_in_two_unicode_forms(scene: Scene) -> Settings:
    return scene.table(names=["\u00e9", "b", "e\u0301"])


@source(SourceError, "train.parquet", "names are 'aaaa", "aaa...)")
def names_that_are_one_long_string(scene: Scene) -> Settings:
    return scene.table(names="a" * 1_000_000)


@source(SourceError, "train.parquet", "huggingface", "'label'")
def metadata_of_another_column(scene: Scene) -> Settings:
    table = scene.make_table()
    text = table.schema.metadata[b"huggingface"].replace(b'"label"', b'"digit"')
    scene.write_table(table.replace_schema_metadata({"huggingface": text}))
    return scene.settings("parquet")


@source(SourceError, "train-2.parquet", "train-1.parquet", "'c'")
def names_that_differ_between_files(scene: Scene) -> Settings:
    for number, names in ((1, ["a", "b"]), (2, ["a", "c"])):
        scene.write_table(scene.make_table(names=names), f"train-{number}.parquet")
    return scene.settings("parquet")


@source(SourceError, "test.parquet", "train.parquet", "'a'", "'b'")
def names_in_another_order(scene: Scene) -> Settings:
    for part, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        scene.write_table(scene.make_table(names=names), f"{part}.parquet")
    return scene.settings("parquet")


@source(SourceError, "train-3.parquet", "train-2.parquet")
def names_that_differ_behind_a_file_without(scene: Scene) -> Settings:
    for number, names in ((1, None), (2, ["a", "b"]), (3, ["a", "c"])):
        scene.write_table(scene.make_table(names=names), f"train-{number}.parquet")
    return scene.settings("parquet")


@source(SourceError, "{root}", "no training file")
def parquet_of_a_test_part_alone(scene: Scene) -> Settings:
    scene.write_table(scene.make_table(), "test-00000.parquet")
    return scene.settings("parquet")


@source(SourceError, "{root}", "no Parquet file. Give")
def parquet_root_empty(scene: Scene) -> Settings:
    return scene.settings("parquet")


@source(
    SourceError,
    "{root}",
    "no Parquet file, only 2 .csv files, 1 file without an ending, 1 .txt file, 3 others, 1 hidden",
)
def parquet_root_of_other_files(scene: Scene) -> Settings:
    (scene.root / ".cache").mkdir()
    for name in ("a.csv", "b.csv", "c.txt", "Makefile", "x.1", "x.2", "x.3", ".hidden", ".cache/train.parquet"):
        (scene.root / name).touch()
    return scene.settings("parquet")


@source(SourceError, "{root}/*.parquet", "no Parquet file that matches '*.parquet', only 1 .PARQUET file")
def parquet_glob_in_other_letters(scene: Scene) -> Settings:
    scene.table()
    (scene.root / "train.parquet").rename(scene.root / "TRAIN.PARQUET")
    return scene.settings("parquet", root=f"{scene.root}/*.parquet")


@source(SourceError, "{root}/nowhere", "no Parquet file")
def parquet_root_missing(scene: Scene) -> Settings:
    return scene.settings("parquet", root=f"{scene.root}/nowhere")


@source(SourceError, "{root}/nothing-*.parquet", "no Parquet file")
def parquet_glob_without_a_match(scene: Scene) -> Settings:
    scene.table()
    return scene.settings("parquet", root=f"{scene.root}/nothing-*.parquet")


@source(SourceError, "no-such://bucket", "cannot be opened")
def parquet_root_of_an_unknown_kind(scene: Scene) -> Settings:
    return scene.settings("parquet", root="no-such://bucket/images")


@source(SourceError, "~nobody-of-this-name/images")
def parquet_root_of_an_unknown_user(scene: Scene) -> Settings:
    return scene.settings("parquet", root="~nobody-of-this-name/images")


@source(SourceError, "{root}", "not UTF-8")
def parquet_name_not_utf8(scene: Scene) -> Settings:
    settings = scene.table()
    try:
        (scene.root / os.fsdecode(b"train-\xe9.parquet")).write_bytes((scene.root / "train.parquet").read_bytes())
    except OSError:
        pytest.skip("this file system takes no such name")
    return settings


@source(DataError, "val split", "(of 0)", "val....parquet")
def parquet_of_an_empty_part(scene: Scene) -> Settings:
    scene.write_table(scene.make_table(num_rows=0, file="val.parquet"), "val.parquet")
    return scene.table()


@source(DataError, "val split", "(of 20)")
def parquet_of_a_part_that_is_all_left_out(scene: Scene) -> Settings:
    bad = {row: {"bytes": b"?", "path": None} for row in range(20)}
    scene.write_table(scene.make_table(bad, file="val.parquet"), "val.parquet")
    return scene.table() | {"data.on_error": "skip"}


@source(SourceError, "{root}", "train.parquet#", "not an image")
def parquet_without_one_image(scene: Scene) -> Settings:
    return scene.table({row: {"bytes": b"?", "path": None} for row in range(20)}) | {"data.on_error": "skip"}


@source(DataError, "test split", "no rows", "'a' (1 of 2 rows)", "Add images: at least one class needs 3 rows")
def classes_of_one_image(scene: Scene) -> Settings:
    for label, name in enumerate(CLASSES):
        scene.image_file(f"train/{name}/00.png", label)
    return scene.settings("folder")


@source(DataError, "val split", "no rows", "'a' (10 of 20 rows)", "data.test_fraction = 0.99", "Lower")
def split_too_large(scene: Scene) -> Settings:
    return scene.tree() | {"data.test_fraction": 0.99}


@source(SourceError, "{root}/train/b", "no images")
def class_folder_empty(scene: Scene) -> Settings:
    settings = scene.tree()
    for file in (scene.root / "train/b").iterdir():
        file.unlink()
    return settings


@source(SourceError, "{root}/train/b", "no images")
def class_folder_empty_beside_a_row_left_out(scene: Scene) -> Settings:
    settings = class_folder_empty(scene)
    (scene.root / "train/a/link.png").symlink_to("nothing.png")
    return settings | {"data.on_error": "skip"}


@source(SourceError, "{root}/train/b", "no images", "train/b/notes.txt")
def class_folder_of_other_files(scene: Scene) -> Settings:
    settings = class_folder_empty(scene)
    (scene.root / "train/b/notes.txt").write_text("to do")
    return settings


@source(SourceError, "{root}/train/b", "no images")
def class_folder_of_a_folder_named_like_an_image(scene: Scene) -> Settings:
    settings = class_folder_empty(scene)
    (scene.root / "train/b/x.png").mkdir()
    return settings


@source(SourceError, "{root}/test", "no images")
def a_test_folder_without_images(scene: Scene) -> Settings:
    for name in CLASSES:
        (scene.root / "test" / name).mkdir(parents=True)
    return scene.tree()


@source(SourceError, "{root}/test", "no images")
def part_folder_without_classes(scene: Scene) -> Settings:
    (scene.root / "test").mkdir()
    return scene.tree()


@source(SourceError, "{root}/val/c", "{root}/train")
def class_of_the_validation_part_alone(scene: Scene) -> Settings:
    settings = scene.tree(parts=("train", "val"))
    scene.image_file("val/c/00.png", 2)
    return settings


@source(SourceError, "{root}/train", "1 class")
def class_folder_alone(scene: Scene) -> Settings:
    settings = scene.tree()
    shutil.rmtree(scene.root / "train/b")
    return settings


@source(SourceError, "{root}", "train/")
def no_train_folder(scene: Scene) -> Settings:
    return scene.tree(parts=("val", "test"))


@source(SourceError, "{root}", "train/")
def root_empty(scene: Scene) -> Settings:
    return scene.settings("folder")


@source(SourceError, "{root}", "train/")
def root_of_images_without_classes(scene: Scene) -> Settings:
    for number in range(10):
        scene.image_file(f"{number}.png", 0)
    return scene.settings("folder")


@source(SourceError, "{root}/images.zip", "no such folder")
def root_that_is_a_file(scene: Scene) -> Settings:
    (scene.root / "images.zip").write_bytes(a_zip())
    return scene.settings("folder", root=f"{scene.root}/images.zip")


@source(SourceError, "{root}/nowhere", "no such folder")
def root_missing(scene: Scene) -> Settings:
    return scene.settings("folder", root=f"{scene.root}/nowhere")


@source(SourceError, "s3://bucket/images", "not a local folder")
def root_on_s3(scene: Scene) -> Settings:
    return scene.settings("folder", root="s3://bucket/images")


@source(SourceError, "~nobody-of-this-name/images")
def root_of_an_unknown_user(scene: Scene) -> Settings:
    return scene.settings("folder", root="~nobody-of-this-name/images")


@source(SourceError, "{root}/nnnnnn")
def root_with_too_long_a_name(scene: Scene) -> Settings:
    return scene.settings("folder", root=f"{scene.root}/{'n' * 300}")


@source(SourceError, "{root}", "val/", "valid/")
def two_names_of_one_part(scene: Scene) -> Settings:
    return scene.tree(parts=("train", "val", "valid"))


@source(SourceError, "{root}/train/c", "outside data.root")
def link_to_a_class_outside(scene: Scene) -> Settings:
    settings = scene.tree()
    outside = scene.root.parent / "outside"
    shutil.copytree(scene.root / "train/b", outside)
    (scene.root / "train/c").symlink_to(outside)
    return settings


@source(SourceError, "{root}/test", "outside data.root")
def link_to_a_part_outside(scene: Scene) -> Settings:
    settings = scene.tree()
    outside = scene.root.parent / "outside"
    shutil.copytree(scene.root / "train", outside)
    (scene.root / "test").symlink_to(outside)
    return settings


@source(SourceError, "{root}/train/c")
def link_to_a_class_that_is_gone(scene: Scene) -> Settings:
    settings = scene.tree()
    (scene.root / "train/c").symlink_to("/nowhere/c")
    return settings


@source(SourceError, "{root}/train/c")
def link_of_a_class_to_itself(scene: Scene) -> Settings:
    settings = scene.tree()
    (scene.root / "train/c").symlink_to("c")
    return settings


@source(SourceError, "{root}/train", "not UTF-8")
def class_name_not_utf8(scene: Scene) -> Settings:
    settings = scene.tree()
    try:
        (scene.root / "train/b").rename(scene.root / "train" / os.fsdecode(b"\xe9"))
    except OSError:
        pytest.skip("this file system takes no such name")
    return settings | {"data.on_error": "skip"}


@source(DataError, "train/a/two", "lines.png", "not an image")
def file_name_of_two_lines(scene: Scene) -> Settings:
    settings = scene.tree()
    (scene.root / "train/a/two\nlines.png").write_bytes(b"?")
    return settings


@source(SourceError, "two", "lines", "no images")
def class_name_of_two_lines(scene: Scene) -> Settings:
    (scene.root / "train/two\nlines").mkdir(parents=True)
    return scene.tree()
