"""Runs and models in real stores: our own SQLite file, and an MLflow server."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import ClusterError, ConfigError
from rcnn.evaluate.predictions import Part, build_table, merge_parts, write_part
from rcnn.recipes import debug_tiny
from rcnn.registry import mlflow_store, register
from rcnn.registry.answers import remember_model
from rcnn.registry.champions import promote, roll_back
from rcnn.registry.outbox import outbox_of
from rcnn.registry.runs import open_run
from rcnn.results import EvaluateResult, IngestResult, RegisterResult, TrainResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import tracking_uri
from rcnn.train.checkpoint import build_classifier, save_model
from tests.registry.server import Server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server, started as the local stack starts it."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait()
    yield server.url
    server.stop()


@pytest.fixture(params=["sqlite", "server"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> PipelineConfig:
    uri = request.getfixturevalue("server") if request.param == "server" else ""
    name = f"model-{tmp_path.name}"
    return debug_tiny().with_settings(
        {"storage": str(tmp_path), "tracking.uri": uri, "tracking.model_name": name, "tracking.experiment": name}
    )


def trained(config: PipelineConfig, digits_storage: Path, digits: IngestResult, seed: int) -> TrainResult:
    """A model folder with fresh weights, and a training run for it."""
    storage = Storage(config.storage)
    torch.manual_seed(seed)
    folder = storage.local_path(f"runs/train-{seed}")
    (folder / "model").mkdir(parents=True, exist_ok=True)
    manifest = require_manifest(Storage(str(digits_storage)), digits.folder)
    shutil.copytree(digits_storage / digits.folder, storage.local_path(digits.folder), dirs_exist_ok=True)
    storage.write_json("digits.json", digits.model_dump(mode="json"))
    save_model(build_classifier(config, manifest).state_dict(), config, manifest, folder / "model")
    storage.write_json(f"runs/train-{seed}/history.json", [{"epoch": 1, "val/error": 0.5}])
    tracker = open_run(config, "train", key=f"runs/train-{seed}")
    tracker.finish()
    return TrainResult(
        mlflow_run_id=tracker.run_id, folder=f"runs/train-{seed}", weights_sha256=str(seed), val_error=0.5, best_epoch=1,
        epochs=1, num_parameters=4938, images_per_second=1, seconds=1,
    )  # fmt: skip


def same_rows(config: PipelineConfig) -> str:
    """The digest of a test's own rows: the looks at them are counted for all models of a server."""
    return hashlib.sha256(config.storage.encode()).hexdigest()


def evaluated(config: PipelineConfig, error: float, test_digest: str = "") -> EvaluateResult:
    """An evaluation of 500 rows, of which a model with fewer errors gets all right that another one does."""
    test_digest = test_digest or same_rows(config)
    target = StageFolder(Storage(config.storage), f"reports/{test_digest[:8]}-{error}")
    labels = np.arange(500) % 10
    answers = np.where(np.arange(500) < round(500 * error), (labels + 1) % 10, labels)
    table = build_table(
        [f"{row:03d}" for row in range(500)], labels, np.eye(10, dtype=np.float32)[answers], np.zeros(500)
    )
    write_part(target, part := Part(0, 0, 500), table)
    merge_parts(target, [part])
    return EvaluateResult(
        folder=target.name, metrics={"error": error, "loss": 1}, classes={}, num_rows=500,
        images_per_second=1, test_digest=test_digest,
    )  # fmt: skip


def registered(
    config: PipelineConfig, model: TrainResult, scored: EvaluateResult, target: StageFolder
) -> RegisterResult:
    """What the stage returns; the data set is the one that `trained` used."""
    data = IngestResult.model_validate(Storage(config.storage).read_json("digits.json"))
    return register.run_register(config, data, model, scored, None, target)


def test_a_better_model_takes_the_alias_and_a_worse_one_does_not(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    target = StageFolder(Storage(config.storage), "runs/register")
    cases = [
        (0.5, "", "champion"),
        (0.6, "", "challenger"),
        (0.4, "", "champion"),
        (0.1, "other rows", "challenger"),
    ]
    for version, (error, digest, alias) in enumerate(cases, start=1):
        result = registered(
            config, trained(config, digits_storage, digits, version), evaluated(config, error, digest), target
        )
        assert (result.version, result.alias) == (version, alias)
    champion = mlflow_store.champion_of(config)
    assert champion is not None
    assert (champion.version, champion.test_error) == (3, 0.4)
    versions = mlflow_store.list_versions(config)
    assert [(row["version"], row["aliases"]) for row in versions] == [
        ("4", "challenger"), ("3", "champion"), ("2", ""), ("1", "")
    ]  # fmt: skip


def test_exports_that_are_asked_for_are_in_the_training_run(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    run = trained(config, digits_storage, digits, 1)
    asking = config.with_settings({"tracking.export": "onnx"})
    registered(asking, run, evaluated(config, 0.5), StageFolder(Storage(config.storage), "runs/register"))
    client = MlflowClient(tracking_uri(config))
    assert [each.path for each in client.list_artifacts(run.mlflow_run_id, "exports")] == ["exports/model.onnx"]


@pytest.mark.parametrize("meets", ["_judged", "set_alias", "promoted_since"])
@pytest.mark.parametrize(("errors", "best"), [((0.4, 0.3), 2), ((0.3, 0.4), 1)])
def test_of_two_that_register_at_once_the_better_one_is_champion(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult, monkeypatch: pytest.MonkeyPatch,
    meets: str, errors: tuple[float, float], best: int,
) -> None:  # fmt: skip
    """The second registers as a whole while the first is about to judge, to take the alias, or to look for others."""
    target = StageFolder(Storage(config.storage), "runs/register")
    runs = [trained(config, digits_storage, digits, seed) for seed in (1, 2)]
    second: list[RegisterResult] = []
    home = register if meets == "_judged" else mlflow_store
    original = getattr(home, meets)

    def meet(*arguments: Any) -> Any:
        monkeypatch.setattr(home, meets, original)
        second.append(registered(config, runs[1], evaluated(config, errors[1]), target))
        return original(*arguments)

    monkeypatch.setattr(home, meets, meet)
    first = registered(config, runs[0], evaluated(config, errors[0]), target)
    assert (first.version, second[0].version) == (1, 2)
    champion = mlflow_store.champion_of(config)
    assert champion is not None
    assert champion.version == best
    if first.alias == "challenger":
        assert first.reason.startswith(
            "version 2, registered meanwhile, has fewer errors: 30.00 % test error against 40.00 %"
        )


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_a_version_names_its_network_and_the_settings_that_it_reads(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    wide = config.with_settings({"model.network": "wide", "model.t": 3, "tune.enabled": False})
    model = trained(wide, digits_storage, digits, 0)
    target = StageFolder(Storage(wide.storage), "runs/register-0")
    registered(wide, model, evaluated(config, 0.5), target)
    tags = MlflowClient(tracking_uri(wide)).get_model_version(wide.tracking.model_name, "1").tags
    assert (tags["network"], tags["k"], "t" in tags) == (f"WCNN-{wide.model.k}", str(wide.model.k), False)


def test_registering_twice_gives_one_version_that_stays_champion(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    target = StageFolder(Storage(config.storage), "runs/register")
    model = trained(config, digits_storage, digits, 1)
    first, second = (registered(config, model, evaluated(config, 0.5), target) for _ in range(2))
    assert (first.version, second.version, second.alias) == (1, 1, "champion")


def test_the_champion_can_be_fetched_and_scores(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult, tmp_path: Path
) -> None:
    import mlflow

    with pytest.raises(ConfigError, match=r"there is no registered model"):
        mlflow_store.find_version(config)
    scored = evaluated(config, 0.5).model_copy(update={"temperature": 1.75})
    model_of_training = trained(config, digits_storage, digits, 1)
    registered(config, model_of_training, scored, StageFolder(Storage(config.storage), "x"))
    found = mlflow_store.find_version(config)
    assert str(found) == f"{config.tracking.model_name} version 1 (champion)"
    folder = mlflow_store.download_model(config, found, tmp_path / "fetched")
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "model.json"}
    assert json.loads((folder / "model.json").read_text())["temperature"] == 1.75
    assert "temperature" not in Storage(config.storage).read_json(f"{model_of_training.folder}/model/model.json")
    mlflow.set_tracking_uri(tracking_uri(config))
    model = mlflow.pyfunc.load_model(f"models:/{config.tracking.model_name}@champion")
    for rows in (1, 7):
        answers = model.predict(np.zeros((rows, 1, 28, 28), np.uint8))
        assert [list(answer["probabilities"]) for answer in answers] == [[str(digit) for digit in range(10)]] * rows


def test_a_model_is_named_by_itself_an_alias_or_a_version(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    target, name = StageFolder(Storage(config.storage), "runs/register"), config.tracking.model_name
    for seed, error in ((1, 0.5), (2, 0.6)):
        registered(config, trained(config, digits_storage, digits, seed), evaluated(config, error), target)
    versions = {wanted: mlflow_store.find_version(config, wanted).version for wanted in (
        name, f"{name}@champion", f"{name}@challenger", f"{name}/1", f"{name}/2")}  # fmt: skip
    assert list(versions.values()) == [1, 1, 2, 1, 2]
    lists_versions, lists_models = f"`rcnn registry --model {name}`", f"Registered models: .*{name}"
    for wanted, fault in {
        f"{name}/3": f"has no version '3'.*{lists_versions}",
        f"{name}/x": f"has no version 'x'.*{lists_versions}",
        f"{name}@x": f"has no alias 'x'.*{lists_versions}",
        "other": f"there is no registered model 'other', and no such folder.*{lists_models}",
    }.items():
        with pytest.raises(ConfigError, match=fault):
            mlflow_store.find_version(config, wanted)


def test_the_command_says_which_model_answers(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = config.tracking.model_name
    place = StageFolder(Storage(config.storage), "runs/register")
    registered(config, trained(config, digits_storage, digits, 1), evaluated(config, 0.5), place)
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    settings = ["--set", f"storage={config.storage}", "--set", f"tracking.uri={config.tracking.uri}"]
    assert main(["predict", str(tmp_path / "x.png"), "--model", name, *settings]) == 0
    model, answer = capsys.readouterr().out.splitlines()
    assert model == f"model: {name} version 1 (champion), trained on mnist-sample"
    assert answer.startswith(f"{tmp_path / 'x.png'}: ")


PREDICT = """
import sys
from rcnn.cli import main
assert main(["predict", *sys.argv[1:]]) == 0
print("mlflow" in sys.modules)
"""


@pytest.mark.thorough
def test_predict_imports_mlflow_after_a_change_of_the_registry_alone(
    digits_storage: Path, digits: IngestResult, tmp_path: Path
) -> None:
    config = debug_tiny().with_settings({"storage": str(tmp_path)})
    place = StageFolder(Storage(config.storage), "runs/register")
    for seed in (1, 2):
        registered(config, trained(config, digits_storage, digits, seed), evaluated(config, 0.5), place)
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    command = [sys.executable, "-c", PREDICT, str(tmp_path / "x.png"), "--set", f"storage={config.storage}"]

    def predict() -> tuple[str, str]:
        """The version that answers, and whether MLflow was imported."""
        first, *_, last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert first.startswith("model: rcnn-mnist-sample version ")
        return first.split()[3], last

    remember_model(config, "rcnn-mnist-sample")
    assert predict() == ("1", "False")
    MlflowClient(tracking_uri(config)).set_registered_model_alias(
        "rcnn-mnist-sample", "champion", "2"
    )  # as its UI does
    assert [predict(), predict()] == [("2", "True"), ("2", "False")]


def test_versions_by_hand_are_listed_and_models_whose_files_are_gone_are_named(
    digits_storage: Path, digits: IngestResult, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = debug_tiny().with_settings({"storage": str(tmp_path)})
    target = StageFolder(Storage(config.storage), "runs/register")
    registered(config, trained(config, digits_storage, digits, 1), evaluated(config, 0.5), target)
    client = MlflowClient(tracking_uri(config))
    client.create_registered_model("clothes")
    client.create_model_version("clothes", str(tmp_path / "gone"), tags={"test_error": "high"})
    client.set_registered_model_alias("clothes", "champion", "1")
    place = ["--set", f"storage={config.storage}"]
    assert main(["registry", *place]) == 0
    printed = capsys.readouterr().out
    assert "clothes" in printed
    assert "high" in printed
    assert "50.00 %" in printed
    (tmp_path / "x.png").touch()
    assert main(["predict", "x.png", *place]) == 2
    assert "2 registered models: clothes, " in capsys.readouterr().err
    assert main(["predict", "x.png", "--model", "clothes", *place]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rcnn: ")]
    assert "clothes version 1 (champion): its files are not in " in error


def test_of_several_models_one_must_be_named(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    target, other = StageFolder(Storage(config.storage), "runs/register"), f"other-{config.tracking.model_name}"
    for number, name in enumerate((config.tracking.model_name, other), start=1):
        named = config.with_settings({"tracking.model_name": name})
        registered(named, trained(named, digits_storage, digits, number), evaluated(config, 0.5), target)
    anonymous = config.with_settings({"tracking.model_name": ""})
    with pytest.raises(ConfigError, match=rf"--model: there are \d+ registered models: .*{other}.*--model ") as caught:
        mlflow_store.find_version(anonymous)
    assert config.tracking.model_name in str(caught.value)
    assert mlflow_store.find_version(anonymous, other).name == other


def test_a_run_that_the_store_does_not_know_is_written_anew(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    model = trained(config, digits_storage, digits, 1).model_copy(update={"mlflow_run_id": "0" * 32})
    model = model.model_copy(update={"folder": "runs/other"})
    Path(config.storage, "runs/train-1").rename(Path(config.storage, model.folder))
    registered(config, model, evaluated(config, 0.5), StageFolder(Storage(config.storage), "x"))
    run_id = mlflow_store.list_versions(config)[0]["run_id"]
    history = MlflowClient(tracking_uri(config)).get_metric_history(run_id, "val/error")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5)]


def test_a_model_whose_result_names_no_run_is_registered_under_the_run_of_its_key(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    model = trained(config, digits_storage, digits, 1)
    nameless = model.model_copy(update={"mlflow_run_id": ""})  # MLflow was away when the stage ended
    registered(config, nameless, evaluated(config, 0.5), StageFolder(Storage(config.storage), "x"))
    assert mlflow_store.list_versions(config)[0]["run_id"] == model.mlflow_run_id


def test_a_resumed_stage_goes_on_in_its_run_and_a_fresh_one_does_not(config: PipelineConfig) -> None:
    parent = open_run(config, "pipeline", key="p")
    first = open_run(config, "train", key="k", parent=parent.id, tags={"a": "1"})
    first.log_metrics({"val/error": 0.5}, step=1)
    first.finish(failed=True)
    again = open_run(config, "train", key="k", parent=parent.id, tags={"a": "2"})
    again.log_metrics({"val/error": 0.4}, step=2)
    twins = [again.child("trial-00") for _ in range(2)]
    again.finish()
    assert again.run_id == first.run_id
    assert twins[0].run_id == twins[1].run_id
    fresh = open_run(config, "train", key="k", fresh=True)
    fresh.finish()
    assert fresh.run_id != first.run_id
    client = MlflowClient(tracking_uri(config))
    assert [metric.step for metric in client.get_metric_history(first.run_id, "val/error")] == [1, 2]
    run = client.get_run(first.run_id)
    assert (run.info.status, run.data.tags["a"], run.data.tags["mlflow.parentRunId"]) == (
        "FINISHED",
        "2",
        parent.run_id,
    )
    assert run.data.params["train.batch_size"] == "32"


def test_what_a_killed_search_left_open_is_closed_and_a_trial_that_runs_again_is_running(
    config: PipelineConfig,
) -> None:
    search, other = (open_run(config, "tune", key=key) for key in ("s", "another"))
    trials = [search.child(f"trial-{number:02d}") for number in range(4)]
    others = other.child("trial-03")
    trials[0].finish()
    trials[1].finish(failed=True)
    search.close_children({"trial-00": {"outcome": "no longer"}, "trial-02": {"outcome": "stopped early"}})
    search.child("trial-01")
    outbox_of(config).flush()
    client = MlflowClient(tracking_uri(config))
    runs = [client.get_run(run.run_id) for run in (*trials, others)]
    assert [run.info.status for run in runs] == ["FINISHED", "RUNNING", "FINISHED", "FAILED", "RUNNING"]
    assert [run.data.tags.get("outcome") for run in runs] == [None, None, "stopped early", None, None]


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    config = debug_tiny().with_settings({"storage": str(tmp_path), "tracking.uri": "http://127.0.0.1:9"})
    for call in (mlflow_store.champion_of, mlflow_store.list_versions):
        with pytest.raises(
            ClusterError, match=r"tracking\.uri = http://127\.0\.0\.1:9: MLflow failed \(Connection refused\)"
        ):
            call(config)


def three_versions(config: PipelineConfig, digits_storage: Path, digits: IngestResult) -> list[RegisterResult]:
    """The first one; one that is a little better, which may be chance; one that is clearly better."""
    target = StageFolder(Storage(config.storage), "runs/register")
    return [
        registered(config, trained(config, digits_storage, digits, number), evaluated(config, error), target)
        for number, error in enumerate((0.5, 0.494, 0.4), start=1)
    ]


def trained_before(config: PipelineConfig, seed: int) -> TrainResult:
    """The model of `trained`, which is there already."""
    return TrainResult(
        folder=f"runs/train-{seed}", weights_sha256=str(seed), val_error=0.5, best_epoch=1, epochs=1, num_parameters=4938,
        images_per_second=1, seconds=1,
    )  # fmt: skip


def registry(config: PipelineConfig, *arguments: str) -> int:
    settings = ("storage", "tracking.uri", "tracking.model_name")
    places = {"storage": config.storage, **{f"tracking.{name}": value for name, value in config.tracking}}
    return main(["registry", *arguments, *(w for name in settings for w in ("--set", f"{name}={places[name]}"))])


def test_a_verdict_can_be_read_and_changed_by_hand_and_taken_back(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult, capsys: pytest.CaptureFixture[str]
) -> None:
    results = three_versions(config, digits_storage, digits)
    assert [result.alias for result in results] == ["champion", "challenger", "champion"]
    assert "3 of 500 rows are right here and wrong there, 0 the other way round: p = 0.12 (look 1" in results[1].reason
    assert "look 2 at these rows needs 0.0072 or less" in results[2].reason

    assert registry(config, "explain", "3") == 0
    explained = capsys.readouterr().out
    for words in ("version 3 (champion)", "verdict: champion. better: 40.00 %", "2 looks", "of 0.05 spent"):
        assert words in explained
    assert registry(config, "promote", "2", "--reason", "half the size") == 0
    assert "version 2 is now the champion" in capsys.readouterr().out
    assert registry(config, "explain", "2") == 0
    assert "promoted by hand: half the size" in capsys.readouterr().out
    for old, new in ((2, 3), (3, 1)):
        assert registry(config, "rollback", "--reason", "slower") == 0
        assert f"version {new} is the champion again, version {old} no longer" in capsys.readouterr().out
    assert registry(config, "rollback") == 2
    assert "version 1 has no champion before it that still exists" in capsys.readouterr().err
    assert registry(config) == 0
    assert "rolled back by hand: slower" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_what_a_person_decided_stands_when_a_model_is_registered_again(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    target = StageFolder(Storage(config.storage), "runs/register")
    three_versions(config, digits_storage, digits)
    roll_back(config, "slower")
    clear, first = (trained_before(config, number) for number in (3, 1))
    again = registered(config, clear, evaluated(config, 0.4), target)
    assert again.alias == "challenger"
    assert again.reason.startswith("it was rolled back by hand: slower")
    assert registered(config, first, evaluated(config, 0.5), target).reason == "it already was the champion"
    champion = mlflow_store.champion_of(config)
    assert champion is not None
    assert champion.version == 1
    promote(config, 2, "why not")
    assert mlflow_store.champions_so_far(config) == [1, 2]
    assert registered(config, first, evaluated(config, 0.5), target).alias == "challenger"


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_another_name_for_the_model_buys_no_other_budget(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    other = config.with_settings({"tracking.model_name": "other"})
    for named in (config, other):
        three_versions(named, digits_storage, digits)
    assert mlflow_store.num_looks(config, same_rows(config)) == 4
    assert mlflow_store.list_models(config) == [config.tracking.model_name, "other"]


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_a_comparison_is_made_and_paid_for_once(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult
) -> None:
    target = StageFolder(Storage(config.storage), "runs/register")
    models = [trained(config, digits_storage, digits, number) for number in (1, 2)]
    registered(config, models[0], evaluated(config, 0.5), target)
    first, second = (registered(config, models[1], evaluated(config, 0.494), target) for _ in range(2))
    assert (first.alias, first.reason) == (second.alias, second.reason)
    assert mlflow_store.num_looks(config, same_rows(config)) == 1


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["promote", "1"], "promote: needs --reason"),
        (["promote", "1", "--reason", " "], "promote: needs --reason"),
        (["promote", "1", "--reason", "x"], "version 1 already is the champion"),
        (["promote", "--reason", "x"], "promote: needs a version"),
        (["explain"], "explain: needs a version"),
        (["explain", "7"], "has no version 7"),
        (["rollback", "1"], "rollback: takes no version, and got 1"),
        (["list", "--reason", "x"], "--reason: is only for promote and rollback"),
    ],
)
def test_what_an_action_lacks_is_named(
    config: PipelineConfig, digits_storage: Path, digits: IngestResult, capsys: pytest.CaptureFixture[str],
    arguments: list[str], fault: str,
) -> None:  # fmt: skip
    target = StageFolder(Storage(config.storage), "runs/register")
    registered(config, trained(config, digits_storage, digits, 1), evaluated(config, 0.5), target)
    assert registry(config, *arguments) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.thorough
def test_a_server_that_goes_away_while_it_registers_is_waited_for(
    digits_storage: Path, digits: IngestResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    server.wait()
    config = debug_tiny().with_settings({"storage": str(tmp_path), "tracking.uri": server.url})
    model, scored = trained(config, digits_storage, digits, 1), evaluated(config, 0.5)
    set_alias = mlflow_store.set_alias

    def set_alias_of_a_server_that_is_gone(*arguments: Any) -> None:
        monkeypatch.setattr(mlflow_store, "set_alias", set_alias)
        server.stop()
        try:
            set_alias(*arguments)
        finally:
            server.start()

    monkeypatch.setattr(mlflow_store, "set_alias", set_alias_of_a_server_that_is_gone)
    try:
        result = registered(config, model, scored, StageFolder(Storage(config.storage), "runs/register"))
        assert (result.version, result.alias) == (1, "champion")
        assert [row["aliases"] for row in mlflow_store.list_versions(config, result.model_name)] == ["champion"]
    finally:
        server.stop()
