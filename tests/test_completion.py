"""Completion in a real bash, at a terminal; and scripts for the other shells."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcnn.cli import main
from rcnn.completion import SHELLS
from rcnn.recipes import RECIPES
from rcnn.settings import setting_names

pytestmark = pytest.mark.long

SECONDS_TO_ANSWER = 30  # far above what it takes; a failure waits that long


def script_for(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


class Terminal:
    """An interactive bash."""

    def __init__(self) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"PS1": "ready> ", "TERM": "dumb"}
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self.seen = ""

    def type(self, keys: str, expected: str) -> None:
        """Types, and waits until the terminal shows what is expected."""
        self.seen = ""
        os.write(self.terminal, keys.encode())
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while expected not in self.seen:
            assert time.monotonic() < deadline, f"{keys!r} gave {self.seen!r}, not {expected!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 65536).decode(errors="replace")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    """One in which the script was sourced."""
    (tmp_path / "rcnn.bash").write_text(script_for("bash", capsys))
    terminal = Terminal()
    terminal.type(f"source {tmp_path}/rcnn.bash; echo sour''ced\n", "sourced\r\n")
    yield terminal
    terminal.close()


def test_a_real_bash_completes_commands_options_settings_recipes_and_files(bash: Terminal, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    bash.type("rcnn pipel\t", "rcnn pipeline ")
    bash.type("--reci\t", "--recipe ")
    bash.type("cifar100_m\t", "cifar100_maxout ")
    bash.type("\x15rcnn train --set model.ne\tnin", "model.network=nin")  # no space between
    bash.type(" --set tune.ena\t", "tune.enabled=")
    bash.type("\x15rcnn train --config min\t", "mine.toml ")
    bash.type("\x15rcnn data ver\t", "rcnn data verify ")
    bash.type("\x15rcnn config --diff mnist_ni\t", "mnist_nin ")
    bash.type("min\t", "mine.toml ")


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_every_recipe_and_setting(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = set(script_for(shell, capsys).replace('"', " ").split())
    assert set(RECIPES) <= words
    assert set(setting_names()) <= words


def test_an_unknown_shell_is_refused() -> None:
    call = [sys.executable, "-m", "rcnn.cli", "completion", "ksh"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'ksh' (choose from" in done.stderr
