import pytest
import torch
from torch.nn import functional

from rcnn.model.lrn import LocalResponseNorm, reference_lrn

SHAPES = [(8, 2), (16, 3), (32, 5), (96, 13), (5, 1), (5, 9), (7, 4), (3, 2)]


@pytest.mark.parametrize(("num_maps", "window"), SHAPES)
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_agrees_with_torch_and_with_the_equation(num_maps: int, window: int, beta: float) -> None:
    x = torch.randn(2, num_maps, 3, 4, dtype=torch.float64) * 5
    ours = LocalResponseNorm(num_maps, window=window, alpha=0.3, beta=beta)(x)
    torch.testing.assert_close(ours, functional.local_response_norm(x, window, alpha=0.3, beta=beta, k=1.0))
    torch.testing.assert_close(ours, reference_lrn(x, window=window, alpha=0.3, beta=beta))


@pytest.mark.parametrize(("num_maps", "window"), SHAPES)
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_the_hand_written_gradient_passes_gradcheck(num_maps: int, window: int, beta: float) -> None:
    x = torch.randn(1, num_maps, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LocalResponseNorm(num_maps, window=window, alpha=0.5, beta=beta), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_denominator_is_float32_for_narrow_inputs(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 16, 4, 4) * 4).to(dtype)
    ours = LocalResponseNorm(16, window=3, alpha=0.01)(x)
    assert ours.dtype == dtype
    truth = reference_lrn(x.double(), window=3, alpha=0.01)
    torch.testing.assert_close(ours, truth.to(dtype), rtol=0, atol=0)


def test_memory_layout_does_not_matter() -> None:
    x = torch.randn(3, 16, 5, 4)
    norm = LocalResponseNorm(16, window=3)
    torch.testing.assert_close(norm(x), norm(x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(norm(x.transpose(2, 3)), norm(x).transpose(2, 3))
