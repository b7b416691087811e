import shutil
from pathlib import Path

import pytest

from rcnn import stages
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, DataError
from rcnn.recipes import debug_tiny
from rcnn.results import Choice, IngestResult, TrainResult, TuneResult
from rcnn.stages import STAGES, effective_config, finished, planned, results_from_json, run_stage, stage_folder

DATA = IngestResult(folder="datasets/x", digest="d", test_digest="t", source="mnist-sample", rows={"test": 1})
TUNED = TuneResult(best=Choice(k=5, t=4, learning_rate=0.3), best_trial="trial-00", val_error=0.1, trials=())
MODEL = TrainResult(
    folder="runs/x", weights_sha256="w", val_error=0.1, best_epoch=1, epochs=1, num_parameters=1, images_per_second=1,
    seconds=1,
)  # fmt: skip


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


def test_new_code_names_every_stage_behind_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, object] = {"ingest": DATA, "train": MODEL}
    before = {name: folder(name, results) for name in ("ingest", "tune", "train", "evaluate")}
    monkeypatch.setattr("rcnn.stages.code_version", lambda packages: "new" if "model" in packages else "old")
    changed = {name: folder(name, results) for name in before}
    monkeypatch.setattr("rcnn.stages.code_version", lambda packages: "old")
    old = {name: folder(name, results) for name in before}
    assert old["ingest"] == changed["ingest"]
    assert all(old[name] != changed[name] for name in ("tune", "train", "evaluate"))


def test_a_change_of_any_source_is_new_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(stages.__file__).parent, tmp_path / "rcnn", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stages, "__file__", str(tmp_path / "rcnn" / "stages.py"))
    versions = [stages.code_version.__wrapped__(("model",))]
    for name in ("rcnn.py", "lrn_cpu.c"):
        with Path(tmp_path, "rcnn", "model", name).open("a") as file:
            file.write("\n")
        versions.append(stages.code_version.__wrapped__(("model",)))
    assert len(set(versions)) == 3


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
    assert again.model_copy(update={"mlflow_run_id": first.mlflow_run_id}) == first
    (tmp_path / target.path("_manifest.json")).unlink()
    assert finished(config, "ingest", {}) is None


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
        (exchange, "the data set was exchanged"),
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
    assert again.model_copy(update={"mlflow_run_id": ""}) == first.model_copy(update={"mlflow_run_id": ""})


@pytest.mark.parametrize("storage", ["file", "file/below"])
def test_a_storage_that_cannot_be_written_is_told_before_any_work(tmp_path: Path, storage: str) -> None:
    (tmp_path / "file").write_text("")
    config: PipelineConfig = debug_tiny().with_settings({"storage": str(tmp_path / storage)})
    with pytest.raises(ClusterError, match=r"cannot be written \(.*\)\. Check its permissions"):
        run_stage(config, "ingest", {})
