"""Decodes one encoded image (PNG, JPEG, ...) to uint8 pixels of a given shape, by a given rule.

Ingest and `rcnn predict` both use it, so a model predicts on images that were decoded like its training images.
"""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageChops, ImageOps, features

from rcnn.config import DataConfig
from rcnn.errors import SourceError

# The formats that are read, detected by content and not by file name (JPEG includes MPO), with their usual extensions. Not EPS:
# Pillow runs an external program for it. AVIF and JPEG 2000 need libraries that Pillow's wheels include and some builds lack.
ENDINGS_OF = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    **({"AVIF": (".avif",)} if features.check("avif") else {}),
    **({"JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")} if features.check("jpg_2000") else {}),
}
FORMATS = tuple(ENDINGS_OF)
ENDINGS = tuple(ending for endings in ENDINGS_OF.values() for ending in endings)
# Transient errors, not the image's fault: skipping the image for good would be wrong.
PASSING_FAULTS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
ORIENTATION_TAG = 0x0112
MODES = {1: "L", 3: "RGB"}
NO_IMAGE = "is not an image that can be read ({})"
SVG = f"is an SVG file (vector graphics), not an image that can be read ({', '.join(FORMATS)})"
BYTES_TO_TELL_SVG = 4096  # an XML declaration, a comment and a DOCTYPE can come first
# Formats without a greyscale mode: an image counts as grey if its pixels are. The colour that encoding adds to grey pixels (the
# largest difference between a pixel's channels) was 1 of 255 in WebP (libwebp rounds) and up to 4 in AVIF (tiny images, quality
# 30 and below), measured on noise, gradients and flat areas of 1x1 to 130x100 pixels at quality 0 to 100.
FORMATS_WITHOUT_GREY = ("WEBP", "AVIF")
MAX_COLOUR_OF_GREY = 4


class BadImage(Exception):
    """Why an image cannot be used, and what the user can do about it."""

    def __init__(self, reason: str, *, remedy: str = "Fix or delete it"):
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True)
class ImageRule:
    """How images are converted.

    Attributes:
        image_shape: (H, W, C) of the result.
        resize: how images of another size are resized; None: another size is an error.
        is_grey_required: whether a colour image is an error; otherwise it is converted where C is 1.
        max_pixels: larger images are refused before they are decoded.
    """

    image_shape: tuple[int, int, int]
    resize: Literal["crop", "pad", "stretch"] | None
    is_grey_required: bool
    max_pixels: int


def find_rule(data: DataConfig, first: IO[bytes] | Path) -> ImageRule:
    """The rule that the settings ask for; size and colour that they do not fix are those of the first image.

    Raises:
        BadImage: the first image cannot be read.
    """
    max_pixels = data.max_megapixels * 1_000_000
    with unwarned(), _opened(first, max_pixels) as opened:
        image = _loaded(opened)
    is_grey = data.color == "grey" or (data.color == "auto" and _is_grey(image, opened.format))
    width, height = image.size
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

    The EXIF orientation is applied; 16-bit greyscale is scaled to 8 bits; transparency is dropped; animations give their first
    frame.

    Raises:
        BadImage: it cannot be read, or the rule does not admit it.
    """
    height, width, channels = rule.image_shape
    with _opened(source, rule.max_pixels) as opened:
        image = _loaded(opened)
    if rule.is_grey_required and not _is_grey(image, opened.format):
        raise BadImage("is in colour, but the first image is grey", remedy="Set data.color to grey or rgb")
    if image.mode != MODES[channels]:
        with _decoding():
            image = image.convert(MODES[channels])
    if image.size != (width, height):
        if rule.resize is None:
            found = f"{image.width}x{image.height}"
            raise BadImage(f"is {found}, but the first image is {width}x{height}", remedy="Set data.image_size")
        image = _resized(image, (width, height), rule.resize)
    return np.asarray(image).reshape(rule.image_shape)


def require_header(source: IO[bytes] | Path, data: DataConfig) -> None:
    """Checks that a file has the header of an image, without decoding it; for files whose names do not say so.

    Raises:
        BadImage: it has none.
    """
    _opened(source, data.max_megapixels * 1_000_000).close()


def _opened(source: IO[bytes] | Path, max_pixels: int) -> Image.Image:
    """The image, with only its header read."""
    try:
        image = Image.open(source, formats=FORMATS)
    except FileNotFoundError as error:
        raise BadImage("does not exist") from error
    except OSError as error:
        if error.errno in PASSING_FAULTS:
            raise SourceError(
                f"cannot be read at the moment ({error.strerror})",
                where=str(source),
                remedy="Run the same command again: finished work is kept",
                retryable=True,
            ) from error
        if error.errno:
            raise BadImage(f"cannot be read ({error.strerror})") from error
        raise _unknown_kind(source) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, higher than any of ours
        fault = f"is larger than data.max_megapixels = {max_pixels // 1_000_000} allows ({_line(error)})"
        raise BadImage(fault, remedy="Make it smaller") from error
    except Exception as error:  # on broken bytes Pillow raises almost anything
        raise BadImage(NO_IMAGE.format(_line(error))) from error
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        image.close()
        raise BadImage(
            f"is {size}, larger than data.max_megapixels = {max_pixels // 1_000_000} allows",
            remedy="Raise data.max_megapixels",
        )
    return image


def _unknown_kind(source: IO[bytes] | Path) -> BadImage:
    """The error for a file that is in none of the formats."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            start = stream.read(BYTES_TO_TELL_SVG)
    else:
        source.seek(0)
        start = source.read(BYTES_TO_TELL_SVG)
    if not start:
        return BadImage("is empty")
    if b"<svg" in start:
        return BadImage(SVG, remedy="Convert it to PNG")
    return BadImage(NO_IMAGE.format(", ".join(FORMATS)))


@contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever Pillow raises on broken bytes into a `BadImage`."""
    try:
        yield
    except Exception as error:
        raise BadImage(f"cannot be decoded ({_line(error)})") from error


@contextmanager
def unwarned() -> Iterator[None]:
    """Silences Pillow's warning about large images, since we check our own limit. Slow, so used once around many images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _loaded(opened: Image.Image) -> Image.Image:
    """The image, decoded, upright, with 8 bits per channel."""
    with _decoding():
        image = _eight_bits(_upright(opened))
        image.info.pop("transparency", None)  # Pillow would warn that it is dropped
        image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied; not copied if there is none."""
    return image if image.getexif().get(ORIENTATION_TAG, 1) == 1 else ImageOps.exif_transpose(image)


def _is_grey(image: Image.Image, kind: str | None) -> bool:
    """Whether a loaded image of this format counts as grey.

    In formats with a greyscale mode, the mode decides: a JPEG with three channels counts as colour, whatever its pixels.
    """
    if image.mode in ("1", "L", "LA", "La"):
        return True
    if image.mode in ("P", "PA"):
        return _largest_colour(image) == 0
    return kind in FORMATS_WITHOUT_GREY and _largest_colour(image) <= MAX_COLOUR_OF_GREY


def _largest_colour(image: Image.Image) -> int:
    """The largest difference between two channels of a pixel, 0 to 255."""
    with _decoding():
        red, green, blue = image.convert("RGB").split()
    pairs = ((red, green), (green, blue), (red, blue))
    return max(int(ImageChops.difference(one, other).getextrema()[1]) for one, other in pairs)  # type: ignore[arg-type]


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale scaled to 8 bits; Pillow's own conversion would clip it to white. Deeper pixels are refused."""
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
