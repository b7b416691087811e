"""What a folder of batch predictions holds besides them, and under which names. Imports neither torch nor Arrow.

    part-00000.parquet ...    the predictions                      _parts/part-00000.json ...    their records
    _batch.json               what was predicted by which model    _bad_images.jsonl             images without a prediction

Names that begin with _ are skipped by readers of Parquet folders.
"""

import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

BATCH, BAD_IMAGES, RECORDS = "_batch.json", "_bad_images.jsonl", "_parts"


class PartRecord(BaseModel):
    """Marks the file of a part as complete.

    Attributes:
        number: of the part.
        rows: with a prediction.
        num_bytes: of the file.
        bad: id and fault of each image without a prediction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    rows: int
    num_bytes: int
    bad: tuple[tuple[str, str], ...]


class Batch(BaseModel):
    """What a folder of predictions is about.

    Attributes:
        key: hash of the input, the model and the settings that shape the predictions.
        model, source: for people.
        classes: their names, in the order of `probabilities`.
        num_parts: of the input.
        num_rows: of the input.
        is_finished: whether each part has been predicted; the rest is 0 until then.
        rows: with a prediction.
        bad: images without one.
        num_bytes: of the files of all parts.
        seconds: of the run that finished it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    model: str
    source: str
    classes: tuple[str, ...]
    num_parts: int
    num_rows: int
    is_finished: bool = False
    rows: int = 0
    bad: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


def part_file(number: int) -> str:
    """The file of a part's predictions."""
    return f"part-{number:05d}.parquet"


def record_file(number: int) -> str:
    """The file of a part's record."""
    return f"{RECORDS}/part-{number:05d}.json"


def only_parts(sizes: Iterable[str]) -> list[str]:
    """Those of some file names that parts have."""
    return [name for name in sizes if re.fullmatch(r"part-\d{5,}\.parquet", name)]
