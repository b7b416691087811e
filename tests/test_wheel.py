"""The wheel: it works outside the checkout, and reads no file of it.

It is unpacked into a folder that stands first on the path, and a hook in each of its processes, Ray's workers too, refuses to
open files of the checkout.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
HOOK = f"""
import os, sys

def refuse(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        # The packages' environment may be in the checkout; .pyc files are of no interest.
        if path.startswith({str(ROOT)!r} + "/") and not path.startswith({str(ROOT / ".venv")!r} + "/"):
            os.write(2, f"opened a file of the checkout: {{path}}\\n".encode())
            os._exit(99)

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "sitecustomize.py").write_text(HOOK)
    return folder


def run(installed: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "rcnn", "flows"], cwd=ROOT, capture_output=True, text=True, check=True)
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == set(listed.stdout.split())


def test_the_hook_sees_what_it_must(installed: Path) -> None:
    done = run(installed, "-c", f"open({str(ROOT / 'README.md')!r})")
    assert done.returncode == 99
    assert "opened a file of the checkout" in done.stderr


@pytest.mark.parametrize("command", [["recipes"], ["config", "--recipe", "demo"], ["sources"], ["reproduce"]])
def test_commands_work_outside_the_checkout(installed: Path, command: list[str]) -> None:
    where = run(installed, "-c", "import rcnn; print(rcnn.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    done = run(installed, "-m", "rcnn.cli", *command)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_pipeline_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "-m", "rcnn.cli", "pipeline", "--recipe", "debug_tiny")
    assert done.returncode == 0, done.stderr
    assert "opened a file" not in done.stderr
    assert (tmp_path / "storage" / "reports").exists()


def test_the_commit_of_a_checkout_around_the_installed_package_is_not_ours(installed: Path) -> None:
    git = ["git", "-C", str(installed), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    done = run(installed, "-c", "from rcnn.registry.runs import git_commit; print(repr(git_commit()))")
    assert done.stdout == "''\n", done.stderr
