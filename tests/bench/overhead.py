"""Where the seconds of the commands go, training aside: a first pipeline, a rerun with nothing to do, and `rcnn predict`.

    python -m tests.bench.overhead --json overhead.json

The first pipeline (`debug_tiny`, whose steps take a second) starts from an empty storage and an empty Prefect, and is timed
once, line by line. The others are whole processes, and their two sides take turns: a rerun as the command does it, against
one that goes through a Prefect flow; `predict` with what it remembers of the registry, against asking MLflow.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rcnn.recipes import debug_tiny
from rcnn.registry.answers import ANSWERS
from rcnn.stages import STAGES
from tests.bench.common import arguments, print_table, write_json

RCNN = [sys.executable, "-m", "rcnn.cli"]
THROUGH_PREFECT = """
import os, sys
os.environ |= {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180"}
from flows.full_pipeline import full_pipeline
from rcnn.config import PipelineConfig
full_pipeline(PipelineConfig.model_validate_json(sys.argv[1]))
"""


def main() -> None:
    """Runs everything and prints it."""
    options = arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as folder, _environment(Path(folder)):
        phases = time_first_pipeline()
        print_table("a first `rcnn pipeline --recipe debug_tiny`", [_phase_row(phase) for phase in phases])
        config = debug_tiny().with_settings({"storage": os.environ["RCNN_STORAGE"]}).rooted()
        samples = [str(file) for file in sorted(Path(config.storage).glob("reports/*/samples/*.png"))]
        forget = Path(config.storage, ANSWERS).unlink
        commands = {
            "rerun": [*RCNN, "pipeline", "--recipe", "debug_tiny"],
            "rerun through Prefect": [sys.executable, "-c", THROUGH_PREFECT, config.model_dump_json()],
            "predict": [*RCNN, "predict", *samples],
            "predict, asking MLflow": [*RCNN, "predict", *samples],
        }
        before = {"predict, asking MLflow": lambda: forget(missing_ok=True)}
        timed = take_turns(commands, before, rounds=options.rounds)
    print_table(f"whole processes, {options.rounds} rounds, minimum and median", [_side_row(side) for side in timed])
    write_json(options.json, [*phases, *timed])


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """A storage and a Prefect of their own, both empty, and no server."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("RCNN_", "PREFECT_"))]:
        del os.environ[name]
    os.environ |= {"RCNN_STORAGE": str(folder / "storage"), "PREFECT_HOME": str(folder / "prefect")}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def time_first_pipeline() -> list[dict[str, Any]]:
    """Seconds of each phase: until the first stage, each stage, and what follows the last one."""
    started = time.perf_counter()
    marks = [("start", started)]
    command = [*RCNN, "pipeline", "--recipe", "debug_tiny"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(f"{time.perf_counter() - started:6.1f}  {line}", end="", flush=True)
            name = line.partition(": ")[0]
            if name in STAGES and name not in dict(marks):
                marks.append((name, time.perf_counter()))
            elif name == list(STAGES)[-1] and "done in" in line:
                marks.append(("exit", time.perf_counter()))
    if process.returncode:
        sys.exit(process.returncode)
    ends = [moment for _, moment in marks[1:]] + [time.perf_counter()]
    phases = [
        {"command": "first pipeline", "phase": name, "seconds": end - begun}
        for (name, begun), end in zip(marks, ends, strict=True)
    ]
    return [*phases, {"command": "first pipeline", "phase": "all", "seconds": ends[-1] - started}]


def take_turns(
    commands: Mapping[str, list[str]], before: Mapping[str, Callable[[], None]], *, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of each command, and of the processors for it, the processes that it ended included; one warm-up round."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(1 + rounds):
        for name, command in commands.items():
            before.get(name, lambda: None)()
            run = _timed(command)
            if number:
                runs[name].append(run)
    return [
        {"command": name}
        | {f"{kind}_seconds": _spread([run[index] for run in runs[name]]) for index, kind in enumerate(("wall", "cpu"))}
        for name in commands
    ]


def _timed(command: list[str]) -> tuple[float, float]:
    started, cpu_before = time.perf_counter(), _cpu_seconds()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started, _cpu_seconds() - cpu_before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def _phase_row(phase: Mapping[str, Any]) -> dict[str, str]:
    return {"phase": phase["phase"], "seconds": f"{phase['seconds']:.1f}"}


def _side_row(side: Mapping[str, Any]) -> dict[str, str]:
    shown = {kind: side[f"{kind}_seconds"] for kind in ("wall", "cpu")}
    return {"command": side["command"]} | {
        f"{kind} s": f"{spread['min']:.1f}, {spread['median']:.1f}" for kind, spread in shown.items()
    }


if __name__ == "__main__":
    main()
