"""Contact sheets and plots of classes with unusual names."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data import fonts, ingest
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import SourceRecord
from rcnn.data.pictures import CAPTION_PIXELS, contact_sheet
from rcnn.data.show import MAX_CLASSES, write_sheets
from rcnn.data.sources.origin import Arrays, origin_of_arrays
from rcnn.errors import ConfigError
from rcnn.evaluate.plots import plot_confusion
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

BUNDLED = Path(matplotlib.get_data_path(), "fonts", "ttf")
IN_SERIF_ALONE = "ᴥ"  # DejaVu Sans lacks it, DejaVu Serif has it


@pytest.fixture
def no_other_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fonts of the system: none, until the test adds some."""
    found: list[str] = []
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: found)
    fonts.font_of.cache_clear()
    fonts._installed.cache_clear()
    yield found
    fonts.font_of.cache_clear()
    fonts._installed.cache_clear()


def black(count: int) -> list[np.ndarray]:
    return [np.zeros((8, 8, 1), np.uint8)] * count


def captions_of(sheet: Image.Image, row: int, height: int = 56) -> np.ndarray:
    """The strip below a row of images, as ink (True)."""
    top = CAPTION_PIXELS + row * (height + CAPTION_PIXELS + 2) + height
    return np.asarray(sheet.convert("L"))[top : top + CAPTION_PIXELS] < 128


def test_a_sheet_has_room_for_every_image() -> None:
    sheet = contact_sheet("x", black(7), ["a"] * 7, num_columns=3)
    assert sheet.size == (3 * 58, CAPTION_PIXELS + 3 * (56 + CAPTION_PIXELS + 2))


def test_a_long_caption_is_cut_before_the_next_one_and_may_use_the_room_of_empty_ones() -> None:
    name = "a name that is far too long for one tile"
    sheet = contact_sheet("x", black(4), [name, "b", name, ""], num_columns=2)
    first, second = captions_of(sheet, 0), captions_of(sheet, 1)
    assert not first[:, 56:58].any()
    assert first[:, :56].any()
    assert first[:, 58:].any()
    assert second[:, 56:].any()


def test_letters_beyond_ascii_are_drawn_as_they_are() -> None:
    def ink(caption: str) -> bytes:
        return captions_of(contact_sheet("x", black(1), [caption], num_columns=1), 0).tobytes()

    assert len({ink(caption) for caption in ("u", "ü", "Ж", "Д", "\u2603")}) == 5


def test_a_name_that_no_font_can_write_becomes_its_label(no_other_fonts: list[str]) -> None:
    assert fonts.readable("ü", 3) == "ü"
    assert fonts.readable("雪", 3) == "class 3"
    assert fonts.readable(IN_SERIF_ALONE, 3) == "class 3"


def test_an_installed_font_is_chosen_for_what_dejavu_lacks(no_other_fonts: list[str]) -> None:
    no_other_fonts += [str(BUNDLED / "cmr10.ttf"), str(BUNDLED / "DejaVuSerif.ttf")]
    assert fonts.readable(IN_SERIF_ALONE, 3) == IN_SERIF_ALONE
    assert fonts.font_of("a").endswith("DejaVuSans.ttf")
    with fonts.fonts_for(["a", IN_SERIF_ALONE]):
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "DejaVu Serif"]


def test_a_confusion_matrix_of_any_names_is_drawn_without_a_warning(no_other_fonts: list[str], tmp_path: Path) -> None:
    names = ["雪", "$x_{", "a" * 250, "a\x1b[31m", "ü|"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(torch.eye(5, dtype=torch.int64), names, "title", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 300


def test_of_many_classes_some_are_drawn_and_others_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(f"{'ä' * 120}-{number}" for number in range(300))
    arrays = Arrays(np.zeros((900, 4, 4, 1), np.uint8), np.repeat(np.arange(300), 3))
    origin = origin_of_arrays({"train": arrays}, names, SourceRecord(name="many", url="", files={}))
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: origin)
    storage = Storage(str(tmp_path))
    run_ingest(
        PipelineConfig().with_settings({"data.val_fraction": 0.34}), StageFolder(storage, "datasets/x"), NoTracker()
    )
    assert len(write_sheets(storage, "datasets/x", "sheets")) == MAX_CLASSES + 1
    chosen = write_sheets(storage, "datasets/x", "sheets", classes=[names[299]])
    assert [Path(file).name[:4] for file in chosen] == ["299-", "all."]
    assert len(list((tmp_path / "sheets").iterdir())) == 2
    with pytest.raises(ConfigError, match=r"--class: mnist-sample has no class 'b'"):
        write_sheets(storage, "datasets/x", "sheets", classes=["b"])
