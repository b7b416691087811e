"""How fast a run goes: its end forecast from the first steps, its peak memory, and whether its time limit is reached.

In: a call after each step. Out: a `Forecast`, once, and an answer to "is the time up?" that all ranks share.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

WARMUP_STEPS, TIMED_STEPS = 3, 20
STEPS_BETWEEN_LOOKS = 10  # where ranks have to agree: a broadcast waits for the device
SCORING_SHARE = 1 / 3  # of a training step's time, for the same images: a forward pass without the two of the gradients


@dataclass(frozen=True)
class Forecast:
    """What the first steps of a run promise for the rest of it."""

    seconds_left: float
    peak_bytes: int
    """The most memory so far: the first steps allocate nearly all that the later ones need."""


class Pace:
    """The clock of a run.

    Args:
        device: where steps run.
        num_steps: training steps still to do, in all epochs.
        num_epochs: epochs still to do, the unfinished one included.
        validation_steps: the rank's validation images, in batches of a training step.
        on_forecast: called once, after the first `TIMED_STEPS` steps, or all of them where there are fewer.
        max_seconds: the time limit; 0: none.
        limit_of: the time limit, where `max_seconds` is 0, from the forecast; 0: none. Either on all ranks or on none.
        seconds_spent: seconds that count already.
        num_ranks: ranks that must agree; rank 0 looks at its clock.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_steps: int,
        num_epochs: int,
        validation_steps: float,
        on_forecast: Callable[[Forecast], None],
        max_seconds: float = 0.0,
        limit_of: Callable[[Forecast], float] = lambda forecast: 0.0,
        seconds_spent: float = 0.0,
        num_ranks: int = 1,
    ):
        self.device, self.num_steps, self.num_epochs = device, num_steps, num_epochs
        self.max_seconds, self.num_ranks, self._limit_of = max_seconds, num_ranks, limit_of
        self._validation_steps, self._on_forecast = validation_steps, on_forecast
        self._started = time.perf_counter() - seconds_spent
        self._timed_from = time.perf_counter()
        self._steps_done, self._step_seconds, self._validation_seconds = 0, 0.0, 0.0
        self._steps_to_time = min(WARMUP_STEPS + TIMED_STEPS, num_steps)
        self._warmup = min(WARMUP_STEPS, self._steps_to_time - 1)

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, those before a resumption included."""
        return time.perf_counter() - self._started

    def after_step(self) -> None:
        """To be called after each training step."""
        self._steps_done += 1
        if self._steps_done == self._warmup:
            self._wait()
            self._timed_from = time.perf_counter()
        elif self._steps_done == self._steps_to_time:
            self._wait()
            self._set_step_seconds()
            forecast = Forecast(self._seconds_left(), peak_bytes(self.device))
            self.max_seconds = self.max_seconds or self._limit_of(forecast)
            self._on_forecast(forecast)
        elif self.max_seconds and self._warmup < self._steps_done:
            self._set_step_seconds()

    def after_validation(self, seconds: float) -> None:
        """To be called after each validation, with the time that it took."""
        self._validation_seconds = seconds

    def is_over(self, step: int = 0) -> bool:
        """Whether the time left is just enough for a validation; the same answer on every rank.

        Args:
            step: steps done in this epoch; ranks agree after every `STEPS_BETWEEN_LOOKS`th.
        """
        if not self.max_seconds:
            return False
        if self.num_ranks == 1:
            return self._is_over_here(1)
        if step % STEPS_BETWEEN_LOOKS:
            return False
        answer = torch.tensor(self._is_over_here(STEPS_BETWEEN_LOOKS), device=self.device, dtype=torch.uint8)
        dist.broadcast(answer, src=0)
        return bool(answer)

    def _is_over_here(self, num_steps: int) -> bool:
        """Whether this many more steps, with a validation, would exceed the limit."""
        return self.seconds + num_steps * self._step_seconds + self._seconds_of_validation() > self.max_seconds

    def _seconds_of_validation(self) -> float:
        return self._validation_seconds or self._validation_steps * self._step_seconds * SCORING_SHARE

    def _seconds_left(self) -> float:
        steps_left = self.num_steps - self._steps_done
        left = steps_left * self._step_seconds + self.num_epochs * self._seconds_of_validation()
        return min(left, max(0.0, self.max_seconds - self.seconds)) if self.max_seconds else left

    def _set_step_seconds(self) -> None:
        self._step_seconds = (time.perf_counter() - self._timed_from) / (self._steps_done - self._warmup)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_bytes(device: torch.device) -> int:
    """The most memory held at a time: by tensors on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` is inherited from the process that started this one
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if lines:  # some sandboxes leave it out
            return int(lines[0].split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
