"""How far an unfinished stage has come: `rcnn plan` says so, and bills what is left.

In: a config and the stage's folder. Out: a line, or what a cost function subtracts. A stage's row in `stages.py` names its
function here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rcnn.config import PipelineConfig
from rcnn.storage import StageFolder
from rcnn.tune.ledger import Record, read_records
from rcnn.tune.search import trials_left
from rcnn.tune.space import num_trials_wanted

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's own list of its checkpoints


@dataclass(frozen=True)
class Trained:
    """What the last checkpoint of a training holds: whole epochs, and the seconds that they took."""

    num_epochs: int = 0
    seconds: float = 0.0


def progress_of_tune(config: PipelineConfig, target: StageFolder) -> str:
    """`12 of 20 trials are done`; further seeds of the best ones are not counted."""
    num_wanted = num_trials_wanted(config)
    num_left = num_trials_left(config, ended_trials(config, target))
    return f"{num_wanted - num_left} of {num_wanted} trials are done"


def progress_of_train(config: PipelineConfig, target: StageFolder) -> str:
    """`3 of 10 epochs are done`."""
    return f"{trained(target).num_epochs} of {config.train.epochs} epochs are done"


def ended_trials(config: PipelineConfig, target: StageFolder | None) -> Mapping[str, Record]:
    """The trials that the search will not train again, by name."""
    records = read_records(target) if target else {}
    return {name: record for name, record in records.items() if record.has_ended(config.tune.trial_minutes)}


def num_trials_left(config: PipelineConfig, ended: Mapping[str, Record]) -> int:
    """Trials of the search that have not ended, further seeds of the best ones not counted."""
    return len(trials_left(config, ended))


def trained(target: StageFolder | None) -> Trained:
    """What training resumes from; nothing where the list of checkpoints is missing or damaged."""
    try:
        tree = target.storage.read_json(target.path(SNAPSHOT)) if target else None
        metrics = tree["latest_checkpoint_result"]["metrics"] if tree else {"epoch": 0}
        # A time limit may have ended the last epoch early; it is then trained again from its start.
        return Trained(int(metrics["epoch"]), float(metrics.get("perf/seconds", 0.0)))
    except (ValueError, KeyError, TypeError):
        return Trained()
