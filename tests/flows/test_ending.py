"""What a SIGTERM means to a flow, with a real Prefect server; and which lines of a job's log a flow shows."""

import signal
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelling

from flows.jobs import JobLog, ending_with_flow

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("prefect_server")]


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_only_a_cancelled_flow_stops_its_jobs_at_a_sigterm(is_cancelled: bool) -> None:
    stopped: list[str] = []

    @flow
    def ended() -> None:
        if is_cancelled:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(UUID(str(flow_run.id)), Cancelling(), force=True)
        # Caught here: Prefect's engine would send this process a real one.
        with pytest.raises(TerminationSignal), ending_with_flow(lambda: stopped.append("job")):
            raise TerminationSignal(signal.SIGTERM)

    ended(return_state=True)
    assert stopped == ["job"] * is_cancelled


def test_an_interrupt_stops_the_jobs_and_an_error_does_not() -> None:
    stopped: list[str] = []
    for error in (KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(error)), ending_with_flow(lambda: stopped.append("job")):
            raise error
    assert stopped == ["job"]


def test_a_log_is_shown_without_what_ray_says_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("flows.jobs.say", said.append)
    log = JobLog()
    log.begin()(
        "2026-11-26 17:34:26,588\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "Running entrypoint for job rcnn-train-1: rcnn train --job /storage/runs/jobs/rcnn-train-1\n"
        "train: RCNN-8, T = 1\n"
    )
    log.end()
    assert said == ["  | train: RCNN-8, T = 1"]
