"""What the same bits on any number of workers cost: steps in shares against plain ones, in turn, in one process.

    python -m tests.bench.shares [--num-maps 32 96] [--num-steps 3] [--num-shares 4] [--json FILE]

A step is what `fit` makes of a batch of 64 random images: rows picked, forward, backward, clipping, and the update.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rcnn.config import PipelineConfig
from rcnn.data.loader import Rows
from rcnn.plan.calibrate import Job, stand_in
from rcnn.train.checkpoint import new_state
from rcnn.train.execution import choose_execution, prepare
from rcnn.train.loop import steps_of
from tests.bench.common import arguments, machine, print_table, take_turns, write_json

IMAGE_SHAPE, NUM_CLASSES = (32, 32, 3), 10
BATCH, STEPS_PER_ROUND, STEPS_PER_EPOCH = 64, 5, 1000


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, nargs="+", default=[32, 96], help="K")
    parser.add_argument("--num-steps", type=int, default=3, help="T")
    parser.add_argument("--num-shares", type=int, default=4, help="shares of a batch")
    options = parser.parse_args()
    print(machine())
    results = []
    for num_maps in options.num_maps:
        sides = {
            name: steps_in(num_maps, options.num_steps, count)
            for name, count in (("plain", 0), ("shares", options.num_shares))
        }
        found = take_turns(sides, rounds=options.rounds)
        for name, timing in found.items():
            ratio = timing.median / found["plain"].median
            place = {"side": name, "num_maps": num_maps, "num_steps": options.num_steps}
            results.append(place | timing.as_json() | {"ratio_to_plain_steps": ratio})
    rows = [
        {
            "K": str(row["num_maps"]),
            "side": str(row["side"]),
            "images/s (low to high)": f"{row['images_per_second']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})",
            "to plain steps": f"{row['ratio_to_plain_steps']:.2f}",
        }
        for row in results
    ]
    print_table(f"T = {options.num_steps}, {options.num_shares} shares of a batch of {BATCH}", rows)
    write_json(options.json, results)


def steps_in(num_maps: int, num_steps: int, num_shares: int) -> Callable[[], int]:
    """Makes some steps of a training; returns their number of images."""
    settings = {
        "model.k": num_maps, "model.t": num_steps, "train.num_shares": num_shares, "train.batch_size": BATCH,
        "train.learning_rate": 1e-6, "tune.enabled": False,
    }  # fmt: skip
    config = PipelineConfig().with_settings(settings)
    device = torch.device("cpu")
    prepare(device)
    state = new_state(config, stand_in(Job(config, IMAGE_SHAPE, NUM_CLASSES, 1)), device=device, num_steps=10**6)
    num_rows = STEPS_PER_EPOCH * BATCH
    images = torch.randint(256, (num_rows, *IMAGE_SHAPE), dtype=torch.uint8).permute(0, 3, 1, 2)
    rows = Rows(images, torch.randint(NUM_CLASSES, (num_rows,)))
    steps = steps_of(state, rows, choose_execution(config, device, num_steps=1))
    losses = _endless(steps.epoch)

    def work() -> int:
        for _ in range(STEPS_PER_ROUND):
            loss = next(losses)
        float(loss)
        return STEPS_PER_ROUND * BATCH

    return work


def _endless(epoch: Callable[[int], Iterator[Tensor]]) -> Iterator[Tensor]:
    number = 0
    while True:
        yield from epoch(number)
        number += 1


if __name__ == "__main__":
    main()
