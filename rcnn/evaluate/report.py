"""The evaluate stage: a finished model and the test rows in, figures, plots and a short report out."""

import tempfile
import time
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.data.fonts import readable
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.pictures import as_picture, contact_sheet
from rcnn.data.streaming import stretch
from rcnn.evaluate.figures import Example, Figures, figures_of, wilson
from rcnn.evaluate.pace import Pace
from rcnn.evaluate.plots import plot_confusion, plot_history, plot_reliability
from rcnn.evaluate.predictions import PREDICTIONS, first_rows
from rcnn.evaluate.scored_split import score_split, threads_here
from rcnn.evaluate.scoring import open_rows
from rcnn.evaluate.studies import EARLY_EXIT, StudyRun
from rcnn.evaluate.study_size import num_passes
from rcnn.evaluate.study_tables import StudyTable, study_tables
from rcnn.progress import say
from rcnn.results import EvaluateResult, IngestResult, TrainResult
from rcnn.storage import StageFolder
from rcnn.text import file_stem, printable
from rcnn.tracking import Tracker
from rcnn.train.loop import Metrics

NUM_SAMPLES = 10
EXAMPLES_PER_ROW, PIXELS_OF_AN_EXAMPLE = 6, 112  # wide enough for two class names
SECONDS_TO_REPORT = 2.5  # from the last row to the result, without the passes of studies: pictures, mostly
SUREST_MISTAKES = f'polars.read_parquet("{PREDICTIONS}").filter(correct=False).sort("loss", descending=True).head(10)'
CALIBRATED = ("loss", "calibration_error", "brier_score")  # metrics that a temperature changes


def run_evaluate(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, target: StageFolder, tracker: Tracker
) -> EvaluateResult:
    """Scores the model on every test row, once, and writes predictions and report.

    An interrupted evaluation resumes with the parts of the rows that it had scored.

    Raises:
        DataError: the data set or the model is incomplete.
        ClusterError: the storage cannot be written, or Ray's workers cannot be had.
    """
    storage = target.storage
    started = time.perf_counter()
    manifest = require_manifest(storage, data.folder)
    tracker.log_data(manifest.summary(), storage.uri(data.folder), context="testing")
    pace, predictions_sha256 = score_split(config, data, trained, target, "test")
    figures = figures_of(target, len(manifest.classes))
    study = StudyRun(
        config,
        storage=storage,
        data_folder=data.folder,
        manifest=manifest,
        trained=trained,
        num_at_once=threads_here(),
    )
    assert figures.num_rows == data.rows["test"], f"{figures.num_rows} of {data.rows['test']} test rows were counted"
    history = storage.read_json(f"{trained.folder}/history.json")
    with tempfile.TemporaryDirectory() as folder:
        studied = study.run(Path(folder))
        calibrated = figures_of(target, len(manifest.classes), temperature=studied.temperature)
        _draw(config, figures, calibrated, manifest, history, Path(folder))
        _draw_examples(data, figures, manifest.classes, target, Path(folder))
        _write_samples(data, manifest.classes, target, Path(folder))
        result = EvaluateResult(
            folder=target.name,
            metrics=figures.metrics(),
            error_interval=wilson(figures.num_rows - int(figures.confusion.trace()), figures.num_rows),
            classes=dict(zip(manifest.classes, figures.of_classes(), strict=True)),
            num_rows=figures.num_rows,
            images_per_second=pace.images_per_second,
            test_digest=data.test_digest,
            predictions_sha256=predictions_sha256,
            temperature=studied.temperature,
            calibrated={name: calibrated.metrics()[name] for name in CALIBRATED},
            studies=studied.studies,
            seconds=round(time.perf_counter() - started, 1),
            predicted_seconds=round(
                pace.started - started + pace.predicted_seconds + _seconds_after(config, data, pace), 1
            ),
        )
        _write_report(config, result, trained, manifest, Path(folder))
        tracker.log_metrics(_figures(result))
        tracker.log_files(Path(folder))
        target.require_held()
        storage.upload(Path(folder), target.name)
    speed = f", {result.speed}" if result.speed else ""
    say(f"  test error {result.written_error}{speed}; report in {storage.uri(target.name)}")
    return result


def _seconds_after(config: PipelineConfig, data: IngestResult, pace: Pace) -> float:
    """Predicts the time from the last row to the result: studies at the pace of scoring, and pictures."""
    num_more = num_passes(config, num_test=data.rows["test"], num_val=data.rows.get("val", 0))
    return SECONDS_TO_REPORT + (num_more / pace.warm_images_per_second if pace.images_per_second else 0.0)


def _figures(result: EvaluateResult) -> dict[str, float]:
    """What MLflow gets."""
    speed = {"perf/images_per_second": result.images_per_second} if result.images_per_second else {}
    times = {"perf/seconds": result.seconds, "perf/predicted_seconds": result.predicted_seconds}
    studied = {
        f"{study}/{row.condition}/error": row.error
        for study, rows in result.studies.items()
        for row in rows
        if study != EARLY_EXIT
    }
    for row in result.studies.get(EARLY_EXIT, ())[1:]:  # its condition is a sentence, not a name
        studied |= {"early_exit/error": row.error, "early_exit/passes": row.passes}
    calibrated = {f"calibrated/{name}": value for name, value in result.calibrated.items()}
    of_test = result.metrics | calibrated | {"temperature": result.temperature} | studied
    return {f"test/{name}": value for name, value in of_test.items()} | speed | times


def _draw(
    config: PipelineConfig,
    figures: Figures,
    calibrated: Figures,
    manifest: Manifest,
    history: list[Metrics],
    folder: Path,
) -> None:
    """Draws the pictures of the report."""
    name, scores = f"{config.model.title}, {manifest.name}", figures.scores
    plot_confusion(
        scores.confusion, manifest.classes, f"{name}: {100 * scores.error:.2f} % test error", folder / "confusion.png"
    )
    before, after = (f"{100 * each.calibration_error:.2f} %" for each in (figures, calibrated))
    title = f"calibration error {before}, {after} with the temperature"
    plot_reliability(figures.bins, title, folder / "reliability.png", calibrated=calibrated.bins)
    plot_history(history, f"{name}: training", folder / "training.png")


def _draw_examples(
    data: IngestResult, figures: Figures, classes: tuple[str, ...], target: StageFolder, folder: Path
) -> None:
    """Draws contact sheets of the surest mistakes and of the least sure hits: true class, answer and probability below each."""
    rows = open_rows(target.storage, data.folder, "test")
    sheets = (
        ("mistakes.png", "the surest mistakes (true class > answer)", figures.surest_mistakes),
        ("least-sure.png", "right, and least sure", figures.least_sure_hits),
    )
    for file, title, examples in sheets:
        if examples:
            segments = [segment for each in examples for segment in stretch(rows.segments, each.row, each.row + 1)]
            images = list(rows.read(segments)[0])
            captions = [_caption(each, classes) for each in examples]
            sheet = contact_sheet(
                title, images, captions, num_columns=EXAMPLES_PER_ROW, tile_pixels=PIXELS_OF_AN_EXAMPLE
            )
            sheet.save(folder / file)


def _caption(example: Example, classes: tuple[str, ...]) -> str:
    """`99 % 7 > 2`, or `52 % 7` where the answer is right: names may be too long, and are cut at their end."""
    label, answer = (readable(printable(classes[each]), each) for each in (example.label, example.predicted))
    names = answer if example.label == example.predicted else f"{label} > {answer}"
    return f"{100 * example.probability:.0f} % {names}"


def _write_report(
    config: PipelineConfig,
    result: EvaluateResult,
    trained: TrainResult,
    manifest: Manifest,
    folder: Path,
) -> None:
    name = f"{config.model.title}, {manifest.name}"
    metrics = "\n".join(f"| {label} | {value} |" for label, value in result.written_metrics().items())
    classes = "\n".join(f"| {' | '.join([_cell(name), *each.cells()])} |" for name, each in result.classes.items())
    ended = f"; {trained.unfinished}" if trained.unfinished else ""
    pictures = {"mistakes.png": "the surest mistakes", "least-sure.png": "right, and least sure"}
    pictures |= {
        "steps.png": "error by recurrent steps",
        "states.png": "states and answers over the recurrent steps",
        "receptive-fields.png": "receptive fields",
        "robustness.png": "robustness",
        "filters.png": "first-layer filters",
    }
    examples = "".join(f"![{text}]({file})\n\n" for file, text in pictures.items() if (folder / file).is_file())
    studies = "\n".join(map(_as_markdown, study_tables(result)))
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

Every test row's label, answer, loss and logits are in `{PREDICTIONS}`; in this folder, the surest mistakes are
`{SUREST_MISTAKES}`.

![confusion matrix](confusion.png)

{examples}![reliability](reliability.png)

![training](training.png)

{studies}
## Classes

| class | test rows | precision, % | recall, % | F1, % |
| --- | --- | --- | --- | --- |
{classes}
""",
        encoding="utf-8",
    )


def _as_markdown(table: StudyTable) -> str:
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    return f"## {table.title}\n\n{table.note}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(name: str) -> str:
    """A class name as a cell of a Markdown table."""
    return printable(name).replace("|", "\\|")


def _write_samples(data: IngestResult, classes: tuple[str, ...], target: StageFolder, folder: Path) -> None:
    """Writes a test image of each of the first classes, named after it, for `rcnn predict` to be tried on."""
    (folder / "samples").mkdir()
    rows = open_rows(target.storage, data.folder, "test")
    for label, row in sorted(first_rows(target, range(min(NUM_SAMPLES, len(classes)))).items()):
        images_NHWC, _ = rows.read(stretch(rows.segments, row, row + 1))
        as_picture(images_NHWC[0]).save(folder / "samples" / f"{file_stem(label, classes[label])}.png")
