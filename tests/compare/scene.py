"""A storage with the results of models that were never trained: only what the stages leave of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.evaluate.figures import wilson
from rcnn.evaluate.predictions import Part, build_table, merge_parts, write_part
from rcnn.recipes import debug_tiny
from rcnn.results import ClassFigures, EvaluateResult, IngestResult, TrainResult
from rcnn.storage import StageFolder, Storage

NUM_ROWS = 500
SETTINGS = debug_tiny().values_of("model", "train", "augment", "seed")


class Scene:
    """Writes results as the stages do."""

    def __init__(self, root: Path):
        self.storage = Storage(str(root))
        data = IngestResult(
            folder="datasets/digits-000000000000",
            digest="d" * 64,
            test_digest="t" * 64,
            source="mnist",
            rows={"test": 500},
        )
        self._write(data.folder, data.model_dump(mode="json"), {"data.source": "mnist"}, [])

    def add(self, name: str, *, num_parameters: int = 1000, seconds: float = 60, **settings: Any) -> TrainResult:
        """A model; `settings` use __ for the dot."""
        named = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
        model = TrainResult(
            folder=f"runs/train-{name}", mlflow_run_id=f"run{name}", weights_sha256=f"{name}sha", val_error=0.5, best_epoch=1,
            epochs=2, num_parameters=num_parameters, images_per_second=100, seconds=seconds,
        )  # fmt: skip
        self._write(model.folder, model.model_dump(mode="json"), named, ["d" * 64])
        return model

    def evaluate(self, name: str, wrong: int, *, test_digest: str = "t" * 64) -> None:
        """The evaluation of a model: its first `wrong` answers are wrong."""
        target = StageFolder(self.storage, f"reports/evaluate-{name}{test_digest[0]}")
        labels = np.arange(NUM_ROWS) % 10
        answers = np.where(np.arange(NUM_ROWS) < wrong, (labels + 1) % 10, labels)
        ids = [f"{test_digest[0]}{row:03d}" for row in range(NUM_ROWS)]
        part = Part(0, 0, NUM_ROWS)
        write_part(target, part, build_table(ids, labels, np.eye(10, dtype=np.float32)[answers], np.zeros(NUM_ROWS)))
        merge_parts(target, [part])
        result = EvaluateResult(
            folder=target.name, metrics={"error": wrong / NUM_ROWS, "loss": 1.0}, error_interval=wilson(wrong, NUM_ROWS),
            classes={"0": ClassFigures(num_rows=50, precision=1, recall=1, f1=1)}, num_rows=NUM_ROWS, images_per_second=100,
            test_digest=test_digest,
        )  # fmt: skip
        self._write(target.name, result.model_dump(mode="json"), {}, [f"{name}sha", test_digest])

    def _write(self, folder: str, result: dict[str, Any], settings: dict[str, Any], inputs: list[str]) -> None:
        made = {"settings": settings, "inputs": inputs, "code": {"rcnn.train.loop": "1"}, "environment": {"torch": "2"}}
        self.storage.make_folder(folder)
        self.storage.write_text(f"{folder}/_result.json", json.dumps(result))
        self.storage.write_text(f"{folder}/_made_of.json", json.dumps(made))
