"""How much data there is: from the manifest, or before ingest for the official data sets, whose sizes are known."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from rcnn.config import DataConfig, PipelineConfig
from rcnn.results import IngestResult, StageResult
from rcnn.storage import Storage


@dataclass(frozen=True)
class DataSize:
    """The number of rows by split, the shape of an image (H, W, C), and the number of classes."""

    num_rows: Mapping[str, int]
    image_shape: tuple[int, int, int]
    num_classes: int

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in memory."""
        height, width, channels = self.image_shape
        return height * width * channels

    @property
    def num_rows_in_all(self) -> int:
        """Rows of all splits."""
        return sum(self.num_rows.values())


OFFICIAL = {
    "mnist-sample": DataSize({"train": 5_000}, (28, 28, 1), 10),
    "mnist": DataSize({"train": 60_000, "test": 10_000}, (28, 28, 1), 10),
    "fashion-mnist": DataSize({"train": 60_000, "test": 10_000}, (28, 28, 1), 10),
    "cifar10": DataSize({"train": 50_000, "test": 10_000}, (32, 32, 3), 10),
    "cifar100": DataSize({"train": 50_000, "test": 10_000}, (32, 32, 3), 100),
    "svhn": DataSize({"train": 73_257, "test": 26_032}, (32, 32, 3), 10),
}
"""As published; `num_rows` before the validation rows are held out."""
SVHN_EXTRA_ROWS = 531_131


def size_before_ingest(data: DataConfig) -> DataSize | None:
    """What ingest will write, or None for data whose size is not known yet."""
    official = OFFICIAL.get(data.source)
    if official is None:
        return None
    num_rows = dict(official.num_rows)
    num_rows["train"] += SVHN_EXTRA_ROWS if data.svhn_extra else 0
    for split, fraction in (("test", data.test_fraction), ("val", data.val_fraction)):
        if split not in num_rows:
            num_rows[split] = max(1, round(Fraction(str(fraction)) * num_rows["train"]))
            num_rows["train"] -= num_rows[split]
    return DataSize(num_rows, official.image_shape, official.num_classes)


def size_of(config: PipelineConfig, results: Mapping[str, StageResult]) -> DataSize | None:
    """The size of the data set among the results, or of the one that ingest will write, where it is known."""
    ingested = next((result for result in results.values() if isinstance(result, IngestResult)), None)
    if ingested is None:
        return size_before_ingest(config.data)
    from rcnn.data.manifest import require_manifest

    manifest = require_manifest(Storage(config.storage), ingested.folder)
    num_rows = {name: split.rows for name, split in manifest.splits.items()}
    return DataSize(num_rows, manifest.image_shape, len(manifest.classes))
