"""Storages that cannot be written."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from rcnn.config import PipelineConfig
from rcnn.data import shards
from rcnn.data.ingest import run_ingest
from rcnn.errors import ClusterError, ConfigError, RcnnError, SourceError
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from tests.data.broken.scene import (
    Case,
    Scene,
    Settings,
    check_finished_shards,
    check_nothing_left,
    check_refused,
    contents,
    ingest,
    kept,
    named,
    stored_rows,
)

STORAGES: list[Case] = []


def unwritable(kind: type[RcnnError], *words: str) -> Callable[[Any], Any]:
    def register(make: Callable[[Scene], Settings]) -> Callable[[Scene], Settings]:
        STORAGES.append(Case(make, words, kind))
        return make

    return register


def storage_with_a_file(scene: Scene, name: str) -> Settings:
    """A storage in which a file is where a folder should be: it cannot be written, not even by root."""
    file = Path(scene.storage, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a file where a folder should be")
    return scene.tree()


@unwritable(ClusterError, "{storage}", "cannot be written")
def storage_that_is_a_file(scene: Scene) -> Settings:
    Path(scene.storage).write_text("a file where a folder should be")
    return scene.tree()


@unwritable(ClusterError, "{storage}/datasets", "cannot be written")
def data_sets_that_are_a_file(scene: Scene) -> Settings:
    return storage_with_a_file(scene, "datasets")


@unwritable(ClusterError, "{storage}/datasets/x", "cannot be written")
def data_set_that_is_a_file(scene: Scene) -> Settings:
    return storage_with_a_file(scene, "datasets/x")


@unwritable(SourceError, "{storage}/downloads", "cannot be written")
def downloads_that_are_a_file(scene: Scene) -> Settings:
    storage_with_a_file(scene, "downloads")
    return {"data.source": "mnist", "data.mirror": "http://127.0.0.1:1/"}


@unwritable(ConfigError, "no-such://bucket", "cannot be opened")
def storage_of_an_unknown_kind(scene: Scene) -> Settings:
    scene.storage = "no-such://bucket/rcnn"
    return scene.tree()


@unwritable(ClusterError, "{storage}/datasets/x", "Permission denied")
def data_set_that_cannot_be_put_in_its_place(scene: Scene) -> Settings:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(target))

    scene.patch.setattr(Path, "rename", refuse)
    return scene.tree()


@pytest.mark.parametrize("case", named(STORAGES))
def test_a_storage_that_cannot_be_written_is_named(scene: Scene, case: Case) -> None:
    check_refused(scene, case.make(scene), case.kind, case.words)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(shards, "SECONDS_BEFORE_RETRIES", (0, 0))


class FullDisk:
    """A file system that is full when one of the files is half written, and from then on, or for `times` files; `device` takes
    the place of that file."""

    def __init__(self, number: int, device: str = "", *, times: int = 10**9):
        self.number, self.device, self.times = number, device, times
        self.real = LocalFileSystem()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @contextmanager
    def open_output_stream(self, path: str) -> Iterator[Any]:
        self.number -= 1
        is_full = -self.times <= self.number < 0
        with self.real.open_output_stream(self.device if is_full and self.device else path) as stream:
            if is_full and not self.device:
                stream.write(b"half of")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield stream


OF_A_SHARD = 3  # itself, small copies of its images, and its record
WRITES = 3 * OF_A_SHARD + 2  # three shards, the near-duplicates, and the manifest


@pytest.mark.parametrize("number", range(WRITES))
def test_a_full_disk_is_named_and_keeps_finished_shards(scene: Scene, number: int) -> None:
    settings = scene.tree()
    with scene.patch.context() as patch:
        patch.setattr(Storage, "filesystem", FullDisk(number))
        check_refused(scene, settings, ClusterError, ("{storage}/datasets", "No space left on device"))
    assert len(list(Path(scene.storage).glob("datasets/.draft-x/records/*.json"))) == min(3, number // OF_A_SHARD)
    ingest(scene, settings)
    check_nothing_left(scene, kept(scene) - check_finished_shards(scene))
    assert stored_rows(scene) == scene.rows


@pytest.mark.parametrize("number", range(3 * OF_A_SHARD))
def test_a_storage_that_fails_twice_is_asked_a_third_time(scene: Scene, number: int) -> None:
    scene.patch.setattr(Storage, "filesystem", FullDisk(number, times=2 if number % OF_A_SHARD == 0 else 1))
    ingest(scene, scene.tree())
    assert stored_rows(scene) == scene.rows


def test_eleven_files_are_written(scene: Scene) -> None:
    scene.patch.setattr(Storage, "filesystem", FullDisk(WRITES))
    ingest(scene, scene.tree())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("number", [0, 3])
def test_a_full_device_is_named(scene: Scene, number: int) -> None:
    scene.patch.setattr(Storage, "filesystem", FullDisk(number, "/dev/full"))
    check_refused(scene, scene.tree(), ClusterError, ("{storage}/datasets", "No space left on device"))


def test_a_limit_on_the_size_of_files_is_named(scene: Scene) -> None:
    settings = scene.tree()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        check_refused(scene, settings, ClusterError, ("{storage}/datasets", "File too large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("number", range(WRITES))
def test_a_full_disk_keeps_the_data_set_that_was_to_be_replaced(scene: Scene, number: int) -> None:
    settings = scene.tree()
    ingest(scene, settings)
    before = contents(Path(scene.storage, "datasets/x"))
    storage = Storage(scene.storage)
    scene.patch.setattr(Storage, "filesystem", FullDisk(number))
    with pytest.raises(ClusterError, match="No space left on device"):
        run_ingest(
            PipelineConfig().with_settings(settings), StageFolder(storage, "datasets/x", replaces="me"), NoTracker()
        )
    assert contents(Path(scene.storage, "datasets/x")) == before
