"""`fit`: epochs of training and validation, in plain torch.

In: a config, rows in memory, and a `report` to call after each epoch. It knows nothing of Ray; where a torch process
group exists, it trains as one rank of it.
"""

import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcnn.config import PipelineConfig
from rcnn.data.augment import Augmentation
from rcnn.data.batches import Loader, Order, RowSource
from rcnn.data.loader import Rows, TrainingData, load_training_data
from rcnn.errors import TrainingError
from rcnn.progress import say
from rcnn.storage import Storage
from rcnn.train.checkpoint import TrainState, new_state
from rcnn.train.execution import Execution, choose_device, choose_execution, prepare
from rcnn.train.pace import Forecast, Pace
from rcnn.train.step import score, train_step

Metrics = dict[str, float]
Report = Callable[[Metrics, Callable[[Path], None]], None]
"""Called on every rank after each epoch, with its metrics and a function that saves a checkpoint to a folder."""

SECONDS_BETWEEN_PROGRESS = 1.0


def fit(
    config: PipelineConfig,
    data: TrainingData,
    report: Report,
    *,
    resume_from: Path | None = None,
    on_progress: Callable[[float], None] = lambda epochs_done: None,
    on_forecast: Callable[[Forecast], None] = lambda forecast: None,
    max_seconds: float = 0.0,
    seconds_spent: float = 0.0,
) -> TrainState:
    """Trains for `config.train.epochs` epochs, or for what is left of them, or until the time is up.

    The time limit may end an epoch early. Its weights are then validated and reported like those of a whole one, as epoch
    3.4, say; but the checkpoint's position is the start of that epoch, so that a run with a higher limit resumes there and
    ends with the same bits as a run that had no limit.

    Args:
        config: the whole config; `model`, `train`, `augment`, `execution` and `seed` matter here.
        data: both splits; each rank takes its own share of them.
        report: called after each epoch.
        resume_from: folder of a checkpoint to resume from.
        on_progress: called now and then with the epochs done, a fraction.
        on_forecast: called once, after the first steps.
        max_seconds: ends training in time for a last validation, after one step at the earliest; 0: no limit.
        seconds_spent: seconds that count already; a resumed run counts those of its checkpoint instead.

    Raises:
        TrainingError: the loss is no longer a number, or the checkpoint cannot be read.
        DataError: there are fewer rows than one batch.
    """
    device = choose_device(config.execution.use_gpu)
    prepare(device, deterministic=config.train.deterministic)
    rank, num_ranks = process_group()
    order = Order(config.train.batch_size, config.seed, rank, num_ranks)
    loader = data.train.loader(order, augmentation_of(config), device)
    num_steps = config.train.epochs * loader.num_steps
    execution = choose_execution(config, device, num_steps=num_steps)
    say(f"  {execution}")
    state = new_state(config, data.manifest, device=device, num_steps=num_steps)
    if resume_from is not None:
        state.load(resume_from)
    network = execution.compiled(DistributedDataParallel(state.model) if num_ranks > 1 else state.model)
    val = data.val.share(rank, num_ranks)
    if isinstance(val, Rows):
        val = val.to(device)
    pace = Pace(
        device,
        num_steps=loader.num_steps,
        num_epochs=config.train.epochs - state.epoch,
        validation_steps=len(val) / order.share,
        on_forecast=on_forecast,
        max_seconds=max_seconds,
        seconds_spent=state.seconds or seconds_spent,
        num_ranks=num_ranks,
    )
    while state.epoch < config.train.epochs and not (state.history and pace.is_over()):
        # Each epoch's dropout depends only on its number and the rank: a resumed run draws what the first one would have
        # drawn. It is the only thing that another number of ranks changes.
        torch.manual_seed(_seed_of(config.seed, state.epoch, rank))
        position = copy.deepcopy(state.position()) if max_seconds else None
        metrics, num_steps = train_epoch(state, network, loader, execution, pace, on_progress)
        metrics |= validate(state, val, execution, pace)
        if num_steps < loader.num_steps:
            metrics["epoch"] = round(state.epoch + num_steps / loader.num_steps, 3)
            state.history.append(metrics)
            report(metrics, functools.partial(state.save, position=position))
            break
        state.schedule.after_epoch(metrics["val/error"])
        state.epoch += 1
        metrics["epoch"] = state.epoch
        state.history.append(metrics)
        report(metrics, state.save)
    return state


def training_data(config: PipelineConfig, storage: Storage, folder: str) -> TrainingData:
    """The data set in `folder`, opened as the settings ask for.

    Raises:
        DataError: it is missing, or not what its manifest says.
    """
    return load_training_data(
        storage,
        folder,
        num_rows=config.train.num_rows,
        seed=config.seed,
        engine=config.execution.loader,
        resident_megabytes=config.execution.resident_megabytes,
    )


def augmentation_of(config: PipelineConfig) -> Augmentation:
    """What the settings ask for."""
    augment = config.augment
    return Augmentation(max_shift=augment.max_shift, crop=config.model.crop, flip=augment.flip, cutout=augment.cutout)


def process_group() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def train_epoch(
    state: TrainState,
    network: nn.Module,
    loader: Loader,
    execution: Execution,
    pace: Pace,
    on_progress: Callable[[float], None] = lambda epochs_done: None,
) -> tuple[Metrics, int]:
    """Trains for one epoch, or for its first steps if the time is up; returns its metrics and the number of its steps.

    Raises:
        TrainingError: the loss is no longer a number.
    """
    learning_rate, clip_norm = state.schedule.learning_rate, state.config.train.clip_norm
    network.train()
    started = last_progress = time.perf_counter()
    total_loss = torch.zeros((), device=execution.device)
    for step, (images_NCHW, labels_N) in enumerate(loader.epoch(state.epoch), start=1):
        total_loss += train_step(
            network, state.optimizer, images_NCHW, labels_N, clip_norm=clip_norm, precision=execution.precision
        )
        state.schedule.after_step()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        if time.perf_counter() - last_progress > SECONDS_BETWEEN_PROGRESS:
            last_progress = time.perf_counter()
            on_progress(state.epoch + step / loader.num_steps)
        pace.after_step()
        if pace.is_over(step):
            break
    mean_loss = _mean_over_ranks(total_loss / step)  # waits for the device, so the time below is complete
    seconds = time.perf_counter() - started
    if not math.isfinite(mean_loss):
        raise TrainingError(
            f"the training loss is {mean_loss} in epoch {state.epoch + 1}",
            where=f"train.learning_rate = {state.config.train.learning_rate}",
            remedy="Lower it by a factor of 3 to 10",
        )
    images_per_second = step * loader.order.batch_size / seconds
    metrics = {"train/loss": mean_loss, "learning_rate": learning_rate, "perf/images_per_second": images_per_second}
    return metrics, step


def validate(state: TrainState, val: RowSource, execution: Execution, pace: Pace) -> Metrics:
    """The figures of all ranks' validation rows, and the seconds of the run so far."""
    started = time.perf_counter()
    batch_size = state.config.evaluate.batch_size
    scores = score(
        state.best_model,
        val,
        num_classes=len(state.manifest.classes),
        batch_size=batch_size,
        device=execution.device,
        precision=execution.precision,
    )
    if process_group()[1] > 1:
        dist.all_reduce(scores.confusion)
        dist.all_reduce(scores.loss_sum)
    metrics = {f"val/{name}": value for name, value in scores.metrics().items()}  # waits for the device
    pace.after_validation(time.perf_counter() - started)
    return metrics | {"perf/seconds": round(pace.seconds, 2)}


def _mean_over_ranks(value: Tensor) -> float:
    num_ranks = process_group()[1]
    if num_ranks > 1:
        dist.all_reduce(value)
    return float(value) / num_ranks


def _seed_of(seed: int, epoch: int, rank: int) -> int:
    return (seed * 1_000_003 + epoch) * 4_099 + rank
