"""Whether a version is still registered, asked without importing MLflow."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rcnn.config import PipelineConfig
from rcnn.recipes import debug_tiny
from rcnn.registry import mlflow_store
from rcnn.registry.answers import ANSWERS, remember_model
from rcnn.registry.known_versions import has_version
from rcnn.results import RegisterResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import tracking_uri

pytestmark = pytest.mark.long

REGISTERED = RegisterResult(model_name="m", version=1, alias="champion", reason="", model_uri="models:/m/1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    config = debug_tiny().with_settings({"storage": str(tmp_path_factory.mktemp("storage"))})
    mlflow_store.create_store(config)
    client = MlflowClient(tracking_uri(config))
    client.create_registered_model("m")
    for _ in range(2):
        client.create_model_version("m", "somewhere")
    return config


@pytest.fixture
def is_registered(config: PipelineConfig) -> Callable[[], bool]:
    return lambda: has_version(config, REGISTERED, StageFolder(Storage(config.storage), "runs/register"))


@pytest.fixture
def num_asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often MLflow was asked."""
    calls, ask = [], mlflow_store.version_numbers
    monkeypatch.setattr(mlflow_store, "version_numbers", lambda config, name: calls.append(1) or ask(config, name))
    return lambda: len(calls)


def test_mlflow_is_asked_only_after_something_else_wrote_to_the_store(
    config: PipelineConfig, is_registered: Callable[[], bool], num_asked: Callable[[], int]
) -> None:
    mlflow_store.set_alias(config, "champion", 1, name="m")
    remember_model(config, "m")  # the last thing that a pipeline does
    assert num_asked() == 1
    assert is_registered()
    assert is_registered()
    assert num_asked() == 1
    MlflowClient(tracking_uri(config)).create_experiment("somebody else's")
    assert is_registered()
    assert is_registered()
    assert num_asked() == 2


def test_the_check_imports_no_mlflow(config: PipelineConfig) -> None:
    remember_model(config, "m")
    code = f"""
import sys
from rcnn.config import PipelineConfig
from rcnn.registry.known_versions import has_version
from rcnn.results import RegisterResult
config = PipelineConfig().with_settings({{"storage": {config.storage!r}}})
print(has_version(config, RegisterResult.model_validate_json({REGISTERED.model_dump_json()!r}), None))
print(sorted({{"mlflow", "sqlalchemy", "pandas", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n[]\n"


def test_a_version_that_was_deleted_is_noticed(config: PipelineConfig, is_registered: Callable[[], bool]) -> None:
    remember_model(config, "m")
    assert is_registered()
    MlflowClient(tracking_uri(config)).delete_model_version("m", "1")
    assert not is_registered()
    assert json.loads(Path(config.storage, ANSWERS).read_text())["answers"]["versions of m"] == [2]


def test_a_store_that_was_exchanged_or_is_gone_is_noticed(tmp_path: Path) -> None:
    config = debug_tiny().with_settings({"storage": str(tmp_path)})
    target = StageFolder(Storage(config.storage), "runs/register")
    assert not has_version(config, REGISTERED, target)
    mlflow_store.create_store(config)
    state = [1, 2, 3, 4]  # another file's
    (tmp_path / ANSWERS).write_text(json.dumps({"store": state, "answers": {"versions of m": [1]}}))
    assert not has_version(config, REGISTERED, target)
    (tmp_path / ANSWERS).write_text("{")  # damaged
    assert not has_version(config, REGISTERED, target)
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    assert not has_version(config, REGISTERED, target)
