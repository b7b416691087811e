"""Flow runs of the dead and of the living, with a real Prefect server."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelling, Running

from flows import left_runs
from flows.left_runs import FLOW, LABEL, label_flow_run, left_flow_runs
from rcnn import lease
from rcnn.config import PipelineConfig
from rcnn.lease import Holder, this_process

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("prefect_server")]


@flow(name=FLOW)
def an_rcnn_flow() -> None:
    """Is never run; its runs are."""


@pytest.fixture
def dead() -> Holder:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return replace(this_process(FLOW), pid=ended.pid)


@pytest.fixture
def new_run() -> Iterator[object]:
    with get_client(sync_client=True) as client:

        def make(state: object, holder: Holder | None) -> UUID:
            run = client.create_flow_run(an_rcnn_flow, state=state)
            if holder:
                client.update_flow_run_labels(run.id, {LABEL: json.dumps(asdict(holder))})
            return run.id

        yield make


def state_of(run_id: UUID) -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(run_id).state_name)


def test_runs_of_the_dead_are_closed_and_no_others(new_run: object, dead: Holder) -> None:
    living, elsewhere = this_process(FLOW), replace(dead, host="another")
    crashed, cancelled = new_run(Running(), dead), new_run(Cancelling(), dead)  # type: ignore[operator]
    others = [new_run(Running(), holder) for holder in (living, elsewhere, None)]  # type: ignore[operator]
    for text, remedy, close in left_flow_runs(PipelineConfig()):
        assert f"its process {dead.pid} on" in text
        assert remedy == "`rcnn doctor --mend` ends it"
        close()
    assert (state_of(crashed), state_of(cancelled)) == ("Crashed", "Cancelled")
    assert [state_of(run) for run in others] == ["Running"] * 3
    assert list(left_flow_runs(PipelineConfig())) == []


def test_a_cancelled_run_whose_worker_has_gone_is_told_to_end(new_run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "600"]) as orphan:
        holder = replace(this_process(FLOW), pid=orphan.pid, born=lease._born(orphan.pid))
        run = new_run(Cancelling(), holder)  # type: ignore[operator]
        assert list(left_flow_runs(PipelineConfig())) == [], "its worker has a minute"
        monkeypatch.setattr(left_runs, "SECONDS_TO_CANCEL", 0)
        [(text, _, end)] = left_flow_runs(PipelineConfig())
        assert f"its process {orphan.pid} on" in text
        end()
        assert orphan.wait(10) == -signal.SIGTERM
    [(_, _, close)] = left_flow_runs(PipelineConfig())
    close()
    assert state_of(run) == "Cancelled"


def test_a_flow_notes_its_own_process() -> None:
    @flow(name=FLOW)
    def noting() -> str:
        label_flow_run()
        return str(flow_run.id)

    with get_client(sync_client=True) as client:
        labels = client.read_flow_run(UUID(noting())).labels
    assert json.loads(str(labels[LABEL]))["pid"] == this_process(FLOW).pid
