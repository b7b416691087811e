"""Tests see nothing of the user's: what `conftest.py` promises."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest

from rcnn.storage import Storage

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]


def test_the_default_storage_is_an_empty_folder_of_the_tests_own(tmp_path: Path) -> None:
    assert Storage("storage").root == str(tmp_path / "storage")
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "rcnn.cli", "data", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "there are no data sets" in done.stdout


@pytest.mark.parametrize(
    "touch", [os.listdir, Path.mkdir, lambda path: (path / "x").read_bytes(), lambda path: path.rename("y")]
)
def test_the_users_storage_cannot_be_touched(touch: object) -> None:
    with pytest.raises(AssertionError, match="a test touches the user's storage"):
        touch(ROOT / "storage")  # type: ignore[operator]


def test_home_and_environment_are_not_the_users() -> None:
    assert "rcnn-tests-" in str(Path.home())
    theirs = ("RCNN_", "PREFECT_API", "PREFECT_PROFILE", "RAY_ADDRESS", "RAY_API")
    assert [name for name in os.environ if name.startswith(theirs)] == []
    # MLflow sets this one itself, in a process that called `set_tracking_uri`.
    assert Path(gettempdir()).as_posix() in os.environ.get("MLFLOW_TRACKING_URI", gettempdir()) or (
        "127.0.0.1" in os.environ["MLFLOW_TRACKING_URI"]
    )
