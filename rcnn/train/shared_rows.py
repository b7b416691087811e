"""Rows that the workers of a node hold together: the first of them reads the shards into a file, and all map it into memory.

In: a function that loads the rows. Out: what it returns, with the memory of one copy for each node. A mapped file needs no
name, so it is deleted as soon as all workers have it open: nothing is left behind, however they end.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import numpy as np
import ray.train
import ray.train.collective
import torch

from rcnn.data.loader import Rows, TrainingData
from rcnn.data.manifest import Manifest
from rcnn.progress import say


def shared_on_node(load: Callable[[], TrainingData]) -> TrainingData:
    """What `load` returns, to be called on all workers of a Ray training.

    Rows that stay on disk, and those of a worker that is alone on its node, are left as they are.
    """
    context = ray.train.get_context()
    if context.get_world_size() == 1:
        return load()
    is_first, is_alone = context.get_local_rank() == 0, context.get_local_world_size() == 1
    folder = Path(tempfile.gettempdir(), f"rcnn-{context.get_experiment_name()}-{context.get_node_rank()}")
    data = load() if is_first else None
    if data is not None and not is_alone:
        data = _moved(data, folder)
    ray.train.collective.barrier()
    if data is None:
        data = _mapped(folder) if folder.exists() else load()
    ray.train.collective.barrier()
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
    return data


def _moved(data: TrainingData, folder: Path) -> TrainingData:
    """The same rows, in files in the folder; where these cannot be written, the rows as they were, and no folder."""
    if not (isinstance(data.train, Rows) and isinstance(data.val, Rows)):
        return data
    try:
        folder.mkdir(mode=0o700)
        for name, rows in (("train", data.train), ("val", data.val)):
            np.save(folder / f"{name}-images.npy", rows.images.permute(0, 2, 3, 1).numpy())
            np.save(folder / f"{name}-labels.npy", rows.labels.numpy())
        (folder / "manifest.json").write_text(data.manifest.model_dump_json())
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        say(f"  each worker holds the rows by itself: {folder} cannot be written ({error.strerror})")
        return data
    return _mapped(folder)


def _mapped(folder: Path) -> TrainingData:
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    return TrainingData(manifest, train=_mapped_rows(folder, "train"), val=_mapped_rows(folder, "val"))


def _mapped_rows(folder: Path, split: str) -> Rows:
    # Copy on write: nobody writes, and torch warns of arrays that are read-only.
    images_NHWC, labels_N = (np.load(folder / f"{split}-{what}.npy", mmap_mode="c") for what in ("images", "labels"))
    return Rows(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), torch.from_numpy(labels_N))
