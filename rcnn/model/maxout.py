"""Maxout networks (Goodfellow et al., ICML 2013): a unit is the maximum of several linear units, its pieces.

The layouts follow the authors' configurations, `scripts/papers/maxout/{cifar10,mnist}.yaml` in pylearn2:

    | layer | CIFAR                                    | MNIST                                   |
    | 1     | 96 x 2 pieces, 8x8 pad 4, pool 4 stride 2  | 48 x 2 pieces, 8x8, pool 4 stride 2       |
    | 2     | 192 x 2 pieces, 8x8 pad 3, pool 4 stride 2 | 48 x 2 pieces, 8x8 pad 3, pool 4 stride 2 |
    | 3     | 192 x 2 pieces, 5x5 pad 3, pool 2 stride 2 | 24 x 4 pieces, 5x5 pad 3, pool 2 stride 2 |
    | 4     | 500 x 5 pieces, dense                    | none                                    |
    | 5     | linear                                   | linear                                  |

Dropout is 0.2 on the image and 0.5 on the input of every other layer, the linear layer included. With ten classes:
16,247,830 parameters at 32x32x3, 12 M of them in the dense layer (published: above 5 M); 418,714 at 28x28x1.

Differences from the published networks:
- The bound on the norm of each kernel (0.9 to 1.94), part of the published update step, is not applied, so expect a larger
  error than published. Only weight decay limits large kernels.
- Weights are drawn from a normal distribution with standard deviation 0.3/sqrt(inputs). The published uniform +-0.005 belongs
  to whitened images of a larger scale and to the published learning rates. With 1/sqrt(inputs), each maximum over pieces and
  pool multiplies the scale: the loss started at 9, and on 1,500 digits the error was at chance after 6 epochs. With 0.3 it was
  20 % after 4 (one seed, learning rate 0.03).
- There is one bias per map. The MNIST configuration uses pylearn2's default, one per map and position.
- Dropout scales the kept values by 1/(1 - rate); the published dropout does not scale the image's pixels.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rcnn.model.dropout import Dropout


@dataclass(frozen=True)
class MaxoutConvolution:
    """A convolution to `maps` x `pieces` maps, the maximum over the pieces, then a max pool of `pool`, stride 2."""

    maps: int
    pieces: int
    kernel: int
    padding: int
    pool: int

    def side_after(self, side: int) -> int:
        """The output side for an input side; 0 or less if nothing is left. Pooling windows can extend past the border."""
        convolved = side + 2 * self.padding - self.kernel + 1
        return math.ceil((convolved - self.pool) / 2) + 1 if convolved > 0 else 0


CIFAR = (
    MaxoutConvolution(96, 2, 8, 4, 4),
    MaxoutConvolution(192, 2, 8, 3, 4),
    MaxoutConvolution(192, 2, 5, 3, 2),
)
MNIST = (MaxoutConvolution(48, 2, 8, 0, 4), MaxoutConvolution(48, 2, 8, 3, 4), MaxoutConvolution(24, 4, 5, 3, 2))
DENSE_UNITS, DENSE_PIECES = 500, 5
WEIGHT_SCALE = 0.3


class LargestPiece(nn.Module):
    """(N, units * pieces, ...) -> (N, units, ...): the maximum over each unit's consecutive pieces."""

    def __init__(self, pieces: int):
        super().__init__()
        self.pieces = pieces

    def forward(self, z: Tensor) -> Tensor:
        """The maximum over the pieces."""
        return z.unflatten(1, (-1, self.pieces)).amax(2)


class Maxout(nn.Module):
    """Maxout convolutions, an optional dense maxout layer, and a linear layer.

    Args:
        convolutions: the layout, e.g. `CIFAR`.
        dense_units: units of the dense maxout layer; 0: no such layer.
        image_shape: (H, W, C); it determines the input width of the dense or linear layer.
        num_classes: logits per image.

    Raises:
        ValueError: the images are too small.
    """

    def __init__(
        self,
        convolutions: tuple[MaxoutConvolution, ...],
        dense_units: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ):
        super().__init__()
        height, width, in_maps = image_shape
        layers: list[nn.Module] = []
        for number, layer in enumerate(convolutions):
            layers += [
                Dropout(0.5 if number else 0.2),
                _initialised(nn.Conv2d(in_maps, layer.maps * layer.pieces, layer.kernel, padding=layer.padding)),
                LargestPiece(layer.pieces),
                nn.MaxPool2d(layer.pool, stride=2, ceil_mode=True),
            ]
            height, width, in_maps = layer.side_after(height), layer.side_after(width), layer.maps
            if min(height, width) < 1:
                raise ValueError(
                    f"images of {image_shape[1]}x{image_shape[0]} are too small; layer {number + 1} leaves nothing"
                )
        layers.append(nn.Flatten())
        width = height * width * in_maps
        if dense_units:
            dense = _initialised(nn.Linear(width, dense_units * DENSE_PIECES))
            layers += [Dropout(0.5), dense, LargestPiece(DENSE_PIECES)]
            width = dense_units
        self.layers = nn.Sequential(*layers, Dropout(0.5), _initialised(nn.Linear(width, num_classes)))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.layers(images_NCHW)


def _initialised(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    with torch.no_grad():
        layer.weight.mul_(WEIGHT_SCALE)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def build(image_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0) -> nn.Module:
    """The CIFAR layout for colour images, the MNIST layout for greyscale images; `width` multiplies its maps and units.

    Raises:
        ValueError: the images are too small.
    """

    def scaled(number: int) -> int:
        return max(1, round(number * width))

    layout, dense_units = (MNIST, 0) if image_shape[2] == 1 else (CIFAR, scaled(DENSE_UNITS))
    convolutions = tuple(replace(layer, maps=scaled(layer.maps)) for layer in layout)
    return Maxout(convolutions, dense_units, image_shape, num_classes)
