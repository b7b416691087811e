"""The labels of Parquet files: numbers unchanged, text as classes in sorted order; -1 for a row without a usable label."""

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcnn.config import DataConfig
from rcnn.data.manifest import Skipped
from rcnn.data.sources.origin import bad_row
from rcnn.data.sources.parquet_columns import LabelColumn, LabelKind, ParquetFile, shortened
from rcnn.data.sources.parquet_files import open_file, read_each, unreadable
from rcnn.errors import SourceError
from rcnn.progress import say
from rcnn.text import printable

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"  # Hive's and Spark's folder for rows without a value
BOOLEANS = ("false", "true")
ROWS_PER_READ = 8192
MIN_ROWS_TO_JUDGE = 20
"""With fewer rows, a class per row is plausible."""
NUM_EXAMPLES = 3
MAX_CLASSES_TO_SHOW = 10
MAX_NAME_TO_SHOW = 40


@dataclass(frozen=True)
class Labels:
    """The class names, the labels of each file by its name (int64, -1 for none), and the rows without a label."""

    classes: tuple[str, ...]
    of_file: dict[str, np.ndarray]
    faults: list[Skipped]


def read_labels(files: Sequence[ParquetFile], data: DataConfig) -> Labels:
    """Reads the label column of every file.

    Raises:
        SourceError: a file is damaged, files disagree, or the column does not hold classes.
        DataError: a row has no usable label, and `on_error` is fail.
    """
    names = _common_names(files, data.root)
    kind = _common_kind(files, data.root)
    labels = _read_text(files, names, data) if kind == "text" else _read_numbers(files, names, kind, data)
    if labels.faults and data.on_error == "fail":
        raise bad_row(labels.faults[0], num_rows=len(labels.faults))
    if not any((numbers >= 0).any() for numbers in labels.of_file.values()):
        first = labels.faults[0] if labels.faults else None
        fault = f"no row has a usable label ({first.row_id}: {first.reason})" if first else "has no rows"
        raise SourceError(fault, where=f"data.root = {data.root}", remedy="Give files with labelled images")
    if names:
        return labels
    if kind in ("text", "true or false"):
        _require_two_classes(labels, files[0].label.name, data.root)
        _show_classes(labels.classes)
        return labels
    return Labels(_numbered_classes(labels, files, data.root), labels.of_file, labels.faults)


def _common_names(files: Sequence[ParquetFile], root: str) -> tuple[str, ...]:
    """The class names in the metadata, which must agree; files without names use those of the others."""
    named = [file for file in files if file.label.classes]
    names = named[0].label.classes if named else ()
    for file in named:
        if file.label.classes != names:
            number, ours, theirs = next(
                (number, ours, theirs)
                for number, (ours, theirs) in enumerate(zip_longest(file.label.classes, names))
                if ours != theirs
            )
            raise SourceError(
                f"its class {number} is {_named(ours)}, but {_named(theirs)} in {named[0].name}",
                where=f"{file.name} in data.root = {root}",
                remedy="Give all files the same names in the same order",
            )
    if len(names) == 1:
        raise SourceError("names only one class", where=f"data.root = {root}", remedy="There must be two or more")
    return names


def _named(name: str | None) -> str:
    return "none" if name is None else repr(shortened(name))


def _common_kind(files: Sequence[ParquetFile], root: str) -> LabelKind:
    """The kind of all files' labels. Fractions may all be integers, so they match integers; nulls match any kind."""
    first: ParquetFile | None = None
    for file in files:
        if file.label.kind == "nothing":
            continue
        first = first or file
        if _family(file.label) != _family(first.label):
            raise SourceError(
                f"its labels are {file.label.type}, but {first.label.type} in {first.name}",
                where=f"{file.name} in data.root = {root}",
                remedy="Give all files labels of one type",
            )
    return first.label.kind if first else "nothing"


def _family(label: LabelColumn) -> str:
    return "whole numbers" if label.kind == "fractions" else label.kind


# ------------------------------------------------------------------------------------------------------------------
# Numbers and booleans


def _read_numbers(files: Sequence[ParquetFile], names: tuple[str, ...], kind: LabelKind, data: DataConfig) -> Labels:
    of_file, faults = {}, []
    classes = names or (BOOLEANS if kind == "true or false" else ())
    bound = f"0 to {len(classes) - 1}" if names else " or ".join(classes) or "0 or above"
    columns = read_each(lambda file: _numbers_of(file, data.root), files)
    for file, (numbers, is_null) in zip(files, columns, strict=True):
        is_wrong = is_null | (numbers < 0) | (numbers >= (len(classes) or 2**63))
        for row in np.flatnonzero(is_wrong).tolist():
            found = "null" if is_null[row] else str(numbers[row])
            reason = f"{file.label.name} is {found}, but must be {bound}"
            faults.append(Skipped(row_id=f"{file.name}#{row}", reason=reason))
        of_file[file.name] = np.where(is_wrong, -1, numbers.astype(np.int64))
    return Labels(classes, of_file, faults)


def _numbers_of(file: ParquetFile, root: str) -> tuple[np.ndarray, np.ndarray]:
    """A file's labels as integers, and a mask of the nulls."""
    batches = [np.empty(0, np.int64)]
    nulls = [np.empty(0, bool)]
    for column in _read_column(file, root):
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        if file.label.kind == "nothing":
            numbers = np.zeros(len(column), np.int64)
        elif file.label.kind == "fractions":
            numbers, is_null = _whole(column, file, root, first_row=sum(map(len, nulls)))
        else:
            numbers = column.fill_null(False if pa.types.is_boolean(column.type) else 0).to_numpy(zero_copy_only=False)
        batches.append(numbers)
        nulls.append(is_null)
    return np.concatenate(batches[1:] or batches), np.concatenate(nulls)


def _whole(column: pa.Array, file: ParquetFile, root: str, *, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Floating-point labels as integers: pandas converts a column of integers with missing values to floating point."""
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    is_null = np.isnan(values)
    values = np.where(is_null, 0, values)
    for row in np.flatnonzero((values != np.floor(values)) | (np.abs(values) > 2**53)).tolist():
        raise SourceError(
            f"row {first_row + row} of column {file.label.name!r} ({file.label.type}) is {values[row]}, not a whole number",
            where=f"{file.name} in data.root = {root}",
            remedy="Name the column of classes in data.label_column",
        )
    return values.astype(np.int64), is_null


def _numbered_classes(labels: Labels, files: Sequence[ParquetFile], root: str) -> tuple[str, ...]:
    """The classes of numbers without names: they must count from 0, because a gap means that they are not class numbers."""
    found = np.unique(np.concatenate(list(labels.of_file.values())))
    found = found[found >= 0]
    _require_classes(len(found), found[:NUM_EXAMPLES].astype(str).tolist(), files, root)
    if len(found) < 2 or found[-1] != len(found) - 1:
        missing = np.setdiff1d(np.arange(len(found) + 1), found)[0]
        raise SourceError(
            f"no row has the label {missing}, and the largest is {int(found[-1])}",
            where=f"data.root = {root}",
            remedy="Number the classes from 0, or name them in the schema's metadata",
        )
    return tuple(str(number) for number in range(len(found)))


# ------------------------------------------------------------------------------------------------------------------
# Text


def _read_text(files: Sequence[ParquetFile], names: tuple[str, ...], data: DataConfig) -> Labels:
    """Text labels. The classes are the values that occur, not all categories of a dictionary: pandas keeps the categories of
    rows that were filtered out, and a class without rows cannot be learned."""
    values: dict[bytes | None, int] = {}
    codes = {file.name: _encode(file, values, None if names else files, data.root) for file in files}
    column = files[0].label.name
    allowed = frozenset(names)
    texts, reasons = zip(*[_class_of(value, column, allowed) for value in values], strict=True) if values else ((), ())
    classes = names or tuple(sorted({text for text in texts if text is not None}))
    number_of = {text: number for number, text in enumerate(classes)}
    numbers = np.array([-1 if text is None else number_of[text] for text in texts], np.int64)
    of_file = {name: numbers[of] for name, of in codes.items()}
    faults = [
        Skipped(row_id=f"{name}#{row}", reason=reasons[codes[name][row]])
        for name, labels in of_file.items()
        for row in np.flatnonzero(labels < 0).tolist()
    ]
    return Labels(classes, of_file, faults)


def _encode(
    file: ParquetFile, values: dict[bytes | None, int], judged: Sequence[ParquetFile] | None, root: str
) -> np.ndarray:
    """The index of each row's value in `values`, to which this adds new values; refused if the `judged` files have too many."""
    if file.label.folder_value is not None:
        value = None if file.label.folder_value == HIVE_NULL else file.label.folder_value.encode(errors="replace")
        return np.full(_num_rows(file, root), values.setdefault(value, len(values)))
    codes = [np.empty(0, np.int64)]
    for column in _read_column(file, root):
        encoded = column.dictionary_encode(null_encoding="encode")
        known = [values.setdefault(value, len(values)) for value in encoded.dictionary.to_pylist()]
        codes.append(np.array(known, np.int64)[encoded.indices.to_numpy(zero_copy_only=False)])
        if judged is not None:
            examples = [str(value, errors="replace") for value in islice(values, NUM_EXAMPLES) if value]
            _require_classes(len(values), examples, judged, root)
    return np.concatenate(codes)


def _class_of(value: bytes | None, column: str, names: Collection[str]) -> tuple[str | None, str]:
    """The class that a value names, in Unicode's composed form (NFC), or None and the reason."""
    if value is None:
        return None, f"{column} is null, but must be text"
    if not value:
        return None, f"{column} is empty, but must be text"
    try:
        text = unicodedata.normalize("NFC", value.decode())
    except UnicodeDecodeError:
        return None, f"{column} is {shortened(str(value))}, which is not UTF-8"
    if names and text not in names:
        return None, f"{column} is {shortened(text)!r}, which is not one of the {len(names)} names in the metadata"
    return text, ""


def _show_classes(classes: tuple[str, ...]) -> None:
    """Prints a line with the first classes, and a warning if two look so alike that they may be meant as one."""
    shown = ", ".join(_shown(name) for name in classes[:MAX_CLASSES_TO_SHOW])
    say(f"  classes: {shown}{', ...' if len(classes) > MAX_CLASSES_TO_SHOW else ''} ({len(classes)} in all)")
    alike: dict[str, str] = {}
    for name in classes:
        first = alike.setdefault(" ".join(name.split()).casefold(), name)
        if first != name:
            pair = " and ".join(printable(repr(shortened(one))) for one in (first, name))
            say(f"  {pair} are two classes: they differ only in spaces or capitals")
            return


def _shown(name: str) -> str:
    """A class name, in quotes if it has spaces that are easily overlooked."""
    shown = shortened(name, MAX_NAME_TO_SHOW)
    return printable(shown if name == " ".join(name.split()) else repr(shown))


# ------------------------------------------------------------------------------------------------------------------
# Shared by both


def _require_two_classes(labels: Labels, column: str, root: str) -> None:
    used = np.unique(np.concatenate(list(labels.of_file.values())))
    used = used[used >= 0]
    if len(used) < 2:
        raise SourceError(
            f"every row has the label {labels.classes[used[0]]!r}",
            where=f"column {column!r} in data.root = {root}",
            remedy="There must be two or more classes",
        )


def _require_classes(num_found: int, examples: list[str], files: Sequence[ParquetFile], root: str) -> None:
    """Refuses labels that name rows rather than classes: more than half as many labels as rows."""
    num_rows = sum(file.num_rows for file in files)
    if num_rows >= MIN_ROWS_TO_JUDGE and 2 * num_found > num_rows:
        shown = ", ".join(repr(shortened(example)) for example in examples)
        raise SourceError(
            f"has more than {num_rows // 2:,} different labels in {num_rows:,} rows ({shown}, ...): it names rows, not classes",
            where=f"column {files[0].label.name!r} in data.root = {root}",
            remedy="Name the column of classes in data.label_column",
        )


def _read_column(file: ParquetFile, root: str) -> Iterator[pa.Array]:
    """A file's labels, in batches, because text can be long; text as bytes, because a text column can hold invalid UTF-8."""
    is_text = file.label.kind == "text"
    with open_file(root, file.path, file.name) as opened:
        num_read = 0
        try:
            for batch in opened.iter_batches(ROWS_PER_READ, columns=[file.label.name]):
                column = batch.column(batch.schema.get_field_index(file.label.name))
                num_read += len(column)
                # The cast refuses damaged indices of a dictionary.
                yield column.cast(pa.large_binary()) if is_text else column
        except (OSError, pa.ArrowException) as error:
            raise unreadable(file.name, root, error) from error
        _require_count(opened.metadata, num_read, file, root)


def _num_rows(file: ParquetFile, root: str) -> int:
    """The number of rows of a file, after checking that its footer is consistent."""
    with open_file(root, file.path, file.name) as opened:
        _require_count(opened.metadata, file.num_rows, file, root)
    return file.num_rows


def _require_count(footer: pq.FileMetaData, num_read: int, file: ParquetFile, root: str) -> None:
    """Refuses a damaged footer, whose row counts disagree."""
    in_groups = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    if not num_read == footer.num_rows == in_groups:
        counts = f"its footer counts {footer.num_rows} rows, {in_groups} in row groups, {num_read} labels"
        raise unreadable(file.name, root, ValueError(counts))
