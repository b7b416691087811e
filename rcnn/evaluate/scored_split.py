"""Scores a whole split, in this process or on Ray's workers, resuming what an earlier attempt had scored.

In: a finished model, a data set and the name of a split. Out: `predictions.parquet` in a folder, and how fast it was scored.
"""

import torch

from rcnn.config import PipelineConfig
from rcnn.evaluate.pace import Pace
from rcnn.evaluate.predictions import Part, has_part, merge_parts, parts_of
from rcnn.evaluate.scoring import ScoringJob, load_for_scoring, score_parts
from rcnn.progress import RowProgress, say
from rcnn.results import IngestResult, TrainResult
from rcnn.storage import StageFolder
from rcnn.text import counted

MOST_THREADS = 16  # of scoring in this process: each holds the activations of a batch


def score_split(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, target: StageFolder, split: str
) -> tuple[Pace, str]:
    """Scores the rows of a split and merges their predictions; returns how fast, and the SHA-256 of the predictions.

    Args:
        config: the whole config.
        data: the data set.
        trained: the model.
        target: the folder of the predictions; parts that an earlier attempt left there are kept.
        split: whose rows are scored.

    Raises:
        DataError: the data set or the model is incomplete.
        ClusterError: the storage cannot be written, or Ray's workers cannot be had.
    """
    parts = parts_of(data.rows[split], config.evaluate.batch_size)
    pace = _score(config, data, trained, target, split, parts)
    return pace, merge_parts(target, parts)


def threads_here() -> int:
    """Threads of this process that score a batch each."""
    return min(int(torch.get_num_threads()), MOST_THREADS)


def _score(
    config: PipelineConfig,
    data: IngestResult,
    trained: TrainResult,
    target: StageFolder,
    split: str,
    parts: list[Part],
) -> Pace:
    """Scores the parts that no earlier attempt has scored."""
    todo = [part for part in parts if not has_part(target, part)]
    num_rows, num_left = sum(map(len, parts)), sum(map(len, todo))
    if num_left < num_rows:
        say(f"  resuming: {num_rows - num_left:,} of {num_rows:,} rows are scored, {counted(len(todo), 'part')} left")
    how, on_workers = config.execution, _needs_workers(config, todo)
    job = ScoringJob(
        storage=target.storage.root,
        folder=target.name,
        data_folder=data.folder,
        model_folder=f"{trained.folder}/model",
        batch_size=config.evaluate.batch_size,
        use_gpu=how.use_gpu,
        num_threads=how.cpus_per_worker if on_workers else threads_here(),
        token=target.lease.token if target.lease else "",
        leased=target.lease.name if target.lease else "",
        split=split,
    )
    pace = Pace(num_left, num_at_once=min(how.num_workers, len(todo)) if on_workers else job.num_at_once)
    progress = RowProgress(num_rows, num_done=num_rows - num_left)

    def advance(num_rows: int) -> None:
        pace.advance(num_rows)
        progress.advance(num_rows)

    try:
        if on_workers:
            from rcnn.evaluate.ray_scoring import score_on_workers  # late: with Ray, it takes seconds

            score_on_workers(config, job, todo, on_start=pace.start, on_part=lambda part: advance(len(part)))
        elif todo:
            model = load_for_scoring(job)
            pace.start()
            score_parts(job, model, todo, on_batch=advance)
    finally:
        progress.close()
    return pace


def _needs_workers(config: PipelineConfig, todo: list[Part]) -> bool:
    """Whether Ray's workers score: on a cluster, whose head should do nothing heavy, or where several can share the work.

    A single worker on this machine would do what this process can do, after a start of 10 s and more.
    """
    on_cluster = config.ray.address != ""
    return bool(todo) and (on_cluster or min(len(todo), config.execution.num_workers) > 1)
