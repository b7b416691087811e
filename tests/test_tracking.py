"""Where MLflow keeps runs, and where it must not."""

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.tracking import NoTracker, file_page, finish_failed, runs_page, tracking_uri, version_page, with_pages


@pytest.mark.parametrize("address", ["", "auto", "http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265"])
def test_on_one_machine_the_store_is_a_file_in_the_storage(address: str) -> None:
    config = PipelineConfig().with_settings({"ray.address": address, "storage": "/data"})
    assert tracking_uri(config) == "sqlite:////data/mlflow.db"


def test_with_ray_on_another_machine_a_server_is_needed() -> None:
    config = PipelineConfig().with_settings({"ray.address": "http://head:8265"})
    with pytest.raises(
        ConfigError, match=r"tracking\.uri, with ray\.address = http://head:8265: is empty, .*Set tracking"
    ):
        tracking_uri(config)
    served = config.with_settings({"tracking.uri": "http://mlflow:5000"})
    assert tracking_uri(served) == "http://mlflow:5000"


def test_pages_of_mlflow_open_training_runs_files_and_versions() -> None:
    server = "http://mlflow:5000/"
    shown = "workflowType=machine_learning"
    assert runs_page(server, "3") == f"http://mlflow:5000/#/experiments/3/runs?{shown}&viewStateShareKey=rcnn"
    assert (
        file_page(server, "3", "abc", "report.html")
        == "http://mlflow:5000/#/experiments/3/runs/abc/artifacts/report.html?workflowType=machine_learning"
    )
    assert version_page(server, "my model", 2) == "http://mlflow:5000/#/models/my%20model/versions/2"


def test_a_run_links_to_what_shows_the_same_work() -> None:
    tags = {"rcnn.recipe": "demo", "rcnn.ray_page": "http://ray:8265/#/jobs/rcnn-1"}
    assert (
        with_pages("Trains.", tags)
        == "Trains.\n\n- Ray job: [http://ray:8265/#/jobs/rcnn-1](http://ray:8265/#/jobs/rcnn-1)"
    )
    assert with_pages("Trains.", {"rcnn.recipe": "demo"}) == "Trains."


class Noted(NoTracker):
    def finish(self, *, failed: bool = False, killed: bool = False) -> None:
        self.end = (failed, killed)


@pytest.mark.parametrize(
    ("error", "end"),
    [(ValueError(), (True, False)), (KeyboardInterrupt(), (False, True)), (SystemExit(143), (False, True))],
)
def test_what_a_signal_ended_was_killed_and_did_not_fail(error: BaseException, end: tuple[bool, bool]) -> None:
    tracker = Noted()
    try:
        raise error
    except BaseException:
        finish_failed(tracker)
    assert tracker.end == end
