"""A real S3 protocol, served on this machine: a source there, and a storage there."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from rcnn.config import PipelineConfig
from rcnn.data.catalog import find_faults, list_data_sets
from rcnn.data.export import export_huggingface
from rcnn.data.ingest import run_ingest
from rcnn.data.loader import load_training_data
from rcnn.data.manifest import require_manifest
from rcnn.data.shards import sha256_of
from rcnn.data.sources import fingerprint
from rcnn.errors import ClusterError, SourceError
from rcnn.evaluate.figures import figures_of
from rcnn.evaluate.predictions import (
    PREDICTIONS,
    build_table,
    delete_parts,
    has_part,
    merge_parts,
    parts_of,
    write_part,
)
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def exported(
    s3_endpoint: str, digits_storage: Path, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The digits as Parquet files in a bucket."""
    folder = tmp_path_factory.mktemp("exported") / "digits"
    export_huggingface(Storage(str(digits_storage)), digits.folder, folder)
    filesystem, base = fs.FileSystem.from_uri(f"s3://source/digits?{s3_endpoint}")
    filesystem.create_dir("source")
    for file in (folder / "data").iterdir():
        with filesystem.open_output_stream(f"{base}/{file.name}") as stream:
            stream.write(file.read_bytes())
    return f"s3://source/digits?{s3_endpoint}"


def test_parquet_files_are_read_from_s3(exported: str, digits: IngestResult, tmp_path: Path) -> None:
    config = PipelineConfig().with_settings(
        {"data.source": "parquet", "data.root": exported, "data.name": "digits", "storage": str(tmp_path)}
    )
    result = run_ingest(config, StageFolder(Storage(str(tmp_path)), "datasets/x"), NoTracker())
    assert result.rows == digits.rows
    assert fingerprint(config.data) == fingerprint(config.data)
    missing = config.data.model_copy(update={"root": exported.replace("digits?", "nothing?")})
    with pytest.raises(SourceError, match="there is no Parquet file"):
        fingerprint(missing)


def test_images_that_parquet_files_on_s3_only_name_are_refused(s3_endpoint: str, tmp_path: Path) -> None:
    """They would be files of the machine that reads, or objects that nothing has checked to be below data.root."""
    filesystem, base = fs.FileSystem.from_uri(f"s3://paths/digits?{s3_endpoint}")
    filesystem.create_dir("paths")
    rows = pa.table({"image": [{"bytes": None, "path": f"{row}.png"} for row in range(2)], "label": ["a", "b"]})
    pq.write_table(rows, f"{base}/TRAIN.PARQUET", filesystem=filesystem)
    config = PipelineConfig().with_settings({"data.source": "parquet", "data.root": f"s3://paths/digits?{s3_endpoint}"})
    assert fingerprint(config.data)
    with pytest.raises(SourceError, match=r"its path '0\.png' cannot be followed, because data\.root is remote"):
        run_ingest(config, StageFolder(Storage(str(tmp_path)), "datasets/x"), NoTracker())


def test_a_data_set_is_kept_on_s3(s3_endpoint: str, digits: IngestResult) -> None:
    storage = Storage(f"s3://kept/root?{s3_endpoint}")
    storage.filesystem.create_dir("kept")
    result = run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker())
    manifest = require_manifest(storage, "datasets/x")
    assert result.rows == {"train": 3600, "val": 400, "test": 1000}
    assert list(find_faults(storage, "datasets/x")) == []
    assert [row["state"] for row in list_data_sets(storage)] == ["complete"]
    for engine in ("resident", "streaming"):
        assert len(load_training_data(storage, "datasets/x", engine=engine).train) == 3600
    [shard] = manifest.splits["test"].shards
    table = pq.read_table(storage.path(f"datasets/x/{shard.file}"), filesystem=storage.filesystem)
    assert len(table) == 1000


def test_predictions_are_merged_on_s3_and_a_failed_merge_leaves_no_file(s3_endpoint: str) -> None:
    storage = Storage(f"s3://scored/root?{s3_endpoint}")
    storage.filesystem.create_dir("scored")
    target, parts = StageFolder(storage, "reports/x"), parts_of(600, 50)
    rng = np.random.default_rng(0)
    for part in parts:
        labels_N, logits_NC = rng.integers(0, 3, len(part)), rng.random((len(part), 3), np.float32)
        row_ids = [f"test/{row}" for row in range(part.start, part.stop)]
        write_part(target, part, build_table(row_ids, labels_N, logits_NC, rng.random(len(part))))
    last = storage.read_bytes(target.path(parts[-1].file))
    storage.write_bytes(target.path(parts[-1].file), b"damaged")
    with pytest.raises(ClusterError, match="changed after they were written"):
        merge_parts(target, parts)
    assert not storage.exists(target.path(PREDICTIONS))
    assert [has_part(target, part) for part in parts] == [True, True, False]
    storage.write_bytes(target.path(parts[-1].file), last)
    assert merge_parts(target, parts) == sha256_of(storage, target.path(PREDICTIONS))
    delete_parts(target)
    assert list(storage.list_sizes(target.name)) == [PREDICTIONS]
    assert figures_of(target, 3).num_rows == 600
