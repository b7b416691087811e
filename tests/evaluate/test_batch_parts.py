"""A part's predictions are the model's own, and other tools read them."""

import json
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data.schema import read_block
from rcnn.evaluate.batch_inputs import find_inputs, plan_parts
from rcnn.evaluate.batch_parts import predict_part
from rcnn.evaluate.batch_records import PartRecord, part_file, record_file
from rcnn.evaluate.predict import Predictor
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import load_model


def live(model: Path, images_NHWC: np.ndarray) -> np.ndarray:
    network, _ = load_model(model)
    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)).softmax(1))


def test_rows_of_the_projects_own_data_set_get_the_models_probabilities(
    model: Path, tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path
) -> None:
    source = Path(tiny_config.storage, digits.folder, "test")
    [part] = plan_parts(find_inputs(str(source)), (28, 28, 1))
    record = predict_part(Predictor(model), part, Storage(str(tmp_path)))
    block = read_block(pq.read_table(source))
    wanted_NC = live(model, block.images.copy())
    for frame in (pl.read_parquet(tmp_path / "part-00000.parquet"), duckdb.sql("FROM 'part-00000.parquet'").pl()):
        assert frame["row_id"].to_list() == block.row_ids
        np.testing.assert_allclose(np.stack(frame["probabilities"].to_list()), wanted_NC, atol=1e-5)
        np.testing.assert_array_equal(frame["predicted"], wanted_NC.argmax(1))
        np.testing.assert_allclose(frame["probability"], wanted_NC.max(1), atol=1e-5)
        assert frame["class_name"].to_list() == [str(label) for label in wanted_NC.argmax(1)]
    assert (record.rows, record.bad) == (500, ())
    assert record == PartRecord.model_validate_json((tmp_path / record_file(0)).read_text())
    assert record.num_bytes == (tmp_path / part_file(0)).stat().st_size
    classes = pq.read_schema(tmp_path / part_file(0)).metadata[b"classes"]
    assert json.loads(classes) == [str(digit) for digit in range(10)]


def test_image_files_are_named_by_their_path_below_the_input_and_bad_ones_are_in_the_record(
    model: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, image in zip(("a.png", "deep/b.png", "deep/c.png"), images, strict=True):
        Image.fromarray(image[..., 0]).save(tmp_path / "in" / name)
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    [part] = plan_parts(find_inputs(str(tmp_path / "in")), (28, 28, 1))
    record = predict_part(Predictor(model), part, Storage(str(tmp_path / "out")))
    frame = pl.read_parquet(tmp_path / "out" / "part-00000.parquet")
    assert frame["row_id"].to_list() == ["a.png", "deep/b.png", "deep/c.png"]
    np.testing.assert_allclose(np.stack(frame["probabilities"].to_list()), live(model, images), atol=1e-5)
    [(name, fault)] = record.bad
    assert name == "b.png"
    assert "is not an image" in fault


def test_a_part_of_bad_images_alone_is_an_empty_table(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    [part] = plan_parts(find_inputs(str(tmp_path / "bad.png")), (28, 28, 1))
    record = predict_part(Predictor(model), part, Storage(str(tmp_path / "out")))
    assert (record.rows, len(record.bad)) == (0, 1)
    assert pl.read_parquet(tmp_path / "out" / "part-00000.parquet").shape == (0, 5)
