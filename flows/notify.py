"""Messages about flow runs that have ended, to any service that Apprise supports: Slack, mail, a web address of one's own.

The addresses hold passwords. They come only from the variable NOTIFY_URLS, and are never written.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.utilities.urls import url_for

from rcnn.progress import say
from rcnn.stages import STAGES, results_from_json
from rcnn.text import printable

Hook = Callable[[Any, Any, Any], None]
VARIABLE = "NOTIFY_URLS"
KINDS = {
    StateType.COMPLETED: "success",
    StateType.CANCELLING: "warning",
}  # the state in which a cancelled run's hooks are called
"""What Apprise colours a message by; anything else is a failure."""


def hooks(*of_cancellation: Hook) -> dict[str, list[Hook]]:
    """What Prefect calls when a run of a flow has ended, however it ended; `of_cancellation` before the message."""
    after = {name: [notify] for name in ("on_completion", "on_failure", "on_crashed")}
    return {**after, "on_cancellation": [*of_cancellation, notify]}


def notify(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Sends a message, if there are addresses (a hook of each flow). One that cannot be sent fails nothing."""
    urls = os.environ.get(VARIABLE, "").split()
    if not urls:
        return
    from apprise import Apprise  # late: most runs send no message

    logging.getLogger("apprise").disabled = True  # it writes an address that it does not know, with its password
    services = Apprise()
    num_unknown = sum(not services.add(url) for url in urls)
    if num_unknown:
        say(f"  {VARIABLE}: Apprise does not know {num_unknown} of {len(urls)} addresses (see its list of services)")
    title = f"{flow_run.name}: {'Cancelled' if state.is_cancelling() else state.name}"
    body = printable("\n".join(_lines(flow_run, state)))
    kind = KINDS.get(state.type, "failure")
    if len(services) and not services.notify(title=title, body=body, notify_type=kind):
        say(f"  {VARIABLE}: not every address took the message that this flow run ended")


def _lines(flow_run: FlowRun, state: State[Any]) -> Iterator[str]:
    """The figures of the stages, or why there are none, and where to look."""
    trees = state.result(raise_on_failure=False) if state.is_completed() else None
    if isinstance(trees, Mapping) and trees and set(trees) <= set(STAGES):
        for result in results_from_json(trees).values():
            yield from (f"{label}: {value}" for label, value in result.highlights(lambda name: name).items())
    elif state.message:
        yield state.message
    if page := url_for(flow_run):
        yield page
