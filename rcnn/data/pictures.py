"""Stored images as pictures to look at: single pictures and contact sheets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rcnn.data.fonts import font_of
from rcnn.text import printable

MARGIN_PIXELS = 2
FONT_PIXELS = 11
CAPTION_PIXELS = 16
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)
SMALLEST_TILE_PIXELS = 56


def as_picture(image_HWC: np.ndarray) -> Image.Image:
    """A uint8 image (H, W, C) with 1 or 3 channels, as a Pillow image."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)


def contact_sheet(
    title: str,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    num_columns: int,
    tile_pixels: int = SMALLEST_TILE_PIXELS,
) -> Image.Image:
    """A grid of images (H, W, C); smaller ones than `tile_pixels` are enlarged by an integer factor.

    Each caption is below its image, and extends below the following images of the row if their captions are empty. Text that
    does not fit is truncated with an ellipsis.
    """
    height, width = images[0].shape[:2]
    factor = max(1, -(-tile_pixels // max(height, width)))
    tile = (width * factor, height * factor)
    cell = (tile[0] + MARGIN_PIXELS, tile[1] + CAPTION_PIXELS + MARGIN_PIXELS)
    num_rows = -(-len(images) // num_columns)
    sheet = Image.new("RGB", (num_columns * cell[0], CAPTION_PIXELS + num_rows * cell[1]), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN_PIXELS, 0), title, sheet.width - MARGIN_PIXELS)
    for number, (image_HWC, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        corner = (column * cell[0], CAPTION_PIXELS + row * cell[1])
        sheet.paste(as_picture(image_HWC).resize(tile, Image.Resampling.NEAREST), corner)
        num_tiles = 1 + _empty_ones(captions[number + 1 : (row + 1) * num_columns])
        _write(pen, (corner[0], corner[1] + tile[1]), caption, num_tiles * cell[0] - MARGIN_PIXELS)
    return sheet


def _empty_ones(captions: Sequence[str]) -> int:
    """How many captions are empty before the first that is not."""
    return next((number for number, caption in enumerate(captions) if caption), len(captions))


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    text = printable(text)
    font = ImageFont.truetype(font_of(text) or font_of(""), FONT_PIXELS)
    pen.text(corner, _shortened(text, font, width), INK, font)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, truncated with an ellipsis to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    fitting = (f"{text[:length].rstrip()}…" for length in range(len(text) - 1, 0, -1))
    return next((shorter for shorter in fitting if font.getlength(shorter) <= width), "")
