"""The last norm's gain in refit: one number per channel, fitted so that the small model predicts what the source does.

    c = argmin Σ_t KL(softmax(T(V y_t)) ‖ softmax(T(W (c ∘ x_t))))

x_t and y_t are what the two heads read, W (vocab, d') and V (vocab, d) the heads, T what the family does to logits. A
fit of the logits' squares gives likely and unlikely tokens the same weight and can even harm; this is the loss itself,
convex in c without a cap. Solved by Newton's method with the averaged curvature

    H = E[x xᵀ] ∘ (Wᵀ diag(p̄) W − E[m mᵀ]),   m_t = Wᵀ p_t, p̄ = E[p_t]

FLOPs: 2 n · vocab · (3 d' + d) for n tokens and each of at most ``MAX_STEPS`` steps, n = 20 d' but 1024 to 16384.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_minitron.architectures import LogitTransform
from hf_minitron.prune.replay import LOGIT_BYTES

MAX_STEPS = 6
ENOUGH = 0.005  # a step that gains less than this share of the KL is the last
TOKENS_PER_CHANNEL, LEAST_TOKENS, MOST_TOKENS = 20, 1024, 16384


@dataclass(frozen=True)
class Heads:
    """The two heads, (vocab, d') and (vocab, d), and what both models do to logits."""

    small: Tensor
    big: Tensor
    transform: LogitTransform = field(default_factory=LogitTransform)


@dataclass(frozen=True)
class HeadInputs:
    """What the heads read for the same tokens: ``small`` (n, d') and ``big`` (n, d)."""

    small: Tensor
    big: Tensor


def num_gain_tokens(width: int) -> int:
    """How many tokens the gains of ``width`` channels are fitted to."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, TOKENS_PER_CHANNEL * width))


def fit_gain(heads: Heads, fitted: HeadInputs, held_out: HeadInputs | None, ridge: float) -> tuple[Tensor, dict]:
    """What to multiply every channel of the last norm by, (d',), and the KL in nats on held-out tokens for the lineage.

    It is pulled toward 1 with ``ridge`` times the mean curvature. Where it is not better on the held-out tokens, it is
    all ones.
    """
    gain = _minimize(_Objective(heads, fitted), ridge)
    ones = torch.ones_like(gain)
    if held_out is None:
        return gain, {}
    judge = _Objective(heads, held_out)
    before, after = (judge.measure(candidate) for candidate in (ones, gain))
    if not after <= before:
        return ones, {"before": before, "after": before, "fell_back": True}
    return gain, {"before": before, "after": after}


def _minimize(objective: _Objective, ridge: float) -> Tensor:
    inputs = objective.inputs.small
    gain = torch.ones(inputs.shape[1], device=inputs.device)
    second_moment = (inputs.T @ inputs).double() / len(inputs)
    loss, gradient, spread = objective.differentiate(gain)
    for _ in range(MAX_STEPS):
        curvature = second_moment * spread
        strength = ridge * curvature.diagonal().mean()
        if not strength > 0:
            break
        system = curvature + strength * torch.eye(len(gain), dtype=torch.float64, device=gain.device)
        step = torch.linalg.solve(system, gradient + strength * (gain.double() - 1)).float()
        for share in (1.0, 0.5, 0.25):
            new_loss, gradient, spread = objective.differentiate(gain - share * step)
            if new_loss < loss:
                break
        else:
            break
        gain, loss, gained = gain - share * step, new_loss, loss - new_loss
        if gained < ENOUGH * new_loss:
            break
    return gain


class _Objective:
    """The mean KL(source ‖ small) in nats over tokens, as a function of the gain.

    The source's predictions are computed once, where 256 MB hold them, else again for every chunk of tokens.
    """

    def __init__(self, heads: Heads, inputs: HeadInputs):
        self.heads, self.inputs = heads, inputs
        self._size = max(1, LOGIT_BYTES // (4 * len(heads.small) * 4))  # four such tensors are alive at a time
        holds_all = len(inputs.big) * len(heads.big) * 4 <= LOGIT_BYTES
        self._held = [self._predict(y) for y in inputs.big.split(self._size)] if holds_all else None

    def measure(self, gain: Tensor) -> float:
        """The loss alone."""
        return sum(self._evaluate(x, target, gain)[0] for x, target in self._chunks()) / len(self.inputs.small)

    def differentiate(self, gain: Tensor) -> tuple[float, Tensor, Tensor]:
        """The loss, its gradient (d',), and the mean covariance of the small head's rows as predicted, (d', d')."""
        total, gradient, outer, probability, steepness = 0.0, 0.0, 0.0, 0.0, 0.0
        weight = self.heads.small
        for x, target in self._chunks():
            loss, predicted, slope = self._evaluate(x, target, gain)
            mean_row = predicted @ weight
            total += loss
            steepness += len(x) * float(torch.as_tensor(slope).square().mean())
            gradient = gradient + (x * (((predicted - target[0]) * slope) @ weight)).sum(0).double()
            outer = outer + (mean_row.T @ mean_row).double()
            probability = probability + predicted.sum(0).double()
        count, exact = len(self.inputs.small), weight.double()
        spread = (exact.T * (probability / count)) @ exact - outer / count
        return total / count, gradient / count, steepness / count * spread

    def _chunks(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """By chunk, what the small head reads, and the source's probabilities with their entropy in nats, summed."""
        targets = self._held or (self._predict(y) for y in self.inputs.big.split(self._size))
        return zip(self.inputs.small.split(self._size), targets, strict=True)

    def _predict(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = _transform(y @ self.heads.big.T, self.heads.transform)[0].log_softmax(-1)
        probs = log_probs.exp()
        return probs, -torch.linalg.vecdot(probs, log_probs).double().sum()

    def _evaluate(self, x: Tensor, target: tuple[Tensor, Tensor], gain: Tensor) -> tuple[float, Tensor, Tensor | float]:
        """Summed KL, the small model's probabilities, and the slope of its logits by what the head gives."""
        logits, slope = _transform((x * gain) @ self.heads.small.T, self.heads.transform)
        log_total = logits.logsumexp(-1)
        cross = log_total - torch.linalg.vecdot(target[0], logits)
        return float(cross.double().sum() - target[1]), (logits - log_total[:, None]).exp(), slope


def _transform(logits: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """The logits, and their slope by what the head gave."""
    if transform.softcap is None:
        return (logits if transform.scale == 1 else logits * transform.scale), transform.scale
    capped = torch.tanh(logits * (transform.scale / transform.softcap))
    return transform.softcap * capped, transform.scale * (1 - capped.square())
