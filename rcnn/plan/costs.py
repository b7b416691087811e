"""What each stage would cost: exact counts, and times and memory predicted from calibrated steps and measured constants.

A stage's row in `stages.py` names its function here. Multiply-adds are those of convolutions and linear layers; a training
step counts as three forward passes (one forward, two for the gradients of inputs and of weights).
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rcnn.config import IMAGE_FILE_SOURCES, PipelineConfig
from rcnn.plan.calibrate import Calibration, Job
from rcnn.plan.search import expected_epochs, most_epochs, networks_of, timed_of
from rcnn.plan.size import DataSize
from rcnn.tune.space import num_trials_wanted

FORWARDS_PER_STEP = 3

# Measured on 2 cores of an AMD EPYC, with the pinned versions (seconds; bytes). Starting processes is most of a short run.
SECONDS_TO_START_PREFECT = 10.0
SECONDS_TO_START_RAY = 11.0
SECONDS_TO_START_WORKERS = 14.0
SECONDS_TO_END_TRAINING = 2.0
SECONDS_OF_A_CHECKPOINT = 0.3
SECONDS_TO_START_TRIALS = 16.0
SECONDS_TO_START_EVALUATION = 5.0
SECONDS_TO_REGISTER = 5.0
SECONDS_TO_START_INGEST = 3.0
PIXELS_PER_SECOND = 40e6  # that ingest writes, from arrays in memory
BYTES_OF_RAY_WORKER = 180e6  # that Ray adds to a process that trains
BYTES_OF_A_WINDOW = 200e6  # that the streaming loader reads ahead
BYTES_OF_A_TRIAL = 100e3  # that Ray Tune keeps of it
BYTES_OF_A_REPORT = 300e3

Calibrate = Callable[[Sequence[Job], int, int], list[Calibration]]
"""Jobs, threads of a process, processes at a time -> a calibration for each job."""


@dataclass(frozen=True)
class Cost:
    """What a stage takes; None: not known before it, or not applicable.

    Attributes:
        num_rows: rows that it reads, each counted once.
        num_steps: training steps.
        multiply_adds: of all its passes over the network.
        seconds: from its start to its end, Ray's start included where it is the first to need it.
        seconds_at_most: of a search, if no trial is stopped early.
        cpu_hours, gpu_hours: what it occupies, times its duration.
        peak_bytes: of the largest of its processes; on a GPU, of its tensors.
        num_processes: of that size at a time.
        disk_bytes: what it adds to the storage.
        notes: what the figures leave out, or assume.
    """

    num_rows: int | None = None
    num_steps: int | None = None
    multiply_adds: int | None = None
    seconds: float | None = None
    seconds_at_most: float | None = None
    cpu_hours: float | None = None
    gpu_hours: float | None = None
    peak_bytes: int | None = None
    num_processes: int = 1
    disk_bytes: int | None = None
    notes: tuple[str, ...] = ()


UNKNOWN = Cost(notes=("rows and image size are known after ingest",))


def cost_of_ingest(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate) -> Cost:
    """Writing all pixels; downloads come on top."""
    if size is None:
        return Cost(notes=("your own images are counted when ingest reads them",))
    num_bytes = size.num_rows * size.image_bytes
    downloads = config.data.source not in ("mnist-sample", *IMAGE_FILE_SOURCES) and not config.data.root
    seconds = SECONDS_TO_START_INGEST + num_bytes / PIXELS_PER_SECOND
    return Cost(
        num_rows=size.num_rows,
        seconds=seconds,
        cpu_hours=seconds / 3600,
        disk_bytes=num_bytes,
        notes=("the download is not included; `rcnn sources` has its size",) if downloads else (),
    )


def cost_of_tune(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate) -> Cost:
    """The expected epochs of all trials, at the mean cost of the networks that may be drawn."""
    if size is None:
        return UNKNOWN
    tune = config.tune
    settings: dict[str, Any] = {
        "train.epochs": tune.epochs,
        "train.num_rows": tune.num_rows or config.train.num_rows,
        "execution.num_workers": tune.workers_per_trial,
        "execution.use_gpu": tune.gpus_per_trial > 0,
    }
    trial = config.with_settings(settings)
    points = networks_of(config)
    timed = timed_of(points)
    jobs = [_job(trial.with_settings(point), size, is_timed=point in timed) for point in points]
    num_at_once = _num_trials_at_once(config)
    copies = num_at_once if not tune.gpus_per_trial else 1
    num_cpus = tune.cpus_per_trial * tune.workers_per_trial
    found = calibrate(jobs, tune.cpus_per_trial, min(copies, max(1, _num_cores(config) // num_cpus)))
    epochs, num_trials = expected_epochs(config), num_trials_wanted(config)
    num_steps = _steps_per_epoch(trial, size)
    macs = sum(_epoch_macs(trial, size, each) for each in found) / len(found)
    cost = Cost(
        num_rows=_num_train_rows(trial, size) + size.rows["val"],
        num_steps=round(epochs * num_steps),
        multiply_adds=round(epochs * macs),
        disk_bytes=round(num_trials * BYTES_OF_A_TRIAL),
        notes=_notes(found, [f"trials: {num_trials} of at most {tune.epochs} epochs, {epochs:.0f} epochs expected"]),
    )
    seconds = _epoch_seconds_by_macs(trial, size, found)
    if seconds is None:
        return cost
    mean = sum(seconds) / len(seconds)
    fixed = SECONDS_TO_START_RAY + SECONDS_TO_START_TRIALS
    limit = 60 * tune.max_minutes or math.inf
    whole = min(limit, fixed + max(epochs * mean / num_at_once, tune.epochs * mean))
    return _with_times(
        cost,
        whole,
        num_processes=num_at_once,
        cpus=num_cpus,
        gpus=tune.gpus_per_trial * tune.workers_per_trial,
        seconds_at_most=min(limit, fixed + math.ceil(most_epochs(config) / num_at_once) * max(seconds)),
        peak_bytes=_process_bytes(trial, size, found),
    )


def cost_of_train(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate) -> Cost:
    """All epochs, with validation and checkpoints."""
    if size is None:
        return UNKNOWN
    how, epochs = config.execution, config.train.epochs
    [found] = calibrate([_job(config, size)], how.cpus_per_worker, _num_train_copies(config))
    cost = Cost(
        num_rows=_num_train_rows(config, size) + size.rows["val"],
        num_steps=epochs * _steps_per_epoch(config, size),
        multiply_adds=epochs * _epoch_macs(config, size, found),
        disk_bytes=_checkpoint_bytes(config, found),
        notes=_notes([found], _notes_on_train(config)),
    )
    if found.fault:
        return cost
    seconds = epochs * (_epoch_seconds(config, size, found) + SECONDS_OF_A_CHECKPOINT)
    seconds += SECONDS_TO_START_WORKERS + SECONDS_TO_END_TRAINING
    seconds += 0 if config.tune.enabled else SECONDS_TO_START_RAY
    limit = 60 * config.train.max_minutes
    return _with_times(
        cost,
        min(seconds, limit) if limit else seconds,
        num_processes=how.num_workers,
        cpus=how.cpus_per_worker,
        gpus=float(how.use_gpu),
        peak_bytes=_process_bytes(config, size, [found]),
    )


def cost_of_evaluate(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate) -> Cost:
    """One forward pass of each test row, in one process with all cores."""
    if size is None:
        return UNKNOWN
    num_rows = size.rows["test"]
    [found] = calibrate([_job(config, size)], config.execution.cpus_per_worker, _num_train_copies(config))
    cost = Cost(num_rows=num_rows, multiply_adds=num_rows * found.multiply_adds, disk_bytes=round(BYTES_OF_A_REPORT))
    if found.fault:
        return cost
    on_all_cores = 1.0 if config.execution.use_gpu else config.execution.cpus_per_worker / (os.cpu_count() or 1)
    seconds = SECONDS_TO_START_EVALUATION + num_rows * found.score_seconds * min(1.0, on_all_cores)
    return _with_times(
        cost, seconds, num_processes=1, cpus=os.cpu_count() or 1, gpus=float(config.execution.use_gpu), peak_bytes=None
    )


def cost_of_register(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate) -> Cost:
    """A copy of the model goes to MLflow."""
    return Cost(seconds=SECONDS_TO_REGISTER, cpu_hours=SECONDS_TO_REGISTER / 3600)


def _job(config: PipelineConfig, size: DataSize, *, is_timed: bool = True) -> Job:
    num_steps = config.train.epochs * _steps_per_epoch(config, size)
    return Job(config, size.image_shape, size.num_classes, num_steps if config.execution.use_gpu else 0, is_timed)


def _num_cores(config: PipelineConfig) -> int:
    return config.ray.num_cpus or os.cpu_count() or 1


def _num_train_copies(config: PipelineConfig) -> int:
    how = config.execution
    return 1 if how.use_gpu else min(how.num_workers, max(1, _num_cores(config) // how.cpus_per_worker))


def _num_trials_at_once(config: PipelineConfig) -> int:
    tune = config.tune
    room = max(1, _num_cores(config) // (tune.cpus_per_trial * tune.workers_per_trial))
    if tune.gpus_per_trial:
        room = min(room, max(1, int(1 / (tune.gpus_per_trial * tune.workers_per_trial))))
    return min(tune.max_concurrent_trials or room, room, num_trials_wanted(config))


def _num_train_rows(config: PipelineConfig, size: DataSize) -> int:
    return min(config.train.num_rows or size.rows["train"], size.rows["train"])


def _steps_per_epoch(config: PipelineConfig, size: DataSize) -> int:
    return _num_train_rows(config, size) // config.train.batch_size


def _epoch_macs(config: PipelineConfig, size: DataSize, found: Calibration) -> int:
    """Of training and validation, exactly: rows that do not fill a batch are left out of an epoch."""
    num_trained = _steps_per_epoch(config, size) * config.train.batch_size
    return found.multiply_adds * (FORWARDS_PER_STEP * num_trained + size.rows["val"])


def _epoch_seconds(config: PipelineConfig, size: DataSize, found: Calibration) -> float:
    val_rows = math.ceil(size.rows["val"] / config.execution.num_workers)
    return _steps_per_epoch(config, size) * found.step_seconds + val_rows * found.score_seconds


def _epoch_seconds_by_macs(config: PipelineConfig, size: DataSize, found: Sequence[Calibration]) -> list[float] | None:
    """Of each network; what was not timed is interpolated between those that were, by multiply-adds."""
    timed = sorted((each for each in found if each.step_seconds), key=lambda each: each.multiply_adds)
    if not timed:
        return None
    seconds = [_epoch_seconds(config, size, each) for each in timed]
    known = np.interp([each.multiply_adds for each in found], [each.multiply_adds for each in timed], seconds)
    return [float(value) for value in known]


def _process_bytes(config: PipelineConfig, size: DataSize, found: Sequence[Calibration]) -> int:
    """Of the process that trains the largest network, rows included; on a GPU, of its tensors."""
    rows = (_num_train_rows(config, size) + size.rows["val"]) * size.image_bytes
    is_streaming = config.execution.loader == "streaming" or (
        config.execution.loader == "auto" and rows > config.execution.resident_megabytes * 1_000_000
    )
    around = 0.0 if config.execution.use_gpu else BYTES_OF_RAY_WORKER
    return round(max(each.peak_bytes for each in found) + (BYTES_OF_A_WINDOW if is_streaming else rows) + around)


def _checkpoint_bytes(config: PipelineConfig, found: Calibration) -> int:
    """Weights and momenta, averaged weights if there are any, and the model beside them; then the finished model."""
    num_copies = 2 + bool(config.train.ema_decay)
    of_one = 4 * found.num_parameters * (num_copies + 1)
    return of_one * (config.execution.keep_checkpoints + 1) + 4 * found.num_parameters


def _notes(found: Sequence[Calibration], notes: Sequence[str]) -> tuple[str, ...]:
    faults = [f"times are not predicted: {each.fault}" for each in found if each.fault][:1]
    num_untimed = sum(not each.step_seconds and not each.fault for each in found)
    interpolated = [f"{num_untimed} of {len(found)} networks are interpolated by multiply-adds"] if num_untimed else []
    return (*notes, *interpolated, *faults)


def _notes_on_train(config: PipelineConfig) -> list[str]:
    notes = []
    if config.train.max_minutes:
        notes.append(
            f"train.max_minutes = {config.train.max_minutes:g} ends it; steps and multiply-adds are without it"
        )
    if config.execution.num_workers > 1:
        notes.append("the exchange of gradients between workers is not included")
    return notes


def _with_times(
    cost: Cost,
    seconds: float,
    *,
    num_processes: int,
    cpus: int,
    gpus: float,
    peak_bytes: int | None,
    seconds_at_most: float | None = None,
) -> Cost:
    return replace(
        cost,
        seconds=seconds,
        seconds_at_most=seconds_at_most,
        cpu_hours=seconds * num_processes * cpus / 3600,
        gpu_hours=seconds * num_processes * gpus / 3600 if gpus else None,
        peak_bytes=peak_bytes,
        num_processes=num_processes,
    )
