"""The RCNN as a reader of the paper would write it: plain PyTorch, eager, `torch.nn.functional.local_response_norm`.

The baseline of `step.py`. It shares no line with the package, and has the same parameters.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class PlainRecurrentLayer(nn.Module):
    """x(0) = g(relu(w_f * u + b)), then x(t) = g(relu(w_f * u + w_r * x(t-1) + b))."""

    def __init__(self, num_maps: int, num_steps: int):
        super().__init__()
        self.num_steps, self.window = num_steps, num_maps // 8 + 1
        self.feed_forward = nn.Conv2d(num_maps, num_maps, 3, padding=1)
        self.recurrent = nn.Conv2d(num_maps, num_maps, 3, padding=1, bias=False) if num_steps else None

    def forward(self, u: Tensor) -> Tensor:
        fed = self.feed_forward(u)
        x = self.normalise(functional.relu(fed))
        for _ in range(self.num_steps):
            assert self.recurrent is not None
            x = self.normalise(functional.relu(fed + self.recurrent(x)))
        return x

    def normalise(self, x: Tensor) -> Tensor:
        return functional.local_response_norm(x, self.window, alpha=0.001, beta=0.75, k=1.0)


class PlainRCNN(nn.Module):
    """5x5 convolution, pool, two recurrent layers, pool, two recurrent layers, global max pool, linear."""

    def __init__(self, num_maps: int, num_steps: int, in_channels: int, num_classes: int, *, dropout: float = 0.2):
        super().__init__()
        self.first = nn.Conv2d(in_channels, num_maps, 5, padding=2)
        self.layers = nn.ModuleList([PlainRecurrentLayer(num_maps, num_steps) for _ in range(4)])
        self.dropout = dropout
        self.classifier = nn.Linear(num_maps, num_classes)
        self.window = num_maps // 8 + 1

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.first(images))
        x = functional.local_response_norm(x, self.window, alpha=0.001, beta=0.75, k=1.0)
        for number, layer in enumerate(self.layers):
            if number in (0, 2):
                x = functional.max_pool2d(x, 3, stride=2, padding=1)
            x = layer(x)
            if number < 3:
                x = functional.dropout(x, self.dropout, self.training)
        return self.classifier(torch.amax(x, dim=(2, 3)))
