"""What `rcnn plan` adds up, from calibrations of known size."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.plan import bill as bill_module
from rcnn.plan.bill import bill_of
from rcnn.plan.calibrate import Calibration, Job
from rcnn.plan.costs import SECONDS_TO_START_RAY
from rcnn.plan.forecast import forecast_seconds
from rcnn.reproduce.cells import bill_of_cells
from rcnn.reproduce.tables import EVERY, Cell
from rcnn.results import Choice, IngestResult, TuneResult
from rcnn.stages import STAGES, Stage, stage_folder

pytestmark = pytest.mark.long

TUNED = TuneResult(
    best=Choice({"model.k": 8}), best_trial="trial-00", val_error=0.5, trials=(), outcomes={"finished": 2}
)

CALIBRATION = Calibration(1000, 100, 0.01, 0.001, 1_000_000)


@pytest.fixture
def config(
    tmp_path: Path, tiny_config: PipelineConfig, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> PipelineConfig:
    """`debug_tiny`, its data set ingested; a step takes 10 ms for each process that trains, and is not timed."""

    def calibrations(jobs: Sequence[Job], *_: Any, num_copies: int, **__: Any) -> list[Calibration]:
        return [replace(CALIBRATION, step_seconds=CALIBRATION.step_seconds * num_copies) for _ in jobs]

    monkeypatch.setattr(bill_module, "calibrations_of", calibrations)
    shutil.copytree(Path(tiny_config.storage, digits.folder), tmp_path / "s" / digits.folder)
    return tiny_config.with_settings({"storage": str(tmp_path / "s"), "tune.max_concurrent_trials": 1})


def seconds_of(config: PipelineConfig) -> dict[str, float]:
    return {item.name: item.cost.seconds or 0.0 for item in bill_of(config).items}


def test_the_first_stage_that_needs_ray_starts_it(config: PipelineConfig, digits: IngestResult) -> None:
    with_search, without = seconds_of(config), seconds_of(config.with_settings({"tune.enabled": False}))
    assert without["train"] == pytest.approx(with_search["train"] + SECONDS_TO_START_RAY)
    on_cluster = seconds_of(config.with_settings({"ray.address": "auto"}))
    assert with_search["tune"] == pytest.approx(on_cluster["tune"] + SECONDS_TO_START_RAY)
    target = stage_folder(config, "tune", {"ingest": digits})
    target.storage.write_json(target.path("_result.json"), TUNED.model_dump(mode="json"))
    assert seconds_of(config) == without | {"tune": 0.0}


def test_cells_of_a_table_are_billed_with_the_speed_that_they_have_beside_each_other(config: PipelineConfig) -> None:
    config = config.with_settings({"tune.enabled": False, "train.epochs": 50})
    cells = [Cell(EVERY["mnist_rcnn32"], config.with_settings({"seed": seed})) for seed in range(4)]
    alone, pairs = bill_of_cells(cells, parallel=1), bill_of_cells(cells, parallel=2)
    steps = 50 * 320 / 32 * CALIBRATION.step_seconds
    assert alone.seconds is not None
    assert pairs.seconds == pytest.approx((alone.seconds + 4 * steps) / 2)
    assert alone.num_left == 4


def test_a_stage_behind_a_search_that_runs_is_billed_with_a_note(config: PipelineConfig) -> None:
    note = "train, evaluate and audit are predicted for the network of the config; tune may choose another one"
    assert note in bill_of(config).lines()
    assert not any("may choose" in line for line in bill_of(config.with_settings({"tune.enabled": False})).lines())


def test_a_stage_is_predicted_before_it_runs_where_its_steps_were_timed(
    config: PipelineConfig, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"ingest": digits}
    config = config.with_settings({"ray.address": "auto"})  # else Ray's start counts, unless another test started it
    target = stage_folder(config, "tune", results)
    assert forecast_seconds(config, "tune", results, target) == 0
    monkeypatch.setattr("rcnn.plan.calibrate._read", lambda storage, name: asdict(CALIBRATION))
    assert forecast_seconds(config, "tune", results, target) == seconds_of(config)["tune"] > 0
    broken = config.with_settings({"model.crop": 99, "tune.max_concurrent_trials": 2})  # the stage reports it
    assert forecast_seconds(broken, "tune", results, target) == 0


def test_a_new_row_of_the_table_is_planned(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Stage(
        help="count rows", run="rcnn.scores:x", result="rcnn.results:StageResult", takes=("ingest",), settings=("seed",),
        identity=lambda config, results: [results["ingest"].digest], purpose=lambda config: "counting", folder="runs",
        label=lambda config: "count",
    )  # fmt: skip
    for name in list(STAGES)[1:]:
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], is_planned=lambda config: False))
    monkeypatch.setitem(STAGES, "count", row)
    bill = bill_of(config)
    assert [(item.name, item.status.state) for item in bill.items] == [("ingest", "done"), ("count", "runs")]
    assert not bill.is_complete
    assert main(["plan", "--recipe", "debug_tiny", "--set", f"storage={config.storage}"]) == 0
    assert "count: no result yet" in capsys.readouterr().out
