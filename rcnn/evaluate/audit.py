"""The audit stage: a finished model and the data set in, all rows ranked by how wrong their labels look out.

Test rows come from the evaluation's predictions. Validation rows are scored here: the model has not learned from them either,
though the best epoch was chosen by them; with `train.with_validation` they count as training rows. Training rows are scored
where that is cheap: the model has learned their labels, the wrong ones too, so they are ranked by loss, and their suspects are
fewer than there are.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data.fonts import readable
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.pictures import contact_sheet
from rcnn.data.streaming import stretch
from rcnn.evaluate.audited_rows import reason_to_skip
from rcnn.evaluate.predictions import read_predictions
from rcnn.evaluate.scored_split import score_split
from rcnn.evaluate.scoring import open_rows
from rcnn.evaluate.suspects import Suspicion, find_suspects
from rcnn.progress import say
from rcnn.results import AuditResult, EvaluateResult, IngestResult, TrainResult
from rcnn.storage import StageFolder
from rcnn.text import printable
from rcnn.tracking import Tracker

SUSPECTS = "suspects.parquet"
SHEETS = {"test": "suspects.png", "val": "suspects-val.png", "train": "suspects-train.png"}
SPLIT_NAMES = {"test": "test", "val": "validation", "train": "training"}
NUM_DRAWN, NUM_COLUMNS, TILE_PIXELS = 24, 6, 112


def run_audit(
    config: PipelineConfig,
    data: IngestResult,
    trained: TrainResult,
    evaluated: EvaluateResult,
    target: StageFolder,
    tracker: Tracker,
) -> AuditResult:
    """Scores the rows that no earlier stage has scored, ranks all, and draws the first ones.

    Raises:
        DataError: the data set, the model or the predictions are incomplete.
        ClusterError: the storage cannot be written, or Ray's workers cannot be had.
    """
    manifest = require_manifest(target.storage, data.folder)
    tracker.log_data(manifest.summary(), target.storage.uri(data.folder), context="audit")
    skipped = reason_to_skip(config, data.rows["train"])
    if skipped:
        say(f"  training rows are not scored: {skipped}")
    places = {"test": replace(target, name=evaluated.folder), "val": _scored(config, data, trained, target, "val")}
    if not skipped:
        places["train"] = _scored(config, data, trained, target, "train")
    found = {split: _judge(place, len(manifest.classes)) for split, place in places.items()}
    learned = ("train", "val") if trained.with_validation else ("train",)
    with tempfile.TemporaryDirectory() as folder:
        _write_table(Path(folder, SUSPECTS), places, found, learned)
        for split, suspicion in found.items():
            _draw(manifest, data, target, split, suspicion, learned).save(Path(folder, SHEETS[split]))
        tracker.log_files(Path(folder))
        target.require_held()
        target.storage.upload(Path(folder), target.name)
    result = AuditResult(
        folder=target.name,
        num_rows={split: len(each.label) for split, each in found.items()},
        suspects={split: int(each.is_suspect.sum()) for split, each in found.items()},
        skipped=skipped,
        near_duplicates=manifest.near_duplicates.rows["test-train"] if manifest.near_duplicates else None,
    )
    tracker.log_metrics({f"audit/suspects_{split}": float(count) for split, count in result.suspects.items()})
    say(f"  suspect labels: {result.written_suspects}; in {target.storage.uri(target.path(SUSPECTS))}")
    return result


def delete_predictions(target: StageFolder) -> None:
    """Deletes the predictions of the rows scored here: `suspects.parquet` has what is needed of them."""
    for split in ("val", "train"):
        target.storage.delete(target.path(split))


def _scored(
    config: PipelineConfig, data: IngestResult, trained: TrainResult, target: StageFolder, split: str
) -> StageFolder:
    """The folder with the predictions of a split."""
    place = replace(target, name=target.path(split))
    score_split(config, data, trained, place, split)
    return place


def _judge(place: StageFolder, num_classes: int) -> Suspicion:
    return find_suspects(lambda: read_predictions(place, ("label", "loss", "logits")), num_classes)


def _write_table(
    file: Path, places: dict[str, StageFolder], found: dict[str, Suspicion], learned: Sequence[str]
) -> None:
    """Writes all rows, those of a split together, the most suspect first."""
    tables = [_table(split, _row_ids(places[split]), each, learned) for split, each in found.items()]
    pq.write_table(pa.concat_tables(tables), file, compression="zstd", write_page_checksum=True)


def _row_ids(place: StageFolder) -> np.ndarray:
    return np.concatenate([rows["row_id"] for rows in read_predictions(place, ("row_id",))])


def _table(split: str, row_ids: np.ndarray, found: Suspicion, learned: Sequence[str]) -> pa.Table:
    order = found.order(is_seen=split in learned)
    columns = {
        "split": pa.array([split] * len(order), pa.string()),
        "rank": pa.array(np.arange(1, len(order) + 1)),
        "row_id": pa.array(row_ids[order], pa.string()),
        "row": pa.array(order),
        "label": pa.array(found.label[order]),
        "suggested": pa.array(found.suggested[order]),
        "label_probability": pa.array(found.label_probability[order]),
        "suggested_probability": pa.array(found.suggested_probability[order]),
        "loss": pa.array(found.loss[order]),
        "is_suspect": pa.array(found.is_suspect[order]),
    }
    return pa.table(columns)


def _draw(
    manifest: Manifest,
    data: IngestResult,
    target: StageFolder,
    split: str,
    found: Suspicion,
    learned: Sequence[str],
) -> Image.Image:
    """A contact sheet of the first rows: probability of the suggestion, and label > suggestion below each."""
    chosen = found.order(is_seen=split in learned)[:NUM_DRAWN].tolist()
    rows = open_rows(target.storage, data.folder, split)
    segments = [segment for row in chosen for segment in stretch(rows.segments, row, row + 1)]
    images = list(rows.read(segments)[0])
    captions = [_caption(found, row, manifest.classes) for row in chosen]
    seen = ", which the model has learned" if split in learned else ""
    title = f"{SPLIT_NAMES[split]} rows{seen}: the most suspect labels (label > suggestion)"
    return contact_sheet(title, images, captions, num_columns=NUM_COLUMNS, tile_pixels=TILE_PIXELS)


def _caption(found: Suspicion, row: int, classes: Sequence[str]) -> str:
    """`98 % 7 > 2`: the probability of the suggestion, the label, and the suggestion."""
    pair = (int(found.label[row]), int(found.suggested[row]))
    label, suggested = (readable(printable(classes[each]), each) for each in pair)
    return f"{100 * found.suggested_probability[row]:.0f} % {label} > {suggested}"
