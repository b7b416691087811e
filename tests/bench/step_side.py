"""One side of `step.py`, in a process of its own: it builds a network when told to, and makes training steps.

A line with K, T and the side of the images on standard input makes a new network and takes its first steps; an empty line
makes a round. Each is answered by a line of JSON.
"""

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rcnn.config import PipelineConfig
from rcnn.model import RCNN, compiled
from rcnn.train.execution import choose_execution, prepare
from rcnn.train.optim import build_optimizer
from rcnn.train.step import train_step
from tests.bench.plain import PlainRCNN

IN_CHANNELS, NUM_CLASSES = 3, 10
SECONDS_PER_ROUND = 0.5
FEW_IMAGES, MORE_IMAGES = 32, 96
VARIANTS: dict[str, dict[str, Any]] = {
    "direct": {"execution.convolution": "direct"},
    "recompute": {"execution.recompute": True},
    "deterministic": {"train.deterministic": True},
    "compiled": {"execution.compile": "on"},
    "no-gcc": {},  # as where there is no C compiler
}


def main() -> None:
    """Answers line by line until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side")
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    options = parser.parse_args()
    side = Side(options)
    for line in sys.stdin:
        print(json.dumps(side.build(*map(int, line.split())) if line.strip() else side.round()), flush=True)


class Side:
    """What is asked of a side, and the network that it trains at the moment."""

    def __init__(self, options: argparse.Namespace):
        self.name, self.variant = options.side, options.side.partition("-")[2]
        self.is_plain = self.name.startswith("plain")
        self.device, self.batch_size = torch.device(options.device), options.batch_size
        self.measures_memory = options.memory
        is_narrow = self.variant == "bfloat16" or (not self.is_plain and options.precision == "bfloat16")
        self.precision = torch.bfloat16 if is_narrow else torch.float32

    def build(self, num_maps: int, num_steps: int, image_side: int) -> dict[str, float]:
        """Takes up a new network. Returns the bytes an image if memory is measured, else the seconds of the first step."""
        torch.manual_seed(0)
        self.image_side = image_side
        make = self._plain if self.is_plain else self._ours
        self.model, self.optimizer = make(num_maps, num_steps)
        if self.measures_memory:
            return {"bytes": self._bytes_per_image()}
        self.batch = self._batch(self.batch_size)
        self.steps_per_round = 1
        first_step = self.round()["seconds"]
        self.steps_per_round = math.ceil(SECONDS_PER_ROUND / self.round()["seconds"])
        return {"first_step": first_step}

    def round(self) -> dict[str, float]:
        """The seconds of one step, over a round of them."""
        started = time.perf_counter()
        for _ in range(self.steps_per_round):
            loss = train_step(self.model, self.optimizer, *self.batch, precision=self.precision)
        float(loss)  # waits for the device
        return {"seconds": (time.perf_counter() - started) / self.steps_per_round}

    def _plain(self, num_maps: int, num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = PlainRCNN(num_maps, num_steps, IN_CHANNELS, NUM_CLASSES)
        model.to(self.device, memory_format=self._memory_format)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def _ours(self, num_maps: int, num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """As `fit` would build them; "floor" has no normalisations."""
        usual = {
            "train.learning_rate": 1e-3,
            "execution.compile": "off",
            "execution.use_gpu": self.device.type == "cuda",
        }
        config = PipelineConfig().with_settings(usual | VARIANTS.get(self.variant, {}))
        how = config.execution
        if not self.measures_memory:  # where freed memory is to be given back at once
            prepare(self.device, deterministic=config.train.deterministic)
        execution = {"convolution": how.convolution, "recompute": how.recompute}
        model = RCNN(num_maps, num_steps, IN_CHANNELS, NUM_CLASSES, **execution)
        model.to(self.device, memory_format=self._memory_format)
        if self.variant == "no-gcc":
            compiled.can_compile = lambda: False
        if self.name == "floor":
            leave_out_normalisations(model)
        network = choose_execution(config, self.device, num_steps=0).compiled(model)
        return network, build_optimizer(model, config.train, fused=how.use_gpu)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.contiguous_format if self.name == "plain" else torch.channels_last

    def _batch(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(num_images, IN_CHANNELS, self.image_side, self.image_side, device=self.device)
        labels = torch.randint(NUM_CLASSES, (num_images,), device=self.device)
        return images.contiguous(memory_format=self._memory_format), labels

    def _bytes_per_image(self) -> float:
        """What each image more adds to the most memory that a step takes, from a small batch to a larger one."""
        peaks, self.steps_per_round = [], 1
        for num_images in (FEW_IMAGES, MORE_IMAGES):
            self.batch = self._batch(num_images)
            self.round()  # brings what stays: gradients, momenta, the library's own buffers
            forget_most_memory(self.device)
            self.round()
            peaks.append(most_memory(self.device))
        return (peaks[1] - peaks[0]) / (MORE_IMAGES - FEW_IMAGES)


class NoNormalisation(nn.Module):
    """In the place of an LRN: sum and ReLU alone."""

    def rectified(self, z: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """relu(z + plus)."""
        return z.relu() if plus is None else (z + plus).relu_()


def leave_out_normalisations(model: Any) -> None:
    """What remains is the floor."""
    model.first_norm = NoNormalisation()
    for layer in model.recurrent_layers:
        layer.norms = nn.ModuleList(NoNormalisation() for _ in layer.norms)


def forget_most_memory(device: torch.device) -> None:
    """Starts the count of `most_memory` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def most_memory(device: torch.device) -> int:
    """The most bytes held at a time: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
