"""The recurrent layer against an independent truth: loops over units, from the paper's equations, in float64 numpy."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from rcnn.model import RecurrentConvLayer
from rcnn.model.layers import Convolution, set_active_steps
from rcnn.model.norms import local_response_norms

ALPHA, BETA = 0.4, 0.75  # a larger alpha than the paper's, so that a fault in the normalisation shows


def convolution(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """3x3, zero padded: x (C, H, W), kernel (K, C, 3, 3) -> (K, H, W), unit by unit."""
    _, height, width = x.shape
    out = np.zeros((len(kernel), height, width))
    for k, i, j in np.ndindex(out.shape):
        for c, di, dj in np.ndindex(kernel.shape[1:]):
            row, column = i + di - 1, j + dj - 1
            if 0 <= row < height and 0 <= column < width:
                out[k, i, j] += kernel[k, c, di, dj] * x[c, row, column]
    return out


def normalisation(f: np.ndarray) -> np.ndarray:
    """The paper's g with N = K / 8 + 1, unit by unit."""
    num_maps = len(f)
    window = num_maps // 8 + 1
    out = np.empty_like(f)
    for k in range(num_maps):
        neighbours = range(max(0, k - window // 2), min(num_maps, k - window // 2 + window))
        total = sum(f[other] ** 2 for other in neighbours)
        out[k] = f[k] / (1 + ALPHA / window * total) ** BETA
    return out


def unrolled(u: np.ndarray, feed: list[np.ndarray], rec: list[np.ndarray], bias: list[np.ndarray]) -> np.ndarray:
    """z(t) = w_f * u + w_r * x(t-1) + b; x(t) = g(relu(z(t))), with a copy of each parameter per time step."""
    x = np.zeros(0)
    for t in range(len(feed)):
        z = convolution(u, feed[t]) + bias[t][:, None, None]
        if t > 0:
            z = z + convolution(x, rec[t - 1])
        x = normalisation(np.maximum(z, 0))
    return x


@pytest.fixture
def layer() -> RecurrentConvLayer:
    torch.manual_seed(3)
    layer = RecurrentConvLayer(2, 9, 3, norms=partial(local_response_norms, alpha=ALPHA, beta=BETA)).double()
    torch.nn.init.normal_(layer.feed_forward.bias, std=0.3)
    layer.recurrent.weight.data.mul_(3)
    return layer


def parameters_of(layer: RecurrentConvLayer) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in layer.named_parameters()}


def test_forward_is_the_papers_equations(layer: RecurrentConvLayer) -> None:
    u = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    named = parameters_of(layer)
    steps = layer.num_steps
    for image, ours in zip(u.numpy(), layer(u).detach().numpy(), strict=True):
        truth = unrolled(
            image,
            [named["feed_forward.weight"]] * (steps + 1),
            [named["recurrent.weight"]] * steps,
            [named["feed_forward.bias"]] * (steps + 1),
        )
        np.testing.assert_allclose(ours, truth, rtol=1e-12)


def test_a_shared_weights_gradient_is_the_sum_over_its_time_steps(layer: RecurrentConvLayer) -> None:
    u = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    weight_of_unit = torch.randn(9, 4, 3, dtype=torch.float64)
    (layer(u)[0] * weight_of_unit).sum().backward()
    named, steps = parameters_of(layer), layer.num_steps
    kinds = {"feed_forward.weight": steps + 1, "recurrent.weight": steps, "feed_forward.bias": steps + 1}
    rng = np.random.default_rng(0)
    for name, copies in kinds.items():
        gradient = layer.get_parameter(name).grad.numpy()
        for _ in range(4):
            place = tuple(int(rng.integers(size)) for size in gradient.shape)
            of_steps = [
                central_difference(named, kinds, name, step, place, u[0].numpy(), weight_of_unit.numpy())
                for step in range(copies)
            ]
            assert gradient[place] == pytest.approx(sum(of_steps), rel=1e-6, abs=1e-9)


def central_difference(
    named: dict[str, np.ndarray],
    kinds: dict[str, int],
    name: str,
    step: int,
    place: tuple[int, ...],
    u: np.ndarray,
    weight_of_unit: np.ndarray,
) -> float:
    """The slope of the loss when one number of one step's own copy moves."""
    values = []
    for delta in (1e-5, -1e-5):
        copies = {kind: [named[kind].copy() for _ in range(count)] for kind, count in kinds.items()}
        copies[name][step][place] += delta
        out = unrolled(u, copies["feed_forward.weight"], copies["recurrent.weight"], copies["feed_forward.bias"])
        values.append(float((out * weight_of_unit).sum()))
    return (values[0] - values[1]) / 2e-5


def test_without_recurrent_steps_it_is_convolution_relu_and_lrn() -> None:
    layer = RecurrentConvLayer(3, 16, 0)
    u = torch.randn(2, 3, 5, 5)
    plain = functional.conv2d(u, layer.feed_forward.weight, layer.feed_forward.bias, padding=1).relu()
    torch.testing.assert_close(layer(u), functional.local_response_norm(plain, 3, alpha=0.001, beta=0.75, k=1.0))
    assert [name for name, _ in layer.named_parameters()] == ["feed_forward.weight", "feed_forward.bias"]


@pytest.mark.parametrize("convolution", ["direct", "winograd"])
def test_with_fewer_active_steps_it_is_a_layer_built_with_fewer(convolution: Convolution) -> None:
    torch.manual_seed(0)
    layer = RecurrentConvLayer(8, 8, 2, convolution=convolution)
    u = torch.randn(2, 8, 9, 9)
    for num_steps in (1, 0):
        shorter = RecurrentConvLayer(8, 8, num_steps, convolution=convolution)
        shorter.load_state_dict({name: layer.state_dict()[name] for name in shorter.state_dict()})
        set_active_steps(layer, num_steps)
        for each in (layer, shorter):
            each.zero_grad()
            each(u).square().sum().backward()
        torch.testing.assert_close(layer(u), shorter(u), rtol=0, atol=0)
        ours = {name: parameter.grad for name, parameter in layer.named_parameters()}
        for name, parameter in shorter.named_parameters():
            torch.testing.assert_close(ours.pop(name), parameter.grad, rtol=0, atol=0)
        for gradient in ours.values():  # the recurrent kernel, where it is not used
            assert gradient is not None
            assert not gradient.any()
