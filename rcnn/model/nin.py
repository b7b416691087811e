"""Network in Network (Lin, Chen and Yan, ICLR 2014): three blocks of a convolution and two 1x1 convolutions, then global
average pooling, whose output is the logits.

The layouts follow the authors' definition files, `NIN/*_def` in github.com/mavenlin/cuda-convnet:

    block: convolution, 1x1, 1x1, each with a ReLU; after the first and the second block, max pool 3, stride 2, dropout 0.5

    | layout | block 1        | block 2         | block 3          | parameters, ten classes |
    | CIFAR  | 5x5 192 160 96 | 5x5 192 192 192 | 3x3 192 192 N    | 966,986                 |
    | SVHN   | 5x5 128 96 64  | 5x5 320 256 128 | 5x5 384 256 N    | 1,986,026               |
    | MNIST  | 5x5 96 64 48   | 5x5 128 96 48   | 5x5 128 96 N     | 349,674                 |

They match the published 0.97 and 1.98 M (1,984,384 without biases). The last ReLU is in the authors' files too: logits are
never negative. Their Caffe model uses an average in the second pool, where these files use the maximum. Pooling windows are
clipped at the border, as in cuda-convnet.

Difference from the published network: weights are initialised by He's rule, because the published standard deviation (0.05
throughout) belongs to contrast-normalised and whitened images. With the last ReLU, training starts slowly: on 1,500 digits,
six epochs of the MNIST layout reached 67 % error at a peak learning rate of 0.01. At 0.03 the error stayed at chance, with the
published deviation too (4 to 5 epochs, one seed each).
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from rcnn.model.dropout import Dropout

Block = tuple[int, tuple[int, ...]]
"""Side of the first kernel, and the maps of the three convolutions; in the last block, the third has one map per class."""

CIFAR: tuple[Block, ...] = ((5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192)))
SVHN: tuple[Block, ...] = ((5, (128, 96, 64)), (5, (320, 256, 128)), (5, (384, 256)))
MNIST: tuple[Block, ...] = ((5, (96, 64, 48)), (5, (128, 96, 48)), (5, (128, 96)))
SMALLEST_SIDE = 4
"""In pixels: a smaller image leaves nothing for the second pool."""


class NIN(nn.Module):
    """Three blocks and global average pooling.

    Args:
        blocks: the layout, e.g. `CIFAR`.
        in_channels: C, channels of an image.
        num_classes: maps of the last convolution, and so logits per image.
    """

    def __init__(self, blocks: tuple[Block, ...], in_channels: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        in_maps = in_channels
        for number, (kernel, maps) in enumerate(blocks):
            is_last = number == len(blocks) - 1
            widths = (in_maps, *maps, num_classes) if is_last else (in_maps, *maps)
            layers += _block(kernel, widths)
            if not is_last:
                layers += [nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True), Dropout(0.5)]
            in_maps = widths[-1]
        self.layers = nn.Sequential(*layers)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        x_NCHW = self.layers(images_NCHW)
        return functional.avg_pool2d(x_NCHW, x_NCHW.shape[2:]).flatten(1)


def _block(kernel: int, widths: tuple[int, ...]) -> list[nn.Module]:
    """A convolution that keeps the image size, then 1x1 convolutions, each with a ReLU."""
    layers: list[nn.Module] = []
    for in_maps, out_maps in pairwise(widths):
        convolution = nn.Conv2d(in_maps, out_maps, kernel_size=kernel, padding=kernel // 2)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        layers += [convolution, nn.ReLU(inplace=True)]
        kernel = 1
    return layers


def build(image_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0) -> nn.Module:
    """The CIFAR layout for colour images, the MNIST layout for greyscale images; `width` multiplies its maps.

    Raises:
        ValueError: the images are smaller than 4x4.
    """
    return _built(MNIST if image_shape[2] == 1 else CIFAR, image_shape, num_classes, width)


def build_svhn(image_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0) -> nn.Module:
    """The SVHN layout; `width` multiplies its maps.

    Raises:
        ValueError: the images are smaller than 4x4.
    """
    return _built(SVHN, image_shape, num_classes, width)


def _built(blocks: tuple[Block, ...], image_shape: tuple[int, int, int], num_classes: int, width_factor: float) -> NIN:
    height, width, channels = image_shape
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"images of {width}x{height} are too small; they must be {SMALLEST_SIDE}x{SMALLEST_SIDE} or larger"
        )
    scaled = tuple((kernel, tuple(max(1, round(each * width_factor)) for each in maps)) for kernel, maps in blocks)
    return NIN(scaled, channels, num_classes)
