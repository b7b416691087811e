"""Finds the image and label columns of a Parquet file from its footer: their names, types, and class names.

images    binary, struct<bytes: binary, path: string>, or text: paths of image files
labels    integers, whole floating-point numbers, booleans or text (categories included); or a folder `label=cat/`
names     schema metadata "huggingface": {"info": {"features": {"label": {"names": [...]}}}}
"""

import difflib
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from rcnn.config import DataConfig
from rcnn.data.sources.parquet_files import open_file
from rcnn.errors import SourceError
from rcnn.text import parse_json

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MAX_NAMES_IN_MESSAGE = 10
MAX_TEXT_IN_MESSAGE = 100

LabelKind = Literal["whole numbers", "fractions", "true or false", "text", "nothing"]
"""`fractions` are floating-point numbers; `nothing` is Arrow's null type, for a column whose rows are all null."""


@dataclass(frozen=True)
class ImageColumn:
    """Where a row's image is: its bytes in the column, or a separate file (an external image).

    Attributes:
        name: the column's name.
        content: Parquet path of the encoded bytes; empty if the column has none.
        path: Parquet path of the image files' paths; empty if the column has none.
    """

    name: str
    content: str
    path: str


@dataclass(frozen=True)
class LabelColumn:
    """Where a row's label is.

    Attributes:
        name: the column's name, or the key of a folder such as `label=cat`.
        kind: the kind of its values.
        type: Arrow's name of its type.
        classes: the metadata's names for the numbers 0, 1, ...; often empty.
        folder_value: the label of all rows if a folder states it; None if a column holds the labels.
    """

    name: str
    kind: LabelKind
    type: str
    classes: tuple[str, ...] = ()
    folder_value: str | None = None


@dataclass(frozen=True)
class ParquetFile:
    """One file, as described by its footer; `name` is its path below the root."""

    path: str
    name: str
    num_bytes: int
    num_rows: int
    image: ImageColumn
    label: LabelColumn


def read_footer(data: DataConfig, name: str, info: fs.FileInfo) -> ParquetFile:
    """Reads a file's footer.

    Raises:
        SourceError: it is damaged, or its columns do not hold images and labels.
    """
    place = f"{name} in data.root = {data.root}"
    if data.image_column and data.image_column == data.label_column:
        raise SourceError(
            f"is {data.label_column!r}, and so is data.image_column",
            where="data.label_column",
            remedy="Name two different columns",
        )
    with open_file(data.root, info.path, name) as file:
        image = _find_image_column(file.schema_arrow, data, place)
        label = _find_label_column(file.schema_arrow, folder_labels(name), image.name, data, place)
        return ParquetFile(info.path, name, info.size, file.metadata.num_rows, image, label)


def folder_labels(name: str) -> dict[str, str]:
    """The keys and values of a Hive-partitioned path: `label=cat/part-0.parquet` -> {"label": "cat"}."""
    pairs = [folder.partition("=") for folder in name.split("/")[:-1]]
    return {unquote(key): unquote(value) for key, equals, value in pairs if equals}


def shortened(text: str, length: int = MAX_TEXT_IN_MESSAGE) -> str:
    """Text from a file, truncated to fit into a message."""
    return text if len(text) <= length else f"{text[:length]}..."


def _find_image_column(schema: pa.Schema, data: DataConfig, place: str) -> ImageColumn:
    name = _find_name(
        schema.names,
        [field.name for field in schema if _image_leaves(field) is not None and not _is_text(field.type)]
        or [field.name for field in schema if _is_text(field.type)],
        setting="data.image_column",
        chosen=data.image_column,
        usual=IMAGE_COLUMNS,
        place=place,
        otherwise="Give files with a column of encoded images",
    )
    leaves = _image_leaves(schema.field(name))
    if leaves is None:
        raise SourceError(
            f"column {name!r} is {shortened(str(schema.field(name).type))}",
            where=place,
            remedy="Name a column with one image a row in data.image_column: binary, struct<bytes: binary, path: string>, "
            "or paths as text",
        )
    return ImageColumn(name, *leaves)


def _image_leaves(field: pa.Field) -> tuple[str, str] | None:
    """The Parquet paths of bytes and of paths, empty if absent; None if the column cannot hold images."""
    if not pa.types.is_struct(field.type):
        return (field.name, "") if _is_binary(field.type) else ("", field.name) if _is_text(field.type) else None
    names = [child.name for child in field.type]
    kinds = {child.name: child.type for child in field.type if names.count(child.name) == 1}
    # Arrow gives the type null to a field that is null in every row.
    content, path = (kinds.get(name, pa.null()) for name in ("bytes", "path"))
    if not (_is_binary(content) or pa.types.is_null(content)) or not (_is_binary(content) or _is_text(path)):
        return None
    return f"{field.name}.bytes" if _is_binary(content) else "", f"{field.name}.path" if _is_text(path) else ""


def _find_label_column(
    schema: pa.Schema, folders: dict[str, str], image: str, data: DataConfig, place: str
) -> LabelColumn:
    kinds = {field.name: _label_kind(field.type) for field in schema}
    name = _find_name(
        [*schema.names, *(key for key in folders if key not in schema.names)],
        [name for name, kind in kinds.items() if name != image and kind not in (None, "fractions", "nothing")]
        + list(folders),
        setting="data.label_column",
        chosen=data.label_column,
        usual=LABEL_COLUMNS,
        place=place,
        otherwise="Give files with a column of labels",
        folders=set(folders) - set(schema.names),
    )
    if name not in schema.names:
        return LabelColumn(name, "text", "a folder's name", folder_value=folders[name])
    kind, found = kinds[name], shortened(str(schema.field(name).type))
    if kind is None:
        raise SourceError(
            f"column {name!r} is {found}",
            where=place,
            remedy="Name a column with one label a row in data.label_column: integers, text or booleans",
        )
    return LabelColumn(name, kind, found, _class_names(schema, name, kind, place))


def _label_kind(kind: pa.DataType) -> LabelKind | None:
    """The kind of labels of an Arrow type; None if it cannot hold labels."""
    if pa.types.is_integer(kind):
        return "whole numbers"
    if pa.types.is_floating(kind):
        return "fractions"
    if pa.types.is_boolean(kind):
        return "true or false"
    if _is_text(kind):
        return "text"
    return "nothing" if pa.types.is_null(kind) else None


def _is_binary(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return any(of(kind) for of in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return any(of(kind) for of in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values: pandas and polars write categories as Arrow dictionaries."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _find_name(
    names: Sequence[str],
    fitting: list[str],
    *,
    setting: str,
    chosen: str,
    usual: tuple[str, ...],
    place: str,
    otherwise: str,
    folders: Container[str] = (),
) -> str:
    """The column that a setting names, or otherwise the first of the usual names that exists.

    Args:
        names: names of all columns, and of the `folders` that serve as columns.
        fitting: columns to suggest if none of the names exists.
        otherwise: the remedy if no column is suitable.
    """
    for name in (chosen,) if chosen else usual:
        if names.count(name) > 1:
            raise SourceError(f"has the column {name!r} twice", where=place, remedy="Rename one of them")
        if name in names:
            return name
    wanted = f"{chosen!r} ({setting})" if chosen else " or ".join(map(repr, usual))
    near = difflib.get_close_matches(chosen, names, n=1)
    offers = [repr(name) for name in dict.fromkeys(fitting)]
    if near:
        remedy = f"Did you mean {near[0]!r}?"
    elif offers:
        remedy = f"Set {setting} to {_listed(offers, last=' or ')}"
    else:
        remedy = otherwise
    shown = [f"{name} (folders)" if name in folders else name for name in names]
    raise SourceError(f"has no column {wanted}, only {_listed(shown)}", where=place, remedy=remedy)


def _listed(names: Sequence[str], last: str = ", ") -> str:
    if len(names) > MAX_NAMES_IN_MESSAGE:
        return f"{', '.join(names[:MAX_NAMES_IN_MESSAGE])}, ... ({len(names)} in all)"
    return last.join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none"


def _class_names(schema: pa.Schema, label: str, kind: LabelKind, place: str) -> tuple[str, ...]:
    """The class names in the schema's metadata, in Unicode's composed form (NFC); empty if there are none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return ()
    try:
        features = parse_json(text)["info"]["features"]
        if (
            label not in features and kind == "text"
        ):  # a column of text that was added later: it names its classes itself
            return ()
        given = _names_of(features[label])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"its metadata 'huggingface' does not describe {label!r} "
            f"({type(error).__name__}: {shortened(' '.join(str(error).split()))})",
            where=place,
            remedy="Remove the metadata, or write it as the datasets library does",
        ) from error
    names = [unicodedata.normalize("NFC", name) for name in given]
    first_numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        if (first := first_numbers.setdefault(name, number)) < number:
            form = "" if given[first] == given[number] else ", in two Unicode forms"
            raise SourceError(
                f"its metadata 'huggingface' names the class {shortened(name)!r} twice{form} ({first} and {number})",
                where=place,
                remedy="Rename one of them",
            )
    return tuple(names)


def _names_of(feature: dict[str, Any]) -> list[str]:
    names = feature.get("names") or []  # null where the classes have numbers only
    if not isinstance(names, list):
        raise ValueError(f"names are {names!r}, not a list")
    texts = [str(name) for name in names]
    for text in texts:
        text.encode()  # JSON can hold lone surrogates, which no file or log accepts
    return texts
