"""One encoded image: what comes out is what numpy and Pillow's own operations say, and what cannot be read is named."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from rcnn.config import DataConfig
from rcnn.data.sources.decode import (
    ENDINGS,
    FORMATS,
    ORIENTATION_TAG,
    BadImage,
    ImageRule,
    decode_image,
    find_rule,
    require_header,
)

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
SIXTEEN_BITS = np.array([[0, 255, 256], [32767, 32768, 65535]], np.uint16)
GREYS = np.random.default_rng(3).integers(0, 256, (24, 40), dtype=np.uint8)
NO_IMAGE = "is not an image that can be read"


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes that Pillow writes."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def decoded(content: bytes, **settings: Any) -> np.ndarray:
    """The pixels, by the rule that the image itself gives."""
    data = DataConfig(source="folder", root="x", **settings)
    return decode_image(io.BytesIO(content), find_rule(data, io.BytesIO(content)))


def as_pillow_has_it(content: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert(mode))


def png_header(width: int, height: int) -> bytes:
    """A PNG that states its size, and has no pixels."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": b"\0" * 64}
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_the_content_decides_on_the_format_and_not_the_ending(tmp_path: Path, kind: str, ending: str) -> None:
    content = encoded(COLOURS, kind)
    (tmp_path / f"x{ending}").write_bytes(content)
    rule = find_rule(DataConfig(source="folder", root="x"), tmp_path / f"x{ending}")
    pixels = decode_image(tmp_path / f"x{ending}", rule)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, as_pillow_has_it(content))


def test_avif_and_jpeg_2000_are_read_where_pillow_reads_them() -> None:
    assert ("AVIF" in FORMATS, ".avif" in ENDINGS) == (features.check("avif"),) * 2
    assert ("JPEG2000" in FORMATS, ".jp2" in ENDINGS) == (features.check("jpg_2000"),) * 2


def test_the_endings_are_those_that_pillow_gives_the_formats() -> None:
    Image.init()
    assert {Image.EXTENSION[ending] for ending in ENDINGS} == set(FORMATS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("PPM", {}),
        ("JPEG2000", {}),
        ("JPEG2000", {"no_jp2": True}),
    ],
)
def test_lossless_pixels_come_back_as_they_were(kind: str, options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(decoded(encoded(COLOURS, kind, **options)), COLOURS)


@pytest.mark.parametrize("content", [encoded(COLOURS, kind) for kind in ("EPS", "ICO", "PDF", "TGA")] + [b"hello"])
def test_other_formats_and_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(BadImage, match=NO_IMAGE):
        decoded(content)


@pytest.mark.parametrize(
    "start",
    [b"", b'<?xml version="1.0" encoding="utf-8"?>\n<!-- drawn by hand -->\n', b"<!--" + b" " * 3000 + b"-->"],
)
@pytest.mark.parametrize("is_file", [False, True])
def test_an_svg_is_said_to_be_one_and_what_is_read_is_listed(tmp_path: Path, start: bytes, is_file: bool) -> None:
    content = start + b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
    (tmp_path / "x.svg").write_bytes(content)
    with pytest.raises(BadImage) as caught:
        decode_image(tmp_path / "x.svg" if is_file else io.BytesIO(content), RULE)
    assert str(caught.value) == (
        f"is an SVG file (vector graphics), not an image that can be read ({', '.join(FORMATS)})"
    )
    assert caught.value.remedy == "Convert it to PNG"


def test_a_header_is_checked_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    data = DataConfig(source="folder", root="x", max_megapixels=1)
    for kind in FORMATS:
        (tmp_path / "x").write_bytes(encoded(COLOURS, kind))
        require_header(tmp_path / "x", data)
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(BadImage, match=NO_IMAGE):
        require_header(tmp_path / "x", data)
    (tmp_path / "x").write_bytes(png_header(2000, 1000))
    with pytest.raises(BadImage, match="is 2000x1000"):
        require_header(tmp_path / "x", data)


def test_an_empty_image_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    for source in (tmp_path / "x.png", io.BytesIO()):
        with pytest.raises(BadImage, match="is empty"):
            find_rule(DataConfig(source="folder", root="x"), source)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    data = DataConfig(source="folder", root="x")
    with pytest.raises(BadImage, match="does not exist"):
        find_rule(data, tmp_path / "x.png")
    with pytest.raises(BadImage, match="Is a directory"):
        find_rule(data, tmp_path)


RULE = ImageRule((6, 9, 3), None, is_grey_required=False, max_pixels=10**6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_bad_wherever_it_stands(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(noise, kind)
    cut_off = content[: int(share * len(content))]
    with pytest.raises(BadImage):
        decode_image(io.BytesIO(cut_off), RULE)
    with pytest.raises(BadImage):
        decoded(cut_off)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2000, 1001), "is 2000x1001, larger than data.max_megapixels = 2 allows"),
        ((100_000, 100_000), "is larger than data.max_megapixels = 2 allows"),
    ],
)
def test_a_decompression_bomb_is_refused_by_its_header(
    size: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadImage, match=expected):
        decoded(png_header(*size), max_megapixels=2)


@pytest.mark.parametrize(("kind", "before_size"), [("JPEG2000", b"ihdr"), ("AVIF", b"ispe\0\0\0\0")])
@pytest.mark.parametrize("side", [2000, 12_000, 100_000])
def test_a_bomb_in_avif_or_jpeg_2000_is_refused_by_its_header(
    kind: str, before_size: bytes, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(COLOURS, kind)
    start = content.index(before_size) + len(before_size)
    content = content[:start] + struct.pack(">II", side, side) + content[start + 8 :]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadImage, match=rf"data\.max_megapixels = 2|{NO_IMAGE}"):  # libavif refuses 100,000 itself
        decoded(content, max_megapixels=2)


def test_a_size_just_within_the_limit_is_decoded() -> None:
    content = encoded(np.zeros((1000, 2000), np.uint8))
    assert decoded(content, max_megapixels=2).shape == (1000, 2000, 1)


UPRIGHT_AGAIN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
    77: lambda pixels: pixels,
}


@pytest.mark.parametrize("orientation", UPRIGHT_AGAIN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright_as_exif_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    content = encoded(COLOURS, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(content), UPRIGHT_AGAIN[orientation](COLOURS))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_broken_exif_makes_a_bad_image(kind: str) -> None:
    content = encoded(COLOURS, kind, exif=b"Exif\0\0no TIFF header")
    with pytest.raises(BadImage, match="cannot be decoded"):
        decoded(content)
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode_image(io.BytesIO(content), RULE)


def test_avif_is_turned_upright_as_its_header_says() -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    flat, turned = encoded(COLOURS, "AVIF"), encoded(COLOURS, "AVIF", exif=exif)
    np.testing.assert_array_equal(decoded(turned), np.rot90(as_pillow_has_it(flat), -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_greys_are_scaled_to_8(kind: str) -> None:
    np.testing.assert_array_equal(decoded(encoded(SIXTEEN_BITS, kind)), (SIXTEEN_BITS // 256)[..., None])


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (SIXTEEN_BITS.astype(np.int32) + 1, "exceed 16 bits"),
        (SIXTEEN_BITS.astype(np.int32) - 1, "exceed 16 bits"),
        (SIXTEEN_BITS.astype(np.float32), "floating-point"),
    ],
)
def test_deeper_greys_are_refused_and_not_clipped(pixels: np.ndarray, expected: str) -> None:
    with pytest.raises(BadImage, match=expected):
        decoded(encoded(pixels, "TIFF"))


@pytest.mark.parametrize("transparency", [None, 1, b"\0\x80\xff\xff"])
def test_a_palette_becomes_its_colours_and_transparency_falls_away(transparency: bytes | int | None) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (4, 3), dtype=np.uint8)
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    image = Image.fromarray(numbers).convert("P")
    image.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(decoded(encoded(image, **options)), colours[numbers])


def test_an_alpha_channel_falls_away() -> None:
    alpha = np.arange(54, dtype=np.uint8).reshape(6, 9, 1)
    np.testing.assert_array_equal(decoded(encoded(np.concatenate([COLOURS, alpha], 2))), COLOURS)
    grey = Image.fromarray(np.concatenate([COLOURS[..., :1], alpha], 2))
    np.testing.assert_array_equal(decoded(encoded(grey)), COLOURS[..., :1])


@pytest.mark.parametrize("kind", ["JPEG2000", "AVIF"])
def test_an_alpha_channel_of_a_newer_format_is_dropped(kind: str) -> None:
    opaque, faint = (np.dstack([COLOURS, np.full((6, 9), alpha, np.uint8)]) for alpha in (255, 1))
    pixels = decoded(encoded(faint, kind))
    assert pixels.shape == (6, 9, 3)
    np.testing.assert_array_equal(pixels, decoded(encoded(opaque, kind)))


def test_black_and_white_becomes_0_and_255() -> None:
    bits = COLOURS[..., 0] > 127
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


def test_a_cmyk_jpeg_becomes_what_pillow_makes_of_it() -> None:
    content = encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decoded(content), as_pillow_has_it(content))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    content = encoded(
        first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(decoded(content), np.broadcast_to(np.array([255, 0, 0]), (3, 4, 3)))


def test_of_an_animated_avif_the_first_picture_is_taken() -> None:
    first, second = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    content = encoded(first, "AVIF", save_all=True, append_images=[second])
    np.testing.assert_allclose(decoded(content), np.broadcast_to(np.array([255, 0, 0]), (3, 4, 3)), atol=2)


def palette_image(colours: list[tuple[int, int, int]], numbers: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    image.putpalette(np.array(colours, np.uint8).tobytes())
    return image


GREY_PALETTE = palette_image([(90, 90, 90), (7, 7, 7), (200, 10, 10)], GREYS % 2)  # the red one is not used
COLOUR_PALETTE = palette_image([(90, 90, 90), (7, 7, 7), (200, 10, 10)], GREYS % 3)
GREY_IMAGES = {
    "a PNG": encoded(GREYS),
    "a GIF": encoded(GREY_PALETTE, "GIF"),
    "a PNG of a palette": encoded(GREY_PALETTE, "PNG"),
    "a BMP of a palette": encoded(GREY_PALETTE, "BMP"),
    "a TIFF of a palette": encoded(GREY_PALETTE, "TIFF"),
    "a JPEG 2000": encoded(GREYS, "JPEG2000"),
    "a JPEG": encoded(GREYS, "JPEG"),
    "a lossless WebP": encoded(GREYS, "WEBP", lossless=True),
    **{f"a WebP of quality {quality}": encoded(GREYS, "WEBP", quality=quality) for quality in (1, 30, 80, 100)},
    **{f"an AVIF of quality {quality}": encoded(GREYS, "AVIF", quality=quality) for quality in (1, 30, 80, 100)},
    "a tiny AVIF": encoded(GREYS[:5, :7], "AVIF", quality=0, range="limited"),
    "a WebP with alpha": encoded(np.dstack([GREYS, GREYS, GREYS, GREYS]), "WEBP"),
}
NEARLY_GREY = np.dstack([GREYS // 2 + 40, GREYS // 2 + 40, GREYS // 2 + 60])
COLOUR_IMAGES = {
    "a GIF": encoded(COLOUR_PALETTE, "GIF"),
    "a moving GIF": encoded(COLOUR_PALETTE, "GIF", save_all=True, append_images=[GREY_PALETTE]),
    "a PNG of a palette": encoded(COLOUR_PALETTE, "PNG"),
    "a WebP": encoded(NEARLY_GREY, "WEBP"),
    "an AVIF": encoded(NEARLY_GREY, "AVIF"),
    "a JPEG of three grey channels": encoded(np.dstack([GREYS] * 3), "JPEG"),
    "a PNG of three grey channels": encoded(np.dstack([GREYS] * 3), "PNG"),
}


@pytest.mark.parametrize("name", GREY_IMAGES)
def test_what_looks_grey_counts_as_grey_where_its_format_cannot_say_it(name: str) -> None:
    content = GREY_IMAGES[name]
    pixels = decoded(content)
    assert pixels.shape[2] == 1
    np.testing.assert_array_equal(pixels[..., 0], as_pillow_has_it(content, "L"))
    height, width, _ = pixels.shape
    rule = ImageRule((height, width, 1), None, is_grey_required=True, max_pixels=10**6)
    np.testing.assert_array_equal(decode_image(io.BytesIO(content), rule), pixels)


@pytest.mark.parametrize("name", COLOUR_IMAGES)
def test_what_is_or_is_said_to_be_in_colour_stays_so(name: str) -> None:
    assert decoded(COLOUR_IMAGES[name]).shape[2] == 3
    rule = ImageRule((24, 40, 1), None, is_grey_required=True, max_pixels=10**6)
    with pytest.raises(BadImage, match="is in colour") as caught:
        decode_image(io.BytesIO(COLOUR_IMAGES[name]), rule)
    assert caught.value.remedy == "Set data.color to grey or rgb"


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_an_image_is_decoded_once_to_find_out_whether_it_is_grey(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(GREYS, kind)
    rule = find_rule(DataConfig(source="folder", root="x"), io.BytesIO(content))
    opened: list[object] = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **options: opened.append(given) or open_image(*given, **options))
    decode_image(io.BytesIO(content), rule)
    assert rule.is_grey_required
    assert len(opened) == 1


def test_a_first_image_that_is_cut_off_makes_no_rule() -> None:
    """Its header has a size; taken from there, every sound image of another size would be left out."""
    content = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    with pytest.raises(BadImage, match="truncated"):
        find_rule(DataConfig(source="folder", root="x"), io.BytesIO(content[: len(content) // 2]))


@pytest.mark.parametrize(
    ("color", "first", "expected"),
    [
        ("auto", "L", 1),
        ("auto", "RGB", 3),
        ("grey", "L", 1),
        ("grey", "RGB", 1),
        ("rgb", "L", 3),
        ("rgb", "RGB", 3),
    ],
)
def test_the_number_of_channels_is_set_or_the_first_images(color: str, first: str, expected: int) -> None:
    content = encoded(Image.fromarray(COLOURS).convert(first))
    wanted = as_pillow_has_it(content, {1: "L", 3: "RGB"}[expected]).reshape(6, 9, expected)
    np.testing.assert_array_equal(decoded(content, color=color), wanted)


@pytest.mark.parametrize(("color", "is_refused"), [("auto", True), ("grey", False)])
def test_a_colour_image_among_greys_is_refused_unless_grey_was_asked_for(color: str, is_refused: bool) -> None:
    grey = encoded(COLOURS[..., 0])
    rule = find_rule(DataConfig(source="folder", root="x", color=color), io.BytesIO(grey))
    if is_refused:
        with pytest.raises(BadImage, match="is in colour, but the first image is grey"):
            decode_image(io.BytesIO(encoded(COLOURS)), rule)
    else:
        pixels = decode_image(io.BytesIO(encoded(COLOURS)), rule)[..., 0]
        np.testing.assert_array_equal(pixels, np.asarray(Image.fromarray(COLOURS).convert("L")))


def test_a_grey_image_among_colours_is_taken_in_three_channels() -> None:
    rule = find_rule(DataConfig(source="folder", root="x"), io.BytesIO(encoded(COLOURS)))
    pixels = decode_image(io.BytesIO(encoded(COLOURS[..., 0])), rule)
    np.testing.assert_array_equal(pixels, np.repeat(COLOURS[..., :1], 3, axis=2))


RESIZE: dict[str, Callable[[Image.Image, tuple[int, int]], Image.Image]] = {
    "crop": lambda image, size: ImageOps.fit(image, size, Image.Resampling.BILINEAR),
    "pad": lambda image, size: ImageOps.pad(image, size, Image.Resampling.BILINEAR, color="black"),
    "stretch": lambda image, size: image.resize(size, Image.Resampling.BILINEAR),
}


@pytest.mark.parametrize("resize", RESIZE)
@pytest.mark.parametrize("shape", [(6, 9), (40, 17), (8, 8), (1, 30)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_another_size_is_resized_as_pillow_does_it(resize: str, shape: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    expected = np.asarray(RESIZE[resize](image, (8, 8))).reshape(8, 8, -1)
    np.testing.assert_array_equal(decoded(encoded(image), image_size=8, resize=resize), expected)


def test_another_size_is_refused_where_none_was_asked_for() -> None:
    with pytest.raises(BadImage, match=r"is 9x5, but the first image is 9x6$") as caught:
        decode_image(io.BytesIO(encoded(COLOURS[:5])), RULE)
    assert caught.value.remedy == "Set data.image_size"
