"""What stages cost, from calibrations of known size."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rcnn.config import DataConfig, PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.data.sources import SOURCES
from rcnn.evaluate.study_size import num_passes
from rcnn.model.build import cost_of
from rcnn.plan import costs
from rcnn.plan.bill import as_quantity, bill_of
from rcnn.plan.calibrate import Calibration, Job, calibrations_of
from rcnn.plan.size import OFFICIAL, size_before_ingest
from rcnn.progress import as_duration
from rcnn.results import Choice, IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.train.checkpoint_store import CheckpointStore
from rcnn.train.loop import fit
from rcnn.tune.budget import MINUTES
from rcnn.tune.ledger import Record, write_record
from tests.plan.states import write_checkpoint_record

pytestmark = pytest.mark.long

NUM_TRAIN, NUM_VAL = 4050, 450


def calibrate(jobs: Sequence[Job], num_threads: int, num_copies: int) -> list[Calibration]:
    """A time that is exactly proportional to K, of networks with K thousand multiply-adds."""
    return [
        Calibration(1000 * job.config.model.k, 100, *(_times(job.config.model.k) if job.is_timed else ()))
        for job in jobs
    ]


def _times(k: int) -> tuple[float, float, int]:
    return k / 100, k / 10_000, 10_000_000 * k


def test_the_counts_of_a_training_are_exact(tiny_config: PipelineConfig) -> None:
    config = tiny_config.with_settings({"train.num_rows": 0, "train.epochs": 5, "train.batch_size": 40})
    size = size_before_ingest(config.data)
    cost = costs.cost_of_train(config, size, calibrate)
    assert cost.num_rows == NUM_TRAIN + NUM_VAL
    assert cost.num_steps == 5 * 101
    assert cost.multiply_adds == 5 * 8000 * (3 * 101 * 40 + NUM_VAL)
    fixed = costs.SECONDS_TO_START_WORKERS + costs.SECONDS_TO_END_TRAINING + 5 * costs.SECONDS_OF_A_CHECKPOINT
    assert cost.seconds == pytest.approx(5 * (101 * 0.08 + NUM_VAL * 0.0008) + fixed)
    assert cost.cpu_hours == pytest.approx((cost.seconds or 0) / 3600)
    limited = costs.cost_of_train(config.with_settings({"train.max_minutes": 0.5}), size, calibrate)
    assert limited.seconds == 30


def test_an_evaluation_is_divided_among_workers_that_have_to_start(tiny_config: PipelineConfig) -> None:
    def seconds(**settings: object) -> float:
        config = tiny_config.with_settings(
            {"model.k": 10, "ray.num_cpus": 2} | {f"execution.{k}": v for k, v in settings.items()}
        )
        cost = costs.cost_of_evaluate(config, size_before_ingest(config.data), calibrate)
        num_more = num_passes(config, num_test=500, num_val=NUM_VAL)
        assert num_more > NUM_VAL
        assert (cost.num_rows, cost.multiply_adds) == (500, round((500 + num_more) * 10_000))
        assert cost.seconds is not None
        return cost.seconds - costs.SECONDS_AROUND_EVALUATION - num_more * 0.001 / (os.cpu_count() or 1)

    assert seconds() == pytest.approx(500 * 0.001 / (os.cpu_count() or 1))
    assert seconds(num_workers=2) == pytest.approx(costs.SECONDS_TO_START_SCORING + 500 * 0.001 / 2)
    assert seconds(num_workers=4) == seconds(num_workers=2)  # of two cores


def test_networks_between_those_that_are_timed_are_interpolated(tiny_config: PipelineConfig) -> None:
    space = {
        "tune.space": {"model.k": (10, 20, 30, 40, 50, 60)},
        "tune.num_trials": 1,
        "tune.num_rows": 0,
        "train.num_rows": 0,
    }
    config = tiny_config.with_settings(space | {"tune.epochs": 1, "tune.grace_epochs": 1})
    cost = costs.cost_of_tune(config, size_before_ingest(config.data), calibrate)
    fixed = costs.SECONDS_TO_START_TRIALS
    num_steps = NUM_TRAIN // config.train.batch_size
    # Times are proportional to K here, so their mean is that at the mean K.
    assert cost.seconds == pytest.approx(num_steps * 0.35 + NUM_VAL * 0.0035 + fixed)
    assert "2 of 6 networks are interpolated by multiply-adds" in cost.notes


def test_trials_run_at_once_as_memory_allows(tiny_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config.with_settings({"tune.num_trials": 6, "tune.search": "random"})
    size = size_before_ingest(config.data)
    for node, num_at_once in (
        ({"CPU": 8, "memory": 1e11}, 6),
        ({"CPU": 4, "memory": 1e11}, 4),
        ({"CPU": 8, "memory": 2.5e9}, 2),
    ):
        monkeypatch.setattr("rcnn.ray_session.node_here", lambda config, node=node: dict(node))
        assert costs.cost_of_tune(config, size, calibrate).num_processes == num_at_once
    capped = config.with_settings({"tune.max_concurrent_trials": 1})
    assert costs.cost_of_tune(capped, size, calibrate).num_processes == 1


def test_a_resumed_training_is_billed_for_the_epochs_that_no_checkpoint_holds(
    tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config, target = tiny_config.with_settings({"train.epochs": 5}), StageFolder(Storage(str(tmp_path)), "runs/train-0")
    size = size_before_ingest(config.data)
    whole = costs.cost_of_train(config, size, calibrate, target)
    write_checkpoint_record(target, epoch=3, seconds=50)
    left = costs.cost_of_train(config, size, calibrate, target)
    for name in ("num_steps", "multiply_adds"):
        assert 5 * getattr(left, name) == 2 * getattr(whole, name)
    fixed = costs.SECONDS_TO_START_WORKERS + costs.SECONDS_TO_END_TRAINING
    assert 5 * ((left.seconds or 0) - fixed) == pytest.approx(2 * ((whole.seconds or 0) - fixed))
    assert (left.disk_bytes or 0) < (whole.disk_bytes or 0)
    limited = config.with_settings({"train.max_minutes": 1})
    assert costs.cost_of_train(limited, size, calibrate, target).seconds == 10
    write_checkpoint_record(target, epoch=3, step=10, seconds=55)
    assert costs.cost_of_train(config, size, calibrate, target).num_steps == left.num_steps - 10


def test_a_search_is_billed_for_the_trials_that_have_not_ended(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    settings = {"tune.num_trials": 4, "tune.early_stopping": "none", "tune.max_concurrent_trials": 1}
    config, target = tiny_config.with_settings(settings), StageFolder(Storage(str(tmp_path)), "runs/tune-0")
    size = size_before_ingest(config.data)
    whole = costs.cost_of_tune(config, size, calibrate, target)
    for number in range(3):
        write_record(target, a_record(number))
    left = costs.cost_of_tune(config, size, calibrate, target)
    assert 4 * (left.num_steps or 0) == whole.num_steps
    fixed = costs.SECONDS_TO_START_TRIALS
    assert 4 * ((left.seconds or 0) - fixed) == pytest.approx((whole.seconds or 0) - fixed)
    assert "trainings to run: 1 of at most 2 epochs, 2 epochs expected" in left.notes
    write_record(target, a_record(3))
    done = costs.cost_of_tune(config, size, calibrate, target)  # killed before it wrote its result
    assert (done.num_steps, done.seconds) == (0, 0)


def test_a_search_is_billed_no_more_minutes_than_its_earlier_attempts_left(
    tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    target = StageFolder(Storage(str(tmp_path)), "runs/tune-0")
    config = tiny_config.with_settings({"tune.max_minutes": 0.2, "tune.max_concurrent_trials": 1})
    size = size_before_ingest(config.data)
    assert costs.cost_of_tune(config, size, calibrate, target).seconds == pytest.approx(12)
    target.storage.write_json(target.path(MINUTES), {"minutes": 0.15})
    assert costs.cost_of_tune(config, size, calibrate, target).seconds == pytest.approx(3)
    target.storage.write_json(target.path(MINUTES), {"minutes": 5})
    assert costs.cost_of_tune(config, size, calibrate, target).seconds == 0


def a_record(number: int) -> Record:
    return Record(name=f"trial-{number:02d}", choice=Choice({}), val_error=0.5, epochs=2, outcome="finished")


def test_what_the_median_rule_saves_is_not_predicted_and_a_note_says_so(tiny_config: PipelineConfig) -> None:
    median = tiny_config.with_settings({"tune.early_stopping": "median", "tune.max_concurrent_trials": 1})
    none = median.with_settings({"tune.early_stopping": "none"})
    of_median, of_none = (costs.cost_of_tune(each, size_before_ingest(each.data), calibrate) for each in (median, none))
    note = "tune.early_stopping = median cannot be predicted: the figures are those of trials that all run to the end"
    assert of_median.notes == (*of_none.notes, note)
    assert of_median.seconds == of_none.seconds


def test_a_checkpoint_has_the_predicted_size(tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path) -> None:
    config = tiny_config.with_settings({"model.k": 64, "train.epochs": 1, "train.num_rows": 32, "train.ema_decay": 0.9})
    data = load_training_data(Storage(config.storage), digits.folder, num_rows=32)
    fit(config, data, lambda metrics: None, checkpoints=CheckpointStore(StageFolder(Storage(str(tmp_path)), "run")))
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").iterdir())
    parameters = cost_of("rcnn", (28, 28, 1), 10, config.model.model_dump()).parameters
    kept = config.execution.keep_checkpoints
    predicted = costs._checkpoint_bytes(config, Calibration(0, parameters))
    assert predicted == pytest.approx(kept * written + 4 * parameters, rel=0.05)


def test_official_data_is_counted_before_ingest_as_ingest_counts_it(digits: IngestResult) -> None:
    size = size_before_ingest(DataConfig(source="mnist-sample", test_fraction=0.1, val_fraction=0.1))
    assert size is not None
    assert dict(size.num_rows) == digits.rows
    assert set(OFFICIAL) == set(SOURCES) - {"folder", "parquet"}
    extra = size_before_ingest(DataConfig(source="svhn", svhn_extra=True))
    assert extra is not None
    assert extra.num_rows_in_all == 73_257 + 26_032 + 531_131


def test_ones_own_images_are_known_after_ingest(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_text("")
    config = PipelineConfig().with_settings(
        {"storage": str(tmp_path / "s"), "data.source": "folder", "data.root": str(tmp_path / "photos")}
    )
    bill = bill_of(config)
    assert not bill.is_complete
    assert "train: rows and image size are known after ingest" in bill.lines()
    assert bill.table()[-1]["state"] == "at least"


def test_a_calibration_counts_exactly_and_is_kept(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    config = tiny_config.with_settings({"model.crop": 20})
    job = Job(config, (28, 28, 1), 10, num_steps=10)
    [found] = calibrations_of([job], Storage(str(tmp_path)), num_threads=1)
    exact = cost_of("rcnn", (20, 20, 1), 10, config.model.model_dump())
    assert (found.multiply_adds, found.num_parameters) == (exact.multiply_adds, exact.parameters)
    assert 0 < found.score_seconds < found.step_seconds < 10
    assert 1e8 < found.peak_bytes < 1e10
    assert calibrations_of([job], Storage(str(tmp_path)), num_threads=1) == [found]
    [file] = (tmp_path / "runs" / "calibrations").iterdir()
    file.write_text(file.read_text().replace(str(found.multiply_adds), "1"))
    assert calibrations_of([job], Storage(str(tmp_path)), num_threads=1)[0].multiply_adds == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_plan_for_a_gpu_is_counted_where_there_is_none(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    settings = {"execution.use_gpu": True, "tune.enabled": False, "storage": str(tmp_path)}
    bill = bill_of(tiny_config.with_settings(settings))
    train = next(item for item in bill.items if item.name == "train")
    assert train.cost.multiply_adds
    assert train.cost.seconds is None
    assert any("times are not predicted: execution.use_gpu = true" in note for note in train.cost.notes)


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.4, "9 s"), (240, "4 min"), (7800, "2 h 10 min"), (3 * 86400, "3 days")]
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert as_duration(seconds) == text


def test_quantities_have_three_digits_and_a_prefix() -> None:
    assert [as_quantity(None), as_quantity(0, "B"), as_quantity(999), as_quantity(12_345_678, "B")] == [
        "", "0 B", "999", "12.3 MB"
    ]  # fmt: skip
