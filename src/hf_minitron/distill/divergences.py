"""The loss of one token and its gradient by the student's logits: the row math of `fused_linear_kd`, in plain torch.

This is the reference that the Triton kernel (`kd_kernels.py`) is tested against, and what runs without one. It works on
a few rows of logits at a time, so that on CPU its temporaries stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hf_minitron.architectures import LogitTransform

Divergence = Literal["forward_kl", "reverse_kl", "js", "mse", "cosine"]
ON_LOGITS = ("mse", "cosine")  # divergences that have no temperature
CPU_BLOCK = 2**18  # logits per thread and block of rows: a megabyte in fp32
CUDA_BLOCK = 2**24
SMALLEST_NORM = 1e-8  # what the cosine divides by at least


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a token: scale * divergence + ce_weight * CE, of logits z_s and z_t after their models' transforms.

    With p = softmax(z_s / T) the student's distribution at temperature T, and q = softmax(z_t / T) the teacher's:

        forward_kl  KL(q || p) = sum_v q log(q / p): what both papers distil with
        reverse_kl  KL(p || q) = sum_v p log(p / q)
        js          b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, b = js_beta: the generalized
                    Jensen-Shannon divergence of GKD (Agarwal et al., arXiv 2306.13649). js / b tends to forward_kl as
                    b tends to 0, js / (1 - b) to reverse_kl as b tends to 1; at 0 and 1 itself it vanishes
        mse         mean_v (z_s - z_t)^2
        cosine      1 - z_s . z_t / (|z_s| |z_t|)

    `scale` is T^2 for the divergences of distributions (Hinton et al. 2015), in the value and so in the gradient. The
    last two compare logits and have no temperature: P1's ablation (arXiv 2407.14679, Table 15) names such losses, these
    formulas are ours. CE is the student's cross-entropy at temperature 1.

    Raises ValueError for settings that mean nothing.
    """

    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    ce_weight: float = 0.0
    js_beta: float = 0.5
    student_transform: LogitTransform = field(default_factory=LogitTransform)
    teacher_transform: LogitTransform = field(default_factory=LogitTransform)

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(
                f"divergence={self.divergence!r} is unknown. Use one of {', '.join(get_args(Divergence))}."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} is not a finite number above 0: logits are divided by it. Use 1.0."
            )
        if self.divergence in ON_LOGITS and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} has no effect on divergence={self.divergence!r}, which compares "
                "logits. Use 1.0."
            )
        if not 0 <= self.ce_weight < math.inf:
            raise ValueError(f"ce_weight={self.ce_weight} is not a finite weight of 0 or more. Use 0.0 for none.")
        if not 0 < self.js_beta < 1:
            raise ValueError(
                f"js_beta={self.js_beta} is not between 0 and 1, where the Jensen-Shannon divergence is not 0 for all. "
                'Use divergence="forward_kl" for its limit at 0, "reverse_kl" for that at 1.'
            )

    @property
    def scale(self) -> float:
        """What the divergence is multiplied by."""
        return 1.0 if self.divergence in ON_LOGITS else self.temperature**2


class TokenValues(NamedTuple):
    """Of every token, [n] each, without token weights. In nats, but for mse and cosine."""

    loss: Tensor
    """scale * divergence + ce_weight * CE."""
    kl: Tensor
    """KL(teacher || student) at temperature T, whatever the divergence; not multiplied by T^2."""
    ce: Tensor
    """The student's cross-entropy at temperature 1; 0 without labels."""
    teacher_ce: Tensor
    """The teacher's."""
    agreement: Tensor
    """Bool: some token is the most likely one of both models."""


def token_losses_(
    settings: TokenLoss,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    grad: Tensor | None,
) -> TokenValues:
    """Values of a chunk, block of rows by block; writes weight * gradient into `grad`, if there is one.

    student, teacher [n, V]: the heads' outputs before the models' transforms, fp32 or fp64. labels, weight [n].
    grad [n, V]: by `student`; may be `student` itself, and of lower precision, to which it is rounded last.
    """
    count, block = len(student), rows_per_block(student)
    values = TokenValues(*student.new_zeros(4, count), torch.zeros(count, dtype=torch.bool, device=student.device))
    scratch = student.new_empty(5, min(block, count), student.shape[1])
    for start in range(0, count, block):
        rows = slice(start, start + block)
        targets = None if labels is None else labels[rows]
        buffers = scratch[:, : len(student[rows])].unbind()
        found, by_logits = token_losses(settings, student[rows], teacher[rows], targets, grad is not None, buffers)
        if by_logits is not None:
            torch.mul(by_logits, weight[rows].unsqueeze(-1), out=grad[rows])
        for every, of_block in zip(values, found, strict=True):
            every[rows] = of_block
    return values


def token_losses(
    settings: TokenLoss,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    needs_grad: bool,
    scratch: Sequence[Tensor | None] = (None,) * 5,
) -> tuple[TokenValues, Tensor | None]:
    """Values [n], and the gradient of `loss` by `student` [n, V] if needed. Leaves both logits as they are.

    `scratch` is memory for what has the size of the logits, [n, V] each, and is overwritten: were it new for every few
    rows, a third of the time would go into fetching it from the system. The gradient may lie in it.

    Sums over the vocabulary are torch's tree reductions: a matrix product drifts by 3e-5 over 128k terms.
    """
    head_output, spare = student, scratch[4]
    student = transformed(student, settings.student_transform)
    teacher = transformed(teacher, settings.teacher_transform)
    p = _softmax(student, settings.temperature, *scratch[:2])
    q = _softmax(teacher, settings.temperature, *scratch[2:4])
    # Both are 0 at the most likely token, and negative elsewhere.
    agreement = torch.add(p.shifted, q.shifted, out=spare).amax(-1) == 0
    ce = teacher_ce = torch.zeros_like(agreement, dtype=student.dtype)
    if labels is not None:
        ce = _cross_entropy(student, p, labels, settings.temperature)
        teacher_ce = _cross_entropy(teacher, q, labels, settings.temperature)
    gap = q.shifted.sub_(p.shifted).add_(p.log_sum - q.log_sum)
    kl = torch.mul(q.probability, gap, out=spare).sum(-1)
    pair = _Pair(student, teacher, p.probability, q.probability, gap, spare)
    divergence, differentiate = _DIVERGENCES[settings.divergence](pair, kl, settings)
    loss = settings.scale * divergence
    if settings.ce_weight:
        loss = loss + settings.ce_weight * ce
    values = TokenValues(loss, kl, ce, teacher_ce, agreement)
    if not needs_grad:
        return values, None
    grad = differentiate()
    if settings.scale != 1:
        grad.mul_(settings.temperature)
    if settings.ce_weight:
        plain = p if settings.temperature == 1 else _softmax(student, 1.0, *scratch[:2])
        grad.add_(plain.probability, alpha=settings.ce_weight)
        grad.scatter_add_(-1, labels[:, None], grad.new_full((len(grad), 1), -settings.ce_weight))
    return values, through_transform(grad, head_output, settings.student_transform)


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    """Logits as the model has them, from its head's output: itself, if the model leaves it as it is."""
    if transform.scale != 1:
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = (logits / transform.softcap).tanh_().mul_(transform.softcap)
    return logits


class _Pair(NamedTuple):
    """What a divergence is computed from, [n, V] each: logits, distributions, gap = log(q / p), and scratch memory."""

    student: Tensor
    teacher: Tensor
    p: Tensor
    q: Tensor
    gap: Tensor
    spare: Tensor | None


# Each returns the divergence [n], and what gives its gradient [n, V]: by z_s / T, or by z_s where there is no
# temperature. It may overwrite the gap, q and what is spare, but not p.
_Divergence = tuple[Tensor, Callable[[], Tensor]]


def _forward_kl(pair: _Pair, kl: Tensor, settings: TokenLoss) -> _Divergence:
    return kl, lambda: torch.sub(pair.p, pair.q, out=pair.gap)


def _reverse_kl(pair: _Pair, kl: Tensor, settings: TokenLoss) -> _Divergence:
    gap = pair.gap.neg_()
    divergence = torch.mul(pair.p, gap, out=pair.spare).sum(-1)
    return divergence, lambda: gap.sub_(divergence[:, None]).mul_(pair.p)


def _jensen_shannon(pair: _Pair, kl: Tensor, settings: TokenLoss) -> _Divergence:
    """By log(p / m) = -log(1 + b (q / p - 1)), which is exact where p = q; beyond e^50 it is linear in the gap."""
    beta = settings.js_beta
    near = pair.gap.clamp(max=50.0)
    beyond = torch.sub(pair.gap, near, out=pair.spare)
    to_mixture = near.expm1_().mul_(beta).log1p_().add_(beyond).neg_()
    student_kl = torch.mul(pair.p, to_mixture, out=pair.spare).sum(-1)
    teacher_kl = pair.gap.add_(to_mixture).mul_(pair.q).sum(-1)
    divergence = (1 - beta) * student_kl + beta * teacher_kl
    return divergence, lambda: to_mixture.sub_(student_kl[:, None]).mul_(pair.p).mul_(1 - beta)


def _mse(pair: _Pair, kl: Tensor, settings: TokenLoss) -> _Divergence:
    difference = torch.sub(pair.student, pair.teacher, out=pair.gap)
    return torch.mul(difference, difference, out=pair.spare).mean(-1), lambda: difference.mul_(2 / difference.shape[-1])


def _cosine(pair: _Pair, kl: Tensor, settings: TokenLoss) -> _Divergence:
    """As half the squared distance of the unit vectors, which has nothing to cancel where they agree."""
    norm = pair.student.norm(dim=-1, keepdim=True).clamp_(min=SMALLEST_NORM)
    direction = pair.student / norm
    difference = direction - pair.teacher / pair.teacher.norm(dim=-1, keepdim=True).clamp_(min=SMALLEST_NORM)
    divergence = difference.square().sum(-1).mul_(0.5)
    return divergence, lambda: difference.sub_(direction.mul_(divergence[:, None])).div_(norm)


_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _jensen_shannon,
    "mse": _mse,
    "cosine": _cosine,
}


def through_transform(grad: Tensor, raw: Tensor, transform: LogitTransform) -> Tensor:
    """The gradient by the head's output, from that by the logits."""
    if transform.softcap is not None:
        tanh = (raw * (transform.scale / transform.softcap)).tanh_()
        grad = grad.mul_(1 - tanh.square_())
    return grad.mul_(transform.scale) if transform.scale != 1 else grad


class _Softmax(NamedTuple):
    """At a temperature T: shifted = z / T - max(z / T), log_sum = log sum exp(shifted), and the probabilities."""

    shifted: Tensor
    log_sum: Tensor  # [n, 1]
    probability: Tensor


def _softmax(
    logits: Tensor, temperature: float, shifted: Tensor | None = None, probability: Tensor | None = None
) -> _Softmax:
    """In the memory given, if any."""
    if temperature != 1:
        logits = torch.div(logits, temperature, out=shifted)
    shifted = torch.sub(logits, logits.amax(-1, keepdim=True), out=shifted)
    exponentials = torch.exp(shifted, out=probability)
    total = exponentials.sum(-1, keepdim=True)
    return _Softmax(shifted, total.log(), exponentials.div_(total))


def _cross_entropy(logits: Tensor, softmax: _Softmax, labels: Tensor, temperature: float) -> Tensor:
    """At temperature 1; the softmax is at `temperature`."""
    index = labels[:, None]
    if temperature == 1:
        return (softmax.log_sum - softmax.shifted.gather(-1, index)).squeeze(-1)
    return logits.logsumexp(-1) - logits.gather(-1, index).squeeze(-1)


def rows_per_block(logits: Tensor) -> int:
    """How many rows of logits [n, V] to work on at a time."""
    block = CUDA_BLOCK if logits.is_cuda else CPU_BLOCK * torch.get_num_threads()
    return max(1, block // logits.shape[-1])
