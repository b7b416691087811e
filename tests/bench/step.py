"""How fast a training step is: ours, the plain network of `plain.py`, and the floor that the convolutions set.

    python -m tests.bench.step [--num-maps 96] [--num-steps 3] [--also recompute ...] [--json FILE] [--plot FILE]

Each side lives in a process of its own, so that none warms up, or uses up, memory for another; they take turns, one step at
a time, and medians are compared. A step is forward, backward and update of SGD with momentum, on random 32x32 colour images:

    plain           eager, float32, contiguous, as anybody would write it
    plain-bfloat16  the same under bfloat16 autocast, channels last (on a GPU, or with --precision bfloat16)
    floor           ours with the normalisations left out: convolutions, ReLU, pools and the rest
    ours            the step that `fit` runs
    ours-NAME       ours with the setting `train.NAME`, for each NAME of --also

Utilisation is the share of the fastest matrix product, in the type of `--precision`, that was found in the same run.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.nn import functional

from tests.bench.common import arguments, machine, print_table, write_json

IMAGE_SIDE, IN_CHANNELS, NUM_CLASSES = 32, 3, 10
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
FEW_IMAGES, MORE_IMAGES = 32, 96
VARIANTS = {"recompute": "recompute", "deterministic": "deterministic", "compiled": "compile", "triton": "triton"}


def main() -> None:
    options = _parser().parse_args()
    if options.side:
        serve(options)
        return
    print(machine())
    peak = peak_flops(options)
    print(f"peak of a matrix product: {peak / 1e9:,.0f} GFLOP/s ({options.precision})")
    results = []
    for num_maps, num_steps in itertools.product(options.num_maps, options.num_steps):
        results += measure(options, num_maps, num_steps, peak)
        print_rows(num_maps, num_steps, results)
    print_growth(results)
    write_json(options.json, results)
    if options.plot:
        plot(results, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, nargs="+", default=[32, 96, 160], help="K (default: 32 96 160)")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="T (default: 0 to 5)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of ours and the floor")
    parser.add_argument("--also", choices=VARIANTS, nargs="*", default=[], help="ours once more with this, each")
    parser.add_argument("--steps-per-round", type=int, default=0, help="default: 1 on the CPU, 20 on a GPU")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw cost against T")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure(options: argparse.Namespace, num_maps: int, num_steps: int, peak: float) -> list[dict[str, Any]]:
    """One result for each side."""
    has_bfloat16 = options.device == "cuda" or options.precision == "bfloat16"
    names = [
        "plain",
        *["plain-bfloat16"][: int(has_bfloat16)],
        "floor",
        "ours",
        *(f"ours-{also}" for also in options.also),
    ]
    flops = step_flops(num_maps, num_steps)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(side(options, name, num_maps, num_steps)) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, process in sides.items():
                seconds[name].append(ask(process))
    peaks = {name: peak_bytes_per_image(options, name, num_maps, num_steps) for name in names}
    speeds = {name: options.batch_size / statistics.median(taken) for name, taken in seconds.items()}
    return [
        {
            "side": name,
            "num_maps": num_maps,
            "num_steps": num_steps,
            "images_per_second": speeds[name],
            "low": options.batch_size / max(seconds[name]),
            "high": options.batch_size / min(seconds[name]),
            "ratio_to_plain": speeds[name] / speeds["plain"],
            "ratio_to_floor": speeds[name] / speeds["floor"],
            "utilisation": flops * speeds[name] / peak,
            "gflop_per_image": flops / 1e9,
            "peak_bytes_per_image": peaks[name],
        }
        for name in names
    ]


def step_flops(num_maps: int, num_steps: int) -> float:
    """Floating-point operations of a training step per image: 2 for each multiply-add of the convolutions and the linear
    layer, forward, and as many again for each of the two gradients (of inputs, but for the first layer's, and of weights).
    """
    positions = (IMAGE_SIDE // 2) ** 2, (IMAGE_SIDE // 4) ** 2
    first = 25 * IN_CHANNELS * num_maps * IMAGE_SIDE**2
    recurrent = 2 * sum(positions) * 9 * num_maps**2 * (num_steps + 1)
    return 2 * (2 * first + 3 * (recurrent + num_maps * NUM_CLASSES))


@contextmanager
def side(options: argparse.Namespace, name: str, num_maps: int, num_steps: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that makes a step whenever it is asked to; its first steps are behind it."""
    command = side_command(options, name, num_maps, num_steps)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ask(process)
        yield process
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def peak_bytes_per_image(options: argparse.Namespace, name: str, num_maps: int, num_steps: int) -> float:
    """What each image more adds to the most memory that a step takes; found by a process that keeps nothing it freed."""
    command = [*side_command(options, name, num_maps, num_steps), "--memory"]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return float(json.loads(done.stdout)["bytes"])


def side_command(options: argparse.Namespace, name: str, num_maps: int, num_steps: int) -> list[str]:
    """What starts a side's process."""
    command = [sys.executable, "-m", "tests.bench.step", "--side", name]
    for setting in ("device", "precision", "batch_size", "steps_per_round"):
        command += [f"--{setting.replace('_', '-')}", str(getattr(options, setting))]
    return [*command, "--num-maps", str(num_maps), "--num-steps", str(num_steps)]


def ask(process: "subprocess.Popen[str]") -> float:
    """Has a side make a round's steps; returns the seconds of one."""
    asked, answered = _pipes(process)
    asked.write("step\n")
    asked.flush()
    line = answered.readline()
    if not line:
        sys.exit(f"a side ended early: {' '.join(process.args)}")  # type: ignore[arg-type]
    return float(json.loads(line)["seconds"])


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None, "opened with a pipe"
    assert process.stdout is not None, "opened with a pipe"
    return process.stdin, process.stdout


def serve(options: argparse.Namespace) -> None:
    """What a side's process does: makes the model and a first step, then one whenever a line comes in."""
    trainer = Trainer(options)
    if options.memory:
        print(json.dumps({"bytes": trainer.bytes_per_image()}))
        return
    trainer.make_steps()
    for _ in sys.stdin:
        started = time.perf_counter()
        num_steps = trainer.make_steps()
        print(json.dumps({"seconds": (time.perf_counter() - started) / num_steps}), flush=True)


class Trainer:
    """A side's model, and what trains it."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        self.device, self.batch_size = torch.device(options.device), options.batch_size
        self.model, self.optimizer = build(options, options.num_maps[0], options.num_steps[0], self.device)
        is_narrow = options.side == "plain-bfloat16" or (options.side != "plain" and options.precision == "bfloat16")
        self.precision = torch.bfloat16 if is_narrow else torch.float32
        self.memory_format = torch.contiguous_format if options.side == "plain" else torch.channels_last
        self.steps_per_round = options.steps_per_round or (20 if options.device == "cuda" else 1)
        self.batch = self._batch(self.batch_size)

    def _batch(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(num_images, IN_CHANNELS, IMAGE_SIDE, IMAGE_SIDE, device=self.device)
        labels = torch.randint(NUM_CLASSES, (num_images,), device=self.device)
        return images.contiguous(memory_format=self.memory_format), labels

    def make_steps(self) -> int:
        """Makes a round's steps and returns their number."""
        from rcnn.train.step import train_step

        for _ in range(self.steps_per_round):
            loss = train_step(self.model, self.optimizer, *self.batch, precision=self.precision)
        float(loss)  # waits for the device
        return self.steps_per_round

    def bytes_per_image(self) -> float:
        """What each image more adds to the most memory that a step takes, from a small batch to a larger one."""
        peaks = []
        for num_images in (FEW_IMAGES, MORE_IMAGES):
            self.batch = self._batch(num_images)
            self.make_steps()
            peaks.append(self._most_memory())
        return (peaks[1] - peaks[0]) / (MORE_IMAGES - FEW_IMAGES)

    def _most_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(
    options: argparse.Namespace, num_maps: int, num_steps: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model of a side, and what updates it."""
    if options.side.startswith("plain"):
        from tests.bench.plain import PlainRCNN

        plain = PlainRCNN(num_maps, num_steps, IN_CHANNELS, NUM_CLASSES).to(device)
        if options.side != "plain":
            plain = plain.to(memory_format=torch.channels_last)
        return plain, torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    return build_ours(options, num_maps, num_steps, device)


def build_ours(
    options: argparse.Namespace, num_maps: int, num_steps: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As `fit` would build them, with one setting more."""
    from rcnn.config import TrainConfig
    from rcnn.model import RCNN
    from rcnn.train.optim import build_optimizer
    from rcnn.train.step import choose_execution, prepare

    is_gpu, also = device.type == "cuda", options.side.partition("-")[2]
    more = {VARIANTS[also]: "on" if also == "compiled" else True} if also else {}
    train = TrainConfig(learning_rate=1e-3, momentum=0.9, use_gpu=is_gpu, **{"compile": "off"} | more)
    if not options.memory:
        prepare(device, deterministic=train.deterministic)
    ours = RCNN(num_maps, num_steps, IN_CHANNELS, NUM_CLASSES, recompute=train.recompute, triton=train.triton)
    ours.to(device, memory_format=torch.channels_last)
    if options.side == "floor":
        leave_out_normalisations(ours)
    return choose_execution(train, device, num_steps=0).compiled(ours), build_optimizer(ours, train)


class NoNormalisation(nn.Module):
    """In the place of an LRN: sum and ReLU alone."""

    def rectified(self, z: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        return z.relu() if plus is None else (z + plus).relu_()


def leave_out_normalisations(model: Any) -> None:
    model.first_norm = NoNormalisation()
    for layer in model.recurrent_layers:
        layer.norm = NoNormalisation()


@torch.inference_mode()
def peak_flops(options: argparse.Namespace) -> float:
    """The best of thirty large matrix products of each of two libraries, FLOP/s, in the type that ours computes in.

    One is the library behind `@`, the other the one behind convolutions: a 1x1 convolution is a matrix product too.
    """
    side = MATRIX_SIDE[options.device]
    left = torch.randn(side, side, device=options.device, dtype=getattr(torch, options.precision))
    images, kernels = left.reshape(1, side, 1, side).permute(0, 3, 1, 2), left[:, :, None, None]
    best = 0.0
    for _ in range(30):
        for product in (lambda: left @ left, lambda: functional.conv2d(images, kernels)):
            started = time.perf_counter()
            float(product().flatten()[0])
            best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def print_rows(num_maps: int, num_steps: int, results: Sequence[dict[str, Any]]) -> None:
    """The table of one network."""
    rows = [result for result in results if (result["num_maps"], result["num_steps"]) == (num_maps, num_steps)]
    print_table(
        f"K = {num_maps}, T = {num_steps}: {rows[0]['gflop_per_image']:.3f} GFLOP an image",
        [
            {
                "side": row["side"],
                "images/s (low to high)": f"{row['images_per_second']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})",
                "to plain": f"{row['ratio_to_plain']:.2f}",
                "to floor": f"{row['ratio_to_floor']:.2f}",
                "utilisation": f"{100 * row['utilisation']:.0f} %",
                "peak MB/image": f"{row['peak_bytes_per_image'] / 1e6:.1f}",
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
    """Time per image against T, and what the arithmetic alone would take at the speed of the largest T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_maps = sorted({result["num_maps"] for result in results})
    figure, axes = pyplot.subplots(1, len(all_maps), figsize=(4.5 * len(all_maps), 3.6), squeeze=False)
    for axis, num_maps in zip(axes[0], all_maps, strict=True):
        for name in ("plain", "ours", "floor"):
            rows = [row for row in results if row["num_maps"] == num_maps and row["side"] == name]
            steps = [row["num_steps"] for row in rows]
            axis.plot(steps, [1e3 / row["images_per_second"] for row in rows], marker="o", label=name)
        last = rows[-1]
        scale = 1e3 / last["images_per_second"] / last["gflop_per_image"]
        axis.plot(steps, [row["gflop_per_image"] * scale for row in rows], "k:", label="arithmetic")
        axis.set(title=f"K = {num_maps}", xlabel="T", ylabel="ms an image", ylim=(0, None))
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
