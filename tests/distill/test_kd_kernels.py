"""The Triton kernel against plain torch: on a GPU, or else in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill.divergences import TokenLoss, token_losses

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
runs_here = pytest.mark.skipif(not HAS_TRITON or not (CUDA or INTERPRETED), reason="needs Triton and a GPU")

N, V = 2, 100
NAMES = ("forward_kl", "reverse_kl", "js", "mse", "cosine")
CAPPED, SCALED = LogitTransform(scale=0.5, softcap=3.0), LogitTransform(scale=1 / 4)


def settings_of(name: str) -> list[TokenLoss]:
    plain = TokenLoss(name, js_beta=0.3)
    temperature = 1.0 if name in ("mse", "cosine") else 3.0
    return [plain, TokenLoss(name, temperature, 0.7, 0.3, CAPPED, SCALED)]


def logits(distance: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(N, V, generator=generator)
    student = teacher + distance * torch.randn(N, V, generator=generator)
    return student, teacher, torch.randint(0, V, (N,), generator=generator)


@pytest.fixture
def kernels(monkeypatch):
    from hf_minitron.distill import kd_kernels

    monkeypatch.setattr(kd_kernels, "BLOCK", 64)  # two blocks a row, the second not full
    monkeypatch.setattr(kd_kernels, "WARPS", 2)
    return kd_kernels


def run(kernels, settings, student, teacher, labels, weight, grad):
    """On the GPU if there is one; in place of the student's logits if `grad` is them."""
    device = "cuda" if CUDA else "cpu"
    moved = [None if tensor is None else tensor.to(device) for tensor in (student, teacher, labels, weight)]
    target = moved[0] if grad is student else None if grad is None else grad.to(device)
    values = kernels.token_losses_(settings, *moved, target)
    return [value.cpu() for value in values], None if target is None else target.cpu()


@runs_here
@pytest.mark.parametrize("settings", [s for name in NAMES for s in settings_of(name)], ids=repr)
def test_the_kernel_equals_plain_torch(kernels, settings):
    student, teacher, labels = logits()
    weight = torch.tensor([1.0, -0.25])
    expected, by_logits = token_losses(settings, student.double(), teacher.double(), labels, True)
    values, grad = run(kernels, settings, student.clone(), teacher, labels, weight, torch.empty_like(student))
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value.to(reference.dtype), reference, rtol=1e-5, atol=5e-6)
    expected_grad = weight[:, None] * by_logits
    assert (grad.double() - expected_grad).norm() < 2e-6 * expected_grad.norm()


@runs_here
@pytest.mark.parametrize("name", NAMES)
def test_without_labels_or_gradient_in_place_and_in_half_precision(kernels, name):
    student, teacher, _ = logits()
    settings, weight = TokenLoss(name), torch.ones(N)
    expected, by_logits = token_losses(settings, student, teacher, None, True)
    values, nothing = run(kernels, settings, student.clone(), teacher, None, weight, None)
    torch.testing.assert_close(values[0], expected.loss, rtol=1e-4, atol=1e-6)
    assert nothing is None and not values[2].any() and not values[3].any()
    for dtype, tolerance in ((torch.bfloat16, 6e-3), (torch.float16, 5e-4)):  # the interpreter cuts bf16, a GPU rounds
        _, grad = run(kernels, settings, student.clone(), teacher, None, weight, torch.empty_like(student, dtype=dtype))
        assert (grad.float() - by_logits).norm() < tolerance * by_logits.norm()
    _, grad = run(kernels, settings, student, teacher, None, weight, student)
    assert (grad - by_logits).norm() < 1e-5 * by_logits.norm()


@runs_here
@pytest.mark.parametrize("name", NAMES)
def test_equal_and_extreme_logits(kernels, name):
    student, teacher, labels = logits()
    settings = TokenLoss(name, 1.0 if name in ("mse", "cosine") else 3.0)
    values, grad = run(kernels, settings, teacher.clone(), teacher, labels, torch.ones(N), torch.empty_like(student))
    assert values[0].abs().max() == 0 and grad.abs().max() == 0 and values[4].all()
    settings, student, teacher = TokenLoss(name, ce_weight=1.0), 100 * student, -100 * teacher
    values, grad = run(kernels, settings, student.clone(), teacher, labels, torch.ones(N), torch.empty_like(student))
    expected, by_logits = token_losses(settings, student.double(), teacher.double(), labels, True)
    torch.testing.assert_close(values[0].double(), expected.loss, rtol=1e-4, atol=1e-4)
    assert (grad.double() - by_logits).norm() < 1e-4 * by_logits.norm()


@pytest.mark.skipif(not HAS_TRITON or CUDA or INTERPRETED, reason="needs Triton and no GPU")
def test_in_the_interpreter():
    """Triton decides at its import whether it interprets: hence the process."""
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kl", [0.5, 0.005])
def test_the_whole_loss_on_a_gpu(dtype, kl):
    """Kernel and fp32-out products together, against fp64 on the CPU."""
    from hf_minitron.distill.kd_head import fused_linear_kd

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(96, 32, generator=generator).to(dtype)
    weight = torch.randn(1024, 32, generator=generator) * 0.7
    noise = torch.randn(1024, 32, generator=generator) * (2 * kl / 32) ** 0.5
    tensors = hidden, (weight + noise).to(dtype), hidden, weight.to(dtype), torch.full((96,), 1 / 96)
    results = {}
    for device, precision in (("cuda", dtype), ("cpu", torch.float64)):
        moved = [tensor.to(device, torch.float32 if tensor.dim() == 1 else precision) for tensor in tensors]
        leaves = [tensor.requires_grad_() for tensor in moved[:2]]
        output = fused_linear_kd(*moved, chunk_size=40)
        scale = 2.0**10
        found = torch.autograd.grad(scale * output.loss, leaves)
        results[device] = [output.loss.detach().cpu().double(), *(gradient.cpu().double() for gradient in found)]
    tolerance = 0.003 if dtype != torch.float32 else 1e-4  # TF32 is off by default
    for one, other in zip(results["cuda"], results["cpu"], strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
