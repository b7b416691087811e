"""Times a few real training steps, in processes of their own: with the threads, and beside as many others, as the run.

In: configs, and the shape of the data. Out: a `Calibration` each. The images are random: only their shape matters.
"""

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rcnn import errors
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.keys import code_of, key_of
from rcnn.model.networks import NETWORKS
from rcnn.progress import say
from rcnn.storage import Storage
from rcnn.text import counted

FOLDER = "runs/calibrations"
STEPS_PER_ROUND, NUM_ROUNDS = 5, 4
MAX_SECONDS = 12.0  # of timed rounds; large networks on a CPU get fewer than `NUM_ROUNDS`
READS = (
    "model", "augment", "execution", "evaluate.batch_size", "train.batch_size", "train.clip_norm", "train.ema_decay",
    "train.precision", "train.deterministic", "train.num_shares", "train.momentum",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be timed.

    Attributes:
        config: of a training run.
        image_shape: (H, W, C).
        num_classes: of the data.
        num_steps: of the whole run, which decides whether it is compiled.
        is_timed: or only counted.
    """

    config: PipelineConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    num_steps: int
    is_timed: bool = True


@dataclass(frozen=True)
class Calibration:
    """What a network costs; times and memory are 0 where they were not measured.

    Attributes:
        multiply_adds: of one image's forward pass, exactly.
        num_parameters: trainable numbers, exactly.
        step_seconds: of a training step of one worker.
        score_seconds: of the forward pass of one image in a batch of `evaluate.batch_size`.
        peak_bytes: of the process, or of tensors on the GPU, with hardly any data.
        fault: why nothing was measured, although it should be.
    """

    multiply_adds: int
    num_parameters: int
    step_seconds: float = 0.0
    score_seconds: float = 0.0
    peak_bytes: int = 0
    fault: str = ""


def calibrations_of(
    jobs: Sequence[Job], storage: Storage, *, num_threads: int, num_copies: int = 1, fresh: bool = False
) -> list[Calibration]:
    """A calibration for each job; those made before on this machine, with this code, are read from the storage.

    Args:
        jobs: what to time.
        storage: keeps the calibrations, if it can be written.
        num_threads: of a process.
        num_copies: processes that train at a time; the result is their mean.
        fresh: times again what was timed before.

    Raises:
        ConfigError: a network cannot take the images.
    """
    names = [_name_of(job, num_threads, num_copies) for job in jobs]
    found = {} if fresh else {name: tree for name in names if (tree := _read(storage, name)) is not None}
    missing = {name: job for name, job in zip(names, jobs, strict=True) if name not in found}
    if missing:
        at_once = f", {num_copies} at a time" if num_copies > 1 else ""
        num_timed = sum(job.is_timed for job in missing.values())
        say(f"  timing a few training steps of {counted(num_timed, 'network')}{at_once} ...")
        measured = _measured(list(missing.values()), num_threads, num_copies)
        for name, tree in zip(missing, measured, strict=True):
            found[name] = tree
            if not tree["fault"]:
                _write(storage, name, tree)
    return [Calibration(**found[name]) for name in names]


def known_calibrations(
    jobs: Sequence[Job], storage: Storage, *, num_threads: int, num_copies: int
) -> list[Calibration]:
    """Those that `calibrations_of` kept. If one is missing, all of them are empty, with a fault: nothing is timed here."""
    trees = [_read(storage, _name_of(job, num_threads, num_copies)) for job in jobs]
    if None in trees:
        return [Calibration(0, 0, fault="not timed yet") for _ in jobs]
    return [Calibration(**tree) for tree in trees if tree is not None]


def _name_of(job: Job, num_threads: int, num_copies: int) -> str:
    """The file of a calibration: named by the machine, the code, and what is timed."""
    machine = [platform.node(), platform.machine(), str(os.cpu_count()), importlib.metadata.version("torch")]
    timed = [str(value) for value in (job.image_shape, job.num_classes, job.is_timed, num_threads, num_copies)]
    code = code_of(["rcnn.plan.calibrate", NETWORKS[job.config.model.network].module])
    return f"{FOLDER}/{key_of(job.config.values_of(*READS), [*machine, *timed], code)}.json"


def _read(storage: Storage, name: str) -> dict[str, Any] | None:
    try:
        tree = storage.read_json(name)
        return None if tree is None else asdict(Calibration(**tree))
    except (ValueError, TypeError, OSError):
        return None  # it is made again


def _write(storage: Storage, name: str, tree: dict[str, Any]) -> None:
    try:
        storage.write_json(name, tree)
    except ClusterError as error:
        say(f"  the calibration is not kept: {error}")


def _measured(jobs: Sequence[Job], num_threads: int, num_copies: int) -> list[dict[str, Any]]:
    """The means over `num_copies` processes that do the same at the same time."""
    command = [sys.executable, "-m", "rcnn.plan.calibrate", str(num_threads)]
    text = json.dumps([asdict(job) | {"config": job.config.model_dump(mode="json")} for job in jobs])
    environ = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environ)
        for _ in range(num_copies)
    ]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
            process.stdin = None  # `communicate` would flush it
        answers = [_answer_of(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [_mean(trees) for trees in zip(*answers, strict=True)]


def _answer_of(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    output, noise = process.communicate()
    try:
        answer = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError) as error:
        last = noise.strip().splitlines()[-1:] or ["it was killed, perhaps for lack of memory"]
        raise ClusterError(f"the timed steps ended early: {last[0]}", where="rcnn plan", remedy="Try again") from error
    if "error" in answer:
        tree = answer["error"]
        raise getattr(errors, tree.pop("kind"))(tree.pop("what"), **tree)
    return answer["calibrations"]  # type: ignore[no-any-return]


def _mean(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    times = {name: statistics.fmean(tree[name] for tree in trees) for name in ("step_seconds", "score_seconds")}
    return trees[0] | times


def calibrate(job: Job) -> Calibration:
    """Counts, and times in this process, what a job asks for.

    Raises:
        ConfigError: the network cannot take the images.
    """
    import torch

    from rcnn.model.build import count_multiply_adds, count_parameters
    from rcnn.train.checkpoint import build_classifier

    height, width, channels = job.image_shape
    side = job.config.model.crop
    model = build_classifier(job.config, stand_in(job)).eval()
    seen = (side, side, channels) if side else (height, width, channels)
    of_network = Calibration(count_multiply_adds(model.network, seen), count_parameters(model))
    if not job.is_timed:
        return of_network
    try:
        return _timed(job, of_network, torch)
    except ClusterError as error:  # no GPU here, or no compiler: the counts hold all the same
        return Calibration(of_network.multiply_adds, of_network.num_parameters, fault=str(error))


def _timed(job: Job, of_network: Calibration, torch: Any) -> Calibration:
    from rcnn.data.loader import Rows
    from rcnn.train.checkpoint import new_state
    from rcnn.train.execution import choose_device, choose_execution, prepare
    from rcnn.train.loop import steps_of, train_epoch
    from rcnn.train.pace import Pace, peak_bytes
    from rcnn.train.step import score

    config = _of_one_worker(job.config)
    device = choose_device(config.execution.use_gpu)
    _forget_peak(device, torch)
    prepare(device, deterministic=config.train.deterministic)
    execution = choose_execution(config, device, num_steps=job.num_steps)
    state = new_state(config, stand_in(job), device=device, num_steps=10_000)
    batch = config.train.batch_size

    def random_rows(num_rows: int) -> Rows:
        height, width, channels = job.image_shape
        images_NHWC = torch.randint(256, (num_rows, height, width, channels), dtype=torch.uint8)
        return Rows(images_NHWC.permute(0, 3, 1, 2), torch.randint(job.num_classes, (num_rows,)))

    steps = steps_of(state, random_rows(STEPS_PER_ROUND * batch), execution)

    def step_seconds() -> float:
        state.step, num_steps = 0, steps.num_steps
        pace = Pace(device, num_steps=num_steps, num_epochs=1, validation_steps=0, on_forecast=lambda forecast: None)
        return batch / train_epoch(state, steps, pace)["perf/images_per_second"]

    def score_seconds() -> float:
        images = random_rows(config.evaluate.batch_size)
        started = time.perf_counter()
        options: dict[str, Any] = {"device": device, "precision": execution.precision, "num_classes": job.num_classes}
        float(score(state.best_model, images, batch_size=len(images), **options).loss_sum)  # waits for the device
        return (time.perf_counter() - started) / len(images)

    step_seconds()
    of_step = _repeated(step_seconds, NUM_ROUNDS)
    score_seconds()
    of_score = _repeated(score_seconds, 2)
    return Calibration(of_network.multiply_adds, of_network.num_parameters, of_step, of_score, peak_bytes(device))


def _of_one_worker(config: PipelineConfig) -> PipelineConfig:
    """The config of a training that does what one worker of this one would: its part of a batch and of the shares."""
    part = {
        "execution.num_workers": 1,
        "execution.min_workers": 0,
        "train.batch_size": config.train.batch_size // config.execution.num_workers,
        "train.any_t": False,  # a few steps with drawn numbers would not be the mean of many
        "train.learning_rate": 1e-6,  # random images teach nothing, and must not diverge
    }
    if config.train.shares:
        part["train.num_shares"] = math.ceil(config.train.shares / config.execution.num_workers)
        part["train.batch_size"] = config.train.batch_size // config.train.shares * part["train.num_shares"]
    return config.with_settings(part)


def _repeated(measure: Callable[[], float], num_rounds: int) -> float:
    """The median of some rounds, or of those that begin in `MAX_SECONDS`."""
    started, rounds = time.perf_counter(), [measure()]
    while len(rounds) < num_rounds and time.perf_counter() - started < MAX_SECONDS:
        rounds.append(measure())
    return statistics.median(rounds)


def _forget_peak(device: Any, torch: Any) -> None:
    """Gives back what an earlier network left, and starts the count of the most memory again, where the system can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def stand_in(job: Job, *, num_rows: Mapping[str, int] = MappingProxyType({})) -> Any:
    """A manifest of the job's shape, for random images, with a number of rows for each split."""
    from rcnn.data.manifest import Manifest, SourceRecord, Split

    num_channels = job.image_shape[2]
    return Manifest(
        schema_version=0,
        name=job.config.data.dataset,
        source=SourceRecord(name="random", url="", files={}),
        classes=tuple(map(str, range(job.num_classes))),
        coarse_classes=(),
        image_shape=job.image_shape,
        splits={name: Split(rows=count, rows_per_class=(), shards=(), digest="") for name, count in num_rows.items()},
        skipped=(),
        pixel_mean=(127.5,) * math.prod(job.image_shape),
        pixel_std=73.6,
        channel_std=(73.6,) * num_channels,
    )


def main() -> None:
    """Reads jobs from standard input, and writes their calibrations, or an error, as a line of JSON."""
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    trees = json.load(sys.stdin)
    jobs = [
        Job(
            **tree
            | {"config": PipelineConfig.model_validate(tree["config"]), "image_shape": tuple(tree["image_shape"])}
        )
        for tree in trees
    ]
    try:
        answer: dict[str, Any] = {"calibrations": [asdict(calibrate(job)) for job in jobs]}
    except RcnnError as error:
        answer = {"error": {"kind": type(error).__name__, "what": error.what, "where": error.where}}
        answer["error"] |= {"remedy": error.remedy}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
