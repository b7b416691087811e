"""Near-duplicates across splits: injected ones are found, and others are not."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data import ingest
from rcnn.data.duplicates import DUPLICATES, resemblance
from rcnn.data.hashes import Candidates, find_candidates, grey_copies, hash_copies
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import MANIFEST, require_manifest
from rcnn.data.show import PAIRS, describe_near_duplicates, write_sheets
from rcnn.data.sources.digits import open_sample
from rcnn.data.sources.origin import Arrays, origin_of_arrays
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

NUM_ROWS = 400


def natural_images(num_rows: int, side: int, *, seed: int) -> np.ndarray:
    """Colour images with the spectrum of photographs, where amplitude falls with frequency: (N, side, side, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    noise = np.fft.fft2(rng.normal(size=(num_rows, 3, side, side))) / np.maximum(frequency, 1 / side)
    images = np.fft.ifft2(noise).real
    images = 128 + 45 * (images - images.mean((2, 3), keepdims=True)) / images.std((2, 3), keepdims=True)
    return images.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def as_jpeg(image_HWC: np.ndarray) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(image_HWC.squeeze()).save(packed, "JPEG", quality=75)
    return np.asarray(Image.open(packed)).reshape(image_HWC.shape)


def shifted(images_NHWC: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = images_NHWC.shape[1:3]
    padded = np.pad(images_NHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    return padded[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def brighter(images_NHWC: np.ndarray, levels: int) -> np.ndarray:
    return (images_NHWC.astype(int) + levels).clip(0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": lambda images: images,
    "as JPEG": lambda images: np.stack([as_jpeg(image) for image in images]),
    "brighter": lambda images: brighter(images, 5),
    "darker": lambda images: brighter(images, -5),
    "shifted down": lambda images: shifted(images, 1, 0),
    "shifted up and to the right": lambda images: shifted(images, -1, 1),
}


def ingested(monkeypatch: pytest.MonkeyPatch, folder: Path, train: np.ndarray, test: np.ndarray) -> tuple[Storage, str]:
    """A data set of two classes with these images; the labels alternate."""
    arrays = {name: Arrays(images, np.arange(len(images)) % 2) for name, images in (("train", train), ("test", test))}
    record = open_sample(PipelineConfig().data, folder).record
    origin = origin_of_arrays(arrays, ("a", "b"), record)
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: origin)
    storage = Storage(str(folder / "storage"))
    run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker())
    return storage, "datasets/x"


def found_pairs(storage: Storage, folder: str) -> list[dict[str, object]]:
    lines = storage.read_text(f"{folder}/{DUPLICATES}").splitlines()
    rows: list[dict[str, object]] = [json.loads(line) for line in lines]
    return rows


@pytest.mark.parametrize("side", [32, 75], ids=["small", "large"])
def test_all_injected_duplicates_are_found_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, side: int
) -> None:
    train, others = natural_images(NUM_ROWS, side, seed=1), natural_images(NUM_ROWS, side, seed=2)
    share = NUM_ROWS // len(CHANGES)
    copies = [change(train[n * share : (n + 1) * share]) for n, change in enumerate(CHANGES.values())]
    test = np.concatenate([*copies, others])
    storage, folder = ingested(monkeypatch, tmp_path, train, test)
    pairs = found_pairs(storage, folder)
    assert {(pair["split"], pair["other_split"]) for pair in pairs} == {("test", "train"), ("test", "val")}
    numbers = [(int(str(p["row_id"]).split("/")[-1]), int(str(p["other_row_id"]).split("/")[-1])) for p in pairs]
    assert sorted(numbers) == [(n, n) for n in range(share * len(CHANGES))]
    found = require_manifest(storage, folder).near_duplicates
    assert found is not None
    assert found.rows["test-train"] + found.rows["test-val"] == len(pairs)
    assert found.first[0].correlation == 1.0
    assert found.first[0].difference == 0.0


def test_a_mirrored_photograph_is_a_duplicate_and_a_mirrored_drawing_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = natural_images(100, 32, seed=3)
    storage, folder = ingested(monkeypatch, tmp_path / "colour", train, train[:20, :, ::-1])
    assert [pair["mirrored"] for pair in found_pairs(storage, folder)] == [True] * 20
    storage, folder = ingested(monkeypatch, tmp_path / "grey", train[..., :1], train[:20, :, ::-1, :1])
    assert found_pairs(storage, folder) == []


def test_thousands_of_equal_images_give_few_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blank = np.full((5_000, 16, 16, 1), 7, np.uint8)
    storage, folder = ingested(monkeypatch, tmp_path, blank, blank[:500])
    found = require_manifest(storage, folder).near_duplicates
    assert found is not None
    assert found.rows["test-train"] == 500
    assert 500 <= found.pairs["test-train"] <= 500 * 8


def test_ingest_warns_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = natural_images(200, 32, seed=4)
    caplog.set_level("INFO", logger="rcnn")
    ingested(monkeypatch, tmp_path, train, np.concatenate([train, natural_images(200, 32, seed=5)]))
    [line] = [line for line in caplog.messages if "look like training rows" in line]
    assert "180 test rows (45.00 %) look like training rows" in line


def test_data_show_draws_the_pairs_and_counts_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = natural_images(100, 32, seed=6)
    storage, folder = ingested(monkeypatch, tmp_path, train, brighter(train[:30], 5))
    assert f"reports/x/{PAIRS}" in write_sheets(storage, folder, "reports/x")
    assert "rows in train" in describe_near_duplicates(storage, folder)


def test_a_manifest_without_the_field_is_read_and_its_digest_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = natural_images(60, 32, seed=7)
    storage, folder = ingested(monkeypatch, tmp_path, train, train[:5])
    now = require_manifest(storage, folder)
    tree = storage.read_json(f"{folder}/{MANIFEST}")
    del tree["near_duplicates"]  # as written before
    storage.write_json(f"{folder}/{MANIFEST}", tree)
    old = require_manifest(storage, folder)
    assert old.near_duplicates is None
    assert old.digest == now.digest
    assert describe_near_duplicates(storage, folder) == ""


def test_the_hash_of_a_mirrored_image_is_the_hash_with_flipped_bits() -> None:
    images = natural_images(50, 32, seed=8)
    candidates = find_candidates(
        hash_copies(grey_copies(images[:, :, ::-1]), is_shifted=True),
        hash_copies(grey_copies(images), is_shifted=False)[:, 0],
        is_mirrored=True,
    )
    exact = candidates.take(candidates.bits_N == 0)
    assert exact.first_N.tolist() == exact.second_N.tolist() == list(range(50))
    assert set(exact.view_N.tolist()) == {9}


def test_correlation_and_difference_are_numpys() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 20, 12, 12)).astype(np.uint8)
    correlation_N, difference_N = resemblance(first, second)
    for n in range(20):
        best = max(
            np.corrcoef(
                first[n][max(0, d) : 12 + min(0, d), max(0, r) : 12 + min(0, r)].ravel(),
                second[n][max(0, -d) : 12 + min(0, -d), max(0, -r) : 12 + min(0, -r)].ravel(),
            )[0, 1]
            for d in (-1, 0, 1)
            for r in (-1, 0, 1)
        )
        assert correlation_N[n] == pytest.approx(best, abs=1e-4)
    correlation_N, difference_N = resemblance(first // 2, first // 2 + 9)
    assert correlation_N == pytest.approx(np.ones(20))
    assert difference_N == pytest.approx(np.zeros(20), abs=1e-4)


def test_grey_copies_of_large_images_are_means_over_three_pixels_of_the_copy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 128, 1)).astype(np.uint8)
    copies = grey_copies(images)
    assert copies.shape == (3, 32, 32)
    for row, column in ((1, 1), (10, 30), (30, 7)):
        part = images[:, 2 * row - 2 : 2 * row + 4, 4 * column - 4 : 4 * column + 8, 0]
        assert np.abs(copies[:, row, column] - part.mean((1, 2))).max() <= 0.51


def test_grey_copies_of_small_images_have_pillows_grey() -> None:
    images = natural_images(3, 20, seed=9)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    assert np.abs(grey_copies(images).astype(int) - expected).max() <= 1


def test_each_pair_is_kept_once_with_its_closest_view() -> None:
    found = Candidates(*(np.array(column) for column in ([0, 0, 0, 1], [5, 5, 6, 5], [2, 1, 0, 0], [3, 1, 2, 0])))
    best = found.best(most_per_row=1)
    assert (best.first_N.tolist(), best.second_N.tolist(), best.view_N.tolist()) == ([0, 1], [5, 5], [1, 0])
