"""What `rcnn doctor` finds, and mends."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rcnn import conditional, lease
from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.doctor import Finding, examine
from rcnn.lease import Holder, held, is_held
from rcnn.registry import mlflow_store
from rcnn.registry.outbox import outbox_of
from rcnn.registry.runs import open_run
from rcnn.storage import StageFolder, Storage

pytestmark = pytest.mark.long


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig().with_settings({"storage": str(tmp_path)})


@pytest.fixture(autouse=True)
def _no_prefect_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def faults(config: PipelineConfig) -> list[Finding]:
    return [finding for finding in examine(config) if finding.remedy]


def leave_a_lease(storage: Storage, holder: Holder) -> None:
    assert conditional.swap(storage, lease._file(holder.work), json.dumps(asdict(holder)), conditional.ABSENT)


def test_a_machine_that_can_run_the_default_config_is_sound(config: PipelineConfig) -> None:
    findings = list(examine(config))
    assert [finding.part for finding in findings] == ["storage", "Ray", "MLflow", "Prefect", "left over"]
    assert not faults(config)
    assert "mlflow.db will be created" in findings[2].text
    mlflow_store.create_store(config)
    assert "0 registered models" in list(examine(config))[2].text


@pytest.mark.parametrize(
    ("settings", "text", "remedy"),
    [
        ({"execution.num_workers": 64, "execution.cpus_per_worker": 99}, "6,336 cores are wanted", "Lower execution"),
        ({"ray.address": "http://127.0.0.1:9"}, "does not answer (Connection refused)", "make up"),
        (
            {"tracking.uri": "http://127.0.0.1:9"},
            "tracking.uri, http://127.0.0.1:9/health: does not",
            "Start the server",
        ),
    ],
)
def test_what_is_missing_is_named(config: PipelineConfig, settings: dict[str, object], text: str, remedy: str) -> None:
    found = faults(config.with_settings(settings))
    assert text in found[0].text
    assert remedy in found[0].remedy
    assert {fault.text for fault in found[1:]} <= {found[0].text}  # of a server that two checks ask


def test_a_prefect_server_that_is_away_is_named(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    [fault] = faults(config)
    assert fault.text.startswith("PREFECT_API_URL, http://127.0.0.1:9/api/health: does not answer")


def test_a_storage_that_cannot_be_written_is_named(config: PipelineConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    found = faults(config.with_settings({"storage": str(file)}))
    assert found[0].text.startswith(f"{file}/.doctor: cannot be written")


def test_leases_and_runs_of_the_dead_are_mended_and_those_of_the_living_are_not(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(config.storage)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = replace(lease.this_process("runs/train-dead"), pid=ended.pid)
    leave_a_lease(storage, dead)
    for key in ("runs/train-dead", "runs/train-living", "runs/train-unknown", "pipeline-dead"):
        open_run(config, "train", key=key)
    assert outbox_of(config).flush()
    options = ["doctor", "--set", f"storage={config.storage}"]
    with held(StageFolder(storage, "runs/train-living")):
        assert main(options) == 2
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:4]] == ["ok"] * 4
        assert f"the lease of runs/train-dead is held by process {dead.pid} on" in lines[4]
        assert [word in "".join(lines) for word in ("runs/train-unknown", "runs/train-living")] == [True, False]
        assert lines[-1] == "4 faults"
        assert main([*options, "--mend"]) == 0
        assert main(options) == 0
        assert is_held(storage, "runs/train-living")
        assert [run.key for run in mlflow_store.runs_without_a_process(config)] == []
    assert sorted(run.key for run in mlflow_store.runs_without_a_process(config)) == ["runs/train-living"]
    assert os.listdir(storage.local_path(".leases"))
