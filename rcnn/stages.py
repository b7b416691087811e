"""The pipeline as a table: which stages there are, what each depends on, and how one is run.

The one place that knows all stages, so that the command line, the Prefect flow and a Ray job run the same thing. A stage's
folder is named by a key: the hash of its settings, of what it reads, and of the code that makes it. A stage whose folder
holds a result is done, and a second run says so. Importing this file loads none of the stages.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rcnn.config import IMAGE_FILE_SOURCES, PipelineConfig
from rcnn.errors import ConfigError
from rcnn.progress import say
from rcnn.results import (
    EvaluateResult,
    IngestResult,
    RegisterResult,
    StageResult,
    TrainResult,
    TuneResult,
)
from rcnn.storage import RESULT, StageFolder, Storage
from rcnn.tracking import NoTracker, Tracker, finish_failed, knows_version

Results = dict[str, Any]
"""The results so far, by stage."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        result: the type of what it hands on.
        run: does the work; imports what it needs when it is called.
        sections: the parts of the config that its result depends on.
        code: the packages that make the result; imports only point left, so a stage needs what stands before it.
        folder: where its folders lie.
        whole: a file that is there when the stage is done, besides its result.
        is_heavy: whether it goes to the cluster as a Ray job, where there is one.
    """

    result: type[StageResult]
    run: Callable[[PipelineConfig, Results, StageFolder, Tracker], StageResult]
    sections: tuple[str, ...]
    code: tuple[str, ...]
    folder: str
    whole: str
    is_heavy: Callable[[PipelineConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Parent:
    """What a stage's MLflow run hangs under, and the tags that it gets."""

    run_id: str = ""
    tags: tuple[tuple[str, str], ...] = ()


def _ingest(config: PipelineConfig, results: Results, target: StageFolder, tracker: Tracker) -> StageResult:
    from rcnn.data.ingest import run_ingest

    return run_ingest(config, target, tracker)


def _tune(config: PipelineConfig, results: Results, target: StageFolder, tracker: Tracker) -> StageResult:
    from rcnn.tune.ray_tuner import run_tune

    return run_tune(config, results["ingest"], target, tracker)


def _train(config: PipelineConfig, results: Results, target: StageFolder, tracker: Tracker) -> StageResult:
    from rcnn.train.ray_trainer import run_train

    return run_train(config, results["ingest"], target, tracker)


def _evaluate(config: PipelineConfig, results: Results, target: StageFolder, tracker: Tracker) -> StageResult:
    from rcnn.evaluate.report import run_evaluate

    return run_evaluate(config, results["ingest"], results["train"], target, tracker)


def _register(config: PipelineConfig, results: Results, target: StageFolder, tracker: Tracker) -> StageResult:
    from rcnn.registry.register import run_register

    return run_register(config, results["train"], results["evaluate"], target)


def _decodes_images(config: PipelineConfig) -> bool:
    return config.data.source in IMAGE_FILE_SOURCES


_CORE = ("data", "model", "train")
_SOURCES = (".py", ".c")
STAGES: dict[str, Stage] = {
    "ingest": Stage(IngestResult, _ingest, ("data",), ("data",), "datasets", "_manifest.json", _decodes_images),
    "tune": Stage(TuneResult, _tune, ("model", "train", "tune"), (*_CORE, "tune"), "runs", ""),
    "train": Stage(TrainResult, _train, ("model", "train"), _CORE, "runs", "model/model.safetensors"),
    "evaluate": Stage(EvaluateResult, _evaluate, ("evaluate",), (*_CORE, "evaluate"), "reports", "report.md"),
    "register": Stage(
        RegisterResult, _register, (), (*_CORE, "evaluate", "registry"), "runs", "", lambda config: False
    ),
}


def planned(config: PipelineConfig, last: str = "register") -> list[str]:
    """The stages up to `last`, without the search where it is off."""
    names = list(STAGES)
    return [name for name in names[: names.index(last) + 1] if name != "tune" or config.tune.enabled or last == "tune"]


def effective_config(config: PipelineConfig, name: str, results: Results) -> PipelineConfig:
    """The config of a stage: behind the search, the best trial's settings are in it."""
    if "tune" in results and name not in ("ingest", "tune"):
        return results["tune"].best.applied_to(config)  # type: ignore[no-any-return]
    return config


def stage_folder(config: PipelineConfig, name: str, results: Results) -> StageFolder:
    """Where a stage keeps its result; the name holds its key, the first 12 hex digits of a SHA-256."""
    stage = STAGES[name]
    config = effective_config(config, name, results)
    seed = () if name == "ingest" else ("seed",)
    depends_on = {
        "config": config.hash(*stage.sections, *seed),
        "reads": _identity_of_inputs(config, name, results),
        "code": code_version(stage.code),
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    label = f"{config.data.dataset}-{key}" if name == "ingest" else f"{name}-{key}"
    return StageFolder(Storage(config.storage), f"{stage.folder}/{label}")


def finished(config: PipelineConfig, name: str, results: Results) -> StageResult | None:
    """The result of a stage that has been run, or None if it has not, or what it left is gone.

    Raises:
        DataError: it is a data set, and damaged: found here, not after Ray has started for the next stage.
    """
    stage, target = STAGES[name], stage_folder(config, name, results)
    try:
        tree = target.storage.read_json(target.path(RESULT))
        result = None if tree is None else stage.result.model_validate(tree)
    except ValueError:
        return None  # a damaged result is no result: the stage writes a new one
    if result is None or (stage.whole and not target.storage.exists(target.path(stage.whole))):
        return None
    if isinstance(result, IngestResult):
        _require_data(target.storage, result)
    if isinstance(result, RegisterResult) and not knows_version(config, result.model_name, result.version):
        return None  # somebody deleted or exchanged the registry
    return result


def run_stage(
    config: PipelineConfig, name: str, results: Results, *, fresh: bool = False, parent: Parent | None = None
) -> StageResult:
    """Runs one stage, or says that it has been run.

    Args:
        config: the whole config.
        name: a key of `STAGES`.
        results: the results of the stages before it.
        fresh: does the work again.
        parent: the MLflow run to hang under.

    Raises:
        RcnnError: whatever the stage meets; nothing half-done is taken for a result later.
    """
    target = replace(stage_folder(config, name, results), replaces=fresh)
    done = None if fresh else finished(config, name, results)
    if done is not None:
        say(nothing_to_do(name, target))
        return done
    if "ingest" in results:
        _require_data(target.storage, results["ingest"])
    target.storage.make_folder(STAGES[name].folder)  # a storage that cannot be written is told before any work
    if fresh and name != "ingest":  # ingest replaces the old data set when the new one is whole
        target.storage.delete(target.name)
    say(f"{name}: {_purpose(config, name, results)}")
    started = time.perf_counter()
    result = _run_tracked(effective_config(config, name, results), name, results, target, fresh, parent or Parent())
    target.storage.write_json(target.path(RESULT), result.model_dump(mode="json"))
    say(f"{name}: done in {time.perf_counter() - started:.0f} s")
    return result


def _require_data(storage: Storage, data: IngestResult) -> None:
    """Checks that the data set is the one that ingest wrote, before anything long starts."""
    from rcnn.data.manifest import require_whole

    require_whole(storage, data.folder, digest=data.digest)


def nothing_to_do(name: str, target: StageFolder) -> str:
    """Why a stage is skipped."""
    return f"{name}: nothing to do, {target.name} has the result for these settings, this data and this code"


def run_pipeline_until(config: PipelineConfig, last: str, *, fresh: bool = False) -> Results:
    """Runs the stages up to `last` in this process, one after another; `fresh` does the last one again."""
    results: Results = {}
    for name in planned(config, last):
        results[name] = run_stage(config, name, results, fresh=fresh and name == last)
    return results


def results_from_json(trees: Mapping[str, Any]) -> Results:
    """Results by stage, from what JSON made of them."""
    unknown = set(trees) - set(STAGES)
    if unknown:
        raise ConfigError(f"there is no stage {sorted(unknown)[0]!r}", where="--inputs", remedy=f"Use {list(STAGES)}")
    return {name: STAGES[name].result.model_validate(tree) for name, tree in trees.items()}


def pipeline_key(config: PipelineConfig) -> str:
    """Names the run above the stages: the hash of all settings and of all code."""
    return f"pipeline-{config.hash()}-{code_version((*_CORE, 'tune', 'evaluate', 'registry'))}"


@cache
def code_version(packages: tuple[str, ...]) -> str:
    """A hash over the sources of these packages and of what all of them share."""
    root = Path(__file__).parent
    shared = [root / f"{name}.py" for name in ("config", "results", "storage", "text")]
    rooms = [file for package in packages for file in sorted((root / package).rglob("*"))]
    files = shared + [file for file in rooms if file.suffix in _SOURCES]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _run_tracked(
    config: PipelineConfig, name: str, results: Results, target: StageFolder, fresh: bool, parent: Parent
) -> StageResult:
    from rcnn.registry.mlflow_store import open_run

    if name == "register":  # the model goes to its training run: it needs no run of its own
        return STAGES[name].run(config, results, target, NoTracker())
    tags = dict(parent.tags)
    if "ingest" in results:
        tags["rcnn.data_digest"] = results["ingest"].digest
    tracker = open_run(config, name, key=target.name, parent_run_id=parent.run_id, tags=tags, fresh=fresh)
    try:
        result = STAGES[name].run(config, results, target, tracker)
    except BaseException:
        finish_failed(tracker)
        raise
    tracker.finish()
    return result.model_copy(update={"mlflow_run_id": tracker.run_id})


def _identity_of_inputs(config: PipelineConfig, name: str, results: Results) -> list[str]:
    if name == "ingest":
        from rcnn.data.sources import fingerprint

        return [fingerprint(config.data)]
    if name in ("tune", "train"):
        return [results["ingest"].digest]
    if name == "evaluate":
        return [results["train"].weights_sha256, results["ingest"].test_digest]
    return [results["evaluate"].folder, config.tracking.uri, config.tracking.model_name]


def _purpose(config: PipelineConfig, name: str, results: Results) -> str:
    model = effective_config(config, name, results).model
    return {
        "ingest": f"reading {config.data.dataset} into Parquet",
        "tune": f"{config.tune.num_trials} trials of {config.tune.epochs} epochs at the most",
        "train": f"{model.title}, {config.train.epochs} epochs on {config.train.num_workers} worker(s)",
        "evaluate": "scoring every test row",
        "register": "logging the model to MLflow",
    }[name]
