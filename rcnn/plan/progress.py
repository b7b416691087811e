"""How far an unfinished stage has come: `rcnn plan` says so, and bills what is left.

In: a config and the stage's folder. Out: a line, or what a cost function subtracts. A stage's row in `stages.py` names its
function here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rcnn.config import PipelineConfig
from rcnn.storage import StageFolder
from rcnn.train import checkpoint_store
from rcnn.tune.ledger import Record, read_records
from rcnn.tune.search import trials_left
from rcnn.tune.space import num_trials_wanted


@dataclass(frozen=True)
class Trained:
    """What the last checkpoint of a training holds: whole epochs, steps of the next one, and the seconds that all took."""

    num_epochs: int = 0
    num_steps: int = 0
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
    """What training resumes from."""
    records = checkpoint_store.read_records(target) if target else []
    newest = records[-1] if records else None
    return Trained(newest.epoch, newest.step, newest.seconds) if newest else Trained()
