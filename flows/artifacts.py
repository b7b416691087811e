"""What the Prefect UI shows of each stage: a table or a page, sent again later if the server is away.

The results are in the storage, so no stage fails because its picture of them cannot be sent.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.artifacts import MarkdownArtifact, TableArtifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from rcnn.config import PipelineConfig
from rcnn.progress import say
from rcnn.results import RegisterResult, StageResult
from rcnn.text import printable
from rcnn.tracking import file_page, runs_page, version_page

SECONDS_TO_ANSWER = 10


class Artifacts:
    """Publishes artifacts; one that the server does not take is kept, and sent with the next one or when the body ends."""

    def __init__(self, config: PipelineConfig | None = None) -> None:
        self._config, self._kept = config, list[ArtifactCreate]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._kept and (fault := self._send()):
            names = ", ".join(str(artifact.key) for artifact in self._kept)
            say(f"  Prefect does not answer ({fault}); the UI lacks {names}, and the storage has the results")

    def publish(self, name: str, result: StageResult, *, job_page: str = "", **run_ids: UUID) -> None:
        """Publishes the artifact of a stage.

        Args:
            name: the stage.
            result: what is shown.
            job_page: address of the Ray job that made it, if one did.
            run_ids: `flow_run_id` and `task_run_id`, under which it is shown.
        """
        num_kept = len(self._kept)
        links = {"Ray job": job_page} if job_page else {}
        links |= _links(self._config, result) if self._config else {}
        self._kept.append(_artifact_of(name, result, links, run_ids))
        if (fault := self._send()) and not num_kept:
            say(f"  Prefect does not answer ({fault}); what it shows of {name} is sent later")

    def _send(self) -> str:
        """Sends what is kept; returns why not all of it could be sent, or nothing."""
        # A client of its own, since that of the flow waits for minutes, as it should for the states of runs.
        own = {"timeout": SECONDS_TO_ANSWER}
        try:
            with (
                temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
                get_client(sync_client=True, httpx_settings=own) as client,
            ):
                while self._kept:
                    client.create_artifact(self._kept[0])
                    del self._kept[0]
        except (httpx.HTTPError, RuntimeError) as error:
            return " ".join(str(error).split())[:200] or type(error).__name__
        return ""


def _links(config: PipelineConfig, result: StageResult) -> dict[str, str]:
    """Pages of MLflow's UI, where a server has one; a browser opens no files of the storage from another page."""
    address = config.tracking.uri
    if not isinstance(result, RegisterResult) or not result.run_id or not address.startswith("http"):
        return {}
    return {
        "report": file_page(address, result.experiment_id, result.run_id, Path(result.report).name),
        "model": version_page(address, result.model_name, result.version),
        "training runs": runs_page(address, result.experiment_id),
    }


def _artifact_of(name: str, result: StageResult, links: dict[str, str], run_ids: dict[str, UUID]) -> ArtifactCreate:
    artifact: Any
    if rows := result.table():
        shown = {label: printable(value) for label, value in result.highlights(lambda file: file).items()}
        shown |= {label: f"[{page}]({page})" for label, page in links.items()}
        description = ", ".join(f"{label}: {value}" for label, value in shown.items())
        artifact = TableArtifact(table=rows, description=description)
    else:
        rows_of_text = "\n".join(f"| {label} | {value} |" for label, value in result.figures().items())
        pages = "\n".join(f"- [{label}]({page})" for label, page in links.items())
        artifact = MarkdownArtifact(markdown=f"# {name}\n\n| | |\n| --- | --- |\n{rows_of_text}\n\n{pages}\n")
    return ArtifactCreate(
        key=f"rcnn-{name}",
        type=artifact.type,
        description=artifact.description,
        data=artifact.format(_sync=True),
        **run_ids,
    )
