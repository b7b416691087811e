"""What the Prefect UI shows, and a server that is away when a stage ends."""

from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.artifacts import Artifacts
from rcnn.config import PipelineConfig
from rcnn.results import IngestResult, RegisterResult
from tests.flows.heads import free_ports

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("flows.artifacts.say", lines.append)
    return lines


def num_published(name: str) -> int:
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[f"rcnn-{name}"]))
        return len(client.read_artifacts(artifact_filter=wanted))


def nowhere() -> str:
    return f"http://127.0.0.1:{free_ports(1)[0]}/api"


def test_artifacts_are_kept_while_the_server_is_away_and_sent_with_the_next(
    digits: IngestResult, said: list[str]
) -> None:
    first, second, third = (f"kept-{uuid4()}" for _ in range(3))
    with Artifacts() as artifacts:
        with temporary_settings({PREFECT_API_URL: nowhere()}):
            artifacts.publish(first, digits)
            artifacts.publish(second, digits)
        assert num_published(first) == 0
        artifacts.publish(third, digits)
        assert [num_published(name) for name in (first, second, third)] == [1, 1, 1]
    [line] = said
    assert line.startswith("  Prefect does not answer (")
    assert line.endswith(f"); what it shows of {first} is sent later")


@pytest.mark.parametrize("uri", ["http://mlflow:5000", ""])
def test_the_artifact_of_register_links_to_the_report_where_mlflow_has_a_server(uri: str) -> None:
    name, config = f"linked-{uuid4()}", PipelineConfig().with_settings({"tracking.uri": uri})
    result = RegisterResult(
        model_name="digits", version=2, alias="champion", reason="better", model_uri="models:/digits/2",
        report="runs/register-x/report.html", experiment_id="1", model_id="m-1", run_id="abc",
    )  # fmt: skip
    with Artifacts(config) as artifacts:
        artifacts.publish(name, result)
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[f"rcnn-{name}"]))
        [artifact] = client.read_artifacts(artifact_filter=wanted)
    page = "http://mlflow:5000/#/experiments/1/runs/abc/artifacts/report.html?workflowType=machine_learning"
    assert (f"[report]({page})" in str(artifact.data)) == bool(uri)


@pytest.mark.parametrize("page", ["http://ray:8265/#/jobs/rcnn-1", ""])
def test_the_artifact_of_a_stage_links_to_the_job_that_made_it(digits: IngestResult, page: str) -> None:
    name = f"linked-{uuid4()}"
    with Artifacts() as artifacts:
        artifacts.publish(name, digits, job_page=page)
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[f"rcnn-{name}"]))
        [artifact] = client.read_artifacts(artifact_filter=wanted)
    assert (f"Ray job]({page})" in f"{artifact.data}{artifact.description}") == bool(page)


def test_the_end_of_the_flow_sends_what_is_kept(digits: IngestResult) -> None:
    name = f"kept-{uuid4()}"
    with Artifacts() as artifacts, temporary_settings({PREFECT_API_URL: nowhere()}):
        artifacts.publish(name, digits)
    assert num_published(name) == 1


def test_one_that_cannot_be_sent_is_named_and_fails_nothing(digits: IngestResult, said: list[str]) -> None:
    with temporary_settings({PREFECT_API_URL: nowhere()}), Artifacts() as artifacts:
        artifacts.publish("ingest", digits)
    assert said[1].endswith("); the UI lacks rcnn-ingest, and the storage has the results")
