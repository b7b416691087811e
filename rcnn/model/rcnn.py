"""The network of Liang and Hu (CVPR 2015), figure 3: images (N, C, H, W) in, logits (N, classes) out.

5x5 convolution -> 3/2 max pool -> RCL -> RCL -> 3/2 max pool -> RCL -> RCL -> global max pool -> linear.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from rcnn.model.layers import Convolution, RecurrentConvLayer
from rcnn.model.norms import Norms, local_response_norms


class RCNN(nn.Module):
    """Recurrent convolutional network with K maps in every hidden layer and T recurrent steps in each of four RCLs.

    Args:
        num_maps: K.
        num_steps: T; 0 gives the paper's WCNN, the wide network without recurrence.
        in_channels: C, channels of an image.
        num_classes: logits per image.
        dropout: rate after each RCL except the last. The paper does not state it; re-implementations use 0.2 to 0.5.
        norms: the normalisation, by default the paper's LRN with its constants; see `norms.py`.
        layer: the class of the four recurrent layers.
        convolution, recompute: see `RecurrentConvLayer`.

    Input (N, C, H, W) with H, W >= 1; output (N, num_classes), before the softmax.
    """

    def __init__(
        self,
        num_maps: int,
        num_steps: int,
        in_channels: int,
        num_classes: int,
        *,
        dropout: float = 0.2,
        norms: Norms = local_response_norms,
        layer: type[RecurrentConvLayer] = RecurrentConvLayer,
        convolution: Convolution = "auto",
        recompute: bool = False,
    ):
        super().__init__()
        self.first = nn.Conv2d(in_channels, num_maps, kernel_size=5, padding=2)
        # One source also normalises after the first layer; no source contradicts it.
        [self.first_norm] = norms(num_maps, 1)
        # Padding 1 gives 32 -> 16 -> 8. The paper does not state it; re-implementations use it.
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        how: dict[str, Any] = {"norms": norms, "convolution": convolution, "recompute": recompute}
        self.recurrent_layers = nn.ModuleList(
            [layer(num_maps, num_maps, num_steps, dropout=rate, **how) for rate in (dropout, dropout, dropout, 0.0)]
        )
        self.classifier = nn.Linear(num_maps, num_classes)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        nn.init.zeros_(self.first.bias)  # type: ignore[arg-type]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        one, two, three, four = self.recurrent_layers
        x_NKHW = self.pool(self.first_norm.rectified(self.first(images_NCHW)))
        x_NKHW = four(three(self.pool(two(one(x_NKHW)))))
        return self.classifier(x_NKHW.amax(dim=(2, 3)))


def build(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    k: int,
    t: int,
    dropout: float,
    lrn_alpha: float,
    lrn_beta: float,
    convolution: Convolution = "auto",
    recompute: bool = False,
    layer: type[RecurrentConvLayer] = RecurrentConvLayer,
) -> nn.Module:
    """RCNN-K with T recurrent steps and LRN, as published; RCNN-96 has 0.67 M parameters on CIFAR-10."""
    norms = partial(local_response_norms, alpha=lrn_alpha, beta=lrn_beta)
    channels = image_shape[2]
    how: dict[str, Any] = {"norms": norms, "layer": layer, "convolution": convolution, "recompute": recompute}
    return RCNN(k, t, channels, num_classes, dropout=dropout, **how)
