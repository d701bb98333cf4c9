"""Distillation losses over hidden states: the two language-model heads and the divergence between them, fused.

The logits of a 128k vocabulary are the largest tensors of a distillation step, so they are never made whole. The
gradient is computed in the forward pass, chunk of tokens by chunk of tokens over the full vocabulary, and only the
gradients of the hidden states and of the head survive a chunk. Each head is projected once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill import divergences
from hf_minitron.distill.divergences import ON_LOGITS, Divergence, TokenLoss, TokenValues
from hf_minitron.distill.kd_inputs import Model, check_shapes, tokens_per_chunk, used_rows, used_tokens
from hf_minitron.distill.kd_products import Head, HeadGradients, gradient_unit, precise_dtype, scaled_gradients

OLDEST_FOR_TRITON = (7, 0)  # compute capability


@dataclass
class KDOutput:
    """What `fused_linear_kd` measured. Per-token tensors have shape [N] and are 0 (False) at skipped tokens.

    Only `loss` is differentiable. All values are in fp32 (fp64 when the inputs are), and in nats but for those of
    divergences between logits.
    """

    loss: Tensor
    """Scalar: sum over tokens of token_weight * token_loss."""
    token_loss: Tensor
    """The loss of every token, without token_weight: see `TokenLoss`."""
    token_kl: Tensor
    """KL(teacher || student) at temperature T, whatever the divergence; without token_weight and without T^2."""
    token_ce: Tensor | None
    """The student's cross-entropy at temperature 1, or None without labels."""
    teacher_token_ce: Tensor | None
    """The teacher's cross-entropy at temperature 1, or None without labels."""
    top1_agreement: Tensor
    """Bool: some token is the most likely one of both models."""
    token_mask: Tensor
    """Bool: the token was used, that is not skipped."""
    num_tokens: int
    """How many tokens were used."""

    @property
    def kl_sum(self) -> Tensor:
        return self.token_kl.sum()

    @property
    def ce_sum(self) -> Tensor | None:
        return None if self.token_ce is None else self.token_ce.sum()

    @property
    def teacher_ce_sum(self) -> Tensor | None:
        return None if self.teacher_token_ce is None else self.teacher_token_ce.sum()


def fused_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    *,
    labels: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    js_beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    vocab_limit: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> KDOutput:
    """The divergence between two heads, summed over the vocabulary and over weighted tokens.

    loss = sum_n token_weight_n * (T^2 * D_n + ce_weight * CE_n), with the divergence D at temperature T and the
    cross-entropy at temperature 1; `TokenLoss` has the formulas. P2 (arXiv 2408.11796) distils with the forward KL
    alone at temperature 1; `ce_weight` adds P1's L_CLM (arXiv 2407.14679, section 3). Divide `token_weight`, or the
    loss, by the number of tokens for a mean.

    Shapes: student_hidden [N, Hs], student_weight [V, Hs], student_bias [V], teacher_hidden [N, Ht], teacher_weight
    [V, Ht], teacher_bias [V], token_weight [N], labels [N] (the token that follows, already shifted). The transforms
    are what the models do to their heads' output (`architectures.get_logit_transform`). The teacher gets no gradient.

    A token is skipped, whatever its hidden states hold, when its token_weight is 0 or its label is -100: without a
    target its cross-entropy has no meaning. `vocab_limit` uses only the first rows of both heads and renormalises
    over them, for vocabularies padded to different sizes. `chunk_size` tokens are projected at a time; "auto" is 256
    on CPU, or what a GiB holds, and 1024 on CUDA, or what 5 % of the device's memory hold (of all of it, not of what is
    free, so that the same run always sums in the same order).

    Logits are fp32 (fp64 for fp64 inputs) and never rounded: half-precision operands are multiplied into fp32 on
    CUDA and upcast elsewhere. Only for its two products is the gradient by the logits rounded, on CUDA, to the
    operands' precision. Under CUDA autocast fp32 heads are multiplied in the autocast dtype. Gradients are summed in
    fp32. Raises ValueError for shapes that do not fit together and settings that mean nothing.
    """
    settings = TokenLoss(
        divergence,
        temperature,
        ce_weight,
        js_beta,
        student_transform or LogitTransform(),
        teacher_transform or LogitTransform(),
    )
    student = Model(student_hidden, student_weight, student_bias)
    teacher = Model(teacher_hidden.detach(), teacher_weight.detach(), teacher_bias)
    check_shapes(student, teacher, token_weight, labels)
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} needs labels: the cross-entropy has no targets. Pass labels=.")
    vocab_size = used_rows(student, teacher, vocab_limit)
    used = used_tokens(token_weight, labels, vocab_size)
    step = tokens_per_chunk(chunk_size, vocab_size, student_hidden.device)
    work = _Work(settings, teacher, token_weight.detach(), labels, used, vocab_size, step, torch.is_grad_enabled())
    loss, *found = _FusedLinearKD.apply(*student, work)
    values = TokenValues(*found)
    token_mask = torch.zeros_like(token_weight, dtype=torch.bool).index_fill_(0, used, True)
    ce, teacher_ce = (None, None) if labels is None else (values.ce, values.teacher_ce)
    return KDOutput(loss, values.loss, values.kl, ce, teacher_ce, values.agreement, token_mask, len(used))


class _Work(NamedTuple):
    """All that the computation takes besides the student's tensors, and that gets no gradient."""

    settings: TokenLoss
    teacher: Model
    token_weight: Tensor
    labels: Tensor | None
    used: Tensor  # ascending indices of the tokens that count
    vocab_size: int
    chunk_size: int
    grad_enabled: bool


class _FusedLinearKD(torch.autograd.Function):
    """Computes loss and gradients together; backward only multiplies by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        student = Model(hidden, weight, bias)
        precise = precise_dtype(*student[:2], *work.teacher[:2])
        student_head, teacher_head = (Head(model, work.vocab_size, precise) for model in (student, work.teacher))
        gradients = HeadGradients(student, student_head, [work.grad_enabled and n for n in ctx.needs_input_grad[:3]])
        token_weight = work.token_weight.to(precise)
        unit = gradient_unit(work.token_weight[work.used], student_head.dtype, _largest_gradient(work))
        token_losses_ = _row_math(token_weight)
        values = TokenValues(*token_weight.new_zeros(4, len(hidden)), torch.zeros_like(token_weight, dtype=torch.bool))
        student_buffer, teacher_buffer = token_weight.new_empty(
            2, min(work.chunk_size, len(work.used)), work.vocab_size
        )
        grad_buffer = student_buffer
        if gradients.needed and student_head.dtype != precise:
            grad_buffer = torch.empty_like(student_buffer, dtype=student_head.dtype)

        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in work.used.split(work.chunk_size) if len(work.used) else ():
                rows = student_head.rows(tokens)
                student_logits = student_head.project(rows, out=student_buffer[: len(tokens)])
                teacher_logits = teacher_head.project(teacher_head.rows(tokens), out=teacher_buffer[: len(tokens)])
                labels = None if work.labels is None else work.labels[tokens]
                weight_in_units = token_weight[tokens] / unit
                grad = grad_buffer[: len(tokens)] if gradients.needed else None
                found = token_losses_(work.settings, student_logits, teacher_logits, labels, weight_in_units, grad)
                for every, of_chunk in zip(values, found, strict=True):
                    every[tokens] = of_chunk
                if grad is not None:
                    gradients.add(tokens, rows, grad)

        ctx.save_for_backward(*gradients.sums, unit)  # freed by autograd before the backbone's backward
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in student]
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return (token_weight[work.used] * values.loss[work.used]).sum(), *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        *gradients, unit = ctx.saved_tensors
        return *scaled_gradients(gradients, ctx.dtypes, grad_loss * unit), None


def _row_math(like: Tensor) -> Callable[..., TokenValues]:
    """`token_losses_` for logits on the device and in the dtype of a tensor: the Triton kernel if it can run there."""
    if not like.is_cuda or like.dtype != torch.float32 or find_spec("triton") is None:
        return divergences.token_losses_
    if torch.cuda.get_device_capability(like.device) < OLDEST_FOR_TRITON:
        return divergences.token_losses_
    from hf_minitron.distill import kd_kernels

    return kd_kernels.token_losses_


def _largest_gradient(work: _Work) -> float:
    """About how great an entry of the gradient by the head's output gets, of a token of weight 1."""
    settings = work.settings
    largest = 64 / work.vocab_size if settings.divergence in ON_LOGITS else settings.temperature
    if settings.divergence == "reverse_kl":
        largest *= 32  # p log(p / q), for a token that the teacher thinks impossible
    return settings.student_transform.scale * (largest + settings.ce_weight)
