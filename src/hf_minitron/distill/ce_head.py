"""The language-model loss over hidden states: cross-entropy of a head, whose logits are never made whole.

As in kd_head.py the gradient is computed in the forward, chunk of tokens by chunk of tokens over the full vocabulary,
and the head is projected once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill.divergences import rows_per_block, through_transform, transformed
from hf_minitron.distill.kd_inputs import Model, check_shapes, tokens_per_chunk, used_rows, used_tokens
from hf_minitron.distill.kd_products import Head, HeadGradients, gradient_unit, precise_dtype, scaled_gradients


@dataclass
class CEOutput:
    """What `fused_linear_ce` measured. Per-token tensors have shape [N] and are 0 (False) at skipped tokens."""

    loss: Tensor
    """Scalar: sum over tokens of token_weight * token_ce. Only this is differentiable."""
    token_ce: Tensor
    """The cross-entropy of every token in nats, without token_weight."""
    token_mask: Tensor
    """Bool: the token was used, that is not skipped."""
    num_tokens: int
    """How many tokens were used."""


def fused_linear_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    vocab_limit: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> CEOutput:
    """The cross-entropy of a language-model head, summed over weighted tokens: P1's L_CLM (arXiv 2407.14679).

    Shapes: hidden [N, H], weight [V, H], bias [V], labels [N] (the token that follows, already shifted), token_weight
    [N]. A token is skipped when its token_weight is 0 or its label is -100. `transform`, `vocab_limit` and `chunk_size`
    are as in `fused_linear_kd`, and so is the precision: logits in fp32 (fp64 for fp64 inputs), half-precision
    operands, sums in fp32. Raises ValueError for shapes that do not fit together and labels that are no token ids.
    """
    model = Model(hidden, weight, bias)
    check_shapes(model, model, token_weight, labels)
    vocab_size = used_rows(model, model, vocab_limit)
    used = used_tokens(token_weight, labels, vocab_size)
    step = tokens_per_chunk(chunk_size, vocab_size, hidden.device)
    transform = transform or LogitTransform()
    work = _Work(transform, token_weight.detach(), labels, used, vocab_size, step, torch.is_grad_enabled())
    loss, token_ce = _FusedLinearCE.apply(*model, work)
    mask = torch.zeros_like(token_weight, dtype=torch.bool).index_fill_(0, used, True)
    return CEOutput(loss, token_ce, mask, len(used))


class _Work(NamedTuple):
    """All that the computation takes besides the model's tensors, and that gets no gradient."""

    transform: LogitTransform
    token_weight: Tensor
    labels: Tensor
    used: Tensor  # ascending indices of the tokens that count
    vocab_size: int
    chunk_size: int
    grad_enabled: bool


class _FusedLinearCE(torch.autograd.Function):
    """Computes loss and gradients together; backward only multiplies by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        model = Model(hidden, weight, bias)
        head = Head(model, work.vocab_size, precise_dtype(hidden, weight))
        gradients = HeadGradients(model, head, [work.grad_enabled and n for n in ctx.needs_input_grad[:3]])
        token_weight = work.token_weight.to(head.precise)
        unit = gradient_unit(work.token_weight[work.used], head.dtype, work.transform.scale)
        token_ce = torch.zeros_like(token_weight)
        buffer = token_weight.new_empty(min(work.chunk_size, len(work.used)), work.vocab_size)
        grad_buffer = buffer
        if gradients.needed and head.dtype != head.precise:
            grad_buffer = torch.empty_like(buffer, dtype=head.dtype)

        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in work.used.split(work.chunk_size) if len(work.used) else ():
                rows = head.rows(tokens)
                logits = head.project(rows, out=buffer[: len(tokens)])
                grad = grad_buffer[: len(tokens)] if gradients.needed else None
                weights = token_weight[tokens] / unit
                token_ce[tokens] = _cross_entropies_(logits, work.labels[tokens], weights, work.transform, grad)
                if grad is not None:
                    gradients.add(tokens, rows, grad)

        ctx.save_for_backward(*gradients.sums, unit)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in model]
        ctx.mark_non_differentiable(token_ce)
        ctx.set_materialize_grads(False)
        return (token_weight[work.used] * token_ce[work.used]).sum(), token_ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        *gradients, unit = ctx.saved_tensors
        return *scaled_gradients(gradients, ctx.dtypes, grad_loss * unit), None


def _cross_entropies_(
    output: Tensor, labels: Tensor, weight: Tensor, transform: LogitTransform, grad: Tensor | None
) -> Tensor:
    """Of a chunk [n], of the head's output [n, V], which is overwritten; weight * gradient by it goes into `grad`.

    Block of rows by block: on CPU they stay in the cache. `grad` may be `output` itself.
    """
    found = torch.empty_like(weight)
    for start in range(0, len(output), size := rows_per_block(output)):
        rows = slice(start, start + size)
        index = labels[rows, None]
        raw = output[rows]
        logits = transformed(raw, transform)  # raw itself, if the model leaves it as it is
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, index) - top
        exponentials = torch.exp(logits.sub_(top), out=logits)
        total = exponentials.sum(-1, keepdim=True)
        found[rows] = (total.log() - chosen).squeeze(-1)
        if grad is not None:
            by_logits = exponentials.div_(total).scatter_add_(-1, index, torch.full_like(chosen, -1.0))
            torch.mul(through_transform(by_logits, raw, transform), weight[rows, None], out=grad[rows])
    return found
