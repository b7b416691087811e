"""What is there already, stage by stage, and where nothing is, why not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.keys import KEY_LENGTH, differing
from rcnn.section import as_typed
from rcnn.stages import STAGES, Results, effective_config, finished, imported, made_of, planned, stage_folder
from rcnn.storage import MADE_OF, RESULT, StageFolder

NUM_NAMED = 3  # changes that are named; the others are counted


@dataclass(frozen=True)
class Status:
    """What a stage would do.

    Attributes:
        state: "done", "runs" or "resumes".
        why: what is there, or why nothing is.
    """

    state: str
    why: str


def statuses_of(config: PipelineConfig) -> tuple[dict[str, Status], Results]:
    """The status of each stage of the pipeline, and the results that are there.

    Raises:
        DataError: a data set is there, and damaged.
    """
    results: Results = {}
    statuses = {}
    missing = ""
    for name in planned(config):
        if missing:
            statuses[name] = Status("runs", f"{missing} runs first")
            continue
        result = finished(config, name, results)
        target = stage_folder(config, name, results)
        if result is None:
            missing = name
            statuses[name] = _status_of_missing(config, name, results, target)
            continue
        results[name] = result
        statuses[name] = Status("done", f"{result.unfinished or target.name}")
    return statuses, results


def _status_of_missing(config: PipelineConfig, name: str, results: Results, target: StageFolder) -> Status:
    left = target.storage.list_folders(STAGES[name].folder)
    begun = target.name.rpartition("/")[2]
    if begun in left or f".draft-{begun}" in left:
        return Status("resumes", _why_not_done(config, name, results, target))
    wanted = made_of(config, name, results)
    others = [changes for folder in left if (changes := _changes_since(name, folder, target, wanted)) is not None]
    if not others:
        return Status("runs", "no result yet")
    nearest = min(others, key=len)
    more = f" and {len(nearest) - NUM_NAMED} more changes" if len(nearest) > NUM_NAMED else ""
    return Status("runs", "; ".join(nearest[:NUM_NAMED]) + more)


def _why_not_done(config: PipelineConfig, name: str, results: Results, target: StageFolder) -> str:
    """Why a folder that is there holds no result that stands, and how much of it is there."""
    stage = STAGES[name]
    try:
        tree = target.storage.read_json(target.path(RESULT))
        unfinished = "" if tree is None else imported(stage.result).model_validate(tree).unfinished
    except ValueError:
        unfinished = ""
    progress = imported(stage.progress)(effective_config(config, name, results), target) if stage.progress else ""
    return "; ".join(filter(None, (unfinished, progress))) or "begun, and not finished"


def _changes_since(name: str, folder: str, target: StageFolder, wanted: dict[str, Any]) -> list[str] | None:
    """What differs from a finished result in `folder`, or None where there is none of this stage."""
    label = target.name.rpartition("/")[2][: -KEY_LENGTH - 1]
    place = f"{STAGES[name].folder}/{folder}"
    if not re.fullmatch(rf"{re.escape(label)}-[0-9a-f]{{{KEY_LENGTH}}}", folder):
        return None
    try:
        made = target.storage.read_json(f"{place}/{MADE_OF}")
        if made is None or not target.storage.exists(f"{place}/{RESULT}"):
            return None
        return list(_differences(made, wanted))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # of another version, or damaged: it explains nothing


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    before, now = made["settings"], wanted["settings"]
    for setting in sorted(now.keys() | before.keys()):
        if setting not in before or setting not in now:
            yield f"{setting} is {'new' if setting in now else 'gone'}"
        elif before[setting] != now[setting]:
            yield f"{setting} is {as_typed(now[setting])}, was {as_typed(before[setting])}"
    if made["inputs"] != wanted["inputs"]:
        yield "what it reads changed"
    if modules := differing(made["code"], wanted["code"]):
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        yield f"the code of {modules[0]}{more} changed"
