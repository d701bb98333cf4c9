"""The losses that kd_head.py compares: whole logits, this project's, and those of other libraries behind adapters.

An adapter gives the same quantity, the mean over tokens of a divergence at temperature 1. It raises ImportError when
its library is not installed, and `Unsupported` when that has no such divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DIVERGENCES = ("forward_kl", "reverse_kl", "js", "mse", "cosine")
JS_BETA = 0.5


class Heads(NamedTuple):
    """student_hidden [N, Hs], student_weight [V, Hs], teacher_hidden [N, Ht], teacher_weight [V, Ht]."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    def to(self, dtype: torch.dtype) -> Heads:
        """A copy, whose student parts are leaves that take gradients."""
        student = [tensor.detach().to(dtype).clone().requires_grad_() for tensor in self[:2]]
        return Heads(*student, *(tensor.to(dtype) for tensor in self[2:]))


Loss = Callable[[Heads], Tensor]


class Unsupported(ValueError):
    """The library has no such divergence."""


def load_naive(divergence: str) -> Loss:
    """Whole logits of both models; the distributions in fp32 whatever the logits are (in fp64 if these are)."""

    def loss(heads: Heads) -> Tensor:
        student = heads.student_hidden @ heads.student_weight.t()
        with torch.no_grad():
            teacher = heads.teacher_hidden @ heads.teacher_weight.t()
        dtype = torch.promote_types(student.dtype, torch.float32)
        if divergence == "mse":
            return F.mse_loss(student.to(dtype), teacher.to(dtype))
        if divergence == "cosine":
            return 1 - F.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=-1).mean()
        log_p, log_q = (F.log_softmax(logits, dim=-1, dtype=dtype) for logits in (student, teacher))
        if divergence == "forward_kl":
            return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        if divergence == "reverse_kl":
            return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        log_m = torch.logaddexp(log_q + math.log(JS_BETA), log_p + math.log(1 - JS_BETA))
        parts = [F.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_q, log_p)]
        return JS_BETA * parts[0] + (1 - JS_BETA) * parts[1]

    return loss


def load_fused(divergence: str) -> Loss:
    """This project's."""
    from hf_minitron import fused_linear_kd

    def loss(heads: Heads) -> Tensor:
        ones = torch.ones(len(heads.student_hidden), device=heads.student_hidden.device)
        return fused_linear_kd(*heads, ones, divergence=divergence, js_beta=JS_BETA).loss / len(ones)

    return loss


def load_trl(divergence: str) -> Loss:
    """The tiled divergence of TRL's DistillationTrainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = _interpolation(divergence)

    def loss(heads: Heads) -> Tensor:
        student_hidden, student_weight, teacher_hidden, teacher_weight = heads
        divergences, _ = ChunkedDivergenceFunction.apply(
            student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, beta
        )
        return divergences.mean()

    return loss


def load_liger(divergence: str, chunk_size: int) -> Loss:
    """Liger's chunked loss in plain torch, compiled, as it is by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(0.0, 1.0, _interpolation(divergence), chunk_size=chunk_size)

    def loss(heads: Heads) -> Tensor:
        targets = torch.zeros(len(heads.student_hidden), dtype=torch.long, device=heads.student_hidden.device)
        return fused(*heads, targets)

    return loss


def load_torchtune(divergence: str) -> Loss:
    """torchtune's loss over logits in eight chunks. Its forward KL leaves out the teacher's entropy."""
    from torchtune.modules import loss as losses

    names = {"forward_kl": "ForwardKLWithChunkedOutputLoss", "reverse_kl": "ReverseKLWithChunkedOutputLoss"}
    if divergence not in names:
        raise Unsupported(f"no divergence {divergence}")
    chunked = getattr(losses, names[divergence])()

    def loss(heads: Heads) -> Tensor:
        labels = torch.zeros(1, len(heads.student_hidden), dtype=torch.long, device=heads.student_hidden.device)
        count = chunked.num_output_chunks
        student = [rows @ heads.student_weight.t() for rows in heads.student_hidden[None].chunk(count, dim=1)]
        with torch.no_grad():
            teacher = [rows @ heads.teacher_weight.t() for rows in heads.teacher_hidden[None].chunk(count, dim=1)]
        return chunked(student, teacher, labels)

    return loss


def _interpolation(divergence: str) -> float:
    """TRL's and Liger's beta: 0 is the forward KL, 1 the reverse."""
    betas = {"forward_kl": 0.0, "js": JS_BETA, "reverse_kl": 1.0}
    if divergence not in betas:
        raise Unsupported(f"no divergence {divergence}")
    return betas[divergence]


METHODS: dict[str, Callable[[str], Loss]] = {
    "naive": load_naive,
    "hf-minitron": load_fused,
    "trl": load_trl,
    "liger": lambda divergence: load_liger(divergence, chunk_size=1024),
    "liger-256": lambda divergence: load_liger(divergence, chunk_size=256),
    "torchtune": load_torchtune,
}
