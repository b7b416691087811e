"""The whole flow on real digits, with a real Prefect server, Ray and MLflow."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.errors import SourceError
from rcnn.plan.bill import bill_of
from rcnn.recipes import debug_tiny
from rcnn.results import EvaluateResult, RegisterResult
from rcnn.stages import STAGES, Parent, Stage, finished, finished_pipeline, results_from_json
from rcnn.summary import print_summary, summary_lines
from rcnn.tracking import tracking_uri

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("prefect_server", "ray_session")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    return debug_tiny().with_settings({"storage": str(tmp_path_factory.mktemp("pipeline"))})


@pytest.fixture(scope="module")
def trees(config: PipelineConfig, prefect_server: None, ray_session: None) -> dict[str, Any]:
    """The first run of the flow, from nothing."""
    from flows.full_pipeline import full_pipeline

    return full_pipeline(config)  # type: ignore[no-any-return]


def runs_by_name(config: PipelineConfig) -> dict[str, Any]:
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("rcnn/mnist-sample")
    # A stage's run is named `train RCNN-8 T=1 52.00 % val`, and that of the pipeline `RCNN-8 T=1 54.20 %`.
    runs = {run.info.run_name.split()[0]: run for run in client.search_runs([experiment.experiment_id])}
    return {"pipeline" if name.startswith("RCNN") else name: run for name, run in runs.items()}


def test_each_stage_leaves_a_result_and_every_test_row_is_counted_once(trees: dict[str, Any]) -> None:
    assert list(trees) == list(STAGES)
    evaluated = results_from_json(trees)["evaluate"]
    assert isinstance(evaluated, EvaluateResult)
    assert evaluated.num_rows == 500


def test_the_hint_asks_the_model_that_was_registered(
    config: PipelineConfig, trees: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(config, trees)
    printed = capsys.readouterr().out
    [hint] = [line for line in printed.splitlines() if "rcnn predict" in line]
    for line in summary_lines(config, trees):  # the same table in a flow's log
        assert " ".join(line.split()) in " ".join(printed.replace("│", " ").split())
    assert f" --model {results_from_json(trees)['register'].model_name} " in hint
    assert f"--set storage={config.storage} " in hint


def test_mlflow_holds_the_runs_nested_with_metrics_by_epoch(config: PipelineConfig, trees: dict[str, Any]) -> None:
    runs = runs_by_name(config)
    assert set(runs) == {"pipeline", "ingest", "tune", "trial-00", "trial-01", "train", "evaluate", "audit"}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    pipeline, tune = runs["pipeline"].info.run_id, runs["tune"].info.run_id
    assert parents == dict.fromkeys(("ingest", "tune", "train", "evaluate", "audit"), pipeline) | dict.fromkeys(
        ("trial-00", "trial-01"), tune
    ) | {"pipeline": None}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    client = MlflowClient(tracking_uri(config))
    history = client.get_metric_history(runs["train"].info.run_id, "val/error")
    assert [metric.step for metric in history] == [1, 2]
    assert runs["train"].data.params["model.k"] == "8"
    assert runs["evaluate"].data.metrics["test/error"] == trees["evaluate"]["metrics"]["error"]
    assert "rcnn.prefect_flow_run" in runs["train"].data.tags


def test_the_row_of_a_pipeline_says_which_model_it_is_how_good_and_how_to_get_it(
    config: PipelineConfig, trees: dict[str, Any]
) -> None:
    run, results = runs_by_name(config)["pipeline"], results_from_json(trees)
    trained, evaluated, registered = (results[name] for name in ("train", "evaluate", "register"))
    chosen = results["tune"].applied_to(config)
    assert run.info.run_name == f"{chosen.model.short_title} {100 * evaluated.test_error:.2f} %"
    low, high = evaluated.error_interval
    figures = {
        "test/error": evaluated.test_error, "test/error_low": low, "test/error_high": high,
        "best/val/error": trained.val_error, "model/parameters": trained.num_parameters,
        "cost/seconds": sum(result.seconds for result in results.values()),
    }  # fmt: skip
    assert {name: run.data.metrics[name] for name in figures} == pytest.approx(figures)
    assert run.data.metrics["cost/cpu_hours"] > 0
    assert [run.data.params[name] for name in ("model.k", "model.t")] == [str(chosen.model.k), str(chosen.model.t)]
    assert [noted.dataset.name for noted in run.inputs.dataset_inputs] == ["mnist-sample"]
    assert [model.model_id for model in run.outputs.model_outputs] == [registered.model_id]
    assert run.data.tags["rcnn.registered"] == "rcnn-mnist-sample/1"
    text = run.data.tags["mlflow.note.content"]
    for words in (
        evaluated.written_error,
        "champion: there was no champion",
        'rcnn.load_model("models:/rcnn-mnist-sample/1")',
    ):
        assert words in text


def test_every_run_is_described_and_has_the_load_of_the_machine(config: PipelineConfig, trees: dict[str, Any]) -> None:
    runs = runs_by_name(config)
    for name, run in runs.items():
        assert len(run.data.tags["mlflow.note.content"]) > 20, name
    for name in ("ingest", "tune", "train", "evaluate", "audit"):
        assert runs[name].data.metrics["system/system_memory_usage_megabytes"] > 0


def test_a_training_and_a_trial_have_the_same_parameters_and_data(
    config: PipelineConfig, trees: dict[str, Any]
) -> None:
    runs = runs_by_name(config)
    trial, trained = runs["trial-01"], runs["train"]
    assert set(trial.data.params) == set(trained.data.params) - {"num_parameters"}  # which is not a setting
    assert trial.inputs.dataset_inputs[0].dataset == trained.inputs.dataset_inputs[0].dataset
    assert runs["trial-00"].info.end_time < runs["tune"].info.end_time
    assert runs["trial-00"].info.start_time != trial.info.start_time


def test_the_training_run_and_the_version_have_the_card_and_the_figures(
    config: PipelineConfig, trees: dict[str, Any]
) -> None:
    client, results = MlflowClient(tracking_uri(config)), results_from_json(trees)
    run = client.get_run(results["train"].mlflow_run_id)
    version = client.get_model_version("rcnn-mnist-sample", "1")
    assert run.data.tags["mlflow.note.content"] == version.description
    for heading in ("### Load it", "### Figures", "### Limits", "### Data", "### Recipe"):
        assert heading in version.description
    low, high = results["evaluate"].error_interval
    assert (run.data.metrics["test/error_low"], run.data.metrics["test/error_high"]) == (low, high)
    of_model = client.get_logged_model(results["register"].model_id).metrics
    found = {metric.key: (metric.value, metric.dataset_name) for metric in of_model or []}
    assert (found["test/error_low"], found["test/error_high"]) == ((low, "mnist-sample"), (high, "mnist-sample"))


def test_mlflow_knows_which_data_each_run_read(config: PipelineConfig, trees: dict[str, Any]) -> None:
    runs = runs_by_name(config)
    for name, context in (("ingest", "ingest"), ("train", "training"), ("evaluate", "testing")):
        [noted] = runs[name].inputs.dataset_inputs
        assert noted.tags[0].value == context
        assert noted.dataset.name == "mnist-sample"
        assert noted.dataset.digest == trees["ingest"]["digest"][:36]
        assert json.loads(noted.dataset.profile)["digest"] == trees["ingest"]["digest"]
        assert json.loads(noted.dataset.source)["uri"].endswith(trees["ingest"]["folder"])


def test_the_registered_champion_scores_batches_of_1_and_7(config: PipelineConfig, trees: dict[str, Any]) -> None:
    mlflow.set_tracking_uri(tracking_uri(config))
    model = mlflow.pyfunc.load_model("models:/rcnn-mnist-sample@champion")
    images = np.random.default_rng(0).integers(0, 256, (7, 1, 28, 28), dtype=np.uint8)
    seven, one = (
        [list(each["probabilities"].values()) for each in model.predict(some)] for some in (images, images[:1])
    )
    assert np.shape(seven) == (7, 10)
    np.testing.assert_allclose(np.sum(seven, 1), 1, rtol=1e-5)
    np.testing.assert_allclose(one, seven[:1], rtol=1e-4)
    assert model.metadata.metadata == {"classes": [str(digit) for digit in range(10)], "image_shape": [28, 28, 1]}
    registered = results_from_json(trees)["register"]
    assert isinstance(registered, RegisterResult)
    version = MlflowClient(tracking_uri(config)).get_model_version_by_alias("rcnn-mnist-sample", "champion")
    assert int(version.version) == registered.version == 1
    assert float(version.tags["test_error"]) == trees["evaluate"]["metrics"]["error"]
    assert version.run_id == trees["train"]["mlflow_run_id"]


def test_the_report_has_its_pictures(config: PipelineConfig, trees: dict[str, Any]) -> None:
    folder = Path(config.storage, trees["evaluate"]["folder"])
    for picture in ("confusion.png", "training.png", "samples/007-7.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert "| test error |" in (folder / "report.md").read_text()


def test_prefect_shows_an_artifact_for_each_stage(trees: dict[str, Any]) -> None:
    from prefect.client.orchestration import get_client

    async def keys() -> set[str | None]:
        async with get_client() as client:
            return {artifact.key for artifact in await client.read_artifacts()}

    assert {f"rcnn-{name}" for name in STAGES} <= asyncio.run(keys())


def test_a_rerun_does_nothing_and_says_so(
    config: PipelineConfig, trees: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.full_pipeline import full_pipeline

    before = {name: run.info.end_time for name, run in runs_by_name(config).items()}
    assert full_pipeline(config) == trees
    said = capfd.readouterr().err
    for name in STAGES:
        assert said.count(f"{name}: nothing to do") == 1
    assert {name: run.info.end_time for name, run in runs_by_name(config).items()} == before


RERUN = """
import sys
from rcnn.cli import main
assert main(sys.argv[1:]) == 0
print("imported:", [name for name in ("torch", "ray", "mlflow", "prefect", "flows") if name in sys.modules])
"""


def test_the_command_starts_no_flow_run_where_every_stage_is_done(
    config: PipelineConfig, trees: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", RERUN, "pipeline", "--config", str(tmp_path / "config.json")]
    nowhere = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:1/api"}  # a flow run would fail
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, check=True)
    assert "imported: []" in done.stdout
    assert "rcnn-mnist-sample version 1, champion" in done.stdout
    assert done.stderr.count("nothing to do") == len(STAGES)
    assert "pipeline: every stage is done, so no flow run was started" in done.stderr


def test_another_training_reuses_data_and_becomes_a_challenger_or_champion(
    config: PipelineConfig, trees: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.full_pipeline import full_pipeline

    other = full_pipeline(config.with_settings({"train.momentum": 0.8, "tune.enabled": False}))
    said = capfd.readouterr().err
    assert "ingest: nothing to do" in said
    assert "tune" not in other
    better = other["evaluate"]["metrics"]["error"] < trees["evaluate"]["metrics"]["error"]
    assert other["register"]["alias"] == ("champion" if better else "challenger")
    assert other["register"]["version"] == 2


def test_a_result_that_is_gone_is_made_again(config: PipelineConfig, trees: dict[str, Any]) -> None:
    from flows.full_pipeline import full_pipeline

    folder = Path(config.storage, trees["evaluate"]["folder"])
    (folder / "report.md").unlink()
    full_pipeline(config)
    assert (folder / "report.md").exists()
    (folder / "predictions.parquet").unlink()
    again = full_pipeline(config)
    assert (folder / "predictions.parquet").exists()
    assert again["evaluate"]["metrics"]["error"] == trees["evaluate"]["metrics"]["error"]
    assert again["register"] == trees["register"]


NEW_STAGE = """
from pathlib import Path
from rcnn.results import StageResult

def end(config, result):
    with open(Path(config.storage, "ends.txt"), "a") as file:
        print(result.rows, file=file)

class CountResult(StageResult):
    rows: int

    def highlights(self, locate):
        return {"counted": f"{self.rows} rows in " + locate("x")}

def run_count(config, data, evaluated, target, tracker):
    tracker.log_metrics({"rows/counted": evaluated.num_rows})
    target.storage.write_text(target.path("rows.txt"), str(evaluated.num_rows))
    return CountResult(rows=evaluated.num_rows + data.rows["train"])
"""


def test_a_new_stage_is_one_row(
    config: PipelineConfig, trees: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], reread_code: Callable[[], None],
) -> None:  # fmt: skip
    from flows.full_pipeline import full_pipeline

    (tmp_path / "counting.py").write_text(NEW_STAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = Stage(
        help="count rows", run="counting:run_count", result="counting:CountResult", takes=("ingest", "evaluate"),
        settings=("seed",), identity=lambda config, results: [results["evaluate"].test_digest],
        purpose=lambda config: "counting", folder="runs", label=lambda config: "count", whole=("rows.txt",),
        on_cluster=lambda config: False, at_end="counting:end",
    )  # fmt: skip
    monkeypatch.setitem(STAGES, "count", row)
    assert {item.name: item.status.state for item in bill_of(config).items}["count"] == "runs"
    grown = full_pipeline(config)
    assert grown["count"]["rows"] == 500 + trees["ingest"]["rows"]["train"]
    assert runs_by_name(config)["count"].data.metrics["rows/counted"] == 500
    assert full_pipeline(config) == grown
    assert bill_of(config).is_done
    assert Path(config.storage, "ends.txt").read_text().split() == [str(grown["count"]["rows"])]
    said = capfd.readouterr().err
    assert "count: counting" in said
    assert "count: nothing to do" in said
    print_summary(config, grown)
    assert f"{grown['count']['rows']} rows in" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main(["count", "--help"])
    assert "Count rows." in capfd.readouterr().out
    (tmp_path / "counting.py").write_text(NEW_STAGE.replace("evaluated.num_rows + data", "evaluated.num_rows - data"))
    reread_code()
    assert finished(config, "count", results_from_json(grown)) is None


@pytest.mark.parametrize(("retryable", "attempts"), [(False, 1), (True, 4)])
def test_only_what_may_pass_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retryable: bool, attempts: int
) -> None:
    from flows import stages as flow_stages
    from flows.full_pipeline import full_pipeline

    calls: list[str] = []

    def fail(config: PipelineConfig, name: str, *_: Any, **__: Any) -> None:
        calls.append(name)
        raise SourceError("the network is down", retryable=retryable)

    monkeypatch.setattr(flow_stages, "run_stage", fail)
    impatient = flow_stages.task_of("ingest").with_options(retry_delay_seconds=0)
    monkeypatch.setattr("flows.full_pipeline.task_of", lambda name: impatient)
    with pytest.raises(SourceError, match="the network is down"):
        full_pipeline(debug_tiny().with_settings({"storage": str(tmp_path)}))
    assert calls == ["ingest"] * attempts


def test_the_error_of_a_stage_comes_out_of_the_flow(tmp_path: Path) -> None:
    from flows.full_pipeline import full_pipeline

    config = debug_tiny().with_settings({"storage": str(tmp_path), "data.source": "mnist", "data.root": str(tmp_path)})
    with pytest.raises(SourceError, match="holds none of the files of mnist"):
        full_pipeline(config)
    assert [run.info.status for run in _runs(config, "rcnn/mnist")] == ["FAILED", "FAILED"]


def test_a_cancelled_flow_stops_its_jobs_and_a_crashed_one_leaves_them() -> None:
    """The retry of a crashed flow attaches to them."""
    from flows.full_pipeline import full_pipeline
    from flows.jobs import stop_jobs_of
    from flows.notify import notify

    assert full_pipeline.on_cancellation_hooks == [stop_jobs_of, notify]
    assert full_pipeline.on_crashed_hooks == [notify]


def test_prefects_own_cache_answers_a_rerun(config: PipelineConfig, trees: dict[str, Any]) -> None:
    from prefect import flow

    from flows.stages import task_of

    @flow
    def ingest_again() -> str:
        state = task_of("ingest")(
            config=config, name="ingest", trees={}, fresh=False, parent=Parent(), return_state=True
        )
        return str(state.name)

    assert ingest_again() == "Cached"


def test_a_registry_that_is_gone_is_filled_again(config: PipelineConfig, trees: dict[str, Any]) -> None:
    from flows.full_pipeline import full_pipeline

    results = results_from_json({name: tree for name, tree in trees.items() if name != "register"})
    assert finished(config, "register", results) is not None
    MlflowClient(tracking_uri(config)).delete_registered_model("rcnn-mnist-sample")
    assert finished(config, "register", results) is None
    assert finished_pipeline(config) is None
    assert full_pipeline(config)["register"]["alias"] == "champion"


def _runs(config: PipelineConfig, experiment: str) -> list[Any]:
    client = MlflowClient(tracking_uri(config))
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))
