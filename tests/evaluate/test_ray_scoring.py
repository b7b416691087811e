"""Evaluation on Ray workers writes the very file that this process writes."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.evaluate import ray_scoring
from rcnn.evaluate.predictions import PREDICTIONS, Part, parts_of
from rcnn.evaluate.ray_scoring import ScoringWorker
from rcnn.evaluate.report import run_evaluate
from rcnn.evaluate.scoring import ScoringJob
from rcnn.results import EvaluateResult, IngestResult, TrainResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from tests.evaluate.scene import ingested, many_test_rows, untrained

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    return many_test_rows(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def data(config: PipelineConfig) -> IngestResult:
    return ingested(config)


@pytest.fixture(scope="module")
def trained(config: PipelineConfig, data: IngestResult) -> TrainResult:
    return untrained(config, data)


def evaluate(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, name: str, **changed: object
) -> EvaluateResult:
    config = config.with_settings({f"execution.{setting}": value for setting, value in changed.items()})
    return run_evaluate(config, data, trained, StageFolder(Storage(config.storage), f"reports/{name}"), NoTracker())


def free_cores() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0))


def test_two_workers_write_the_same_bytes_as_this_process_and_free_their_cores(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    one = evaluate(config, data, trained, "one")
    with caplog.at_level(logging.INFO, logger="rcnn"):
        two = evaluate(config, data, trained, "two", num_workers=2)
    assert "scoring 15 parts of the test rows on up to 2 workers" in caplog.text
    assert two.predictions_sha256 == one.predictions_sha256
    contents = {Path(config.storage, "reports", name, PREDICTIONS).read_bytes() for name in ("one", "two")}
    assert len(contents) == 1
    assert (two.metrics, two.classes, two.num_rows) == (one.metrics, one.classes, 3000)
    assert two.images_per_second > 0
    assert two.predicted_seconds > 0
    deadline = time.monotonic() + 30
    while free_cores() < 2:
        assert time.monotonic() < deadline, "the workers keep their cores"
        time.sleep(0.2)


def test_a_worker_that_no_node_can_hold_is_refused(
    config: PipelineConfig, data: IngestResult, trained: TrainResult
) -> None:
    with pytest.raises(ClusterError, match="3 CPU cores are wanted and Ray has 2"):
        evaluate(config, data, trained, "large", num_workers=2, cpus_per_worker=3)


def test_a_worker_returns_our_errors(config: PipelineConfig, data: IngestResult, trained: TrainResult) -> None:
    job = ScoringJob(config.storage, "reports/x", data.folder, f"{trained.folder}/absent", 50, False, 1)
    Storage(config.storage).make_folder(job.model_folder)
    assert "does not hold a model" in str(ScoringWorker(job).load())
    worker = ScoringWorker(replace(job, data_folder="datasets/absent", model_folder=f"{trained.folder}/model"))
    assert worker.load() is None
    assert "the data set is missing or incomplete" in str(worker.score(parts_of(3000, 50)[0]))


@pytest.mark.thorough
def test_workers_that_hang_are_ended_and_replaced_until_it_is_too_often(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(ScoringWorker):
        def score(self, part: Part) -> RcnnError | None:
            time.sleep(600)
            return None

    monkeypatch.setattr(ray_scoring, "ScoringWorker", Hanging)
    monkeypatch.setattr(ray_scoring, "SECONDS_BETWEEN_LOOKS", 0.2)
    monkeypatch.setattr(ray_scoring, "MINUTES_FOR_A_PART", 0.01)
    with pytest.raises(
        ClusterError, match=r"max_failures = 1: workers died more often than allowed without scoring a part"
    ):
        evaluate(config, data, trained, "hanging", num_workers=2, max_failures=1)
