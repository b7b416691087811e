"""Our own SQLite store: created whole or not at all, whatever interrupts it and however many create it at once."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.registry.mlflow_store import create_store
from rcnn.registry.outbox import num_waiting, outbox_of
from rcnn.registry.runs import open_run

pytestmark = pytest.mark.long

FORK = multiprocessing.get_context("fork")  # the children need not import MLflow again


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig().with_settings({"storage": str(tmp_path / "storage")})


def started(config: PipelineConfig, *, max_file_bytes: int = 0) -> BaseProcess:
    """A process that creates the store; with a limit, none of its files may grow beyond it."""

    def work() -> None:
        if max_file_bytes:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        try:
            open_run(config, "train", key="k").finish()
        except ClusterError:
            os._exit(2)

    process = FORK.Process(target=work)
    process.start()
    return process


def wait_for_draft(config: PipelineConfig, process: BaseProcess) -> None:
    while process.is_alive() and not list(Path(config.storage).glob("mlflow.db.*.part")):
        time.sleep(0.001)


def check_usable(config: PipelineConfig) -> None:
    """The next command finds a store, or makes one, and writes to it; no draft is left."""
    run = open_run(config, "train", key="another")
    run.log_metrics({"val/error": 0.5}, step=1)
    run.finish()
    assert run.run_id
    assert [file.name for file in Path(config.storage).glob("mlflow.db*")] == ["mlflow.db"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_creator_that_is_stopped_leaves_a_storage_that_works(config: PipelineConfig, number: int) -> None:
    for _ in range(3):
        process = started(config)
        wait_for_draft(config, process)
        process.join(random.uniform(0, 1))
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it was quick, and is through
            os.kill(process.pid, number)
        process.join()
    check_usable(config)


def test_a_full_disk_is_reported_and_leaves_nothing(config: PipelineConfig) -> None:
    process = started(config, max_file_bytes=100_000)
    process.join()
    assert process.exitcode == 2
    assert list(Path(config.storage).glob("mlflow.db*")) == []
    check_usable(config)


def test_first_commands_at_once_all_succeed(config: PipelineConfig) -> None:
    command = [
        sys.executable,
        "-m",
        "rcnn.cli",
        "ingest",
        "--recipe",
        "debug_tiny",
        "--set",
        f"storage={config.storage}",
    ]
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    check_usable(config)


def test_runs_opened_at_once_in_a_new_experiment_all_succeed(config: PipelineConfig) -> None:
    create_store(config)
    others = [config.with_settings({"tracking.experiment": f"e{number}"}) for number in range(3) for _ in range(3)]
    runs = []
    threads = [
        threading.Thread(target=lambda other: runs.append(open_run(other, "train", key=str(id(other)))), args=(o,))
        for o in others
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outbox_of(config).flush()
    assert len({run.run_id for run in runs} - {""}) == len(others)


def half_migrated(file: Path) -> None:
    """What a killed migration of MLflow's leaves."""
    with sqlite3.connect(file) as store:
        store.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        store.execute("CREATE TABLE datasets (dataset_uuid VARCHAR(36))")
        store.execute("CREATE TABLE experiments (experiment_id INTEGER)")


def of_another_version(file: Path) -> None:
    create_store(PipelineConfig().with_settings({"storage": str(file.parent)}))
    with sqlite3.connect(file) as store:
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (half_migrated, ("datasets already exists", "move mlflow.db away")),
        (lambda file: file.write_bytes(b"no database" * 100), ("not a database", "move mlflow.db away")),
        (lambda file: file.write_bytes(b""), ("it holds no tables", "move mlflow.db away")),
        (lambda file: file.mkdir(), ("a folder is in its place", "move mlflow.db away")),
        (of_another_version, ("written by an older MLflow", "mlflow db upgrade sqlite:///")),
    ],
    ids=["half migrated", "no database", "empty", "a folder", "another version"],
)
def test_a_store_that_cannot_be_used_is_one_line_with_the_remedy(
    config: PipelineConfig, damage: object, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(config.storage).mkdir()
    damage(Path(config.storage, "mlflow.db"))  # type: ignore[operator]
    Path("x.png").touch()
    for command in (["ingest", "--recipe", "debug_tiny"], ["registry"], ["predict", "--model", "x", "x.png"]):
        assert main([*command, "--set", f"storage={config.storage}"]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("ingest:", "  "))]
        for word in ("ClusterError", "mlflow.db", *words):
            assert word in line


def write_until_full(config: PipelineConfig) -> ClusterError | None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = Path(config.storage, "mlflow.db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run, outbox = open_run(config, "train", key="k"), outbox_of(config)
    for number in range(1000):
        run.log_params({f"{number}-{key}": "x" * 200 for key in range(100)})
        if outbox.failure:
            break
    assert num_waiting(config) > 0
    return outbox.failure


def test_a_disk_that_fills_later_is_reported_as_that(config: PipelineConfig) -> None:
    create_store(config)
    fault = FORK.SimpleQueue()

    def work() -> None:
        fault.put(str(write_until_full(config)))

    process = FORK.Process(target=work)
    process.start()
    process.join()
    message = fault.get()
    assert "MLflow failed (" in message
    assert "Free some space" in message
    assert "move mlflow.db away" not in message


def test_an_address_of_no_kind_is_one_line_for_predict_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.png").touch()
    assert main(["predict", "--model", "x", "x.png", "--set", "tracking.uri=nonsense://x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
