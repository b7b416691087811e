"""Writes the passwords of the stack to `.env` beside this file, which Compose reads and git ignores.

Runs with any Python 3, without the environment of the project: a machine that runs the containers needs nothing else.
"""

import os
import secrets
import sys
from pathlib import Path

FILE = Path(__file__).with_name(".env")
# Their names are no other program's: Compose prefers a variable of the shell to this file, and a shell may well have AWS keys.
NAMES = (
    "STACK_POSTGRES_PASSWORD",
    "STACK_PREFECT_DB_PASSWORD",
    "STACK_MLFLOW_DB_PASSWORD",
    "STACK_S3_SECRET",
    "STACK_PREFECT_PASSWORD",
    "STACK_MLFLOW_PASSWORD",
    "STACK_MLFLOW_SESSION_KEY",
    "STACK_RAY_TOKEN",
)


def main() -> int:
    """Writes the file, mode 0600; an existing one is kept, since the databases know its passwords."""
    try:
        descriptor = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(f"{FILE} exists; delete it together with the volumes (docker compose down --volumes)", file=sys.stderr)
        return 2
    with os.fdopen(descriptor, "w") as stream:
        stream.writelines(f"{name}={secrets.token_hex(32)}\n" for name in NAMES)
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
