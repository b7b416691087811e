"""One encoded image (PNG, JPEG, ...) to uint8 pixels of a stated shape, by a stated rule.

Ingest and `rcnn predict` both come here, so a model is asked about images made the way it was trained on.
"""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps

from rcnn.config import DataConfig
from rcnn.errors import SourceError

# What is read, by content and not by file name (JPEG includes MPO). Not EPS: Pillow hands it to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
# Not the image's fault: to leave it out for good would be wrong.
PASSING_FAULTS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
ORIENTATION_TAG = 0x0112
MODES = {1: "L", 3: "RGB"}
NO_IMAGE = "is no image that can be read ({})"


class BadImage(Exception):
    """Why an image cannot be taken."""


@dataclass(frozen=True)
class ImageRule:
    """What images are made into.

    Attributes:
        image_shape: (H, W, C) that comes out.
        resize: how another size is brought to it; None where another size is an error.
        is_grey_required: whether a colour image is an error, although C is 1.
        max_pixels: larger images are refused before they are decoded.
    """

    image_shape: tuple[int, int, int]
    resize: Literal["crop", "pad", "stretch"] | None
    is_grey_required: bool
    max_pixels: int


def find_rule(data: DataConfig, first: IO[bytes] | Path) -> ImageRule:
    """The rule that the settings ask for; what they leave open is taken from the first image.

    Raises:
        BadImage: the first image cannot be read.
    """
    max_pixels = data.max_megapixels * 1_000_000
    with unwarned(), _opened(first, max_pixels) as image, _decoding():
        is_grey = data.color == "grey" or (data.color == "auto" and _is_grey(image))
        width, height = _upright(image).size
    if data.image_size:
        width = height = data.image_size
    return ImageRule(
        image_shape=(height, width, 1 if is_grey else 3),
        resize=data.resize if data.image_size else None,
        is_grey_required=is_grey and data.color == "auto",
        max_pixels=max_pixels,
    )


def decode_image(source: IO[bytes] | Path, rule: ImageRule) -> np.ndarray:
    """The pixels, uint8 (H, W, C).

    Turned upright as EXIF says; 16-bit greys are scaled to 8; transparency falls away; of an animation the first picture.

    Raises:
        BadImage: it is no image, or not one that the rule takes.
    """
    height, width, channels = rule.image_shape
    with _opened(source, rule.max_pixels) as opened:
        if rule.is_grey_required and not _is_grey(opened):
            raise BadImage("is in colour, and the first image is grey: set data.color to grey or rgb")
        with _decoding():
            image = _eight_bits(_upright(opened))
            image.info.pop("transparency", None)  # Pillow would warn that it falls away
            if image.mode != MODES[channels]:
                image = image.convert(MODES[channels])
            image.load()
    if image.size != (width, height):
        if rule.resize is None:
            found = f"{image.width}x{image.height}"
            raise BadImage(f"is {found}, and the first image is {width}x{height}: set data.image_size")
        image = _resized(image, (width, height), rule.resize)
    return np.asarray(image).reshape(rule.image_shape)


def _opened(source: IO[bytes] | Path, max_pixels: int) -> Image.Image:
    """An image whose header has been read, and nothing else."""
    try:
        image = Image.open(source, formats=FORMATS)
    except FileNotFoundError as error:
        raise BadImage("is not there") from error
    except OSError as error:
        if error.errno in PASSING_FAULTS:
            raise SourceError(
                f"cannot be read for now ({error.strerror})",
                where=str(source),
                remedy="Run the same command again: what is finished is kept",
                retryable=True,
            ) from error
        if error.errno:
            raise BadImage(f"cannot be read ({error.strerror})") from error
        raise BadImage("is empty" if _is_empty(source) else NO_IMAGE.format(", ".join(FORMATS))) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, above any of ours
        raise BadImage(f"is larger than data.max_megapixels = {max_pixels // 1_000_000} allows ({error})") from error
    except Exception as error:  # Pillow raises whatever the broken bytes lead it to
        raise BadImage(NO_IMAGE.format(_line(error))) from error
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        image.close()
        raise BadImage(f"is {size}, and data.max_megapixels = {max_pixels // 1_000_000} allows no more")
    return image


def _is_empty(source: IO[bytes] | Path) -> bool:
    return (source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)) == 0


@contextmanager
def _decoding() -> Iterator[None]:
    """Names what Pillow raises, which is whatever the broken bytes lead it to."""
    try:
        yield
    except Exception as error:
        raise BadImage(f"cannot be decoded ({_line(error)})") from error


@contextmanager
def unwarned() -> Iterator[None]:
    """Silences Pillow's warning about large images: the limit is ours. Around many images, since it is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _upright(image: Image.Image) -> Image.Image:
    """The image, turned if EXIF asks for it; otherwise it is not copied."""
    return image if image.getexif().get(ORIENTATION_TAG, 1) == 1 else ImageOps.exif_transpose(image)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion would clip them to white. Deeper pixels are refused."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if not image.mode.startswith("I"):
        return image
    greys = np.asarray(image, dtype=np.int64)
    if greys.min() < 0 or greys.max() >= 1 << 16:
        raise ValueError("its greys exceed 16 bits")
    return Image.fromarray((greys >> 8).astype(np.uint8))


def _resized(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    if resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    if resize == "pad":
        return ImageOps.pad(image, size, Image.Resampling.BILINEAR)
    return image.resize(size, Image.Resampling.BILINEAR)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
