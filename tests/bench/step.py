"""How fast a training step is: ours, the plain network of `plain.py`, and the floor that the convolutions set.

    python -m tests.bench.step [--num-maps 96] [--num-steps 3] [--image-side 28] [--also recompute ...] [--json FILE]
                               [--plot FILE]

Each side lives in a process of its own, so that none warms up, or uses up, memory for another. They take turns, in rounds of
half a second at least; speeds are medians over the rounds, and a ratio is the median of the rounds' ratios, since the
machine's speed drifts. A step is forward, backward and update of SGD with momentum, on random colour images:

    plain           eager, float32, contiguous, as anybody would write it
    plain-bfloat16  the same under bfloat16 autocast, channels last (on a GPU, or with --precision bfloat16)
    floor           direct convolutions, and ours around them with the normalisations left out
    ours-direct     ours with direct convolutions
    ours            the step that `fit` runs
    ours-NAME       ours with the setting NAME, or without a C compiler (no-gcc), for each NAME of --also

Utilisation is the share of the fastest matrix product, in the type of `--precision`, that the same run found up to then.
The first step is the first one of a network in its process: C code is compiled anew for each K, and not for each T.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from tests.bench.common import arguments, machine, print_table, write_json
from tests.bench.step_side import IN_CHANNELS, NUM_CLASSES, VARIANTS

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    options = _parser().parse_args()
    print(machine(), flush=True)
    results: list[dict[str, Any]] = []
    peak = peak_flops(options)
    with ExitStack() as stack:
        sides = [stack.enter_context(Side.started(options, name)) for name in side_names(options)]
        for side, num_maps, num_steps in itertools.product(options.image_side, options.num_maps, options.num_steps):
            network = Network(num_maps, num_steps, side)
            results += measure(sides, network, rounds=options.rounds, batch=options.batch_size)
            peak = max(peak, peak_flops(options))
            note_utilisation(results, peak)
            print_rows(results[-len(sides) :])
    print_growth(results)
    print(f"\npeak of a matrix product: {peak / 1e9:,.0f} GFLOP/s ({options.precision})")
    write_json(options.json, results)
    if options.plot:
        plot(results, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, nargs="+", default=[32, 64, 96, 160], help="K (default: 32 64 96 160)")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="T (default: 0 to 5)")
    parser.add_argument("--image-side", type=int, nargs="+", default=[32], help="pixels, as 32 or 28 (default: 32)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of ours and the floor")
    parser.add_argument("--also", choices=VARIANTS, nargs="*", default=[], help="ours once more with this, each")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw cost against T, and against arithmetic")
    return parser


def side_names(options: argparse.Namespace) -> list[str]:
    """Who takes part."""
    has_bfloat16 = options.device == "cuda" or options.precision == "bfloat16"
    plain = ["plain", "plain-bfloat16"] if has_bfloat16 else ["plain"]
    return [*plain, "floor", "ours-direct", "ours", *(f"ours-{also}" for also in options.also)]


@dataclass(frozen=True)
class Network:
    """What is measured: K, T, and the height and width of the images."""

    num_maps: int
    num_steps: int
    image_side: int

    def __str__(self) -> str:
        """As a side reads it."""
        return f"{self.num_maps} {self.num_steps} {self.image_side}"


class Side:
    """A side's processes: one makes steps, the other measures memory and gives back at once what it frees."""

    def __init__(self, name: str, steps: "subprocess.Popen[str]", memory: "subprocess.Popen[str]"):
        self.name, self._steps, self._memory = name, steps, memory

    @classmethod
    @contextmanager
    def started(cls, options: argparse.Namespace, name: str) -> Iterator["Side"]:
        """Starts the processes, and ends them afterwards."""
        command = [sys.executable, "-m", "tests.bench.step_side", name, "--device", options.device]
        command += ["--precision", options.precision, "--batch-size", str(options.batch_size)]
        sparing = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        with _process(command, dict(os.environ)) as steps, _process([*command, "--memory"], sparing) as memory:
            yield cls(name, steps, memory)

    def build(self, network: Network) -> dict[str, float]:
        """Takes up a new network; returns its bytes an image and the seconds of its first step."""
        return self._ask(self._steps, str(network)) | self._ask(self._memory, str(network))

    def round(self) -> float:
        """The seconds of a step."""
        return self._ask(self._steps, "")["seconds"]

    def _ask(self, process: "subprocess.Popen[str]", line: str) -> dict[str, float]:
        print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            sys.exit(f"the side {self.name} ended early")
        return json.loads(answer)  # type: ignore[no-any-return]


@contextmanager
def _process(command: list[str], env: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        yield process


def measure(sides: Sequence[Side], network: Network, *, rounds: int, batch: int) -> list[dict[str, Any]]:
    """One result for each side, its utilisation left out."""
    built = {side.name: side.build(network) for side in sides}
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            seconds[side.name].append(side.round())
    flops = step_flops(network)

    def ratio(name: str, to: str) -> float:
        return statistics.median(theirs / own for own, theirs in zip(seconds[name], seconds[to], strict=True))

    return [
        {
            "side": name,
            **asdict(network),
            "images_per_second": batch / statistics.median(taken),
            "low": batch / max(taken),
            "high": batch / min(taken),
            "ratio_to_plain": ratio(name, "plain"),
            "ratio_to_floor": ratio(name, "floor"),
            "gflop_per_image": flops / 1e9,
            "peak_bytes_per_image": built[name]["bytes"],
            "seconds_to_first_step": built[name]["first_step"],
        }
        for name, taken in seconds.items()
    ]


def note_utilisation(results: Sequence[dict[str, Any]], peak: float) -> None:
    """Sets the share of the best matrix product so far; the last one noted is in the JSON."""
    for row in results:
        row["utilisation"] = row["gflop_per_image"] * 1e9 * row["images_per_second"] / peak


def step_flops(network: Network) -> float:
    """Floating-point operations of a training step per image: 2 for each multiply-add of the convolutions and the linear
    layer, forward, and as many again for each of the two gradients (of inputs, but for the first layer's, and of weights).
    """
    num_maps, side = network.num_maps, network.image_side
    positions = math.ceil(side / 2) ** 2 + math.ceil(side / 4) ** 2
    first = 25 * IN_CHANNELS * num_maps * side**2
    recurrent = 2 * positions * 9 * num_maps**2 * (network.num_steps + 1)
    return 2 * (2 * first + 3 * (recurrent + num_maps * NUM_CLASSES))


@torch.inference_mode()
def peak_flops(options: argparse.Namespace) -> float:
    """The best of ten large matrix products of each of two libraries, FLOP/s, in the type that ours computes in.

    One is the library behind `@`, the other the one behind convolutions: a 1x1 convolution is a matrix product too.
    """
    side = MATRIX_SIDE[options.device]
    left = torch.randn(side, side, device=options.device, dtype=getattr(torch, options.precision))
    images, kernels = left.reshape(1, side, 1, side).permute(0, 3, 1, 2), left[:, :, None, None]
    best = 0.0
    for _ in range(10):
        for product in (lambda: left @ left, lambda: functional.conv2d(images, kernels)):
            started = time.perf_counter()
            float(product().flatten()[0])
            best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The table of one network."""
    print_table(
        "K = {num_maps}, T = {num_steps}, {image_side}x{image_side}: {gflop_per_image:.3f} GFLOP an image".format(
            **rows[0]
        ),
        [
            {
                "side": row["side"],
                "images/s (low to high)": f"{row['images_per_second']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})",
                "to plain": f"{row['ratio_to_plain']:.2f}",
                "to floor": f"{row['ratio_to_floor']:.2f}",
                "utilisation": f"{100 * row['utilisation']:.0f} %",
                "peak MB/image": f"{row['peak_bytes_per_image'] / 1e6:.1f}",
                "first step": f"{row['seconds_to_first_step']:.2f} s",
            }
            for row in rows
        ],
    )


def print_growth(results: Sequence[dict[str, Any]]) -> None:
    """How the cost of ours grows from the smallest network to each larger one, beside the arithmetic."""
    ours = [row for row in results if row["side"] == "ours"]
    first = ours[0]
    rows = [
        {
            "images": "{0}x{0}".format(row["image_side"]),
            "K": str(row["num_maps"]),
            "T": str(row["num_steps"]),
            "arithmetic": f"x {row['gflop_per_image'] / first['gflop_per_image']:.1f}",
            "time": f"x {first['images_per_second'] / row['images_per_second']:.1f}",
            "GFLOP/s": f"{row['gflop_per_image'] * row['images_per_second']:.0f}",
        }
        for row in ours
    ]
    print_table(f"Growth of ours, from K = {first['num_maps']}, T = {first['num_steps']}", rows)


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Time per image against T for each K, and for all networks against the arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_sides, all_maps = (sorted({row[name] for row in results}) for name in ("image_side", "num_maps"))
    size = len(all_sides), len(all_maps) + 1
    figure, axes = pyplot.subplots(*size, figsize=(4 * size[1], 3.6 * size[0]), squeeze=False)
    for line, side in zip(axes, all_sides, strict=True):
        of_side = [row for row in results if row["image_side"] == side]
        for axis, num_maps in zip(line, all_maps, strict=False):
            _draw(axis, [row for row in of_side if row["num_maps"] == num_maps], "num_steps")
            axis.set(title=f"K = {num_maps}, {side}x{side}", xlabel="T", ylabel="ms an image", ylim=(0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
        _draw(line[-1], sorted(of_side, key=lambda row: row["gflop_per_image"]), "gflop_per_image")
        line[-1].set(title="all networks", xlabel="GFLOP an image", ylabel="ms an image", xscale="log", yscale="log")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _draw(axis: Any, results: Sequence[dict[str, Any]], against: str) -> None:
    """A line for each side, and what the arithmetic alone would take at the speed of the floor's last network."""
    for name in dict.fromkeys(row["side"] for row in results):
        rows = [row for row in results if row["side"] == name]
        axis.plot([row[against] for row in rows], [1e3 / row["images_per_second"] for row in rows], "o-", label=name)
    floor = [row for row in results if row["side"] == "floor"]
    speed = floor[-1]["gflop_per_image"] * floor[-1]["images_per_second"]
    times = [1e3 * row["gflop_per_image"] / speed for row in floor]
    axis.plot([row[against] for row in floor], times, "k:", label="arithmetic")


if __name__ == "__main__":
    main()
