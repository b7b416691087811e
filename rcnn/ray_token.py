"""Ray's token, readable by its owner alone.

Ray itself writes the file with the umask's permissions (seen in 2.60: 0644), and whoever reads the token can run code in every
Ray of this user. So it is made here, before Ray looks for it.
"""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path


def keep_token_private() -> None:
    """Makes the token file with mode 0600 if Ray would make it; takes the permissions of others from one that exists."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if file.exists():
        _close(file)
    elif "RAY_AUTH_TOKEN_PATH" not in os.environ:  # Ray makes none there
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(file)


def _make(file: Path) -> None:
    """Makes the file whole at once: another process may start Ray at the same time."""
    descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=file.name)  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        os.unlink(draft)


def _close(file: Path) -> None:
    with suppress(PermissionError):  # it is another user's: a token that a group shares
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
