"""The evaluate stage: a finished model and the test rows in, figures, plots and a short report out."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rcnn.config import PipelineConfig
from rcnn.data.batches import RowSource
from rcnn.data.loader import open_rows
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.pictures import as_picture
from rcnn.evaluate.plots import plot_confusion, plot_history
from rcnn.evaluate.timed_rows import TimedRows
from rcnn.model.classifier import Classifier
from rcnn.progress import say
from rcnn.results import EvaluateResult, IngestResult, TrainResult
from rcnn.scores import Scores
from rcnn.storage import StageFolder
from rcnn.text import file_stem, printable
from rcnn.tracking import Tracker
from rcnn.train.checkpoint import load_model
from rcnn.train.execution import choose_device
from rcnn.train.loop import Metrics
from rcnn.train.step import score

NUM_SAMPLES = 10
SECONDS_TO_REPORT = 1.5  # from the last row to the result: pictures, mostly; 0.7 to 1.6 on 2 busy cores
BATCH_OF_SAMPLES = 1000


def run_evaluate(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, target: StageFolder, tracker: Tracker
) -> EvaluateResult:
    """Scores the model on every test row, once, and writes the report.

    Raises:
        DataError: the data set or the model is incomplete.
    """
    storage = target.storage
    started = time.perf_counter()
    manifest = require_manifest(storage, data.folder)
    rows = open_rows(storage, data.folder, manifest, "test", resident_megabytes=config.execution.resident_megabytes)
    tracker.log_data(manifest.summary(), storage.uri(data.folder), context="testing")
    model = _load(trained, target)
    timed = TimedRows(rows, _waiting_clock(model))
    scores = _score(config, model, timed, len(manifest.classes))
    assert scores.num_rows == data.rows["test"], f"{scores.num_rows} of {data.rows['test']} test rows were counted"
    history = storage.read_json(f"{trained.folder}/history.json")
    with tempfile.TemporaryDirectory() as folder:
        _draw(config, scores, manifest, history, Path(folder))
        _write_samples(rows, manifest.classes, Path(folder))
        result = EvaluateResult(
            folder=target.name,
            metrics=scores.metrics(),
            accuracy_per_class=dict(zip(manifest.classes, scores.accuracy_per_class, strict=True)),
            num_rows=scores.num_rows,
            images_per_second=len(rows) / timed.seconds,
            test_digest=data.test_digest,
            seconds=round(time.perf_counter() - started, 1),
            predicted_seconds=round(timed.started - started + timed.predicted_seconds + SECONDS_TO_REPORT, 1),
        )
        _write_report(config, result, trained, manifest, Path(folder))
        tracker.log_metrics(_figures(result))
        tracker.log_files(Path(folder))
        storage.upload(Path(folder), target.name)
    say(f"  test error {100 * scores.error:.2f} % on {scores.num_rows:,} rows; report in {storage.uri(target.name)}")
    return result


def _figures(result: EvaluateResult) -> dict[str, float]:
    """What MLflow gets."""
    return {f"test/{name}": value for name, value in result.metrics.items()} | {
        "perf/images_per_second": result.images_per_second,
        "perf/seconds": result.seconds,
        "perf/predicted_seconds": result.predicted_seconds,
    }


def _load(trained: TrainResult, target: StageFolder) -> Classifier:
    with tempfile.TemporaryDirectory() as folder:
        target.storage.download(f"{trained.folder}/model", Path(folder))
        model, _ = load_model(Path(folder))
    model.to(choose_device(torch.cuda.is_available()))
    return model


def _score(config: PipelineConfig, model: Classifier, rows: RowSource, num_classes: int) -> Scores:
    """Scores of the finished model on `rows`, in host memory."""
    device = next(model.parameters()).device
    scores = score(model, rows, num_classes=num_classes, batch_size=config.evaluate.batch_size, device=device)
    return Scores(scores.confusion.cpu(), scores.loss_sum.cpu())


def _waiting_clock(model: Classifier) -> Callable[[], float]:
    """A clock that waits for the work that was given to the model's device."""

    def clock() -> float:
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _draw(config: PipelineConfig, scores: Scores, manifest: Manifest, history: list[Metrics], folder: Path) -> None:
    """Draws the pictures of the report."""
    name = f"{config.model.title}, {manifest.name}"
    plot_confusion(
        scores.confusion, manifest.classes, f"{name}: {100 * scores.error:.2f} % test error", folder / "confusion.png"
    )
    plot_history(history, f"{name}: training", folder / "training.png")


def _write_report(
    config: PipelineConfig,
    result: EvaluateResult,
    trained: TrainResult,
    manifest: Manifest,
    folder: Path,
) -> None:
    name = f"{config.model.title}, {manifest.name}"
    metrics = "\n".join(f"| {label} | {value} |" for label, value in result.written_metrics().items())
    classes = "\n".join(
        f"| {_cell(name)} | {'no test rows' if share is None else f'{100 * share:.2f}'} |"
        for name, share in result.accuracy_per_class.items()
    )
    ended = f"; {trained.unfinished}" if trained.unfinished else ""
    (folder / "metrics.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(
        f"""# {name}

| | |
| --- | --- |
{metrics}
| validation error | {100 * trained.val_error:.2f} % (best of {trained.epochs:g} epochs, epoch {trained.best_epoch:g}) |
| parameters | {trained.num_parameters:,} |
| inference | {result.inference}, batches of {config.evaluate.batch_size} |
| training | {trained.images_per_second:,.0f} images/s, {trained.duration}{ended} |
| memory of training | {trained.memory} |
| data digest | `{manifest.digest[:16]}` |

![confusion matrix](confusion.png)

![training](training.png)

| class | accuracy, % |
| --- | --- |
{classes}
""",
        encoding="utf-8",
    )


def _cell(name: str) -> str:
    """A class name as a cell of a Markdown table."""
    return printable(name).replace("|", "\\|")


def _write_samples(rows: RowSource, classes: tuple[str, ...], folder: Path) -> None:
    """Writes a test image of each of the first classes, named after it, for `rcnn predict` to be tried on."""
    (folder / "samples").mkdir()
    missing = dict(list(enumerate(classes))[:NUM_SAMPLES])
    for images_NCHW, labels_N in rows.batches(BATCH_OF_SAMPLES, torch.device("cpu")):
        for label in [label for label in missing if (labels_N == label).any()]:
            first = int((labels_N == label).nonzero()[0])
            picture = as_picture(images_NCHW[first].permute(1, 2, 0).numpy())
            picture.save(folder / "samples" / f"{file_stem(label, missing.pop(label))}.png")
        if not missing:
            return
