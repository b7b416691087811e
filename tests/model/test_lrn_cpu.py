"""What is particular to the kernel that is compiled for the CPU; its numbers are tested in test_lrn.py."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rcnn.model import compiled, lrn_cpu
from rcnn.model.lrn import LocalResponseNorm
from rcnn.model.lrn_equation import reference_lrn

NETWORK = (16, 3, torch.float32, True)

needs_compiler = pytest.mark.skipif(not compiled.can_compile(), reason="there is no C compiler")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was compiled, or found missing, is forgotten before and after."""
    lrn_cpu.kernel.cache_clear()
    compiled.can_compile.cache_clear()
    yield
    lrn_cpu.kernel.cache_clear()
    compiled.can_compile.cache_clear()


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(num_threads: int) -> None:
    torch.manual_seed(0)
    norm = LocalResponseNorm(24, window=4, alpha=0.1)
    z, plus = (torch.randn(7, 24, 15, 13, requires_grad=True) for _ in range(2))

    def value_and_gradients() -> list[torch.Tensor]:
        y = norm.rectified(z * 1, plus)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (z, plus))]

    before = torch.get_num_threads()
    expected = value_and_gradients()
    try:
        torch.set_num_threads(num_threads)
        assert all(map(torch.equal, value_and_gradients(), expected))
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(value: float, dtype: torch.dtype) -> None:
    z = torch.ones(2, 16, 3, 3, dtype=dtype)
    z[0, 7, 1, 2] = value
    z.requires_grad_()
    y = LocalResponseNorm(16, window=3).rectified(z)
    [gradient] = torch.autograd.grad(y.sum(), z)
    truth = reference_lrn(z.detach().double().relu(), window=3)
    assert torch.equal(y.isnan(), truth.isnan())
    assert gradient[0, 7, 1, 2].isnan()
    assert not y[1].isnan().any()
    assert not gradient[1].isnan().any()


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 16, 3, 3), (2, 16, 0, 3)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    z = torch.ones(shape, requires_grad=True)
    y = LocalResponseNorm(16, window=3).rectified(z * 1, z)
    y.sum().backward()
    assert y.shape == z.grad.shape == shape


@needs_compiler
def test_a_sum_of_two_types_is_of_the_first() -> None:
    z, plus = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    y = LocalResponseNorm(16, window=3).rectified(z.clone(), plus)
    torch.testing.assert_close(y, reference_lrn((z + plus).relu(), window=3))
    y.sum().backward()
    assert plus.grad is not None
    assert plus.grad.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="expand"):
        LocalResponseNorm(16, window=3).rectified(z, plus[:, :, :2])


@needs_compiler
def test_an_overwritten_z_is_noticed_by_who_else_needs_it() -> None:
    leaf = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    z = leaf * 1
    other = z.square().sum()
    LocalResponseNorm(16, window=3).rectified(z, torch.ones_like(z))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@needs_compiler
def test_tensors_without_memory_are_left_to_torch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        z = torch.randn(2, 16, 3, 3)
        assert LocalResponseNorm(16, window=3).rectified(z, z).shape == z.shape


@needs_compiler
def test_another_number_of_maps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        LocalResponseNorm(16, window=3).rectified(torch.randn(2, 8, 3, 3))


@needs_compiler
def test_an_input_that_is_changed_before_the_backward_pass_is_noticed() -> None:
    z = torch.ones(2, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    copy = z * 1
    y = LocalResponseNorm(16, window=3)(copy)
    copy.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_compiler
def test_nothing_is_left_on_the_disk(forgetful: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert lrn_cpu.kernel(*NETWORK) is not None
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_it_says_so_once(
    forgetful: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with caplog.at_level(logging.INFO, logger="rcnn"):
        x = torch.randn(2, 16, 3, 3)
        for _ in range(2):
            torch.testing.assert_close(LocalResponseNorm(16, window=3)(x), reference_lrn(x, window=3))
    assert [record.getMessage() for record in caplog.records if "there is no gcc" in record.getMessage()] != []
    assert len(caplog.records) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'warning: old' >&2; echo 'lrn.c:1: error: no assembler' >&2; exit 1", "error: no assembler"),
        ("printf 'caf\\351\\n\\n' >&2; exit 1", "caf"),
        ("exit 3", "ended with exit code 3"),
        ("exit 0", "kernel.so"),
    ],
)
def test_a_compiler_that_fails_is_reported_with_its_words(
    script: str, reason: str, forgetful: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    broken = tmp_path / "cc"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.INFO, logger="rcnn"):
        x = torch.randn(2, 16, 3, 3)
        torch.testing.assert_close(LocalResponseNorm(16, window=3)(x), reference_lrn(x, window=3))
    assert reason in caplog.text


@needs_compiler
def test_clang_is_passed_over(forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clang = tmp_path / "cc"
    clang.write_text("#!/bin/sh\necho clang version 22\n")
    clang.chmod(0o700)
    monkeypatch.setenv("CC", str(clang))
    assert compiled.compiler() not in (None, str(clang))
