"""Ray's token file: 0600 from the start, and the token that Ray uses."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rcnn.ray_token import keep_token_private


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def token_file(home: Path) -> Path:
    return home / ".ray" / "auth_token"


def test_the_token_is_for_its_owner_alone_whatever_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        keep_token_private()
    finally:
        os.umask(before)
    assert stat.S_IMODE(token_file(home).stat().st_mode) == 0o600
    assert stat.S_IMODE(token_file(home).parent.stat().st_mode) == 0o700
    assert len(token_file(home).read_text()) == 64
    assert list(token_file(home).parent.iterdir()) == [token_file(home)]


def test_a_token_that_exists_is_kept_and_closed(home: Path) -> None:
    token_file(home).parent.mkdir()
    token_file(home).write_text("mine")
    token_file(home).chmod(0o644)
    keep_token_private()
    assert token_file(home).read_text() == "mine"
    assert stat.S_IMODE(token_file(home).stat().st_mode) == 0o600


def test_processes_that_start_together_have_one_token(home: Path) -> None:
    def start(_: int) -> str:
        keep_token_private()
        return token_file(home).read_text()

    with ThreadPoolExecutor(16) as pool:
        tokens = set(pool.map(start, range(64)))
    assert len(tokens) == 1
    assert len(tokens.pop()) == 64


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/nowhere")]
)
def test_nothing_is_made_that_ray_would_not_make(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert list(home.iterdir()) == []


@pytest.mark.long
def test_ray_uses_this_token(home: Path) -> None:
    keep_token_private()
    show = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token"]
    done = subprocess.run(show, capture_output=True, text=True, check=True)
    assert token_file(home).read_text() in done.stdout
