"""Downloads official files with progress, resumes after a broken connection, and checks them before anything reads them.

torchvision's download starts over when a connection breaks, which is costly for SVHN's 1.3 GB; this one resumes.
"""

import hashlib
import http.client
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import IO

from filelock import FileLock
from tqdm import tqdm

from rcnn.errors import SourceError
from rcnn.progress import say

SECONDS_TO_ANSWER = 30
NUM_ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 1.0
BYTES_PER_READ = 1 << 18


def fetch(file: str, *, md5: str, mirrors: Sequence[str], folder: Path) -> Path:
    """Downloads a file from the first mirror that has it, unless it exists already.

    A partial download is kept as `<file>.part`, and the next call resumes it.

    Raises:
        SourceError: no mirror has the file with this checksum, or the folder cannot be written.
    """
    target = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file}.lock"):  # concurrent ingests share one download
            if not (target.exists() and md5_of(target) == md5):
                _fetch_from_any(file, md5, mirrors, target)
    except OSError as error:
        raise SourceError(
            f"cannot be written ({error.strerror or error})",
            where=str(error.filename or target),
            remedy="Check permissions and free space, or set storage elsewhere",
        ) from error
    return target


def md5_of(file: Path) -> str:
    """The MD5 of a file's content.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise SourceError(
            f"cannot be read ({error.strerror})", where=str(file), remedy="Give a readable file"
        ) from error


def _fetch_from_any(file: str, md5: str, mirrors: Sequence[str], target: Path) -> None:
    draft, faults = target.with_name(f"{target.name}.part"), []
    for base in mirrors:
        url = base.rstrip("/") + "/" + file
        try:
            _fetch_resuming(url, draft)
        except _DownloadFailed as error:
            faults.append(f"{url}: {error}")
            continue
        found = md5_of(draft)
        if found == md5:
            draft.replace(target)
            return
        draft.unlink()  # not resumable
        faults.append(f"{url}: the file's MD5 is {found}, the official file's is {md5}")
    kept = f"; {draft.stat().st_size / 1e6:.1f} MB are kept, and the next run resumes there" if draft.exists() else ""
    raise SourceError(
        f"could not be downloaded ({'; '.join(faults)}{kept})",
        where=file,
        remedy="Check the network, set data.mirror to another address, or data.root to a folder with the files",
        retryable=True,
    )


class _DownloadFailed(Exception):
    """This mirror does not serve the file at the moment."""


def _fetch_resuming(url: str, draft: Path) -> None:
    """Appends to the draft until it is complete; gives up after `NUM_ATTEMPTS` consecutive attempts without progress."""
    if not url.startswith(("http://", "https://")):
        raise _DownloadFailed("is not an http address")
    fruitless = 0
    while True:
        before = draft.stat().st_size if draft.exists() else 0
        try:
            return _append(url, draft)
        except urllib.error.HTTPError as error:
            if error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise _DownloadFailed(f"HTTP {error.code} {error.reason}") from error
            fault = f"HTTP {error.code} {error.reason}"
        except (ValueError, http.client.InvalidURL) as error:
            raise _DownloadFailed(f"is not an http address ({error})") from error
        except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
            fault = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        after = draft.stat().st_size if draft.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if fruitless >= NUM_ATTEMPTS:
            raise _DownloadFailed(fault)
        say(f"  {draft.stem}: {fault}; resuming at {after / 1e6:.1f} MB")
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)


def _append(url: str, draft: Path) -> None:
    """Downloads the missing bytes in one request; raises if the connection closes too early."""
    there = draft.stat().st_size if draft.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})  # noqa: S310  (checked)
    try:
        response = urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{there}"):
            return  # the draft was already complete
        draft.unlink()
        raise ConnectionError("the kept part is longer than the file; starting over") from error
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            there = 0  # this server does not support range requests
        missing = -1 if response.length is None else response.length
        with draft.open("ab" if there else "wb") as stream:
            received = _copy(response, stream, there, missing, draft.stem)
    if 0 <= received < missing:
        raise ConnectionError(f"the connection ended {(missing - received) / 1e6:.1f} MB early")


def _copy(response: IO[bytes], stream: IO[bytes], there: int, missing: int, name: str) -> int:
    total = there + missing if missing >= 0 else None
    received = 0
    is_quiet = not sys.stderr.isatty()
    if is_quiet:
        say(f"  fetching {name}" + (f" ({total / 1e6:.1f} MB)" if total else ""))
    with tqdm(
        desc=f"  {name}", total=total, initial=there, unit="B", unit_scale=True, leave=False, disable=is_quiet
    ) as bar:
        while content := _received(response):
            stream.write(content)
            received += len(content)
            bar.update(len(content))
    return received


def _received(response: IO[bytes]) -> bytes:
    """The next bytes. A lost route is a plain OSError: here a ConnectionError, unlike a fault of the disk."""
    try:
        return response.read(BYTES_PER_READ)
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from error
