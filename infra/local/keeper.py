"""The keeper: the part of the stack that looks after the others, and closes what crashes left open.

A part that runs and is not well for a minute is started again (supervisor itself sees only those that end). Flow runs and
MLflow runs whose process has ended are closed, at the second look, since a process may end between two questions.
"""

import os
import time
from collections.abc import Callable, Iterator

from infra.local.parts import Part, Stack, recorded
from infra.local.supervision import SECONDS_TO_START, Supervisor, timestamp
from rcnn.config import PipelineConfig
from rcnn.doctor import CHECKS, Finding
from rcnn.errors import RcnnError

SECONDS_BETWEEN_LOOKS = 10
SECONDS_UNWELL = 60
"""After which a part that answered once is started again; a busy machine may be silent for a while."""


def main() -> None:
    """Looks, until it is ended."""
    stack = recorded()
    assert stack, "supervisor runs in a stack"
    parts, left = Parts(stack), LeftOver(PipelineConfig().placed_by(os.environ).rooted())
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        parts.look()
        left.look()


def say(text: str) -> None:
    """A line of the keeper's log; `make status` reads those about parts."""
    print(f"{timestamp()} INFO {text}", flush=True)


class Parts:
    """The parts of a stack, and since when each is not well."""

    def __init__(self, stack: Stack, clock: Callable[[], float] = time.monotonic):
        self._stack, self._supervisor, self._clock = stack, Supervisor(stack), clock
        self._since: dict[str, float] = {}
        self._was_well: set[tuple[str, int]] = set()

    def look(self) -> None:
        """Starts again what has not been well for too long."""
        try:
            for part in self._stack.parts:
                self._look_at(part)
        except RcnnError as error:
            say(f"cannot look at the parts ({error})")

    def _look_at(self, part: Part) -> None:
        fault, _ = self._supervisor.fault_of(part)
        process = self._supervisor.process(part)
        if not fault:
            self._since.pop(part.name, None)
            self._was_well.add((part.name, process.pid))
            return
        since = self._since.setdefault(part.name, self._clock())
        patience = SECONDS_UNWELL if (part.name, process.pid) in self._was_well else SECONDS_TO_START
        is_started_elsewhere = process.state in ("BACKOFF", "STARTING", "STOPPING")
        if is_started_elsewhere or self._clock() - since < patience:
            return
        say(f"restarting: {part.name}, {fault}")
        self._since.pop(part.name)
        self._supervisor.stop_part(part)
        self._supervisor.start_part(part)


class LeftOver:
    """What ended processes left: leases, MLflow runs, flow runs."""

    def __init__(self, config: PipelineConfig):
        self._config = config
        self._seen: set[str] = set()

    def look(self) -> None:
        """Closes what was there at the look before too."""
        found: dict[str, Finding] = {}
        for check in (self._of_the_storage, self._of_prefect):
            try:
                found |= {each.text: each for each in check()}
            except Exception as error:
                say(f"cannot look for what crashes left ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        for text, finding in found.items():
            if text in self._seen and finding.mend:
                self._mend(finding)
        self._seen = set(found)

    def _mend(self, finding: Finding) -> None:
        try:
            assert finding.mend, "only what can be mended is mended"
            finding.mend()
        except Exception as error:
            say(f"{finding.text}: cannot be closed ({error})")
        else:
            say(f"{finding.text}: closed")

    def _of_the_storage(self) -> Iterator[Finding]:
        for facts in CHECKS["left over"](self._config):
            yield Finding("left over", *facts)

    def _of_prefect(self) -> Iterator[Finding]:
        from flows.left_runs import left_flow_runs

        for facts in left_flow_runs(self._config):
            yield Finding("flow runs", *facts)


if __name__ == "__main__":
    main()
