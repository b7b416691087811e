import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rcnn.config import ExecutionConfig, PipelineConfig
from rcnn.errors import ClusterError, DataError
from rcnn.plan.costs import PIXELS_PER_SECOND, SECONDS_TO_START_INGEST
from rcnn.progress import show_on_screen
from rcnn.recipes import debug_tiny
from rcnn.results import Choice, EvaluateResult, IngestResult, StageResult, TrainResult, TuneResult
from rcnn.stages import (
    STAGES,
    effective_config,
    finished,
    planned,
    require_same_code,
    results_from_json,
    run_stage,
    stage_code,
    stage_folder,
)
from rcnn.tracking import tracking_uri

pytestmark = pytest.mark.long

DATA = IngestResult(folder="datasets/x", digest="d", test_digest="t", source="mnist-sample", rows={"test": 1})
TUNED = TuneResult(
    best=Choice({"model.k": 5, "model.t": 4, "train.learning_rate": 0.3}),
    best_trial="trial-00", val_error=0.1, trials=(), outcomes={"finished": 2},
)  # fmt: skip
MODEL = TrainResult(
    folder="runs/x", weights_sha256="w", val_error=0.1, best_epoch=1, epochs=1, num_parameters=1, images_per_second=1,
    seconds=1,
)  # fmt: skip
SCORED = EvaluateResult(
    folder="reports/x",
    metrics={"error": 0.1, "loss": 1},
    classes={},
    num_rows=1,
    images_per_second=1,
    test_digest="t",
)


def folder(name: str, results: dict[str, object], **settings: object) -> str:
    config = debug_tiny().with_settings({key.replace("__", "."): value for key, value in settings.items()})
    return stage_folder(config, name, results).name


def test_a_stage_is_named_by_what_it_depends_on() -> None:
    results: dict[str, object] = {"ingest": DATA}
    train = folder("train", results)
    assert folder("train", results, evaluate__batch_size=9, tune__epochs=7, ray__address="auto") == train
    assert folder("train", results, train__momentum=0.1) != train
    assert folder("train", results, seed=4) != train
    assert folder("train", {"ingest": DATA.model_copy(update={"digest": "e"})}) != train
    assert folder("ingest", {}, seed=4) == folder("ingest", {})
    assert folder("ingest", {}, data__split_seed=4) != folder("ingest", {})


def test_how_and_where_a_stage_runs_is_in_no_key() -> None:
    results: dict[str, object] = {"ingest": DATA, "train": MODEL, "evaluate": SCORED}
    other = {
        "execution.num_workers": 4, "execution.cpus_per_worker": 2, "execution.use_gpu": True, "execution.compile": "on",
        "execution.recompute": True, "execution.convolution": "direct", "execution.loader": "streaming",
        "execution.resident_megabytes": 7, "execution.keep_checkpoints": 9, "execution.max_failures": 9,
        "execution.checkpoint_minutes": 1, "execution.min_workers": 2,
        "ray.address": "auto", "ray.num_cpus": 3, "tune.cpus_per_trial": 2, "tune.max_concurrent_trials": 3,
        "tune.gpus_per_trial": 1, "tune.workers_per_trial": 2, "tune.max_minutes": 5, "tune.trial_minutes": 1,
    }  # fmt: skip
    assert {name.partition(".")[2] for name in other if name.startswith("execution")} == set(
        ExecutionConfig.model_fields
    )
    usual = debug_tiny().with_settings({"train.num_shares": 4})
    for name in STAGES:
        assert stage_folder(usual.with_settings(other), name, results).name == stage_folder(usual, name, results).name


def test_a_search_is_named_by_what_its_trials_read() -> None:
    results: dict[str, object] = {"ingest": DATA}
    tune = folder("tune", results)
    for setting, value in (
        ("train__epochs", 7),
        ("tune__num_trials", 9),
        ("tune__seeds", 2),
        ("tune__num_finalists", 9),
    ):
        assert folder("tune", results, **{setting: value}) == tune
    assert folder("tune", results, tune__space={"model.k": [8]}) != tune
    assert folder("tune", results, tune__search="tpe") != tune
    assert folder("tune", results, tune__epochs=3) != tune
    assert folder("tune", results, augment__flip=True) != tune


def test_the_rows_of_training_name_a_search_only_where_its_trials_train_on_them() -> None:
    results: dict[str, object] = {"ingest": DATA}
    own = folder("tune", results, tune__num_rows=500)
    assert folder("tune", results, tune__num_rows=500, train__num_rows=64) == own
    assert folder("tune", results, tune__num_rows=64) != own
    shared = folder("tune", results, tune__num_rows=0, train__num_rows=500)
    assert folder("tune", results, tune__num_rows=0, train__num_rows=64) != shared
    assert folder("train", results, tune__num_rows=500, train__num_rows=64) != folder("train", results)


def test_a_job_with_other_code_than_the_drivers_stops_and_names_it() -> None:
    code = stage_code(debug_tiny(), "train")
    require_same_code(debug_tiny(), "train", code)
    theirs = code | {"rcnn.train.step": "other", "rcnn.model.lrn": "other"}
    with pytest.raises(
        ClusterError, match=r"differs from the driver's in rcnn\.model\.lrn, rcnn\.train\.step\. Install"
    ):
        require_same_code(debug_tiny(), "train", theirs)


def test_new_weights_are_evaluated_anew() -> None:
    results: dict[str, object] = {"ingest": DATA, "train": MODEL}
    retrained = MODEL.model_copy(update={"weights_sha256": "v"})
    assert folder("evaluate", results) != folder("evaluate", results | {"train": retrained})


def test_the_best_trial_decides_what_is_trained() -> None:
    config = effective_config(debug_tiny(), "train", {"ingest": DATA, "tune": TUNED})
    assert (config.model.k, config.model.t, config.train.learning_rate) == (5, 4, 0.3)
    assert effective_config(debug_tiny(), "tune", {"ingest": DATA}) == debug_tiny()


def test_the_plan_leaves_the_search_out_where_it_is_off() -> None:
    assert planned(debug_tiny()) == list(STAGES)
    off = debug_tiny().with_settings({"tune.enabled": False})
    assert planned(off, "train") == ["ingest", "train"]
    assert planned(off, "tune") == ["ingest", "tune"]


def test_results_go_through_json() -> None:
    results = {"ingest": DATA, "tune": TUNED, "train": MODEL}
    assert results_from_json({name: result.model_dump(mode="json") for name, result in results.items()}) == results


def test_a_damaged_or_partial_result_is_no_result(tmp_path: Path) -> None:
    config = debug_tiny().with_settings({"storage": str(tmp_path)})
    first = run_stage(config, "ingest", {})
    assert finished(config, "ingest", {}) == first
    target = stage_folder(config, "ingest", {})
    (tmp_path / target.path("_result.json")).write_text("{")
    assert finished(config, "ingest", {}) is None
    again = run_stage(config, "ingest", {})
    assert without_run(again) == without_run(first)
    (tmp_path / target.path("_manifest.json")).unlink()
    assert finished(config, "ingest", {}) is None


def without_run(result: StageResult) -> StageResult:
    """What a result says, whichever run made it."""
    return result.model_copy(update={"mlflow_run_id": "", "seconds": 0.0})


def test_a_result_keeps_the_time_that_the_stage_took_beside_the_prediction(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config.with_settings({"storage": str(tmp_path)})
    show_on_screen()
    result = run_stage(config, "ingest", {})
    assert finished(config, "ingest", {}) == result
    assert result.seconds > 0
    predicted = SECONDS_TO_START_INGEST + 5000 * 28 * 28 / PIXELS_PER_SECOND
    assert result.predicted_seconds == round(predicted, 1)
    assert f"ingest: done in {result.seconds:.0f} s ({predicted:.0f} s predicted)" in capsys.readouterr().err
    run = MlflowClient(tracking_uri(config)).get_run(result.mlflow_run_id)
    assert run.data.metrics["perf/predicted_seconds"] == pytest.approx(predicted)


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def edit_by_hand(shard: Path) -> None:
    manifest = shard.parents[1] / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"seven"', '"7"').replace('"rows": 500', '"rows": 501'))


def exchange(shard: Path) -> None:
    """Puts another data set, which is whole, in this one's place."""
    other = debug_tiny().with_settings({"storage": str(shard.parents[3] / "other"), "data.split_seed": 1})
    run_stage(other, "ingest", {})
    shutil.rmtree(shard.parents[1])
    shutil.copytree(Path(other.storage, stage_folder(other, "ingest", {}).name), shard.parents[1])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "test-00000.parquet: the shard has .* bytes, the manifest says"),
        (Path.unlink, "test-00000.parquet: the shard is missing"),
        (edit_by_hand, "_manifest.json: the manifest is damaged: its content does not match its digest"),
        (exchange, "the data set was replaced"),
    ],
)
def test_damage_is_found_before_any_stage_starts(
    tmp_path: Path, digits_storage: Path, digits: IngestResult, damage: object, fault: str
) -> None:
    config = debug_tiny().with_settings({"storage": str(tmp_path)})
    shutil.copytree(digits_storage / digits.folder, tmp_path / digits.folder)
    damage(tmp_path / digits.folder / "test" / "test-00000.parquet")  # type: ignore[operator]
    for name in ("tune", "train", "evaluate"):
        with pytest.raises(DataError, match=rf"{fault}.*Ingest again with --fresh"):
            run_stage(config, name, {"ingest": digits, "train": MODEL})
    if damage is not exchange:  # that one is whole, with a result of its own
        with pytest.raises(DataError, match=fault):
            run_stage(config, "ingest", {})


def test_fresh_repairs_a_data_set(tmp_path: Path) -> None:
    config = debug_tiny().with_settings({"storage": str(tmp_path)})
    first = run_stage(config, "ingest", {})
    shard = tmp_path / stage_folder(config, "ingest", {}).name / "test" / "test-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(b"broken")
    again = run_stage(config, "ingest", {}, fresh=True)
    assert shard.read_bytes() == whole
    assert without_run(again) == without_run(first)


@pytest.mark.parametrize("storage", ["file", "file/below"])
def test_a_storage_that_cannot_be_written_is_told_before_any_work(tmp_path: Path, storage: str) -> None:
    (tmp_path / "file").write_text("")
    config: PipelineConfig = debug_tiny().with_settings({"storage": str(tmp_path / storage)})
    with pytest.raises(ClusterError, match=r"cannot be written \(.*\)\. Check its permissions"):
        run_stage(config, "ingest", {})


def _ingest_and_print_the_key(storage: str) -> None:
    result = run_stage(debug_tiny().with_settings({"storage": storage}), "ingest", {})
    Path(storage, f"{os.getpid()}.digest").write_text(result.digest)  # type: ignore[attr-defined]


def test_of_three_processes_one_does_the_work_and_the_others_use_its_result(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_ingest_and_print_the_key, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    digests = [file.read_text() for file in tmp_path.glob("*.digest")]
    assert len(digests) == 3
    assert len(set(digests)) == 1
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert len(runs) == 1  # the others found the result and opened none
