"""`rcnn batch-predict`: any number of images in, a folder of Parquet files with their probabilities out.

The folder names what it is about (see `batch_records.py`), so that the same command resumes an interrupted run with the parts
that are missing, says within a second that a finished one is finished, and is refused where another model or input is meant.
Two runs of the same command at once do the same work twice, and write the same files. Torch, Arrow's readers and Ray are
imported only where there is work.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError, DataError
from rcnn.evaluate.batch_records import (
    BAD_IMAGES,
    BATCH,
    RECORDS,
    Batch,
    PartRecord,
    only_parts,
    part_file,
    record_file,
)
from rcnn.progress import RowProgress, as_duration, say
from rcnn.storage import Storage
from rcnn.text import counted, parse_json

if TYPE_CHECKING:
    from rcnn.evaluate.batch_inputs import BatchPart, Inputs

FORMAT = 1
"""Of the files; a folder of another format is not resumed."""
MODEL_FILES = ("model.safetensors", "model.json")


def batch_predict(
    config: PipelineConfig, source: str, to: str, *, model_name: str, model_folder: Path, fresh: bool = False
) -> Batch:
    """Writes the predictions of all images of an input, on Ray.

    Args:
        config: where Ray runs (`ray`), what a worker has (`execution`), and the column of images (`data.image_column`).
        source: Parquet files or images: a file, a folder or a glob; Parquet also as a URI.
        to: a folder or URI; new, empty, or one that this wrote.
        model_name: for people.
        model_folder: holds `model.safetensors` and `model.json`.
        fresh: deletes what an earlier run wrote there.

    Returns:
        What the folder holds now.

    Raises:
        ConfigError: the input does not exist, or the folder holds something else.
        DataError: the model is incomplete, or an input file has no usable images.
        SourceError: an input file cannot be read.
        ClusterError: Ray or the storage is out of reach.
    """
    started = time.monotonic()
    target, model = Storage(to), read_model_files(model_folder)
    from rcnn.evaluate.batch_inputs import find_inputs

    inputs = find_inputs(source)
    key = _key(inputs, model, config.data.image_column)
    earlier = _earlier(target, key, fresh=fresh)
    if earlier and earlier.is_finished and _is_whole(target, earlier):
        say(f"batch-predict: nothing to do: {target.root} holds the predictions of these {earlier.num_rows:,} images")
        return earlier
    from rcnn.evaluate.batch_inputs import plan_parts

    description = parse_json(model[MODEL_FILES[1]])
    height, width, channels = description["image_shape"]
    parts = plan_parts(inputs, (height, width, channels), image_column=config.data.image_column)
    if not parts:
        raise DataError("holds no rows", where=inputs.source, remedy="Give files with images")
    batch = Batch(
        key=key,
        model=model_name,
        source=inputs.source,
        classes=tuple(description["classes"]),
        num_parts=len(parts),
        num_rows=sum(map(len, parts)),
    )
    target.write_text(BATCH, batch.model_dump_json(indent=2))
    records = _predict(config, inputs, target, model, parts)
    return _finish(target, batch, records, seconds=time.monotonic() - started)


def read_model_files(folder: Path) -> dict[str, bytes]:
    """The files of a model, by name.

    Raises:
        DataError: one is missing.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in MODEL_FILES}
        parse_json(files[MODEL_FILES[1]])
    except (OSError, ValueError) as error:
        remedy = "Give a folder that `rcnn train` wrote"
        raise DataError(f"does not hold a model ({error})", where=str(folder), remedy=remedy) from error
    return files


def _key(inputs: "Inputs", model: dict[str, bytes], image_column: str) -> str:
    """Identity of the predictions."""
    digests = [hashlib.sha256(model[name]).hexdigest() for name in MODEL_FILES]
    parts = {
        "format": FORMAT,
        "source": inputs.source,
        "input": inputs.digest,
        "model": digests,
        "column": image_column,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _earlier(target: Storage, key: str, *, fresh: bool) -> Batch | None:
    """What an earlier run of the same command left in a folder; None if the folder is new.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        tree = target.read_json(BATCH)
        earlier = None if tree is None else Batch.model_validate(tree)
    except ValueError as error:
        fault, remedy = f"cannot be read ({str(error).splitlines()[0]})", "Delete it, or choose another folder"
        raise ConfigError(fault, where=target.uri(BATCH), remedy=remedy) from error
    if earlier is None:
        if names := target.list_files("") + target.list_folders(""):
            raise ConfigError(
                f"is not empty (it holds {names[0]})", where=f"--to {target.root}", remedy="Choose another folder"
            )
        return None
    if fresh:
        _delete(target)
        return None
    if earlier.key != key:
        raise ConfigError(
            f"holds predictions of {earlier.source} by {earlier.model}; this input or model is another, or was changed",
            where=f"--to {target.root}",
            remedy="Choose another folder, or replace them with --fresh",
        )
    return earlier


def _delete(target: Storage) -> None:
    """Deletes what an earlier run wrote; `_batch.json`, which shows that it did, last."""
    for name in only_parts(target.list_files("")):
        target.delete_file(name)
    target.delete(RECORDS)
    for name in (BAD_IMAGES, BATCH):
        if target.exists(name):
            target.delete_file(name)


def _is_whole(target: Storage, batch: Batch) -> bool:
    """Whether a finished folder still has all its files."""
    sizes = target.list_sizes("")
    names = only_parts(sizes)
    return (
        len(names) == batch.num_parts
        and sum(sizes[name] for name in names) == batch.num_bytes
        and (not batch.bad or BAD_IMAGES in sizes)
    )


def _predict(
    config: PipelineConfig, inputs: "Inputs", target: Storage, model: dict[str, bytes], parts: "Sequence[BatchPart]"
) -> list[PartRecord]:
    """The records of all parts; those without one are predicted."""
    records = _finished_parts(target, parts)
    todo = [part for part in parts if part.number not in records]
    num_done = sum(len(part) for part in parts if part.number in records)
    if num_done:
        say(f"  resuming: {num_done:,} of {sum(map(len, parts)):,} images are done")
    if todo:
        from rcnn.evaluate.ray_batch import predict_on_workers

        progress = RowProgress(sum(map(len, parts)), num_done=num_done)
        try:
            for record in predict_on_workers(config, inputs.source, target, model, todo):
                records[record.number] = record
                progress.advance(record.rows + len(record.bad))
        finally:
            progress.close()
    return [records[part.number] for part in parts]


def _finished_parts(target: Storage, parts: "Sequence[BatchPart]") -> dict[int, PartRecord]:
    """The records of the parts that earlier runs finished, by number."""
    sizes = target.list_sizes("")
    found = {}
    for part in parts:
        if record_file(part.number) in sizes:
            record = _read_record(target, part.number)
            if record and sizes.get(part_file(part.number)) == record.num_bytes:
                found[part.number] = record
    return found


def _read_record(target: Storage, number: int) -> PartRecord | None:
    """A record; None if it is damaged: its part is then predicted again."""
    try:
        return PartRecord.model_validate(target.read_json(record_file(number)))
    except ValueError:
        return None


def _finish(target: Storage, batch: Batch, records: Sequence[PartRecord], *, seconds: float) -> Batch:
    """Lists the bad images, then marks the folder as finished."""
    bad: list[dict[str, Any]] = [
        {"row_id": row_id, "fault": fault} for record in records for row_id, fault in record.bad
    ]
    if bad:
        target.write_text(BAD_IMAGES, "".join(f"{json.dumps(each)}\n" for each in bad))
    done = batch.model_copy(
        update={
            "is_finished": True,
            "rows": sum(record.rows for record in records),
            "bad": len(bad),
            "num_bytes": sum(record.num_bytes for record in records),
            "seconds": round(seconds, 3),
        }
    )
    target.write_text(BATCH, done.model_dump_json(indent=2))
    say(f"  {counted(done.num_rows, 'image')} in {as_duration(seconds)}, {done.num_rows / seconds:,.0f} images/s")
    return done
