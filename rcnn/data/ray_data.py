"""The part of ingest that runs on Ray Data: maps one function over many jobs, on all nodes, in bounded memory."""

import logging
import pickle
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from rcnn.ray_session import ensure_ray  # isort: skip  (sets what Ray reads)
import ray.data
from ray.exceptions import RayError

from rcnn.config import PipelineConfig
from rcnn.data.sources.origin import without_pattern
from rcnn.errors import ClusterError
from rcnn.ray_nodes import require_seen
from rcnn.storage import Storage

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def map_on_cluster(
    config: PipelineConfig, function: Callable[[Job], Outcome], jobs: Sequence[Job]
) -> Generator[Outcome, None, None]:
    """Yields the outcome of `function` for each job, as they become available.

    Raises:
        ClusterError: Ray cannot be reached, or a job fails; or not all nodes see `storage` and `data.root`.
    """
    ensure_ray(config, Storage(config.storage))
    if "://" not in config.data.root:
        require_seen(without_pattern(config.data.root), setting="data.root")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `say` reports the progress
    ray.data.DataContext.get_current().enable_progress_bars = False
    # As bytes: Ray Data would first try to infer a column type for our objects, and warn that it cannot.
    data = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs))

    def apply(row: dict[str, bytes]) -> dict[str, bytes]:
        return {"outcome": pickle.dumps(function(pickle.loads(row["job"])))}  # noqa: S301  (pickled a few lines above)

    try:
        for row in data.map(apply, num_cpus=1).iter_rows():
            yield pickle.loads(row["outcome"])  # noqa: S301
    except RayError as error:
        raise ClusterError(
            f"Ray gave up on reading the images ({' '.join(str(error).split())[:300]})",
            where=f"ray.address = {config.ray.address!r}",
            remedy="Run the same command again: finished shards are kept",
            retryable=True,
        ) from error
