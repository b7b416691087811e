"""Shared fixtures: one tiny data set of real digits, one Ray, one Prefect server for the whole session.

Tests see nothing of the user's: each runs in an empty folder, with an empty home, without the user's settings and
addresses; and one that touches the checkout's `storage/` fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# Before anything imports what reads them.
HOME = tempfile.mkdtemp(prefix="rcnn-tests-")  # Prefect's profile and database, Ray's token, downloads
for name in [name for name in os.environ if name.startswith(("RCNN_", "PREFECT_", "MLFLOW_", "RAY_", "AWS_", "XDG_"))]:
    del os.environ[name]
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Ray jobs call `rcnn`
os.environ.update(HOME=HOME, DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false", RAY_USAGE_STATS_ENABLED="0")
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "180"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two spinning threads each would halve each other's speed
os.environ["STACK_STATE"] = f"{HOME}/stack"
USERS_STORAGE = str(Path(__file__).parents[1] / "storage")


def _refuse_the_users_storage(event: str, arguments: tuple) -> None:
    """Python asks this before it opens, lists, makes, renames or deletes anything."""
    if event == "open" or event.startswith(("os.", "shutil.", "sqlite3.")):
        for argument in arguments[:2]:
            text = os.fsdecode(argument) if isinstance(argument, (str, bytes, os.PathLike)) else ""
            if USERS_STORAGE in text and f"{os.path.abspath(text)}/".startswith(f"{USERS_STORAGE}/"):
                raise AssertionError(f"a test touches the user's storage: {event} {text}")


sys.addaudithook(_refuse_the_users_storage)

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is not a fault
hypothesis.settings.load_profile("suite")

from rcnn import keys
from rcnn.config import PipelineConfig
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import SourceRecord
from rcnn.data.sources.origin import Arrays, Origin, origin_of_arrays
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult
from rcnn.stages import made_of, stage_folder
from rcnn.storage import MADE_OF, RESULT
from rcnn.tracking import NoTracker

GROUPS = {
    "pipeline": re.compile(r"tests/flows/(?!test_jobs)"),  # Prefect's server, Ray and MLflow
    "ray": re.compile(r"tests/.*/test_ray_"),
    "jobs": re.compile(r"tests/flows/test_jobs"),  # a Ray of its own
    "mlflow": re.compile(r"tests/registry/test_mlflow_store"),
}
"""Tests that share a server, which takes long to start: each group runs in one process, and the first ones start first."""


def group_of(nodeid: str) -> str:
    """The group of a test, or its own id if it is in none."""
    return next((name for name, files in GROUPS.items() if files.match(nodeid)), nodeid)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips files of which `-m "not (...)"` leaves nothing, before they import MLflow, Prefect or another 4 s of modules."""
    excluded = re.fullmatch(r"not \((.*)\)", config.option.markexpr)
    if excluded is None or collection_path.suffix != ".py":
        return None
    marks = "|".join(excluded[1].split(" or "))
    return (
        re.search(rf"^pytestmark = .*\bmark\.({marks})\b", collection_path.read_text(), re.MULTILINE) is not None
        or None
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Holds the names of files to what they contain, and puts the tests of a group first and together."""
    for item in items:
        uses_ray = item.get_closest_marker("ray") is not None
        assert not uses_ray or group_of(item.nodeid) in GROUPS, f"{item.nodeid} uses Ray: name its file test_ray_..."
    order = list(GROUPS)
    items.sort(key=lambda item: order.index(group) if (group := group_of(item.nodeid)) in GROUPS else len(order))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out the groups in their order, each to one process of pytest-xdist, then single tests until all are done.

    The marks of `--dist loadgroup` have no effect with pytest 9.2 and pytest-xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the largest group is not the longest
    return ByServer(config, log)


def pytest_unconfigure() -> None:
    """Removes the home of the tests."""
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _users_storage_stays_as_it_is() -> Iterator[None]:
    """Fails the session where a process of a test wrote to the checkout's storage: the hook sees this process alone."""
    call = ["find", USERS_STORAGE, "-printf", "%p %s %T@\\n"]
    before = subprocess.run(call, capture_output=True, check=False).stdout
    os.chdir(HOME)
    yield
    assert subprocess.run(call, capture_output=True, check=False).stdout == before, f"a test changed {USERS_STORAGE}"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each test run in a folder of its own: the default storage is `storage` there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def reread_code() -> Callable[[], None]:
    """Makes `rcnn.keys` read code again that a test has edited; it reads each module once."""

    def forget() -> None:
        for read in (keys._digest_of, keys._imports_of):
            read.cache_clear()

    return forget


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
    """The ingested sample digits, as the stage leaves them, but without an MLflow run: its import and store take 10 s."""
    target = stage_folder(tiny_config, "ingest", {})
    result = run_ingest(tiny_config, target, NoTracker())
    target.storage.write_json(target.path(MADE_OF), made_of(tiny_config, "ingest", {}))
    target.storage.write_json(target.path(RESULT), result.model_dump(mode="json"))
    return result


@pytest.fixture(scope="session")
def model(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of the digits with initial weights; to be read only."""
    import torch  # late: many tests need no torch

    from rcnn.data.manifest import require_manifest
    from rcnn.storage import Storage
    from rcnn.train.checkpoint import build_classifier, save_model

    folder = tmp_path_factory.mktemp("model")
    manifest = require_manifest(Storage(tiny_config.storage), digits.folder)
    torch.manual_seed(0)
    save_model(build_classifier(tiny_config, manifest).state_dict(), tiny_config, manifest, folder)
    return folder


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


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """The query of a URI that leads to a real S3 protocol, served by this process; a module has its own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        host, port = server.get_host_and_port()
        yield f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
        server.stop()


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
    """The temporary Prefect server of `rcnn pipeline`; its first start migrates a database and takes half a minute."""
    from flows.server import prefect_server

    with prefect_server() as server:
        server.wait()
        yield
