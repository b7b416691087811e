"""Networks over their steps, against networks that are built with fewer steps, torch's own operations, and hand sums."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rcnn.evaluate.unrolled import (
    first_filters,
    num_steps_of,
    receptive_fields,
    recurrent_layers,
    shortened,
    unroll,
)
from rcnn.model.build import build_network
from rcnn.model.classifier import Classifier, MeanRemoval

T = 3


def classifier(
    network: str, *, t: int = T, side: int = 28, channels: int = 1, crop: int = 0, k: int = 16
) -> Classifier:
    """A new one for uint8 images."""
    torch.manual_seed(0)
    shape = (side, side, channels)
    seen = (crop, crop, channels) if crop else shape
    normalise = MeanRemoval([100.0] * (side * side * channels), [50.0] * channels, shape)
    settings = {"k": k, "t": t, "dropout": 0.2, "lrn_alpha": 0.5, "lrn_beta": 0.75}
    return Classifier(normalise, build_network(network, seen, 10, settings), crop=crop).eval()


def images(num: int, *, side: int = 28, channels: int = 1) -> Tensor:
    """Random pixels."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, channels, side, side), dtype=np.uint8))


@pytest.mark.parametrize("network", ["rcnn", "recursive", "rcnn_bn"])
@pytest.mark.parametrize("num_steps", range(T + 1))
def test_a_shortened_network_is_one_built_with_fewer_steps(network: str, num_steps: int) -> None:
    model, built = classifier(network), classifier(network, t=num_steps)
    weights = {name: value for name, value in model.state_dict().items() if name in built.state_dict()}
    built.load_state_dict(weights)
    with torch.inference_mode():
        found, truth = shortened(model, num_steps)(images(4)), built(images(4))
        torch.testing.assert_close(found, truth, rtol=0, atol=0)
        if num_steps < T:
            assert not torch.allclose(found, model(images(4)))


def test_with_no_steps_it_is_the_feed_forward_network() -> None:
    model, wide = classifier("rcnn"), classifier("wide")
    wide.load_state_dict({name: value for name, value in model.state_dict().items() if name in wide.state_dict()})
    with torch.inference_mode():
        torch.testing.assert_close(shortened(model, 0)(images(4)), wide(images(4)), rtol=0, atol=0)


def test_the_model_itself_is_not_changed() -> None:
    model = classifier("rcnn")
    with torch.inference_mode():
        before = model(images(2))
    unroll(model, images(2))
    receptive_fields(model, images(2), 1)
    with torch.inference_mode():
        torch.testing.assert_close(model(images(2)), before, rtol=0, atol=0)
    assert [layer.num_steps for layer in recurrent_layers(model)] == [T] * 4
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("network", ["rcnn", "recursive", "rcnn_bn"])
def test_the_last_step_is_the_models_own_output(network: str) -> None:
    model = classifier(network)
    own: list[Tensor] = []
    for layer in recurrent_layers(model):
        layer.register_forward_hook(lambda _, __, output: own.append(output))
    with torch.inference_mode():
        probabilities = model(images(3)).softmax(1)
    own_states = [*own]
    found = unroll(classifier(network), images(3))
    torch.testing.assert_close(found.probabilities[-1], probabilities, rtol=0, atol=0)
    assert found.probabilities.shape == (T + 1, 3, 10)
    for states, state in zip(found.states, own_states, strict=True):
        assert len(states) == T + 1
        torch.testing.assert_close(states[-1], state, rtol=0, atol=0)


def test_the_states_of_the_first_layer_follow_the_papers_equation() -> None:
    model = classifier("rcnn").double()
    layer, pixels = recurrent_layers(model)[0], images(2)
    inputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    with torch.inference_mode():
        model(pixels)
        handle.remove()
        found = unroll(model, pixels).states[0]
        assert layer.recurrent is not None
        z0 = functional.conv2d(inputs[0], layer.feed_forward.weight, layer.feed_forward.bias, padding=1)
        x = functional.local_response_norm(z0.relu(), size=3, alpha=0.5, beta=0.75, k=1.0)
        for step in range(T + 1):
            torch.testing.assert_close(found[step].double(), x, rtol=1e-5, atol=1e-5)
            z = z0 + functional.conv2d(x, layer.recurrent.weight, padding=1)
            x = functional.local_response_norm(z.relu(), size=3, alpha=0.5, beta=0.75, k=1.0)


@pytest.mark.parametrize("network", ["wide", "nin", "maxout"])
def test_other_networks_have_filters_and_no_steps(network: str) -> None:
    model = classifier(network, side=32, channels=3)
    assert recurrent_layers(model) == []
    assert num_steps_of(model) == 0
    filters = first_filters(model)
    assert filters is not None
    assert filters.shape[1] == 3


def test_the_theoretical_side_is_the_sum_over_convolutions_and_pools() -> None:
    # 5x5: 5; pool: 5 + 2 = 7, and from there a step of 2 pixels; each of the t + 1 convolutions of a layer adds 2 * 2 pixels;
    # the second pool adds 2 * 2; from there a step of 4, so that each convolution adds 2 * 4.
    for t in range(T + 1):
        sides = [field.theoretical_side for field in receptive_fields(classifier("rcnn"), images(1), t)]
        assert sides == [7 + 4 * (t + 1), 7 + 8 * (t + 1), 11 + 16 * (t + 1), 11 + 24 * (t + 1)]


@pytest.mark.parametrize("t", [0, 1, 2])
def test_the_gradient_fills_the_theoretical_square_and_nothing_else(t: int) -> None:
    model = classifier("rcnn", side=96, k=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # no ReLU is closed, and no path cancels another one
    fields = receptive_fields(model, images(16, side=96), t)
    for field in fields[:3]:
        top, left, bottom, right = (round(edge) for edge in field.box)
        inside = field.gradient[max(top, 0) : bottom, max(left, 0) : right]
        assert field.support_side == field.theoretical_side == bottom - top
        assert (inside > 0).float().mean() > 0.9
        assert float(inside.sum()) == pytest.approx(float(field.gradient.sum()), rel=1e-9)
        assert 0 < field.central_side <= field.theoretical_side


def test_the_square_of_95_per_cent_is_that_of_a_count_by_hand() -> None:
    model = classifier("rcnn")
    for field in receptive_fields(model, images(8), 1):
        gradient, (top, left, bottom, right) = field.gradient.numpy(), field.box
        row, column = (top + bottom - 1) / 2, (left + right - 1) / 2
        rows, columns = np.mgrid[:28, :28]
        distance = np.maximum(abs(rows - row), abs(columns - column))

        def share(side: int, distance: np.ndarray = distance, gradient: np.ndarray = gradient) -> float:
            return float(gradient[distance <= (side - 1) / 2].sum() / gradient.sum())

        assert share(field.central_side) >= 0.95 - 1e-9
        assert share(field.central_side - 2) < 0.95


def test_a_network_of_crops_sees_its_window_of_the_image() -> None:
    model = classifier("rcnn", side=28, crop=20)
    for field in receptive_fields(model, images(8), 0):
        assert field.gradient.shape == (28, 28)
        assert float(field.gradient[4:24, 4:24].sum()) == pytest.approx(float(field.gradient.sum()))
        row, column = (field.box[0] + field.box[2] - 1) / 2, (field.box[1] + field.box[3] - 1) / 2
        assert 11 <= row <= 16
        assert row == column
