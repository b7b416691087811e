"""What is there already, and why the rest is not."""

import json
import shutil
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.plan.status import Status, statuses_of
from rcnn.results import Choice, IngestResult, TrainResult, TuneResult
from rcnn.stages import made_of, stage_folder
from rcnn.tune.ledger import Record, write_record
from tests.plan.states import write_checkpoint_record

TRAINED = TrainResult(
    folder="runs/x", weights_sha256="w", val_error=0.1, best_epoch=3.4, epochs=3.4, num_parameters=1,
    images_per_second=1, seconds=60, limit_minutes=1,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, tiny_config: PipelineConfig, digits: IngestResult) -> PipelineConfig:
    """`debug_tiny` without a search, its data set ingested."""
    shutil.copytree(Path(tiny_config.storage, digits.folder), tmp_path / "s" / digits.folder)
    return tiny_config.with_settings({"storage": str(tmp_path / "s"), "tune.enabled": False})


def write_trained(config: PipelineConfig, digits: IngestResult, trained: TrainResult) -> Path:
    """Puts a finished train stage where `config` looks for it."""
    results = {"ingest": digits}
    folder = Path(config.storage, stage_folder(config, "train", results).name)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_text("")
    (folder / "_made_of.json").write_text(json.dumps(made_of(config, "train", results)))
    (folder / "_result.json").write_text(trained.model_dump_json())
    return folder


def test_nothing_is_there_in_an_empty_storage(tmp_path: Path, tiny_config: PipelineConfig) -> None:
    statuses, results = statuses_of(tiny_config.with_settings({"storage": str(tmp_path / "none")}))
    assert results == {}
    assert statuses["ingest"] == Status("runs", "no result yet")
    assert {status.why for name, status in statuses.items() if name != "ingest"} == {"ingest runs first"}
    assert not (tmp_path / "none").exists()


def test_a_done_stage_is_shown_as_done_and_a_changed_setting_is_named(
    config: PipelineConfig, digits: IngestResult
) -> None:
    statuses, results = statuses_of(config)
    assert statuses["ingest"] == Status("done", digits.folder)
    assert statuses["train"] == Status("runs", "no result yet")
    assert results == {"ingest": digits}
    other, _ = statuses_of(config.with_settings({"data.val_fraction": 0.2, "data.split_seed": 3}))
    assert other["ingest"].why == "data.split_seed is 3, was 0; data.val_fraction is 0.2, was 0.1"


def test_the_nearest_result_explains_what_changed(config: PipelineConfig, digits: IngestResult) -> None:
    write_trained(config.with_settings({"model.k": 9, "seed": 5}), digits, TRAINED)
    write_trained(config.with_settings({"model.k": 9}), digits, TRAINED)
    assert statuses_of(config)[0]["train"].why == "model.k is 8, was 9"


def test_changed_code_and_data_are_named(config: PipelineConfig, digits: IngestResult) -> None:
    folder = write_trained(config, digits, TRAINED)
    made = json.loads((folder / "_made_of.json").read_text())
    made["code"]["rcnn.train.step"] = "other"
    made["inputs"] = ["other"]
    (folder / "_made_of.json").write_text(json.dumps(made))
    folder.rename(folder.with_name("train-0123456789ab"))
    assert statuses_of(config)[0]["train"].why == "what it reads changed; the code of rcnn.train.step changed"


def test_a_run_that_a_limit_ended_is_done_until_the_limit_is_raised(
    config: PipelineConfig, digits: IngestResult
) -> None:
    write_trained(config, digits, TRAINED)
    why = "train.max_minutes = 1 ended it after 3.4 epochs"
    left = f"{why}; 0 of 2 epochs are done"  # there are no checkpoints
    for minutes, state, expected in ((1, "done", why), (0.5, "done", why), (2, "resumes", left), (0, "resumes", left)):
        statuses, _ = statuses_of(config.with_settings({"train.max_minutes": minutes}))
        assert statuses["train"] == Status(state, expected)


def test_an_interrupted_training_says_which_epochs_are_done(config: PipelineConfig, digits: IngestResult) -> None:
    (write_trained(config, digits, TRAINED) / "_result.json").unlink()
    assert statuses_of(config)[0]["train"] == Status("resumes", "0 of 2 epochs are done")
    write_checkpoint_record(stage_folder(config, "train", {"ingest": digits}), epoch=1, seconds=3)
    assert statuses_of(config)[0]["train"] == Status("resumes", "1 of 2 epochs are done")


def test_an_extended_or_interrupted_search_says_which_trials_are_done(
    config: PipelineConfig, digits: IngestResult
) -> None:
    config = config.with_settings({"tune.enabled": True, "tune.num_trials": 3})
    target = stage_folder(config, "tune", {"ingest": digits})
    for number in range(2):
        write_record(
            target, Record(name=f"trial-0{number}", choice=Choice({}), val_error=0.5, epochs=2, outcome="finished")
        )
    assert statuses_of(config)[0]["tune"] == Status("resumes", "2 of 3 trials are done")
    tuned = TuneResult(best=Choice({}), best_trial="trial-00", val_error=0.5, trials=(), outcomes={"finished": 2})
    target.storage.write_json(target.path("_result.json"), tuned.model_dump(mode="json"))
    assert statuses_of(config)[0]["tune"] == Status("resumes", "2 of 3 trials are done")
    assert statuses_of(config.with_settings({"tune.num_trials": 2}))[0]["tune"].state == "done"


def test_an_interrupted_stage_that_resumes_nothing_is_begun(config: PipelineConfig) -> None:
    ingest = stage_folder(config, "ingest", {})
    (Path(config.storage) / ingest.path("_result.json")).unlink()
    assert statuses_of(config)[0]["ingest"] == Status("resumes", "begun, and not finished")
