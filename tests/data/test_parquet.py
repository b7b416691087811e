"""Parquet files in the Hugging Face layout: which files are read, as which part, and exactly the rows that are asked for."""

import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rcnn.config import DataConfig
from rcnn.data.schema import Block
from rcnn.data.sources import open_source
from rcnn.data.sources.origin import Origin
from rcnn.data.sources.parquet import ROWS_PER_READ, list_paths
from rcnn.errors import RcnnError, SourceError

SHARED_CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg"
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
        ("0.parquet#1", f"label is null, and must be {bound}"),
        *([("0.parquet#4", f"label is {largest}, and must be 0 to 2")] if names else []),
    ]


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
        ("train.parquet#1", f"label is {told}, and must be 0 to 2")
    ]
    block = read(origin)
    assert block.row_ids == ["train.parquet#0", "train.parquet#2"]
    np.testing.assert_array_equal(block.images, np.stack([pixels_of(0, 0), pixels_of(0, 2)]))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"bytes": None, "path": "1.png"}, "image.bytes is null"),
        (None, "image.bytes is null"),
        ({"bytes": b"", "path": None}, "is empty"),
        ({"bytes": b"no image", "path": None}, r"is no image that can be read"),
        ({"bytes": as_png(np.zeros((2, 4, 3), np.uint8)), "path": None}, "is 4x2, and the first image is 3x2"),
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


TABLE = table_of([0, 1])


def replaced(column: int, values: Any, name: str = "") -> pa.Table:
    return TABLE.set_column(column, name or TABLE.column_names[column], pa.array(values))


FAULTS: dict[str, tuple[pa.Table, str]] = {
    "no image": (TABLE.drop_columns(["image"]), "has no column 'image' or 'img', only label"),
    "no label": (TABLE.drop_columns(["label"]), "has no column 'label' or 'labels' or 'fine_label', only image"),
    "bytes alone": (replaced(0, [b"", b""]), "column 'image' is binary"),
    "paths alone": (replaced(0, [{"path": "x"}] * 2), r"column 'image' is struct<path: string>"),
    "text for bytes": (replaced(0, [{"bytes": "x"}] * 2), r"column 'image' is struct<bytes: string>"),
    "float labels": (replaced(1, [0.0, 1.0]), "column 'label' is double"),
    "text labels": (replaced(1, ["cat", "dog"]), "column 'label' is string"),
    "one class": (table_of([0, 0], names=["only"]), "names one class"),
    "no JSON": (TABLE.replace_schema_metadata({"huggingface": "{"}), "metadata 'huggingface' does not tell"),
    "other JSON": (TABLE.replace_schema_metadata({"huggingface": "{}"}), r"does not tell what 'label' is \(KeyError"),
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
    with pytest.raises(SourceError, match=r"train-2\.parquet in .*: its class 0 is 'b', and 'a' in train-1\.parquet"):
        opened(root)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -100])
def test_a_file_that_is_cut_off_is_named(root: Path, keep: int) -> None:
    write(root / "train.parquet", TABLE)
    content = (root / "train.parquet").read_bytes()
    (root / "train.parquet").write_bytes(content[:keep])
    with pytest.raises(SourceError, match=r"train\.parquet in data\.root = .*: is no sound Parquet file"):
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
