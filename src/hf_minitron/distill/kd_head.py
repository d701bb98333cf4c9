"""Distillation losses over hidden states: the two language-model heads and the divergence between them, fused.

The logits of a 128k vocabulary are the largest tensors of a distillation step, so they are never made whole. The
gradient is computed in the forward pass, chunk of tokens by chunk of tokens over the full vocabulary, and only the
gradients of the hidden states and of the head survive a chunk. Each head is projected once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100
CPU_CHUNK = 256
CUDA_CHUNK = 2048
CUDA_MEMORY_SHARE = 0.05  # of the device's whole memory, for one chunk's buffers
LIVE_BUFFERS = 5  # chunk x vocabulary buffers alive at the peak: both logits and three temporaries


@dataclass
class KDOutput:
    """What `fused_linear_kd` measured. Per-token tensors have shape [N] and are 0 (False) at skipped tokens.

    Only `loss` is differentiable. All values are in nats, in fp32 (fp64 when the inputs are).
    """

    loss: Tensor
    """Scalar: sum over tokens of token_weight * (T^2 * KL_T + ce_weight * CE)."""
    token_kl: Tensor
    """KL(teacher || student) at temperature T, without token_weight and without T^2."""
    token_ce: Tensor | None
    """The student's cross-entropy at temperature 1, or None without labels."""
    teacher_token_ce: Tensor | None
    """The teacher's cross-entropy at temperature 1, or None without labels."""
    top1_agreement: Tensor
    """Bool: student and teacher have the same most likely token."""
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
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    vocab_limit: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> KDOutput:
    """Forward KL(teacher || student) between two heads, summed over the vocabulary and over weighted tokens.

    loss = sum_n token_weight_n * (T^2 * KL_T,n + ce_weight * CE_n), with the KL at temperature T and the
    cross-entropy at temperature 1. P2 (arXiv 2408.11796) distils with the KL alone at temperature 1;
    `ce_weight` adds P1's L_CLM (arXiv 2407.14679, section 3). T^2 (Hinton et al. 2015) is in the value and so in the
    gradient. Divide `token_weight`, or the loss, by the number of tokens for a mean.

    Shapes: student_hidden [N, Hs], student_weight [V, Hs], teacher_hidden [N, Ht], teacher_weight [V, Ht],
    token_weight [N], labels [N] (the token that follows, already shifted). The teacher gets no gradient.

    A token is skipped, whatever its hidden states hold, when its token_weight is 0 or its label is -100: without a
    target its cross-entropy has no meaning. `vocab_limit` uses only the first rows of both heads and renormalises
    over them, for vocabularies padded to different sizes. `chunk_size` tokens are projected at a time; "auto" is
    256 on CPU, and up to 2048 on CUDA as far as 5 % of the device's memory hold (of all memory, not of what is free,
    so that the same run always sums in the same order).

    Logits are fp32 (fp64 for fp64 inputs) and never rounded: half-precision operands are multiplied into fp32 on
    CUDA and upcast elsewhere. Under CUDA autocast fp32 heads are multiplied in the autocast dtype, again into fp32.
    The head's gradient is accumulated in fp32. Raises ValueError for shapes that do not fit together.
    """
    _check_shapes(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, labels)
    vocab_size = _check_vocabulary(student_weight, teacher_weight, vocab_limit)
    _check_options(temperature, ce_weight, labels)
    kept = _kept_tokens(token_weight, labels, vocab_size)
    step = _chunk_size(chunk_size, vocab_size, student_hidden.device)
    precise = _accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    options = _Options(kept, labels, temperature, ce_weight, vocab_size, step, precise, torch.is_grad_enabled())
    loss, kl, ce, teacher_ce, agreement = _FusedLinearKD.apply(
        student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), token_weight.detach(), options
    )
    token_mask = torch.zeros_like(token_weight, dtype=torch.bool).index_fill_(0, kept, True)
    return KDOutput(loss, kl, ce, teacher_ce, agreement, token_mask, kept.numel())


@dataclass
class _Options:
    kept: Tensor  # ascending indices of the tokens used
    labels: Tensor | None
    temperature: float
    ce_weight: float
    vocab_size: int
    chunk_size: int
    precise: torch.dtype
    grad_enabled: bool


class _FusedLinearKD(torch.autograd.Function):
    """Computes loss and gradients together; backward only multiplies by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weight: Tensor,
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight = (options.grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        student_head = _operand(student_weight[: options.vocab_size], options.precise)
        teacher_head = _operand(teacher_weight[: options.vocab_size], options.precise)
        weight = token_weight.to(options.precise)
        kl, ce, teacher_ce = weight.new_zeros(3, len(weight)).unbind()
        agreement = torch.zeros_like(weight, dtype=torch.bool)
        grad_hidden = torch.zeros_like(student_hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(student_weight, dtype=options.precise) if needs_weight else None

        with torch.autocast(student_hidden.device.type, enabled=False):
            for tokens in options.kept.split(options.chunk_size):
                student_rows = student_hidden[tokens].to(student_head.dtype)
                student_logits = _project(student_rows, student_head, options.precise)
                teacher_logits = _project(teacher_hidden[tokens].to(teacher_head.dtype), teacher_head, options.precise)
                agreement[tokens] = student_logits.argmax(-1) == teacher_logits.argmax(-1)
                labels = None if options.labels is None else options.labels[tokens].unsqueeze(-1)
                if labels is not None:
                    ce[tokens] = _cross_entropy(student_logits, labels)
                    teacher_ce[tokens] = _cross_entropy(teacher_logits, labels)
                needs_grad = needs_hidden or needs_weight
                kl[tokens], logit_grad = _divergence(student_logits, teacher_logits, labels, options, needs_grad)
                del student_logits, teacher_logits
                if logit_grad is not None:
                    logit_grad = logit_grad.mul_(weight[tokens].unsqueeze(-1)).to(student_head.dtype)
                if needs_hidden:
                    grad_hidden[tokens] = (logit_grad @ student_head).to(grad_hidden.dtype)
                if needs_weight:
                    _accumulate(grad_weight[: options.vocab_size], logit_grad, student_rows)
                del logit_grad

        ctx.save_for_backward(grad_hidden, grad_weight)  # freed by autograd before the backbone's backward
        ctx.weight_dtype = student_weight.dtype
        used = options.kept
        loss = (weight[used] * (options.temperature**2 * kl[used] + options.ce_weight * ce[used])).sum()
        if options.labels is None:
            ctx.mark_non_differentiable(kl, agreement)
            return loss, kl, None, None, agreement
        ctx.mark_non_differentiable(kl, ce, teacher_ce, agreement)
        return loss, kl, ce, teacher_ce, agreement

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_loss, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_loss, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _divergence(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: _Options, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL of a chunk [n], and the gradient of T^2 * KL + ce_weight * CE by the student's logits [n, V].

    Overwrites both logits [n, V]. The sum over the vocabulary is torch's tree reduction: a matrix product drifts by
    3e-5 over 128k terms.
    """
    temperature = options.temperature
    student_log = _log_softmax_(student.div_(temperature))
    teacher_log = _log_softmax_(teacher.div_(temperature))
    teacher_prob = teacher_log.exp()
    kl = teacher_log.sub_(student_log).mul_(teacher_prob).sum(-1)
    if not needs_grad:
        return kl, None
    grad = (student_log.exp() if options.ce_weight else student_log.exp_()).sub_(teacher_prob).mul_(temperature)
    if options.ce_weight:
        plain = _log_softmax_(student_log.mul_(temperature)).exp_()  # the student at temperature 1
        grad.add_(plain, alpha=options.ce_weight)
        grad.scatter_add_(-1, labels, torch.full_like(labels, -options.ce_weight, dtype=grad.dtype))
    return kl, grad


def _project(hidden: Tensor, weight: Tensor, precise: torch.dtype) -> Tensor:
    """Logits [n, V] in `precise`. A head's bias and soft-capping belong here."""
    if weight.dtype == precise:
        return hidden @ weight.t()
    return torch.mm(hidden, weight.t(), out_dtype=precise)


def _accumulate(grad_weight: Tensor, logit_grad: Tensor, hidden: Tensor) -> None:
    """grad_weight [V, H] += logit_grad^T [V, n] @ hidden [n, H], without rounding the sum."""
    if hidden.dtype == grad_weight.dtype:
        grad_weight.addmm_(logit_grad.t(), hidden)
    else:
        grad_weight.add_(torch.mm(logit_grad.t(), hidden, out_dtype=grad_weight.dtype))


def _operand(weight: Tensor, precise: torch.dtype) -> Tensor:
    """The head as the matrix products take it: half precision on CUDA if it is so or autocast says so."""
    if weight.is_cuda and precise == torch.float32:
        if weight.dtype in (torch.bfloat16, torch.float16):
            return weight
        if torch.is_autocast_enabled("cuda"):
            return weight.to(torch.get_autocast_dtype("cuda"))
    return weight.to(precise)


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, labels).squeeze(-1)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, with no buffer but the result; the stored gradient stays for another backward."""
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _kept_tokens(token_weight: Tensor, labels: Tensor | None, vocab_size: int) -> Tensor:
    kept = token_weight != 0
    if labels is None:
        return kept.nonzero().squeeze(-1)
    kept = (kept & (labels != IGNORE_INDEX)).nonzero().squeeze(-1)
    if kept.numel():
        low, high = (int(bound) for bound in labels[kept].aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"labels range from {low} to {high}, outside the vocabulary of {vocab_size}: a label is a token id. "
                "Raise vocab_limit, or set the label to -100 to skip the token."
            )
    return kept


def _chunk_size(chunk_size: int | str, vocab_size: int, device: torch.device) -> int:
    if chunk_size != "auto":
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f'chunk_size={chunk_size!r} is not a number of tokens: use 1 or more, or "auto".')
        return chunk_size
    if device.type != "cuda":
        return CPU_CHUNK
    budget = CUDA_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    return max(64, min(CUDA_CHUNK, int(budget // (LIVE_BUFFERS * 4 * vocab_size)) // 64 * 64))


def _check_shapes(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    labels: Tensor | None,
) -> None:
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}_hidden {tuple(hidden.shape)} and {name}_weight {tuple(weight.shape)} do not fit: expected "
                "[tokens, hidden] and [vocabulary, hidden]. Flatten batch and sequence into one axis."
            )
    count = student_hidden.shape[0]
    for name, tensor in (("teacher_hidden", teacher_hidden), ("token_weight", token_weight), ("labels", labels)):
        if tensor is not None and (tensor.shape[0] != count or (name != "teacher_hidden" and tensor.dim() != 1)):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but student_hidden has {count} tokens: all of them need one "
                "entry per token."
            )


def _check_vocabulary(student_weight: Tensor, teacher_weight: Tensor, vocab_limit: int | None) -> int:
    student, teacher = student_weight.shape[0], teacher_weight.shape[0]
    if vocab_limit is None:
        if student != teacher:
            raise ValueError(
                f"The student's head has {student} rows and the teacher's {teacher}: the KL needs one vocabulary. If "
                f"only the padding differs, pass vocab_limit=the tokenizer's length, at most {min(student, teacher)}."
            )
        return student
    if not 1 <= vocab_limit <= min(student, teacher):
        raise ValueError(
            f"vocab_limit={vocab_limit} is not between 1 and {min(student, teacher)}: it counts rows that both heads "
            f"have (student {student}, teacher {teacher}). Use the tokenizer's length."
        )
    return vocab_limit


def _check_options(temperature: float, ce_weight: float, labels: Tensor | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not above 0: logits are divided by it. Use 1.0, as P2 does.")
    if not ce_weight >= 0:
        raise ValueError(f"ce_weight={ce_weight} is negative: it weighs a loss. Use 0.0 for the KL alone.")
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} needs labels: the cross-entropy has no targets. Pass labels=.")
