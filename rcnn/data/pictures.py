"""Stored images as pictures for people: single ones, and contact sheets."""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

MARGIN_PIXELS = 2
CAPTION_PIXELS = 14
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)
SMALLEST_TILE_PIXELS = 56


def as_picture(image_HWC: np.ndarray) -> Image.Image:
    """A uint8 image of 1 or 3 channels."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)


def file_name(label: str) -> str:
    """A class name without what a file name cannot hold, a slash say."""
    return re.sub(r"[^\w.+ -]+", "-", label) or "-"


def contact_sheet(
    title: str, images: Sequence[np.ndarray], captions: Sequence[str], *, num_columns: int
) -> Image.Image:
    """Images (H, W, C) in rows, enlarged by a whole factor where they are small, each with a caption below it."""
    height, width = images[0].shape[:2]
    factor = max(1, -(-SMALLEST_TILE_PIXELS // max(height, width)))
    tile = (width * factor, height * factor)
    cell = (tile[0] + MARGIN_PIXELS, tile[1] + CAPTION_PIXELS + MARGIN_PIXELS)
    num_rows = -(-len(images) // num_columns)
    sheet = Image.new("RGB", (num_columns * cell[0], CAPTION_PIXELS + num_rows * cell[1]), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PIXELS, 0), title, INK)
    for number, (image_HWC, caption) in enumerate(zip(images, captions, strict=True)):
        corner = ((number % num_columns) * cell[0], CAPTION_PIXELS + (number // num_columns) * cell[1])
        sheet.paste(as_picture(image_HWC).resize(tile, Image.Resampling.NEAREST), corner)
        pen.text((corner[0], corner[1] + tile[1]), caption, INK)
    return sheet
