"""What ingest writes is read as it is by the tools that people have, and what is exported by Hugging Face's `datasets`."""

from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.dataset
import pytest

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.data.export import export_huggingface
from rcnn.data.ingest import run_ingest
from rcnn.data.loader import load_rows
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.errors import ConfigError
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

pytestmark = pytest.mark.long


@pytest.fixture
def manifest(digits_storage: Path, digits: IngestResult) -> Manifest:
    return require_manifest(Storage(str(digits_storage)), digits.folder)


@pytest.fixture
def images(digits_storage: Path, digits: IngestResult, manifest: Manifest) -> np.ndarray:
    """The test images (N, 784), as our own loader reads them."""
    rows = load_rows(Storage(str(digits_storage)), digits.folder, manifest, "test")
    return rows.images.permute(0, 2, 3, 1).reshape(len(rows), -1).numpy()


@pytest.fixture
def shard(digits_storage: Path, digits: IngestResult) -> Path:
    return digits_storage / digits.folder / "test" / "test-00000.parquet"


def test_pyarrow_and_pandas(shard: Path, images: np.ndarray) -> None:
    table = pyarrow.dataset.dataset(shard.parent, format="parquet").to_table()
    frame = table.to_pandas()
    np.testing.assert_array_equal(np.stack(frame["image"]), images)
    assert frame["row_id"].str.startswith("train/").all()


def test_the_whole_folder_is_read_at_once(digits_storage: Path, digits: IngestResult, manifest: Manifest) -> None:
    folder = digits_storage / digits.folder
    rows = sum(split.rows for split in manifest.splits.values())
    assert pyarrow.dataset.dataset(folder).count_rows() == rows
    assert len(pandas.read_parquet(folder)) == rows
    assert polars.scan_parquet(folder, hidden_file_prefix="_").collect().height == rows
    assert duckdb.sql(f"SELECT count(*) FROM '{folder}/**/*.parquet'").fetchall() == [(rows,)]


def test_polars(shard: Path, images: np.ndarray) -> None:
    frame = polars.read_parquet(shard)
    np.testing.assert_array_equal(np.array(frame["image"].to_list(), np.uint8), images)
    assert frame["label"].value_counts().height == 10


def test_duckdb(shard: Path, images: np.ndarray) -> None:
    query = f"SELECT label, count(*), sum(list_sum(image)) FROM '{shard}' GROUP BY label ORDER BY label"
    found = duckdb.sql(query).fetchall()
    assert [row[1] for row in found] == [50] * 10
    assert sum(row[2] for row in found) == int(images.sum(dtype=np.int64))


def test_huggingface_shows_images_and_class_names(
    digits_storage: Path, digits: IngestResult, images: np.ndarray, tmp_path: Path
) -> None:
    target = tmp_path / "exported"
    files = export_huggingface(Storage(str(digits_storage)), digits.folder, target)
    by_split = {split: [file for file in files if f"/{split}-" in file] for split in ("train", "validation", "test")}
    from datasets import load_dataset  # late: 2.5 s

    loaded = load_dataset("parquet", data_files=by_split, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4050, "validation": 450, "test": 500}
    rows = loaded["test"]
    assert rows.features["label"].names == list("0123456789")
    np.testing.assert_array_equal(np.asarray(rows[7]["image"]).ravel(), images[7])
    assert rows[7]["image"].mode == "L"
    assert rows[7]["row_id"].startswith("train/")


def test_what_is_exported_comes_back_by_ingest(
    digits_storage: Path, digits: IngestResult, manifest: Manifest, tmp_path: Path
) -> None:
    export_huggingface(Storage(str(digits_storage)), digits.folder, tmp_path / "exported")
    config = PipelineConfig().with_settings({"data.source": "parquet", "data.root": str(tmp_path / "exported")})
    again = run_ingest(config, StageFolder(Storage(str(tmp_path)), "datasets/again"), NoTracker())
    assert again.rows == digits.rows
    returned = require_manifest(Storage(str(tmp_path)), again.folder)
    assert returned.classes == manifest.classes
    assert returned.pixel_mean == manifest.pixel_mean
    assert [split.rows_per_class for split in returned.splits.values()] == [
        split.rows_per_class for split in manifest.splits.values()
    ]


def test_an_export_is_whole_or_not_there(
    digits_storage: Path, digits: IngestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcnn.data import export

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "_table", fail)
        with pytest.raises(ConfigError, match="cannot be written \\(No space left on device\\)"):
            export_huggingface(Storage(str(digits_storage)), digits.folder, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []
    place = ["--set", f"storage={digits_storage}"]
    assert main(["data", "export", "mnist-sample", "--to", str(tmp_path / "exported"), *place]) == 0
    assert main(["data", "export", "mnist-sample", "--to", str(tmp_path / "exported"), *place]) == 2
