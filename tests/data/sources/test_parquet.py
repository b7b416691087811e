"""Parquet files as people have them: which are read, as which part, by which columns, and exactly the rows asked for."""

import datetime
import functools
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rcnn.config import DataConfig
from rcnn.data.schema import Block
from rcnn.data.sources import fingerprint, open_source, parquet_images, parquet_labels
from rcnn.data.sources.origin import Origin
from rcnn.data.sources.parquet_files import list_paths
from rcnn.data.sources.parquet_images import ROWS_PER_READ
from rcnn.errors import RcnnError, SourceError

SHARED_CIFAR = Path(__file__).parents[4] / "shared" / "data" / "cifar10-jpeg"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels_of(file: int, row: int) -> np.ndarray:
    """A picture that no other row has."""
    return np.broadcast_to(np.array([file, row // 256, row % 256], np.uint8), (2, 3, 3))


@functools.cache
def encoded(file: int, row: int) -> bytes:
    return as_png(pixels_of(file, row))


def as_png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def hugging_face(names: Any, label: str = "label") -> dict[str, str]:
    """The schema's metadata as the datasets library writes it."""
    features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def table_of(
    labels: list[int | None],
    *,
    file: int = 0,
    names: Any = None,
    columns: tuple[str, str] = ("image", "label"),
    label_type: pa.DataType | None = None,
    image_type: pa.DataType = IMAGE,
) -> pa.Table:
    images = [{"bytes": encoded(file, row), "path": f"{row}.png"} for row in range(len(labels))]
    arrays = [pa.array(images, image_type), pa.array(labels, label_type or pa.int64())]
    metadata = hugging_face(names, columns[1]) if names else None
    return pa.table(
        arrays, schema=pa.schema(list(zip(columns, [array.type for array in arrays], strict=True)), metadata)
    )


def write(path: Path, table: pa.Table, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def opened(root: Path | str, **settings: Any) -> Origin:
    return open_source(DataConfig(source="parquet", root=str(root), **settings), Path("unused"))


def read(origin: Origin, part: str = "train") -> Block:
    block, skipped = origin.cut(part, np.arange(len(origin.labels[part]))).read()
    assert skipped == []
    return block


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a user sees."""
    lines: list[str] = []
    monkeypatch.setattr(parquet_labels, "say", lines.append)
    monkeypatch.setattr(parquet_images, "say", lines.append)
    return lines


def test_a_single_file_is_all_training_rows(root: Path) -> None:
    write(root / "digits.parquet", table_of([0, 1, 2, 1]))
    origin = opened(root / "digits.parquet")
    block = read(origin)
    assert list(origin.labels) == ["train"]
    assert block.labels.tolist() == origin.labels["train"].tolist() == [0, 1, 2, 1]
    assert block.labels.dtype == np.int64
    assert block.row_ids == [f"digits.parquet#{row}" for row in range(4)]
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, row) for row in range(4)]))
    assert origin.image_shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("test-00000-of-00001.parquet", "test"),
        ("validation-00000-of-00001.parquet", "val"),
        ("val.parquet", "val"),
        ("valid_0.parquet", "val"),
        ("dev.parquet", "val"),
        ("Testing.parquet", "test"),
        ("default/test/0000.parquet", "test"),
        ("plain_text/partial-validation/0000.parquet", "val"),
        ("test/train-0.parquet", "train"),
        ("latest.parquet", "train"),
        ("0000.parquet", "train"),
    ],
)
def test_the_part_is_told_by_the_last_word_that_names_one(root: Path, name: str, part: str) -> None:
    write(root / "training/x.parquet", table_of([0, 1]))
    write(root / name, table_of([1, 1, 0], file=1))
    origin = opened(root)
    assert {part: len(labels) for part, labels in origin.labels.items()} == (
        {"train": 5} if part == "train" else {"train": 2, part: 3}
    )
    block = read(origin, part)
    assert [row_id for row_id in block.row_ids if row_id.startswith(name)] == [f"{name}#{row}" for row in range(3)]


def test_the_roots_own_name_does_not_tell_the_part(tmp_path: Path) -> None:
    write(tmp_path / "test/0.parquet", table_of([0, 1]))
    assert list(opened(tmp_path / "test").labels) == ["train"]


@pytest.mark.parametrize(
    ("root", "names"),
    [
        ("", ["a/train.parquet", "b/c/test.parquet", "train.parquet"]),
        ("/", ["a/train.parquet", "b/c/test.parquet", "train.parquet"]),
        ("/b/..", ["a/train.parquet", "b/c/test.parquet", "train.parquet"]),
        ("/a", ["train.parquet"]),
        ("/train.parquet", ["train.parquet"]),
        ("/*.parquet", ["train.parquet"]),
        ("/**/*.parquet", ["a/train.parquet", "b/c/test.parquet", "train.parquet"]),
        ("/tra*", ["train.parquet", "train.txt"]),
        ("/*/train.parquet", ["a/train.parquet"]),
        ("/b/*/t?st.parquet", ["c/test.parquet"]),
        ("/train.txt", ["train.txt"]),
    ],
)
def test_a_file_a_folder_or_a_glob_names_the_files(tmp_path: Path, root: str, names: list[str]) -> None:
    for name in ("train.parquet", "train.txt", "a/train.parquet", "b/c/test.parquet", "_x/a.parquet", ".x/a.parquet"):
        write(tmp_path / name, table_of([0, 1]))
    write(tmp_path / "a/.train.parquet", table_of([0, 1]))
    found = [name for name, _ in list_paths(f"{tmp_path}{root}")]
    assert [name.removeprefix("../") for name in found] == names


@pytest.mark.parametrize("name", ["TRAIN.PARQUET", "Train.Parquet", "train.parquet", "train.pq", "TRAIN.PQ"])
def test_endings_are_read_in_any_case(root: Path, name: str) -> None:
    write(root / name, table_of([0, 1]))
    write(root / "Test.PARQUET", table_of([1], file=1))
    (root / "train.parquet.crc").touch()
    (root / "_SUCCESS").touch()
    origin = opened(root)
    assert {part: len(labels) for part, labels in origin.labels.items()} == {"train": 2, "test": 1}
    assert read(origin).row_ids == [f"{name}#0", f"{name}#1"]


def test_a_glob_is_read_as_it_is_written(root: Path) -> None:
    for name in ("a.parquet", "B.PARQUET"):
        write(root / name, table_of([0, 1]))
    assert [name for name, _ in list_paths(f"{root}/*.parquet")] == ["a.parquet"]
    assert [name for name, _ in list_paths(f"{root}/*.PARQUET")] == ["B.PARQUET"]


def test_relative_paths_and_the_home_folder_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x/train.parquet", table_of([0, 1]))
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (
        ".",
        "train.parquet",
        "*.parquet",
        "./*.parquet",
        "../x",
        "~/x",
        "~/x/*.parquet",
        f"file://{tmp_path}/x",
    ):
        assert [name for name, _ in list_paths(root)] == ["train.parquet"]
        assert opened(root).labels["train"].tolist() == [0, 1]


@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
def test_columns_may_bear_any_of_their_usual_names(root: Path, image: str, label: str) -> None:
    write(root / "0.parquet", table_of([1, 0], columns=(image, label), names=["cat", "dog"]))
    origin = opened(root)
    assert origin.classes == ("cat", "dog")
    assert read(origin).labels.tolist() == [1, 0]


def test_other_columns_do_not_matter(root: Path) -> None:
    table = table_of([1, 0]).append_column("coarse_label", [[7, 8]]).append_column("image.path", [["x", "y"]])
    write(root / "0.parquet", table)
    assert read(opened(root)).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "image_type",
    [
        pa.struct([("bytes", pa.binary())]),
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string())]),
        pa.struct([("path", pa.large_string()), ("height", pa.int64()), ("bytes", pa.binary())]),
    ],
    ids=str,
)
def test_the_image_struct_may_be_written_in_other_ways(root: Path, image_type: pa.DataType) -> None:
    write(root / "0.parquet", table_of([1, 0], image_type=image_type))
    np.testing.assert_array_equal(read(opened(root)).images, np.stack([pixels_of(0, 0), pixels_of(0, 1)]))


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("label_type", INTEGERS, ids=str)
@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_labels_of_any_integer_type_are_read(root: Path, label_type: pa.DataType, names: list[str] | None) -> None:
    largest = int(np.iinfo(label_type.to_pandas_dtype()).max)
    labels = [2, None, 0, 1] + ([largest] if names else [])
    write(root / "0.parquet", table_of(labels, label_type=label_type, names=names))
    origin = opened(root, on_error="skip")
    assert origin.labels["train"].tolist() == [2, 0, 1]
    assert origin.labels["train"].dtype == np.int64
    assert read(origin).row_ids == ["0.parquet#0", "0.parquet#2", "0.parquet#3"]
    bound = "0 to 2" if names else "0 or above"
    assert [(skip.row_id, skip.reason) for skip in origin.skipped] == [
        ("0.parquet#1", f"label is null, but must be {bound}"),
        *([("0.parquet#4", f"label is {largest}, but must be 0 to 2")] if names else []),
    ]


TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


def with_labels(labels: Any, *, file: int = 0, name: str = "label", metadata: Any = None) -> pa.Table:
    """Rows with these labels: a sequence, or an array of any type."""
    table = table_of([0] * len(labels), file=file).drop_columns(["label"]).append_column(name, pa.array(labels))
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize("label_type", TEXTS, ids=str)
def test_text_labels_are_classes_in_sorted_order_over_all_files(
    root: Path, label_type: pa.DataType, said: list[str]
) -> None:
    write(root / "train.parquet", with_labels(pa.array(["dog", "cat", "dog", "eel"], label_type)))
    write(root / "test.parquet", with_labels(pa.array(["cat", "ant"], label_type), file=1))
    origin = opened(root)
    assert origin.classes == ("ant", "cat", "dog", "eel")
    assert {part: labels.tolist() for part, labels in origin.labels.items()} == {"train": [2, 1, 2, 3], "test": [1, 0]}
    assert origin.labels["train"].dtype == np.int64
    assert read(origin).labels.tolist() == [2, 1, 2, 3]
    assert said == ["  classes: ant, cat, dog, eel (4 in all)"]


def test_of_many_classes_the_first_are_shown(root: Path, said: list[str]) -> None:
    write(root / "train.parquet", with_labels([f"class {number % 12:02}" for number in range(48)]))
    assert len(opened(root).classes) == 12
    assert said == [f"  classes: {', '.join(f'class {number:02}' for number in range(10))}, ... (12 in all)"]


def test_text_that_differs_in_unicode_form_alone_is_one_class(root: Path) -> None:
    write(root / "train.parquet", with_labels(["\u00e9", "e", "e\u0301", "\u00e9"]))
    origin = opened(root)
    assert origin.classes == ("e", "\u00e9")
    assert origin.labels["train"].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("other", ["cat ", " cat", "Cat", "CAT\t"])
def test_text_that_differs_in_blanks_or_capitals_is_two_classes_and_shown(
    root: Path, other: str, said: list[str]
) -> None:
    write(root / "train.parquet", with_labels(["cat", other, "dog"]))
    classes = sorted(["cat", other, "dog"])
    assert opened(root).classes == tuple(classes)
    alike = [name for name in classes if name != "dog"]
    shown = [name if name.strip() == name else repr(name) for name in classes]
    assert said == [
        f"  classes: {', '.join(shown)} (3 in all)",
        f"  {alike[0]!r} and {alike[1]!r} are two classes: they differ only in spaces or capitals",
    ]


def test_classes_with_signs_that_do_not_print_are_shown_escaped_and_cut(root: Path, said: list[str]) -> None:
    write(root / "train.parquet", with_labels(["a\x1b[31m\n", "b" * 1000, "c"]))
    opened(root)
    assert said == [rf"  classes: 'a\x1b[31m\n', {'b' * 40}..., c (3 in all)"]


def test_categories_that_no_row_has_are_not_classes(root: Path) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([3, 1, 1, None], pa.int8()), ["ant", "bee", "cat", "dog"])
    write(root / "train.parquet", with_labels(labels))
    origin = opened(root, on_error="skip")
    assert origin.classes == ("bee", "dog")
    assert origin.labels["train"].tolist() == [1, 0, 0]


def test_a_file_whose_labels_are_all_null_has_no_type_of_its_own(root: Path) -> None:
    write(root / "train.parquet", with_labels(["a", "b"]))
    write(root / "test.parquet", with_labels(pa.nulls(2)))
    origin = opened(root, on_error="skip")
    assert origin.labels["train"].tolist() == [0, 1]
    assert [skip.row_id for skip in origin.skipped] == ["test.parquet#0", "test.parquet#1"]


def test_truth_values_are_the_classes_false_and_true(root: Path, said: list[str]) -> None:
    write(root / "train.parquet", with_labels([True, False, None, True]))
    origin = opened(root, on_error="skip")
    assert origin.classes == ("false", "true")
    assert origin.labels["train"].tolist() == [1, 0, 1]
    assert [skip.reason for skip in origin.skipped] == ["label is null, but must be false or true"]
    assert said == ["  classes: false, true (2 in all)"]


@pytest.mark.parametrize("label_type", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_whole_floating_point_labels_are_read_since_pandas_writes_gaps_so(
    root: Path, label_type: pa.DataType, names: list[str] | None
) -> None:
    labels = pa.array([2.0, None, float("nan"), 0.0, 1.0], label_type)
    write(root / "0.parquet", with_labels(labels, metadata=names and hugging_face(names)))
    write(root / "1.parquet", with_labels([1, 2]))
    origin = opened(root, on_error="skip")
    assert origin.classes == tuple(names or "012")
    assert origin.labels["train"].tolist() == [2, 0, 1, 1, 2]
    assert [skip.row_id for skip in origin.skipped] == ["0.parquet#1", "0.parquet#2"]


def test_text_may_be_the_names_that_the_metadata_gives(root: Path, said: list[str]) -> None:
    """In the metadata's order; a name that no row has is a class too, as with numbers."""
    metadata = hugging_face(["dog", "cat", "caf\u00e9", "eel"])
    write(root / "train.parquet", with_labels(["cat", "dog", "cafe\u0301", "fox"], metadata=metadata))
    origin = opened(root, on_error="skip")
    assert origin.classes == ("dog", "cat", "caf\u00e9", "eel")
    assert origin.labels["train"].tolist() == [1, 0, 2]
    [skip] = origin.skipped
    assert skip.reason == "label is 'fox', which is not one of the 4 names in the metadata"
    assert said == []


@pytest.mark.parametrize("column", ["label", "another"])
def test_text_that_the_metadata_does_not_name_names_its_classes_itself(root: Path, column: str) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {column: {"dtype": "string", "_type": "Value"}}}})}
    write(root / "train.parquet", with_labels(["b", "a"], metadata=metadata))
    assert opened(root).classes == ("a", "b")


def test_class_names_of_the_metadata_are_of_one_unicode_form(root: Path) -> None:
    for number, name in enumerate(["\u00e9", "e\u0301"]):
        write(root / f"train-{number}.parquet", table_of([0, 1], names=[name, "b"]))
    assert opened(root).classes == ("\u00e9", "b")


@pytest.mark.parametrize(("num_rows", "num_labels"), [(19, 19), (20, 10), (40, 20)])
def test_few_rows_to_a_class_are_taken(root: Path, num_rows: int, num_labels: int) -> None:
    write(root / "0.parquet", with_labels([f"{number % num_labels}" for number in range(num_rows)]))
    assert len(opened(root).classes) == num_labels


@pytest.mark.parametrize("kind", [str, int])
def test_classes_that_the_metadata_names_may_be_many(root: Path, kind: Callable[[int], Any]) -> None:
    metadata = hugging_face([str(number) for number in range(30)])
    write(root / "0.parquet", with_labels([kind(number) for number in range(30)], metadata=metadata))
    assert opened(root).labels["train"].tolist() == list(range(30))


@pytest.mark.parametrize("kind", [str, int])
def test_a_column_that_names_rows_is_refused(root: Path, kind: Callable[[int], Any]) -> None:
    """Over all files: each of these has few rows, and some names come twice."""
    for file in range(3):
        labels = [kind(number % 16) for number in range(10 * file, 10 * file + 10)]
        write(root / f"{file}.parquet", with_labels(labels, file=file))
    with pytest.raises(
        SourceError, match=r"column 'label' in data\.root = .*: has more than 15 different labels in 30 rows"
    ):
        opened(root)


def test_class_names_that_no_file_gives_are_null_in_some_metadata(root: Path) -> None:
    feature = {"num_classes": 2, "names": None, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    write(root / "train.parquet", table_of([0, 1]).replace_schema_metadata(metadata))
    assert opened(root).classes == ("0", "1")


def test_class_names_come_from_the_metadata(root: Path) -> None:
    write(root / "train.parquet", table_of([0, 2], names=["airplane", "bird", "ship"]))
    write(root / "test.parquet", table_of([1, 1]))  # one without names has the others' names
    origin = opened(root)
    assert origin.classes == ("airplane", "bird", "ship")
    assert {part: labels.tolist() for part, labels in origin.labels.items()} == {"train": [0, 2], "test": [1, 1]}


@pytest.mark.parametrize("feature", [None, {"dtype": "int64", "_type": "Value"}])
def test_without_class_names_numbers_are_the_names(root: Path, feature: dict[str, str] | None) -> None:
    table = table_of([2, 0, 1, 1])
    if feature:
        metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
        table = table.replace_schema_metadata(metadata)
    write(root / "train.parquet", table)
    assert opened(root).classes == ("0", "1", "2")


def test_labels_without_names_may_be_spread_over_parts(root: Path) -> None:
    write(root / "train.parquet", table_of([2, 0]))
    write(root / "test.parquet", table_of([1]))
    assert opened(root).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2], "no row has the label 1, and the largest is 2"),
        ([1, 2], "no row has the label 0, and the largest is 2"),
        ([0, 0], "no row has the label 1, and the largest is 0"),
        ([5, 5], "no row has the label 0, and the largest is 5"),
        ([0, 2**60], "no row has the label 1, and the largest is 1152921504606846976"),
    ],
)
def test_labels_without_names_must_count_from_0_without_a_gap(
    root: Path, labels: list[int | None], expected: str
) -> None:
    write(root / "train.parquet", table_of(labels))
    with pytest.raises(SourceError, match=f"data.root = {root}: {expected}"):
        opened(root)


@pytest.mark.parametrize(("label", "told"), [(3, "3"), (-1, "-1"), (None, "null")])
def test_rows_without_a_possible_label_are_left_out_and_named(root: Path, label: int | None, told: str) -> None:
    write(root / "train.parquet", table_of([0, label, 2], names=["a", "b", "c"]))
    origin = opened(root, on_error="skip")
    assert [(skip.row_id, skip.reason) for skip in origin.skipped] == [
        ("train.parquet#1", f"label is {told}, but must be 0 to 2")
    ]
    block = read(origin)
    assert block.row_ids == ["train.parquet#0", "train.parquet#2"]
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, 0), pixels_of(0, 2)]))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (
            {"bytes": None, "path": "1.png"},
            "image is not embedded: its bytes are null and its path '1.png' does not exist",
        ),
        ({"bytes": None, "path": None}, "image.bytes is null"),
        ({"bytes": None, "path": ""}, "image.bytes is null"),
        (None, "image.bytes is null"),
        ({"bytes": b"", "path": None}, "is empty"),
        ({"bytes": b"no image", "path": None}, r"is not an image that can be read"),
        ({"bytes": as_png(np.zeros((2, 4, 3), np.uint8)), "path": None}, "is 4x2, but the first image is 3x2"),
    ],
)
def test_rows_without_a_possible_image_are_left_out_and_named(
    root: Path, image: dict[str, Any] | None, reason: str
) -> None:
    images = [{"bytes": encoded(0, 0), "path": None}, image, {"bytes": encoded(0, 2), "path": None}]
    write(root / "train.parquet", pa.table({"image": pa.array(images, IMAGE), "label": [0, 1, 1]}))
    block, [skip] = opened(root).cut("train", np.arange(3)).read()
    assert skip.row_id == "train.parquet#1"
    assert skip.reason.startswith(reason)
    assert block.row_ids == ["train.parquet#0", "train.parquet#2"]
    assert block.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, 0), pixels_of(0, 2)]))


def test_size_and_colour_are_the_first_readable_training_images(root: Path) -> None:
    grey = [{"bytes": as_png(np.zeros((4, 5), np.uint8)), "path": None}] * 2
    write(root / "test.parquet", pa.table({"image": pa.array(grey, IMAGE), "label": [0, 1]}))
    first = [{"bytes": content, "path": None} for content in (None, b"x", encoded(0, 0)[:50], encoded(0, 0))]
    write(root / "train.parquet", pa.table({"image": pa.array(first, IMAGE), "label": [0, 1, 0, 1]}))
    assert opened(root, on_error="skip").image_shape == (2, 3, 3)
    with pytest.raises(RcnnError, match=r"train\.parquet#0: image.bytes is null"):
        opened(root)


@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_images_are_resized_and_converted_as_pillow_does_it(root: Path, color: str) -> None:
    pictures = [np.random.default_rng(n).integers(0, 256, (9 + n, 14, 3), dtype=np.uint8) for n in range(2)]
    images = [{"bytes": as_png(pixels), "path": None} for pixels in pictures]
    write(root / "train.parquet", pa.table({"image": pa.array(images, IMAGE), "label": [0, 1]}))
    mode = "L" if color == "grey" else "RGB"
    expected = [ImageOps.pad(Image.fromarray(of).convert(mode), (8, 8), Image.Resampling.BILINEAR) for of in pictures]
    images_read = read(opened(root, image_size=8, resize="pad", color=color)).images
    np.testing.assert_array_equal(images_read.squeeze(), np.stack([np.asarray(image) for image in expected]))


def test_the_record_tells_files_and_their_bytes(root: Path) -> None:
    for name in ("train-0.parquet", "b/test.parquet"):
        write(root / name, table_of([0, 1]))
    origin = opened(root)
    sizes = {name: (root / name).stat().st_size for name in ("b/test.parquet", "train-0.parquet")}
    assert (origin.record.name, origin.record.url) == ("parquet", str(root))
    assert origin.record.files == {name: f"bytes:{size}" for name, size in sizes.items()}
    assert origin.encoded_bytes == sum(sizes.values())


LABELS = st.lists(st.sampled_from([0, 1, 2, None, 7]), max_size=2 * ROWS_PER_READ)


@settings(max_examples=100, deadline=None)
@given(
    files=st.lists(st.tuples(LABELS, st.integers(1, 3 * ROWS_PER_READ)), min_size=1, max_size=3),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_exactly_the_rows_that_are_asked_for_are_read(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[list[int | None], int]], share: float, seed: int
) -> None:
    """Over several files and row groups, with rows left out: ids, labels and pixels are of the same rows, in order."""
    root = tmp_path_factory.mktemp("rows")
    write(root / "test.parquet", table_of([0, 1, 2], names=["a", "b", "c"]))
    rows = [(9, 0, 0)]  # file, row, label of each good row
    write(root / "train-9.parquet", table_of([0], file=9))
    for number, (labels, row_group_size) in enumerate(files):
        write(root / f"train-{number}.parquet", table_of(labels, file=number), row_group_size=row_group_size)
        rows += [(number, row, label) for row, label in enumerate(labels) if label in (0, 1, 2)]
    rows.sort()
    origin = opened(root, on_error="skip")
    assert origin.labels["train"].tolist() == [label for _, _, label in rows]
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(rows)) < share)
    block, skipped = origin.cut("train", chosen).read()
    expected = [rows[number] for number in chosen]
    assert skipped == []
    assert block.row_ids == [f"train-{file}.parquet#{row}" for file, row, _ in expected]
    assert block.labels.tolist() == [label for _, _, label in expected]
    pixels = [pixels_of(file, row) for file, row, _ in expected]
    np.testing.assert_array_equal(block.images, np.array(pixels, np.uint8).reshape(-1, 2, 3, 3))


def test_empty_row_groups_and_empty_files_do_not_matter(root: Path) -> None:
    table = table_of([0, 1, 1], names=["a", "b"])
    root.mkdir()
    with pq.ParquetWriter(root / "train-1.parquet", table.schema) as writer:
        for start, stop in ((0, 0), (0, 2), (2, 2), (2, 3)):
            writer.write_table(table[start:stop])
    write(root / "train-0.parquet", table[:0])
    assert pq.read_metadata(root / "train-1.parquet").num_row_groups >= 2
    assert read(opened(root)).row_ids == [f"train-1.parquet#{row}" for row in range(3)]


def test_a_chunk_reads_its_own_row_groups_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "train.parquet", table_of([0, 1] * 10), row_group_size=4)
    chunk = opened(root).cut("train", np.array([5, 6, 17]))
    groups: list[list[int]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def note(file: pq.ParquetFile, *given: Any, **options: Any) -> Any:
        groups.append(options["row_groups"])
        return iter_batches(file, *given, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    assert chunk.read()[0].row_ids == [f"train.parquet#{row}" for row in (5, 6, 17)]
    assert groups == [[1], [4]]


# ------------------------------------------------------------------------------------------------------------------
# Columns that settings name, and labels in folders' names


def test_settings_name_the_columns(root: Path) -> None:
    table = table_of([1, 0], columns=("my.picture", "its.class")).append_column("image", [["no", "image"]])
    write(root / "0.parquet", table.append_column("label", [[0.5, 0.7]]))
    origin = opened(root, image_column="my.picture", label_column="its.class")
    block = read(origin)
    assert block.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, 0), pixels_of(0, 1)]))


def test_a_dot_in_a_columns_name_leads_into_no_struct(root: Path) -> None:
    """Parquet writes both the column `image.bytes` and the field `bytes` of `image` as image.bytes."""
    table = table_of([1, 0]).append_column("image.bytes", [["x", "y"]]).append_column("label.x", [["b", "a"]])
    table = table.append_column("image.path", [[b"x", b"y"]])
    write(root / "0.parquet", table.select(table.column_names[::-1]))
    np.testing.assert_array_equal(read(opened(root)).images, np.stack([pixels_of(0, 0), pixels_of(0, 1)]))
    assert read(opened(root, label_column="image.bytes")).labels.tolist() == [0, 1]
    assert read(opened(root, label_column="label.x")).labels.tolist() == [1, 0]


@pytest.mark.parametrize("image_type", [pa.binary(), pa.large_binary(), pa.binary_view(), "categories"], ids=str)
def test_images_may_be_plain_bytes(root: Path, image_type: Any) -> None:
    contents = pa.array([encoded(0, 0), None, encoded(0, 2)], pa.binary() if image_type == "categories" else image_type)
    images = contents.dictionary_encode() if image_type == "categories" else contents
    write(root / "0.parquet", pa.table({"image": images, "label": [1, 0, 0]}))
    block, [skip] = opened(root).cut("train", np.arange(3)).read()
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, 0), pixels_of(0, 2)]))
    assert (skip.row_id, skip.reason) == ("0.parquet#1", "image is null")


def test_folders_may_state_the_labels(root: Path) -> None:
    """As Spark and Hive write a table that is partitioned by its label; a class `train` says nothing of the part."""
    images = table_of([0, 0]).drop_columns(["label"])
    for part in ("train", "test"):
        for folder in ("label=train", "label=a%20b%2Fe%CC%81", "label=__HIVE_DEFAULT_PARTITION__"):
            write(root / part / folder / "part-00000-x.snappy.parquet", images)
        (root / part / "_SUCCESS").touch()
    origin = opened(root, on_error="skip")
    assert origin.classes == ("a b/\u00e9", "train")
    assert {part: labels.tolist() for part, labels in origin.labels.items()} == {
        part: [0, 0, 1, 1] for part in ("train", "test")
    }
    assert [skip.reason for skip in origin.skipped] == ["label is null, but must be text"] * 4
    assert read(origin, "test").row_ids[-1] == "test/label=train/part-00000-x.snappy.parquet#1"


def test_folders_of_another_key_may_state_the_labels(root: Path) -> None:
    table = with_labels(["b", "a", "b", "b"], name="kind")
    pyarrow.dataset.write_dataset(table, root, partitioning=["kind"], partitioning_flavor="hive", format="parquet")
    with pytest.raises(SourceError, match=r"only image, kind \(folders\). Set data.label_column to 'kind'"):
        opened(root)
    origin = opened(root, label_column="kind")
    assert origin.classes == ("a", "b")
    assert sorted(origin.labels["train"].tolist()) == [0, 1, 1, 1]


def test_a_column_counts_more_than_a_folder(root: Path) -> None:
    write(root / "label=x/0.parquet", table_of([1, 0]))
    assert opened(root).labels["train"].tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------------------------
# Images in files of their own


def save(file: Path, number: int, row: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(number, row))


def table_of_paths(paths: Sequence[str | None], kind: str = "struct") -> pa.Table:
    images: Any = [{"bytes": None, "path": path} for path in paths]
    if kind != "struct":
        images = pa.array(paths).dictionary_encode() if kind == "categories" else pa.array(paths, kind)
    elif None in paths:
        images = pa.array(images, IMAGE)
    return pa.table({"image": images, "label": [row % 2 for row in range(len(paths))]})


@pytest.mark.parametrize("kind", ["struct", "string", "large_string", "categories"])
@pytest.mark.parametrize("root_is", ["folder", "file", "glob", "uri", "link", "relative"])
def test_images_may_be_paths_of_files_inside_the_root(
    root: Path, kind: str, root_is: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Parquet file's folder, or from the root; absolute ones too; through links that stay inside."""
    for row, name in enumerate(["data/near.png", "far.png", "data/../up.png", "absolute.png", ".hidden/linked.png"]):
        save(root / name, 7, row)
    (root / "link.png").symlink_to(".hidden/linked.png")
    paths = ["near.png", "../far.png", "../up.png", str(root / "absolute.png"), "../link.png"]
    if root_is != "file":
        paths[1] = "far.png"
    else:  # its own folder is the root
        for row, name in enumerate(["1.png", "2.png", "3.png", "4.png"], start=1):
            save(root / "data" / name, 7, row)
        paths[1:] = ["1.png", "./2.png", str(root / "data/3.png"), "../data/4.png"]
    write(root / "data/train.parquet", table_of_paths(paths, kind))
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    origin = opened(
        {
            "folder": str(root),
            "file": f"{root}/data/train.parquet",
            "glob": f"{root}/**/*.parquet",
            "uri": f"file://{root}",
            "link": f"{root.parent}/link",
            "relative": "root",
        }[root_is]
    )
    block = read(origin)
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(7, row) for row in range(5)]))
    assert block.labels.tolist() == [0, 1, 0, 1, 0]


def test_the_parquet_files_folder_is_looked_into_first(root: Path) -> None:
    for row in range(2):
        save(root / f"data/{row}.png", 1, row)
        save(root / f"{row}.png", 2, row)
    write(root / "data/train.parquet", table_of_paths(["0.png", "1.png"]))
    np.testing.assert_array_equal(read(opened(root)).images, np.stack([pixels_of(1, 0), pixels_of(1, 1)]))


def test_a_file_outside_the_root_is_never_read(root: Path) -> None:
    """Neither from the Parquet file's folder nor from the root, although both lead to a sound image."""
    save(root.parent / "outside.png", 0, 0)
    (root / "data").mkdir(parents=True)
    (root / "data/link.png").symlink_to(root.parent / "outside.png")
    (root / "up").symlink_to("..")
    paths = ["../../outside.png", "../outside.png", str(root.parent / "outside.png"), "link.png", "up/outside.png"]
    save(root / "sound.png", 0, 0)
    write(root / "data/train.parquet", table_of_paths([*paths, "sound.png"]))
    block, skipped = opened(root, on_error="skip").cut("train", np.arange(6)).read()
    assert block.row_ids == ["data/train.parquet#5"]
    assert [skip.reason for skip in skipped] == [
        f"image is not embedded: its bytes are null and its path {path!r} leads outside data.root" for path in paths
    ]


def test_embedded_images_and_paths_may_be_mixed(root: Path) -> None:
    save(root / "1.png", 0, 1)
    images = [{"bytes": encoded(0, 0), "path": "1.png"}, {"bytes": None, "path": "1.png"}]
    write(root / "train.parquet", pa.table({"image": images, "label": [0, 1]}))
    np.testing.assert_array_equal(read(opened(root)).images, np.stack([pixels_of(0, 0), pixels_of(0, 1)]))


def test_a_chunk_of_paths_reads_its_files_in_another_process(root: Path) -> None:
    save(root / "0.png", 0, 0)
    save(root / "1.png", 0, 1)
    write(root / "train.parquet", table_of_paths(["0.png", "1.png"]))
    chunk = pickle.loads(pickle.dumps(opened(root).cut("train", np.array([1]))))
    np.testing.assert_array_equal(chunk.read()[0].images, pixels_of(0, 1)[None])


def test_a_file_without_one_image_is_named_once(root: Path, said: list[str]) -> None:
    write(root / "train.parquet", table_of([0, 1]))
    write(root / "test.parquet", table_of_paths([f"{row}.png" for row in range(500)]))
    expected = (
        "none of its first 100 images is embedded or found "
        "(test.parquet#0: image is not embedded: its bytes are null and its path '0.png' does not exist)"
    )
    origin = opened(root, on_error="skip")
    assert said == [f"  test.parquet: {expected}"]
    assert len(origin.cut("test", np.arange(500)).read()[1]) == 500
    with pytest.raises(SourceError) as caught:
        opened(root)
    assert f"test.parquet in data.root = {root}: {expected}. Put the image files into data.root" in str(caught.value)


def test_where_the_first_images_are_missing_the_rest_may_be_there(root: Path) -> None:
    paths = [f"{row}.png" for row in range(4)]
    for row in (2, 3):
        save(root / paths[row], 0, row)
    write(root / "train.parquet", table_of_paths(paths))
    block, skipped = opened(root, on_error="skip").cut("train", np.arange(4)).read()
    assert block.row_ids == ["train.parquet#2", "train.parquet#3"]
    assert [skip.row_id for skip in skipped] == ["train.parquet#0", "train.parquet#1"]


def test_what_the_manifest_lists_of_a_broken_image_file_does_not_hold_the_root(root: Path) -> None:
    save(root / "0.png", 0, 0)
    (root / "1.png").write_bytes(b"?")
    write(root / "train.parquet", table_of_paths(["0.png", str(root / "1.png"), "1.png"]))
    _, skipped = opened(root).cut("train", np.array([0, 2])).read()
    assert [skip.reason.partition(" is not an image")[0] for skip in skipped] == ["its file '1.png'"]


def test_image_files_count_as_bytes_to_decode(root: Path) -> None:
    """Enough of them are decoded on Ray, although the Parquet file itself is small."""
    (root / "images").mkdir(parents=True)
    for row in range(2):
        (root / f"images/{row}.png").write_bytes(encoded(0, row) + bytes(10_000_000))  # Pillow ignores what follows
    write(root / "train.parquet", table_of_paths([f"images/{row % 2}.png" for row in range(1000)]))
    assert opened(root).encoded_bytes == pytest.approx(1000 * 10_000_000, rel=0.01)


@pytest.mark.parametrize("kind", ["struct", "string", "categories"])
@pytest.mark.parametrize("change", ["longer", "younger", "deleted", "added", "link"])
def test_the_fingerprint_changes_with_the_image_files(root: Path, kind: str, change: str) -> None:
    for row in (0, 1):
        save(root / f"images/{row}.png", 0, row)
    save(root / ".pool/other.png", 0, 1)
    write(root / "train.parquet", table_of_paths(["images/0.png", "images/1.png", "images/2.png", None], kind))
    data = DataConfig(source="parquet", root=str(root))
    file = root / "images/1.png"
    before = fingerprint(data)
    assert fingerprint(data) == before
    (root / "images/unnamed.png").touch()
    assert fingerprint(data) == before
    if change == "longer":
        state = file.stat()
        file.write_bytes(file.read_bytes() + b"x")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "younger":
        os.utime(file, (1, 1))
    elif change == "deleted":
        file.unlink()
    elif change == "added":
        save(root / "images/2.png", 0, 2)
    else:
        file.unlink()
        file.symlink_to("../.pool/other.png")
    assert fingerprint(data) != before


def test_the_fingerprint_of_paths_alone_heeds_all_of_them(root: Path) -> None:
    write(root / "train.parquet", table_of_paths([f"{row}.png" for row in range(200)], "string"))
    data = DataConfig(source="parquet", root=str(root))
    before = fingerprint(data)
    save(root / "199.png", 0, 0)
    assert fingerprint(data) != before


def test_the_fingerprint_heeds_the_column_that_is_read(root: Path) -> None:
    table = table_of_paths(["a/0.png", "a/1.png"]).append_column("thumb", [["b/0.png", "b/1.png"]])
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        save(root / name, 0, 0)
    write(root / "train.parquet", table)
    image, thumb = (DataConfig(source="parquet", root=str(root), image_column=name) for name in ("image", "thumb"))
    before = fingerprint(image), fingerprint(thumb)
    os.utime(root / "b/0.png", (1, 1))
    assert fingerprint(image) == before[0]
    assert fingerprint(thumb) != before[1]


def test_the_fingerprint_of_embedded_images_does_not_look_for_files(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their paths are what they were once called: a million of them need not be looked up."""
    write(root / "train.parquet", pa.concat_tables([table_of([0, 1] * 100)] * 5))
    looked_up: list[str] = []
    state_of = parquet_images._Finder.state_of
    monkeypatch.setattr(
        parquet_images._Finder, "state_of", lambda self, text: (looked_up.append(text), state_of(self, text))[1]
    )
    assert fingerprint(DataConfig(source="parquet", root=str(root)))
    assert len(looked_up) == 100


# ------------------------------------------------------------------------------------------------------------------
# As other tools write


def frame(num_rows: int = 4) -> pandas.DataFrame:
    images = [{"bytes": encoded(0, row), "path": f"{row}.png"} for row in range(num_rows)]
    return pandas.DataFrame({"image": images, "label": ["dog", "cat", "dog", "eel"][:num_rows]})


def by_pandas(file: Path) -> None:
    frame().to_parquet(file)


def by_pandas_with_categories_and_an_index(file: Path) -> None:
    table = frame().astype({"label": pandas.CategoricalDtype(["eel", "dog", "cat", "fox"])})
    table.set_index(pandas.Index(["w", "x", "y", "z"])).to_parquet(file)


def by_pandas_with_the_label_as_index(file: Path) -> None:
    frame().set_index("label").to_parquet(file)


def by_polars(file: Path) -> None:
    polars.from_pandas(frame()).write_parquet(file)


def by_polars_with_categories(file: Path) -> None:
    polars.from_pandas(frame()).with_columns(polars.col("label").cast(polars.Categorical)).write_parquet(file)


def by_polars_with_an_enumeration(file: Path) -> None:
    kinds = polars.Enum(["fox", "eel", "dog", "cat"])
    polars.from_pandas(frame()).with_columns(polars.col("label").cast(kinds)).write_parquet(file)


def by_duckdb(file: Path) -> None:
    rows = frame()
    contents = [image["bytes"] for image in rows["image"]]
    table = pa.table({"image": pa.array(contents), "label": rows["label"].tolist()})
    with duckdb.connect() as connection:
        connection.register("rows", table)
        connection.execute(f"COPY (SELECT * FROM rows) TO '{file}' (FORMAT parquet)")


def by_duckdb_with_an_enumeration(file: Path) -> None:
    with duckdb.connect() as connection:
        connection.register("rows", pa.Table.from_pandas(frame()))
        connection.execute("CREATE TYPE kind AS ENUM ('eel', 'dog', 'cat', 'fox')")
        connection.execute(f"COPY (SELECT image, label::kind AS label FROM rows) TO '{file}' (FORMAT parquet)")


def by_datasets(file: Path) -> None:
    import datasets  # late: 2.5 s

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_pandas(frame(), features=features).to_parquet(file)


WRITERS = [
    by_pandas,
    by_pandas_with_categories_and_an_index,
    by_pandas_with_the_label_as_index,
    by_polars,
    by_polars_with_categories,
    by_polars_with_an_enumeration,
    by_duckdb,
    by_duckdb_with_an_enumeration,
    by_datasets,
]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_what_other_tools_write_is_read(root: Path, writer: Callable[[Path], None]) -> None:
    root.mkdir()
    writer(root / "train.parquet")
    origin = opened(root)
    block = read(origin)
    assert origin.classes == ("cat", "dog", "eel")
    assert block.labels.tolist() == [1, 0, 1, 2]
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, row) for row in range(4)]))


def test_paths_that_datasets_writes_instead_of_images_are_read(root: Path) -> None:
    """`embed_external_files=False` leaves absolute paths, as on the machine that wrote them."""
    for row in range(2):
        save(root / f"{row}.png", 0, row)
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [str(root / f"{row}.png") for row in range(2)], "label": [1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]
    write(root / "train.parquet", table)
    assert table["image"].to_pylist()[0]["bytes"] is None
    origin = opened(root)
    assert origin.classes == ("cat", "dog")
    np.testing.assert_array_equal(read(origin).images, np.stack([pixels_of(0, 0), pixels_of(0, 1)]))
    shutil.copytree(root, root.parent / "moved")
    with pytest.raises(
        SourceError, match=r"none of its first 2 images is embedded or found.* leads outside data\.root"
    ):
        opened(root.parent / "moved")


# ------------------------------------------------------------------------------------------------------------------
# What is refused


TABLE = table_of([0, 1])


def replaced(column: int, values: Any, name: str = "") -> pa.Table:
    return TABLE.set_column(column, name or TABLE.column_names[column], pa.array(values))


FAULTS: dict[str, tuple[pa.Table, str]] = {
    "no image": (TABLE.drop_columns(["image"]), "has no column 'image' or 'img', only label"),
    "no label": (TABLE.drop_columns(["label"]), "has no column 'label' or 'labels' or 'fine_label', only image"),
    "numbers for images": (replaced(0, [1, 2]), "column 'image' is int64"),
    "neither bytes nor paths": (replaced(0, [{"x": "x"}] * 2), r"column 'image' is struct<x: string>"),
    "nothing for bytes": (replaced(0, [{"bytes": None, "path": None}] * 2), "is struct<bytes: null, path: null>"),
    "text for bytes": (replaced(0, [{"bytes": "x"}] * 2), r"column 'image' is struct<bytes: string>"),
    "fractions for labels": (replaced(1, [0.0, 0.1]), r"row 1 of column 'label' \(double\) is 0.1, not a whole number"),
    "bytes for labels": (replaced(1, [b"cat", b"dog"]), "column 'label' is binary"),
    "dates for labels": (replaced(1, [datetime.date(2024, 1, 1)] * 2), "column 'label' is date32"),
    "one class": (table_of([0, 0], names=["only"]), "names only one class"),
    "no JSON": (TABLE.replace_schema_metadata({"huggingface": "{"}), "metadata 'huggingface' does not describe"),
    "other JSON": (TABLE.replace_schema_metadata({"huggingface": "{}"}), r"does not describe 'label' \(KeyError"),
    "no rows": (TABLE[:0], "has no rows"),
    "no rows with names": (table_of([], names=["a", "b"]), "has no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_another_layout_is_named(root: Path, fault: str) -> None:
    table, expected = FAULTS[fault]
    write(root / "train.parquet", table)
    with pytest.raises(SourceError, match=expected):
        opened(root)


def test_files_must_have_the_same_classes(root: Path) -> None:
    for number, names in enumerate([None, ["a", "b"], ["b", "a"]]):
        write(root / f"train-{number}.parquet", table_of([0, 1], names=names))
    with pytest.raises(SourceError, match=r"train-2\.parquet in .*: its class 0 is 'b', but 'a' in train-1\.parquet"):
        opened(root)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -100])
def test_a_file_that_is_cut_off_is_named(root: Path, keep: int) -> None:
    write(root / "train.parquet", TABLE)
    content = (root / "train.parquet").read_bytes()
    (root / "train.parquet").write_bytes(content[:keep])
    with pytest.raises(SourceError, match=r"train\.parquet in data\.root = .*: is not a valid Parquet file"):
        opened(root)


def test_a_root_without_training_files_is_named(root: Path) -> None:
    write(root / "test-0.parquet", TABLE)
    with pytest.raises(SourceError, match=f"data.root = {root}: holds no training file"):
        opened(root)


@pytest.mark.parametrize("below", ["nowhere", "*.parquet", "x.txt/more", ""])
def test_a_root_without_parquet_files_is_named(root: Path, below: str) -> None:
    root.mkdir()
    (root / "x.txt").touch()
    with pytest.raises(SourceError, match=r"data\.root = .*: (there is no Parquet file|cannot be listed)"):
        opened(root / below)


def test_an_address_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(SourceError, match=r"data\.root = nosuch://x: cannot be opened"):
        opened("nosuch://x")


@pytest.mark.skipif(not SHARED_CIFAR.exists(), reason="CIFAR-10-JPEG is not on this machine")
def test_cifar10_jpeg_is_what_pillow_decodes() -> None:
    origin = opened(os.path.relpath(SHARED_CIFAR))
    assert {part: len(labels) for part, labels in origin.labels.items()} == {"train": 50_000, "test": 10_000}
    assert np.bincount(origin.labels["train"]).tolist() == [5000] * 10
    assert origin.classes[:3] == ("airplane", "automobile", "bird")
    [file] = SHARED_CIFAR.glob("test-*.parquet")
    table = next(pq.ParquetFile(file).iter_batches(50))
    block = origin.cut("test", np.arange(50)).read()[0]
    contents = table["img"].field("bytes").to_pylist()
    np.testing.assert_array_equal(block.images, np.stack([np.asarray(Image.open(io.BytesIO(of))) for of in contents]))
    assert block.labels.tolist() == table["label"].to_pylist()
    assert block.row_ids == [f"{file.name}#{row}" for row in range(50)]
