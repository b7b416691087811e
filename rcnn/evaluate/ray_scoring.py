"""Scores parts of the test rows on Ray workers. A worker that dies is replaced, and another one scores its part.

Workers are actors, not tasks: each loads the model once, and frees its cores, its GPU and the GPU's memory when no part is
left. A Ray task on a GPU would end its process, with torch and the model, after each part.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rcnn.ray_session import ensure_ray, require_room  # isort: skip  (sets what Ray reads)

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.evaluate.predictions import Part
from rcnn.evaluate.scoring import ScoringJob, load_for_scoring, score_parts
from rcnn.progress import say
from rcnn.storage import Storage
from rcnn.text import counted
from rcnn.train.elastic import Waiting

SECONDS_BETWEEN_LOOKS = 60.0
MINUTES_FOR_A_PART = 60.0  # a few thousand rows, which take minutes; a worker that takes longer hangs


def score_on_workers(
    config: PipelineConfig,
    job: ScoringJob,
    parts: Sequence[Part],
    *,
    on_start: Callable[[], None],
    on_part: Callable[[Part], None],
) -> None:
    """Writes the predictions of some parts on up to `execution.num_workers` workers: as many as there is room for.

    Args:
        config: the settings.
        job: what is scored, and how.
        parts: each worker scores one at a time.
        on_start: called when the first worker has loaded the model.
        on_part: called after each part.

    Raises:
        ClusterError: Ray or the storage is out of reach, there is no room for a worker, or workers die too often.
        RcnnError: the error of a worker.
    """
    how = config.execution
    ensure_ray(config, Storage(job.storage))
    settings = "execution.cpus_per_worker, execution.use_gpu"
    require_room(config, num_cpus=how.cpus_per_worker, num_gpus=float(how.use_gpu), settings=settings)
    say(f"  scoring {counted(len(parts), 'part')} of the test rows on up to {counted(how.num_workers, 'worker')}")
    crew, has_started = _Crew(config, job, parts), False
    try:
        for part in crew.work():
            if not has_started:
                on_start()
                has_started = True
            if part is not None:
                on_part(part)
    finally:
        crew.end()


class ScoringWorker:
    """The actor. It returns this project's errors, since Ray would wrap a raised one in an exception of its own."""

    def __init__(self, job: ScoringJob):
        self._job = job

    def load(self) -> RcnnError | None:
        """Loads the model."""
        try:
            self._model = load_for_scoring(self._job)
        except RcnnError as error:
            return error
        return None

    def score(self, part: Part) -> RcnnError | None:
        """Writes the predictions of a part."""
        try:
            score_parts(self._job, self._model, [part])
        except RcnnError as error:
            return error
        return None


class _Crew:
    """The workers, and what each is doing: loading the model (None), or scoring a part."""

    def __init__(self, config: PipelineConfig, job: ScoringJob, parts: Sequence[Part]):
        self._config, self._job, self._how = config, job, config.execution
        self._todo = deque(parts)
        self._doing: dict[Any, tuple[Any, Part | None]] = {}
        self._num_deaths = 0
        self._waiting: Waiting | None = None
        self._last = time.monotonic()
        for _ in range(min(self._how.num_workers, len(parts))):
            self._start_worker()

    def work(self) -> Iterator[Part | None]:
        """Yields each part when it is scored, and None when a worker has loaded the model."""
        while self._todo or any(part is not None for _, part in self._doing.values()):
            ready, _ = ray.wait(list(self._doing), timeout=SECONDS_BETWEEN_LOOKS)
            if not ready:
                self._check_room()
                self._end_those_that_hang()
                continue
            self._last = time.monotonic()
            worker, part = self._doing.pop(ready[0])
            try:
                error = ray.get(ready[0])
            except (RayActorError, OutOfMemoryError) as death:
                ray.kill(worker)  # a worker that cannot be reached may still be alive
                self._replace(part, death)
                continue
            if error is not None:
                raise error
            self._hand_out(worker)
            self._num_deaths, self._waiting = 0 if part is not None else self._num_deaths, None
            yield part

    def end(self) -> None:
        """Ends the workers that are left."""
        for worker, _ in self._doing.values():
            ray.kill(worker)

    def _start_worker(self) -> None:
        how = self._how
        actor = ray.remote(num_cpus=how.cpus_per_worker, num_gpus=int(how.use_gpu))(ScoringWorker)
        worker = actor.remote(self._job)
        self._doing[worker.load.remote()] = (worker, None)

    def _hand_out(self, worker: Any) -> None:
        """Gives the next part to a worker; ends it if there is none, so that others can have its cores."""
        if self._todo:
            part = self._todo.popleft()
            self._doing[worker.score.remote(part)] = (worker, part)
        else:
            ray.kill(worker)

    def _replace(self, part: Part | None, death: Exception) -> None:
        self._num_deaths += 1
        lines = [line.strip().rstrip(".") for line in str(death).splitlines() if line.strip()]
        reason = next(iter(lines), type(death).__name__)
        if self._num_deaths > self._how.max_failures:
            raise ClusterError(
                f"workers died more often than allowed without scoring a part; the last one with: {reason}",
                where=f"execution.max_failures = {self._how.max_failures}",
                remedy="Run the same command again: scored parts are kept. Lower evaluate.batch_size if memory is short",
                retryable=True,
            ) from death
        if part is not None:
            self._todo.appendleft(part)
        say(f"  a worker died ({reason}); {'its part is scored by another' if part else 'another one is started'}")
        self._start_worker()

    def _end_those_that_hang(self) -> None:
        """Ends the workers that score, if no part has come for too long: they are then replaced as dead ones are."""
        if time.monotonic() - self._last < 60 * MINUTES_FOR_A_PART:
            return
        for worker, part in self._doing.values():
            if part is not None:
                ray.kill(worker)

    def _check_room(self) -> None:
        """Says what is waited for, if no worker is scoring.

        Raises:
            ClusterError: there is no room for 30 minutes.
        """
        if all(part is None for _, part in self._doing.values()):
            self._waiting = self._waiting or Waiting(self._how)
            self._waiting.say_and_check(1)
