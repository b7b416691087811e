"""The Triton kernel in Triton's own interpreter, which runs it without a GPU, number by number."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.long

pytest.importorskip("triton", reason="there is no Triton for this system")

CODE = """
import torch
from rcnn.model.lrn_triton import largest_error
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    print(largest_error(torch.device("cpu"), dtype))
"""
LAYER = """
import torch
from rcnn.model.lrn import LocalResponseNorm
from rcnn.model.lrn_equation import reference_lrn
z, plus = torch.randn(2, 2, 24, 5, 3)
y = LocalResponseNorm(24, window=4, alpha=0.1, triton=True).rectified(z.clone().requires_grad_(), plus)
torch.testing.assert_close(y, reference_lrn((z + plus).relu(), window=4, alpha=0.1))
print(type(y.grad_fn).__name__)
"""


def test_the_kernel_agrees_with_the_reference_in_the_interpreter() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    float32, bfloat16, float16 = map(float, done.stdout.split())
    assert float32 < 1e-6
    assert bfloat16 < 1e-2
    assert float16 < 1e-3


def test_a_layer_that_is_asked_to_uses_the_kernel() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", LAYER], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "TritonLrnBackward", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_the_kernel_agrees_with_the_reference_on_a_gpu(dtype: torch.dtype, bound: float) -> None:
    from rcnn.model.lrn_triton import largest_error

    assert largest_error(torch.device("cuda"), dtype) < bound
