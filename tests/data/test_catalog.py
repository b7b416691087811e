"""`rcnn data list | verify | show`, on real digits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rcnn.cli import main
from rcnn.data.catalog import find_data_set, find_faults, list_data_sets
from rcnn.data.manifest import require_manifest
from rcnn.data.pictures import CAPTION_PIXELS
from rcnn.data.show import count_rows, write_sheets
from rcnn.errors import ConfigError
from rcnn.results import IngestResult
from rcnn.storage import Storage

pytestmark = pytest.mark.long


@pytest.fixture
def copy(digits_storage: Path, digits: IngestResult, tmp_path: Path) -> Storage:
    """A storage with the digits in it, to be damaged."""
    shutil.copytree(digits_storage / digits.folder, tmp_path / digits.folder)
    return Storage(str(tmp_path))


def test_a_whole_data_set_has_no_faults(copy: Storage, digits: IngestResult) -> None:
    assert list(find_faults(copy, digits.folder)) == []


def test_every_damaged_shard_is_named(copy: Storage, digits: IngestResult) -> None:
    folder = copy.local_path(digits.folder)
    (folder / "val/val-00000.parquet").unlink()
    shard = folder / "test/test-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "notes.txt").write_text("mine")
    first, second, third = find_faults(copy, digits.folder)
    assert "val-00000.parquet: the shard cannot be read" in first
    assert "test-00000.parquet: the shard was changed" in second
    assert "notes.txt: is not in the manifest" in third


@pytest.mark.parametrize("file", ["_manifest.json", "val/val-00000.parquet"])
def test_a_damaged_data_set_is_found_by_its_name(
    copy: Storage, digits: IngestResult, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy.local_path(f"{digits.folder}/{file}")
    damaged.write_bytes(damaged.read_bytes()[:-20])
    for action in ("show", "verify"):
        assert main(["data", action, "mnist-sample", "--set", f"storage={copy.root}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.count("--fresh") == 1
        assert damaged.name in error
    [row] = list_data_sets(copy)
    assert "damaged" in row["state"]


def test_rows_that_are_not_those_of_the_manifest_are_found_although_checksums_fit(
    copy: Storage, digits: IngestResult
) -> None:
    folder = copy.local_path(digits.folder)
    manifest = require_manifest(copy, digits.folder)
    shards = {name: split.shards[0] for name, split in manifest.splits.items()}
    changed = manifest.splits["val"].model_copy(update={"rows_per_class": (400,) + (0,) * 9})
    splits = manifest.splits | {"val": changed}
    copy.write_json(
        f"{digits.folder}/_manifest.json",
        manifest.model_copy(update={"splits": splits}).with_digest().model_dump(mode="json"),
    )
    [fault] = find_faults(copy, digits.folder)
    assert "the val rows differ from the manifest" in fault
    assert pq.read_metadata(folder / shards["val"].file).num_rows == shards["val"].rows


def test_the_list_names_whole_unfinished_and_damaged_ones(copy: Storage, digits: IngestResult) -> None:
    copy.write_text("datasets/.draft-other/records/train-00000.json", "{}")
    copy.write_text("datasets/broken/_manifest.json", "{")
    copy.write_text("datasets/bare/train/train-00000.parquet", "")
    states = {row["folder"]: (row["data set"], row["state"]) for row in list_data_sets(copy)}
    name = digits.folder.removeprefix("datasets/")
    assert states[name] == ("mnist-sample", "complete")
    assert "resumes it" in states[".draft-other"][1]
    assert "not JSON" in states["broken"][1]
    assert "_manifest.json is missing" in states["bare"][1]


def test_a_data_set_is_found_by_folder_name_and_digest(copy: Storage, digits: IngestResult) -> None:
    name = digits.folder.removeprefix("datasets/")
    for wanted in (name, "mnist-sample", digits.digest[:8]):
        assert find_data_set(copy, wanted) == digits.folder
    with pytest.raises(ConfigError, match="there is no data set 'nothing'"):
        find_data_set(copy, "nothing")
    shutil.copytree(copy.local_path(digits.folder), copy.local_path("datasets/twin"))
    with pytest.raises(ConfigError, match=f"matches {name} and twin"):
        find_data_set(copy, "mnist-sample")


def test_the_sheets_show_training_images_of_each_class(copy: Storage, digits: IngestResult) -> None:
    files = write_sheets(copy, digits.folder, "reports/sheets")
    assert [Path(file).name for file in files] == [*(f"{label:03d}-{label}.png" for label in range(10)), "all.png"]
    train = pq.read_table(copy.local_path(digits.folder) / "train")
    first_three = next(
        image for image, label in zip(train["image"].to_pylist(), train["label"].to_pylist(), strict=True) if label == 3
    )
    sheet = np.asarray(Image.open(copy.local_path("reports/sheets/003-3.png")).convert("L"))
    tile = sheet[CAPTION_PIXELS : CAPTION_PIXELS + 56, :56]
    np.testing.assert_array_equal(tile[::2, ::2].ravel(), first_three)


def test_the_table_counts_the_rows_of_each_class(copy: Storage, digits: IngestResult) -> None:
    rows = count_rows(copy, digits.folder)
    assert [row["class"] for row in rows] == list("0123456789")
    assert sum(int(row["train"].replace(",", "")) for row in rows) == digits.rows["train"]


def test_the_commands_print_and_exit(
    copy: Storage, digits: IngestResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--set", f"storage={tmp_path}"]
    assert main(["data", "list", *place]) == 0
    assert "mnist-sample" in capsys.readouterr().out
    assert main(["data", "verify", "mnist-sample", *place]) == 0
    assert "is complete" in capsys.readouterr().out
    assert main(["data", "show", "mnist-sample", *place]) == 0
    assert "contact sheets in" in capsys.readouterr().out
    (tmp_path / digits.folder / "val/val-00000.parquet").unlink()
    assert main(["data", "verify", "mnist-sample", *place]) == 2
    assert "val-00000.parquet" in capsys.readouterr().err
    assert main(["data", "verify", "--recipe", "demo", "--set", f"storage={tmp_path / 'empty'}"]) == 2
    assert "Run `rcnn ingest` first" in capsys.readouterr().err
    assert main(["data", "list", "--set", f"storage={tmp_path / 'empty'}"]) == 0
    assert "there are no data sets" in capsys.readouterr().out
    assert json.loads((tmp_path / digits.folder / "_result.json").read_text())["digest"] == digits.digest
