"""Notes for MLflow wait in the storage while it is away, and arrive once each and in order."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.progress import show_on_screen
from rcnn.recipes import debug_tiny
from rcnn.registry import outbox
from rcnn.registry.mlflow_store import RunWriter, create_store, find_run
from rcnn.registry.outbox import num_waiting, outbox_of, send_waiting, wait_for_mlflow
from rcnn.registry.runs import open_run
from rcnn.registry.system_metrics import sampling
from rcnn.storage import Storage
from rcnn.tracking import tracking_uri
from tests.registry.server import free_port

pytestmark = pytest.mark.long

SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit what other tests have started in this process


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return debug_tiny().with_settings({"storage": str(tmp_path / "storage")})


@pytest.fixture
def away(config: PipelineConfig) -> PipelineConfig:
    """The same, with an address at which nothing listens."""
    return config.with_settings({"tracking.uri": f"http://127.0.0.1:{free_port()}"})


@pytest.fixture
def hanging(config: PipelineConfig) -> Iterator[PipelineConfig]:
    """The same, with a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield config.with_settings({"tracking.uri": f"http://127.0.0.1:{listener.getsockname()[1]}"})


def runs_of(config: PipelineConfig) -> dict[str, Any]:
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("rcnn/mnist-sample")
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs), "a run was made twice"
    return {run.info.run_name: run for run in runs}


def curve(config: PipelineConfig, run: Any, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri(config)).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in history]


SUMMARY = {
    "name": "d", "digest": "0" * 64, "source": {}, "image_shape": [2, 2, 1], "classes": ["a"], "rows": {}, "skipped": 0,
    "split_digests": {},
}  # fmt: skip


def report_everything(config: PipelineConfig, folder: Path) -> None:
    """Every kind of note: a search under a pipeline, and a trial that a killed attempt left open."""
    folder.mkdir(exist_ok=True)
    (folder / "picture.png").write_bytes(b"png")
    pipeline = open_run(config, "pipeline", key="p")
    search = open_run(config, "tune", key="t", parent=pipeline.id, tags={"label": "1"})
    search.log_data(SUMMARY, "s3://bucket/d", context="training")
    search.child("trial-01")
    search.child("trial-02")
    trial = search.child("trial-00")
    trial.log_params({"k": 3})
    for step in (1, 2, 3):
        trial.log_metrics({"val/error": 1 / step, "train/loss": float("nan")}, step=step)
    trial.finish()
    search.close_children({"trial-01": {"outcome": "finished"}})
    search.log_files(folder)
    search.finish()
    pipeline.finish()


def check_everything(config: PipelineConfig) -> None:
    runs = runs_of(config)
    assert {name: run.info.status for name, run in runs.items()} == {
        "pipeline": "FINISHED", "tune": "FINISHED", "trial-00": "FINISHED", "trial-01": "FINISHED", "trial-02": "FAILED",
    }  # fmt: skip
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parents["pipeline"] is None
    assert parents["tune"] == runs["pipeline"].info.run_id
    assert {parents[f"trial-0{number}"] for number in range(3)} == {runs["tune"].info.run_id}
    assert curve(config, runs["trial-00"], "val/error") == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    assert [step for step, _ in curve(config, runs["trial-00"], "train/loss")] == [1, 2, 3]
    assert runs["trial-00"].data.params == {"k": "3"}
    assert {runs[f"trial-0{number}"].inputs.dataset_inputs[0].dataset.name for number in range(3)} == {"d"}
    assert runs["trial-01"].data.tags["outcome"] == "finished"
    assert runs["tune"].data.tags["label"] == "1"
    assert runs["tune"].data.params["train.batch_size"] == "32"
    assert len(runs["tune"].inputs.dataset_inputs) == 1
    client = MlflowClient(tracking_uri(config))
    assert [file.path for file in client.list_artifacts(runs["tune"].info.run_id)] == ["picture.png"]
    assert num_waiting(config) == 0
    assert not any(Path(config.storage, outbox.FOLDER).iterdir()), "files of notes are left"


def in_process(work: Callable[..., None], *arguments: object) -> int:
    """The exit code of a process that does the work; this one keeps no thread that sends."""
    process = SPAWN.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def send_and_die(config: PipelineConfig, num_notes: int) -> None:
    """Sends some notes, and is killed before it can delete the last of them."""
    deletions, delete = [], Storage.delete_file

    def delete_or_die(storage: Storage, name: str) -> None:
        deletions.append(name)
        if len(deletions) == num_notes:
            os.kill(os.getpid(), signal.SIGKILL)
        delete(storage, name)

    Storage.delete_file = delete_or_die  # type: ignore[method-assign]
    send_waiting(config)


@pytest.mark.thorough
def test_a_sender_that_is_killed_before_it_deletes_a_note_leaves_no_duplicate(
    config: PipelineConfig, away: PipelineConfig, tmp_path: Path
) -> None:
    assert in_process(report_everything, away, tmp_path / "files") == 0
    create_store(config)
    for num_notes in (1, 12, 6):  # after a run was made, in the middle of a curve, and at the end
        before = num_waiting(config)
        assert in_process(send_and_die, config, num_notes) == -signal.SIGKILL
        assert num_waiting(config) == before - num_notes + 1
    assert in_process(send_waiting, config) == 0
    check_everything(config)


def test_a_note_that_is_written_twice_changes_nothing(
    config: PipelineConfig, away: PipelineConfig, tmp_path: Path
) -> None:
    assert in_process(report_everything, away, tmp_path / "files") == 0
    folder = Path(config.storage, outbox.FOLDER)
    for note in sorted(folder.glob("*.json")):
        for _ in range(2):  # each time by one that knows nothing yet
            RunWriter(config).write(json.loads(note.read_text()), note.with_suffix(""))
    shutil.rmtree(folder)
    folder.mkdir()
    check_everything(config)


@pytest.mark.thorough
def test_processes_that_send_the_same_notes_at_once_send_each_once(
    config: PipelineConfig, away: PipelineConfig, tmp_path: Path
) -> None:
    assert in_process(report_everything, away, tmp_path / "files") == 0
    create_store(config)
    senders = [SPAWN.Process(target=send_waiting, args=(config,)) for _ in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
        assert sender.exitcode == 0
    check_everything(config)


def test_a_stage_does_not_wait_for_a_server_that_is_away_or_hangs(
    away: PipelineConfig,
    hanging: PipelineConfig,
    config: PipelineConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_on_screen()
    for number, gone in enumerate((away, hanging)):
        run = open_run(gone, "train", key=f"k{number}")
        started = time.monotonic()
        for step in range(20):
            run.log_metrics({"val/error": 0.5}, step=step)
        assert time.monotonic() - started < outbox.SECONDS_TO_TAKE_A_NOTE
        run.finish()
        assert time.monotonic() - started < 2 * outbox.SECONDS_TO_TAKE_A_NOTE
        assert run.run_id == ""
    said = capsys.readouterr().err
    assert said.count("Notes for MLflow are kept in") == 1  # the one that hangs has not failed yet
    assert (
        f"tracking.uri = {away.tracking.uri}: MLflow failed (Connection refused). Notes for MLflow are kept in " in said
    )
    send_waiting(away)
    assert (
        f"44 notes for MLflow wait in {config.storage}/outbox (MLflow failed (Connection refused))"
        in capsys.readouterr().err
    )


def test_a_stage_that_ended_while_mlflow_was_away_is_done_and_a_corrected_address_gets_its_notes(
    config: PipelineConfig, away: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ingest", "--recipe", "debug_tiny", "--set", f"storage={config.storage}"]
    assert main([*command, "--set", f"tracking.uri={away.tracking.uri}"]) == 0
    assert "the next command on this storage sends them" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "ingest: nothing to do" in printed.err
    assert num_waiting(config) == 0
    result = json.loads(printed.out)
    assert result["mlflow_run_id"] == ""
    run = runs_of(config)["ingest mnist-sample"]
    assert (run.info.status, run.data.metrics["rows/test"]) == ("FINISHED", 500)
    assert find_run(config, "", key=result["folder"]) == run.info.run_id
    assert run.info.end_time - run.info.start_time < 60_000  # as it ran, not as it was sent


def test_a_run_that_is_resumed_keeps_one_point_for_each_step_and_gets_those_that_were_lost(
    config: PipelineConfig,
) -> None:
    first = open_run(config, "train", key="k")
    first.log_metrics({"val/error": 0.5}, step=1)
    first.log_metrics({"val/error": 0.4}, step=2)
    first.finish(failed=True)
    resumed = open_run(config, "train", key="k")
    resumed.log_metrics({"val/error": 0.41}, step=2)  # of an epoch whose checkpoint was not written any more
    resumed.log_metrics({"val/error": 0.2}, step=4)
    resumed.log_history([{"epoch": epoch, "val/error": 0.1} for epoch in (1, 2, 3, 3.5)])
    resumed.finish()
    assert resumed.run_id == first.run_id
    assert sorted(curve(config, runs_of(config)["train"], "val/error")) == [(1, 0.5), (2, 0.4), (3, 0.1), (4, 0.2)]


def test_an_experiment_has_a_view_and_keeps_what_people_make_of_it(config: PipelineConfig) -> None:
    def tags() -> dict[str, str]:
        return MlflowClient(tracking_uri(config)).get_experiment_by_name("rcnn/mnist-sample").tags  # type: ignore[no-any-return]

    open_run(config, "train", key="k").finish()
    view = json.loads(tags()["mlflow.sharedViewState.rcnn"])
    assert {"metrics.`test/error`", "params.`model.k`", "attributes.`Dataset`"} <= set(view["selectedColumns"])
    assert "test error" in tags()["mlflow.note.content"]
    experiment = MlflowClient(tracking_uri(config)).get_experiment_by_name("rcnn/mnist-sample").experiment_id
    MlflowClient(tracking_uri(config)).set_experiment_tag(experiment, "mlflow.note.content", "ours")
    open_run(config, "train", key="l").finish()
    assert tags()["mlflow.note.content"] == "ours"


def test_a_run_may_be_renamed_and_has_one_model_however_often_it_is_named(config: PipelineConfig) -> None:
    run = open_run(config, "pipeline demo", key="p", text="to come")
    run.finish()
    client = MlflowClient(tracking_uri(config))
    made = client.create_logged_model(client.get_run(run.run_id).info.experiment_id, name="model")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "to come"
    for _ in range(2):
        run.log_model(made.model_id)
    run.describe("x" * 9000, name="RCNN-8 T=1 2.40 %")
    run.finish()
    stored = runs_of(config)["RCNN-8 T=1 2.40 %"]
    assert [each.model_id for each in stored.outputs.model_outputs] == [made.model_id]
    assert stored.data.tags["mlflow.note.content"] == "x" * 7900
    assert num_waiting(config) == 0


def test_the_load_of_the_machine_goes_on_where_a_resumed_stage_left_off(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rcnn.registry.system_metrics.SECONDS_BETWEEN_SAMPLES", 0.05)
    for has_failed, until in ((True, 2), (False, 4)):
        run = open_run(config, "train", key="k")
        name = "system/cpu_utilization_percentage"

        def num_points(tracker: Any = run, name: str = name) -> int:
            outbox_of(config).flush()
            run_id = tracker.run_id
            return len(MlflowClient(tracking_uri(config)).get_metric_history(run_id, name)) if run_id else 0

        with sampling(run):
            deadline = time.monotonic() + 120
            while num_points() < until:
                assert time.monotonic() < deadline
        run.finish(failed=has_failed)
    [stored] = runs_of(config).values()
    points = curve(config, stored, name)
    assert len({step for step, _ in points}) == len(points) >= 4
    assert all(0 <= value <= 100 for _, value in points)
    assert stored.data.metrics["system/system_memory_usage_megabytes"] > 0


def test_what_mlflow_refuses_is_dropped_with_a_line_and_holds_up_nothing(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    show_on_screen()
    run = open_run(config, "train", key="k")
    run.log_params({"k": 1})
    run.log_params({"k": 2})
    run.log_metrics({"not: a\nname": 1.0})
    run.log_metrics({"val/error": 0.5})
    Path(config.storage, "outbox", f"{'9' * 20}-01234567.json").write_text("{")
    run.finish()
    assert num_waiting(config) == 0
    said = capsys.readouterr().err
    assert said.count(" is dropped: ") == 3
    assert "MLflow refuses it (Changing param values is not allowed" in said
    stored = runs_of(config)["train"]
    assert (stored.data.params["k"], stored.data.metrics) == ("1", {"val/error": 0.5})


def test_a_run_that_was_deleted_in_mlflow_holds_up_nothing(config: PipelineConfig) -> None:
    run = open_run(config, "train", key="k")
    outbox_of(config).flush()
    MlflowClient(tracking_uri(config)).delete_run(run.run_id)
    run.log_metrics({"val/error": 0.5})
    run.finish()
    assert num_waiting(config) == 0
    assert outbox_of(config).failure is None


def test_a_note_is_named_behind_all_that_wait_also_where_their_clock_was_ahead(away: PipelineConfig) -> None:
    ahead = Path(away.storage, "outbox", f"{time.time_ns() + 10**15:020d}-01234567.json")
    ahead.parent.mkdir(parents=True)
    ahead.write_text("{}")
    open_run(away, "train", key="k")
    assert sorted(ahead.parent.iterdir())[0] == ahead


def test_register_waits_as_long_as_it_may_and_then_says_what_to_do(
    away: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    show_on_screen()
    started = time.monotonic()
    with pytest.raises(
        ClusterError, match=r"and run the same command again: .* tracking\.wait_minutes = 0\.02 "
    ) as caught:
        wait_for_mlflow(away.with_settings({"tracking.wait_minutes": 0.02}))
    assert caught.value.retryable
    assert time.monotonic() - started > 1.2
    assert "  waiting for MLflow, for up to " in capsys.readouterr().err


def test_notes_wait_in_a_bucket_too(away: PipelineConfig, s3_endpoint: str, tmp_path: Path) -> None:
    there = away.with_settings({"storage": f"s3://outbox/x?{s3_endpoint}"})
    report_everything(there, tmp_path / "files")
    assert num_waiting(there) == 18
    uri = f"sqlite:///{tmp_path}/other.db"
    local = there.with_settings({"tracking.uri": uri})
    send_waiting(local)
    runs = runs_of(local)
    assert curve(local, runs["trial-00"], "val/error") == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    assert num_waiting(local) == 0
