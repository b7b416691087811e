"""Who works on a key: one process at a time, whether others wait, die or stop responding."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pyarrow import fs

from rcnn import conditional, lease
from rcnn.errors import ClusterError, LeaseLost
from rcnn.lease import Holder, held, is_held, read_holder
from rcnn.storage import StageFolder, Storage

NAME = "runs/train-x"
SHARED_BY_TWO = [
    "import sys, time",
    "from rcnn import lease",
    "from rcnn.storage import StageFolder, Storage",
    "lease.SECONDS_BETWEEN_BEATS, lease.SECONDS_TO_EXPIRE, lease.SECONDS_BETWEEN_LOOKS = 0.1, 1.0, 0.05",
    "target = StageFolder(Storage(sys.argv[1]), 'runs/train-x')",
]
HOLD = "\n".join(
    [*SHARED_BY_TWO, "with lease.held(target):", "    print('holds', flush=True)", "    sys.stdin.readline()"]
)
COUNT = "\n".join(
    [
        *SHARED_BY_TWO,
        "for _ in range(10):",
        "    with lease.held(target) as held:",
        "        held.require_held()",
        "        count = int(target.storage.read_text('count'))",
        "        time.sleep(0.005)",
        "        target.storage.write_text('count', str(count + 1))",
    ]
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(lease, "SECONDS_TO_EXPIRE", 1.0)
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_LOOKS", 0.05)


@pytest.fixture(scope="module")
def on_s3(s3_endpoint: str) -> str:
    """A storage in a bucket, which boto3 does not create by itself."""
    root = f"s3://bucket/prefix?{s3_endpoint}"
    fs.FileSystem.from_uri(root)[0].create_dir("bucket")
    return root


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.long)])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StageFolder]:
    root = str(tmp_path) if request.param == "folder" else request.getfixturevalue("on_s3")
    target = StageFolder(Storage(root), NAME)
    yield target
    _set(target, Holder())


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), NAME)


def _set(target: StageFolder, holder: Holder) -> None:
    """Writes the record by force."""
    file, text = lease._file(NAME), json.dumps(asdict(holder))
    while not conditional.swap(target.storage, file, text, conditional.read(target.storage, file)[1]):
        pass


def _elsewhere() -> Holder:
    return Holder("their-token", host="elsewhere", pid=1, born="1").renewed()


def _start(code: str, root: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_lease_is_renewed_while_it_is_held_and_free_afterwards(target: StageFolder) -> None:
    with held(target) as mine:
        assert mine.lease
        assert (mine.name, mine.lease.token) == (NAME, read_holder(target.storage, NAME)[0].token)
        deadline = time.monotonic() + 20
        while read_holder(target.storage, NAME)[0].beat < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine.require_held()
        assert is_held(target.storage, NAME)
    assert not is_held(target.storage, NAME)
    with pytest.raises(LeaseLost):
        mine.require_held()


@pytest.mark.long
def test_the_next_one_waits_and_says_for_whom(target: StageFolder, caplog: pytest.LogCaptureFixture) -> None:
    entered = threading.Event()

    def enter() -> None:
        with held(target):
            entered.set()

    with caplog.at_level("INFO", "rcnn"):
        with held(target):
            second = threading.Thread(target=enter)
            second.start()
            assert not entered.wait(1.5)  # longer than a lease lasts that is not renewed
        second.join(timeout=30)
    assert entered.is_set()
    assert [each.message for each in caplog.records if each.name == "rcnn"] == [
        f"  process {os.getpid()} on {socket.gethostname()} is working on the same result: waiting for it"
    ]


@pytest.mark.long
def test_many_processes_work_one_at_a_time(folder: StageFolder) -> None:
    folder.storage.write_text("count", "0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, folder.storage.root]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert folder.storage.read_text("count") == "30"


@pytest.mark.long
def test_a_killed_holder_is_followed_at_once(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS_TO_EXPIRE", 1000.0)
    with _start(HOLD, folder.storage.root) as first:
        assert first.stdout
        assert first.stdout.readline() == "holds\n"
        with pytest.raises(
            ClusterError, match=rf"process {first.pid} on .* is working on it\. Wait until it has ended"
        ):
            held(folder, waits=False).__enter__()
        first.kill()
        first.wait()
        with held(folder, waits=False):
            pass


@pytest.mark.long
def test_a_holder_that_stops_responding_loses_its_lease_and_writes_no_more(folder: StageFolder) -> None:
    code = HOLD + "\n    time.sleep(1)\n    print(type(target).__name__)"
    code = code.replace("held(target):", "held(target) as target:").replace(
        "print(type(target).__name__)", "target.require_held()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder.storage.root],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        assert first.stdout
        assert first.stdout.readline() == "holds\n"
        first.send_signal(signal.SIGSTOP)
        with held(folder):
            first.send_signal(signal.SIGCONT)
            error = first.communicate("\n")[1]
            assert f"LeaseLost: {folder.storage.uri(NAME)}: process {os.getpid()} on" in error
            assert is_held(folder.storage, NAME)  # which the end of the first one did not change


@pytest.mark.long
def test_a_holder_on_another_machine_is_given_a_minute(target: StageFolder) -> None:
    _set(target, _elsewhere())
    assert is_held(target.storage, NAME)
    started = time.monotonic()
    with held(target, waits=False):
        assert time.monotonic() - started > 1.0


def test_a_living_holder_on_another_machine_is_not_disturbed(target: StageFolder) -> None:
    holder, stop = _elsewhere(), threading.Event()
    _set(target, holder)

    def renew() -> None:
        renewed = holder
        while not stop.wait(0.1):
            renewed = renewed.renewed()
            _set(target, renewed)

    other = threading.Thread(target=renew)
    other.start()
    try:
        with pytest.raises(ClusterError, match="process 1 on elsewhere is working on it"):
            held(target, waits=False).__enter__()
    finally:
        stop.set()
        other.join()


def test_the_holder_is_told_when_another_one_took_over(target: StageFolder) -> None:
    errors: list[LeaseLost] = []
    told = threading.Event()
    with held(target) as mine:
        assert mine.lease
        mine.lease.on_lost = lambda error: (errors.append(error), told.set())  # type: ignore[func-returns-value,assignment,return-value]
        _set(target, _elsewhere())
        assert told.wait(20)
        with pytest.raises(LeaseLost, match="process 1 on elsewhere took over this work"):
            mine.require_held()
    assert len(errors) == 1
    assert read_holder(target.storage, NAME)[0].host == "elsewhere"


def test_a_pid_that_was_given_to_another_process_is_not_the_holder(folder: StageFolder) -> None:
    here = replace(_elsewhere(), host=socket.gethostname(), space=lease._space(), pid=os.getpid())
    assert here.is_gone
    _set(folder, here)
    with held(folder, waits=False):
        pass


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"token": "x", "no": 1}'])
def test_a_damaged_record_is_that_of_nobody(folder: StageFolder, damage: str) -> None:
    folder.storage.write_text(lease._file(NAME), damage)
    with held(folder, waits=False) as mine:
        mine.require_held()


def test_a_storage_that_cannot_be_written_is_named(folder: StageFolder) -> None:
    folder.storage.write_text(lease.FOLDER, "a file where a folder should be")
    with pytest.raises(ClusterError, match=r"\.leases/runs-train-x\.json: cannot be"):
        held(folder).__enter__()


@pytest.mark.long
def test_a_bucket_that_does_not_exist_is_an_error_and_not_a_lost_race(on_s3: str) -> None:
    target = StageFolder(Storage(on_s3.replace("s3://bucket", "s3://no-bucket")), NAME)
    with pytest.raises(ClusterError, match="NoSuchBucket"):
        held(target).__enter__()


def test_other_stores_have_no_leases_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rcnn"), held(StageFolder(Storage("hdfs://host/x"), NAME)) as mine:
        assert mine.lease is None
    assert "has no leases" in caplog.text


@pytest.mark.long
def test_a_process_of_another_namespace_is_not_looked_up_by_its_pid(folder: StageFolder) -> None:
    _set(folder, replace(_elsewhere(), host=socket.gethostname(), space="pid:[1]", pid=os.getpid()))
    started = time.monotonic()
    with held(folder):
        assert time.monotonic() - started > 1.0  # as long as a lease lasts that is not renewed


@pytest.mark.long
def test_a_write_whose_answer_was_lost_does_not_wait_for_itself(
    target: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, lost = lease._write, []

    def lose_the_answer(*arguments: object) -> str | None:
        written = write(*arguments)  # type: ignore[arg-type]
        lost.append(written)
        return written if len(lost) > 1 else None

    monkeypatch.setattr(lease, "_write", lose_the_answer)
    with held(target, waits=False) as mine:
        mine.require_held()
    assert lost[0]
