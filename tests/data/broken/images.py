"""Images that cannot be taken, by the function that makes each."""

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.data.broken.scene import SIDE, Case, encoded, picture, png_by_hand, png_chunk

IMAGES: list[Case] = []


def image(*words: str, remedy: str = "Fix or delete it", **settings: Any) -> Callable[[Any], Any]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        given = {f"data.{key}": value for key, value in settings.items()}
        whole_remedy = f". {remedy}, or set data.on_error=skip to skip such rows"
        IMAGES.append(Case(functools.cache(make), words, settings=given, remedy=whole_remedy))
        return make

    return register


@image("empty")
def no_bytes() -> bytes:
    return b""


@image("not an image that can be read")
def random_bytes() -> bytes:
    return np.random.default_rng(0).bytes(300)


@image("not an image that can be read")
def a_text() -> bytes:
    return b"this is not an image\n" * 20


@image("not an image that can be read")
def a_zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x.png", encoded(picture(0)))
    return packed.getvalue()


@image("is an SVG file", "not an image that can be read (PNG", "AVIF", remedy="Convert it to PNG")
def an_svg() -> bytes:
    return b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'


@image("not an image that can be read")
def an_eps() -> bytes:
    return encoded(picture(0), "EPS")


@image("not an image that can be read")
def a_picture_of_another_format() -> bytes:
    return encoded(picture(0), "ICO")


@image("not an image that can be read")
def a_png_of_its_signature_alone() -> bytes:
    return encoded(picture(0))[:8]


@image("not an image that can be read")
def a_png_with_a_broken_header_crc() -> bytes:
    content = bytearray(encoded(picture(0)))
    content[29] ^= 0xFF  # the CRC of IHDR
    return bytes(content)


@image("cannot be decoded")
def a_png_with_a_broken_pixel_crc() -> bytes:
    data = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in picture(0)), 0))
    checksum = zlib.crc32(b"IDAT" + data)
    data[30] ^= 0x10  # a pixel
    return png_by_hand(SIDE, SIDE, data=bytes(data), crc=checksum)


@image("cannot be decoded")
def a_png_with_corrupt_pixels() -> bytes:
    return png_by_hand(SIDE, SIDE, data=b"\xff" * 40)


@image("cannot be decoded", "truncated")
def a_truncated_png() -> bytes:
    content = encoded(picture(0))
    return content[: len(content) - 40]


@image("cannot be decoded", "truncated")
def a_truncated_png_of_another_size() -> bytes:
    content = encoded(picture(0, 9, 9))
    return content[: len(content) - 40]


@image("cannot be decoded", "truncated")
def a_truncated_jpeg() -> bytes:
    content = encoded(picture(0, SIDE, SIDE), "JPEG")
    return content[: len(content) - 20]


@image("not an image that can be read")
def a_truncated_webp() -> bytes:
    content = encoded(picture(0, SIDE, SIDE, 3), "WEBP", lossless=True)
    return content[: len(content) - 60]


@image("not an image that can be read")
def an_avif_cut_off_in_its_header() -> bytes:
    return encoded(picture(0), "AVIF")[:200]


@image("cannot be decoded")
def a_truncated_avif() -> bytes:
    return encoded(picture(0), "AVIF")[:-2]


@image("cannot be decoded")
def a_truncated_jpeg_2000() -> bytes:
    return encoded(picture(0), "JPEG2000")[:-20]


@image("cannot be decoded")
def a_jpeg_2000_whose_pixels_are_not_of_the_size_that_its_header_says() -> bytes:
    content = encoded(picture(0), "JPEG2000")
    start = content.index(b"ihdr") + 4
    return content[:start] + struct.pack(">II", 5, 6) + content[start + 8 :]


@image("12000x12000", "data.max_megapixels = 64", remedy="Raise data.max_megapixels")
def a_jpeg_2000_bomb() -> bytes:
    content = encoded(picture(0), "JPEG2000")
    start = content.index(b"ihdr") + 4
    return content[:start] + struct.pack(">II", 12_000, 12_000) + content[start + 8 :]


@image("12000x12000", "data.max_megapixels = 64", remedy="Raise data.max_megapixels")
def an_avif_bomb() -> bytes:
    content = encoded(picture(0), "AVIF")
    start = content.index(b"ispe") + 8
    return content[:start] + struct.pack(">II", 12_000, 12_000) + content[start + 8 :]


@image("cannot be decoded", color="grey")
def a_truncated_gif() -> bytes:
    content = encoded(picture(0), "GIF")
    return content[: len(content) - 40]


@image("cannot be decoded")
def a_truncated_tiff() -> bytes:
    content = encoded(picture(0), "TIFF")
    return content[: len(content) - 20]


@image("cannot be decoded")
def a_truncated_bmp() -> bytes:
    content = encoded(picture(0), "BMP")
    return content[: len(content) - 20]


@image("cannot be decoded")
def a_truncated_pgm() -> bytes:
    content = encoded(picture(0), "PPM")
    return content[: len(content) - 20]


@image("900", "data.max_megapixels = 64", remedy="Make it smaller")
def a_decompression_bomb() -> bytes:
    return png_by_hand(30_000, 30_000, data=zlib.compress(bytes(1_000_000)))


@image("12000x12000", "data.max_megapixels = 64", remedy="Raise data.max_megapixels")
def an_image_that_pillow_warns_of() -> bytes:
    return png_by_hand(12_000, 12_000)


@image("1001x1000", "data.max_megapixels = 1", remedy="Raise data.max_megapixels", max_megapixels=1)
def an_image_above_the_limit() -> bytes:
    return encoded(np.zeros((1000, 1001), np.uint8))


@image("can")
def a_png_with_a_bomb_of_a_comment() -> bytes:
    return png_by_hand(SIDE, SIDE, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000))))


@image("can")
def a_png_with_broken_exif() -> bytes:
    return png_by_hand(SIDE, SIDE, png_chunk(b"eXIf", b"neither II nor MM"))


@image("is 9x8, but the first image is 8x8", remedy="Set data.image_size")
def an_image_of_another_size() -> bytes:
    return encoded(picture(0, 8, 9))


@image("is in colour, but the first image is grey", remedy="Set data.color to grey or rgb")
def a_colour_image_among_grey_ones() -> bytes:
    return encoded(picture(0, SIDE, SIDE, 3))
