"""Where MLflow keeps runs, and where it must not."""

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.tracking import NoTracker, finish_failed, tracking_uri


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
