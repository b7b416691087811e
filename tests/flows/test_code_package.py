"""What goes to a cluster with a job: the package, if it holds only code, and a checkout without what is not code."""

import shutil
import zipfile
from pathlib import Path

import pytest

from flows.code_package import MOST_BYTES, PACKAGE, checked_package
from rcnn.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_package_is_small_enough() -> None:
    assert checked_package(PACKAGE)["py_modules"] == [str(PACKAGE)]


def test_a_package_with_data_in_it_is_refused_with_its_largest_file(tmp_path: Path) -> None:
    package = tmp_path / "rcnn"
    (package / "data" / "__pycache__").mkdir(parents=True)
    (package / "cli.py").write_text("")
    with (package / "data" / "__pycache__" / "cli.pyc").open("wb") as file:
        file.truncate(2 * MOST_BYTES)
    assert checked_package(package)
    with (package / "data" / "images.bin").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"has 20 MB, .* largest file is data/images\.bin \(20 MB\)") as caught:
        checked_package(package)
    assert "ray.send_code" in str(caught.value)


def test_a_checkout_that_is_sent_by_hand_has_neither_data_nor_history_nor_tests(tmp_path: Path) -> None:
    """`ray job submit --working-dir .`, by Ray's own reading of the ignore files."""
    from ray._private.runtime_env.packaging import create_package

    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)
    files = ("rcnn/data/schema.py", "flows/jobs.py", "pyproject.toml", "README.md")
    heavy = (
        ".git/objects/a",
        ".venv/lib/torch.so",
        "storage/mlflow.db",
        "tests/data/a.py",
        "infra/a",
        "rcnn/__pycache__/a",
    )
    for name in (*files, *heavy):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    create_package(str(tmp_path), tmp_path.with_suffix(".zip"), include_gitignore=True)
    with zipfile.ZipFile(tmp_path.with_suffix(".zip")) as package:
        packed = {name for name in package.namelist() if not name.endswith("/")}
    assert packed == {*files, ".gitignore", ".rayignore"}
