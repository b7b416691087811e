"""The register stage: a trained and evaluated model in, a registered version out, which is the champion if it is better."""

import tempfile
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.progress import say
from rcnn.registry import mlflow_store
from rcnn.registry.answers import remember_model
from rcnn.registry.gate import CHALLENGER, CHAMPION, Standing, Verdict, judge
from rcnn.registry.outbox import wait_for_mlflow
from rcnn.registry.runs import open_run
from rcnn.results import EvaluateResult, RegisterResult, TrainResult
from rcnn.storage import StageFolder
from rcnn.tracking import NoTracker, Tracker, model_name
from rcnn.train.checkpoint import load_model


def run_register(
    config: PipelineConfig,
    trained: TrainResult,
    evaluated: EvaluateResult,
    target: StageFolder,
    tracker: Tracker = NoTracker(),
) -> RegisterResult:
    """Registers the model under its training run, and sets the alias that `gate.judge` decides. `tracker` is not used.

    It is the one stage that waits for MLflow, and for all notes to be there.

    Raises:
        ClusterError: MLflow cannot be reached within `tracking.wait_minutes`.
        DataError: the model folder is incomplete.
    """
    wait_for_mlflow(config)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = Path(folder, mlflow_store.MODEL_FOLDER)
        target.storage.download(f"{trained.folder}/model", model_folder)
        _, description = load_model(model_folder)
        figures = Standing(0, evaluated.test_error, evaluated.test_digest)
        run_id = _training_run(config, trained, target)
        new = mlflow_store.register_model(
            config, model_folder, description, run_id=run_id, weights_sha256=trained.weights_sha256, figures=figures
        )
    verdict = _promote_if_better(config, new)
    name = model_name(config)
    remember_model(config, name)
    say(f"  {name} version {new.version} is {verdict.alias}: {verdict.reason}")
    return RegisterResult(
        model_name=name,
        version=new.version,
        alias=verdict.alias,
        reason=verdict.reason,
        model_uri=f"models:/{name}/{new.version}",
    )


def _promote_if_better(config: PipelineConfig, new: Standing) -> Verdict:
    """Sets the alias of a registered version.

    Two pipelines that register at once may both be better than the champion that both have seen, and MLflow has no write that
    fails if another one came first. So each is registered before it looks at the champion, is marked while it takes the alias,
    and then looks for others that are, or were so since it was registered: whoever takes the alias last sees them all, and
    gives it to the best.
    """
    verdict = judge(new, mlflow_store.champion_of(config))
    if verdict.alias == CHAMPION:
        with mlflow_store.promotion(config, new.version):
            mlflow_store.set_alias(config, CHAMPION, new.version)
            best = new
            # Until no other version appeared while the alias was set.
            while (better := _better_one(config, new, best)) is not None:
                best = better
                mlflow_store.set_alias(config, CHAMPION, best.version)
        if best != new:
            verdict = Verdict(CHALLENGER, f"version {best.version}, registered meanwhile, is {judge(best, new).reason}")
    if verdict.alias == CHALLENGER:
        mlflow_store.set_alias(config, CHALLENGER, new.version)
    return verdict


def _better_one(config: PipelineConfig, new: Standing, best: Standing) -> Standing | None:
    """A version that became champion since `new` was registered, and is better than `best`."""
    rivals = mlflow_store.promoted_since(config, new.version)
    better = [rival for rival in rivals if judge(rival, best).alias == CHAMPION and rival.version != best.version]
    return min(better, key=lambda rival: rival.test_error, default=None)


def remember_registered(config: PipelineConfig, registered: RegisterResult) -> None:
    """Asks again what `rcnn predict` will ask: at the end of a pipeline, the end of its own run has voided the answers."""
    remember_model(config, registered.model_name)


def _training_run(config: PipelineConfig, trained: TrainResult, target: StageFolder) -> str:
    """The run that trained the model; recreated from the stored history if MLflow's store was replaced since."""
    if run_id := mlflow_store.find_run(config, trained.mlflow_run_id, key=trained.folder):
        return run_id
    tracker = open_run(config, "train", key=trained.folder)
    tracker.log_history(target.storage.read_json(f"{trained.folder}/history.json"))
    tracker.finish()
    wait_for_mlflow(config)
    return tracker.run_id
