"""The matrix products of the fused distillation loss: half-precision operands, but fp32 results and sums.

On CUDA half-precision operands are multiplied into fp32 by the product itself. Elsewhere there is no such product, and
they are upcast, the head a block of the vocabulary at a time so that it never exists twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_minitron.distill.kd_inputs import Model

HALF = (torch.bfloat16, torch.float16)
FP16_ROOM = 2.0**15  # half of what fp16 can count to
VOCABULARY_BLOCK = 1024  # rows of a head per thread that are upcast and projected at a time on CPU


class Head:
    """A model's head, its first `vocab_size` rows, as the products with its hidden states take it.

    `dtype` is that of the operands: the weight's where the device multiplies it into `precise`, else `precise` (fp32,
    or fp64). Under CUDA autocast an fp32 head is cast to the autocast dtype.
    """

    def __init__(self, model: Model, vocab_size: int, precise: torch.dtype) -> None:
        self.dtype = _operand_dtype(model, precise)
        self.precise = precise
        self._hidden = model.hidden
        self._weight = model.weight.detach()[:vocab_size]
        self._bias = None if model.bias is None else model.bias.detach()[:vocab_size].to(precise)
        if self._weight.is_cuda:
            self._weight = self._weight.to(self.dtype)
        size = vocab_size if self._weight.is_cuda else VOCABULARY_BLOCK * torch.get_num_threads()
        self._blocks = [slice(start, start + size) for start in range(0, vocab_size, size)]

    def rows(self, tokens: Tensor) -> Tensor:
        """The hidden states of some tokens, [n, H]."""
        return self._hidden[tokens].to(self.dtype)

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden [n, H] times the head, plus its bias, into `out` [n, V], which is `precise`."""
        for block in self._blocks:
            multiply_(out[:, block], hidden, self._weight[block].to(self.dtype).t(), beta=0)
        return out if self._bias is None else out.add_(self._bias)

    def pull_back(self, grad: Tensor) -> Tensor:
        """The gradient by the hidden states [n, H], `precise`, from that by the logits [n, V]."""
        result = grad.new_empty(len(grad), self._weight.shape[1], dtype=self.precise)
        upcast = self._weight.dtype != self.dtype
        for block in self._blocks if upcast else [slice(0, None)]:
            multiply_(result, grad[:, block], self._weight[block].to(self.dtype), beta=int(block.start > 0))
        return result


class HeadGradients:
    """Sums of a loss's gradients by one model's tensors, [hidden, weight, bias], None where nobody needs one."""

    def __init__(self, model: Model, head: Head, needs: list[bool]) -> None:
        self.head = head
        self.needed = any(needs)
        self.sums = [
            torch.zeros_like(tensor, dtype=head.precise) if needed else None
            for tensor, needed in zip(model, needs, strict=True)
        ]

    def add(self, tokens: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Adds a chunk's: `rows` are the hidden states of `tokens`, `grad` [n, V] is by the head's output."""
        hidden, weight, bias = self.sums
        if hidden is not None:
            hidden[tokens] = self.head.pull_back(grad)
        if weight is not None:
            multiply_(weight[: grad.shape[1]], grad.t(), rows, beta=1)
        if bias is not None:
            bias[: grad.shape[1]] += grad.sum(0, dtype=bias.dtype)


def gradient_unit(weights: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """What the gradient by the logits is counted in, for the products; the sums are multiplied by it at the end.

    The greatest token weight, so that a mean over many tokens does not make entries tiny. fp16 loses what is below
    6e-8 and above 65504: there they are moved to the upper end of its range by a power of two. `largest` is about how
    great they get, of a token of weight 1.
    """
    unit = weights.abs().amax() if len(weights) else weights.new_ones(())
    unit = unit.to(torch.promote_types(weights.dtype, torch.float32))
    return unit / 2.0 ** math.floor(math.log2(FP16_ROOM / largest)) if dtype == torch.float16 else unit


def scaled_gradients(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], factor: Tensor
) -> list[Tensor | None]:
    """Each times `factor` in its dtype; in place where that is possible. To be called in a backward pass."""
    in_place = not _graph_is_kept()
    return [_scaled(*pair, factor, in_place) for pair in zip(gradients, dtypes, strict=True)]


def multiply_(out: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """out = beta * out + left @ right, in the precision of `out`, which may hold anything if beta is 0."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)


def precise_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, softmaxes and sums: fp32, or fp64 if any tensor is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _operand_dtype(model: Model, precise: torch.dtype) -> torch.dtype:
    if not model.weight.is_cuda or precise != torch.float32:
        return precise
    if model.weight.dtype in HALF and model.weight.dtype == model.hidden.dtype:
        return model.weight.dtype
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else precise


def _scaled(grad: Tensor | None, dtype: torch.dtype | None, factor: Tensor, in_place: bool) -> Tensor | None:
    """grad * factor in `dtype`, with no buffer but the result, nor with that if `grad` may be it."""
    if grad is None:
        return None
    if in_place and grad.dtype == dtype:
        return grad.mul_(factor)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs was called with retain_graph, so that another may follow."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not public
    return ask is None or ask()
