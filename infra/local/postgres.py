"""PostgreSQL for the production-like stack: a cluster of its own, with one database for Prefect and one for MLflow.

In: a folder, a port, a password for each database. Out: the cluster, and the command of its server. Each database has a role of
the same name, to which it belongs, and the other role cannot connect to it. The server listens on loopback and asks for
passwords; the superuser has none, so no client can connect as it.
"""

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from rcnn.errors import ClusterError, ConfigError

DATABASES = ("prefect", "mlflow")
USER = "postgres"
"""Whom the server runs as where we are root, which it refuses."""
SECONDS_TO_CONNECT = 5
DEBIAN = Path("/usr/lib/postgresql")
"""Where Debian puts the server, in a folder for each version, outside PATH."""


def require_postgres() -> None:
    """Checks that the server can be started, before anything is made.

    Raises:
        ClusterError: there is no server, or no user for it.
        ConfigError: its client for Python is missing.
    """
    program("postgres"), program("initdb")
    if importlib.util.find_spec("psycopg") is None:
        raise ConfigError(
            "psycopg is not installed",
            where="the extra `servers`",
            remedy="Run `make up-prod`, which installs it, or `pip install 'rcnn[servers]'`",
        )
    if _is_root():
        try:
            pwd.getpwnam(USER)
        except KeyError as error:
            raise ClusterError(
                f"PostgreSQL does not run as root, and there is no user {USER!r}",
                where="/etc/passwd",
                remedy=f"Run `useradd --system {USER}`, or start the stack as another user",
            ) from error
        program("setpriv")


def program(name: str) -> str:
    """The path of a program: from PATH, or the newest of those that Debian has.

    Raises:
        ClusterError: there is none.
    """
    found = sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda path: [int(word) for word in re.findall(r"\d+", str(path))])
    path = shutil.which(name) or (str(found[-1]) if found else "")
    if not path:
        package = "util-linux" if name == "setpriv" else "postgresql"
        raise ClusterError(
            f"the program `{name}` is not found",
            where=f"PATH, {DEBIAN}",
            remedy=f"Install it, on Debian and Ubuntu by `apt-get install {package}`",
        )
    return path


def _is_root() -> bool:
    return os.geteuid() == 0


def _as_user() -> list[str]:
    return [program("setpriv"), f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if _is_root() else []


def server_command(folder: Path, port: int) -> list[str]:
    """The command of the server."""
    listening = ["-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories="]
    return [*_as_user(), program("postgres"), "-D", str(folder), *listening]


def create_cluster(folder: Path, passwords: Mapping[str, str]) -> None:
    """Creates the cluster unless it exists; it gets its name when it is whole.

    Raises:
        ClusterError: the server's user cannot enter the folder, or a program of PostgreSQL fails.
    """
    if folder.exists():
        return
    draft = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700, parents=True)
    if _is_root():
        shutil.chown(draft, USER, pwd.getpwnam(USER).pw_gid)
    _require_entry(draft)
    # No server ever runs with `trust`: the rules are replaced below. --pwfile wants a file that the server reads.
    options = ["--auth=trust", f"--username={USER}", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    _run([*_as_user(), program("initdb"), *options, str(draft)])
    (draft / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    # Of single-user mode neither a command line nor a log shows the statements.
    quiet = ["-c", "log_min_error_statement=panic", "-c", "password_encryption=scram-sha-256"]
    _run([*_as_user(), program("postgres"), "--single", *quiet, "-D", str(draft), "postgres"], _statements(passwords))
    draft.rename(folder)


def _statements(passwords: Mapping[str, str]) -> str:
    """One to a line, as single-user mode reads them."""
    return "".join(
        f"CREATE ROLE {name} LOGIN PASSWORD '{passwords[name]}'\n"
        f"CREATE DATABASE {name} OWNER {name}\n"
        f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC\n"
        for name in DATABASES
    )


def _require_entry(folder: Path) -> None:
    if subprocess.run([*_as_user(), "test", "-w", str(folder)], check=False).returncode:
        raise ClusterError(
            f"user {USER!r}, as whom PostgreSQL runs where we are root, cannot enter it",
            where=str(folder),
            remedy="Set STACK_STATE to a folder below folders that all users may enter, or start the stack as another user",
        )


def _run(command: list[str], given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd="/")
    # Single-user mode exits with 0 whatever its statements did.
    if done.returncode or re.search(r"\b(ERROR|FATAL|PANIC):", done.stderr):
        program_name = next(word for word in command if Path(word).name in ("initdb", "postgres"))
        raise ClusterError(
            f"`{Path(program_name).name}` failed ({' '.join(done.stderr.split())[-300:]})",
            where=command[-1],
            remedy="Correct what it names, and run `make up-prod` again",
        )


def connection_fault(port: int, passwords: Mapping[str, str]) -> str:
    """Why one of the roles cannot use its database; empty: all can."""
    import psycopg  # late: the local stack needs none

    for name in DATABASES:
        try:
            psycopg.connect(
                host="127.0.0.1",
                port=port,
                dbname=name,
                user=name,
                password=passwords[name],
                sslmode="disable",
                connect_timeout=SECONDS_TO_CONNECT,
            ).close()
        except psycopg.OperationalError:
            return f"does not let role {name} use its database"
    return ""
