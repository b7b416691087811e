"""Sources that cannot be taken as a whole."""

from typing import Any

import pyarrow.parquet as pq
import pytest

from rcnn.config import PipelineConfig
from rcnn.data.sources import fingerprint, folder
from rcnn.errors import DataError, RcnnError, SourceError
from tests.data.broken.rows import ROWS
from tests.data.broken.scene import (
    FOLDER_ROW,
    Case,
    Scene,
    check_message,
    check_nothing_left,
    check_refused,
    ingest,
    named,
    stored_rows,
)
from tests.data.broken.sources import SOURCES


@pytest.mark.parametrize("case", named(SOURCES))
def test_a_broken_source_is_named(scene: Scene, case: Case) -> None:
    check_refused(scene, case.make(scene), case.kind, case.words)


@pytest.mark.parametrize("case", named([*SOURCES, *ROWS]))
def test_asking_whether_a_broken_source_has_changed_raises_nothing_else(scene: Scene, case: Case) -> None:
    data = PipelineConfig().with_settings(case.make(scene)).data
    try:
        assert fingerprint(data)
    except RcnnError as error:
        check_message(error, [data.root])


def test_a_file_that_is_cut_off_between_footer_and_rows_is_named(scene: Scene) -> None:
    settings = scene.table()
    file = scene.root / "train.parquet"
    openings = 0

    def open_and_cut(*given: Any, **options: Any) -> Any:
        nonlocal openings
        openings += 1
        if openings == 3:  # after footer and labels
            file.write_bytes(file.read_bytes()[:1000])
        return ParquetFile(*given, **options)

    ParquetFile = pq.ParquetFile
    scene.patch.setattr("rcnn.data.sources.parquet_files.pq.ParquetFile", open_and_cut)
    with pytest.raises(SourceError) as caught:
        ingest(scene, settings)
    check_message(caught.value, ["train.parquet", str(scene.root), "not a valid Parquet file"])
    check_nothing_left(scene)


def test_an_image_that_goes_away_after_it_was_listed_is_named(scene: Scene) -> None:
    settings = scene.tree()
    find_rule = folder.find_rule

    def delete_one(*given: Any) -> Any:
        (scene.root / FOLDER_ROW).unlink(missing_ok=True)
        return find_rule(*given)

    scene.patch.setattr(folder, "find_rule", delete_one)
    with pytest.raises(DataError) as caught:
        ingest(scene, settings)
    check_message(caught.value, [FOLDER_ROW, "does not exist"])
    check_nothing_left(scene)
    assert [skipped.row_id for skipped in ingest(scene, settings, on_error="skip").skipped] == []
    assert len(stored_rows(scene)) == 19
