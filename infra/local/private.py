"""Files that only their user can read, and the passwords of the production-like stack in one of them."""

import json
import os
import secrets
from pathlib import Path

from rcnn.errors import ClusterError

NAMES = ("prefect", "mlflow", "s3")
"""Two roles of PostgreSQL, and the only user of the S3 store."""


def write_private(file: Path, text: str) -> None:
    """Writes a file with mode 0600, whatever it was before."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
        stream.write(text)


def make_passwords(file: Path, *, known_to: Path) -> None:
    """Writes the passwords once; the database that was made with them keeps them.

    Args:
        file: for the passwords.
        known_to: the database.

    Raises:
        ClusterError: there is a database, but no passwords.
    """
    if file.exists():
        return
    if known_to.exists():
        raise ClusterError(
            "is missing, and the database knows no other passwords",
            where=str(file),
            remedy=f"Bring it back, or delete {known_to.parent} with its runs, models and data",
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_private(file, json.dumps({name: secrets.token_hex(32) for name in NAMES}))


def read_password(file: Path, name: str) -> str:
    """One of the passwords."""
    return str(json.loads(file.read_text())[name])
