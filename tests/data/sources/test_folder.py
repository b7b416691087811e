"""Trees of image files: which files become rows, of which part and class, and what pixels they hold."""

import io
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageOps

from rcnn.config import DataConfig
from rcnn.data.schema import Block
from rcnn.data.sources import decode, open_source
from rcnn.data.sources import folder as folder_source
from rcnn.data.sources.decode import ORIENTATION_TAG
from rcnn.data.sources.origin import Origin, bad_row
from rcnn.errors import RcnnError, SourceError

SHAPE = (5, 7, 3)


def picture(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(file: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, **options)
    return file


def write_tree(root: Path, *names: str) -> dict[str, np.ndarray]:
    """Writes a picture of its own under each name."""
    pictures = {name: picture(number) for number, name in enumerate(names)}
    for name, pixels in pictures.items():
        write(root / name, pixels)
    return pictures


def opened(root: Path | str, **settings: Any) -> Origin:
    return open_source(DataConfig(source="folder", root=str(root), **settings), Path("unused"))


def read(origin: Origin, part: str = "train") -> Block:
    block, skipped = origin.cut(part, np.arange(len(origin.labels[part]))).read()
    assert skipped == []
    return block


def bad_rows(root: Path, **settings: Any) -> list[tuple[str, str]]:
    """What listing leaves out on demand: path and reason."""
    return [(skip.row_id, skip.reason) for skip in opened(root, on_error="skip", **settings).skipped]


def message_of(root: Path, **settings: Any) -> str:
    """The error that opening the tree raises."""
    with pytest.raises(RcnnError) as caught:
        opened(root, **settings)
    return str(caught.value)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the user sees."""
    lines: list[str] = []
    monkeypatch.setattr(folder_source, "say", lines.append)
    return lines


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def sound(root: Path) -> Path:
    """Two classes of two pictures."""
    write_tree(root, "train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png")
    return root


def test_rows_are_what_torchvision_finds_in_the_same_tree(root: Path) -> None:
    write_tree(root, *(f"train/{name}/{number}.png" for name in ("cat", "Dog", "b-3", "a") for number in range(3)))
    theirs = torchvision.datasets.ImageFolder(root / "train")
    origin = opened(root)
    block = read(origin)
    assert list(origin.classes) == theirs.classes == ["Dog", "a", "b-3", "cat"]
    assert block.row_ids == [str(Path(file).relative_to(root)) for file, _ in theirs.samples]
    assert block.labels.tolist() == theirs.targets
    np.testing.assert_array_equal(block.images, np.stack([np.asarray(image) for image, _ in theirs]))


def test_a_tree_may_hold_the_training_part_alone(sound: Path) -> None:
    origin = opened(sound)
    assert {part: labels.tolist() for part, labels in origin.labels.items()} == {"train": [0, 0, 1, 1]}
    assert origin.image_shape == SHAPE
    assert read(origin).row_ids == ["train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train", "val", "test"), ["test", "train", "val"]),
        (("train", "test"), ["test", "train"]),
        (("train", "valid"), ["train", "val"]),
        (("Train", "Validation"), ["train", "val"]),
    ],
)
def test_parts_are_told_by_their_folders_names(root: Path, names: tuple[str, ...], parts: list[str]) -> None:
    pictures = write_tree(root, *(f"{name}/{label}/x.png" for name in names for label in "ab"))
    origin = opened(root)
    assert sorted(origin.labels) == parts
    for name in names:
        block = read(origin, folder_source.PARTS[name.lower()])
        assert block.row_ids == [f"{name}/a/x.png", f"{name}/b/x.png"]
        np.testing.assert_array_equal(block.images, np.stack([pictures[row_id] for row_id in block.row_ids]))


def test_classes_may_stand_directly_below_the_root(root: Path) -> None:
    pictures = write_tree(root, "b/0.png", "a/0.png", "a/1.png")
    origin = opened(root)
    block = read(origin)
    assert origin.classes == ("a", "b")
    assert block.row_ids == ["a/0.png", "a/1.png", "b/0.png"]
    np.testing.assert_array_equal(block.images, np.stack([pictures[row_id] for row_id in block.row_ids]))


def test_folders_below_a_class_belong_to_it(root: Path) -> None:
    write_tree(root, "train/a/2/deep/0.png", "train/a/1.png", "train/a/3.png", "train/b/train/test/0.png")
    block = read(opened(root))
    assert block.row_ids == ["train/a/1.png", "train/a/2/deep/0.png", "train/a/3.png", "train/b/train/test/0.png"]
    assert block.labels.tolist() == [0, 0, 0, 1]


def test_hidden_files_leftovers_of_windows_and_what_is_beside_train_stay_out(sound: Path, said: list[str]) -> None:
    write_tree(sound, "train/a/.0.png", "train/.git/0.png", "train/a/.thumbs/0.png", ".cache/0.png", "raw/c/0.png")
    for name in ("README.md", "train/README.md", "train/labels.csv", "train/a/Thumbs.db", "train/a/desktop.ini"):
        (sound / name).write_text("not an image")
    origin = opened(sound)
    assert origin.classes == ("a", "b")
    assert len(read(origin).row_ids) == 4
    assert origin.skipped == ()
    assert said == [
        "  ignoring files and folders beside train/: README.md, raw",
        "  ignoring files beside the class folders: README.md, labels.csv",
    ]


def test_a_line_about_many_files_names_three_of_them_with_their_control_characters_as_escapes(
    sound: Path, said: list[str]
) -> None:
    for name in ("a\n\x1b[31m.txt", *map(str, range(3000))):
        (sound / "train" / name).touch()
    opened(sound)
    assert said == [r"  ignoring files beside the class folders: 0, 1, 10 and 2,998 more"]
    for number in range(3000):
        (sound / "train" / str(number)).unlink()
    opened(sound)
    assert said[1:] == [r"  ignoring files beside the class folders: a\n\x1b[31m.txt"]


@pytest.mark.parametrize("name", ["0", "0.dat", "0.svg", "0.avif.bak"])
@pytest.mark.parametrize("kind", decode.FORMATS)
def test_an_image_is_read_whatever_its_name(sound: Path, name: str, kind: str) -> None:
    image = Image.fromarray(picture(7))
    image.save(sound / "train/a" / name, kind)
    origin = opened(sound)
    block = read(origin)
    assert origin.skipped == ()
    assert len(block.row_ids) == 5
    with Image.open(sound / "train/a" / name) as expected:
        row = block.row_ids.index(f"train/a/{name}")
        np.testing.assert_array_equal(block.images[row], np.asarray(expected.convert("RGB")))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'


def test_what_is_not_an_image_is_a_bad_row_of_its_class(sound: Path) -> None:
    (sound / "train/a/notes.txt").write_text("not an image")
    (sound / "train/a/0.json").touch()
    (sound / "train/b/0.svg").write_bytes(SVG)
    kinds = ", ".join(decode.FORMATS)
    assert bad_rows(sound) == [
        ("train/a/0.json", "is empty"),
        ("train/a/notes.txt", f"is not an image that can be read ({kinds})"),
        ("train/b/0.svg", f"is an SVG file (vector graphics), not an image that can be read ({kinds})"),
    ]
    assert len(read(opened(sound, on_error="skip")).row_ids) == 4
    assert message_of(sound) == (
        "train/a/0.json: is empty (the first of 3 bad rows). "
        "Fix or delete it, or set data.on_error=skip to skip such rows"
    )


def test_all_files_of_unknown_kind_are_counted_before_any_image_is_decoded(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2000):
        (sound / f"train/b/{number:04}.svg").write_bytes(SVG)
    monkeypatch.setattr(folder_source, "find_rule", lambda *_: pytest.fail("it was decoded"))
    assert message_of(sound).startswith("train/b/0000.svg: is an SVG file")
    assert message_of(sound).endswith(
        "(the first of 2,000 bad rows). Convert it to PNG, or set data.on_error=skip to skip such rows"
    )


def test_listing_opens_only_files_whose_names_do_not_say_what_they_are(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sound / "train/a/0.png").rename(sound / "train/a/zero")
    checked: list[str] = []
    require_header = folder_source.require_header
    monkeypatch.setattr(
        folder_source, "require_header", lambda file, data: checked.append(file.name) or require_header(file, data)
    )
    assert read(opened(sound)).row_ids == ["train/a/1.png", "train/a/zero", "train/b/0.png", "train/b/1.png"]
    assert checked == ["zero"]


def test_an_image_beside_the_class_folders_is_a_bad_row(sound: Path) -> None:
    write_tree(sound, "train/preview.png", "test/a/0.png", "test/total.JPG")
    assert bad_rows(sound) == [
        ("test/total.JPG", "is not in a class folder"),
        ("train/preview.png", "is not in a class folder"),
    ]
    assert message_of(sound) == (
        "test/total.JPG: is not in a class folder (the first of 2 bad rows). "
        "Move it into one, or set data.on_error=skip to skip such rows"
    )


def test_an_image_beside_the_class_folders_of_the_root_is_a_bad_row(root: Path) -> None:
    write_tree(root, "a/0.png", "b/0.png", "c.png")
    assert bad_rows(root) == [("c.png", "is not in a class folder")]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_class_is_one_in_whatever_unicode_form_its_folders_are(root: Path, form: str, said: list[str]) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    here, there = (unicodedata.normalize(kind, "Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n") for kind in (form, other))
    assert here != there
    write_tree(root, f"train/{here}/0.png", "train/a/0.png", f"test/{there}/0.png", "test/a/0.png")
    origin = opened(root)
    assert origin.classes == (unicodedata.normalize("NFC", here), "a")
    assert read(origin).row_ids == [f"train/{here}/0.png", "train/a/0.png"]
    assert read(origin, "test").row_ids == [f"test/{there}/0.png", "test/a/0.png"]
    assert origin.labels["train"].tolist() == origin.labels["test"].tolist() == [0, 1]
    assert said == []


def test_two_folders_of_one_class_are_both_read_and_a_line_says_so(root: Path, said: list[str]) -> None:
    composed, decomposed = (
        unicodedata.normalize(form, "\N{LATIN SMALL LETTER U WITH DIAERESIS}") for form in ("NFC", "NFD")
    )
    names = (f"train/{decomposed}/0.png", f"train/{composed}/0.png", f"train/{composed}/1.png")
    write_tree(root, *names, "train/a/0.png")
    origin = opened(root)
    assert origin.classes == ("a", composed)
    assert sorted(read(origin).row_ids) == sorted([*names, "train/a/0.png"])
    assert origin.labels["train"].tolist() == [0, 1, 1, 1]
    assert said == [f"  merging folders of train/ that are the same class in NFC and NFD: {composed}"]


@pytest.mark.parametrize("ending", [".png", ".PNG", ".Jpg"])
def test_the_case_of_an_ending_does_not_matter(sound: Path, ending: str) -> None:
    (sound / "train/a/0.png").rename(sound / f"train/a/0{ending}")
    assert read(opened(sound)).row_ids[0] == f"train/a/0{ending}"


def test_rows_come_in_the_order_that_is_asked_for(sound: Path) -> None:
    origin = opened(sound)
    whole = read(origin)
    block, _ = origin.cut("train", np.array([3, 0, 2])).read()
    assert block.row_ids == [whole.row_ids[row] for row in (3, 0, 2)]
    np.testing.assert_array_equal(block.images, whole.images[[3, 0, 2]])
    np.testing.assert_array_equal(block.labels, whole.labels[[3, 0, 2]])


def test_names_of_all_kinds_are_row_ids(root: Path) -> None:
    names = ("train/klasse ä/0 1.png", "train/klasse ä/#?%.png", "train/日本/\N{SNOWMAN}.png", "train/日本/a'b\"c.png")
    write_tree(root, *names)
    block = read(opened(root))
    assert block.row_ids == sorted(names)


def test_the_record_tells_the_folder_and_the_bytes_to_decode_are_counted(sound: Path) -> None:
    origin = opened(sound)
    assert (origin.record.name, origin.record.url) == ("folder", str(sound))
    assert origin.encoded_bytes == sum(file.stat().st_size for file in sound.rglob("*.png"))


RESIZE = {
    "crop": lambda image: ImageOps.fit(image, (6, 6), Image.Resampling.BILINEAR),
    "pad": lambda image: ImageOps.pad(image, (6, 6), Image.Resampling.BILINEAR, color="black"),
    "stretch": lambda image: image.resize((6, 6), Image.Resampling.BILINEAR),
}


@pytest.mark.parametrize("resize", RESIZE)
def test_mixed_sizes_are_brought_to_one_as_pillow_does_it(root: Path, resize: str) -> None:
    shapes = [(5, 7), (12, 4), (6, 6), (30, 31)]
    files = [write(root / f"{'aabb'[n]}/{n}.png", picture(n, (*shape, 3))) for n, shape in enumerate(shapes)]
    block = read(opened(root, image_size=6, resize=resize))
    expected = np.stack([np.asarray(RESIZE[resize](Image.open(io.BytesIO(file.read_bytes())))) for file in files])
    np.testing.assert_array_equal(block.images, expected)


def test_mixed_sizes_without_image_size_are_left_out_and_named(sound: Path) -> None:
    write(sound / "train/b/0.png", picture(9, (5, 8, 3)))
    block, skipped = opened(sound).cut("train", np.arange(4)).read()
    assert block.row_ids == ["train/a/0.png", "train/a/1.png", "train/b/1.png"]
    assert block.labels.tolist() == [0, 0, 1]
    assert [(skip.row_id, skip.reason) for skip in skipped] == [("train/b/0.png", "is 8x5, but the first image is 7x5")]
    assert str(bad_row(skipped[0])) == (
        "train/b/0.png: is 8x5, but the first image is 7x5. "
        "Set data.image_size, or set data.on_error=skip to skip such rows"
    )


@pytest.mark.parametrize(("color", "channels"), [("auto", 3), ("rgb", 3), ("grey", 1)])
def test_colour_follows_the_setting_or_else_the_first_image(sound: Path, color: str, channels: int) -> None:
    write(sound / "train/b/1.png", picture(9)[..., 0])
    origin = opened(sound, color=color)
    assert origin.image_shape == (5, 7, channels)
    expected = [Image.open(sound / row_id).convert("L" if channels == 1 else "RGB") for row_id in read(origin).row_ids]
    np.testing.assert_array_equal(read(origin).images.squeeze(), np.stack([np.asarray(image) for image in expected]))
    for image in expected:
        image.close()


def test_grey_trees_are_grey(root: Path) -> None:
    for name in ("a", "b"):
        write(root / name / "0.png", picture(0)[..., 0])
    assert opened(root).image_shape == (5, 7, 1)


def test_images_of_all_kinds_become_what_pillow_makes_of_them(root: Path) -> None:
    """EXIF turns, 16 bits, a palette with transparency, CMYK, WebP, and the first picture of an animation."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    colours = Image.fromarray(picture(0))
    palette = colours.quantize(8)
    write(root / "a/0 first.png", colours)
    write(root / "a/1 turned.png", np.rot90(picture(1)), exif=exif)
    write(root / "a/2 16 bits.png", picture(2)[..., 0].astype(np.uint16) * 257)
    write(root / "a/3 palette.png", palette, transparency=b"\0\x80\xff")
    write(root / "a/4 alpha.png", np.dstack([picture(4), picture(5)[..., 0]]))
    write(root / "b/5 cmyk.jpg", colours.convert("CMYK"))
    write(root / "b/6 web.webp", colours, lossless=True)
    write(root / "b/7 moving.gif", palette, save_all=True, append_images=[Image.new("P", (7, 5))])
    images = read(opened(root)).images
    expected = {
        0: picture(0),
        1: picture(1),
        2: np.repeat(picture(2)[..., :1], 3, 2),
        3: palette.convert("RGB"),
        4: picture(4),
        5: Image.open(io.BytesIO((root / "b/5 cmyk.jpg").read_bytes())).convert("RGB"),
        6: picture(0),
        7: palette.convert("RGB"),
    }
    for number, pixels in expected.items():
        np.testing.assert_array_equal(images[number], np.asarray(pixels), err_msg=f"image {number}")


def test_a_bad_image_is_left_out_and_the_rows_around_it_are_not(sound: Path) -> None:
    whole = read(opened(sound))
    (sound / "train/a/1.png").write_bytes(b"no image")
    (sound / "train/b/0.png").unlink()
    (sound / "train/b/0.png").touch()
    block, skipped = opened(sound, on_error="skip").cut("train", np.arange(4)).read()
    assert block.row_ids == ["train/a/0.png", "train/b/1.png"]
    np.testing.assert_array_equal(block.images, whole.images[[0, 3]])
    assert block.labels.tolist() == [0, 1]
    assert [skip.row_id for skip in skipped] == ["train/a/1.png", "train/b/0.png"]


def test_a_file_that_vanished_after_listing_is_named(sound: Path) -> None:
    origin = opened(sound)
    (sound / "train/a/1.png").unlink()
    _, [skip] = origin.cut("train", np.arange(4)).read()
    assert (skip.row_id, skip.reason) == ("train/a/1.png", "does not exist")


def test_size_and_colour_are_the_first_readable_images_when_bad_ones_are_skipped(sound: Path) -> None:
    (sound / "train/a/0.png").write_bytes((sound / "train/a/0.png").read_bytes()[:60])
    assert opened(sound, on_error="skip").image_shape == SHAPE
    with pytest.raises(RcnnError, match=r"train/a/0\.png"):
        opened(sound)


def test_links_within_the_root_are_followed(sound: Path) -> None:
    (sound / "train/b/link.png").symlink_to(sound / "train/a/0.png")
    (sound / "originals").mkdir()
    (sound / "train/b").rename(sound / "originals/b")
    (sound / "train/b").symlink_to(sound / "originals/b")
    block = read(opened(sound))
    assert block.row_ids[2:] == ["train/b/0.png", "train/b/1.png", "train/b/link.png"]
    np.testing.assert_array_equal(block.images[4], picture(0))
    assert block.labels.tolist() == [0, 0, 1, 1, 1]


def test_the_root_itself_may_be_a_link(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sound)
    assert len(read(opened(tmp_path / "link")).row_ids) == 4


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("../../../outside.png", "outside.png, outside data.root"),
        ("../../../outside", "outside, outside data.root"),
        ("gone.png", "root/train/a/gone.png, which does not exist"),
        ("../b", "root/train/b, which is not a file"),
        ("link.png", "root/train/a/link.png, which does not exist"),
        (".", "root/train/a, which contains the link: it is circular"),
        ("../..", "root, which contains the link: it is circular"),
    ],
)
def test_links_that_lead_out_or_to_no_file_are_named(sound: Path, target: str, reason: str) -> None:
    write(sound.parent / "outside.png", picture(0))
    write(sound.parent / "outside/0.png", picture(0))
    (sound / "train/a/link.png").symlink_to(target)
    origin = opened(sound, on_error="skip")
    [skip] = origin.skipped
    assert skip.row_id == "train/a/link.png"
    assert skip.reason.startswith("is a link to ")
    assert skip.reason.endswith(reason)
    assert len(read(origin).row_ids) == 4


def test_a_link_to_a_folder_of_images_is_named_whatever_its_ending(sound: Path) -> None:
    write(sound.parent / "outside/0.png", picture(0))
    (sound / "train/a/more").symlink_to(sound.parent / "outside")
    [skip] = opened(sound, on_error="skip").skipped
    assert skip.row_id == "train/a/more"
    assert "outside data.root" in skip.reason


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        (
            "outside.png",
            "Copy the file, or set data.follow_links=true, or set data.on_error=skip to skip such rows",
        ),
        ("outside", "Copy the folder, or set data.follow_links=true, or set data.on_error=skip to skip such rows"),
        (
            "root/train/b",
            "Copy the folder, or set data.follow_links=true, or set data.on_error=skip to skip such rows",
        ),
        ("root/train", "Delete it, or set data.on_error=skip to skip such rows"),
        ("gone", "Fix or delete it, or set data.on_error=skip to skip such rows"),
    ],
)
def test_a_bad_link_has_one_remedy_that_fits(sound: Path, target: str, remedy: str) -> None:
    write_tree(sound.parent, "outside.png", "outside/0.png")
    (sound / "train/a/link").symlink_to(sound.parent / target)
    assert message_of(sound).endswith(f". {remedy}")
    assert message_of(sound).count(". ") == 1


def test_links_out_of_the_root_are_followed_on_demand(sound: Path) -> None:
    pictures = write_tree(sound.parent / "outside", "0.png", "c/0.png", "c/deep/1.png", "more/2.png")
    (sound / "train/a/2.png").symlink_to(sound.parent / "outside/0.png")
    (sound / "train/a/more").symlink_to(sound.parent / "outside/more")
    (sound / "train/c").symlink_to(sound.parent / "outside/c")
    origin = opened(sound, follow_links=True)
    block = read(origin)
    assert origin.skipped == ()
    assert origin.classes == ("a", "b", "c")
    assert block.row_ids == [
        *("train/a/0.png", "train/a/1.png", "train/a/2.png", "train/a/more/2.png"),
        *("train/b/0.png", "train/b/1.png", "train/c/0.png", "train/c/deep/1.png"),
    ]
    for row, name in ((2, "0.png"), (3, "more/2.png"), (6, "c/0.png"), (7, "c/deep/1.png")):
        np.testing.assert_array_equal(block.images[row], pictures[name])


def test_a_part_that_is_a_link_out_of_the_root_is_followed_on_demand(sound: Path) -> None:
    write_tree(sound.parent / "outside", "a/0.png", "b/0.png")
    (sound / "test").symlink_to(sound.parent / "outside")
    assert read(opened(sound, follow_links=True), "test").row_ids == ["test/a/0.png", "test/b/0.png"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_followed_link_to_a_folder_around_it_is_a_bad_row(sound: Path, target: str) -> None:
    (sound / "train/a/loop").symlink_to(target)
    holder = os.path.normpath(sound / "train/a" / target)
    assert bad_rows(sound, follow_links=True) == [
        ("train/a/loop", f"is a link to {holder}, which contains the link: it is circular")
    ]
    assert len(read(opened(sound, follow_links=True, on_error="skip")).row_ids) == 4


@pytest.mark.timeout(20)
def test_followed_links_that_lead_to_each_other_end(sound: Path) -> None:
    outside = sound.parent / "outside"
    write_tree(outside, "x/0.png", "y/1.png")
    (outside / "x/to-y").symlink_to(outside / "y")
    (outside / "y/to-x").symlink_to(outside / "x")
    (sound / "train/a/x").symlink_to(outside / "x")
    (sound / "train/a/y").symlink_to(outside / "y")
    origin = opened(sound, follow_links=True, on_error="skip")
    assert [skip.row_id for skip in origin.skipped] == ["train/a/x/to-y/to-x", "train/a/y"]
    assert origin.skipped[1].reason == f"leads to {outside}/y, which this class contains already"
    assert read(origin).row_ids[2:4] == ["train/a/x/0.png", "train/a/x/to-y/1.png"]


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_class_that_is_a_link_to_its_own_part_is_refused(sound: Path, follow_links: bool) -> None:
    (sound / "train/c").symlink_to(".")
    assert message_of(sound, follow_links=follow_links) == (
        f"{sound}/train/c: is a link to {sound}/train, which contains the link: it is circular. Delete it"
    )


@pytest.mark.parametrize("link", ["train/c", "test"])
@pytest.mark.parametrize("target", ["outside", "gone", "itself"])
def test_a_folder_that_is_a_link_out_or_to_nothing_is_refused(sound: Path, link: str, target: str) -> None:
    write_tree(sound.parent / "outside", "a/0.png", "b/0.png")
    (sound / link).symlink_to(sound / link if target == "itself" else sound.parent / target)
    expected = "outside data.root" if target == "outside" else "which does not exist"
    with pytest.raises(SourceError, match=f"{link}: is a link to .*{expected}"):
        opened(sound)


def test_links_beside_the_training_folder_do_not_matter(sound: Path) -> None:
    (sound / "raw").symlink_to("/gone")
    (sound / "train/README").symlink_to(write(sound / "x.png", picture(0)))
    assert opened(sound).classes == ("a", "b")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(sound: Path) -> None:
    os.mkfifo(sound / "train/a/pipe.png")
    assert bad_rows(sound) == [("train/a/pipe.png", "is not a file, and cannot be read")]


def test_names_that_are_not_utf8_are_refused(sound: Path) -> None:
    (sound / "train/a/0.png").rename(sound / "train/a" / os.fsdecode(b"\xe9.png"))
    assert bad_rows(sound) == [(r"train/a/\udce9.png", "its name is not UTF-8")]
    (sound / "train/b").rename(sound / "train" / os.fsdecode(b"\xe9"))
    assert message_of(sound) == rf"{sound}/train/\udce9: its name is not UTF-8. Rename it"


FAULTS = {
    "no folder": ((), "nowhere", "nowhere: there is no such folder"),
    "a file": (("x.png",), "x.png", "x.png: there is no such folder"),
    "empty": ((), "", "root: holds no train/ folder"),
    "one class": (("train/a/0.png",), "", r"root/train: holds 1 class folder\."),
    "one class below the root": (("a/0.png",), "", r"root: holds 1 class folder\."),
    "no training part": (("test/a/0.png", "test/b/0.png"), "", "root: holds no train/ folder"),
    "a class of the validation part alone": (
        ("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png", "val/c/0.png"),
        "",
        r"val/c: the class is not in .*/train\. Add training images of it, or delete it",
    ),
    "classes of the test part alone": (
        ("train/a/0.png", "train/b/0.png", "test/c/0.png", "test/d/0.png", "test/e/0.png"),
        "",
        r"test/c: the class is not in .*/train, nor are 2 other classes\. Add",
    ),
    "a part without images": (("train/a/0.png", "train/b/0.png", "test/a/.0.png"), "", "root/test: holds no images"),
    "one part twice": (
        ("train/a/0.png", "train/b/0.png", "val/a/0.png", "valid/a/0.png"),
        "",
        "val/ and valid/ are the same part",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tree_that_cannot_be_taken_is_named(root: Path, fault: str) -> None:
    names, below, expected = FAULTS[fault]
    write_tree(root, *names)
    with pytest.raises(SourceError, match=expected):
        opened(root / below)


def test_a_uri_is_no_local_folder() -> None:
    with pytest.raises(SourceError, match=r"data\.root = s3://bucket/images: is not a local folder"):
        opened("s3://bucket/images")


@pytest.mark.parametrize("has_other_fault", [False, True])
def test_a_class_without_images_is_named(sound: Path, has_other_fault: bool) -> None:
    (sound / "train/b/0.png").unlink()
    (sound / "train/b/1.png").unlink()
    if has_other_fault:
        (sound / "train/a/link.png").symlink_to("gone.png")
    for on_error in ("fail", "skip"):
        with pytest.raises(SourceError, match=r"train/b: the class has no images\. Add some \(PNG, JPEG, .*AVIF"):
            opened(sound, on_error=on_error)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_class_of_which_no_file_is_an_image_is_named_with_the_first_of_them(sound: Path, on_error: str) -> None:
    for number in range(2):
        (sound / f"train/b/{number}.png").unlink()
        (sound / f"train/b/{number}.svg").write_bytes(SVG)
    expected = r"train/b: the class has no images \(unusable files: 2, the first train/b/0\.svg: is an SVG"
    with pytest.raises(SourceError, match=expected):
        opened(sound, on_error=on_error)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_class_may_be_missing_from_the_test_part(sound: Path, is_there: bool) -> None:
    write_tree(sound, "test/b/0.png")
    if is_there:
        (sound / "test/a").mkdir()
    origin = opened(sound)
    assert origin.classes == ("a", "b")
    assert origin.labels["test"].tolist() == [1]
    assert read(origin, "test").row_ids == ["test/b/0.png"]
