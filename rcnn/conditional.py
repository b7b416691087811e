"""Files that change only from a known state: compare and set, on a local folder and on S3.

In: a storage and the name of a small text file. Out: its text with a version, and a write that fails if another process has
written in between. Leases are built on it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import parse_qs, urlsplit

from filelock import FileLock

from rcnn.errors import ClusterError, ConfigError
from rcnn.storage import Storage

ABSENT = ""
"""The version of a file that does not exist."""
REFUSED = (404, 409, 412)  # HTTP: the object is gone, is being written by another, or is not the one that was read


def can_swap(storage: Storage) -> bool:
    """Whether this kind of storage writes conditionally: local folders and S3 do."""
    return storage.is_local or storage.root.startswith("s3://")


def read(storage: Storage, name: str) -> tuple[str, str]:
    """The text of a file and its version; empty and `ABSENT` where there is none.

    Raises:
        ClusterError: the storage cannot be read.
    """
    if not storage.is_local:
        return _s3(storage.root).read(name)
    with storage.reading(name):
        try:
            text = storage.read_text(name)
        except (FileNotFoundError, NotADirectoryError):
            return "", ABSENT
    return text, _version(text)


def swap(storage: Storage, name: str, text: str, version: str) -> str | None:
    """Writes a file if it still has that version; returns its new version, or None where it had another one.

    Raises:
        ClusterError: the storage cannot be written.
        ConfigError: the object store does not know conditional writes.
    """
    if not storage.is_local:
        return _s3(storage.root).swap(name, text, version)
    lock = storage.local_path(name).parent / ".lock"
    with storage.writing(name):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if read(storage, name)[1] != version:
                return None
            storage.write_text(name, text)
            return _version(text)


@cache
def _s3(root: str) -> "_S3":
    return _S3(Storage(root))


def _version(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _S3:
    """Conditional writes by the ETag of an object. pyarrow has none, so this takes boto3, and pyarrow's form of a URI."""

    def __init__(self, storage: Storage):
        import boto3  # late: a local folder does not need it

        parts = urlsplit(storage.root)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        endpoint = options.get("endpoint_override")
        self.storage, self.bucket, self.prefix = storage, parts.netloc, parts.path.strip("/")
        self.client: Any = boto3.client(
            "s3",
            region_name=options.get("region"),
            endpoint_url=f"{options.get('scheme', 'https')}://{endpoint}" if endpoint else None,
        )

    def read(self, name: str) -> tuple[str, str]:
        with self._answering(name):
            try:
                answer = self.client.get_object(**self._object(name))
            except self.client.exceptions.NoSuchKey:
                return "", ABSENT
            return answer["Body"].read().decode(), answer["ETag"]

    def swap(self, name: str, text: str, version: str) -> str | None:
        from botocore.exceptions import ClientError

        condition = {"IfMatch": version} if version != ABSENT else {"IfNoneMatch": "*"}
        with self._answering(name):
            try:
                answer = self.client.put_object(**self._object(name), Body=text.encode(), **condition)
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status in REFUSED and error.response["Error"]["Code"] != "NoSuchBucket":
                    return None
                if status == 501:
                    raise ConfigError(
                        "the object store does not know conditional writes (If-Match, If-None-Match)",
                        where=f"storage = {self.storage.root}",
                        remedy="Use a store that has them, as AWS does, or a shared folder",
                    ) from error
                raise
        return str(answer["ETag"])

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}".lstrip("/")}

    @contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        """Reports what the store or the way to it does wrong as a retryable `ClusterError`."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise ClusterError(
                f"the object store returned an error ({' '.join(str(error).split())})",
                where=self.storage.uri(name),
                remedy="Check that it is up, and the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)",
                retryable=True,
            ) from error
