"""Two models: what differs in how they were made, then their figures, and a paired test on the same test rows."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rcnn.compare.models import Model, modules_that_differ
from rcnn.errors import ConfigError, DataError
from rcnn.evaluate.paired import Paired
from rcnn.evaluate.predictions import PREDICTIONS, compare
from rcnn.section import as_typed
from rcnn.storage import Storage

NUM_NAMED = 4  # modules
SHORTEST_PREFIX = 6  # characters of a name, key or run id


def find_models(wanted: Sequence[str], models: Sequence[Model]) -> list[Model]:
    """The models of these names, in this order.

    Args:
        wanted: names of folders (`train-4502709c7e72`, with or without `runs/`), MLflow run ids, SHA-256 of weights, or the
            beginning of one of these.
        models: those that there are.

    Raises:
        ConfigError: a name fits none, or several.
    """
    return [_find(name, models) for name in wanted]


def _find(name: str, models: Sequence[Model]) -> Model:
    text = name.rstrip("/").rpartition("/")[2]
    found = [model for model in models if text in _names_of(model)]
    if not found and len(text) >= SHORTEST_PREFIX:
        found = [model for model in models if any(each.startswith(text) for each in _names_of(model))]
    if len(found) == 1:
        return found[0]
    fault = "fits no trained model" if not found else f"fits {len(found)}: {', '.join(each.name for each in found[:3])}"
    raise ConfigError(fault, where=f"compare {name}", remedy="`rcnn compare` lists them")


def _names_of(model: Model) -> tuple[str, ...]:
    names = (
        model.name,
        model.name.rpartition("-")[2],
        str(model.trained.get("mlflow_run_id", "")),
        model.weights_sha256,
    )
    return tuple(name for name in names if name)


def differences(ours: Model, theirs: Model) -> list[dict[str, str]]:
    """Settings, data, code and environment that differ."""
    return [
        {"what": what, ours.name: our, theirs.name: their}
        for what, our, their in (*_settings(ours, theirs), *_origins(ours, theirs))
        if our != their
    ]


def _settings(ours: Model, theirs: Model) -> Iterator[tuple[str, str, str]]:
    for name in sorted(ours.settings.keys() | theirs.settings.keys()):
        our, their = (model.settings.get(name, "-") for model in (ours, theirs))
        yield name, as_typed(our), as_typed(their)


def _origins(ours: Model, theirs: Model) -> Iterator[tuple[str, str, str]]:
    our_data, their_data = (f"{model.data_set} {model.data_digest[:12]}".strip() for model in (ours, theirs))
    yield "data set", our_data, their_data
    for name in sorted(ours.environment.keys() | theirs.environment.keys()):
        yield name, ours.environment.get(name, "unknown"), theirs.environment.get(name, "unknown")
    if modules := list(modules_that_differ(ours, theirs)):
        more = f" and {len(modules) - NUM_NAMED} more" if len(modules) > NUM_NAMED else ""
        yield "code", "", ", ".join(modules[:NUM_NAMED]) + more


def figures(ours: Model, theirs: Model) -> list[dict[str, str]]:
    """All figures of both, side by side."""
    rows = []
    for label, read in FIGURES.items():
        our, their = (read(model) for model in (ours, theirs))
        if our or their:
            rows.append({"figure": label, ours.name: our or "-", theirs.name: their or "-"})
    return rows


def _metric(name: str, pattern: str, factor: float = 100.0) -> Callable[[Model], str]:
    """Reads a metric of the evaluation; nothing where it is not there."""

    def read(model: Model) -> str:
        value = model.evaluation.get("metrics", {}).get(name)
        return "" if value is None else pattern.format(factor * value)

    return read


FIGURES: dict[str, Callable[[Model], str]] = {
    "network": lambda model: model.title,
    "test error": _metric("error", "{:.2f} %"),
    "top-5 error": _metric("top_5_error", "{:.2f} %"),
    "test loss": _metric("loss", "{:.4f}", 1.0),
    "calibration error": _metric("calibration_error", "{:.2f} %"),
    "Brier score": _metric("brier_score", "{:.4f}", 1.0),
    "validation error": lambda model: f"{100 * model.trained['val_error']:.2f} %",
    "parameters": lambda model: f"{model.trained['num_parameters']:,}",
    "training": lambda model: f"{model.trained['seconds']:,.0f} s",
    "speed": lambda model: f"{model.trained['images_per_second']:,.0f} images/s",
    "weights": lambda model: model.weights_sha256[:16],
}


def paired_test(storage: Storage, ours: Model, theirs: Model) -> Paired:
    """Compares both models' answers on the same test rows. This does not count as a look of the gate: it promotes nothing.

    Raises:
        DataError: a model was not evaluated, or the two on other rows.
    """
    shared = [digest for digest in ours.evaluations if digest in theirs.evaluations]
    if not shared:
        lacking = [model.name for model in (ours, theirs) if not model.evaluations]
        what = f"{lacking[0]} was not evaluated" if lacking else "they were evaluated on different test rows"
        raise DataError(
            what, where=f"{ours.name}, {theirs.name}", remedy="Run `rcnn evaluate` with one data set for both"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [_fetched(storage, model, shared[0], Path(folder)) for model in (ours, theirs)]
        return compare(*files)


def _fetched(storage: Storage, model: Model, test_digest: str, folder: Path) -> Path:
    place = f"{model.evaluations[test_digest]['folder']}/{PREDICTIONS}"
    file = folder / f"{model.name}.parquet"
    with (
        storage.reading(place),
        storage.filesystem.open_input_stream(storage.path(place)) as stream,
        file.open("wb") as to,
    ):
        shutil.copyfileobj(stream, to)
    return file


def in_words(paired: Paired, ours: Model, theirs: Model) -> str:
    """What the test says of the two."""
    turned = replace(paired, only_first=paired.only_second, only_second=paired.only_first)
    better, worse, test = (ours, theirs, paired) if paired.gain >= 0 else (theirs, ours, turned)
    if paired.only_first == paired.only_second:
        return f"both have as many errors on the {paired.num_rows:,} test rows"
    return (
        f"{better.name} has {100 * test.gain:.2f} points fewer errors: on {paired.num_rows:,} test rows, {test.only_first:,} "
        f"are right only there, and {test.only_second:,} only with {worse.name}; p = {test.p_value:.3g} (exact McNemar, "
        "one-sided)"
    )
