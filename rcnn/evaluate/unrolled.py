"""A recurrent network over its time steps: the same weights with fewer steps, the states of its layers, what they see.

In: a `Classifier` with recurrent layers. Out: classifiers with t = 0..T steps, and from them states, and receptive fields by
gradients. Every figure comes from the model's own forward pass: a network with t steps is a copy whose layers stop earlier, and
hooks read what the layers return. "After t steps" always means that all recurrent layers have done t steps.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcnn.model.classifier import Classifier
from rcnn.model.layers import RecurrentConvLayer, set_active_steps

SHARE_OF_GRADIENT = 0.95


def recurrent_layers(model: nn.Module) -> list[RecurrentConvLayer]:
    """The recurrent convolutional layers, from the input to the output; empty for networks without recurrence."""
    return [each for each in model.modules() if isinstance(each, RecurrentConvLayer) and each.num_steps]


def num_steps_of(model: nn.Module) -> int:
    """T, the steps of the layer that has most; 0 without recurrence."""
    return max((layer.num_steps for layer in recurrent_layers(model)), default=0)


def shortened(model: Classifier, num_steps: int) -> Classifier:
    """A copy with the same weights, whose recurrent layers end after `num_steps` steps; with T steps, it is the model."""
    copied = copy.deepcopy(model)
    set_active_steps(copied, num_steps)
    return copied


@contextmanager
def _states(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each of the layers returned in the last forward pass, by its number."""
    found: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, number=number: found.__setitem__(number, output))
        for number, layer in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Unrolling:
    """Some images over the time steps.

    Attributes:
        states: of each recurrent layer, (T + 1, N, K, H, W).
        probabilities: (T + 1, N, classes).
    """

    states: list[Tensor]
    probabilities: Tensor


@torch.inference_mode()
def unroll(model: Classifier, images_NCHW: Tensor) -> Unrolling:
    """States and probabilities after t = 0..T steps, on the CPU. Layers with fewer steps than others keep their last state."""
    num_layers = len(recurrent_layers(model))
    states: list[list[Tensor]] = [[] for _ in range(num_layers)]
    probabilities = []
    for num_steps in range(num_steps_of(model) + 1):
        shorter = shortened(model, num_steps)
        with _states(recurrent_layers(shorter)) as found:
            probabilities.append(shorter(images_NCHW).float().softmax(1).cpu())
        for number in range(num_layers):
            states[number].append(found[number].float().cpu())
    return Unrolling([torch.stack(each) for each in states], torch.stack(probabilities))


@dataclass(frozen=True)
class ReceptiveField:
    """What the central unit of a layer sees of the image after some steps.

    Attributes:
        layer: its number among the recurrent layers, from 1.
        num_steps: t.
        theoretical_side: of the square that the convolutions and pools up to there can see, pixels; of it, the part outside
            the image is padding.
        support_side: of the smallest square around what has any gradient, pixels.
        central_side: of the smallest square around the unit's own place that holds 95 % of the gradient, pixels.
        gradient: (H, W), the mean absolute gradient over images and channels.
        box: top, left, bottom and right of the theoretical square, pixels; bottom and right are exclusive.
    """

    layer: int
    num_steps: int
    theoretical_side: int
    support_side: int
    central_side: int
    gradient: Tensor
    box: tuple[float, float, float, float]


def receptive_fields(model: Classifier, images_NCHW: Tensor, num_steps: int) -> list[ReceptiveField]:
    """The receptive field of each recurrent layer's central unit after `num_steps` steps.

    The gradient is that of the sum over the unit's feature maps with respect to the pixels. A max pool passes it to one unit
    of each window, and a ReLU may be closed, so that one image shows less than the whole field.
    """
    shorter = _by_direct_convolution(shortened(model, num_steps)).requires_grad_(False)
    layers = recurrent_layers(shorter)
    geometry = _geometry_of(shorter, layers, images_NCHW[:1])
    pixels_NCHW = images_NCHW.float().requires_grad_()
    with _states(layers) as found, torch.enable_grad():
        shorter(pixels_NCHW)
    fields = []
    for number in range(len(layers)):
        [gradient_NCHW] = torch.autograd.grad(_central(found[number]).sum(), pixels_NCHW, retain_graph=True)
        gradient_HW = gradient_NCHW.abs().double().mean((0, 1)).cpu()
        fields.append(_field(number + 1, num_steps, geometry[number], gradient_HW))
    return fields


def _by_direct_convolution(model: Classifier) -> Classifier:
    """The model, without the compiled layer: Winograd's tiles leave rounding errors outside the receptive field, 1e-7 of its
    largest gradient, and the compiled layer calls none of the modules whose sizes are counted."""
    for layer in model.modules():
        if isinstance(layer, RecurrentConvLayer):
            layer.convolution = "direct"
    return model


def _central(state_NKHW: Tensor) -> Tensor:
    return state_NKHW[:, :, state_NKHW.shape[2] // 2, state_NKHW.shape[3] // 2]


def _field(layer: int, num_steps: int, geometry: "_Geometry", gradient_HW: Tensor) -> ReceptiveField:
    (row, column), half = geometry.centre, (geometry.side - 1) / 2
    seen = gradient_HW > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    return ReceptiveField(
        layer=layer,
        num_steps=num_steps,
        theoretical_side=geometry.side,
        support_side=max((int(each[-1] - each[0]) + 1 for each in (rows, columns) if len(each)), default=0),
        central_side=_central_side(gradient_HW, row, column),
        gradient=gradient_HW,
        box=(row - half, column - half, row + half + 1, column + half + 1),
    )


def _central_side(gradient_HW: Tensor, row: float, column: float) -> int:
    """The side of the smallest square around a place that holds `SHARE_OF_GRADIENT` of the gradient; 0 if there is none."""
    rows_H, columns_W = torch.arange(gradient_HW.shape[0]) - row, torch.arange(gradient_HW.shape[1]) - column
    distance_HW = torch.maximum(rows_H.abs()[:, None], columns_W.abs()[None, :]).flatten()
    order = distance_HW.argsort()
    summed = gradient_HW.flatten()[order].cumsum(0)
    if not summed[-1] > 0:
        return 0
    last = int((summed >= SHARE_OF_GRADIENT * summed[-1]).nonzero()[0])
    return int(2 * distance_HW[order][last]) + 1


@dataclass(frozen=True)
class _Geometry:
    """Of a layer's central unit: the side of its receptive field, and its place in the image, in pixels."""

    side: int
    centre: tuple[float, float]


def _geometry_of(model: Classifier, layers: Sequence[nn.Module], image_1CHW: Tensor) -> list[_Geometry]:
    """From the convolutions and pools that a forward pass calls, in their order.

    Each adds (kernel - 1) * jump to the side, and multiplies the jump, the distance of neighbouring units in pixels, by its
    stride.
    """
    side, jump, start = 1, 1, 0.0
    found: dict[nn.Module, _Geometry] = {}

    def widen(module: nn.Module, _: object, __: Tensor) -> None:
        nonlocal side, jump, start
        kernel, stride, padding = (_one(getattr(module, each)) for each in ("kernel_size", "stride", "padding"))
        side, start = side + (kernel - 1) * jump, start + ((kernel - 1) / 2 - padding) * jump
        jump *= stride

    def note(layer: nn.Module, _: object, state_NKHW: Tensor) -> None:
        cut = [(each - (model.crop or each)) // 2 for each in image_1CHW.shape[2:]]
        row, column = (start + jump * (each // 2) for each in state_NKHW.shape[2:])
        found[layer] = _Geometry(side, (cut[0] + row, cut[1] + column))

    sized = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.MaxPool2d)]
    handles = [each.register_forward_hook(widen) for each in sized] + [
        each.register_forward_hook(note) for each in layers
    ]
    with torch.no_grad():
        model(image_1CHW)
    for handle in handles:
        handle.remove()
    return [found[layer] for layer in layers]


def _one(size: int | tuple[int, int]) -> int:
    """The size in both directions, which are alike in all networks here."""
    return size if isinstance(size, int) else size[0]


def first_filters(model: nn.Module) -> Tensor | None:
    """The kernels (K, C, H, W) of the first convolution, on the CPU; None if there is none."""
    first = next((each for each in model.modules() if isinstance(each, nn.Conv2d)), None)
    return None if first is None else first.weight.detach().float().cpu()
