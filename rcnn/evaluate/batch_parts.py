"""Predicts one part of a batch, in any process: a model and a part in, a Parquet file and its record out.

    row_id: string    predicted: int64    class_name: string    probability: float32    probabilities: fixed_size_list<float32>

The file appears whole, and its record after it: an interrupted run resumes with the parts that have a record. Bad images are
in the record, since a row without a prediction would be a null that each reader has to leave out.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcnn.evaluate.batch_inputs import BatchPart, ImageFiles, Piece, Rows, read_rows
from rcnn.evaluate.batch_records import PartRecord, part_file, record_file
from rcnn.evaluate.predict import Decoded, Predictor
from rcnn.storage import Storage


def predict_part(predictor: Predictor, part: BatchPart, target: Storage) -> PartRecord:
    """Writes the predictions of a part, then its record.

    Raises:
        SourceError: the input was changed, or is damaged.
        ClusterError: the storage cannot be written.
    """
    ids: list[str] = []
    bad: list[tuple[str, str]] = []
    shares: list[np.ndarray] = [np.empty((0, len(predictor.description["classes"])), np.float32)]
    for rows in (rows for piece in part.pieces for rows in _rows_of(piece, predictor)):
        bad += rows.bad
        if len(rows.ids):
            ids += rows.ids
            shares.append(predictor.probabilities(rows.images))
    content = _packed(ids, np.concatenate(shares), predictor.description["classes"])
    target.write_bytes(part_file(part.number), content)
    record = PartRecord(number=part.number, rows=len(ids), num_bytes=len(content), bad=tuple(bad))
    target.write_text(record_file(part.number), record.model_dump_json())
    return record


def _rows_of(piece: Piece, predictor: Predictor) -> Iterator[Rows]:
    if not isinstance(piece, ImageFiles):
        yield from read_rows(piece, predictor.rule)
        return
    for batch in predictor.decode([Path(file) for file in piece.files]):
        yield _as_rows(batch, Path(piece.root), predictor)


def _as_rows(batch: list[Decoded], root: Path, predictor: Predictor) -> Rows:
    good = [(file, pixels) for file, pixels in batch if isinstance(pixels, np.ndarray)]
    bad = [(_id_of(file, root), reason) for file, reason in batch if isinstance(reason, str)]
    images = np.stack([pixels for _, pixels in good]) if good else np.empty((0, *predictor.rule.image_shape), np.uint8)
    return Rows([_id_of(file, root) for file, _ in good], images, bad)


def _id_of(file: Path, root: Path) -> str:
    """The path below the input; of the input itself, and of a glob's match, as much as identifies it."""
    below = file.relative_to(root) if file.is_relative_to(root) and file != root else file
    return str(below).encode(errors="backslashreplace").decode()  # a file's name may not be UTF-8, and Arrow's text is


def _packed(ids: list[str], probabilities_NC: np.ndarray, classes: list[str]) -> memoryview:
    """The table as a Parquet file in memory."""
    predicted_N = probabilities_NC.argmax(1)
    flat = pa.array(probabilities_NC.reshape(-1), pa.float32())
    table = pa.table(
        {
            "row_id": pa.array(ids, pa.string()),
            "predicted": pa.array(predicted_N, pa.int64()),
            "class_name": pa.array(classes, pa.string()).take(pa.array(predicted_N, pa.int64())),
            "probability": pa.array(np.take_along_axis(probabilities_NC, predicted_N[:, None], 1)[:, 0], pa.float32()),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(classes)),
        }
    ).replace_schema_metadata({"classes": json.dumps(classes)})
    packed = io.BytesIO()
    pq.write_table(
        table, packed, compression="zstd", use_dictionary=["predicted", "class_name"], write_page_checksum=True
    )
    return packed.getbuffer()
