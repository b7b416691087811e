"""The table of networks: published sizes and costs, and each forward pass against plain `torch.nn.functional`."""

import contextlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import rcnn.model
from rcnn.config import ModelConfig, PipelineConfig
from rcnn.model import build_network, cost_of, count_multiply_adds, count_parameters
from rcnn.model.networks import NETWORKS, title_of, unread_settings
from rcnn.model.recursive import RecursiveConvLayer
from rcnn.results import IngestResult

CIFAR, CROP, MNIST = (32, 32, 3), (24, 24, 3), (28, 28, 1)
STRONG_LRN = {"lrn_alpha": 0.4}  # so that a fault in the normalisation shows


def built(name: str, image_shape: tuple[int, int, int] = CIFAR, num_classes: int = 10, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return build_network(name, image_shape, num_classes, ModelConfig().model_dump() | settings)


def images_of(shape: tuple[int, int, int], num_images: int = 2, **how: object) -> Tensor:
    height, width, channels = shape
    return torch.randn(num_images, channels, height, width, **how)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "settings", "published", "exact"),
    [
        ("rcnn", CIFAR, 10, {"k": 96}, "0.67", 672_202),
        ("rcnn", CIFAR, 10, {"k": 128}, "1.19", 1_191_178),
        ("rcnn", CIFAR, 10, {"k": 160}, "1.86", 1_857_610),
        ("rcnn", CIFAR, 100, {"k": 96}, "0.68", 680_932),
        ("rcnn", MNIST, 10, {"k": 64}, "0.30", 297_482),
        ("recursive", CIFAR, 10, {"k": 96}, "0.67", 672_202),
        ("wide", CIFAR, 10, {"k": 128}, "0.60", 601_354),
        ("nin", CIFAR, 10, {}, "0.97", 966_986),
        ("rcnn", CIFAR, 10, {"k": 32}, "0.08", 76_618),
        ("nin", CIFAR, 10, {"width": 0.275}, "0.08", 76_537),
        ("maxout", CIFAR, 10, {"width": 0.07}, "0.08", 80_262),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, shape: tuple[int, int, int], classes: int, settings: dict[str, int], published: str, exact: int
) -> None:
    found = cost_of(name, shape, classes, ModelConfig().model_dump() | settings).parameters
    assert found == exact
    assert f"{found / 1e6:.2f}" == published


def test_descriptions_of_models_without_a_width_mean_the_published_network() -> None:
    """Those of models that were saved before there was one."""
    assert cost_of("nin", CIFAR, 10, {}).parameters == 966_986
    assert cost_of("maxout", MNIST, 10, {}).parameters == count_parameters(built("maxout", MNIST))


def test_nin_on_svhn_has_the_published_1_98_million_kernel_weights() -> None:
    model = built("nin_svhn")
    assert count_parameters(model) == 1_986_026
    biases = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert f"{(1_986_026 - biases) / 1e6:.2f}" == "1.98"


def test_maxout_has_more_than_the_published_5_million() -> None:
    convolutions = 64 * 3 * 192 + 64 * 96 * 384 + 25 * 192 * 384 + 192 + 384 + 384
    dense = 192 * 5 * 5 * 2500 + 2500 + 500 * 10 + 10
    assert count_parameters(built("maxout")) == convolutions + dense > 5e6
    assert count_parameters(built("maxout", MNIST)) == 64 * 96 + 64 * 48 * 96 + 25 * 48 * 96 + 3 * 96 + 24 * 9 * 10 + 10


def test_what_is_published_nowhere_follows_from_the_layout() -> None:
    assert count_parameters(built("rcnn_bn", k=96)) == 672_202 + 2 * 96 * (4 * 4 + 1)
    mnist = (25 * 96 + 96) + (96 * 64 + 64) + (64 * 48 + 48) + (25 * 48 * 128 + 128) + (128 * 96 + 96) + (96 * 48 + 48)
    mnist += (25 * 48 * 128 + 128) + (128 * 96 + 96) + (96 * 10 + 10)
    assert count_parameters(built("nin", MNIST)) == mnist


@pytest.mark.parametrize(
    ("shape", "settings", "millions"),
    [
        (CIFAR, {"k": 96}, 219.7), (CIFAR, {"k": 128}, 387.3), (CIFAR, {"k": 160}, 602.1),
        (MNIST, {"k": 32}, 18.7), (MNIST, {"k": 64}, 73.5), (CROP, {"k": 96}, 123.6),
        (CIFAR, {"k": 96, "t": 0}, 60.5), (CIFAR, {"k": 96, "t": 1}, 113.5), (CIFAR, {"k": 96, "t": 2}, 166.6),
    ],
)  # fmt: skip
def test_multiply_adds_are_the_known_ones(
    shape: tuple[int, int, int], settings: dict[str, int], millions: float
) -> None:
    settings = ModelConfig().model_dump() | settings
    found = cost_of("rcnn", shape, 10, settings).multiply_adds
    assert round(found / 1e6, 1) == millions
    assert cost_of("recursive", shape, 10, settings).multiply_adds == found
    assert cost_of("rcnn_bn", shape, 10, settings).multiply_adds == found


@pytest.mark.parametrize("shape", [CIFAR, MNIST])
@pytest.mark.parametrize("name", ["rcnn_bn", "nin", "nin_svhn", "maxout"])
def test_multiply_adds_are_those_that_torch_counts(name: str, shape: tuple[int, int, int]) -> None:
    model = built(name, shape, k=8).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_of(shape, 1))
    assert 2 * count_multiply_adds(model, shape) == counter.get_total_flops()
    assert cost_of(name, shape, 10, ModelConfig(k=8).model_dump()).multiply_adds == count_multiply_adds(model, shape)


def test_counting_changes_neither_the_network_nor_the_random_numbers() -> None:
    model = built("rcnn", k=8).eval()
    before = torch.get_rng_state()
    count_multiply_adds(model, CIFAR)
    cost_of("maxout", CIFAR, 10, {"width": 1})
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("shape", [CIFAR, CROP, MNIST, (31, 27, 3)])
@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_logits_and_finite_gradients(
    name: str, num_images: int, shape: tuple[int, int, int]
) -> None:
    model = built(name, shape, 7, k=8, t=2).to(memory_format=torch.channels_last)
    logits = model(images_of(shape, num_images))
    assert logits.shape == (num_images, 7)
    functional.cross_entropy(logits, torch.arange(num_images)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_has_logits_and_gradients_of_a_scale_to_learn_from(name: str) -> None:
    model = built(name, k=32).eval()
    logits = model(images_of(CIFAR, 16))
    assert 0.001 < logits.std() < 10
    functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    norms = [parameter.grad.norm() for name, parameter in model.named_parameters() if name.endswith("weight")]
    assert min(norms) > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_reads_what_its_function_takes_and_names_the_network(name: str) -> None:
    row, settings = NETWORKS[name], ModelConfig(network=name).model_dump()
    everything = settings | {"recompute": True, "convolution": "direct"}
    assert set(row.reads) <= set(everything)
    assert isinstance(build_network(name, CIFAR, 10, {key: everything[key] for key in row.reads}), nn.Module)
    module, _, function = row.build.partition(":")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters
    optional = [key for key, each in parameters.items() if each.default is not inspect.Parameter.empty]
    required = [key for key in row.reads if key in settings and key not in optional]
    for missing in required:
        with pytest.raises(TypeError, match=missing):
            build_network(name, CIFAR, 10, {key: everything[key] for key in required if key != missing})
    assert "{" not in title_of(name, settings)


def test_titles() -> None:
    titles = {
        name: ModelConfig(network=name, **({"k": 96} if "k" in NETWORKS[name].reads else {})).title for name in NETWORKS
    }
    assert titles == {
        "rcnn": "RCNN-96, T = 3",
        "recursive": "rCNN-96, T = 3",
        "wide": "WCNN-96",
        "rcnn_bn": "RCNN-96 with batch norm, T = 3",
        "nin": "NIN",
        "nin_svhn": "NIN (SVHN layout)",
        "maxout": "Maxout",
    }
    assert ModelConfig(network="nin", width=0.275).title == "NIN, width 0.275"


def test_settings_of_other_networks_are_unread_and_those_of_no_network_are_not() -> None:
    settings = ModelConfig().model_dump()
    assert unread_settings("rcnn", settings) == {"width": 1}
    assert unread_settings("wide", settings) == {"t": 3, "width": 1}
    assert set(unread_settings("nin", settings)) == {"k", "t", "dropout", "lrn_alpha", "lrn_beta"}


def test_the_public_names_are_where_the_package_says() -> None:
    assert set(rcnn.model.__all__) == set(rcnn.model._HOMES)
    assert all(getattr(rcnn.model, name).__name__ == name for name in rcnn.model.__all__)
    with pytest.raises(ImportError, match="ResNet"):
        from rcnn.model import ResNet  # noqa: F401


def test_the_rcnns_parameters_have_the_names_that_stored_models_have() -> None:
    layers = [f"recurrent_layers.{number}.{name}" for number in range(4)
              for name in ("feed_forward.weight", "feed_forward.bias", "recurrent.weight")]  # fmt: skip
    names = ["first.weight", "first.bias", *layers, "classifier.weight", "classifier.bias"]
    assert list(built("rcnn", k=8).state_dict()) == names
    assert list(built("recursive", k=8).state_dict()) == names


# Forward passes, written once more from the papers in plain functions, in float64.


def lrn(x: Tensor) -> Tensor:
    return functional.local_response_norm(x, x.shape[1] // 8 + 1, alpha=0.4, beta=0.75, k=1.0)


def pooled(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2, 1)


def plain_recurrent(
    weights: dict[str, Tensor], images: Tensor, num_steps: int, normalise: Callable[[Tensor, str], Tensor],
    *, is_fed_at: Callable[[int], bool] = lambda t: True,
) -> Tensor:  # fmt: skip
    x = functional.conv2d(images, weights["first.weight"], weights["first.bias"], padding=2).relu()
    x = normalise(x, "first_norm")
    for number in range(4):
        if number in (0, 2):
            x = pooled(x)
        layer, u = f"recurrent_layers.{number}", x
        for t in range(num_steps + 1):
            z = weights[f"{layer}.feed_forward.bias"][:, None, None]
            if is_fed_at(t):
                z = z + functional.conv2d(u, weights[f"{layer}.feed_forward.weight"], padding=1)
            if t:
                z = z + functional.conv2d(x, weights[f"{layer}.recurrent.weight"], padding=1)
            x = normalise(z.relu(), f"{layer}.norms.{t}")
    return functional.linear(x.amax((2, 3)), weights["classifier.weight"], weights["classifier.bias"])


def with_biases(model: nn.Module) -> nn.Module:
    """Biases start at 0: a lost one would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_the_rcnn_and_the_wide_net_are_the_papers(num_steps: int) -> None:
    model, x = with_biases(built("rcnn", k=16, t=num_steps, **STRONG_LRN)), images_of((11, 9, 3), dtype=torch.float64)
    truth = plain_recurrent(model.state_dict(), x, num_steps, lambda x, name: lrn(x))
    torch.testing.assert_close(model(x), truth)
    if num_steps == 0:
        wide = built("wide", k=16, **STRONG_LRN).double().eval()
        wide.load_state_dict(model.state_dict())
        torch.testing.assert_close(wide(x), truth)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_recursive_net_is_fed_at_the_first_step_only(recompute: bool) -> None:
    model = with_biases(built("recursive", k=16, t=3, recompute=recompute, **STRONG_LRN))
    x = images_of((11, 9, 3), dtype=torch.float64)
    weights = dict(model.named_parameters())
    truth = plain_recurrent(weights, x, 3, lambda x, name: lrn(x), is_fed_at=lambda t: t == 0)
    ours = model(x)
    torch.testing.assert_close(ours, truth)
    expected = torch.autograd.grad(truth.square().sum(), list(weights.values()))
    for found, wanted in zip(torch.autograd.grad(ours.square().sum(), list(weights.values())), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recursive_layer_works_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = RecursiveConvLayer(3, 8, 2)
    nn.init.normal_(layer.feed_forward.bias)
    u = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = layer(u)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(u), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert layer.feed_forward.bias.grad.isfinite().all()


def test_without_steps_the_recursive_net_is_the_rcnn() -> None:
    rcnn_0, recursive_0 = built("rcnn", k=16, t=0).eval(), built("recursive", k=16, t=0).eval()
    x = images_of(MNIST[:2] + (3,))
    assert torch.equal(rcnn_0(x), recursive_0(x))
    assert not torch.equal(built("rcnn", k=16, t=1).eval()(x), built("recursive", k=16, t=1).eval()(x))


@pytest.mark.parametrize("num_steps", [0, 2])
def test_batch_norm_stands_in_for_lrn_once_per_time_step(num_steps: int) -> None:
    model = built("rcnn_bn", k=8, t=num_steps, dropout=0.0)
    for layer in model.recurrent_layers:
        assert len({id(norm) for norm in layer.norms if isinstance(norm, nn.BatchNorm2d)}) == num_steps + 1
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model, x = with_biases(model), images_of((11, 9, 3), 4, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def batch_norm(x: Tensor, name: str, is_training: bool) -> Tensor:
        mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
        return functional.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], is_training)

    evaluated = plain_recurrent(state, x, num_steps, lambda x, name: batch_norm(x, name, False))
    torch.testing.assert_close(model(x), evaluated)
    trained = plain_recurrent(state, x, num_steps, lambda x, name: batch_norm(x, name, True))
    torch.testing.assert_close(model.train()(x), trained)
    assert not torch.allclose(evaluated, trained)
    counts = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts == [1] * (4 * (num_steps + 1) + 1)


def parameters_in_pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    values = [parameter.detach() for parameter in model.parameters()]
    return list(zip(values[::2], values[1::2], strict=True))


def cut_pool(x: Tensor, kernel: int) -> Tensor:
    """Max pool of stride 2 in which windows reach over the right and lower border, by padding with what is never largest."""
    height, width = ((size - kernel) % 2 for size in x.shape[2:])
    return functional.max_pool2d(functional.pad(x, (0, width, 0, height), value=-float("inf")), kernel, 2)


@pytest.mark.parametrize(("name", "shape", "kernels"), [("nin", CIFAR, (5, 5, 3)), ("nin", MNIST, (5, 5, 5)),
                                                       ("nin_svhn", CROP, (5, 5, 5))])  # fmt: skip
def test_nin_is_its_authors_layout(name: str, shape: tuple[int, int, int], kernels: tuple[int, ...]) -> None:
    model, images = with_biases(built(name, shape)), images_of(shape, dtype=torch.float64)
    x, pairs = images, parameters_in_pairs(model)
    for number, kernel in enumerate(kernels):
        for weight, bias in pairs[3 * number : 3 * number + 3]:
            assert weight.shape[2] == kernel
            x = functional.conv2d(x, weight, bias, padding=kernel // 2).relu()
            kernel = 1
        if number < 2:
            x = cut_pool(x, 3)
    torch.testing.assert_close(model(images), x.mean((2, 3)))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("shape", "pieces", "paddings", "pools"),
    [(CIFAR, (2, 2, 2), (4, 3, 3), (4, 4, 2)), (CROP, (2, 2, 2), (4, 3, 3), (4, 4, 2)),
     (MNIST, (2, 2, 4), (0, 3, 3), (4, 4, 2))],
)  # fmt: skip
def test_maxout_is_its_authors_layout(
    shape: tuple[int, int, int], pieces: tuple[int, ...], paddings: tuple[int, ...], pools: tuple[int, ...]
) -> None:
    model, images = with_biases(built("maxout", shape)), images_of(shape, 1, dtype=torch.float64)
    x, pairs = images, parameters_in_pairs(model)
    for (weight, bias), num_pieces, padding, pool in zip(pairs, pieces, paddings, pools, strict=False):
        parts = [functional.conv2d(x, weight[piece::num_pieces], bias[piece::num_pieces], padding=padding)
                 for piece in range(num_pieces)]  # fmt: skip
        x = cut_pool(torch.stack(parts).amax(0), pool)
    x = x.flatten(1)
    if shape[2] == 3:
        weight, bias = pairs[3]
        assert weight.shape == (2500, x.shape[1])
        x = torch.stack([functional.linear(x, weight[piece::5], bias[piece::5]) for piece in range(5)]).amax(0)
    torch.testing.assert_close(model(images), functional.linear(x, *pairs[-1]))
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.2] + [0.5] * (len(pairs) - 1)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "wide"])
def test_dropout_works_in_training_only(name: str) -> None:
    model, x = built(name, k=16, dropout=0.5), images_of(CIFAR, 2)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_unknown_networks_and_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no network 'resnet'; choose one of rcnn, recursive, wide"):
        build_network("resnet", CIFAR, 10)
    with pytest.raises(ValueError, match="images of 9x8 are too small; layer 1 leaves nothing"):
        build_network("maxout", (8, 9, 1), 10, {"width": 1})
    for name in ("nin", "nin_svhn"):
        with pytest.raises(ValueError, match="images of 3x9 are too small; they must be 4x4 or larger"):
            build_network(name, (9, 3, 3), 10, {"width": 1})
        assert built(name, (4, 4, 3)).eval()(images_of((4, 4, 3), 1)).shape == (1, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_maxout_takes_images_of_every_side_or_refuses_them(channels: int) -> None:
    taken = []
    for side in range(1, 34):
        shape = (side, 34, channels)
        with torch.device("meta"), contextlib.suppress(ValueError):
            model = built("maxout", shape)
            assert model(images_of(shape, 1)).shape == (1, 10)
            taken.append(side)
    assert taken == list(range(taken[0], 34))
    assert taken[0] < 20


TINY = '''"""Global mean and a linear layer."""

from torch import nn


def build(image_shape, num_classes, *, k, dropout):
    """K hidden units."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * image_shape[2], k), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(k, num_classes),
    )
'''
ROW = '    "tiny": Network("rcnn.model.tiny:build", "Tiny-{k}", ("k", "dropout")),\n'
USE = """
import sys
from pathlib import Path
import torch
import rcnn.model.tiny
from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.recipes import debug_tiny
from rcnn.storage import Storage
from rcnn.train.checkpoint import load_model
from rcnn.train.loop import fit

storage, folder, out = sys.argv[1:]
settings = {"storage": storage, "model.network": "tiny", "model.k": 12, "model.t": 3, "train.epochs": 1}
settings |= {"tune.enabled": False}  # it would search T, which the network does not read
config = debug_tiny().with_settings(settings)
data = load_training_data(Storage(storage), folder, num_rows=320)
state = fit(config, data, lambda metrics: None)
state.save_best(Path(out))
model, description = load_model(Path(out))
images = data.val.images[:3]
assert torch.equal(model(images), state.model.eval()(images))
print(config.model.title, description["network"]["network"], len(state.history), sep="; ")
"""


@pytest.mark.long
def test_a_network_is_added_with_one_file_and_one_line(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path
) -> None:
    shutil.copytree(Path(rcnn.model.__file__).parents[1], tmp_path / "rcnn")
    (tmp_path / "rcnn" / "model" / "tiny.py").write_text(TINY)
    table = tmp_path / "rcnn" / "model" / "networks.py"
    table.write_text(table.read_text().replace('    "rcnn": Network(', f'{ROW}    "rcnn": Network(', 1))
    (tmp_path / "out").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)

    used = run("-c", USE, tiny_config.storage, digits.folder, str(tmp_path / "out"))
    assert used.returncode == 0, used.stderr
    assert used.stdout.splitlines()[-1] == "Tiny-12; tiny; 1"
    misspelt = run("-m", "rcnn.cli", "config", "--set", "model.network=tniy")
    assert "model.network is 'tniy': should be one of tiny, rcnn, recursive" in misspelt.stderr
    unread = run("-m", "rcnn.cli", "config", "--set", "model.network=tiny", "--set", "model.t=1")
    assert "t = 1 is not read by network = 'tiny'; leave it at 3" in unread.stderr
