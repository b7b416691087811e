"""A stack of `make up` or `make up-prod` in a folder of its own, as tests start, ask and stop it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


class LocalStack:
    """A stack in a folder of its own."""

    def __init__(self, folder: Path):
        self.storage, self.state = folder / "storage", folder / "stack"
        self._env = {"RCNN_STORAGE": str(self.storage), "STACK_STATE": str(self.state)}

    def call(self, command: str, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "infra.local.stack", command], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | self._env | env,
            capture_output=True, text=True, check=False, timeout=1200,
        )  # fmt: skip

    def in_shell(self, command: str) -> "subprocess.CompletedProcess[str]":
        call = ["bash", "-c", f". {self.state}/env.sh && {command}"]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)

    def status(self) -> dict[str, str]:
        """The lines of `make status` by part."""
        return {line.split()[0]: line for line in self.call("status").stdout.splitlines() if line.strip()}

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes of a part, but no children that changed their environment."""
        mark = json.loads((self.state / "state.json").read_text())["mark"]
        return [each for each in psutil.process_iter() if _has(each, mark, part)]

    def ask(self, path: str, **data: Any) -> Any:
        """Prefect's answer."""
        port = json.loads((self.state / "state.json").read_text())["ports"]["PREFECT_PORT"]
        send = httpx.post if data else httpx.get
        return send(f"http://127.0.0.1:{port}/api/{path}", timeout=60, **({"json": data} if data else {})).json()

    def start_flow(self, name: str, **parameters: Any) -> str:
        deployment = self.ask(f"deployments/name/rcnn/{name}")["id"]
        run = self.ask(f"deployments/{deployment}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"})
        return str(run["id"])

    def state_of(self, flow_run: str) -> str:
        return str(self.ask(f"flow_runs/{flow_run}")["state_name"])

    def log_of(self, flow_run: str) -> str:
        """What the page of a flow run shows."""
        logs = {"flow_run_id": {"any_": [flow_run]}}
        lines: list[str] = []
        while len(lines) % 200 == 0:
            found = self.ask("logs/filter", logs=logs, sort="TIMESTAMP_ASC", limit=200, offset=len(lines))
            lines += [line["message"] for line in found]
            if not found:
                break
        return "\n".join(lines)

    def wait_for_line(self, flow_run: str, pattern: str, seconds: float = 60) -> str:
        """Waits for a line of a flow's log, which Prefect has some seconds after it was said; returns the log."""
        wait_until(lambda: re.search(pattern, self.log_of(flow_run)) is not None, seconds)
        return self.log_of(flow_run)

    def runs(self) -> dict[str, str]:
        """The state of the latest MLflow run of each kind, the first word of its name, as the database has it."""
        import sqlite3

        database = sqlite3.connect(f"file:{self.storage}/mlflow.db?mode=ro", uri=True)
        found = database.execute("select name, status from runs order by start_time")
        return {name.partition(" ")[0]: status for name, status in found}

    def tags(self, run: str) -> dict[str, str]:
        """The tags of the MLflow run of that kind; there is one."""
        import sqlite3

        database = sqlite3.connect(f"file:{self.storage}/mlflow.db?mode=ro", uri=True)
        found = "select key, value from tags join runs using (run_uuid) where name like ?"
        return dict(database.execute(found, (f"{run} %",)))


def _has(process: psutil.Process, mark: str, part: str) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return environment.get("STACK_MARK") == mark and environment.get("STACK_PART") == part
