"""Untrusted text: made safe to print, turned into file names, parsed as JSON.

Class names, file names and settings come from users and their data. They can contain control characters, be too long for a
file name, or differ only in characters that a file name cannot contain.
"""

import json
import re
from typing import Any

MAX_STEM_BYTES = 80  # file systems allow 255, and callers add numbers and extensions


def printable(text: str) -> str:
    """The text with each unprintable character (control, bidirectional, lone surrogate) replaced by its escape."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def file_stem(label: int, name: str) -> str:
    """A file name for a class, without extension: `007-Ankle boot`. The label keeps it unique."""
    readable = re.sub(r"[^\w.+ -]+", "-", printable(name)).strip()
    shortened = readable.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
    return f"{label:03d}-{shortened}".rstrip("- .")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply for Python, or has an object with a duplicate key.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"it names {key!r} twice")
        table[key] = value
    return table
