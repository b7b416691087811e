"""Images that cannot be taken: one among sound ones, in a folder and in a Parquet file."""

import pytest

from rcnn.errors import DataError
from tests.data.broken.images import IMAGES
from tests.data.broken.scene import (
    BAD,
    FOLDER_ROW,
    PARQUET_ROW,
    Case,
    Scene,
    Settings,
    check_left_out,
    check_refused,
    named,
)


@pytest.mark.parametrize("case", named(IMAGES))
def test_a_broken_image_file_is_named(scene: Scene, case: Case) -> None:
    words = (FOLDER_ROW, *case.words, case.remedy)
    check_refused(scene, scene.tree(case.make()) | case.settings, DataError, words)


@pytest.mark.parametrize("case", named(IMAGES))
def test_a_broken_image_file_is_left_out_on_demand(scene: Scene, case: Case) -> None:
    check_left_out(scene, scene.tree(case.make()) | case.settings, FOLDER_ROW, case.words)


@pytest.mark.parametrize("case", named(IMAGES))
def test_a_broken_image_in_parquet_is_named(scene: Scene, case: Case) -> None:
    settings = scene.table({BAD: {"bytes": case.make(), "path": None}}) | case.settings
    check_refused(scene, settings, DataError, (PARQUET_ROW, *case.words, case.remedy))


@pytest.mark.parametrize("case", named(IMAGES))
def test_a_broken_image_in_parquet_is_left_out_on_demand(scene: Scene, case: Case) -> None:
    settings = scene.table({BAD: {"bytes": case.make(), "path": None}}) | case.settings
    check_left_out(scene, settings, PARQUET_ROW, case.words)


FIRST_IMAGES = [
    case
    for case in IMAGES
    if case.make.__name__
    in (
        "no_bytes",
        "a_text",
        "a_png_with_a_broken_header_crc",
        "a_png_with_corrupt_pixels",
        "a_truncated_png_of_another_size",
        "a_truncated_jpeg",
        "a_truncated_avif",
        "a_truncated_jpeg_2000",
        "a_jpeg_2000_whose_pixels_are_not_of_the_size_that_its_header_says",
        "an_svg",
        "a_png_with_broken_exif",
        "an_image_above_the_limit",
    )
]


@pytest.mark.parametrize("source", ["folder", "parquet"])
@pytest.mark.parametrize("case", named(FIRST_IMAGES))
def test_the_first_image_may_be_the_broken_one(scene: Scene, case: Case, source: str) -> None:
    settings, row = with_a_broken_first_image(scene, source, case)
    check_refused(scene, settings, DataError, (row, *case.words, case.remedy))


@pytest.mark.parametrize("source", ["folder", "parquet"])
@pytest.mark.parametrize("case", named(FIRST_IMAGES))
def test_a_broken_first_image_is_left_out_on_demand(scene: Scene, case: Case, source: str) -> None:
    settings, row = with_a_broken_first_image(scene, source, case)
    check_left_out(scene, settings, row, case.words)


def with_a_broken_first_image(scene: Scene, source: str, case: Case) -> tuple[Settings, str]:
    if source == "folder":
        return scene.tree(case.make(), row=0) | case.settings, "train/a/00.png"
    return scene.table({0: {"bytes": case.make(), "path": None}}) | case.settings, "train.parquet#0"
