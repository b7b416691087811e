"""The deployment "rcnn/batch-predict": images in Parquet files or folders in, Parquet with their probabilities out.

Where `ray.address` is a job server, the command `rcnn batch-predict` runs there as a Ray job; elsewhere this process does its
work. Either way a flow that runs again resumes with the parts that are missing, and one that is cancelled stops its job.
"""

import hashlib
import os
import shlex
from typing import Any

from prefect import flow

from flows.code_package import program_of_jobs, runtime_env_of_jobs
from flows.full_pipeline import log_in_prefect
from flows.job_server import UNFINISHED, JobServer
from flows.jobs import MINUTES_TO_STOP, JobLog, ending_with_flow
from flows.left_runs import label_flow_run
from flows.notify import hooks
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.evaluate.batch_records import BATCH, Batch
from rcnn.progress import say, show_on_screen
from rcnn.storage import Storage

EXIT_CODE_OF_BAD_IMAGES = 1
"""Of the command. They are listed and counted in the result; Ray would call the job failed."""


def stop_job_of(flow: Any, flow_run: Any, state: Any) -> None:
    """Stops the Ray job of a cancelled flow run (a hook of the flow)."""
    given = {"model": "", "image_column": "", **flow_run.parameters}
    config = _config(given["image_column"])
    if config.ray.address.startswith("http"):
        job_id = _job_id(_command(config, given["source"], given["to"], given["model"], fresh=False))
        server = JobServer(config.ray.address, minutes=MINUTES_TO_STOP)
        if server.is_running(job_id):
            server.stop(job_id)


@flow(name="rcnn", flow_run_name="batch-predict {source}", **hooks(stop_job_of))
def batch_predict(source: str, to: str, model: str = "", image_column: str = "", fresh: bool = False) -> dict[str, Any]:
    """Predicts all images of a source, and returns what the folder of predictions is about.

    Args:
        source: Parquet files or images: a file, folder or glob that all nodes see; Parquet also as a URI.
        to: a folder that all nodes see, or a URI.
        model: a registered model (NAME, NAME@ALIAS, NAME/VERSION), or a folder; empty: the only registered model.
        image_column: the column of images in Parquet files; empty: image or img.
        fresh: replaces the predictions that the folder holds.
    """
    show_on_screen()
    label_flow_run()
    config = _config(image_column)
    with log_in_prefect():
        if config.ray.address.startswith("http"):
            return predict_as_job(config, source, to, model, fresh=fresh).model_dump(mode="json")
        return _here(config, source, to, model, fresh=fresh)


def _config(image_column: str) -> PipelineConfig:
    """What the worker's RCNN_... variables say of places, and the column."""
    config = PipelineConfig().placed_by(os.environ)
    return config.with_settings({"data.image_column": image_column}).rooted()


def _here(config: PipelineConfig, source: str, to: str, model: str, *, fresh: bool) -> dict[str, Any]:
    from rcnn.evaluate.batch_predict import batch_predict
    from rcnn.registry.answers import model_folder

    with model_folder(config, model) as (name, folder):
        done = batch_predict(config, source, to, model_name=name, model_folder=folder, fresh=fresh)
    return done.model_dump(mode="json")


def _command(config: PipelineConfig, source: str, to: str, model: str, *, fresh: bool) -> list[str]:
    """The command for a node of the cluster, with every setting that batch prediction reads."""
    places = {"ray.address": "auto", "storage": Storage(config.storage).root}
    read = config.values_of("execution", "tracking", "data.image_column")
    usual = PipelineConfig().values_of(*read)
    chosen = places | {name: value for name, value in read.items() if value != usual[name]}
    settings = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    fresh_words = ["--fresh"] if fresh else []
    program = program_of_jobs(config)
    return [*program, "batch-predict", source, "--to", to, "--model", model, *settings, *fresh_words]


def _job_id(command: list[str]) -> str:
    """The same for a flow that runs again: it attaches to its job."""
    words = [word for word in command if word != "--fresh"]
    return f"rcnn-batch-predict-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:12]}"


def predict_as_job(config: PipelineConfig, source: str, to: str, model: str, *, fresh: bool) -> Batch:
    """Runs the command `rcnn batch-predict` on the cluster, and prints its log.

    Raises:
        ClusterError: the cluster cannot be used, or the job ended without all predictions.
    """
    command = _command(config, source, to, model, fresh=fresh)
    server, job_id = JobServer(config.ray.address, minutes=config.ray.reconnect_minutes), _job_id(command)
    entrypoint = f"{shlex.join(command)} || test $? -eq {EXIT_CODE_OF_BAD_IMAGES}"
    runtime_env = runtime_env_of_jobs(config)
    how = "attaching to" if server.is_running(job_id) else "submitted as"
    with ending_with_flow(lambda: JobServer(config.ray.address, minutes=MINUTES_TO_STOP).stop(job_id)):
        server.submit(job_id, entrypoint, metadata={"source": source, "to": to}, runtime_env=runtime_env)
        say(f"batch-predict: {how} Ray job {job_id}: {server.page_of(job_id)}")
        log = JobLog()
        while (status := server.status(job_id)) in UNFINISHED:
            server.read_log(job_id, log.begin())
    log.begin()(server.whole_log(job_id))
    log.end()
    tree = Storage(to).read_json(BATCH)
    if status != "SUCCEEDED" or tree is None or not tree["is_finished"]:
        raise ClusterError(
            f"Ray job {job_id} ended as {status}",
            where=f"ray.address = {config.ray.address}",
            remedy="See its log above; the same call, run again, keeps the parts that were predicted",
        )
    return Batch.model_validate(tree)
