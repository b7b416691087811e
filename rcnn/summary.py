"""What `rcnn pipeline` prints at its end: metrics, files, and what to try next."""

import io
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.stages import results_from_json
from rcnn.storage import Storage
from rcnn.text import printable
from rcnn.tracking import UI_ADDRESS, runs_page, tracking_uri

WIDTH = 120


def print_summary(config: PipelineConfig, trees: Mapping[str, Any]) -> None:
    """Prints a short table of the stages' results, and three commands."""
    from rich.console import Console

    results, storage = results_from_json(trees), Storage(config.storage)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(_table(config, results))
    print("\nNext:")
    for command in _next_commands(config, results, storage):
        print(f"  {command}")


def summary_lines(config: PipelineConfig, trees: Mapping[str, Any]) -> list[str]:
    """The same table for a log, without lines, since a browser's font may have none of their width."""
    from rich.console import Console

    text, table = io.StringIO(), _table(config, results_from_json(trees))
    table.box = None
    Console(width=WIDTH, file=text).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _table(config: PipelineConfig, results: Mapping[str, Any]) -> Any:
    from rich.table import Table

    storage = Storage(config.storage)
    table = Table(show_header=False, title=f"rcnn: {config.recipe}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for result in results.values():
        for label, value in result.highlights(lambda name: _short(storage.uri(name))).items():
            table.add_row(label, printable(value))
    return table


def _next_commands(config: PipelineConfig, results: dict[str, Any], storage: Storage) -> list[str]:
    """Three commands, as they can be pasted into the shell that ran this one."""
    on_path = shutil.which("rcnn") is not None
    bin_folder = "" if on_path else f"{shlex.quote(_short(str(Path(sys.executable).parent)))}/"
    samples = shlex.quote(_short(storage.uri(f"{results['evaluate'].folder}/samples")))
    uri = tracking_uri(config)
    experiment, is_served = results["register"].experiment_id, uri.startswith("http")
    page = runs_page(uri if is_served else UI_ADDRESS, experiment) if experiment else uri
    serve = f"{bin_folder}mlflow ui --backend-store-uri {shlex.quote(uri)}"
    browse = f"open {shlex.quote(page)}   # compare" if is_served else f"{serve}   # then open {page} and compare"
    return [
        f"{browse} the runs in a browser",
        f"{bin_folder}rcnn predict {_model_options(config, results)} {samples}/*.png   # ask the champion",
        f"{bin_folder}rcnn recipes   # larger runs; then: rcnn pipeline --recipe NAME",
    ]


def _model_options(config: PipelineConfig, results: dict[str, Any]) -> str:
    """Options that lead to the model that was registered, and not to one of another storage or data set."""
    settings = {
        "storage": (config.storage, os.environ.get("RCNN_STORAGE", "storage")),
        "tracking.uri": (config.tracking.uri, os.environ.get("RCNN_TRACKING__URI", "")),
    }
    places = [f"--set {name}={shlex.quote(value)}" for name, (value, usual) in settings.items() if value != usual]
    return " ".join(["--model", shlex.quote(results["register"].model_name), *places])


def _short(path: str) -> str:
    """A path below the working directory without that directory in front."""
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
