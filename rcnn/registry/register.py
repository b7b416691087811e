"""The register stage: a trained and evaluated model in, a registered version out, which is the champion if it is better."""

import tempfile
from dataclasses import replace
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import ClusterError, DataError
from rcnn.evaluate.predictions import compare, write_answers
from rcnn.evaluate.temperature import add_temperature
from rcnn.progress import say
from rcnn.registry import mlflow_store
from rcnn.registry.answers import remember_model
from rcnn.registry.card import model_card
from rcnn.registry.champions import ROLLED_BACK
from rcnn.registry.gate import CHALLENGER, CHAMPION, Standing, Verdict, judge, not_comparable
from rcnn.registry.ledger import Look, earlier_look, with_look
from rcnn.registry.outbox import wait_for_mlflow
from rcnn.registry.page import PAGE, Subject, write_page
from rcnn.registry.runs import environment, open_run
from rcnn.results import AuditResult, EvaluateResult, IngestResult, RegisterResult, TrainResult
from rcnn.storage import StageFolder
from rcnn.tracking import NoTracker, Tracker, model_name
from rcnn.train.checkpoint import load_model

ATTEMPTS = 5
"""A server that answers, and fails at the same place each time, has a fault that waiting does not mend."""


def run_register(
    config: PipelineConfig,
    data: IngestResult,
    trained: TrainResult,
    evaluated: EvaluateResult,
    audited: AuditResult | None,
    target: StageFolder,
    tracker: Tracker = NoTracker(),
) -> RegisterResult:
    """Registers the model under its training run, and sets the alias that `gate.py` decides. `tracker` is not used.

    It is the one stage that waits for MLflow, and for all notes to be there. A server that goes away meanwhile is waited for
    too: what is registered is found again.

    Raises:
        ClusterError: MLflow cannot be reached within `tracking.wait_minutes`, or fails again and again.
        DataError: the model folder is incomplete.
    """
    for attempts_left in reversed(range(ATTEMPTS)):
        wait_for_mlflow(config)
        try:
            return _register(config, data, trained, evaluated, audited, target)
        except ClusterError as error:
            if not error.retryable or not attempts_left:
                raise
            say(f"  registering again when MLflow answers ({error.where}: {error.what})")
    raise AssertionError("the last attempt returns or raises")


def _register(
    config: PipelineConfig,
    data: IngestResult,
    trained: TrainResult,
    evaluated: EvaluateResult,
    audited: AuditResult | None,
    target: StageFolder,
) -> RegisterResult:
    with tempfile.TemporaryDirectory() as folder:
        model_folder = Path(folder, mlflow_store.MODEL_FOLDER)
        target.storage.download(f"{trained.folder}/model", model_folder)
        add_temperature(model_folder, evaluated.temperature)
        _, description = load_model(model_folder)
        figures = Standing(0, evaluated.test_error, evaluated.test_digest)
        answers = Path(folder, "answers.parquet")
        write_answers(replace(target, name=evaluated.folder), answers)
        run_id, made_with = _training_run(config, trained, target), environment()
        new = mlflow_store.register_model(
            config, model_folder, description,
            run_id=run_id, weights_sha256=trained.weights_sha256, figures=figures, answers=answers,
            environment=made_with,
        )  # fmt: skip
        _log_exports(config, model_folder, run_id)
        verdict, look = _promote_if_better(config, new, answers)
        name = model_name(config)
        place = mlflow_store.place_of(config, new.version)
        registered = RegisterResult(
            model_name=name,
            version=new.version,
            alias=verdict.alias,
            reason=verdict.reason,
            model_uri=f"models:/{name}/{new.version}",
            report=target.path(PAGE),
            experiment_id=place.experiment_id,
            model_id=place.model_id,
            run_id=place.run_id,
        )
        subject = Subject(
            config=config,
            manifest=require_manifest(target.storage, data.folder),
            data=data,
            trained=trained,
            evaluated=evaluated,
            registered=registered,
            look=look,
            environment=made_with,
            audited=audited,
        )
        page = Path(folder, PAGE)
        write_page(subject, target.storage, page)
        mlflow_store.log_file(config, run_id, page)
        mlflow_store.publish_card(config, place, model_card(subject), figures=evaluated.row(), data=subject.manifest)
        target.require_held()
        target.storage.write_bytes(registered.report, page.read_bytes())
    remember_model(config, name)
    say(f"  {name} version {new.version} is {verdict.alias}: {verdict.reason}")
    return registered


def _log_exports(config: PipelineConfig, model_folder: Path, run_id: str) -> None:
    """Stores the formats of `tracking.export` in the training run."""
    wanted = config.tracking.export
    if wanted == "none":
        return
    from rcnn.registry.export import FORMATS, export_model  # late: torch's exporters take seconds to import

    with tempfile.TemporaryDirectory() as folder:
        for exported in export_model(model_folder, Path(folder), FORMATS if wanted == "all" else [wanted]):
            say(f"  exported {exported.file.name}: {exported.summary}")
            mlflow_store.log_file(config, run_id, exported.file, folder=mlflow_store.EXPORTS_FOLDER)


def _promote_if_better(config: PipelineConfig, new: Standing, answers: Path) -> tuple[Verdict, Look | None]:
    """Sets the alias of a registered version; returns it with its reason, and the look that it rests on, if there was one.

    Two pipelines that register at once may both be better than the champion that both have seen, and MLflow has no write that
    fails if another one came first. So each is registered before it looks at the champion, is marked while it takes the alias,
    and then looks for others that are, or were so since it was registered: whoever takes the alias last sees them all, and
    gives it to the one with the fewest errors. All of them passed the test.
    """
    champion = mlflow_store.champion_of(config)
    if champion is not None and champion.version == new.version:
        return Verdict(CHAMPION, "it already was the champion"), None
    look = _judged(config, new, champion, answers)
    verdict = look.verdict
    if verdict.alias == CHAMPION:
        with mlflow_store.promotion(config, new.version):
            mlflow_store.set_alias(config, CHAMPION, new.version)
            best = new
            # Until no other version appeared while the alias was set.
            while (better := _better_one(config, new, best)) is not None:
                best = better
                mlflow_store.set_alias(config, CHAMPION, best.version)
        if best != new:
            errors = f"{100 * best.test_error:.2f} % test error against {100 * new.test_error:.2f} %"
            verdict = Verdict(CHALLENGER, f"version {best.version}, registered meanwhile, has fewer errors: {errors}")
        else:
            mlflow_store.note_champions(config, [*mlflow_store.champions_so_far(config), new.version])
    if verdict.alias == CHALLENGER:
        mlflow_store.set_alias(config, CHALLENGER, new.version)
    return verdict, look


def _judged(config: PipelineConfig, new: Standing, champion: Standing | None, answers: Path) -> Look:
    """Compares a version with the champion, and notes that in the ledger. A comparison that was made before is not repeated."""
    tags = mlflow_store.tags_of_versions(config)[new.version]
    rival = champion.version if champion else 0
    earlier = earlier_look(tags, new.test_digest, rival)
    if earlier is not None:
        decided = tags.get(mlflow_store.BY_HAND_TAG, "")
        if earlier.alias == CHAMPION and decided.startswith(ROLLED_BACK):
            reason = f"it was {decided}; `rcnn registry promote {new.version} --reason ...` undoes that"
            return Look.without_test(new, rival, Verdict(CHALLENGER, reason))
        return earlier
    if champion is None:
        look = Look.without_test(new, rival, Verdict(CHAMPION, "there was no champion"))
    else:
        look = _compared(config, new, champion, answers)
    mlflow_store.tag_version(config, new.version, with_look(tags, look))
    return look


def _compared(config: PipelineConfig, new: Standing, champion: Standing, answers: Path) -> Look:
    """A look: both models on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = mlflow_store.fetch_answers(config, champion.version, new.test_digest, Path(folder))
        if theirs is None:
            return Look.without_test(new, champion.version, not_comparable(new, champion))
        try:
            paired = compare(answers, theirs)
        except DataError as error:  # its place is a temporary folder
            place = f"{model_name(config)} version {champion.version}, in MLflow: {mlflow_store.ANSWERS_FOLDER}"
            raise DataError(error.what, where=place, remedy="Evaluate and register that model again") from error
    # Taken before there is a verdict: a process that is killed here has paid for a look that it did not get.
    number = mlflow_store.next_look(config, new.test_digest, new.version)
    return Look.of(new, champion.version, number, paired, judge(new, champion.version, paired, number))


def _better_one(config: PipelineConfig, new: Standing, best: Standing) -> Standing | None:
    """A version that became champion since `new` was registered, and has fewer errors on the same rows."""
    rivals = mlflow_store.promoted_since(config, new.version)
    better = [rival for rival in rivals if rival.test_digest == best.test_digest and rival.test_error < best.test_error]
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
