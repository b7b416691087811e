"""Prefect's automation for flow runs that no longer report: the server marks them as crashed.

`python -m flows.automations` makes it, or brings it up to date. The local stack does without, since its keeper sees processes
die; a server with workers on other machines sees only that their heartbeats stop.
"""

from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

NAME = "rcnn: a flow run that no longer reports has crashed"
SECONDS_BETWEEN_HEARTBEATS = 30
"""Value of PREFECT_FLOWS_HEARTBEAT_FREQUENCY for the workers; Prefect's minimum."""
SECONDS_OF_SILENCE = 3 * SECONDS_BETWEEN_HEARTBEATS + 10
RUN = "prefect.flow-run"


def crash_silent_runs() -> Automation:
    """Makes the automation, or brings one of this name up to date."""
    wanted = _automation()
    try:
        there = Automation.read(name=NAME)
    except ValueError:
        return wanted.create()
    wanted.id, wanted.enabled = there.id, there.enabled
    wanted.update()
    return wanted


def _automation() -> Automation:
    ends = (f"{RUN}.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed"))
    return Automation(
        name=NAME,
        description=f"No heartbeat for {SECONDS_OF_SILENCE} s: the process or its machine is gone.",
        trigger=EventTrigger(
            after={f"{RUN}.heartbeat"},
            expect={f"{RUN}.heartbeat", *ends},
            match=ResourceSpecification({"prefect.resource.id": [f"{RUN}.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SECONDS_OF_SILENCE),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="It no longer reports: its process is gone.")],
    )


if __name__ == "__main__":
    print(f"automation: {crash_silent_runs().name}")
