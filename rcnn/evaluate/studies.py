"""Studies of a finished model: its temperature, and how its error changes with recurrent steps, views and corruptions.

In: the model, validation rows for the temperature, and a sample of the test rows for the rest. Out: figures, and pictures of
what the network computes. `predictions.parquet`, and so the gate, knows nothing of it: it has the single view of each row.

All of it runs in the process of the stage, also where Ray's workers score the test rows: `evaluate.sample_rows` bounds it, and
starting workers would take longer. A batch goes through all conditions before the next one is read, each on one thread, so one
batch for each thread is in memory.
"""

import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rcnn.config import PipelineConfig
from rcnn.data.batches import Batch
from rcnn.data.manifest import Manifest
from rcnn.data.streaming import StoredRows, stored_rows, stretch
from rcnn.evaluate.calibration import fit_temperature
from rcnn.evaluate.corruptions import corrupted
from rcnn.evaluate.early_exit import EarlyExit, choose_exit
from rcnn.evaluate.figures import wilson
from rcnn.evaluate.paired import Paired
from rcnn.evaluate.scoring import logits_and_labels, side_by_side
from rcnn.evaluate.study_pictures import draw_corruptions, draw_fields, draw_filters, draw_states, draw_steps
from rcnn.evaluate.study_size import (
    CORRUPTIONS,
    MOST_ROWS_TO_CALIBRATE,
    NUM_STRENGTHS,
    NUM_VIEWS,
    num_images_of_fields,
    num_sampled,
    num_steps_studied,
    studies_exit,
)
from rcnn.evaluate.unrolled import first_filters, receptive_fields, recurrent_layers, shortened, unroll
from rcnn.evaluate.views import mean_probabilities, views_of
from rcnn.model.build import count_multiply_adds
from rcnn.model.classifier import Classifier
from rcnn.results import StudyRow, TrainResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import load_model

EARLY_EXIT = "early exit"
"""The name of that study."""
NUM_IMAGES_OVER_TIME = 3
SEED = 0
"""Of the sample of rows: the same rows for every model on a data set, so that studies can be compared."""


Ask = Callable[[Tensor, Sequence[int]], Tensor]
"""uint8 images (N, C, H, W) and a seed for each in, the predicted class (N) of each out."""


@dataclass(frozen=True)
class Condition:
    """One way to ask the model.

    Attributes:
        study, name: see `EvaluateResult.studies` and `StudyRow.condition`.
        answer: asks the model.
        passes: forward passes of the whole network per image; asked after all answers, since an early exit counts them.
    """

    study: str
    name: str
    answer: Ask
    passes: Callable[[], float]


@dataclass(frozen=True)
class Studied:
    """The figures of all studies."""

    temperature: float
    studies: dict[str, tuple[StudyRow, ...]]


class StudyRun:
    """A model with the rows of its studies.

    Args:
        config: the settings.
        storage, data_folder, manifest: the data set.
        trained: the model.
        num_at_once: threads, each of which works on a batch.

    Raises:
        DataError: the model or the data set is incomplete.
    """

    def __init__(
        self,
        config: PipelineConfig,
        *,
        storage: Storage,
        data_folder: str,
        manifest: Manifest,
        trained: TrainResult,
        num_at_once: int,
    ):
        self.config, self.manifest = config, manifest
        # A head that submits to GPU workers may have none itself.
        self.device = torch.device("cuda" if config.execution.use_gpu and torch.cuda.is_available() else "cpu")
        self.num_at_once = 1 if self.device.type == "cuda" else num_at_once
        with tempfile.TemporaryDirectory() as folder:
            storage.download(f"{trained.folder}/model", Path(folder))
            self.model, _ = load_model(Path(folder))
        self.model.to(self.device)

        def rows_of(split: str, num_rows: int) -> StoredRows:
            return stored_rows(storage, data_folder, manifest, split, num_rows=num_rows, seed=SEED)

        self.val, num_test = rows_of("val", MOST_ROWS_TO_CALIBRATE), manifest.splits["test"].rows
        self.sample = rows_of("test", num_sampled(config, num_test) or 1)

    def run(self, folder: Path) -> Studied:
        """Measures what the settings ask for, and writes the pictures into a local folder."""
        title = f"{self.config.model.title}, {self.manifest.name}"
        batches = self.val.batches(self.config.evaluate.batch_size, self.device)
        temperature, known = 1.0, None  # also where no row is left that the model has not learned
        if not self.config.train.with_validation:
            known = logits_and_labels(self.model, batches, self.num_at_once)
            temperature = fit_temperature(*known)
        filters_KCHW = first_filters(self.model)
        if filters_KCHW is not None:
            draw_filters(filters_KCHW.numpy(), f"{title}: first-layer filters", folder / "filters.png")
        conditions = [*self.conditions(), *self._early_exit(known)]
        if not conditions:
            return Studied(temperature, {})
        answers, labels_N = self.answers(conditions)
        studies = _studies(conditions, answers, labels_N)
        if "steps" in studies:
            draw_steps(studies["steps"], title, folder / "steps.png")
            self._draw_recurrence(conditions, answers, labels_N, title, folder)
        if "robustness" in studies:
            [image_HWC], _ = self.sample.read(stretch(self.sample.segments, 0, 1))
            draw_corruptions(studies["robustness"], self._gallery(image_HWC), title, folder / "robustness.png")
        return Studied(temperature, studies)

    def conditions(self) -> Iterator[Condition]:
        """All that are to be measured."""
        if num_steps_studied(self.config) and recurrent_layers(self.model):
            yield from self._steps()
        for views in self.config.evaluate.views:
            yield Condition("views", views, self._by_views(views), partial(float, NUM_VIEWS[views]))
        if self.config.evaluate.robustness:
            for name in CORRUPTIONS:
                for strength in range(1, NUM_STRENGTHS + 1):
                    yield Condition("robustness", f"{name}/{strength}", self._corrupted(name, strength), _one_pass)

    def answers(self, conditions: Sequence[Condition]) -> tuple[np.ndarray, np.ndarray]:
        """The predicted classes (1 + conditions, N) and the labels (N); the first row is the model as it is."""
        seeds = self._seeds() if self.config.evaluate.robustness else [0] * len(self.sample)
        asks: list[Ask] = [partial(_answer, self.model), *(condition.answer for condition in conditions)]

        @torch.inference_mode()
        def work(item: tuple[Batch, Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
            (images_NCHW, labels_N), seeds_N = item
            found = torch.stack([ask(images_NCHW, seeds_N).cpu() for ask in asks])
            return found.numpy(), labels_N.cpu().numpy()

        parts = list(side_by_side(work, self._batches_with(seeds), self.num_at_once))
        answers_AN, labels_N = (np.concatenate(each, -1) for each in zip(*parts, strict=True))
        return answers_AN, labels_N

    def _batches_with(self, seeds: Sequence[int]) -> Iterator[tuple[Batch, Sequence[int]]]:
        start = 0
        for images_NCHW, labels_N in self.sample.batches(self.config.evaluate.batch_size, self.device):
            yield (images_NCHW, labels_N), seeds[start : start + len(labels_N)]
            start += len(labels_N)

    def _seeds(self) -> list[int]:
        """Of the corruptions of each row: from its id, so that another sample corrupts it alike."""
        return [zlib.crc32(row_id.encode()) for row_id in self.sample.row_ids()]

    def _steps(self) -> Iterator[Condition]:
        for num_steps in range(num_steps_studied(self.config)):
            model = shortened(self.model, num_steps)
            yield Condition("steps", str(num_steps), partial(_answer, model), partial(self._share, model))

    def _share(self, model: Classifier) -> float:
        """The multiply-adds of a shortened model, as a share of the whole one's."""
        height, width, channels = self.manifest.image_shape
        ours, whole = (count_multiply_adds(each, (height, width, channels)) for each in (model, self.model))
        return float(ours / whole)

    def _early_exit(self, known: tuple[np.ndarray, np.ndarray] | None) -> Iterator[Condition]:
        """The exit that validation rows choose, where the network was trained for any number of steps."""
        if known is None or not studies_exit(self.config):
            return
        last = num_steps_studied(self.config)
        logits_NC, labels_N = known
        shorter = [shortened(self.model, num_steps) for num_steps in range(last)]
        logits_of = {last: logits_NC}
        for num_steps, model in enumerate(shorter):
            batches = self.val.batches(self.config.evaluate.batch_size, self.device)
            logits_of[num_steps], _ = logits_and_labels(model, batches, self.num_at_once)
        shares = [self._share(model) for model in shorter]
        found = choose_exit(logits_of, labels_N, shares)
        if found is None:
            return
        exits = EarlyExit(self.model, found)
        name = f"{found.num_steps} where sure by {100 * found.confidence:.2f} %, else {last}"
        yield Condition(
            EARLY_EXIT,
            name,
            partial(_answer, exits),
            lambda: shares[found.num_steps] + exits.num_passed_on / len(self.sample),
        )

    def _by_views(self, name: str) -> Ask:
        def answer(images_NCHW: Tensor, seeds_N: Sequence[int]) -> Tensor:
            views = views_of(name, images_NCHW, crop=self.model.crop)
            return mean_probabilities(self.model(view) for view in views).argmax(1)

        return answer

    def _corrupted(self, name: str, strength: int) -> Ask:
        def answer(images_NCHW: Tensor, seeds_N: Sequence[int]) -> Tensor:
            images_NHWC = np.ascontiguousarray(images_NCHW.permute(0, 2, 3, 1).cpu().numpy())
            worse_NHWC = corrupted(name, strength, images_NHWC, seeds_N)
            worse_NCHW = torch.from_numpy(worse_NHWC).permute(0, 3, 1, 2).to(images_NCHW.device)
            return _answer(self.model, worse_NCHW, seeds_N)

        return answer

    def _gallery(self, image_HWC: np.ndarray) -> list[list[np.ndarray]]:
        """An image with each corruption, from strength 0 on."""
        seed = self._seeds()[0]

        def worse(name: str, strength: int) -> np.ndarray:
            return corrupted(name, strength, image_HWC[None], [seed])[0] if strength else image_HWC

        return [[worse(name, strength) for strength in range(NUM_STRENGTHS + 1)] for name in CORRUPTIONS]

    def _draw_recurrence(
        self, conditions: Sequence[Condition], answers: np.ndarray, labels_N: np.ndarray, title: str, folder: Path
    ) -> None:
        over_time = [number + 1 for number, each in enumerate(conditions) if each.study == "steps"]
        rows = telling_rows(answers[[*over_time, 0]], labels_N, NUM_IMAGES_OVER_TIME)
        images_NHWC = np.concatenate([self.sample.read(stretch(self.sample.segments, row, row + 1))[0] for row in rows])
        unrolling = unroll(self.model, _as_batch(images_NHWC, self.device))
        labels = [int(labels_N[row]) for row in rows]
        draw_states(unrolling, images_NHWC, labels, self.manifest.classes, title, folder / "states.png")
        num_images = num_images_of_fields(*self.manifest.image_shape[:2])
        first_NHWC, _ = self.sample.read(stretch(self.sample.segments, 0, num_images))
        images_NCHW = _as_batch(first_NHWC, self.device)
        times = iter(range(num_steps_studied(self.config) + 1))
        fields = side_by_side(lambda t: receptive_fields(self.model, images_NCHW, t), times, self.num_at_once)
        draw_fields([field for after in fields for field in after], title, folder / "receptive-fields.png")


def _one_pass() -> float:
    return 1.0


def _answer(model: Callable[[Tensor], Tensor], images_NCHW: Tensor, seeds_N: Sequence[int]) -> Tensor:
    return torch.as_tensor(model(images_NCHW)).argmax(1)


def _as_batch(images_NHWC: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).to(device)


def telling_rows(answers_TN: np.ndarray, labels_N: np.ndarray, num_rows: int) -> list[int]:
    """Rows whose answer changes over the time steps, then others.

    First one that the steps correct, one that they spoil, and one that changes otherwise; then those with most changes, the
    first rows where answers do not change.
    """
    right_TN = answers_TN == labels_N
    num_changes_N = (answers_TN[1:] != answers_TN[:-1]).sum(0)
    kinds = (
        ~right_TN[0] & right_TN[-1],
        right_TN[0] & ~right_TN[-1],
        ~right_TN[0] & ~right_TN[-1] & (num_changes_N > 0),
    )
    chosen = [int(np.flatnonzero(kind)[0]) for kind in kinds if kind.any()]
    others = np.argsort(-num_changes_N, kind="stable").tolist()
    return [*chosen, *(row for row in others if row not in chosen)][:num_rows]


def _studies(
    conditions: Sequence[Condition], answers: np.ndarray, labels_N: np.ndarray
) -> dict[str, tuple[StudyRow, ...]]:
    plain_N, studies = answers[0] == labels_N, dict[str, list[StudyRow]]()
    for condition, answers_N in zip(conditions, answers[1:], strict=True):
        row = _row(condition.name, condition.passes(), answers_N == labels_N, plain_N)
        studies.setdefault(condition.study, [_row("as it is", 1.0, plain_N, plain_N)]).append(row)
    return {name: tuple(_ordered(name, rows)) for name, rows in studies.items()}


def _ordered(study: str, rows: list[StudyRow]) -> list[StudyRow]:
    """The model as it is comes first, or after the fewer steps, being the one with T."""
    first, *others = rows
    return [*others, first.model_copy(update={"condition": str(len(others))})] if study == "steps" else rows


def _row(condition: str, passes: float, right_N: np.ndarray, plain_N: np.ndarray) -> StudyRow:
    num_rows, num_wrong = len(right_N), int((~right_N).sum())
    paired = Paired(num_rows, int((right_N & ~plain_N).sum()), int((plain_N & ~right_N).sum()))
    return StudyRow(
        condition=condition,
        num_rows=num_rows,
        error=num_wrong / num_rows,
        error_interval=wilson(num_wrong, num_rows),
        gain=paired.gain,
        gain_interval=paired.gain_interval,
        passes=round(passes, 3),
    )
