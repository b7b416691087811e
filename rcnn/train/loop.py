"""`fit`: epochs of training and validation, in plain torch.

In: a config, rows in memory, a `report` to call after each epoch, and a place for checkpoints. It knows nothing of Ray; where a
torch process group exists, it trains as one rank of it.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from rcnn.config import PipelineConfig
from rcnn.data.augment import Augmentation
from rcnn.data.batches import RowSource
from rcnn.data.loader import Rows, TrainingData, load_training_data
from rcnn.errors import Diverged
from rcnn.progress import say
from rcnn.storage import Storage
from rcnn.train.checkpoint import TrainState, new_state
from rcnn.train.checkpoint_store import CheckpointStore
from rcnn.train.execution import Execution, choose_device, choose_execution, prepare
from rcnn.train.pace import Forecast, Pace
from rcnn.train.roll_back import RollBack
from rcnn.train.shares import SharedSteps
from rcnn.train.step import PlainSteps, Steps, process_group

Metrics = dict[str, float]
Report = Callable[[Metrics], None]
"""Called on every rank after each epoch, with its metrics."""


class Stopped(Exception):
    """Training has ended because it was asked to; a checkpoint has all that was done."""


SECONDS_BETWEEN_PROGRESS = 1.0
STEPS_BETWEEN_LOOKS_AT_LOSS = 50  # each waits for the device


def fit(
    config: PipelineConfig,
    data: TrainingData,
    report: Report,
    *,
    checkpoints: CheckpointStore | None = None,
    on_progress: Callable[[float], None] = lambda epochs_done: None,
    on_forecast: Callable[[Forecast], None] = lambda forecast: None,
    max_seconds: float = 0.0,
    limit_of: Callable[[Forecast], float] = lambda forecast: 0.0,
    seconds_spent: float = 0.0,
    is_stopping: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains for `config.train.epochs` epochs, or for what is left of them, or until the time is up.

    A checkpoint holds whatever the next step depends on, so a run that was stopped anywhere and goes on from one ends with the
    same bits as a run that was not: with shares on any number of workers, without them on as many as before. The time limit may
    end an epoch early. Its weights are then validated and reported like those of a whole one, as epoch 3.4, say; the checkpoint
    knows nothing of that, so a run with a higher limit goes on as if there had been none.

    Args:
        config: the whole config; `model`, `train`, `augment`, `execution` and `seed` matter here.
        data: both splits; each rank takes its own part of them.
        report: called after each epoch.
        checkpoints: where the newest one is read, and others are written: at each epoch's end, after
            `execution.checkpoint_minutes`, and where the time limit ends the run. Rank 0 writes. None: nowhere.
        on_progress: called now and then with the epochs done, a fraction.
        on_forecast: called once, after the first steps.
        max_seconds: ends training in time for a last validation, after one step at the earliest; 0: no limit.
        limit_of: the limit where `max_seconds` is 0, from the forecast, for runs that keep no checkpoint; 0: none.
        seconds_spent: seconds that count already; a resumed run counts those of its checkpoint instead.
        is_stopping: asked by rank 0 after each step; if true, it writes a checkpoint and ends.

    Returns:
        The state at the end; its `best` has the weights to use.

    Raises:
        Diverged: the loss is no longer a number, and training is not to go back, or has too often.
        TrainingError: the checkpoint was made with another data set.
        ClusterError: the last checkpoint cannot be written.
        Stopped: it was asked to.
        DataError: there are fewer rows than one batch.
    """
    device = choose_device(config.execution.use_gpu)
    prepare(device, deterministic=config.train.deterministic)
    state = new_state(config, data.manifest, device=device, num_steps=_num_steps(config, data))
    execution = choose_execution(config, device, num_steps=_num_steps(config, data))
    say(f"  {execution}")
    steps = steps_of(state, data.train, execution)
    roll_back = RollBack(state, checkpoints)
    if checkpoints is not None and process_group()[0] == 0:
        checkpoints.require_space(state.num_bytes)
    _resume(state, checkpoints, steps.num_steps)
    val = data.val.to(device) if isinstance(data.val, Rows) else data.val
    pace = Pace(
        device,
        num_steps=steps.num_steps * (config.train.epochs - state.epoch) - state.step,
        num_epochs=config.train.epochs - state.epoch,
        validation_steps=len(val) / config.train.batch_size,
        on_forecast=on_forecast,
        max_seconds=max_seconds,
        limit_of=limit_of,
        seconds_spent=state.seconds or seconds_spent,
        num_ranks=process_group()[1],
    )
    save = _Saver(state, checkpoints, pace, minutes=config.execution.checkpoint_minutes, is_stopping=is_stopping)
    try:
        _train(state, steps, val, pace, save, roll_back, report, on_progress)
    except BaseException:
        if checkpoints is not None:
            checkpoints.settle()  # else the end of the process would take a checkpoint that is being written
        raise
    if checkpoints is not None:
        checkpoints.close()
    return state


def _train(
    state: TrainState,
    steps: Steps,
    val: RowSource,
    pace: Pace,
    save: "_Saver",
    roll_back: RollBack,
    report: Report,
    on_progress: Callable[[float], None],
) -> None:
    """The epochs that are left, or those for which there is time."""
    while state.epoch < state.config.train.epochs and not (state.history and pace.is_over()):
        roll_back.begin()
        try:
            metrics = train_epoch(state, steps, pace, on_progress, after_step=save.if_due)
        except Diverged as error:
            roll_back.go_back(error)
            continue
        is_whole = state.step == steps.num_steps
        if not is_whole:
            save.now()
        metrics |= validate(steps, val, pace)
        if state.roll_backs:
            metrics["train/roll_backs"] = state.roll_backs
        metrics["epoch"] = state.epoch + (1 if is_whole else round(state.step / steps.num_steps, 3))
        state.note_metrics(metrics)
        state.seconds = pace.seconds
        if is_whole:
            _begin_next_epoch(state, metrics)
            save.now()
        report(metrics)
        if not is_whole:
            break


def steps_of(state: TrainState, rows: RowSource, execution: Execution) -> Steps:
    """The steps that the settings ask for: in shares or not."""
    kind = SharedSteps if state.config.train.shares else PlainSteps
    return kind(state, rows, augmentation_of(state.config), execution)


def _num_steps(config: PipelineConfig, data: TrainingData) -> int:
    return config.train.epochs * (len(data.train) // config.train.batch_size)


def _resume(state: TrainState, checkpoints: CheckpointStore | None, num_steps: int) -> None:
    """Takes up the newest checkpoint, the same one on every rank."""
    if checkpoints is None:
        return
    rank, num_ranks = process_group()
    record = checkpoints.newest() if rank == 0 else None
    if num_ranks > 1:
        chosen = [record]
        dist.broadcast_object_list(chosen, src=0)
        [record] = chosen
    if record is not None:
        state.load(checkpoints.read(record))
        at = f"step {state.step} of {num_steps} of epoch {state.epoch + 1}" if state.step else f"epoch {state.epoch}"
        say(f"  resuming after {at} of {state.config.train.epochs}, from the last checkpoint")


class _Saver:
    """Writes the checkpoints of rank 0 when they are due."""

    def __init__(
        self,
        state: TrainState,
        checkpoints: CheckpointStore | None,
        pace: Pace,
        *,
        minutes: float,
        is_stopping: Callable[[], bool],
    ):
        self._state, self._pace, self._seconds, self._is_stopping = state, pace, 60 * minutes, is_stopping
        self._store = checkpoints if process_group()[0] == 0 else None
        self._last = time.monotonic()

    def if_due(self) -> None:
        """To be called after each step.

        Raises:
            Stopped: training is to stop; the checkpoint is written.
        """
        if self._store is not None and self._is_stopping():
            self.now()
            self._store.close()
            raise Stopped
        if time.monotonic() - self._last > self._seconds:
            self.now()

    def now(self) -> None:
        """Writes one, unless the loss is no longer a number: such weights are of no use."""
        if self._store is not None and math.isfinite(float(self._state.loss_sum)):
            self._state.seconds = self._pace.seconds
            self._store.write(self._state.snapshot())
        self._last = time.monotonic()


def training_data(config: PipelineConfig, storage: Storage, folder: str) -> TrainingData:
    """The data set in `folder`, opened as the settings ask for.

    Raises:
        DataError: it is missing, or not what its manifest says.
    """
    return load_training_data(
        storage,
        folder,
        num_rows=config.train.num_rows,
        with_validation=config.train.with_validation,
        seed=config.seed,
        engine=config.execution.loader,
        resident_megabytes=config.execution.resident_megabytes,
    )


def augmentation_of(config: PipelineConfig) -> Augmentation:
    """What the settings ask for."""
    augment = config.augment
    return Augmentation(**augment.model_dump(), crop=config.model.crop)


def train_epoch(
    state: TrainState,
    steps: Steps,
    pace: Pace,
    on_progress: Callable[[float], None] = lambda epochs_done: None,
    after_step: Callable[[], None] = lambda: None,
) -> Metrics:
    """Trains from `state.step` to the end of the epoch, or until the time is up; returns the metrics of the epoch so far.

    Raises:
        Diverged: the loss is no longer a number.
    """
    first_step = state.step
    if first_step == 0:
        state.learning_rate = state.schedule.learning_rate
    started = last_progress = time.perf_counter()
    for loss in steps.epoch(state.epoch, first_step=first_step):
        state.step += 1
        state.loss_sum += loss
        state.schedule.after_step()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        if time.perf_counter() - last_progress > SECONDS_BETWEEN_PROGRESS:
            last_progress = time.perf_counter()
            on_progress(state.epoch + state.step / steps.num_steps)
        if state.step % STEPS_BETWEEN_LOOKS_AT_LOSS == 0:
            _require_finite(
                steps.mean_loss(state.loss_sum.clone()), state
            )  # the same on all ranks: none waits for one that left
        pace.after_step()
        if pace.is_over(state.step):
            break
        after_step()
    mean_loss = steps.mean_loss(state.loss_sum / state.step)  # waits for the device, so the time below is complete
    seconds = time.perf_counter() - started
    _require_finite(mean_loss, state)
    images = (state.step - first_step) * state.config.train.batch_size
    return {"train/loss": mean_loss, "learning_rate": state.learning_rate, "perf/images_per_second": images / seconds}


def _require_finite(loss: float, state: TrainState) -> None:
    if not math.isfinite(loss):
        raise Diverged(
            f"the training loss is {loss} in epoch {state.epoch + 1}, by step {state.step}",
            where=f"train.learning_rate = {state.config.train.learning_rate}",
            remedy="Lower it by a factor of 3 to 10",
        )


def _begin_next_epoch(state: TrainState, metrics: Metrics) -> None:
    state.schedule.after_epoch(metrics["val/error"])
    state.epoch, state.step = state.epoch + 1, 0
    state.loss_sum = torch.zeros_like(state.loss_sum)


def validate(steps: Steps, val: RowSource, pace: Pace) -> Metrics:
    """The figures of all ranks' validation rows, and the seconds of the run so far."""
    started = time.perf_counter()
    metrics = {f"val/{name}": value for name, value in steps.score(val).metrics().items()}  # waits for the device
    pace.after_validation(time.perf_counter() - started)
    return metrics | {"perf/seconds": round(pace.seconds, 2)}
