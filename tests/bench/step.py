"""How fast a training step is: ours, the plain network of `plain.py`, and the floor that the convolutions set.

    python -m tests.bench.step [--num-maps 96] [--num-steps 3] [--json FILE] [--plot FILE]

Each side lives in a process of its own, so that none warms up, or uses up, memory for another; they take turns, one step at
a time, and medians are compared. A step is forward, backward and update of SGD with momentum, on random 32x32 colour images:

    plain     eager, float32, contiguous, as anybody would write it
    floor     ours with the normalisations left out: convolutions, ReLU, pools and the rest
    ours      the step that `fit` runs

On a GPU (`--device cuda`) there is also `plain-bf16`: plain under bfloat16 autocast, channels last.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.nn import functional

from tests.bench.common import arguments, machine, print_table, write_json

IMAGE_SIDE, IN_CHANNELS, NUM_CLASSES = 32, 3, 10
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
SECONDS_TO_START = 300


def main() -> None:
    options = _parser().parse_args()
    if options.side:
        serve(options)
        return
    print(machine())
    peak = peak_flops(options)
    print(f"peak of a matrix product: {peak / 1e9:,.0f} GFLOP/s ({options.precision})\n")
    results = []
    for num_maps, num_steps in itertools.product(options.num_maps, options.num_steps):
        results += measure(options, num_maps, num_steps, peak)
        print_rows(results[-1]["num_maps"], results[-1]["num_steps"], results)
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
    parser.add_argument("--compile", action="store_true", help="compile ours and the floor")
    parser.add_argument("--recompute", action="store_true", help="ours recomputes each step's activations backward")
    parser.add_argument("--deterministic", action="store_true", help="ours gives the same bits in each run")
    parser.add_argument("--steps-per-round", type=int, default=0, help="default: 1 on the CPU, 20 on a GPU")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw cost against T")
    parser.add_argument("--side", choices=["plain", "plain-bf16", "floor", "ours"], help=argparse.SUPPRESS)
    return parser


def measure(options: argparse.Namespace, num_maps: int, num_steps: int, peak: float) -> list[dict[str, Any]]:
    """One result for each side."""
    names = ["plain", "floor", "ours"] + (["plain-bf16"] if options.device == "cuda" else [])
    flops = step_flops(num_maps, num_steps)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(side(options, name, num_maps, num_steps)) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, process in sides.items():
                seconds[name].append(ask(process, "step")["seconds"])
        peaks = {name: ask(process, "memory")["bytes"] for name, process in sides.items()}
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
            "peak_bytes_per_image": peaks[name] / options.batch_size,
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
    flags = [f"--{flag}" for flag in ("compile", "recompute", "deterministic") if getattr(options, flag)]
    command = [sys.executable, "-m", "tests.bench.step", "--side", name, *flags]
    for setting in ("device", "precision", "batch_size", "steps_per_round"):
        command += [f"--{setting.replace('_', '-')}", str(getattr(options, setting))]
    command += ["--num-maps", str(num_maps), "--num-steps", str(num_steps)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ask(process, "step")
        yield process
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def ask(process: "subprocess.Popen[str]", what: str) -> dict[str, float]:
    """Sends a word, and waits for the answer."""
    asked, answered = _pipes(process)
    asked.write(f"{what}\n")
    asked.flush()
    line = answered.readline()
    if not line:
        sys.exit(f"a side ended early: {' '.join(process.args)}")  # type: ignore[arg-type]
    return json.loads(line)  # type: ignore[no-any-return]


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None, "opened with a pipe"
    assert process.stdout is not None, "opened with a pipe"
    return process.stdin, process.stdout


def serve(options: argparse.Namespace) -> None:
    """What a side's process does: makes the model, then answers."""
    device = torch.device(options.device)
    before = _memory(device)
    make_steps = trainer(options, device)
    make_steps()
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps({"bytes": _memory(device) - before}), flush=True)
            continue
        started = time.perf_counter()
        num_steps = make_steps()
        print(json.dumps({"seconds": (time.perf_counter() - started) / num_steps}), flush=True)


def trainer(options: argparse.Namespace, device: torch.device) -> Any:
    """A function that makes a round's steps and returns their number."""
    from rcnn.train.step import prepare

    torch.manual_seed(0)
    num_maps, num_steps = options.num_maps[0], options.num_steps[0]
    images = torch.randn(options.batch_size, IN_CHANNELS, IMAGE_SIDE, IMAGE_SIDE, device=device)
    labels = torch.randint(NUM_CLASSES, (options.batch_size,), device=device)
    steps_per_round = options.steps_per_round or (20 if options.device == "cuda" else 1)
    model, autocast = build(options, num_maps, num_steps, device)
    if options.side in ("ours", "floor"):
        prepare(device, deterministic=options.deterministic)
    if options.side != "plain":
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=device.type == "cuda")

    def make_steps() -> int:
        for _ in range(steps_per_round):
            with autocast():
                loss = functional.cross_entropy(model(images).float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        float(loss.detach())  # waits for the device
        return steps_per_round

    return make_steps


def build(options: argparse.Namespace, num_maps: int, num_steps: int, device: torch.device) -> Any:
    """The model of a side, and the context of its forward pass."""
    from rcnn.model import RCNN
    from tests.bench.plain import PlainRCNN

    def bfloat16() -> Any:
        return torch.autocast(device.type, torch.bfloat16)

    if options.side.startswith("plain"):
        model: nn.Module = PlainRCNN(num_maps, num_steps, IN_CHANNELS, NUM_CLASSES).to(device)
        if options.side == "plain":
            return model, nullcontext
        return model.to(memory_format=torch.channels_last), bfloat16
    ours = RCNN(num_maps, num_steps, IN_CHANNELS, NUM_CLASSES, recompute=options.recompute)
    ours.to(device, memory_format=torch.channels_last)
    if options.side == "floor":
        leave_out_normalisations(ours)
    if options.compile:
        ours.compile()
    return ours, bfloat16 if options.precision == "bfloat16" else nullcontext


class NoNormalisation(nn.Module):
    """In the place of an LRN: sum and ReLU alone."""

    def rectified(self, z: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        return z.relu() if plus is None else (z + plus).relu_()


def leave_out_normalisations(model: Any) -> None:
    model.first_norm = NoNormalisation()
    for layer in model.recurrent_layers:
        layer.norm = NoNormalisation()


def peak_flops(options: argparse.Namespace) -> float:
    """The best of thirty large matrix products, FLOP/s, in the type that ours computes in."""
    device = torch.device(options.device)
    side = MATRIX_SIDE[options.device]
    left = torch.randn(side, side, device=device, dtype=getattr(torch, options.precision))
    best = 0.0
    for _ in range(30):
        started = time.perf_counter()
        float((left @ left)[0, 0])
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def _memory(device: torch.device) -> int:
    """The most memory so far: the process's on the CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Seconds per image against T, and what the arithmetic alone would take at the speed of the largest T."""
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
