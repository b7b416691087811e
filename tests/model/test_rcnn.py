import pytest
import torch

from rcnn.model import RCNN, Classifier, MeanRemoval, count_parameters


@pytest.mark.parametrize(
    ("num_maps", "channels", "classes", "expected"),
    [
        (96, 3, 10, 672_202), (128, 3, 10, 1_191_178), (160, 3, 10, 1_857_610),
        (32, 1, 10, 75_018), (64, 1, 10, 297_482), (96, 1, 10, 667_402), (96, 3, 100, 680_932),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(num_maps: int, channels: int, classes: int, expected: int) -> None:
    assert count_parameters(RCNN(num_maps, 3, channels, classes)) == expected


def test_parameters_do_not_depend_on_the_number_of_steps() -> None:
    assert count_parameters(RCNN(16, 1, 1, 10)) == count_parameters(RCNN(16, 5, 1, 10))


def test_without_steps_it_is_the_wide_net_of_0_60_million() -> None:
    assert count_parameters(RCNN(128, 0, 3, 10)) == 601_354


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (5, 7), (1, 1)])
def test_any_image_size_gives_logits_and_gradients(num_steps: int, size: tuple[int, int]) -> None:
    model = RCNN(8, num_steps, 3, 4)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 4)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pooling_halves_32_to_16_to_8() -> None:
    model = RCNN(8, 1, 3, 10)
    sizes: list[torch.Size] = []
    model.pool.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [(16, 16), (8, 8)]


def test_dropout_stands_after_each_recurrent_layer_but_the_last() -> None:
    model = RCNN(8, 1, 1, 10, dropout=0.5)
    assert [layer.dropout.p for layer in model.recurrent_layers] == [0.5, 0.5, 0.5, 0.0]


def test_the_classifier_removes_the_mean_of_each_pixel() -> None:
    mean = torch.arange(2 * 3 * 1, dtype=torch.float32)
    normalise = MeanRemoval(mean.tolist(), [2.0], (2, 3, 1))
    images = torch.full((1, 1, 2, 3), 10, dtype=torch.uint8)
    torch.testing.assert_close(normalise(images), ((10 - mean) / 2).reshape(1, 1, 2, 3))
    network = RCNN(8, 1, 1, 10).eval()
    torch.testing.assert_close(Classifier(normalise, network)(images), network(normalise(images)))
