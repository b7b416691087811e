"""A finished model for other programs: a `torch.export` archive (.pt2) and an ONNX file, each compared with the model itself.

In: a folder with `model.safetensors` and `model.json`. Out: `model.pt2` and `model.onnx`. Both take what the model takes, uint8
images (N, C, H, W) of any N, and return its logits (N, classes): normalisation is part of the graph, so a caller cannot get it
wrong. Class names and image shape are in the file's metadata. The graph has torch's own operations: the compiled layers of
`rcl_cpu.py` and `lrn_cpu.py` refuse the tensors without data that torch traces with.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcnn.errors import ConfigError, DataError
from rcnn.train.checkpoint import load_model

FORMATS = ("pt2", "onnx")
INPUT, OUTPUT, DYNAMIC_BATCH = "images", "logits", "N"
METADATA = "metadata.json"
"""The extra file of a .pt2 archive that holds the metadata; an ONNX file has each entry in `metadata_props`, as JSON."""
CHECKED_BATCHES = (1, 7, 64)
TOLERANCE = 1e-4
"""Of the logits, relative to the largest one. The compiled layers' own rounding errors reach 1e-6 (K = 8) to 1e-5 (K = 96)."""

Logits = Callable[[np.ndarray], np.ndarray]
"""uint8 images (N, C, H, W) -> logits (N, classes)."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        file: its path.
        difference: the largest difference of a logit from the live model's, relative to the largest logit, over
            `CHECKED_BATCHES`.
    """

    file: Path
    difference: float

    @property
    def summary(self) -> str:
        """Its size, and how well it agrees with the live model."""
        *some, last = CHECKED_BATCHES
        batches = f"{', '.join(map(str, some))} and {last}"
        size = f"{self.file.stat().st_size / 1e6:,.1f} MB"
        return f"{size}, logits within {self.difference:.0e} of the model's in batches of {batches}"


@torch.no_grad()
def export_model(folder: Path, to: Path, formats: Sequence[str] = FORMATS) -> list[Exported]:
    """Writes a model in some formats, after comparing each with the live model.

    Args:
        folder: holds `model.safetensors` and `model.json`.
        to: a folder, created if missing.
        formats: some of `FORMATS`.

    Raises:
        ConfigError: one of the files exists.
        DataError: there is no model in the folder, or an export answers differently from the live model.
    """
    targets = {kind: to / f"model.{kind}" for kind in formats}
    for file in targets.values():
        if file.exists():
            raise ConfigError("exists", where=str(file), remedy="Delete it, or choose another folder")
    model, description = load_model(folder)
    height, width, channels = description["image_shape"]
    program = _traced(model, (channels, height, width))
    to.mkdir(parents=True, exist_ok=True)
    return [_written(kind, file, program, model, description) for kind, file in targets.items()]


def _traced(model: torch.nn.Module, shape_CHW: tuple[int, int, int]) -> Any:
    """The model's graph for any number of images; traced with two, because one image would make that number a constant."""
    example_NCHW = torch.zeros(2, *shape_CHW, dtype=torch.uint8)
    return torch.export.export(model, (example_NCHW,), dynamic_shapes=({0: torch.export.Dim(DYNAMIC_BATCH)},))


def _written(kind: str, file: Path, program: Any, model: torch.nn.Module, description: dict[str, Any]) -> Exported:
    """Writes one format under a temporary name, compares it with the live model, and renames it."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder:
        draft = Path(folder, file.name)
        write, open_ = _WRITERS[kind]
        write(program, draft, _metadata(description))
        difference = _difference(model, open_(draft), description["image_shape"])
        if not difference <= TOLERANCE:  # also True if it is not a number
            raise DataError(
                f"its logits differ from the model's by {difference:.1e} of the largest one, and {TOLERANCE:.0e} is allowed",
                where=str(file),
                remedy="It was not written. Export another format, and report this as a bug",
            )
        draft.rename(file)
    return Exported(file, difference)


def _metadata(description: dict[str, Any]) -> dict[str, Any]:
    """What a user of the file needs to know, by name."""
    height, width, channels = description["image_shape"]
    return {
        "classes": description["classes"],
        "image_shape": [height, width, channels],
        "input": f"uint8 (N, {channels}, {height}, {width}), 0 to 255; normalisation is part of the model",
        "output": f"logits (N, {len(description['classes'])}), float32, before the softmax",
        "data_set": description["source"],
        "data_digest": description.get("data_digest", ""),
    }


def _write_pt2(program: Any, file: Path, metadata: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        # All time steps of a layer share one normalisation; torch warns of shared tensors, and stores them once.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})


def _open_pt2(file: Path) -> Logits:
    module = torch.export.load(file).module()
    return lambda images_NCHW: module(torch.from_numpy(images_NCHW)).numpy()  # type: ignore[no-any-return]


def _write_onnx(program: Any, file: Path, metadata: dict[str, Any]) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: DYNAMIC_BATCH},),  # only for the dimension's name: the program has it already
        verbose=False,
    )
    assert written is not None, "the dynamo exporter returns a program"
    written.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    written.save(file)


def _open_onnx(file: Path) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images_NCHW: session.run([OUTPUT], {INPUT: images_NCHW})[0]  # type: ignore[no-any-return]


_WRITERS = {"pt2": (_write_pt2, _open_pt2), "onnx": (_write_onnx, _open_onnx)}


def _difference(model: torch.nn.Module, exported: Logits, image_shape: Sequence[int]) -> float:
    """The largest difference of a logit over random images, black ones and white ones, relative to the largest logit."""
    height, width, channels = image_shape
    rng = np.random.default_rng(0)
    worst = 0.0
    for num_images in CHECKED_BATCHES:
        images_NCHW = rng.integers(0, 256, (num_images, channels, height, width), dtype=np.uint8)
        images_NCHW[-1:] = 255 * (num_images % 2)
        wanted_NC = model(torch.from_numpy(images_NCHW)).numpy()
        difference = np.abs(exported(images_NCHW) - wanted_NC).max() / max(1.0, np.abs(wanted_NC).max())
        worst = float(np.maximum(worst, difference))  # a NaN stays
    return worst
