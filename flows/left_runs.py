"""Flow runs whose process has ended, while Prefect still shows them as running.

In: each flow labels its run with its process. Out: the runs to close, for the keeper of the stack and for `rcnn doctor`.
Prefect's worker closes the run of a process that it has started and sees die, but not one that dies with the worker or with the
machine, nor one that a shell has started.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from rcnn.config import PipelineConfig
from rcnn.lease import holder_from_json, this_process
from rcnn.progress import say

FLOW = "rcnn"
LABEL = "rcnn.process"
SECONDS_TO_START = 600
SECONDS_TO_CANCEL = 60
"""More than a worker needs: it kills after 30 s."""


def label_flow_run() -> None:
    """Notes in Prefect which process runs this flow."""
    if not flow_run.id:
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, {LABEL: json.dumps(asdict(this_process(FLOW)))})
    except httpx.HTTPError as error:
        say(f"  Prefect does not answer ({error}); if this flow is killed, its run stays open")


def left_flow_runs(config: PipelineConfig) -> Iterator[tuple[Any, ...]]:
    """A check of `rcnn doctor`: flow runs that look as if they were running.

    Those whose process was on this machine and has ended, those that never got one, and those that were cancelled and whose
    process lives: a worker that was started again does not know the flows of the one before.
    """
    open_states = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=open_states)),
        )
    for run in runs:
        if found := _fault_of(run):
            why, close = found
            yield f"the flow run {run.name} ({str(run.id)[:8]}) is {run.state_name}, {why}", _MEND, close


_MEND = "`rcnn doctor --mend` ends it"


def _fault_of(run: FlowRun) -> tuple[str, Callable[[], None]] | None:
    """Why a run is not what it seems, and what ends it."""
    holder = holder_from_json(str(run.labels.get(LABEL, "")))
    assert run.state is not None, "it was found by its state"
    seconds = (datetime.now(UTC) - run.state.timestamp).total_seconds()
    if holder.token and holder.is_gone:
        return f"and its {holder} has ended", partial(_close, run)
    if run.state_type is StateType.PENDING and seconds > SECONDS_TO_START:
        return "and no process has started it", partial(_close, run)
    if run.state_type is StateType.CANCELLING and holder.is_here and seconds > SECONDS_TO_CANCEL:
        return f"and its {holder} still runs", partial(os.kill, holder.pid, signal.SIGTERM)
    return None


def _close(run: FlowRun) -> None:
    was_cancelled = run.state_type is StateType.CANCELLING
    state = Cancelled() if was_cancelled else Crashed(message="Its process has ended without a word.")
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=True)
