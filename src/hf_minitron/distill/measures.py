"""What training and evaluation report: sums over targets that stay on the device, and the means made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_minitron.distill.kd_head import KDOutput

TOKEN_VALUES = ("loss", "kl", "lm_loss", "teacher_lm_loss", "top1_agreement")


class Measures:
    """The sums of one run, in this order: `TOKEN_VALUES`, those of `extra`, and last the number of targets.

    `knows_labels` says whether the teacher's cross-entropy is known.
    """

    def __init__(self, device: torch.device, knows_labels: bool, extra: Sequence[str] = ()) -> None:
        self.device, self.knows_labels, self.extra = device, knows_labels, tuple(extra)
        self.names = (*TOKEN_VALUES, *self.extra, "num_tokens")
        self.dtype = torch.float32 if device.type == "mps" else torch.float64

    def zeros(self) -> Tensor:
        """Sums over nothing, [names]."""
        return torch.zeros(len(self.names), dtype=self.dtype, device=self.device)

    def row_sums(self, kd: KDOutput, rows: int, extra: Mapping[str, Tensor]) -> Tensor:
        """Sums over each row's targets, [rows, names], left on the device; `extra` has values [rows * length]."""
        unknown = torch.zeros_like(kd.token_kl)
        teacher_ce = unknown if kd.teacher_token_ce is None else kd.teacher_token_ce
        columns = [kd.token_loss, kd.token_kl, kd.token_ce, teacher_ce, kd.top1_agreement]
        columns += [*(extra[name] for name in self.extra), kd.token_mask]
        return torch.stack([c.detach().to(self.dtype).view(rows, -1).sum(1) for c in columns], dim=1)

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over targets of what is known, and the targets' number; NaN when there are none."""
        values = dict(zip(self.names, sums, strict=True))
        count = int(values.pop("num_tokens"))
        if not self.knows_labels:
            del values["teacher_lm_loss"]
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
