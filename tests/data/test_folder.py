"""Trees of image files: which files become rows, of which part and class, and what pixels they hold."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageOps

from rcnn.config import DataConfig
from rcnn.data.schema import Block
from rcnn.data.sources import folder as folder_source
from rcnn.data.sources import open_source
from rcnn.data.sources.decode import ORIENTATION_TAG
from rcnn.data.sources.origin import Origin
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


def test_hidden_files_other_files_and_folders_beside_train_stay_out(sound: Path) -> None:
    write_tree(sound, "train/a/.0.png", "train/.git/0.png", "train/a/.thumbs/0.png", ".cache/0.png", "raw/c/0.png")
    for name in ("README.md", "train/README.md", "train/a/notes.txt", "train/a/0.json", "train/a/Thumbs.db"):
        (sound / name).write_text("no image")
    origin = opened(sound)
    assert origin.classes == ("a", "b")
    assert len(read(origin).row_ids) == 4
    assert origin.skipped == ()


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
    assert [(skip.row_id, skip.reason) for skip in skipped] == [
        ("train/b/0.png", "is 8x5, and the first image is 7x5: set data.image_size")
    ]


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
    assert (skip.row_id, skip.reason) == ("train/a/1.png", "is not there")


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
        ("../../../outside.png", "outside.png, out of data.root: copy the file"),
        ("../../../outside", "outside, out of data.root: copy the file"),
        ("gone.png", "root/train/a/gone.png, which is no file"),
        ("../b", "root/train/b, which is no file"),
        ("link.png", "root/train/a/link.png, which is no file"),
    ],
)
def test_links_that_lead_out_or_to_no_file_are_named(sound: Path, target: str, reason: str) -> None:
    write(sound.parent / "outside.png", picture(0))
    write(sound.parent / "outside/0.png", picture(0))
    (sound / "train/a/link.png").symlink_to(target)
    origin = opened(sound)
    [skip] = origin.skipped
    assert skip.row_id == "train/a/link.png"
    assert skip.reason.startswith("is a link to ")
    assert skip.reason.endswith(reason)
    assert len(read(origin).row_ids) == 4


def test_a_link_to_a_folder_of_images_is_named_whatever_its_ending(sound: Path) -> None:
    write(sound.parent / "outside/0.png", picture(0))
    (sound / "train/a/more").symlink_to(sound.parent / "outside")
    [skip] = opened(sound).skipped
    assert skip.row_id == "train/a/more"
    assert "out of data.root" in skip.reason


def test_a_link_that_does_not_look_like_an_image_does_not_matter(sound: Path) -> None:
    (sound / "train/a/notes.txt").symlink_to(sound.parent / "gone.txt")
    assert opened(sound).skipped == ()


@pytest.mark.parametrize("link", ["train/c", "test"])
@pytest.mark.parametrize("target", ["outside", "gone", "itself"])
def test_a_folder_that_is_a_link_out_or_to_nothing_is_refused(sound: Path, link: str, target: str) -> None:
    write_tree(sound.parent / "outside", "a/0.png", "b/0.png")
    (sound / link).symlink_to(sound / link if target == "itself" else sound.parent / target)
    expected = "out of data.root" if target != "itself" else "which is no folder"
    with pytest.raises(SourceError, match=f"{link}: is a link to .*{expected}"):
        opened(sound)


def test_links_beside_the_training_folder_do_not_matter(sound: Path) -> None:
    (sound / "raw").symlink_to("/gone")
    (sound / "train/README").symlink_to(write(sound / "x.png", picture(0)))
    assert opened(sound).classes == ("a", "b")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(sound: Path) -> None:
    os.mkfifo(sound / "train/a/pipe.png")
    [skip] = opened(sound).skipped
    assert (skip.row_id, skip.reason) == ("train/a/pipe.png", "is no file, and cannot be read")


def test_names_that_are_no_utf8_are_refused(sound: Path) -> None:
    (sound / "train/a/0.png").rename(sound / "train/a" / os.fsdecode(b"\xe9.png"))
    [skip] = opened(sound).skipped
    assert (skip.row_id, skip.reason) == ("train/a/\ufffd.png", "its name is not UTF-8: rename it")
    (sound / "train/b").rename(sound / "train" / os.fsdecode(b"\xe9"))
    with pytest.raises(SourceError, match="train/\ufffd: its name is not UTF-8"):
        opened(sound)


FAULTS = {
    "no folder": ((), "nowhere", "nowhere: there is no such folder"),
    "a file": (("x.png",), "x.png", "x.png: there is no such folder"),
    "empty": ((), "", "root: holds no train/ folder"),
    "one class": (("train/a/0.png",), "", r"root/train: holds 1 class folder\(s\)"),
    "one class below the root": (("a/0.png",), "", r"root: holds 1 class folder\(s\)"),
    "no training part": (("test/a/0.png", "test/b/0.png"), "", "root: holds no train/ folder"),
    "a class more": (("train/a/0.png", "train/b/0.png", "val/a/0.png"), "", "train/b: the class is not in .*/val"),
    "a class less": (
        ("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png", "val/c/0.png"),
        "",
        "val/c: the class is not in .*/train",
    ),
    "one part twice": (
        ("train/a/0.png", "train/b/0.png", "val/a/0.png", "valid/a/0.png"),
        "",
        "val/ and valid/ are one part",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tree_that_cannot_be_taken_is_named(root: Path, fault: str) -> None:
    names, below, expected = FAULTS[fault]
    write_tree(root, *names)
    with pytest.raises(SourceError, match=expected):
        opened(root / below)


def test_a_uri_is_no_local_folder() -> None:
    with pytest.raises(SourceError, match=r"data\.root = s3://bucket/images: is no local folder"):
        opened("s3://bucket/images")


@pytest.mark.parametrize("has_other_fault", [False, True])
def test_a_class_without_images_is_named(sound: Path, has_other_fault: bool) -> None:
    (sound / "train/b/0.png").unlink()
    (sound / "train/b/1.png").rename(sound / "train/b/1.txt")
    if has_other_fault:
        (sound / "train/a/link.png").symlink_to("gone.png")
    with pytest.raises(SourceError, match=r"train/b: the class has no images\. Add some \(\.bmp, .*\.webp\)"):
        opened(sound)
