"""The model card: what a registered version is, in Markdown, for those who see only MLflow.

In: the subject of the report. Out: data, recipe, figures, limits, and three lines to load it. MLflow shows it at the version
and at the training run.
"""

from collections.abc import Iterator

from rcnn.registry.page import Subject, reproduction, written_verdict
from rcnn.registry.runs import as_list
from rcnn.results import ClassFigures
from rcnn.text import printable

MAX_CARD = 4900
"""Characters; MLflow's database holds 5,000 of a version's description."""
FEW_ROWS = 10_000
"""Test rows below which the interval of an error of a few per cent is wider than most differences between models."""


def model_card(subject: Subject) -> str:
    """The card, the least important part last: parts for which long names or settings leave no room are left out."""
    title, name = subject.config.model.title, subject.manifest.name
    sections = (
        f"**{title}** on **{name}**: test error {subject.evaluated.written_error}.\n\n{written_verdict(subject.registered)}",
        f"### Load it\n\n{loading(subject.registered.model_uri, subject.config.tracking.uri)}",
        f"### Figures\n\n{as_list(_figures(subject))}",
        "### Limits\n\n" + "\n".join(f"- {each}" for each in _limits(subject)),
        f"### Data\n\n{as_list(_data(subject))}",
        f"### Recipe\n\n```\n{reproduction(subject.config, subject.environment)}\n```",
    )
    card = sections[0][:MAX_CARD]
    for section in sections[1:]:
        longer = f"{card}\n\n{section}"
        card = longer if len(longer) <= MAX_CARD else card
    return card


def loading(model_uri: str, tracking_uri: str = "") -> str:
    """Three lines of Python that load a model and use it."""
    place = f', tracking_uri="{tracking_uri}"' if tracking_uri else ""
    return f'```python\nimport rcnn\nmodel = rcnn.load_model("{model_uri}"{place})\nmodel.predict(["picture.png"])\n```'


def _figures(subject: Subject) -> dict[str, str]:
    trained, evaluated = subject.trained, subject.evaluated
    return {
        **evaluated.written_metrics(),
        "validation error": trained.written_val_error,
        "parameters": f"{trained.num_parameters:,}",
        "training": f"{trained.duration}, {trained.images_per_second:,.0f} images/s, {trained.memory}",
        "inference": evaluated.speed or "not measured",
    }


def _data(subject: Subject) -> dict[str, str]:
    manifest = subject.manifest
    height, width, channels = manifest.image_shape
    rows = ", ".join(f"{split.rows:,} {name}" for name, split in manifest.splits.items())
    return {
        "source": printable(" ".join(filter(None, [manifest.source.name, manifest.source.url]))),
        "rows": rows,
        "images": f"{height} x {width}, {'grey' if channels == 1 else f'{channels} channels'}",
        "classes": f"{len(manifest.classes):,}",
        "digest": f"`{manifest.digest}`",
    }


def _limits(subject: Subject) -> Iterator[str]:
    manifest, evaluated, trained = subject.manifest, subject.evaluated, subject.trained
    yield (
        f"It answers with one of {len(manifest.classes):,} classes, also for images that show none of them. Its figures hold "
        f"for images like those of {manifest.name}."
    )
    if evaluated.num_rows < FEW_ROWS:
        yield (
            f"Only {evaluated.num_rows:,} test rows: the true error may be anywhere in the interval, and smaller differences "
            "between models may be chance."
        )
    yield from _weakest(evaluated.classes)
    yield (
        f"Its probabilities are off by {100 * evaluated.metrics.get('calibration_error', 0):.2f} % on average"
        + (
            f"; `calibrated=True` divides the logits by {evaluated.temperature:.2f}"
            if evaluated.temperature != 1
            else ""
        )
        + "."
    )
    if not trained.with_validation:
        yield "The validation error is too low: it chose the epoch and the settings. The test error chose neither."
    found = manifest.near_duplicates
    if found is not None and found.rows["test-train"]:
        yield f"{found.rows['test-train']:,} test rows have a near-duplicate in the training rows."
    if subject.audited is not None and any(subject.audited.suspects.values()):
        yield f"Labels that look wrong: {subject.audited.written_suspects}."
    if trained.unfinished:
        yield f"{trained.unfinished}."


def _weakest(classes: dict[str, ClassFigures]) -> Iterator[str]:
    recalls = {name: each.recall for name, each in classes.items() if each.recall is not None}
    if recalls:
        name = min(recalls, key=lambda each: recalls[each])
        rows = classes[name].num_rows
        yield f"Weakest class: {printable(name)}, of which it recognises {100 * recalls[name]:.1f} % of {rows:,} test rows."
