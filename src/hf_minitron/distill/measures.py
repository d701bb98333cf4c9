"""What training and evaluation report: sums over targets that stay on the device, and the means made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

KD_VALUES = ("loss", "kl", "lm_loss", "teacher_lm_loss", "top1_agreement")


@dataclass
class BatchLosses:
    """What a batch gave: the differentiable sum of its losses, and every token's values, [rows * length] each."""

    loss: Tensor
    """Scalar: a sum over the targets, that is over those in `mask`."""
    values: dict[str, Tensor]
    """By the names that are reported; 0 where `mask` is False."""
    mask: Tensor
    num_tokens: int
    outputs: dict[str, Tensor | None] = field(default_factory=dict)
    """What `compute_loss` returns as outputs, if asked to; None is left out."""


class Measures:
    """The sums of one run, in this order: those of `names`, and last the number of targets."""

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self.device = device
        self.names = (*names, "num_tokens")
        self.dtype = torch.float32 if device.type == "mps" else torch.float64

    def zeros(self) -> Tensor:
        """Sums over nothing, [names]."""
        return torch.zeros(len(self.names), dtype=self.dtype, device=self.device)

    def row_sums(self, found: BatchLosses, rows: int) -> Tensor:
        """Sums over each row's targets, [rows, names], left on the device."""
        columns = [*(found.values[name] for name in self.names[:-1]), found.mask]
        return torch.stack([c.detach().to(self.dtype).view(rows, -1).sum(1) for c in columns], dim=1)

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over targets, and the targets' number; NaN when there are none."""
        values = dict(zip(self.names, sums, strict=True))
        count = int(values.pop("num_tokens"))
        means = {name: value / count if count else math.nan for name, value in values.items()}
        return {**means, "num_tokens": count}


class TokensSeen(TrainerCallback, ExportableState):
    """Carries the count of trained targets through checkpoints, in trainer_state.json."""

    def __init__(self) -> None:
        self.at_last_log = 0
        self.since_last_log = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"at_last_log": self.at_last_log + self.since_last_log}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.at_last_log = stored["attributes"]["at_last_log"] if stored else 0
        self.since_last_log = 0


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows a double."""
    return math.exp(loss) if loss < 700 else math.inf
