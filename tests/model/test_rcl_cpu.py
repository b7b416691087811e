"""The compiled recurrent layer against torch's convolutions and the formula of LRN, in float64."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.model import RecurrentConvLayer, rcl_cpu
from rcnn.model.compiled import can_compile
from rcnn.model.lrn_equation import reference_lrn
from rcnn.model.norms import batch_norms, local_response_norms
from rcnn.model.recursive import RecursiveConvLayer
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.loop import fit

pytestmark = pytest.mark.skipif(not can_compile(), reason="there is no C compiler")

SIZES = [(16, 16), (8, 8), (7, 7), (14, 14), (5, 9), (3, 4), (1, 1), (1, 13), (2, 2), (33, 6)]
LARGEST_RATIO = 8
"""Of the relative error of the compiled layer to that of direct convolution, both in float32."""


def layer_of(num_maps: int, num_steps: int, kind: type = RecurrentConvLayer, **settings: object) -> RecurrentConvLayer:
    torch.manual_seed(num_maps + num_steps)
    norms = partial(local_response_norms, alpha=0.3)
    layer = kind(num_maps, num_maps, num_steps, **({"norms": norms, "convolution": "winograd"} | settings))
    nn.init.normal_(layer.feed_forward.bias, std=0.3)
    return layer


def results(layer: nn.Module, u: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    u = u.detach().requires_grad_()
    layer.zero_grad()
    out = layer(u)
    (out * weight).sum().backward()
    return {"out": out.detach(), "u": u.grad, **{name: value.grad.clone() for name, value in layer.named_parameters()}}


def is_compiled(layer: RecurrentConvLayer, u: Tensor) -> bool:
    return "CompiledLayer" in str(layer(u.detach().requires_grad_()).grad_fn)


def truth_of(layer: RecurrentConvLayer, u: Tensor) -> Tensor:
    """z(t) = w_f * u + w_r * x(t-1) + b; x(t) = g(relu(z(t))), by torch operations that share no code with the layer."""
    fed = functional.conv2d(u, layer.feed_forward.weight, layer.feed_forward.bias, padding=1)
    x = reference_lrn(fed.relu(), window=layer.norms[0].window, alpha=0.3)
    later = fed if layer.ADDS_INPUT else layer.feed_forward.bias[:, None, None]
    for _ in range(layer.num_steps):
        z = later + functional.conv2d(x, layer.recurrent.weight, padding=1)
        x = reference_lrn(z.relu(), window=layer.norms[0].window, alpha=0.3)
    return x


class Truth(nn.Module):
    def __init__(self, layer: RecurrentConvLayer):
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        return truth_of(self.layer, u)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [RecurrentConvLayer, RecursiveConvLayer])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_outputs_and_gradients_are_those_of_the_equations(size: tuple[int, int], kind: type, num_steps: int) -> None:
    layer = layer_of(16, num_steps, kind).double()
    for num_images in (1, 7):
        u, weight = (torch.randn(num_images, 16, *size, dtype=torch.float64) for _ in range(2))
        assert is_compiled(layer, u)
        truth = results(Truth(layer), u, weight)
        for name, found in results(layer, u, weight).items():
            torch.testing.assert_close(found, truth[name if name in truth else f"layer.{name}"], msg=name)


@pytest.mark.parametrize(
    "num_maps", [8, *(pytest.param(n, marks=pytest.mark.long) for n in (24, 32, 40, 48, 64, 96, 160))]
)
def test_every_number_of_maps_that_eight_divides(num_maps: int) -> None:
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = layer_of(num_maps, 1).to(dtype)
        u, weight = (torch.randn(3, num_maps, 6, 7, dtype=dtype) for _ in range(2))
        truth = results(Truth(layer), u, weight)
        for name, found in results(layer, u, weight).items():
            wanted = truth[name if name in truth else f"layer.{name}"]
            assert float((found - wanted).norm() / wanted.norm()) < rtol, name


@pytest.mark.parametrize(
    ("num_maps", "size"), list(itertools.product([32, 96, 160], [(16, 16), (8, 8), (7, 7), (5, 9)]))
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rounding_errors_are_at_most_eight_times_those_of_direct_convolution(
    num_maps: int, size: tuple[int, int], scale: float
) -> None:
    """Without recurrence and with a bias that keeps the ReLU linear: one unit at 0 would outweigh all rounding errors."""
    layer = layer_of(num_maps, 0)
    nn.init.constant_(layer.feed_forward.bias, 8 * scale)
    u, weight = torch.randn(4, num_maps, *size).relu() * scale, torch.randn(4, num_maps, *size)
    found = {}
    for convolution in ("winograd", "direct"):
        layer.convolution = convolution
        found[convolution] = results(layer, u, weight)
    truth = results(Truth(layer).double(), u.double(), weight.double())
    for name, wanted in truth.items():
        ours, direct = (
            float((found[form][name.removeprefix("layer.")].double() - wanted).norm())
            for form in ("winograd", "direct")
        )
        assert ours <= LARGEST_RATIO * max(direct, 2e-8 * float(wanted.norm())), name


@pytest.fixture(scope="module")
def trained_layers(
    tiny_config: PipelineConfig, digits: IngestResult
) -> list[tuple[RecurrentConvLayer, Tensor, Tensor]]:
    """The four layers of a trained RCNN-32, each with an input of real digits and the gradient of its output."""
    data = load_training_data(Storage(tiny_config.storage), digits.folder)
    config = tiny_config.with_settings({"model.k": 32, "model.t": 3, "train.epochs": 1, "train.num_rows": 1500})
    model = fit(config, data, lambda metrics: None).model.eval()
    layers, seen = list(model.network.recurrent_layers), {}

    def keep(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        out.retain_grad()
        seen[layer] = (given[0].detach(), out)

    for layer in layers:
        layer.register_forward_hook(keep)
    images, labels = next(iter(data.val.batches(64, torch.device("cpu"))))
    functional.cross_entropy(model(images), labels).backward()
    for layer in layers:
        layer._forward_hooks.clear()
    return [(layer, seen[layer][0], seen[layer][1].grad) for layer in layers]


@pytest.mark.long
@pytest.mark.parametrize("number", range(4))
def test_the_same_holds_for_the_weights_and_inputs_of_a_trained_network(
    trained_layers: list[tuple[RecurrentConvLayer, Tensor, Tensor]], number: int
) -> None:
    """With all time steps, ReLU and LRN; without the images in which rounding decides whether a unit is on."""
    layer, u, gradient = trained_layers[number]
    layer64 = copy.deepcopy(layer).double()
    is_clear = smallest_input_of_a_relu(layer64, u.double()) > 2e-6
    assert is_clear.double().mean() > 0.7
    u, gradient = u[is_clear], gradient[is_clear]
    truth, errors = results(layer64, u.double(), gradient.double()), {}
    for convolution in ("winograd", "direct"):
        layer.convolution = convolution
        found = results(layer, u, gradient)
        errors[convolution] = {
            name: float((found[name] - wanted).norm() / wanted.norm()) for name, wanted in truth.items()
        }
    for name, error in errors["winograd"].items():
        assert 0 < error <= LARGEST_RATIO * errors["direct"][name], name


@torch.no_grad()
def smallest_input_of_a_relu(layer: RecurrentConvLayer, u: Tensor) -> Tensor:
    """The smallest |z(t)| of each image."""
    fed = z = layer.feed_forward(u)
    smallest = z.abs().amin((1, 2, 3))
    for norm in layer.norms[1:]:
        z = fed + layer.recurrent(norm(z.relu()))
        smallest = smallest.minimum(z.abs().amin((1, 2, 3)))
    return smallest


class SavedNumbers:
    """How many numbers autograd saves."""

    total = 0

    def count(self, tensor: Tensor) -> Tensor:
        self.total += tensor.numel()
        return tensor


def test_recomputing_gives_the_same_bits_from_less_memory() -> None:
    u, weight = torch.randn(5, 32, 9, 9), torch.randn(5, 32, 9, 9)
    found, saved = [], []
    for recompute in (False, True):
        layer, numbers = layer_of(32, 3, recompute=recompute), SavedNumbers()
        with torch.autograd.graph.saved_tensors_hooks(numbers.count, lambda tensor: tensor):
            found.append(results(layer, u, weight))
        saved.append(numbers.total)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert saved[1] < saved[0] / 2


def test_dropout_in_the_same_pass_is_dropout_after_it() -> None:
    u, weight = torch.randn(5, 16, 9, 9), torch.randn(5, 16, 9, 9)
    within, apart = layer_of(16, 2, dropout=0.4), layer_of(16, 2)

    class Apart(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return within.dropout(apart(u))

    torch.manual_seed(3)
    ours = results(within, u, weight)
    torch.manual_seed(3)
    module = Apart()
    theirs = results(module, u, weight)
    assert float((ours["out"] == 0).double().mean()) > 0.3
    for name in ("out", "u"):
        assert torch.equal(ours[name], theirs[name])


def test_a_run_on_any_number_of_threads_repeats_its_own_bits() -> None:
    layer, u, weight = layer_of(32, 2), torch.randn(9, 32, 12, 10), torch.randn(9, 32, 12, 10)
    before = torch.get_num_threads()
    reference = results(layer, u, weight)
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            first, second = results(layer, u, weight), results(layer, u, weight)
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert all(torch.equal(first[name], reference[name]) for name in ("out", "u"))
    finally:
        torch.set_num_threads(before)


def test_layout_and_strides_do_not_matter() -> None:
    layer, u = layer_of(16, 2), torch.randn(4, 16, 9, 12)
    expected = layer(u)
    assert torch.equal(layer(u.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(layer(u.repeat_interleave(2, 0)[::2]), expected)
    torch.testing.assert_close(layer(u.flip(3)[:, :, 2:, :5].contiguous()), layer(u.flip(3)[:, :, 2:, :5]))


@pytest.mark.parametrize("recompute", [False, True])
def test_it_passes_gradcheck(recompute: bool) -> None:
    layer = layer_of(8, 2, recompute=recompute).double()
    u = torch.randn(1, 8, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, *weights: layer(u), (u, *layer.parameters()), fast_mode=True)


def test_what_is_not_a_number_stays_in_its_image() -> None:
    layer, u = layer_of(16, 1), torch.ones(3, 16, 8, 8)
    u[1, 3, 2, 2] = float("nan")
    out = layer(u)
    assert out[1].isnan().any()
    assert not out[[0, 2]].isnan().any()


def test_what_the_kernel_is_not_written_for_is_left_to_torch() -> None:
    u = torch.randn(2, 16, 8, 8)
    assert is_compiled(layer_of(16, 1), u)
    assert not is_compiled(layer_of(16, 1, convolution="direct"), u)
    assert not is_compiled(layer_of(12, 1), torch.randn(2, 12, 8, 8))
    assert not is_compiled(RecurrentConvLayer(3, 16, 1, convolution="winograd"), torch.randn(2, 3, 8, 8))
    assert not is_compiled(layer_of(16, 1, norms=batch_norms), u)
    assert not is_compiled(layer_of(16, 1, norms=partial(local_response_norms, beta=0.5)), u)
    with pytest.raises(RuntimeError, match="type"):
        layer_of(16, 1)(u.double())
    assert layer_of(16, 1)(torch.randn(0, 16, 8, 8)).shape == (0, 16, 8, 8)


@pytest.mark.parametrize("has_amx", [False, True])
def test_under_autocast_the_layer_computes_in_float32_unless_the_processor_multiplies_bfloat16_matrices(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    layer = layer_of(16, 2, convolution="auto", dropout=0.5).eval()
    u = torch.randn(2, 16, 8, 8).bfloat16()
    expected = layer(u.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_compiled(layer, u) != has_amx
        found = layer(u)
        found.sum().backward()
    assert found.dtype == (torch.bfloat16 if has_amx else torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0.05 if has_amx else 0, atol=0.05 if has_amx else 0)
    assert layer.recurrent.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "pays"),
    [((16, 16), True), ((8, 8), True), ((7, 7), True), ((14, 14), True), ((2, 2), False), ((1, 1), False)],
)
def test_auto_chooses_by_the_size_of_the_maps(size: tuple[int, int], pays: bool) -> None:
    assert rcl_cpu.pays(*size) == pays
    assert is_compiled(layer_of(16, 1, convolution="auto"), torch.randn(2, 16, *size)) == pays


def test_a_weight_that_is_changed_before_the_backward_pass_is_noticed() -> None:
    layer = layer_of(16, 1)
    out = layer(torch.randn(2, 16, 4, 4))
    with torch.no_grad():
        layer.recurrent.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_a_compiler_torch_computes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, u = layer_of(16, 2), torch.randn(2, 16, 6, 6)
    ours = layer(u)
    monkeypatch.setattr(rcl_cpu, "kernel", lambda *layer: None)
    assert not is_compiled(layer, u)
    torch.testing.assert_close(layer(u), ours)
