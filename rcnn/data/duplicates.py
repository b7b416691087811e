"""Near-duplicates across splits: a test image that is among the training rows too makes the test error look better than it is.

In: what the writers of the shards noted of each row, a hash and a small grey copy, and the shards. Out:
`_near_duplicates.jsonl`, a line per pair, and what the manifest says of them. Hashes propose pairs (`hashes.py`), and pixels
decide: grey copies of 32 x 32 pixels at most, shifted by up to a pixel, for colour images mirrored as well, and without their
brightness.

The thresholds were chosen by looking at pairs. CIFAR-10-JPEG, test and training rows: of 48 pairs with a correlation of 0.90
to 0.93 about 12 were unrelated pictures of ships and planes, of 0.93 to 0.95 three (all differing by 22 grey levels and more),
above 0.95 none. Handwritten digits resemble each other more: at 0.95, 5 to 8 % of MNIST's test rows have such a pair, at 0.985
two rows. A digit that is re-encoded as JPEG has 0.99.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from rcnn.data.hashes import SHIFTS, Candidates, find_candidates
from rcnn.data.manifest import Manifest, NearDuplicate, NearDuplicates
from rcnn.data.shards import open_shard, unreadable_shard
from rcnn.storage import Storage

DUPLICATES = "_near_duplicates.jsonl"
"""Not Parquet: a glob over the folder, as DuckDB takes it, would read it as a shard."""
PAIRS_OF_SPLITS = (("test", "train"), ("test", "val"), ("val", "train"))
LEAST_CORRELATION = {1: 0.985, 3: 0.93}
"""Of the grey pixels, by number of channels."""
LARGEST_DIFFERENCE = 20.0  # mean absolute difference in grey levels
BLANK = 0.25  # variance of an image's pixels below which it shows nothing
MOST_PAIRS = 50_000
"""To look at, for each pair of splits, the closest hashes first: their pixels take 2 kB a pair at most."""
PAIRS_AT_A_TIME = 256  # 1 MB of each side: in the processor's cache
NUM_LISTED = 5

Hashes = dict[str, np.ndarray]
ReadCopies = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Alike:
    """Pairs of rows that show the same picture, and how alike they are."""

    first_N: np.ndarray
    second_N: np.ndarray
    is_mirrored_N: np.ndarray
    correlation_N: np.ndarray
    difference_N: np.ndarray


def find_near_duplicates(
    storage: Storage, folder: str, manifest: Manifest, hashes: Hashes, copies: ReadCopies
) -> tuple[pa.Table, NearDuplicates]:
    """Finds pairs of rows of different splits that show the same picture, the most alike first.

    Args:
        storage: where the data set is.
        folder: its folder.
        manifest: of the data set.
        hashes: of each split's rows, in the order of its shards, see `hash_copies`.
        copies: reads some grey copies of a split's rows, by their numbers in that order.

    Raises:
        DataError: a shard cannot be read.
    """
    is_colour = manifest.image_shape[2] > 1
    least = LEAST_CORRELATION[3 if is_colour else 1]
    tables, counts, affected = [], {}, {}
    for first, second in PAIRS_OF_SPLITS:
        found = find_candidates(
            hashes[first], hashes[second][:, 0], is_mirrored=is_colour
        )  # a mirrored digit is another
        found = found.take(np.argsort(found.bits_N, kind="stable")[:MOST_PAIRS])
        alike = decide(found, partial(copies, first), partial(copies, second), least)
        ours, theirs = (
            _names_of(storage, folder, manifest, split, numbers)
            for split, numbers in ((first, alike.first_N), (second, alike.second_N))
        )
        tables.append(_table(first, second, ours, theirs, alike))
        counts[f"{first}-{second}"] = len(alike.first_N)
        affected[f"{first}-{second}"] = len(np.unique(alike.first_N))
    table = pa.concat_tables(tables).sort_by([("correlation", "descending"), ("row_id", "ascending")])
    listed = table.select(list(NearDuplicate.model_fields)).slice(0, NUM_LISTED).to_pylist()
    differing = int((table.column("label").to_numpy() != table.column("other_label").to_numpy()).sum())
    return table, NearDuplicates(
        file=DUPLICATES,
        pairs=counts,
        rows=affected,
        other_label=differing,
        first=tuple(NearDuplicate(**row) for row in listed),
    )


def write_near_duplicates(storage: Storage, folder: str, table: pa.Table) -> None:
    """Writes the table into the data set's folder."""
    storage.write_text(f"{folder}/{DUPLICATES}", "".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))


def closest_pairs(storage: Storage, folder: str, num_pairs: int) -> list[dict[str, Any]]:
    """The first rows of the table, the most alike pairs.

    Raises:
        DataError: the table is missing or damaged.
    """
    where = storage.uri(f"{folder}/{DUPLICATES}")
    try:
        lines = storage.read_text(f"{folder}/{DUPLICATES}").splitlines()
        return [json.loads(line) for line in lines[:num_pairs]]
    except (OSError, ValueError) as error:
        raise unreadable_shard(where, error) from error


def decide(
    pairs: Candidates,
    first_copies: Callable[[np.ndarray], np.ndarray],
    second_copies: Callable[[np.ndarray], np.ndarray],
    least: float,
) -> Alike:
    """Those of the proposed pairs whose pixels agree; `least` is the smallest correlation."""
    (first_rows, first_N), (second_rows, second_N) = (
        np.unique(rows, return_inverse=True) for rows in (pairs.first_N, pairs.second_N)
    )
    ours, theirs = first_copies(first_rows), second_copies(second_rows)
    is_mirrored_N = pairs.view_N >= len(SHIFTS) ** 2
    correlation_N, difference_N = np.zeros(len(pairs)), np.zeros(len(pairs))
    for start in range(0, len(pairs), PAIRS_AT_A_TIME):
        here = slice(start, start + PAIRS_AT_A_TIME)
        first = ours[first_N[here]]
        first[is_mirrored_N[here]] = first[is_mirrored_N[here]][:, :, ::-1]
        correlation_N[here], difference_N[here] = resemblance(first, theirs[second_N[here]])
    chosen = (correlation_N >= least) & (difference_N <= LARGEST_DIFFERENCE)
    columns = (pairs.first_N, pairs.second_N, is_mirrored_N, correlation_N, difference_N)
    return Alike(*(column[chosen] for column in columns))


def resemblance(first_Nhw: np.ndarray, second_Nhw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How alike small grey images are, at the shift by up to a pixel where they are most alike.

    Returns:
        The correlation of their pixels (N), and the mean absolute difference in grey levels (N), brightness taken out.
    """
    first, second = (_centred(images.astype(np.float32)) for images in (first_Nhw, second_Nhw))
    correlation_N, difference_N = np.full(len(first), -1.0), np.full(len(first), 255.0)
    for down, right in product(SHIFTS, SHIFTS):
        ours, theirs = _cropped(first, down, right), _cropped(second, -down, -right)
        found_N = _correlation(ours, theirs)
        better = np.flatnonzero(found_N > correlation_N)
        correlation_N[better] = found_N[better]
        likely = better[found_N[better] >= min(LEAST_CORRELATION.values())]  # few: the others are dropped
        difference_N[likely] = np.abs(_centred(ours[likely]) - _centred(theirs[likely])).mean((1, 2))
    return correlation_N, difference_N


def _correlation(first_Nhw: np.ndarray, second_Nhw: np.ndarray) -> np.ndarray:
    """The correlation of pixels (N); 1 for two blank images, 0 for a blank one and another."""
    num_pixels = first_Nhw[0].size
    first_sum, second_sum = first_Nhw.sum((1, 2)), second_Nhw.sum((1, 2))
    covariance = np.einsum("nhw,nhw->n", first_Nhw, second_Nhw) - first_sum * second_sum / num_pixels
    first_spread = np.einsum("nhw,nhw->n", first_Nhw, first_Nhw) - first_sum**2 / num_pixels
    second_spread = np.einsum("nhw,nhw->n", second_Nhw, second_Nhw) - second_sum**2 / num_pixels
    blank = BLANK * num_pixels
    both_blank = (first_spread < blank) & (second_spread < blank)
    product_of_spreads = np.maximum(first_spread, blank) * np.maximum(second_spread, blank)
    return np.asarray(np.where(both_blank, 1.0, np.minimum(1.0, covariance / np.sqrt(product_of_spreads))))


def _centred(images_Nhw: np.ndarray) -> np.ndarray:
    return np.asarray(images_Nhw - images_Nhw.mean((1, 2), keepdims=True))


def _cropped(images_Nhw: np.ndarray, top: int, left: int) -> np.ndarray:
    """Without `top` rows at the top, or at the bottom where it is negative, and the same for the columns."""
    height, width = images_Nhw.shape[1:]
    return images_Nhw[:, max(0, top) : height + min(0, top), max(0, left) : width + min(0, left)]


def _names_of(storage: Storage, folder: str, manifest: Manifest, split: str, numbers: np.ndarray) -> pa.Table:
    """Ids and labels of some rows of a split, in the order of `numbers`."""
    wanted, places = np.unique(numbers, return_inverse=True)
    start, found = 0, [pa.table({"label": pa.array([], pa.int64()), "row_id": pa.array([], pa.string())})]
    for shard in manifest.splits[split].shards:
        here = wanted[(wanted >= start) & (wanted < start + shard.rows)] - start
        if len(here):
            with open_shard(storage, folder, shard, manifest.image_shape) as file:
                found.append(file.read(columns=["label", "row_id"], use_threads=False).take(here))
        start += shard.rows
    return pa.concat_tables(found).combine_chunks().take(places)


def _table(first: str, second: str, ours: pa.Table, theirs: pa.Table, alike: Alike) -> pa.Table:
    num_pairs = len(alike.first_N)
    return pa.table(
        {
            "split": pa.array([first] * num_pairs, pa.string()),
            "row_id": ours.column("row_id"),
            "row": pa.array(alike.first_N, pa.int64()),
            "label": ours.column("label"),
            "other_split": pa.array([second] * num_pairs, pa.string()),
            "other_row_id": theirs.column("row_id"),
            "other_row": pa.array(alike.second_N, pa.int64()),
            "other_label": theirs.column("label"),
            "mirrored": pa.array(alike.is_mirrored_N, pa.bool_()),
            "correlation": pa.array(alike.correlation_N.round(5), pa.float64()),
            "difference": pa.array(alike.difference_N.round(3), pa.float64()),
        }
    )
