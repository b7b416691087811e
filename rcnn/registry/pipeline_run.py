"""The MLflow run of a whole pipeline: the row by which models are compared.

At its end it has what a person decides by: data, network, settings, test error with its interval, time and cost, the model,
and a name that tells it from the others (`RCNN-32 T=1 2.40 %`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.registry.card import loading
from rcnn.registry.runs import OF_A_TRAINING, REGISTERED_TAG, OutboxTracker, as_list, open_run
from rcnn.results import StageResult, TrainResult, TuneResult
from rcnn.storage import Storage

Results = Mapping[str, Any]
"""The results of the stages, by name."""


def open_pipeline(
    config: PipelineConfig, *, key: str, tags: Mapping[str, str] | None = None, fresh: bool = False
) -> OutboxTracker:
    """Makes or resumes the run, without the settings that a search will find.

    Raises:
        ClusterError: the store is damaged, or the storage cannot be written.
    """
    parts = {"tune": config.tune.enabled, "audit": config.audit.enabled}
    settings = (*OF_A_TRAINING, "evaluate", *(name for name, is_planned in parts.items() if is_planned))
    drawn = [f"-{name}" for name in _searched(config)]
    about = f"A pipeline with the recipe `{config.recipe}` on {config.data.dataset}. Its figures are here when it has ended."
    name = f"pipeline {config.recipe}"
    return open_run(config, name, key=key, tags=tags, settings=(*settings, *drawn), text=about, fresh=fresh)


def finish_pipeline(tracker: OutboxTracker, config: PipelineConfig, results: Results) -> None:
    """Ends the run with all that its row shows."""
    chosen = config
    for result in results.values():
        chosen = result.applied_to(chosen)
    if searched := chosen.applicable(*_searched(config)):
        tracker.log_params(searched)
    if data := results.get("ingest"):
        storage = Storage(config.storage)
        manifest = require_manifest(storage, data.folder)
        tracker.log_data(manifest.summary(), storage.uri(data.folder), context="training")
    tracker.log_metrics(_figures(chosen, results))
    if registered := results.get("register"):
        tracker.set_tags({REGISTERED_TAG: f"{registered.model_name}/{registered.version}"})
        if registered.model_id:
            tracker.log_model(registered.model_id)
    tracker.describe(_text(chosen, results), name=_name(chosen, results))
    tracker.finish()


def _searched(config: PipelineConfig) -> tuple[str, ...]:
    return tuple(config.tune.space) if config.tune.enabled else ()


def _name(config: PipelineConfig, results: Results) -> str:
    last = results.get("evaluate") or results.get("train")
    return f"{config.model.short_title} {last.headline if last else ''}".strip()


def _figures(config: PipelineConfig, results: Results) -> dict[str, float]:
    figures: dict[str, float] = {}
    for result in results.values():
        figures |= result.row()
    figures["cost/seconds"] = sum(result.seconds for result in results.values())
    if all(result.predicted_seconds for result in results.values() if result.seconds):
        figures["cost/predicted_seconds"] = sum(result.predicted_seconds for result in results.values())
    figures |= dict(_hours(config, results))
    if trained := results.get("train"):
        figures |= {"perf/train_images_per_second": trained.images_per_second}
        figures |= {"perf/peak_megabytes": trained.peak_bytes / 1e6} if trained.peak_bytes else {}
    return {name: round(value, 6) for name, value in figures.items()}  # MLflow's columns cut 0.88666666666 off


def _hours(config: PipelineConfig, results: Results) -> Iterator[tuple[str, float]]:
    """What search and training occupied, times its duration."""
    how, tune = config.execution, config.tune
    cpus = gpus = 0.0
    for result in results.values():
        if isinstance(result, TrainResult):
            cpus += result.seconds * how.num_workers * how.cpus_per_worker
            gpus += result.seconds * how.num_workers * how.use_gpu
        elif isinstance(result, TuneResult):
            seconds = sum(trial.seconds for trial in result.trials) * tune.workers_per_trial
            cpus += seconds * tune.cpus_per_trial
            gpus += seconds * tune.gpus_per_trial
    yield "cost/cpu_hours", round(cpus / 3600, 6)
    if gpus:
        yield "cost/gpu_hours", round(gpus / 3600, 6)


def _text(config: PipelineConfig, results: Results) -> str:
    """Which model it is, how good, how certain that is, and how to get it."""
    lines = [f"**{config.model.title}** on **{config.data.dataset}**, recipe `{config.recipe}`."]
    if evaluated := results.get("evaluate"):
        lines.append(f"Test error: **{evaluated.written_error}**.")
    if registered := results.get("register"):
        place = f"{registered.model_name} version {registered.version}"
        lines.append(
            f"Registered as **{place}**, {registered.alias}: {registered.reason}. The version has a model card, and its "
            "training run has the report (`report.html` among the artifacts)."
        )
        lines.append(loading(registered.model_uri, config.tracking.uri))
    lines.append(as_list(_rows(results.values())))
    return "\n\n".join(lines)


def _rows(results: Any) -> dict[str, str]:
    rows: dict[str, str] = {}
    result: StageResult
    for result in results:
        rows |= result.highlights(lambda name: f"`{name}`")
    return rows
