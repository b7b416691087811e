"""An evaluation that loses workers, its driver and nodes writes the bytes that it would have written."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from rcnn.config import PipelineConfig
from rcnn.evaluate.predictions import PREDICTIONS
from rcnn.evaluate.report import run_evaluate
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from tests.evaluate.scene import ingested, many_test_rows, untrained
from tests.faults.kills import _name_of

pytestmark = pytest.mark.slow

SECONDS_TO_START = 240
SECONDS_TO_END = 600


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """58 parts of 52 rows, each of which takes half a second or more."""
    settings = {"model.k": 96, "model.t": 5, "evaluate.batch_size": 13, "ray.num_cpus": 2}
    return many_test_rows(tmp_path_factory.mktemp("evaluation"), **settings)


@pytest.fixture(scope="module")
def expected(config: PipelineConfig) -> str:
    """The SHA-256 of the predictions that one process makes, undisturbed."""
    data = ingested(config)
    target = StageFolder(Storage(config.storage), "runs/undisturbed")
    return run_evaluate(config, data, untrained(config, data), target, NoTracker()).predictions_sha256


class Evaluation:
    """A `rcnn evaluate` in a process of its own, and its Ray."""

    def __init__(self, config: PipelineConfig, folder: Path, *arguments: str, **execution: object):
        settings = {f"execution.{name}": value for name, value in execution.items()}
        (folder / "config.json").write_text(config.with_settings(settings).model_dump_json())
        self.log, self.storage = folder / "log.txt", Path(config.storage)
        command = [sys.executable, "-m", "rcnn.cli", "evaluate", "--config", str(folder / "config.json"), *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._ours = [psutil.Process(self.process.pid)]

    def workers(self) -> list[psutil.Process]:
        """The processes that score."""
        with suppress(psutil.Error):
            self._ours = [self._ours[0], *self._ours[0].children(recursive=True)]
        return [process for process in self._ours if "ScoringWorker" in _name_of(process)]

    def wait_for_parts(self, count: int) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while len(list(self.storage.glob("reports/*/_parts/*.json"))) < count:
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def kill_with_all_that_it_started(self) -> None:
        self.workers()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(self._ours, timeout=10)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)

    def finish(self) -> str:
        """Waits for the end; returns the SHA-256 of the predictions."""
        assert self.process.wait(timeout=SECONDS_TO_END) == 0, self.log.read_text()
        [result] = self.storage.glob("reports/*/_result.json")
        assert not (result.parent / "_parts").exists()
        assert (result.parent / PREDICTIONS).exists()
        return str(json.loads(result.read_text())["predictions_sha256"])


def test_killed_workers_are_replaced_and_too_many_deaths_are_reported(
    config: PipelineConfig, expected: str, tmp_path: Path
) -> None:
    strict = Evaluation(config, tmp_path, "--fresh", num_workers=2, max_failures=0)
    strict.wait_for_parts(2)
    strict.workers()[0].kill()
    assert strict.process.wait(timeout=SECONDS_TO_END) == 2
    [line] = [line for line in strict.log.read_text().splitlines() if line.startswith("rcnn: ")]
    assert "execution.max_failures = 0: workers died more often than allowed without scoring a part" in line
    tolerant = Evaluation(config, tmp_path, num_workers=2)
    tolerant.wait_for_parts(8)
    assert len(tolerant.workers()) == 2
    tolerant.workers()[0].kill()
    assert tolerant.finish() == expected
    text = tolerant.log.read_text()
    assert "  resuming: " in text
    assert "its part is scored by another" in text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_evaluation_without_its_driver_resumes_with_its_parts(
    config: PipelineConfig, expected: str, tmp_path: Path, number: signal.Signals
) -> None:
    interrupted = Evaluation(config, tmp_path, "--fresh", num_workers=2)
    interrupted.wait_for_parts(5)
    if number == signal.SIGINT:
        interrupted.process.send_signal(number)
        assert interrupted.process.wait(timeout=60) == 130, interrupted.log.read_text()
    else:
        interrupted.kill_with_all_that_it_started()
    num_scored = len(list(Path(config.storage).glob("reports/*/_parts/*.json")))
    assert num_scored >= 5
    resumed = Evaluation(config, tmp_path, num_workers=1)
    assert resumed.finish() == expected
    assert f"{58 - num_scored} parts left" in resumed.log.read_text()
    assert "starting Ray" not in resumed.log.read_text()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray whose head has no cores, as that of a cluster should, and two nodes of one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_a_lost_node_is_replaced_and_the_head_scores_nothing(
    config: PipelineConfig, expected: str, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    on_cluster = config.with_settings({"ray.address": "auto", "ray.num_cpus": 0})
    evaluation = Evaluation(on_cluster, tmp_path, "--fresh", num_workers=2)
    evaluation.wait_for_parts(4)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert evaluation.finish() == expected
    assert "  a worker died (" in evaluation.log.read_text()
