"""THE TABLE of stages: a row says all of a stage. Below it, how any stage is named, run, and skipped when it is done.

The command line, the Prefect flow, a Ray job and the summary read the rows, so a new stage is one file (a function and
what it hands on) and one row. A stage's folder is named by its key (see `keys.py`); a stage whose folder holds a result is
done, and a second run says so. Importing this file loads none of the stages, and not the config either.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rcnn.errors import ClusterError, ConfigError, LeaseLost
from rcnn.keys import Code, code_of, differing, key_of
from rcnn.lease import held
from rcnn.model.networks import NETWORKS, unread_settings
from rcnn.progress import say
from rcnn.storage import MADE_OF, RESULT, StageFolder, Storage
from rcnn.text import counted

if TYPE_CHECKING:
    from rcnn.config import PipelineConfig
    from rcnn.results import StageResult
    from rcnn.tracking import Tracker

Results = dict[str, Any]
"""The results so far, by stage."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        help: what the stage does, for `rcnn --help`.
        run: `module:function`, called with the config, the results that `takes` names, the stage's folder and a tracker.
        result: `module:class` of what it hands on, a `StageResult`.
        takes: the earlier stages whose results it is given; None for one that the pipeline does not include.
        settings: sections and settings that its result depends on; those after a minus do not count.
        unread: those of them that have no effect in this config.
        identity: what its result depends on besides, as text: the digests of what it reads.
        purpose: what it is about to do, in a line.
        folder: where its folders lie.
        label: the beginning of its folder's name.
        whole: files that are there when the stage is done, besides its result.
        about: what its MLflow run is about, as a part of that run's name; the model, unless said otherwise.
        shows: further settings for its MLflow run, beside those that its result depends on.
        cost: `module:function` that predicts what it takes, or what is left of it (see `rcnn/plan/costs.py`); empty: nothing
            is known.
        progress: `module:function` that says how far an unfinished one has come, given config and folder; empty: unknown.
        check: `module:function` that says whether a result still stands, given config, result and folder; empty: it does.
        modules: where its code is found, besides `run`: modules that are imported by name at run time.
        has_run: whether it has an MLflow run of its own.
        on_cluster: whether it goes to the cluster as a Ray job, where there is one.
        on_ray: whether it runs on Ray's workers, on one machine too.
        replaces_whole: whether `--fresh` keeps the old result until the new one is complete; otherwise it is deleted first.
        is_planned: whether a pipeline with this config includes it.
        members: configs of the same stage whose results it joins, each found or made first; empty: it runs by itself.
        join: `module:function` in the place of `run` where there are members, called with their results before the folder.
        tidy: `module:function` to call with the folder when the result is stored: deletes what only unfinished work needs.
        at_end: `module:function` to call at the end of a pipeline, with the config and the result; empty: none.
    """

    help: str
    run: str
    result: str
    takes: tuple[str, ...]
    settings: tuple[str, ...]
    identity: Callable[[PipelineConfig, Results], list[str]]
    purpose: Callable[[PipelineConfig], str]
    folder: str
    label: Callable[[PipelineConfig], str]
    unread: Callable[[PipelineConfig], tuple[str, ...]] = lambda config: ()
    about: Callable[[PipelineConfig], str] = lambda config: config.model.short_title
    shows: tuple[str, ...] = ("recipe", "data", "model")
    whole: tuple[str, ...] = ()
    cost: str = ""
    progress: str = ""
    check: str = ""
    modules: Callable[[PipelineConfig], list[str]] = lambda config: []
    has_run: bool = True
    on_cluster: Callable[[PipelineConfig], bool] = lambda config: True
    on_ray: Callable[[PipelineConfig], bool] = lambda config: False
    replaces_whole: bool = False
    is_planned: Callable[[PipelineConfig], bool] = lambda config: True
    members: Callable[[PipelineConfig], list[PipelineConfig]] = lambda config: []
    join: str = ""
    tidy: str = ""
    at_end: str = ""


def _decodes_images(config: PipelineConfig) -> bool:
    from rcnn.config import IMAGE_FILE_SOURCES

    return config.data.source in IMAGE_FILE_SOURCES


def _fingerprint(config: PipelineConfig, results: Results) -> list[str]:
    from rcnn.data.sources import fingerprint

    return [fingerprint(config.data)]


def _data_digest(config: PipelineConfig, results: Results) -> list[str]:
    return [results["ingest"].digest]


def _source_module(config: PipelineConfig) -> list[str]:
    from rcnn.data.sources import SOURCES

    return [f"rcnn.data.sources.{SOURCES[config.data.source].module}"]


def _network_module(config: PipelineConfig) -> list[str]:
    return [NETWORKS[config.model.network].module]


def _of_other_networks(config: PipelineConfig) -> tuple[str, ...]:
    """Settings that the network does not read: a new one of another network changes no key."""
    if "model.network" in config.tune.space:
        return ()
    return tuple(f"model.{name}" for name in unread_settings(config.model.network, config.model.model_dump()))


def _unread_by_trials(config: PipelineConfig) -> tuple[str, ...]:
    return (*_of_other_networks(config), *(["train.num_rows"] if config.tune.num_rows else []))


def _training_in_words(config: PipelineConfig) -> str:
    if config.members:
        return f"{config.model.title}, seeds {config.seed} to {config.members[-1].seed}"
    epochs, workers = counted(config.train.epochs, "epoch"), counted(config.execution.num_workers, "worker")
    return f"{config.model.title}, {epochs} on {workers}"


STAGES: dict[str, Stage] = {
    "ingest": Stage(
        help="read the source into Parquet, with a manifest",
        run="rcnn.data.ingest:run_ingest",
        result="rcnn.results:IngestResult",
        takes=(),
        cost="rcnn.plan.costs:cost_of_ingest",
        settings=("data", "-data.mirror"),
        identity=_fingerprint,
        purpose=lambda config: f"reading {config.data.dataset} into Parquet",
        about=lambda config: config.data.dataset,
        shows=("recipe",),
        folder="datasets",
        label=lambda config: config.data.dataset,
        whole=("_manifest.json",),
        check="rcnn.data.manifest:is_as_ingested",
        modules=_source_module,
        on_cluster=_decodes_images,
        replaces_whole=True,
    ),
    "tune": Stage(
        help="search for better settings (after ingest)",
        run="rcnn.tune.ray_tuner:run_tune",
        result="rcnn.results:TuneResult",
        takes=("ingest",),
        cost="rcnn.plan.costs:cost_of_tune",
        progress="rcnn.plan.progress:progress_of_tune",
        settings=(
            "model", "train", "augment", "seed",
            "tune.space", "tune.search", "tune.early_stopping", "tune.epochs", "tune.grace_epochs",
            "tune.reduction_factor", "tune.num_rows", "-train.epochs", "-train.max_minutes", "-train.with_validation",
        ),
        unread=_unread_by_trials,
        identity=_data_digest,
        purpose=lambda config: (
            f"up to {counted(config.tune.num_trials, 'trial')} of up to {counted(config.tune.epochs, 'epoch')}"
        ),
        about=lambda config: config.data.dataset,
        shows=("recipe", "data", "tune", "execution"),
        folder="runs",
        label=lambda config: "tune",
        check="rcnn.tune.search:covers",  # raising tune.num_trials extends a finished search
        modules=_network_module,
        on_ray=lambda config: True,
        is_planned=lambda config: config.tune.enabled,
    ),
    "train": Stage(
        help="train a model (after ingest, and tune if it is on)",
        run="rcnn.train.ray_trainer:run_train",
        result="rcnn.results:TrainResult",
        takes=("ingest",),
        cost="rcnn.plan.costs:cost_of_train",
        progress="rcnn.plan.progress:progress_of_train",
        settings=("model", "train", "augment", "seed", "-train.max_minutes"),
        unread=_of_other_networks,
        identity=_data_digest,
        purpose=_training_in_words,
        shows=("recipe", "data", "execution"),
        folder="runs",
        label=lambda config: "train",
        modules=_network_module,
        whole=("model/model.safetensors",),
        members=lambda config: config.members,
        join="rcnn.train.ensemble:run_ensemble",
        check="rcnn.train.limit:allows_no_more",
        on_ray=lambda config: True,
    ),
    "evaluate": Stage(
        help="score a trained model on every test row (after train)",
        run="rcnn.evaluate.report:run_evaluate",
        result="rcnn.results:EvaluateResult",
        takes=("ingest", "train"),
        cost="rcnn.plan.costs:cost_of_evaluate",
        settings=("evaluate",),
        identity=lambda config, results: [results["train"].weights_sha256, results["ingest"].test_digest],
        purpose=lambda config: "scoring every test row",
        folder="reports",
        label=lambda config: "evaluate",
        modules=_network_module,
        whole=("predictions.parquet", "report.md"),
        tidy="rcnn.evaluate.predictions:delete_parts",
        on_ray=lambda config: config.execution.num_workers > 1,
    ),
    "audit": Stage(
        help="rank the rows whose labels look wrong (after evaluate)",
        run="rcnn.evaluate.audit:run_audit",
        result="rcnn.results:AuditResult",
        takes=("ingest", "train", "evaluate"),
        cost="rcnn.plan.costs:cost_of_audit",
        settings=("audit.train_rows", "evaluate"),
        identity=lambda config, results: [
            results["evaluate"].folder, results["train"].weights_sha256, results["ingest"].digest
        ],
        purpose=lambda config: "looking for wrong labels",
        folder="reports",
        label=lambda config: "audit",
        modules=_network_module,
        whole=("suspects.parquet",),
        tidy="rcnn.evaluate.audit:delete_predictions",
        on_ray=lambda config: config.execution.num_workers > 1,
        is_planned=lambda config: config.audit.enabled,
    ),
    "register": Stage(
        help="register a measured model in MLflow (after evaluate, and audit if it is on)",
        run="rcnn.registry.register:run_register",
        result="rcnn.results:RegisterResult",
        takes=("ingest", "train", "evaluate", "audit"),
        cost="rcnn.plan.costs:cost_of_register",
        settings=(),
        identity=lambda config, results: [
            results["evaluate"].folder, config.tracking.uri, config.tracking.model_name,
            *([results["audit"].folder] if "audit" in results else []),
        ],
        purpose=lambda config: "logging the model to MLflow",
        folder="runs",
        label=lambda config: "register",
        modules=_network_module,
        whole=("report.html",),
        check="rcnn.registry.known_versions:has_version",
        has_run=False,  # the model goes to its training run
        on_cluster=lambda config: False,
        at_end="rcnn.registry.register:remember_registered",
    ),
}  # fmt: skip


FORECAST = "rcnn.plan.forecast:forecast_seconds"
"""Predicts the time of a stage that is about to run."""


@dataclass(frozen=True)
class Parent:
    """What a stage's MLflow run hangs under (our own id of that run, see `registry/runs.py`), and the tags that it gets."""

    run_id: str = ""
    tags: tuple[tuple[str, str], ...] = ()


def planned(config: PipelineConfig, last: str = "") -> list[str]:
    """The stages of a pipeline, in order, up to `last` (which is always one of them), or all."""
    names = list(STAGES)
    reach = names[: names.index(last) + 1] if last else names
    return [name for name in reach if name == last or STAGES[name].is_planned(config)]


def runs_as_job(config: PipelineConfig, name: str) -> bool:
    """Whether a stage runs as a Ray job, on a cluster."""
    return STAGES[name].on_cluster(config) and config.ray.address.startswith("http")


def effective_config(config: PipelineConfig, name: str, results: Results) -> PipelineConfig:
    """The config of a stage: behind the search, the best trial's settings are in it."""
    for earlier in STAGES:
        if earlier == name:
            break
        if earlier in results:
            config = results[earlier].applied_to(config)
    return config


def stage_folder(config: PipelineConfig, name: str, results: Results) -> StageFolder:
    """Where a stage keeps its result; the name holds its key."""
    stage = STAGES[name]
    key = key_of(**made_of(config, name, results))
    config = effective_config(config, name, results)
    return StageFolder(Storage(config.storage), f"{stage.folder}/{stage.label(config)}-{key}")


def made_of(config: PipelineConfig, name: str, results: Results) -> dict[str, Any]:
    """All that a stage's result depends on, whose hash is its key: settings, inputs and code."""
    stage = STAGES[name]
    config = effective_config(config, name, results)
    return {
        "settings": config.values_of(*stage.settings, *(f"-{name}" for name in stage.unread(config))),
        "inputs": stage.identity(config, results),
        "code": stage_code(config, name),
    }


def stage_code(config: PipelineConfig, name: str) -> Code:
    """The digest of each module that makes a stage's result."""
    stage = STAGES[name]
    runs = [stage.run, *([stage.join] if stage.members(config) else [])]
    return code_of([*(path.partition(":")[0] for path in runs), *stage.modules(config)])


def require_same_code(config: PipelineConfig, name: str, theirs: Code) -> None:
    """Checks, in a Ray job, that the code is that of the driver, which looks for the result under its own key.

    Raises:
        ClusterError: it differs; the message names the modules.
    """
    modules = differing(stage_code(config, name), theirs)
    if modules:
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        raise ClusterError(
            f"the code of this node differs from the driver's in {', '.join(modules[:3])}{more}",
            where=f"ray.address = {config.ray.address}",
            remedy="Install the same version of rcnn on all nodes and where the pipeline is called, or let jobs bring the code "
            "along: --set ray.send_code=true",
        )


def finished(config: PipelineConfig, name: str, results: Results) -> StageResult | None:
    """The result of a stage that has been run, or None if it has not, or what it left is gone.

    Raises:
        DataError: it is a data set, and damaged: found here, not after Ray has started for the next stage.
    """
    stage, target = STAGES[name], stage_folder(config, name, results)
    try:
        tree = target.storage.read_json(target.path(RESULT))
        result: StageResult | None = None if tree is None else imported(stage.result).model_validate(tree)
    except ValueError:
        return None  # a damaged result is no result: the stage writes a new one
    if result is None or not all(target.storage.exists(target.path(file)) for file in stage.whole):
        return None
    return result if not stage.check or imported(stage.check)(config, result, target) else None


def finished_pipeline(config: PipelineConfig) -> Results | None:
    """The results of all planned stages, or None where there is something to do.

    Raises:
        DataError: the data set is damaged.
    """
    results = finished_until(config)
    return results if len(results) == len(planned(config)) else None


def prepare_stages(config: PipelineConfig, *, fresh: bool = False) -> None:
    """Starts early what the stages that are still to run would start one after another: imports, MLflow's store, Ray.

    Raises:
        ClusterError: Ray cannot be started, or the storage cannot be written.
    """
    done = {} if fresh else finished_until(config)
    names = planned(config)[len(done) :]
    here = [name for name in names if not runs_as_job(config, name)]
    if any(STAGES[name].on_ray(config) for name in here):
        from rcnn.ray_session import ensure_ray

        ensure_ray(config, Storage(config.storage))
    from rcnn.registry.mlflow_store import create_store

    create_store(config)
    for name in here:
        import_module(STAGES[name].run.partition(":")[0])


def finished_until(config: PipelineConfig, last: str = "") -> Results:
    """The results of the planned stages up to the first that has none, or to `last`.

    Raises:
        DataError: the data set is damaged.
    """
    results: Results = {}
    for name in planned(config, last):
        result = finished(config, name, results)
        if result is None:
            break
        results[name] = result
    return results


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
        ClusterError: with `fresh`, another process is working on the same result. Without, this one waits for it.
        RcnnError: whatever the stage raises. A partial result is never taken for a finished one.
    """
    parent = parent or Parent()
    asked_by = (parent.run_id or uuid.uuid4().hex) if fresh else ""
    target = replace(stage_folder(config, name, results), replaces=asked_by)
    done = None if fresh else finished(config, name, results)
    if done is not None:
        say(nothing_to_do(name, target))
        return done
    _check_inputs(config, name, results)
    target.storage.make_folder(STAGES[name].folder)  # a storage that cannot be written is reported before any work
    with held(target, waits=not fresh) as target:
        done = None if fresh else finished(config, name, results)  # by the process that was waited for
        if done is not None:
            say(nothing_to_do(name, target))
            return done
        return _run_alone(config, name, results, target, fresh, parent)


def _run_alone(
    config: PipelineConfig, name: str, results: Results, target: StageFolder, fresh: bool, parent: Parent
) -> StageResult:
    """Runs a stage whose lease is held, and stores its result."""
    if fresh and not STAGES[name].replaces_whole:
        target.storage.delete(target.name)
    config = effective_config(config, name, results)
    say(f"{name}: {STAGES[name].purpose(config)}")
    result = _run_tracked(config, name, results, target, fresh, parent)
    target.require_held()
    target.storage.write_json(target.path(MADE_OF), made_of(config, name, results) | _made_in(config, name))
    target.storage.write_json(target.path(RESULT), result.model_dump(mode="json"))
    if STAGES[name].tidy:
        imported(STAGES[name].tidy)(target)
    say(f"{name}: done in {result.duration}")
    return result


def _made_in(config: PipelineConfig, name: str) -> dict[str, Any]:
    """Commit, versions and processor, which are in no key: for people who compare two models."""
    if not STAGES[name].on_ray(config):
        return {}
    from rcnn.registry.runs import environment

    return {"environment": environment()}


def nothing_to_do(name: str, target: StageFolder) -> str:
    """Why a stage is skipped."""
    return f"{name}: nothing to do, {target.name} has the result for these settings, this data and this code"


def run_pipeline_until(config: PipelineConfig, last: str, *, fresh: bool = False) -> Results:
    """Runs the stages up to `last` in this process, one after another; `fresh` does the last one again."""
    results: Results = {}
    for name in planned(config, last):
        results[name] = run_stage(config, name, results, fresh=fresh and name == last)
    from rcnn.registry.outbox import send_waiting

    send_waiting(config)
    return results


def end_pipeline(config: PipelineConfig, results: Results) -> None:
    """Sends what waits for MLflow, then calls what the stages' rows want done when the run above them has ended too."""
    from rcnn.registry.outbox import send_waiting

    send_waiting(config)
    for name, result in results.items():
        if STAGES[name].at_end:
            imported(STAGES[name].at_end)(config, result)


def results_from_json(trees: Mapping[str, Any]) -> Results:
    """Results by stage, from what JSON made of them."""
    unknown = set(trees) - set(STAGES)
    if unknown:
        raise ConfigError(f"there is no stage {sorted(unknown)[0]!r}", where="results", remedy=f"Use {list(STAGES)}")
    return {name: imported(STAGES[name].result).model_validate(tree) for name, tree in trees.items()}


def pipeline_key(config: PipelineConfig) -> str:
    """Names the run above the stages: the hash of all settings and of all code."""
    code: Code = {}
    for name in planned(config):
        code |= stage_code(config, name)
    return f"pipeline-{key_of({}, [config.hash()], code)}"


def _check_inputs(config: PipelineConfig, name: str, results: Results) -> None:
    """Checks that what the stage reads still stands, before anything long starts; see `Stage.check`."""
    for taken in STAGES[name].takes:
        if STAGES[taken].check and STAGES[taken].is_planned(config):
            imported(STAGES[taken].check)(config, results[taken], stage_folder(config, taken, results))


def _run_tracked(
    config: PipelineConfig, name: str, results: Results, target: StageFolder, fresh: bool, parent: Parent
) -> StageResult:
    from rcnn.registry.runs import described, open_run
    from rcnn.registry.system_metrics import sampling
    from rcnn.tracking import NoTracker, finish_failed, with_pages

    stage = STAGES[name]
    if not stage.has_run:
        return _run_timed(config, name, results, target, NoTracker(), parent)
    tags = dict(parent.tags)
    for result in results.values():
        tags |= result.tags()
    title, about = f"{name} {stage.about(config)}", stage.purpose(config)
    tracker = open_run(
        config,
        title,
        key=target.name,
        parent=parent.run_id,
        tags=tags,
        settings=_shown_settings(config, name),
        text=with_pages(f"{about[:1].upper()}{about[1:]}.", tags),
        fresh=fresh,
    )
    try:
        with sampling(tracker, is_one_of_many=bool(config.ray.address)):
            result = _run_timed(config, name, results, target, tracker, parent)
    except LeaseLost:
        raise  # the run belongs to the process that took over
    except BaseException:
        finish_failed(tracker)
        raise
    target.require_held()
    tracker.log_metrics(result.row())
    text = with_pages(described(stage.help, target, result), tags)
    tracker.describe(text, name=f"{title} {result.headline}".strip())
    tracker.finish()
    return result.model_copy(update={"mlflow_run_id": tracker.run_id})  # type: ignore[no-any-return]


def _shown_settings(config: PipelineConfig, name: str) -> tuple[str, ...]:
    """Settings for the stage's MLflow run. Those that a search draws are in the runs of its trials."""
    stage = STAGES[name]
    drawn = [f"-{setting}" for setting in config.tune.space] if name == "tune" else []
    return (*stage.shows, *stage.settings, *(f"-{each}" for each in stage.unread(config)), *drawn)


def _run_timed(
    config: PipelineConfig, name: str, results: Results, target: StageFolder, tracker: Tracker, parent: Parent
) -> StageResult:
    """Runs a stage; its time and the prediction go to its result and, unless it sends its own, to MLflow."""
    stage = STAGES[name]
    predicted = imported(FORECAST)(config, name, results, target)
    started = time.perf_counter()
    taken = [results[each] if STAGES[each].is_planned(config) else results.get(each) for each in stage.takes]
    inputs = dict(zip(stage.takes, taken, strict=True))
    members = [run_stage(each, name, inputs, parent=parent) for each in stage.members(config)]
    run = imported(stage.join if members else stage.run)
    result: StageResult = run(config, *taken, *([members] if members else []), target, tracker)
    times = {"seconds": time.perf_counter() - started, "predicted_seconds": predicted}
    if not result.seconds:
        tracker.log_metrics({f"perf/{each}": value for each, value in times.items() if value})
    return result.timed(**times)


def imported(path: str) -> Any:
    """What `module:name` names; its module is imported when it is needed."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
