"""What the model answered, row by row: each row once, the same bytes after any interruption, readable by other tools."""

import json
import logging
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from rcnn.config import PipelineConfig
from rcnn.data.loader import Rows, load_rows
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.errors import ClusterError, DataError, LeaseLost
from rcnn.evaluate import scored_split, scoring
from rcnn.evaluate.figures import figures_of
from rcnn.evaluate.predictions import MOST_PARTS, PARTS, PREDICTIONS, has_part, merge_parts, parts_of
from rcnn.evaluate.report import run_evaluate
from rcnn.evaluate.scoring import ScoringJob, load_for_scoring, score_parts
from rcnn.results import EvaluateResult, IngestResult, TrainResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.checkpoint import load_model
from rcnn.train.step import score_logits
from tests.evaluate.scene import ingested, many_test_rows, untrained

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


class Scene:
    """A data set, a model, and its evaluation in this process."""

    def __init__(self, storage: Path):
        self.config: PipelineConfig = many_test_rows(storage)
        self.storage = Storage(self.config.storage)
        self.data: IngestResult = ingested(self.config)
        self.trained: TrainResult = untrained(self.config, self.data)
        self.manifest: Manifest = require_manifest(self.storage, self.data.folder)
        self.rows: Rows = load_rows(self.storage, self.data.folder, self.manifest, "test")
        self.target = StageFolder(self.storage, "reports/whole")
        self.result: EvaluateResult = self.evaluate(self.target)
        self.file = storage / "reports/whole" / PREDICTIONS

    def evaluate(self, target: StageFolder) -> EvaluateResult:
        return run_evaluate(self.config, self.data, self.trained, target, NoTracker())

    def job(self, target: StageFolder, num_threads: int = 2) -> ScoringJob:
        model_folder = f"{self.trained.folder}/model"
        batch_size = self.config.evaluate.batch_size
        return ScoringJob(
            self.storage.root, target.name, self.data.folder, model_folder, batch_size, False, num_threads
        )

    def score(self, target: StageFolder, num_threads: int = 2) -> None:
        """Leaves the parts as an evaluation does that was killed before it merged them."""
        job = self.job(target, num_threads)
        score_parts(job, load_for_scoring(job), parts_of(3000, job.batch_size))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def interrupted(scene: Scene, request: pytest.FixtureRequest) -> StageFolder:
    """A folder with all parts."""
    target = StageFolder(scene.storage, f"reports/{request.node.name}")
    scene.score(target)
    return target


def bytes_of(target: StageFolder, name: str = PREDICTIONS) -> bytes:
    return target.storage.read_bytes(target.path(name))


@pytest.mark.parametrize("batch_size", [1, 7, 256, 5000])
@pytest.mark.parametrize("num_rows", [1, 1023, 1024, 1025, 100_000])
def test_parts_hold_each_row_once_in_whole_batches(num_rows: int, batch_size: int) -> None:
    parts = parts_of(num_rows, batch_size)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))
    assert len(parts) <= MOST_PARTS
    assert all(part.start % batch_size == 0 for part in parts)
    assert len({part.file for part in parts} | {part.record for part in parts}) == 2 * len(parts)


def test_each_row_is_there_once_in_the_data_sets_order(scene: Scene) -> None:
    assert len({shard.rows for shard in scene.manifest.splits["test"].shards}) > 1
    folder = scene.storage.local_path(f"{scene.data.folder}/test")
    stored = pq.read_table([*map(str, sorted(folder.glob("*.parquet")))], columns=["row_id", "label"])
    table = pq.read_table(scene.file)
    assert table.select(["row_id", "label"]).equals(stored)
    assert len(set(table.column("row_id").to_pylist())) == 3000


def test_rows_add_up_to_the_scores_and_are_what_the_model_says(scene: Scene) -> None:
    table = pq.read_table(scene.file)
    logits_NC = torch.tensor(np.stack(table.column("logits").to_pylist()), dtype=torch.float32)
    model, _ = load_model(scene.storage.local_path(f"{scene.trained.folder}/model"))
    with torch.inference_mode():
        said_NC = torch.cat([model(images_NCHW) for images_NCHW in scene.rows.images.split(500)])
    torch.testing.assert_close(logits_NC, said_NC, rtol=1e-4, atol=1e-4)
    expected, found = score_logits(logits_NC, scene.rows.labels), figures_of(scene.target, 10).scores
    assert torch.equal(found.confusion, expected.confusion)
    assert float(found.loss_sum) == pytest.approx(float(expected.loss_sum), rel=1e-12)
    assert found.metrics().items() <= scene.result.metrics.items()
    labels_N = torch.tensor(table.column("label").to_pylist())
    assert table.column("predicted").to_pylist() == logits_NC.argmax(1).tolist()
    assert table.column("correct").to_pylist() == (logits_NC.argmax(1) == labels_N).tolist()
    losses_N = functional.cross_entropy(logits_NC.double(), labels_N, reduction="none")
    np.testing.assert_array_equal(table.column("loss").to_numpy(), losses_N.numpy())
    assert found.loss == pytest.approx(math.fsum(losses_N.tolist()) / 3000, rel=1e-12)


def test_a_gpu_that_is_too_small_names_the_setting(scene: Scene) -> None:
    class TooLarge(torch.nn.Module):
        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ClusterError, match=r"evaluate\.batch_size = 2: .* memory is too small .* Lower it"):
        scoring._score_batch(TooLarge(), torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(scene: Scene, num_threads: int) -> None:
    target = StageFolder(scene.storage, f"reports/threads-{num_threads}")
    before = torch.get_num_threads()
    scene.score(target, num_threads)
    assert torch.get_num_threads() == before
    assert merge_parts(target, parts_of(3000, 50)) == scene.result.predictions_sha256
    assert bytes_of(target) == scene.file.read_bytes()


def test_what_is_missing_or_damaged_is_named_and_only_that_is_scored_again(
    scene: Scene, interrupted: StageFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(3000, 50)
    folder = scene.storage.local_path(interrupted.name)
    changed = folder / parts[3].file
    changed.write_bytes(changed.read_bytes()[:-9] + b"not these")
    (folder / parts[5].file).unlink()
    (folder / parts[7].record).write_text('{"rows":')
    (folder / parts[9].record).unlink()  # as by a kill between file and record: nothing is wrong with that
    scored: list[int] = []

    def remember(job: ScoringJob, model: torch.nn.Module, todo: list, **options: object) -> None:
        scored.extend(part.number for part in todo)
        score_parts(job, model, todo, **options)

    monkeypatch.setattr(scored_split, "score_parts", remember)
    with caplog.at_level(logging.INFO, logger="rcnn"):
        result = scene.evaluate(interrupted)
    assert scored == [3, 5, 7, 9]
    assert f"{parts[3].file} was changed: its rows are scored again" in caplog.text
    assert f"{parts[5].file} is missing: its rows are scored again" in caplog.text
    assert f"{parts[7].file} or its record cannot be read: its rows are scored again" in caplog.text
    assert "part-00009" not in caplog.text
    assert "resuming: 2,200 of 3,000 rows are scored, 4 parts left" in caplog.text
    assert bytes_of(interrupted) == scene.file.read_bytes()
    assert result.metrics == scene.result.metrics
    assert result.predicted_seconds > 0


def test_an_evaluation_that_was_killed_before_its_report_scores_nothing_again(
    scene: Scene, interrupted: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(scored_split, "load_for_scoring")
    result = scene.evaluate(interrupted)
    assert bytes_of(interrupted) == scene.file.read_bytes()
    assert result.images_per_second == 0
    assert "images/s" not in result.inference


def test_parts_of_other_rows_do_not_count(scene: Scene, interrupted: StageFolder) -> None:
    parts = parts_of(3000, 50)
    folder = scene.storage.local_path(interrupted.name)
    shutil.copy(folder / parts[14].file, folder / parts[0].file)
    assert [has_part(interrupted, part) for part in parts[:2]] == [False, True]


def test_a_part_that_changes_before_it_is_merged_is_named(scene: Scene, interrupted: StageFolder) -> None:
    parts = parts_of(3000, 50)
    file = scene.storage.local_path(interrupted.path(parts[2].file))
    file.write_bytes(b"damaged")
    with pytest.raises(ClusterError, match="changed after they were written") as raised:
        merge_parts(interrupted, parts)
    assert raised.value.where == str(file)
    assert not scene.storage.exists(interrupted.path(PREDICTIONS))
    assert [name for name in os.listdir(file.parents[1]) if name != PARTS] == []


def test_a_damaged_file_of_predictions_is_named(scene: Scene, interrupted: StageFolder) -> None:
    merge_parts(interrupted, parts_of(3000, 50))
    file = scene.storage.local_path(interrupted.path(PREDICTIONS))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="the predictions cannot be read") as raised:
        figures_of(interrupted, 10)
    assert raised.value.where == str(file)


def test_polars_pandas_and_duckdb_read_the_same_rows(scene: Scene) -> None:
    logits_NC = np.stack(pq.read_table(scene.file).column("logits").to_pylist()).astype(np.float32)
    frame = polars.read_parquet(scene.file)
    assert frame.schema["logits"] == polars.Array(polars.Float32, 10)
    np.testing.assert_array_equal(frame["logits"].to_numpy(), logits_NC)
    np.testing.assert_array_equal(np.stack(pandas.read_parquet(scene.file)["logits"]), logits_NC)
    found = duckdb.sql(f"SELECT logits, correct, loss, predicted FROM '{scene.file}'").fetchnumpy()
    np.testing.assert_array_equal(np.stack(found["logits"]), logits_NC)
    assert 1 - found["correct"].mean() == pytest.approx(scene.result.test_error)
    assert found["loss"].mean() == pytest.approx(scene.result.metrics["loss"])


def test_the_line_of_the_report_shows_the_surest_mistakes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scene.file.parent)
    [line] = re.findall(r"`(polars\..*)`", Path("report.md").read_text())
    shown = eval(line, {"polars": polars})
    assert len(shown) == 10
    assert not shown["correct"].any()
    assert shown["loss"][0] == pytest.approx(max(pandas.read_parquet(PREDICTIONS).query("not correct")["loss"]))


def test_the_line_of_the_readme_counts_confusions(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    [query] = re.findall(r'duckdb\.sql\("(.*predictions.*)"\)', (ROOT / "rcnn/README.md").read_text())
    monkeypatch.chdir(scene.storage.root)
    counts = duckdb.sql(query.replace("storage/reports/*/", "reports/whole/")).fetchall()
    confusion = figures_of(scene.target, 10).confusion
    assert sum(count for *_, count in counts) == int(confusion.sum() - confusion.diagonal().sum())
    assert all(count == confusion[label, predicted] for label, predicted, count in counts)


def test_samples_show_the_first_row_of_each_class(scene: Scene) -> None:
    from PIL import Image

    labels_N = scene.rows.labels.tolist()
    for name, file in zip("0123456789", sorted((scene.file.parent / "samples").iterdir()), strict=True):
        with Image.open(file) as image:
            expected = scene.rows.images[labels_N.index(int(name)), 0].numpy()
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert json.loads((scene.file.parent / "metrics.json").read_text())["num_rows"] == 3000


def test_an_evaluation_that_lost_its_lease_writes_no_part(scene: Scene, interrupted: StageFolder) -> None:
    job = replace(scene.job(interrupted), token="of-another-process")
    [part, *_] = parts_of(3000, job.batch_size)
    before = (scene.storage.local_path(interrupted.name) / part.file).read_bytes()
    with pytest.raises(LeaseLost):
        score_parts(job, load_for_scoring(job), [part])
    assert (scene.storage.local_path(interrupted.name) / part.file).read_bytes() == before
