"""Answers about the registry are kept while its store does not change, and not a write longer."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.registry.answers import ANSWERS, remembered
from rcnn.tracking import STORE

pytestmark = pytest.mark.long


class Registry:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    def __call__(self) -> int:
        self.num_asked += 1
        return self.num_asked


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig().with_settings({"storage": str(tmp_path / "storage")})


@pytest.fixture
def store(config: PipelineConfig) -> Path:
    file = Path(config.storage, STORE)
    file.parent.mkdir()
    write(file, "CREATE TABLE aliases (name TEXT, version INTEGER)")
    return file


def write(store: Path, statement: str) -> None:
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute(statement)


def test_the_store_is_asked_once_while_it_does_not_change(config: PipelineConfig, store: Path) -> None:
    ask = Registry()
    assert [remembered(config, "champion", ask) for _ in range(3)] == [1, 1, 1]
    assert remembered(config, "another question", ask) == 2


@pytest.mark.parametrize("change", ["write", "exchange", "damage"])
def test_it_is_asked_again_after_a_change(config: PipelineConfig, store: Path, change: str) -> None:
    ask = Registry()
    write(store, "INSERT INTO aliases VALUES ('champion', 1)")
    assert remembered(config, "champion", ask) == 1
    if change == "write":
        write(store, "UPDATE aliases SET version = 2")  # the size stays
    elif change == "exchange":
        shutil.copy2(store, store.with_name("copy"))
        store.with_name("copy").rename(store)
    else:
        store.with_name(ANSWERS).write_text("[1, 2]")
    assert [remembered(config, "champion", ask) for _ in range(2)] == [2, 2]


def test_no_answer_is_kept_from_the_middle_of_a_write(config: PipelineConfig, store: Path) -> None:
    ask = Registry()
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("INSERT INTO aliases VALUES ('champion', 1)")
        assert store.with_name(f"{STORE}-journal").exists()
        assert [remembered(config, "champion", ask) for _ in range(2)] == [1, 2]


def test_an_answer_that_was_asked_for_during_a_write_is_void(config: PipelineConfig, store: Path) -> None:
    ask = Registry()

    def ask_meanwhile() -> int:
        write(store, "INSERT INTO aliases VALUES ('champion', 1)")
        return ask()

    assert remembered(config, "champion", ask_meanwhile) == 1
    assert remembered(config, "champion", ask) == 2


def test_a_server_is_asked_each_time(config: PipelineConfig) -> None:
    ask = Registry()
    on_server = config.with_settings({"tracking.uri": "http://127.0.0.1:1"})
    assert [remembered(on_server, "champion", ask) for _ in range(2)] == [1, 2]
    assert not Path(config.storage).exists()


def test_a_storage_that_cannot_be_written_gets_its_answer(config: PipelineConfig, store: Path) -> None:
    store.with_name(ANSWERS).mkdir()
    ask = Registry()
    assert [remembered(config, "champion", ask) for _ in range(2)] == [1, 2]
