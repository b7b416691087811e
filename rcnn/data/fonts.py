"""Fonts that can write a class name: DejaVu, which matplotlib ships, or an installed font for what it lacks, such as CJK."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from matplotlib import font_manager, rc_context
from matplotlib.ft2font import FT2Font

OWN_FAMILY = "DejaVu Sans"
STYLES = ("bold", "italic", "oblique", "black", "light", "thin", "mono")


def readable(name: str, label: int) -> str:
    """The name, or `class 7` if no font on this machine has all of its characters, which would print as boxes."""
    return name if font_of(name) else f"class {label}"


@cache
def font_of(text: str) -> str:
    """The file of the first font that has every character of the text; empty if there is none."""
    own = str(font_manager.findfont(OWN_FAMILY))
    return own if _has_all(own, text) else next((file for file in _installed() if _has_all(file, text)), "")


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Sets font families that cover these texts; matplotlib tries them in order for each character."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns if a family lacks a regular or bold weight, as many CJK families do
    try:
        with rc_context({"font.family": _families_for(texts)}):
            yield
    finally:
        log.setLevel(level)


def _families_for(texts: Iterable[str]) -> list[str]:
    families = [OWN_FAMILY]
    for file in sorted({font_of(text) for text in texts} - {"", font_of("")}):
        font_manager.fontManager.addfont(file)  # matplotlib's cached font list may be older than the font
        families.append(FT2Font(file).family_name)
    return families


@cache
def _installed() -> list[str]:
    """The system's fonts, upright fonts of normal weight first."""
    return sorted(
        font_manager.findSystemFonts(),
        key=lambda file: (any(style in Path(file).stem.lower() for style in STYLES), file),
    )


def _has_all(file: str, text: str) -> bool:
    font = _opened(file)
    return font is not None and all(font.get_char_index(ord(character)) for character in text)


@cache
def _opened(file: str) -> FT2Font | None:
    try:
        return FT2Font(file)
    except (OSError, RuntimeError):  # a format that FreeType cannot scale, such as bitmap emoji
        return None
