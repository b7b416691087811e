"""What batch prediction reads, against the arrays that were written."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rcnn.data.sources.decode import ImageRule
from rcnn.errors import ConfigError, DataError, RcnnError, SourceError
from rcnn.evaluate import batch_inputs
from rcnn.evaluate.batch_inputs import BatchPart, ParquetRows, find_inputs, plan_parts, read_rows

SHAPE = (6, 5, 3)
RULE = ImageRule(image_shape=SHAPE, resize="stretch", is_grey_required=False, max_pixels=10_000)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def as_png(image_HWC: np.ndarray) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(image_HWC).save(packed, "png")
    return packed.getvalue()


def as_tensors(images: np.ndarray, folder: Path) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(images)


def as_lists(images: np.ndarray, folder: Path) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), int(np.prod(SHAPE)))


def as_bytes(images: np.ndarray, folder: Path) -> pa.Array:
    return pa.array(list(map(as_png, images)), pa.binary())


def as_structs(images: np.ndarray, folder: Path) -> pa.Array:
    rows = [{"bytes": as_png(image), "path": f"{number}.png"} for number, image in enumerate(images)]
    return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def as_paths(images: np.ndarray, folder: Path) -> pa.Array:
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(as_png(image))
    return pa.array([f"{number}.png" for number in range(len(images))], pa.string())


def write(file: Path, column: pa.Array, *, row_group_size: int = 1000, **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": column, **more}), file, row_group_size=row_group_size)
    return file


def read_all(parts: list[BatchPart]) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
    """Ids, pixels and bad rows of all parts of a Parquet input."""
    rows = []
    for piece in (piece for part in parts for piece in part.pieces):
        assert isinstance(piece, ParquetRows)
        rows += list(read_rows(piece, RULE))
    bad = [each for some in rows for each in some.bad]
    return [row_id for some in rows for row_id in some.ids], np.concatenate([some.images for some in rows]), bad


@pytest.mark.parametrize("layout", [as_tensors, as_lists, as_bytes, as_structs, as_paths])
@pytest.mark.parametrize("row_group_size", [7, 30, 1000])
def test_each_row_of_each_layout_is_read_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[..., pa.Array], row_group_size: int
) -> None:
    """Row groups are smaller than a part, larger, and much larger: the parts of 20 rows have borders within them."""
    monkeypatch.setattr(batch_inputs, "ROWS_PER_PART", 20)
    monkeypatch.setattr(batch_inputs, "ROWS_PER_READ", 8)
    images = random_images(95)
    write(tmp_path / "a.parquet", layout(images, tmp_path), row_group_size=row_group_size)
    parts = plan_parts(find_inputs(str(tmp_path)), SHAPE)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert len(parts) > 1
    ids, found, bad = read_all(parts)
    assert ids == [f"a.parquet#{row}" for row in range(95)]
    np.testing.assert_array_equal(found, images)
    assert bad == []


def test_small_files_share_a_part_and_a_large_row_group_has_at_most_sixteen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_inputs, "ROWS_PER_PART", 10)
    for number in range(8):
        write(tmp_path / "small" / f"{number}.parquet", as_tensors(random_images(3), tmp_path))
    assert [len(part) for part in plan_parts(find_inputs(str(tmp_path / "small")), SHAPE)] == [12, 12]
    write(tmp_path / "large.parquet", as_tensors(random_images(500), tmp_path))
    assert [len(part) for part in plan_parts(find_inputs(str(tmp_path / "large.parquet")), SHAPE)] == [32] * 15 + [20]


def test_rows_are_named_by_their_own_ids_and_by_their_place_where_they_have_none(tmp_path: Path) -> None:
    ids = pa.array(["x", None, "z"])
    for kind in (pa.string(), pa.large_string()):
        write(tmp_path / "in" / "deep" / "a.parquet", as_bytes(random_images(3), tmp_path), row_id=ids.cast(kind))
        found, _, _ = read_all(plan_parts(find_inputs(str(tmp_path / "in")), SHAPE))
        assert found == ["x", "deep/a.parquet#1", "z"]


def test_images_that_are_null_or_damaged_are_bad_and_the_others_are_read(tmp_path: Path) -> None:
    images = random_images(2)
    encoded = [*map(as_png, images), b"no image", None]
    write(tmp_path / "encoded.parquet", pa.array(encoded, pa.binary()))
    _, found, bad = read_all(plan_parts(find_inputs(str(tmp_path / "encoded.parquet")), SHAPE))
    np.testing.assert_array_equal(found, images)
    assert [row_id for row_id, _ in bad] == ["encoded.parquet#2", "encoded.parquet#3"]
    assert "is not an image" in bad[0][1]
    assert "null" in bad[1][1]


def test_encoded_images_of_any_size_are_resized_and_pixels_of_another_shape_are_refused(tmp_path: Path) -> None:
    large = np.full((12, 10, 3), 77, np.uint8)
    write(tmp_path / "encoded.parquet", pa.array([as_png(large)], pa.binary()))
    _, found, _ = read_all(plan_parts(find_inputs(str(tmp_path / "encoded.parquet")), SHAPE))
    np.testing.assert_array_equal(found, np.full((1, *SHAPE), 77))
    write(tmp_path / "pixels.parquet", pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([large, large])))
    with pytest.raises(
        DataError, match=r"has uint8 of the shape \(12, 10, 3\), and the model takes uint8 of \(6, 5, 3\)"
    ):
        plan_parts(find_inputs(str(tmp_path / "pixels.parquet")), SHAPE)
    write(tmp_path / "pixels.parquet", pa.FixedShapeTensorArray.from_numpy_ndarray(random_images(2) / np.float32(1)))
    with pytest.raises(DataError, match=r"has float of the shape \(6, 5, 3\), and the model takes uint8"):
        plan_parts(find_inputs(str(tmp_path / "pixels.parquet")), SHAPE)


def test_the_column_of_images_can_be_chosen_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pa.array([1, 2]), photo=as_bytes(random_images(2), tmp_path))
    inputs = find_inputs(str(file))
    assert len(read_all(plan_parts(inputs, SHAPE, image_column="photo"))[0]) == 2
    with pytest.raises(DataError, match=r"a\.parquet in .*: column 'image' is int64\. Images are pixels"):
        plan_parts(inputs, SHAPE)
    with pytest.raises(DataError, match=r"has no column 'picture', only image, photo\. Name the column .*image_column"):
        plan_parts(inputs, SHAPE, image_column="picture")


def test_inputs_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, fault in (
        ("empty", "no Parquet file and no image file found"),
        ("absent", "does not exist"),
        ("*.gif", "no Parquet file and no image file found"),
    ):
        with pytest.raises(ConfigError, match=fault):
            find_inputs(str(tmp_path / source))
    (tmp_path / "bad.parquet").write_text("no Parquet")
    with pytest.raises(SourceError, match=r"^bad\.parquet in /.*: is not a valid Parquet file"):
        plan_parts(find_inputs(str(tmp_path / "bad.parquet")), SHAPE)


def test_a_folder_of_images_and_a_glob_of_them_are_files_and_a_folder_with_parquet_is_parquet(tmp_path: Path) -> None:
    as_paths(random_images(3), tmp_path)
    for source in (str(tmp_path), f"{tmp_path}/*.png"):
        inputs = find_inputs(source)
        assert inputs.kind == "images"
        [part] = plan_parts(inputs, SHAPE)
        assert [file for piece in part.pieces for file in piece.files] == [  # type: ignore[union-attr]
            str(tmp_path / f"{number}.png") for number in range(3)
        ]
    write(tmp_path / "list.parquet", pa.array(["0.png"]))
    assert find_inputs(str(tmp_path)).kind == "parquet"


def test_the_digest_changes_with_each_file(tmp_path: Path) -> None:
    as_paths(random_images(3), tmp_path)
    digests = {find_inputs(str(tmp_path)).digest}
    assert {find_inputs(str(tmp_path)).digest} == digests
    (tmp_path / "1.png").write_bytes(b"changed")
    digests.add(find_inputs(str(tmp_path)).digest)
    (tmp_path / "2.png").unlink()
    digests.add(find_inputs(str(tmp_path)).digest)
    (tmp_path / "0.png").rename(tmp_path / "9.png")
    digests.add(find_inputs(str(tmp_path)).digest)
    assert len(digests) == 4


def test_a_file_that_shrank_after_the_parts_were_planned_is_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", as_tensors(random_images(9), tmp_path))
    parts = plan_parts(find_inputs(str(file)), SHAPE)
    write(file, as_tensors(random_images(5), tmp_path))
    with pytest.raises(RcnnError, match="it has 5 rows now, and had 9"):
        read_all(parts)
