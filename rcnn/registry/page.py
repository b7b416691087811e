"""The report of a registered model as one HTML file: no link to anything outside, no script, pictures inside.

It begins with the verdict and ends with a command that reproduces the model. `report.md`, which the evaluation writes, has the
figures alone.
"""

import base64
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from rcnn.config import PipelineConfig
from rcnn.config_diff import differences
from rcnn.data.manifest import Manifest
from rcnn.evaluate.study_tables import study_tables
from rcnn.recipes import DEFAULT_RECIPE, RECIPES
from rcnn.registry.ledger import Look
from rcnn.results import AuditResult, EvaluateResult, IngestResult, RegisterResult, TrainResult
from rcnn.storage import Storage
from rcnn.text import printable

TEMPLATE = Path(__file__).with_name("page.html.j2")
PAGE = "report.html"
OF_THE_MODEL = ("model", "train", "augment", "data", "seed", "evaluate")
"""The sections that name a result; the others say how and where it is made."""
PICTURES = (
    ("training.png", "Training", "Loss and validation error after each epoch."),
    ("confusion.png", "Confusion matrix", "Rows: the true class; columns: the answer. Colour shows mistakes."),
    ("mistakes.png", "The surest mistakes", "Probability of the answer, and true class > answer. Look here for wrong labels."),
    ("least-sure.png", "Right, and least sure", "The probability of the answer, and the answer."),
    (
        "reliability.png",
        "Reliability",
        "Below the dotted line the model is too sure of itself, above it too modest. The bars show how many rows there are.",
    ),
    ("steps.png", "Error by recurrent steps", "The same weights with fewer steps, and the share of the arithmetic."),
    ("filters.png", "First-layer filters", "The kernels that see the image, all on one scale."),
    (
        "states.png",
        "States and answers over the recurrent steps",
        "Images whose answer changes. Eight maps of each recurrent layer after t steps, on one scale for each row, and the "
        "probabilities of classes.",
    ),
    (
        "receptive-fields.png",
        "Receptive fields over the recurrent steps",
        "What the central unit of each recurrent layer sees, measured by gradients, beside what convolutions and pools allow.",
    ),
    ("robustness.png", "Robustness", "Error by corruption and strength, and an image with each."),
)  # fmt: skip

SUSPECTS = (
    (
        "suspects.png",
        "Test rows whose label looks wrong",
        "Probability of the suggestion, and label > suggestion. The mistakes of a poor model look the same: judge by eye.",
    ),
    (
        "suspects-train.png",
        "Training rows whose label looks wrong",
        "By loss. The model has learned these labels, so more may be wrong than it contradicts.",
    ),
)  # fmt: skip
Pictures = tuple[tuple[str, str, str], ...]
"""File, title and caption of each."""


WIDE_PICTURES = ("states.png", "receptive-fields.png", "robustness.png")
PICTURES_OF_PANELS = ("training.png", "filters.png")


@dataclass(frozen=True)
class Subject:
    """All that the report is about."""

    config: PipelineConfig
    manifest: Manifest
    data: IngestResult
    trained: TrainResult
    evaluated: EvaluateResult
    registered: RegisterResult
    look: Look | None
    environment: Mapping[str, str]
    audited: AuditResult | None = None


def write_page(subject: Subject, storage: Storage, file: Path) -> None:
    """Writes the report; the pictures are those in the evaluation's folder."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["table"] = _table
    environment.filters["code"] = _code
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    file.write_text(template.render(**_content(subject, storage)), encoding="utf-8")


def _content(subject: Subject, storage: Storage) -> dict[str, Any]:
    config, registered = subject.config, subject.registered
    error = f"{100 * subject.evaluated.test_error:.2f} %"
    return {
        "title": f"{config.model.title} on {subject.manifest.name}: {error} test error",
        "subtitle": f"{registered.model_name} version {registered.version}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        "verdict": written_verdict(registered),
        "figures": _figures(subject),
        "comparison": _comparison(subject.look),
        "pictures": list(_pictures(storage, subject.evaluated.folder, PICTURES)),
        "studies": list(study_tables(subject.evaluated)),
        "audit": _audit(subject),
        "suspects": list(_pictures(storage, subject.audited.folder, SUSPECTS)) if subject.audited else [],
        "classes": _classes(subject.evaluated),
        "cost": _cost(subject),
        "recipe": _base(config),
        "settings": _settings(config),
        "data": _data_card(subject.manifest),
        "origin": _origin(subject),
        "usage": _usage(registered),
        "reproduce": reproduction(config, subject.environment),
    }


def written_verdict(registered: RegisterResult) -> str:
    """The verdict of the gate and its reason, as two sentences."""
    alias, reason = registered.alias, registered.reason
    kind = "the champion" if alias == "champion" else f"a {alias}"
    return f"Version {registered.version} is {kind}. {reason[:1].upper()}{reason[1:]}."


def _figures(subject: Subject) -> dict[str, str]:
    trained = subject.trained
    return {
        **subject.evaluated.written_metrics(),
        "validation error": trained.written_val_error,
        "parameters": f"{trained.num_parameters:,}",
        "size of the weights": f"{4 * trained.num_parameters / 1e6:,.1f} MB",
        **({"ended early": trained.unfinished} if trained.unfinished else {}),
    }


def _comparison(look: Look | None) -> dict[str, str]:
    if look is None or not look.number:
        return {}
    return {
        "champion": f"version {look.champion}",
        "test rows": f"{look.num_rows:,}",
        "right here, wrong there": f"{look.only_new:,}",
        "wrong here, right there": f"{look.only_champion:,}",
        "error of the champion, minus that of this model": f"{100 * look.paired.gain:+.2f} points",
        "p-value (exact, one-sided McNemar)": f"{look.paired.p_value:.3g}",
        f"level of look {look.number}": f"{look.level:.3g}",
    }


def _audit(subject: Subject) -> dict[str, str]:
    """Suspect labels and near-duplicates, as far as they were looked for."""
    found, audited = subject.manifest.near_duplicates, subject.audited
    rows: dict[str, str] = {}
    if audited is not None:
        rows["rows whose label looks wrong"] = audited.written_suspects
        if audited.skipped:
            rows["training rows"] = f"not scored: {audited.skipped}"
        rows["all rows, ranked"] = f"{audited.folder}/suspects.parquet"
    if found is not None:
        num_test = subject.manifest.splits["test"].rows
        share = f"{100 * found.rows['test-train'] / num_test:.2f} %"
        rows["test rows with a near-duplicate in the training rows"] = f"{found.rows['test-train']:,} ({share})"
        rows["all pairs"] = f"{subject.data.folder}/{found.file}"
    return rows


def _pictures(storage: Storage, folder: str, pictures: Pictures) -> Any:
    for name, title, caption in pictures:
        if storage.exists(f"{folder}/{name}"):
            content = base64.b64encode(storage.read_bytes(f"{folder}/{name}")).decode()
            looks = {"is_wide": name in WIDE_PICTURES, "scrolls": name in (*WIDE_PICTURES, *PICTURES_OF_PANELS)}
            yield {"title": title, "caption": caption, "base64": content, **looks}


def _classes(evaluated: EvaluateResult) -> list[list[str]]:
    return [[printable(name), *each.cells()] for name, each in evaluated.classes.items()]


def _cost(subject: Subject) -> dict[str, str]:
    trained, evaluated = subject.trained, subject.evaluated
    return {
        "ingest": subject.data.duration,
        "training": f"{trained.duration}, {trained.images_per_second:,.0f} images/s",
        "memory of training": trained.memory,
        "evaluation": evaluated.inference,
    }


def _settings(config: PipelineConfig) -> list[tuple[str, str, str]]:
    """Name, value of the recipe and value here."""
    found = differences(RECIPES[_base(config)](), config)
    return [each for each in found if each[0].partition(".")[0] in OF_THE_MODEL]


def _base(config: PipelineConfig) -> str:
    """The recipe that a config began with, or the default one."""
    return config.recipe if config.recipe in RECIPES else DEFAULT_RECIPE


def _data_card(manifest: Manifest) -> dict[str, str]:
    height, width, channels = manifest.image_shape
    source = manifest.source.model_dump(exclude={"files"})
    return {
        "data set": manifest.name,
        **{f"source: {name}": printable(str(value)) for name, value in source.items() if value},
        **{f"{name} rows": f"{split.rows:,}" for name, split in manifest.splits.items()},
        "images": f"{height} x {width}, {'grey' if channels == 1 else f'{channels} channels'}",
        "classes": f"{len(manifest.classes):,}",
        "skipped images": f"{len(manifest.skipped):,}",
        "digest": manifest.digest,
    }


def _origin(subject: Subject) -> dict[str, str]:
    return {
        "network": subject.config.model.title,
        "MLflow run": subject.trained.mlflow_run_id,
        "weights (SHA-256)": subject.trained.weights_sha256,
        "config": subject.config.hash(),
        **{name.replace("git_commit", "commit"): value for name, value in subject.environment.items() if value},
    }


def _usage(registered: RegisterResult) -> str:
    return (
        f"rcnn predict --model {shlex.quote(f'{registered.model_name}/{registered.version}')} picture.png\n\n"
        "# in Python: image files, or uint8 pixels (N, H, W, C)\n"
        f'import rcnn\nmodel = rcnn.load_model("{registered.model_uri}")\nmodel.predict(["picture.png"])\n'
    )


def reproduction(config: PipelineConfig, environment: Mapping[str, str]) -> str:
    """The command that trains this model again, without the search that led to its settings."""
    lines = []
    if commit := environment.get("git_commit", ""):
        lines.append(f"git checkout {commit.removesuffix('-dirty')}")
        lines += ["# the files then differed from that commit"] if commit.endswith("-dirty") else []
    recipe = ["--recipe", _base(config)]
    values = {name: here for name, _, here in _settings(config)} | {"tune.enabled": "false"}
    words = ["rcnn", "pipeline", *recipe, *(word for each in values.items() for word in ("--set", "=".join(each)))]
    return "\n".join([*lines, shlex.join(words)])


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    escaped = str(escape(text))  # as Markup, `re.sub` would escape what it puts in too
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))  # noqa: S704


def _table(rows: Mapping[str, str]) -> Markup:
    """Labels and values, as two columns."""
    row = Markup("<tr><th>{}</th><td>{}</td></tr>\n")
    body = Markup("").join(row.format(label, value) for label, value in rows.items())
    return Markup('<div class="wide"><table class="pairs">\n{}</table></div>').format(body)
