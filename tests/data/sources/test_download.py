"""Downloads from a server on this machine, which breaks off, refuses or lies as a test asks it to."""

import errno
import hashlib
import http.client
import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from rcnn.data.sources import download
from rcnn.data.sources.download import NUM_ATTEMPTS, fetch
from rcnn.errors import SourceError

CONTENT = np.random.default_rng(0).bytes(2_500_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Served:
    """One file over HTTP, what was asked of it, and the faults of the next answers."""

    url: str = ""
    content: bytes = CONTENT
    resumes: bool = True
    length: str | None = None
    """What is said of the length, instead of the truth."""
    statuses: list[int] = field(default_factory=list)
    """Of the next answers; with them there is no content."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    resets: bool = False
    """Whether breaking off is a reset, and not an orderly end."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    bytes_sent: int = 0
    gate: threading.Semaphore | None = None
    """Passed twice before an answer, if there is one."""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.ranges.append(handler.headers["Range"])
        if self.gate:
            assert self.gate.acquire(timeout=30)
            assert self.gate.acquire(timeout=30)
        if self.statuses:
            handler.send_error(self.statuses.pop(0))
            return
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1]) if self.resumes else 0
        if start and start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(self.content) - start) if self.length is None else self.length)
        handler.end_headers()
        body = self.content[start:][: self.cuts.pop(0) if self.cuts else None]
        self.bytes_sent += len(body)
        handler.wfile.write(body)
        if self.resets:
            self.resets = False
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()


def serve(served: Served) -> Iterator[Served]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        served.url = f"http://127.0.0.1:{httpd.server_port}/data"
        yield served
        httpd.shutdown()


@pytest.fixture
def server() -> Iterator[Served]:
    yield from serve(Served())


@pytest.fixture
def second_server() -> Iterator[Served]:
    yield from serve(Served())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SECONDS_BETWEEN_ATTEMPTS", 0)


def fetch_it(folder: Path, *servers: Served) -> Path:
    return fetch("file.bin", md5=MD5, mirrors=[server.url for server in servers], folder=folder)


def visible(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def test_a_file_is_fetched_whole_and_nothing_is_left_beside_it(server: Served, tmp_path: Path) -> None:
    assert fetch_it(tmp_path / "new" / "folder", server).read_bytes() == CONTENT
    assert visible(tmp_path / "new" / "folder") == ["file.bin"]
    assert server.ranges == [None]


def test_a_mirrors_address_may_end_in_a_slash(server: Served, tmp_path: Path) -> None:
    assert fetch("file.bin", md5=MD5, mirrors=[f"{server.url}/"], folder=tmp_path).read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again(server: Served, tmp_path: Path) -> None:
    fetch_it(tmp_path, server)
    assert fetch_it(tmp_path, server) == tmp_path / "file.bin"
    assert len(server.ranges) == 1


def test_what_is_there_with_another_checksum_is_fetched_anew(server: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT[:-1])
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT


def test_a_broken_download_goes_on_where_it_was(server: Served, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 700_000]
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-", "bytes=1700000-"]
    assert server.bytes_sent == len(CONTENT)


def test_a_connection_that_was_reset_is_taken_up(server: Served, tmp_path: Path) -> None:
    server.cuts, server.resets = [1_000_000], True
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_a_route_that_is_gone_for_a_while_is_taken_up(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, read = [OSError(errno.EHOSTUNREACH, "No route to host")], http.client.HTTPResponse.read

    def read_or_fail(response: http.client.HTTPResponse, count: int) -> bytes:
        if faults:
            raise faults.pop()
        return read(response, count)

    monkeypatch.setattr(http.client.HTTPResponse, "read", read_or_fail)
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert len(server.ranges) == 2


@pytest.mark.parametrize("length", ["-5", "many", ""])
def test_a_senseless_length_is_not_believed(server: Served, tmp_path: Path, length: str) -> None:
    server.length = length
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT


def test_more_breaks_than_attempts_do_not_matter_while_it_gets_on(server: Served, tmp_path: Path) -> None:
    server.cuts = [100_000] * (2 * NUM_ATTEMPTS)
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert server.bytes_sent == len(CONTENT)


def test_the_next_call_goes_on_where_the_last_one_gave_up(server: Served, tmp_path: Path) -> None:
    server.cuts = [1_500_000, *[0] * NUM_ATTEMPTS]
    with pytest.raises(SourceError, match=r"the connection ended 1\.0 MB early; 1\.5 MB are kept") as caught:
        fetch_it(tmp_path, server)
    assert caught.value.retryable
    assert len(server.ranges) == 1 + NUM_ATTEMPTS
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:1_500_000]
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=1500000-"
    assert server.bytes_sent == len(CONTENT)
    assert visible(tmp_path) == ["file.bin"]


def test_a_part_that_was_whole_already_is_not_fetched_again(server: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert server.bytes_sent == 0


def test_a_part_longer_than_the_file_is_started_over(server: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT


def test_a_part_of_another_file_does_no_harm_beyond_one_call(server: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"other")
    with pytest.raises(SourceError, match="MD5"):
        fetch_it(tmp_path, server)
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT


def test_a_server_that_cannot_resume_starts_over(server: Served, tmp_path: Path) -> None:
    server.resumes, server.cuts = False, [1_000_000]
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT
    assert server.bytes_sent == 1_000_000 + len(CONTENT)


def test_a_server_that_cannot_resume_and_always_breaks_off_is_given_up(server: Served, tmp_path: Path) -> None:
    server.resumes, server.cuts = False, [1_000_000] * 100
    with pytest.raises(SourceError, match=r"ended 1\.5 MB early"):
        fetch_it(tmp_path, server)
    assert len(server.ranges) == 1 + NUM_ATTEMPTS


def test_a_file_with_another_checksum_is_removed(server: Served, tmp_path: Path) -> None:
    server.content = b"something else"
    found = hashlib.md5(server.content).hexdigest()
    with pytest.raises(SourceError, match=f"the file's MD5 is {found}, the official file's is {MD5}") as caught:
        fetch_it(tmp_path, server)
    assert caught.value.retryable
    assert visible(tmp_path) == []
    assert len(server.ranges) == 1


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (500, NUM_ATTEMPTS), (503, NUM_ATTEMPTS)])
def test_a_server_in_trouble_is_asked_again_and_one_that_refuses_is_not(
    server: Served, tmp_path: Path, status: int, requests: int
) -> None:
    server.statuses = [status] * 100
    with pytest.raises(SourceError, match=rf"file\.bin: could not be downloaded .*HTTP {status} ") as caught:
        fetch_it(tmp_path, server)
    assert len(server.ranges) == requests
    assert caught.value.retryable
    assert caught.value.where == "file.bin"
    assert server.url in str(caught.value)
    assert "data.mirror" in caught.value.remedy
    assert visible(tmp_path) == []


def test_a_server_that_recovers_is_made_use_of(server: Served, tmp_path: Path) -> None:
    server.statuses = [503] * (NUM_ATTEMPTS - 1)
    assert fetch_it(tmp_path, server).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["404", "500", "another file"])
def test_the_second_mirror_is_used_when_the_first_fails(
    server: Served, second_server: Served, tmp_path: Path, fault: str
) -> None:
    if fault.isdigit():
        server.statuses = [int(fault)] * NUM_ATTEMPTS
    else:
        server.content = CONTENT[::-1]
    assert fetch_it(tmp_path, server, second_server).read_bytes() == CONTENT
    assert second_server.ranges == [None]


def test_the_second_mirror_goes_on_where_the_first_broke_off(
    server: Served, second_server: Served, tmp_path: Path
) -> None:
    server.cuts = [2_000_000, *[0] * NUM_ATTEMPTS]
    assert fetch_it(tmp_path, server, second_server).read_bytes() == CONTENT
    assert second_server.ranges == ["bytes=2000000-"]


def test_every_mirror_that_failed_is_named(server: Served, second_server: Served, tmp_path: Path) -> None:
    server.statuses, second_server.statuses = [404], [410]
    with pytest.raises(
        SourceError, match=f"{server.url}/file.bin: HTTP 404 .*; {second_server.url}/file.bin: HTTP 410"
    ):
        fetch_it(tmp_path, server, second_server)


def test_a_server_that_is_not_there_may_be_tried_again(tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(SourceError, match=f"{url}.*Connection refused") as caught:
            fetch("file.bin", md5=MD5, mirrors=[url], folder=tmp_path)
    assert caught.value.retryable


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/etc",
        "file:///etc",
        "ftp://127.0.0.1/",
        "http://[::1",
        "http://.x",
        "http://a b/",
        "http://x:y/",
        "http://x/\xe9",
    ],
)
def test_what_is_no_http_address_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(SourceError, match=r"is not an http address"):
        fetch("file.bin", md5=MD5, mirrors=[url], folder=tmp_path)


def test_two_at_once_share_one_download(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gate = threading.Semaphore(0)

    def lock_when_both_are_there(file: Path) -> FileLock:
        assert server.gate
        server.gate.release()
        return FileLock(file)

    monkeypatch.setattr(download, "FileLock", lock_when_both_are_there)
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(lambda _: fetch_it(tmp_path, server), range(2)))
    assert [file.read_bytes() == CONTENT for file in files] == [True, True]
    assert len(server.ranges) == 1


@pytest.mark.parametrize("folder", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_written_is_named(server: Served, tmp_path: Path, folder: str) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(SourceError, match=r"taken.*: cannot be written .*set storage elsewhere") as caught:
        fetch_it(tmp_path / folder, server)
    assert not caught.value.retryable
    assert server.ranges == []
