"""Scores the rows of a split, in any process: a model and parts of the rows in, files of predictions out.

A row's logits depend, in their last bits, on how its batch is put together and on the number of threads that compute it
(measured: the RCNN at K = 32 gives other bits in batches of 64 than of 256; NIN in batches of 100 gives other ones on one
thread than on two). So each batch is computed on one thread, several batches at a time, and batches follow from the data set
and `evaluate.batch_size`. The predictions are then the same on any number of threads and workers of one kind of machine, and
computing batches side by side is as fast as sharing one among threads.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rcnn.data.batches import Batch
from rcnn.data.manifest import require_manifest
from rcnn.data.streaming import StoredRows, stored_rows, stretch
from rcnn.errors import ClusterError
from rcnn.evaluate.predictions import Part, build_table, write_part
from rcnn.lease import Lease
from rcnn.model.classifier import Classifier
from rcnn.storage import StageFolder, Storage
from rcnn.train.checkpoint import load_model
from rcnn.train.execution import choose_device
from rcnn.train.shares import threads_of_one

Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class ScoringJob:
    """Everything that a process needs to score parts of a split's rows.

    Attributes:
        storage: root of the storage.
        folder: where predictions are written: a stage's folder, or one in it.
        data_folder: the data set.
        model_folder: the finished model.
        batch_size: images per forward pass.
        use_gpu: whether the model is on the GPU.
        num_threads: batches at a time on a CPU, a thread each.
        token: of the lease on the stage's folder; empty if there is no lease.
        leased: the stage's folder; empty if there is no lease.
        split: whose rows are scored.
    """

    storage: str
    folder: str
    data_folder: str
    model_folder: str
    batch_size: int
    use_gpu: bool
    num_threads: int
    token: str = ""
    leased: str = ""
    split: str = "test"

    @property
    def target(self) -> StageFolder:
        """The folder of the predictions, with the stage's lease."""
        storage = Storage(self.storage)
        return StageFolder(storage, self.folder, lease=Lease(storage, self.leased, self.token) if self.token else None)

    @property
    def num_at_once(self) -> int:
        """Batches that are computed at a time."""
        return 1 if self.use_gpu else self.num_threads


@dataclass(frozen=True)
class _Scored:
    """A batch after the model: labels (N), logits (N, C) and losses (N), on the CPU."""

    labels: np.ndarray
    logits: np.ndarray
    losses: np.ndarray


def open_rows(storage: Storage, data_folder: str, split: str) -> StoredRows:
    """The rows of a split in the order of the data set; read as they are needed.

    Raises:
        DataError: the data set is missing or incomplete.
    """
    return stored_rows(storage, data_folder, require_manifest(storage, data_folder), split)


def load_for_scoring(job: ScoringJob) -> Classifier:
    """The finished model, on its device, in evaluation mode.

    Raises:
        DataError: the model is incomplete.
        ClusterError: it is to be on a GPU, and there is none.
    """
    device = choose_device(job.use_gpu)
    with tempfile.TemporaryDirectory() as folder:
        Storage(job.storage).download(job.model_folder, Path(folder))
        model, _ = load_model(Path(folder))
    model.to(device)
    return model


def score_parts(
    job: ScoringJob,
    model: Classifier,
    parts: Sequence[Part],
    *,
    on_batch: Callable[[int], None] = lambda num_rows: None,
) -> None:
    """Writes the predictions of some parts, one file each.

    Args:
        job: what is scored, and how.
        model: see `load_for_scoring`.
        parts: in any number; threads are kept busy from one to the next.
        on_batch: called with the number of rows after each batch, in order.

    Raises:
        DataError: a shard is missing, or not what the manifest says.
        ClusterError: the storage cannot be written.
    """
    target = job.target
    rows = open_rows(target.storage, job.data_folder, job.split)
    device = next(model.parameters()).device
    of_part = {part: replace(rows, segments=stretch(rows.segments, part.start, part.stop)) for part in parts}
    batches = ((part, batch) for part in parts for batch in of_part[part].batches(job.batch_size, device))
    for part, scored in groupby(_scored(model, batches, job.num_at_once), key=lambda each: each[0]):
        found = []
        for _, batch in scored:
            found.append(batch)
            on_batch(len(batch.labels))
        columns = (np.concatenate([getattr(each, name) for each in found]) for name in ("labels", "logits", "losses"))
        write_part(target, part, build_table(of_part[part].row_ids(), *columns))


def _scored(
    model: Classifier, batches: Iterator[tuple[Part, Batch]], num_at_once: int
) -> Iterator[tuple[Part, _Scored]]:
    """The batches after the model, in order; while some are computed, the next ones are read."""
    return side_by_side(lambda each: (each[0], _score_batch(model, *each[1])), batches, num_at_once)


def side_by_side(work: Callable[[Item], Done], items: Iterator[Item], num_at_once: int) -> Iterator[Done]:
    """What `work` makes of each item, in order: several at a time, each on one thread; meanwhile, the next ones are read."""
    waiting: deque[Future[Done]] = deque()
    with threads_of_one(num_at_once) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > num_at_once:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def logits_and_labels(model: Classifier, batches: Iterator[Batch], num_at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) and labels (N) of a few rows, which fit into memory; computed as those of the test rows are."""
    scored = list(side_by_side(lambda batch: _score_batch(model, *batch), batches, num_at_once))
    return np.concatenate([each.logits for each in scored]), np.concatenate([each.labels for each in scored])


@torch.inference_mode()
def _score_batch(model: Classifier, images_NCHW: Tensor, labels_N: Tensor) -> _Scored:
    try:
        logits_NC = model(images_NCHW).float()
    except torch.OutOfMemoryError as error:
        raise ClusterError(
            "the GPU's memory is too small for a batch of that many rows",
            where=f"evaluate.batch_size = {len(images_NCHW)}",
            remedy="Lower it",
        ) from error
    losses_N = functional.cross_entropy(logits_NC.double(), labels_N, reduction="none")
    return _Scored(labels_N.cpu().numpy(), logits_NC.cpu().numpy(), losses_N.cpu().numpy())
