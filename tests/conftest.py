"""Shared fixtures: one tiny data set of real digits, one Ray, one Prefect server for the whole session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# Before anything imports them: the tests talk to no telemetry and to no server of the user's.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Ray jobs call `rcnn`
os.environ.update(DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false", RAY_USAGE_STATS_ENABLED="0")
for name in [name for name in os.environ if name.startswith("RCNN_")] + ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"]:
    os.environ.pop(name, None)

from rcnn.config import PipelineConfig
from rcnn.data.manifest import SourceRecord
from rcnn.data.sources.origin import Arrays, Origin, origin_of_arrays
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult
from rcnn.stages import run_stage


@pytest.fixture(scope="session")
def digits_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage into which the session ingests the sample digits once; to be read only."""
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def tiny_config(digits_storage: Path) -> PipelineConfig:
    """`debug_tiny` in the shared storage."""
    return debug_tiny().with_settings({"storage": str(digits_storage)})


@pytest.fixture(scope="session")
def digits(tiny_config: PipelineConfig) -> IngestResult:
    """The ingested sample digits."""
    result = run_stage(tiny_config, "ingest", {})
    assert isinstance(result, IngestResult)
    return result


@pytest.fixture
def random_arrays() -> Arrays:
    """60 random colour images of 6x5 pixels in 3 classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 6, 5, 3), dtype=np.uint8)
    return Arrays(pixels, np.repeat(np.arange(3), 20))


@pytest.fixture
def random_origin(random_arrays: Arrays) -> Origin:
    """A source of them, without a test split."""
    record = SourceRecord(name="random", url="", files={})
    return origin_of_arrays({"train": random_arrays}, ("a", "b", "c"), record)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of two cores on this machine."""
    import ray

    from rcnn.ray_session import ensure_ray
    from rcnn.storage import Storage

    ensure_ray(PipelineConfig().with_settings({"ray.num_cpus": 2}), Storage("unused"))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server; its first start migrates a database and takes half a minute."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield
