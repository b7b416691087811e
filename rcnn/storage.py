"""One root for everything that the pipeline stores: a folder, or a URI that pyarrow opens (`s3://bucket/prefix`).

Writes are atomic. Local files are written under a temporary name and renamed; object stores publish a file when it is closed.
The file that marks a piece of work as finished is written last.

    <root>/datasets/  data sets, one folder each       <root>/runs/     one folder per stage, Ray Train and Tune included
    <root>/reports/   plots and tables                 <root>/mlflow.db tracking, unless a server is set
    <root>/outbox/    notes that wait for MLflow
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from rcnn.errors import ClusterError, ConfigError, LeaseLost
from rcnn.progress import say
from rcnn.text import parse_json

Given = ParamSpec("Given")
Got = TypeVar("Got")
SECONDS_TO_WAIT, SECONDS_BETWEEN_TRIES = 60, 2
_MAY_PASS = re.compile(
    "NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|TIMEOUT|HTTP status 5"
)
"""What pyarrow says of an object store that is away or overloaded; it has tried for some seconds by itself."""


def _patient(method: Callable[Given, Got]) -> Callable[Given, Got]:
    """A method that waits for an object store which is away, as while its server is restarted."""

    @wraps(method)
    def tried(*args: Given.args, **options: Given.kwargs) -> Got:
        deadline, is_first = time.monotonic() + SECONDS_TO_WAIT, True
        while True:
            try:
                return method(*args, **options)
            except ClusterError as error:
                if not error.retryable or time.monotonic() > deadline:
                    raise
                if is_first:
                    say(f"  {error.where} {error.what}; trying again for {SECONDS_TO_WAIT} s")
            time.sleep(SECONDS_BETWEEN_TRIES)
            is_first = False

    return tried


class Storage:
    """Files under one root, addressed by paths relative to it.

    Args:
        root: a folder (created by the first write) or a URI.
    """

    def __init__(self, root: str):
        self.is_local = "://" not in root
        try:
            self.root = str(Path(root).expanduser().absolute()) if self.is_local else root.rstrip("/")
        except RuntimeError as error:  # ~user, without such a user
            raise ConfigError(f"storage = {root!r}: {error}", remedy="Give another folder") from error

    @cached_property
    def _filesystem_and_base(self) -> tuple[Any, str]:
        from pyarrow import fs

        if self.is_local:
            return fs.LocalFileSystem(), self.root
        try:
            filesystem, base = fs.FileSystem.from_uri(self.root)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"storage = {self.root!r} cannot be opened ({error})",
                remedy="Give a folder, or a URI that pyarrow.fs knows, such as s3://bucket/prefix",
            ) from error
        return filesystem, base

    @property
    def filesystem(self) -> Any:
        """The `pyarrow.fs.FileSystem` that holds the root."""
        return self._filesystem_and_base[0]

    def path(self, name: str) -> str:
        """The path of `name` for use with `filesystem`."""
        return f"{self._filesystem_and_base[1]}/{name}"

    def uri(self, name: str) -> str:
        """The path or URI of `name`, for messages and other processes."""
        return f"{self.root.partition('?')[0]}/{name}"

    def below(self, name: str) -> "Storage":
        """A storage whose root is the folder `name` of this one."""
        base, mark, options = self.root.partition("?")
        return Storage(f"{base}/{name}{mark}{options}")

    def local_path(self, name: str) -> Path:
        """`name` as a path on this machine.

        Raises:
            ConfigError: the root is not a local folder.
        """
        if not self.is_local:
            raise ConfigError(
                f"storage = {self.root!r} is not a local folder, but {name} must be in one",
                remedy="Set tracking.uri to an MLflow server, or storage to a folder",
            )
        return Path(self.root, name)

    @_patient
    def exists(self, name: str) -> bool:
        """Whether a file or folder exists."""
        from pyarrow import fs

        with self._reaching(name):
            return bool(self.filesystem.get_file_info(self.path(name)).type != fs.FileType.NotFound)

    @_patient
    def make_folder(self, name: str) -> None:
        """Creates a folder and its parents.

        Raises:
            ClusterError: the storage cannot be written.
        """
        with self.writing(name):
            self.filesystem.create_dir(self.path(name), recursive=True)

    def read_text(self, name: str) -> str:
        """The content of a text file; raises as `read_bytes` does."""
        return self.read_bytes(name).decode()

    @_patient
    def read_bytes(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: it is missing, or this machine cannot read it.
            ClusterError: an object store does not give it.
        """
        with self._reaching(name), self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file atomically.

        Raises:
            ClusterError: the storage cannot be written.
        """
        self.write_bytes(name, text.encode())

    @_patient
    def write_bytes(self, name: str, content: bytes | memoryview, *, durable: bool = False) -> None:
        """Writes a file atomically; a durable one survives a power cut as soon as this returns.

        Raises:
            ClusterError: the storage cannot be written.
        """
        with self.writing_file(name, durable=durable) as stream:
            stream.write(content)

    @contextmanager
    def writing_file(self, name: str, *, durable: bool = False) -> Iterator[Any]:
        """A stream whose content is in the file `name`, whole, after the body; if the body fails, there is no such file.

        Raises:
            ClusterError: the storage cannot be written.
        """
        target, is_whole = self.path(name), True
        draft = f"{target}.{uuid.uuid4().hex[:8]}.part" if self.is_local else target
        with self.writing(name):
            self.filesystem.create_dir(os.path.dirname(target), recursive=True)
            try:
                with self.filesystem.open_output_stream(draft) as stream:
                    try:
                        yield stream
                    except BaseException:
                        is_whole = False  # an object store publishes what it has when the stream is closed
                        raise
                if draft != target:
                    if durable:
                        _sync(draft)
                    self.filesystem.move(draft, target)
                    if durable:
                        _sync(os.path.dirname(target))
            except BaseException:
                if draft != target or not is_whole:
                    with suppress(OSError):  # there is none, or the storage is out of reach
                        self.filesystem.delete_file(draft)
                raise

    def read_json(self, name: str) -> Any:
        """The value in a JSON file, or None if there is no such file.

        Raises:
            ValueError: it is not JSON.
        """
        try:
            return parse_json(self.read_text(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_json(self, name: str, value: Any, *, durable: bool = False) -> None:
        """Writes a JSON file atomically, indented for readers."""
        self.write_bytes(name, (json.dumps(value, indent=2) + "\n").encode(), durable=durable)

    @_patient
    def upload(self, local: Path, name: str) -> None:
        """Copies a local folder to `name`, file by file."""
        from pyarrow import fs

        with self.writing(name):
            self.filesystem.create_dir(self.path(name), recursive=True)
            fs.copy_files(str(local), self.path(name), destination_filesystem=self.filesystem)

    @_patient
    def download(self, name: str, local: Path) -> None:
        """Copies a folder to the local folder `local`, which is created if missing."""
        from pyarrow import fs

        local.mkdir(parents=True, exist_ok=True)
        with self._reaching(name):
            fs.copy_files(self.path(name), str(local), source_filesystem=self.filesystem)

    @_patient
    def delete(self, name: str) -> None:
        """Deletes a folder and its contents, if it exists."""
        with self.writing(name):
            if not self.exists(name):
                return
            try:
                self.filesystem.delete_dir(self.path(name))
            except FileNotFoundError:
                # SeaweedFS shows a folder whose objects are gone; pyarrow finds none, and says that there is no folder.
                if self.is_local:
                    raise

    @_patient
    def delete_file(self, name: str) -> None:
        """Deletes a file."""
        with self.writing(name):
            self.filesystem.delete_file(self.path(name))

    @_patient
    def list_sizes(self, name: str) -> dict[str, int]:
        """The size in bytes of each file below a folder, by its path relative to it; empty if there is no such folder."""
        from pyarrow import fs

        base = self.path(name).rstrip("/")  # the root's own name is empty
        with self.reading(name):
            infos = self.filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{base}/"): info.size for info in infos if info.type == fs.FileType.File}

    @_patient
    def usage(self, name: str) -> tuple[int, float]:
        """The bytes below a folder, and when it last changed, in seconds since 1970; of an empty one, now."""
        from pyarrow import fs

        with self.reading(name):
            infos = self.filesystem.get_file_info(
                fs.FileSelector(self.path(name), recursive=True, allow_not_found=True)
            )
        files = [info for info in infos if info.type == fs.FileType.File]
        changed = max((info.mtime.timestamp() for info in files), default=time.time())
        return sum(info.size for info in files), changed

    @_patient
    def list_folders(self, name: str) -> list[str]:
        """The names of the folders in a folder, sorted; none where there is no such folder."""
        from pyarrow import fs

        with self.reading(name):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.path(name), allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    @_patient
    def list_files(self, name: str) -> list[str]:
        """The names of the files in a folder, sorted, without those in its folders; none where there is no such folder."""
        from pyarrow import fs

        with self.reading(name):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.path(name), allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)

    def require_size(self, name: str, num_bytes: int) -> None:
        """Checks that a file exists with all of its bytes.

        Raises:
            ClusterError: it does not.
        """
        found = self.filesystem.get_file_info(self.path(name)).size
        if found != num_bytes:
            raise ClusterError(
                f"has {found} bytes, but {num_bytes:,} were written",
                where=self.uri(name),
                remedy="Another process removed or changed it: run the same command again",
                retryable=True,
            )

    def require_free(self, num_bytes: int) -> None:
        """Checks that a local root has so much room left; of an object store nothing is known.

        Raises:
            ClusterError: it does not.
        """
        if not self.is_local or not os.path.isdir(self.root):
            return
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise ClusterError(
                f"has {free / 1e9:,.1f} GB free, and {num_bytes / 1e9:,.1f} GB are needed",
                where=self.root,
                remedy="Free some space, or set storage elsewhere",
            )

    def require_readable(self) -> None:
        """Checks that a local root can be listed, if it exists.

        Raises:
            ClusterError: it is not.
        """
        if self.is_local:
            with self.reading(""), suppress(FileNotFoundError):
                os.scandir(self.root).close()

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Reports a missing permission, an impossible path or a store that is away in the body as a `ClusterError`.

        Raises:
            ClusterError: `name` cannot be read.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._fault("read", name, error, "Check its permissions, or set storage elsewhere") from error

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Reports a full disk, a missing permission or a store that is away in the body as a `ClusterError`.

        Raises:
            ClusterError: `name` cannot be written.
        """
        try:
            yield
        except OSError as error:
            remedy = "Check its permissions and free space, or set storage elsewhere"
            raise self._fault("written", name, error, remedy) from error

    @contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        """Reports an object store that is away; what a disk says of a file is left to those who know what the file is."""
        with nullcontext() if self.is_local else self.reading(name):
            yield

    def _fault(self, what: str, name: str, error: OSError, remedy: str) -> ClusterError:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        may_pass = not self.is_local and _MAY_PASS.search(reason) is not None
        return ClusterError(
            f"cannot be {what} ({reason})",
            where=self.uri(name).rstrip("/"),
            remedy="Check that the store answers, and run the same command again" if may_pass else remedy,
            retryable=may_pass,
        )


def _sync(path: str) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


RESULT = "_result.json"
"""The result of a finished stage. Readers of Parquet folders skip names that begin with _."""
MADE_OF = "_made_of.json"
"""The parts that the key of that result hashes, so that `rcnn plan` can say what changed since."""
JOB, JOB_OUTCOME = "job.json", "outcome.json"
"""What a Ray job is to do, and how it ended, in a folder of its own."""
SCRATCH = "ray-"
"""How the names of folders begin that are of no use after an attempt."""
OLD_RESULT = "result.json"  # until version 0.1


class Held(Protocol):
    """A lease, as those who write see it (see `rcnn/lease.py`)."""

    name: str
    token: str
    on_lost: Callable[[LeaseLost], None]

    def require(self) -> None:
        """Raises `LeaseLost` if another process has the lease."""


@dataclass(frozen=True)
class StageFolder:
    """The only folder that a stage writes to; its name contains the hash of everything that the result depends on."""

    storage: Storage
    name: str
    replaces: str = ""
    """The run that replaces existing contents (`--fresh`), by an id that its retries share; empty: contents are kept."""
    lease: "Held | None" = None
    """Shows that no other process works on it; None if no lease was acquired, as in tests and benchmarks."""

    @property
    def unique_name(self) -> str:
        """Its last part, with a hash of the storage: two storages can hold results with the same key."""
        root = hashlib.sha256(self.storage.root.encode()).hexdigest()[:8]
        return f"{self.name.rpartition('/')[2]}-{root}"

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder in this one for what Ray writes, deleted at the end; those of killed attempts are deleted at once."""
        for folder in self.storage.list_folders(self.name):
            if folder.startswith(SCRATCH):
                self.storage.delete(self.path(folder))
        own = self.path(f"{SCRATCH}{uuid.uuid4().hex[:8]}")
        try:
            yield own
        finally:
            self.storage.delete(own)

    def require_held(self) -> None:
        """Checks that no other process has taken over; to be called before each write that another one could spoil.

        Raises:
            LeaseLost: one has.
        """
        if self.lease:
            self.lease.require()

    def path(self, file: str) -> str:
        """The path of a file in this folder, relative to the storage's root."""
        return f"{self.name}/{file}"
