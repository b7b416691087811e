import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rcnn.model import RecurrentConvLayer, lrn_cpu
from rcnn.model.compiled import can_compile
from rcnn.model.lrn import LocalResponseNorm
from rcnn.model.lrn_equation import reference_lrn

SHAPES = [(8, 2), (16, 3), (32, 5), (96, 13), (5, 1), (5, 9), (7, 4), (3, 2), (1, 1)]
NARROW = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=["compiled", "by convolution"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's way where there is a compiler, and where there is none."""
    if request.param == "by convolution":
        monkeypatch.setattr(lrn_cpu, "kernel", lambda *network: None)
    elif not can_compile():
        pytest.skip("there is no C compiler")


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm())


@pytest.mark.parametrize(("num_maps", "window"), SHAPES)
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_agrees_with_torch_and_with_the_equation(num_maps: int, window: int, beta: float, form: None) -> None:
    x = torch.randn(2, num_maps, 3, 4, dtype=torch.float64) * 5
    ours = LocalResponseNorm(num_maps, window=window, alpha=0.3, beta=beta)(x)
    torch.testing.assert_close(ours, functional.local_response_norm(x, window, alpha=0.3, beta=beta, k=1.0))
    torch.testing.assert_close(ours, reference_lrn(x, window=window, alpha=0.3, beta=beta))


@pytest.mark.long
@pytest.mark.parametrize(("num_maps", "window"), SHAPES)
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_the_hand_written_gradients_pass_gradcheck(num_maps: int, window: int, beta: float, form: None) -> None:
    torch.manual_seed(0)
    norm = LocalResponseNorm(num_maps, window=window, alpha=0.5, beta=beta)
    x, plus = (torch.randn(1, num_maps, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(norm.rectified, x)
    assert torch.autograd.gradcheck(lambda z, plus: norm.rectified(z * 1, plus), (x, plus))


@pytest.mark.parametrize(("num_maps", "window"), [*SHAPES, (520, 66)])
@pytest.mark.parametrize(
    ("dtype", "bound", "gradients_bound"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 4e-3, 6e-3)]
)
def test_a_rectified_sum_is_what_its_parts_are(
    num_maps: int, window: int, dtype: torch.dtype, bound: float, gradients_bound: float, form: None
) -> None:
    torch.manual_seed(1)
    norm = LocalResponseNorm(num_maps, window=window, alpha=0.5)
    z, plus = (torch.randn(3, num_maps, 5, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    sum_of_both = (z + plus).detach().double().requires_grad_()  # rounded as the type does
    truth = reference_lrn(sum_of_both.relu(), window=window, alpha=0.5)
    weight = torch.randn_like(z)
    [expected] = torch.autograd.grad((truth * weight.double()).sum(), sum_of_both)
    ours = norm.rectified(z * 1, plus)
    found = torch.autograd.grad((ours * weight).sum(), (z, plus))
    assert relative_error(ours, truth) < bound
    assert all(relative_error(one, expected) < gradients_bound for one in found)


def test_without_a_plus_the_input_stays_as_it_is(form: None) -> None:
    norm = LocalResponseNorm(16, window=3)
    z = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    before = z.clone()
    torch.testing.assert_close(norm.rectified(z), norm(z.relu()))
    assert torch.equal(z, before)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scale", [1, 32])
def test_every_type_is_as_exact_as_it_can_be(dtype: torch.dtype, scale: int, form: None) -> None:
    """Errors as relative norms against float64, of value and gradient."""
    torch.manual_seed(2)
    norm = LocalResponseNorm(40, window=6)
    x = (torch.randn(3, 40, 5, 7) * scale).to(dtype).requires_grad_()
    weight = torch.randn(3, 40, 5, 7).to(dtype)
    wide = x.detach().double().requires_grad_()
    truth = reference_lrn(wide, window=6)
    [expected] = torch.autograd.grad((truth * weight.double()).sum(), wide)
    ours = norm(x)
    [found] = torch.autograd.grad((ours * weight).sum(), x)
    assert ours.dtype == found.dtype == dtype
    assert relative_error(ours, truth) < NARROW[dtype]
    assert relative_error(found, expected) < NARROW[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_denominator_is_float32_for_narrow_inputs(dtype: torch.dtype, form: None) -> None:
    x = (torch.randn(2, 16, 4, 4) * 4).to(dtype)
    ours = LocalResponseNorm(16, window=3, alpha=0.01)(x)
    truth = reference_lrn(x.double(), window=3, alpha=0.01)
    torch.testing.assert_close(ours, truth.to(dtype), rtol=0, atol=0)


def test_autocast_leaves_the_denominator_alone() -> None:
    norm, x = LocalResponseNorm(16, window=3, alpha=0.1), torch.randn(2, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm._by_convolution(x), norm._by_convolution(x).float())
        torch.testing.assert_close(norm(x), reference_lrn(x, window=3, alpha=0.1))
    torch.testing.assert_close(norm._by_convolution(x), norm(x))


def test_memory_layout_does_not_matter(form: None) -> None:
    x = torch.randn(3, 16, 5, 4)
    norm = LocalResponseNorm(16, window=3)
    torch.testing.assert_close(norm(x), norm(x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(norm(x.transpose(2, 3)), norm(x).transpose(2, 3))
    torch.testing.assert_close(norm(x[::2, :, 1:, ::3]), norm(x)[::2, :, 1:, ::3])


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_recomputing_gives_the_same_gradients_from_less_memory(num_steps: int) -> None:
    torch.manual_seed(3)
    keeping = RecurrentConvLayer(3, 12, num_steps, convolution="direct")
    recomputing = RecurrentConvLayer(3, 12, num_steps, convolution="direct", recompute=True)
    recomputing.load_state_dict(keeping.state_dict())
    u = torch.randn(2, 3, 6, 5)
    saved: dict[str, int] = {}
    for name, layer in (("keeping", keeping), ("recomputing", recomputing)):
        numbers = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = layer(u)
        saved[name] = numbers
        out.square().sum().backward()
    for name, parameter in keeping.named_parameters():
        assert torch.equal(parameter.grad, recomputing.get_parameter(name).grad)
    assert (saved["recomputing"] < saved["keeping"]) == (num_steps > 0)
