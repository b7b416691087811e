"""What each stage would cost: exact counts, and times and memory predicted from calibrated steps and measured constants.

A stage's row in `stages.py` names its function here. Multiply-adds are those of convolutions and linear layers; a training
step counts as three forward passes (one forward, two for the gradients of inputs and of weights).
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rcnn.config import IMAGE_FILE_SOURCES, SHARE_OF_ALL_STEPS, PipelineConfig
from rcnn.evaluate.audited_rows import reason_to_skip
from rcnn.evaluate.study_size import num_passes
from rcnn.plan.calibrate import Calibration, Job, stand_in
from rcnn.plan.progress import ended_trials, num_trials_left, trained
from rcnn.plan.search import expected_epochs, most_epochs, networks_of, num_repeats_left, timed_of
from rcnn.plan.size import DataSize
from rcnn.results import Choice
from rcnn.stages import finished_until
from rcnn.storage import StageFolder
from rcnn.text import counted
from rcnn.tune.budget import minutes_noted
from rcnn.tune.space import trial_config

FORWARDS_PER_STEP = 3

# Starting processes is most of a short run. Measured on 2 idle cores of an AMD EPYC, with the pinned versions (seconds; bytes):
SECONDS_TO_START_RAY = 11.0  # ray.init: 10 to 12
SECONDS_AROUND_EVALUATION = 2.5  # model, pictures and report; of it, 1 for those of recurrent steps
SECONDS_TO_START_SCORING = (
    4.0  # workers with the model loaded, on a Ray that runs: 4.1 to 4.4; 8 to 24 on a busy machine
)
SECONDS_AROUND_AUDIT = 1.0  # model, table and pictures
SECONDS_TO_START_INGEST = 2.0  # the stage of the demo, whose 5,000 rows are written in 0.1 s
SECONDS_TO_REGISTER = 1.0  # the stage of the demo
BYTES_OF_A_SEARCH = 120e3  # pictures, and a table of the trials
BYTES_OF_A_TRIAL = 1e3  # its record, and its row of the table
BYTES_OF_A_REPORT = 700e3  # of ten classes and four recurrent layers
BYTES_OF_AN_AUDIT = 120e3  # contact sheets
BYTES_OF_A_SUSPECT = 45  # a row of suspects.parquet
BYTES_OF_A_PREDICTION = 30  # a row of predictions, without its logits
# Estimated: what is left of a measured stage after steps and starts that are known, rounded; or never measured by itself.
SECONDS_TO_START_PREFECT = 10.0  # beyond what starts beside it
SECONDS_TO_START_WORKERS = 14.0
SECONDS_TO_START_TRIALS = 16.0
SECONDS_TO_END_TRAINING = 2.0
SECONDS_TO_JOIN = 2.0  # of an ensemble: the validation rows once, for each member
SECONDS_OF_A_CHECKPOINT = 0.3
PIXELS_PER_SECOND = 40e6  # that ingest writes, from arrays in memory
BYTES_OF_RAY_WORKER = 180e6  # that Ray adds to a process that trains
BYTES_OF_A_WINDOW = 200e6  # that the streaming loader reads ahead

Calibrate = Callable[[Sequence[Job], int, int], list[Calibration]]
"""Jobs, threads of a process, processes at a time -> a calibration for each job."""
Target = StageFolder | None
"""The folder of a stage that resumes; None for one that starts."""


@dataclass(frozen=True)
class Cost:
    """What a stage takes; None: not known before it, or not applicable.

    Attributes:
        num_rows: rows that it reads, each counted once.
        num_steps: training steps.
        multiply_adds: of all its passes over the network.
        seconds: from its start to its end; `bill.py` adds Ray's start to the first stage that needs Ray.
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


def cost_of_ingest(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate, target: Target = None) -> Cost:
    """Writing all pixels; downloads come on top."""
    if size is None:
        return Cost(notes=("your own images are counted when ingest reads them",))
    num_bytes = size.num_rows_in_all * size.image_bytes
    downloads = config.data.source not in ("mnist-sample", *IMAGE_FILE_SOURCES) and not config.data.root
    seconds = SECONDS_TO_START_INGEST + num_bytes / PIXELS_PER_SECOND
    return Cost(
        num_rows=size.num_rows_in_all,
        seconds=seconds,
        cpu_hours=seconds / 3600,
        disk_bytes=num_bytes,
        notes=("the download is not included; `rcnn sources` has its size",) if downloads else (),
    )


def cost_of_tune(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate, target: Target = None) -> Cost:
    """The epochs that are expected of the trials that have not ended, at the mean cost of the networks that may be drawn."""
    if size is None:
        return UNKNOWN
    tune, ended = config.tune, ended_trials(config, target)
    trial = trial_config(config, Choice({}), seed=config.seed)
    points = networks_of(config)
    timed = timed_of(points)
    jobs = [_job(trial.with_settings(point), size, is_timed=point in timed) for point in points]
    num_left = num_trials_left(config, ended) + num_repeats_left(config, ended)
    num_at_once = _num_trials_at_once(config, size, num_left)
    copies = num_at_once if not tune.gpus_per_trial else 1
    num_cpus = tune.cpus_per_trial * tune.workers_per_trial
    found = calibrate(jobs, tune.cpus_per_trial, min(copies, max(1, _num_cores(config) // num_cpus)))
    epochs = expected_epochs(config, ended)
    macs = sum(_epoch_macs(trial, size, each) for each in found) / len(found)
    cost = Cost(
        num_rows=_num_train_rows(trial, size) + size.num_rows["val"],
        num_steps=round(epochs * _steps_per_epoch(trial, size)),
        multiply_adds=round(epochs * macs),
        disk_bytes=round(BYTES_OF_A_SEARCH + num_left * BYTES_OF_A_TRIAL),
        notes=_notes(found, _notes_on_tune(config, num_left, epochs)),
    )
    seconds = _epoch_seconds_by_macs(trial, size, found)
    if seconds is None:
        return cost
    mean = sum(seconds) / len(seconds)
    fixed = SECONDS_TO_START_TRIALS if num_left else 0.0
    limit = _seconds_allowed(config, target)
    longest = tune.epochs if num_left else 0
    return _with_times(
        cost,
        min(limit, fixed + max(epochs * mean / num_at_once, longest * mean)),
        num_processes=num_at_once,
        cpus=num_cpus,
        gpus=tune.gpus_per_trial * tune.workers_per_trial,
        seconds_at_most=min(limit, fixed + math.ceil(most_epochs(config, ended) / num_at_once) * max(seconds)),
        peak_bytes=_process_bytes(trial, size, found),
    )


def cost_of_train(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate, target: Target = None) -> Cost:
    """The steps and epochs that no checkpoint holds, with validation and checkpoints."""
    if size is None:
        return UNKNOWN
    if config.members:
        return _cost_of_members(config, size, calibrate)
    how, done = config.execution, trained(target)
    steps_per_epoch = max(1, _steps_per_epoch(config, size))
    num_steps = max(0, (config.train.epochs - done.num_epochs) * steps_per_epoch - done.num_steps)
    epochs = num_steps / steps_per_epoch
    [found] = calibrate([_job(config, size)], how.cpus_per_worker, _num_train_copies(config))
    cost = Cost(
        num_rows=_num_train_rows(config, size) + size.num_rows["val"],
        num_steps=num_steps,
        multiply_adds=num_steps * _epoch_macs(config, size, found) // steps_per_epoch,
        disk_bytes=_checkpoint_bytes(config, found, num_there=done.num_epochs),
        notes=_notes([found], _notes_on_train(config)),
    )
    if found.fault:
        return cost
    seconds = epochs * (_epoch_seconds(config, size, found) + SECONDS_OF_A_CHECKPOINT)
    seconds += SECONDS_TO_START_WORKERS + SECONDS_TO_END_TRAINING
    if config.train.max_minutes:
        seconds = min(seconds, max(0.0, 60 * config.train.max_minutes - done.seconds))
    return _with_times(
        cost,
        seconds,
        num_processes=how.num_workers,
        cpus=how.cpus_per_worker,
        gpus=float(how.use_gpu),
        peak_bytes=_process_bytes(config, size, [found]),
    )


def _cost_of_members(config: PipelineConfig, size: DataSize, calibrate: Calibrate) -> Cost:
    """The trainings of an ensemble that were not made before, one after another; joining them takes a second or two."""
    left = [member for member in config.members if "train" not in finished_until(member, "train")]
    if not left:
        return Cost(num_rows=size.num_rows["val"], num_steps=0, multiply_adds=0, seconds=SECONDS_TO_JOIN)
    one = cost_of_train(left[0], size, calibrate)
    added = ("num_steps", "multiply_adds", "seconds", "cpu_hours", "gpu_hours", "disk_bytes")
    known = {name: value for name in added if (value := getattr(one, name)) is not None}
    return replace(one, **{name: len(left) * value for name, value in known.items()})


def cost_of_evaluate(
    config: PipelineConfig, size: DataSize | None, calibrate: Calibrate, target: Target = None
) -> Cost:
    """One forward pass of each test row, on Ray's workers or in this process with all cores; then the studies, here."""
    if size is None:
        return UNKNOWN
    num_rows = size.num_rows["test"]
    num_bytes = BYTES_OF_A_REPORT + num_rows * (BYTES_OF_A_PREDICTION + 4 * size.num_classes)
    num_more = num_passes(config, num_test=num_rows, num_val=size.num_rows["val"])
    return _cost_of_scoring(config, size, calibrate, num_rows, SECONDS_AROUND_EVALUATION, num_bytes, num_more=num_more)


def cost_of_audit(config: PipelineConfig, size: DataSize | None, calibrate: Calibrate, target: Target = None) -> Cost:
    """One forward pass of each validation row, and of each training row unless that is skipped."""
    if size is None:
        return UNKNOWN
    skipped = reason_to_skip(config, size.num_rows["train"])
    num_rows = size.num_rows["val"] + (0 if skipped else size.num_rows["train"])
    num_bytes = BYTES_OF_AN_AUDIT + (num_rows + size.num_rows["test"]) * BYTES_OF_A_SUSPECT
    cost = _cost_of_scoring(config, size, calibrate, num_rows, SECONDS_AROUND_AUDIT, num_bytes)
    return replace(cost, notes=(*cost.notes, f"training rows are not scored: {skipped}")) if skipped else cost


def _cost_of_scoring(
    config: PipelineConfig,
    size: DataSize,
    calibrate: Calibrate,
    num_rows: int,
    seconds: float,
    num_bytes: float,
    *,
    num_more: float = 0,
) -> Cost:
    """One forward pass of some rows, `num_more` passes in this process, and `seconds` around them."""
    how = config.execution
    [found] = calibrate([_job(config, size)], how.cpus_per_worker, _num_train_copies(config))
    multiply_adds = round((num_rows + num_more) * found.multiply_adds)
    cost = Cost(num_rows=num_rows, multiply_adds=multiply_adds, disk_bytes=round(num_bytes))
    if found.fault:
        return cost
    on_workers = config.ray.address != "" or how.num_workers > 1
    num_processes, cpus = 1, os.cpu_count() or 1
    if on_workers:
        num_processes = how.num_workers if config.ray.address or how.use_gpu else _num_train_copies(config)
        cpus = how.cpus_per_worker
        seconds += SECONDS_TO_START_SCORING
    speed_up = num_processes if on_workers or how.use_gpu else max(1.0, cpus / how.cpus_per_worker)
    here = 1.0 if how.use_gpu else max(1.0, (os.cpu_count() or 1) / how.cpus_per_worker)
    seconds += num_rows * found.score_seconds / speed_up + num_more * found.score_seconds / here
    gpus = float(how.use_gpu)
    return _with_times(cost, seconds, num_processes=num_processes, cpus=cpus, gpus=gpus, peak_bytes=None)


def cost_of_register(
    config: PipelineConfig, size: DataSize | None, calibrate: Calibrate, target: Target = None
) -> Cost:
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


def _num_trials_at_once(config: PipelineConfig, size: DataSize, num_left: int) -> int:
    """By the rule of the search itself, as if its Ray were started on this machine now."""
    most = max(1, min(num_left, config.tune.max_concurrent_trials or num_left))
    if most == 1:
        return 1
    import torch  # late, and only where there may be several: with Ray, it takes seconds

    from rcnn.ray_session import node_here
    from rcnn.tune.resources import room_for_trials

    node = node_here(config) | {"GPU": torch.cuda.device_count()}
    job = _job(config, size, is_timed=False)
    return min(most, room_for_trials(config, stand_in(job, num_rows=size.num_rows), [node]).num_trials)


def _seconds_allowed(config: PipelineConfig, target: Target) -> float:
    """What `tune.max_minutes` leaves to a search, whose earlier attempts count."""
    if not config.tune.max_minutes:
        return math.inf
    used = minutes_noted(target) if target else 0.0
    return max(0.0, 60 * (config.tune.max_minutes - used))


def _num_train_rows(config: PipelineConfig, size: DataSize) -> int:
    available = size.num_rows["train"] + size.num_rows["val"] * config.train.with_validation
    return min(config.train.num_rows or available, available)


def _steps_per_epoch(config: PipelineConfig, size: DataSize) -> int:
    return _num_train_rows(config, size) // config.train.batch_size


def _epoch_macs(config: PipelineConfig, size: DataSize, found: Calibration) -> int:
    """Of training and validation, exactly, but with `train.any_t`: rows that do not fill a batch are left out of an epoch."""
    num_trained = _steps_per_epoch(config, size) * config.train.batch_size
    forwards = FORWARDS_PER_STEP * num_trained * _share_of_steps(config) + size.num_rows["val"]
    return round(found.multiply_adds * forwards)


def _epoch_seconds(config: PipelineConfig, size: DataSize, found: Calibration) -> float:
    num_val_rows = math.ceil(size.num_rows["val"] / config.execution.num_workers)
    seconds_per_step = found.step_seconds * _share_of_steps(config)
    return _steps_per_epoch(config, size) * seconds_per_step + num_val_rows * found.score_seconds


def _share_of_steps(config: PipelineConfig) -> float:
    """The mean cost of a training step whose number of recurrent steps is drawn, where T steps cost 1.

    t steps take about (t + 1) / (T + 1) of that (0.28 to 1 for RCNN-96 with T = 3, where this rule says 0.25 to 1): half on
    the average of 0 to T - 1, which are as likely as each other.
    """
    return SHARE_OF_ALL_STEPS + (1 - SHARE_OF_ALL_STEPS) / 2 if config.train.any_t else 1.0


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
    bytes_of_rows = (_num_train_rows(config, size) + size.num_rows["val"]) * size.image_bytes
    is_streaming = config.execution.loader == "streaming" or (
        config.execution.loader == "auto" and bytes_of_rows > config.execution.resident_megabytes * 1_000_000
    )
    around = 0.0 if config.execution.use_gpu else BYTES_OF_RAY_WORKER
    return round(
        max(each.peak_bytes for each in found) + (BYTES_OF_A_WINDOW if is_streaming else bytes_of_rows) + around
    )


def _checkpoint_bytes(config: PipelineConfig, found: Calibration, *, num_there: int = 0) -> int:
    """Weights, momenta, those of the best epoch, and averaged ones if there are any; then the finished model."""
    of_one = 4 * found.num_parameters * (3 + bool(config.train.ema_decay))
    num_kept = config.execution.keep_checkpoints
    return of_one * (num_kept - min(num_kept, num_there)) + 4 * found.num_parameters


def _notes(found: Sequence[Calibration], notes: Sequence[str]) -> tuple[str, ...]:
    faults = [f"times are not predicted: {each.fault}" for each in found if each.fault][:1]
    num_untimed = sum(not each.step_seconds and not each.fault for each in found)
    interpolated = [f"{num_untimed} of {len(found)} networks are interpolated by multiply-adds"] if num_untimed else []
    return (*notes, *interpolated, *faults)


def _notes_on_tune(config: PipelineConfig, num_left: int, epochs: float) -> list[str]:
    tune = config.tune
    notes = [f"trainings to run: {num_left} of at most {counted(tune.epochs, 'epoch')}, {epochs:.0f} epochs expected"]
    if tune.early_stopping == "median":
        notes.append(
            "tune.early_stopping = median cannot be predicted: the figures are those of trials that all run to the end"
        )
    return notes


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
