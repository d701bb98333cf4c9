"""The distillation loss against a teacher of whom only the k most likely tokens and the mass of all others are known.

The others are one bucket, for teacher and student alike, so that both are whole distributions over k + 1 events and
the divergence is a real KL: never negative, and the full one where k is the vocabulary. As in kd_head.py the gradient
is computed in the forward, chunk of tokens by chunk of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill.divergences import transformed
from hf_minitron.distill.kd_head import KDOutput
from hf_minitron.distill.kd_inputs import Model, tokens_per_chunk, used_tokens
from hf_minitron.distill.kd_products import Head, multiply_, precise_dtype

FP16_ROOM = 2.0**15  # half of what fp16 can count to


def fused_linear_topk_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
    tail_mass: Tensor,
    token_weight: Tensor,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    student_transform: LogitTransform | None = None,
    vocab_limit: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> KDOutput:
    """Forward KL(teacher || student) over the teacher's k kept tokens and one bucket of all others.

    loss = sum_n token_weight_n * (KL_n + ce_weight * CE_n), KL_n = sum over kept i of p_i log(p_i / q_i) +
    p_rest log(p_rest / q_rest), where q_rest is the mass that the student gives to all tokens that are not kept. By the
    log-sum inequality it is at most the full KL; with k = V it equals it. Rounded log-probabilities do not sum to 1:
    they are divided by their sum and the tail first.

    Shapes: student_hidden [N, H], student_weight [V, H], student_bias [V], token_ids [N, k] (integers, most likely
    first), log_probs [N, k], tail_mass [N], token_weight [N], labels [N] (already shifted). A token is skipped when its
    weight is 0 or its label -100. `vocab_limit` uses only the first rows of the head: the entries that the teacher's
    distribution is over. `student_transform` is what the student does to its head's output.

    Only temperature 1 exists here. At another one the teacher's probabilities are p_i^(1/T) / sum_j p_j^(1/T), and the
    sum over the tail's single tokens is not known from their mass: ValueError. The teacher's cross-entropy is not known
    either, so `teacher_token_ce` is None. Logits are fp32 (fp64 for fp64 inputs).
    """
    token_ids = token_ids.long()
    if temperature != 1:
        raise ValueError(
            f"temperature={temperature}: a top-k cache holds the mass of the tail, not its tokens, so the teacher's "
            "distribution at another temperature is unknown. Use 1.0, or an exact cache."
        )
    if not ce_weight >= 0 or (ce_weight and labels is None):
        raise ValueError(f"{ce_weight=} must not be negative, and above 0 it needs labels. Use 0.0 for the KL alone.")
    vocab_size = _vocab_size(student_weight, vocab_limit)
    _check_shapes(student_hidden, student_weight, token_ids, log_probs, tail_mass, token_weight, labels)
    used = used_tokens(token_weight, labels, vocab_size)
    _check_ids(token_ids[used], vocab_size)
    work = _Work(
        token_ids,
        log_probs.detach(),
        tail_mass.detach(),
        token_weight.detach(),
        labels,
        used,
        ce_weight,
        student_transform or LogitTransform(),
        vocab_size,
        tokens_per_chunk(chunk_size, vocab_size, student_hidden.device),
        torch.is_grad_enabled(),
    )
    loss, token_loss, kl, ce, agreement = _FusedTopK.apply(student_hidden, student_weight, student_bias, work)
    mask = torch.zeros_like(token_weight, dtype=torch.bool).index_fill_(0, used, True)
    return KDOutput(
        loss=loss,
        token_loss=token_loss,
        token_kl=kl,
        token_ce=None if labels is None else ce,
        teacher_token_ce=None,
        top1_agreement=agreement,
        token_mask=mask,
        num_tokens=len(used),
    )


@dataclass
class _Work:
    """All that the computation takes besides the student's tensors."""

    token_ids: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    token_weight: Tensor
    labels: Tensor | None
    used: Tensor
    ce_weight: float
    transform: LogitTransform
    vocab_size: int
    chunk_size: int
    grad_enabled: bool

    def teacher_log_probs(self, tokens: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
        """log p of the kept tokens [n, k] and of the rest [n], normalised together."""
        kept, rest = self.log_probs[tokens].to(precise), self.tail_mass[tokens].to(precise).log()
        total = torch.logaddexp(kept.logsumexp(-1), rest)
        return kept - total.unsqueeze(-1), rest - total

    def gradient_unit(self, weights: Tensor, operand: torch.dtype) -> float:
        """What the gradient by the logits is counted in for the products: fp16 loses what is below 6e-8."""
        if operand != torch.float16 or not len(weights):
            return 1.0
        largest = weights.abs().amax().item() * (1 + self.ce_weight) * self.transform.scale
        return 2.0 ** math.ceil(math.log2(largest / FP16_ROOM)) if largest else 1.0


class _FusedTopK(torch.autograd.Function):
    """Computes loss and gradients together; backward only multiplies by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        needed = [work.grad_enabled and needs for needs in ctx.needs_input_grad[:3]]
        precise = precise_dtype(hidden, weight)
        head = Head(Model(hidden, weight, bias), work.vocab_size, precise)
        token_weight = work.token_weight.to(precise)
        unit = work.gradient_unit(token_weight[work.used], head.dtype)
        token_loss, kl, ce = token_weight.new_zeros(3, len(token_weight)).unbind()
        agreement = torch.zeros_like(token_weight, dtype=torch.bool)
        student = (hidden, weight, bias)
        sums = [torch.zeros_like(t, dtype=precise) if n else None for t, n in zip(student, needed, strict=True)]
        buffer = token_weight.new_empty(min(work.chunk_size, len(work.used)), work.vocab_size)
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in work.used.split(work.chunk_size) if len(work.used) else ():
                rows = head.rows(tokens)
                logits = head.project(rows, out=buffer[: len(tokens)])
                agreement[tokens] = logits.argmax(-1) == work.token_ids[tokens, 0]
                kl[tokens], ce[tokens], grad = _token_losses(logits, tokens, work, any(needed))
                if grad is not None:
                    grad = grad.mul_((token_weight[tokens] / unit).unsqueeze(-1)).to(head.dtype)
                    _add_gradients(sums, head, tokens, rows, grad)
        torch.add(kl, ce, alpha=work.ce_weight, out=token_loss)
        ctx.save_for_backward(*sums)
        ctx.unit, ctx.dtypes = unit, [None if tensor is None else tensor.dtype for tensor in student]
        ctx.mark_non_differentiable(token_loss, kl, ce, agreement)
        return (token_weight[work.used] * token_loss[work.used]).sum(), token_loss, kl, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        factor = grad_loss * ctx.unit
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else (grad * factor).to(dtype) for grad, dtype in pairs), None


def _add_gradients(sums: list[Tensor | None], head: Head, tokens: Tensor, rows: Tensor, grad: Tensor) -> None:
    """Adds a chunk's to those by hidden states, weight and bias, from that by the head's output [n, V]."""
    hidden, weight, bias = sums
    if hidden is not None:
        hidden[tokens] = head.pull_back(grad)
    if weight is not None:
        multiply_(weight[: grad.shape[1]], grad.t(), rows, beta=1)
    if bias is not None:
        bias[: grad.shape[1]] += grad.sum(0, dtype=bias.dtype)


def _token_losses(
    logits: Tensor, tokens: Tensor, work: _Work, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL and CE of a chunk, [n] each, and the gradient of KL + ce_weight * CE by the head's output, `logits` [n, V].

    By a kept token's logit the KL's derivative is q_i - p_i; by any other's, r_j (q_rest - p_rest), where r is the
    student's softmax among those others. Overwrites `logits`.
    """
    ids = work.token_ids[tokens]
    teacher_kept, teacher_rest = work.teacher_log_probs(tokens, logits.dtype)
    labels = None if work.labels is None else work.labels[tokens].unsqueeze(-1)
    logits, cap = transformed(logits, work.transform), work.transform.softcap
    slope = 1 - (logits / cap).square_() if cap is not None and needs_grad else None
    label_logit = None if labels is None else logits.gather(-1, labels).squeeze(-1)
    kept = logits.gather(-1, ids)
    logits.scatter_(-1, ids, -torch.inf)
    rest = logits.logsumexp(-1)  # -inf when all tokens are kept
    total = torch.logaddexp(kept.logsumexp(-1), rest)
    student_kept, student_rest = kept - total.unsqueeze(-1), rest - total
    kl = _kl_terms(teacher_kept, student_kept).sum(-1) + _kl_terms(teacher_rest, student_rest)
    ce = torch.zeros_like(kl) if label_logit is None else total - label_logit
    if not needs_grad:
        return kl, ce, None
    student_share = 1 + work.ce_weight
    grad = logits.sub_(rest.nan_to_num(neginf=0.0).unsqueeze(-1)).exp_()
    grad.mul_((student_share * student_rest.exp() - teacher_rest.exp()).unsqueeze(-1))
    grad.scatter_(-1, ids, student_share * student_kept.exp() - teacher_kept.exp())
    if work.ce_weight:
        grad.scatter_add_(-1, labels, torch.full_like(labels, -work.ce_weight, dtype=grad.dtype))
    if slope is not None:
        grad.mul_(slope)
    return kl, ce, grad.mul_(work.transform.scale) if work.transform.scale != 1 else grad


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) - p + q, elementwise: it sums to the KL of whole distributions, and no term is negative.

    Between near neighbours the difference of p and q is taken by expm1, which keeps digits that a subtraction loses.
    """
    p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
    near = p * (ratio.expm1() - ratio)
    far = q - p - p * ratio
    terms = torch.where(ratio.abs() < 0.5, near, far).clamp_(min=0)  # what rounding makes of zero
    return torch.where(p > 0, terms, q)


def _vocab_size(weight: Tensor, vocab_limit: int | None) -> int:
    if vocab_limit is not None and not 1 <= vocab_limit <= len(weight):
        raise ValueError(f"vocab_limit={vocab_limit} is not between 1 and {len(weight)}, the rows of the head.")
    return len(weight) if vocab_limit is None else vocab_limit


def _check_ids(token_ids: Tensor, vocab_size: int) -> None:
    if token_ids.numel():
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token_ids range from {low} to {high}, outside the vocabulary of {vocab_size}. Raise vocab_limit, or "
                "use the teacher's tokenizer."
            )


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
    tail_mass: Tensor,
    token_weight: Tensor,
    labels: Tensor | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"student_hidden {tuple(hidden.shape)} and student_weight {tuple(weight.shape)} do not fit: expected "
            "[tokens, hidden] and [vocabulary, hidden]. Flatten batch and sequence into one axis."
        )
    count = (len(hidden),)
    shapes = {"token_ids": (*count, token_ids.shape[-1]), "log_probs": token_ids.shape}
    shapes |= {"tail_mass": count, "token_weight": count, "labels": count}
    given = {"token_ids": token_ids, "log_probs": log_probs, "tail_mass": tail_mass, "token_weight": token_weight}
    for name, tensor in (given | ({} if labels is None else {"labels": labels})).items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but with {count[0]} tokens of student_hidden and token_ids "
                f"{tuple(token_ids.shape)} it must have {tuple(shapes[name])}."
            )
