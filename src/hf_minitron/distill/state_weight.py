"""alpha, the weight of the intermediate losses: fixed, or P1's ratio of the logits' loss to theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_minitron.distill.config import DistillationConfig

SMALLEST_MEAN = 1e-3  # of L_is, below which alpha no longer grows: it would come to multiply rounding errors


class StateWeight(TrainerCallback, ExportableState):
    """A number, or with "auto" L_logits / L_is without gradient (P1, arXiv 2407.14679, section 3).

    Both losses are those of the whole global batch of the step before, and the first step has weight 0: inside a step
    the ratio is not known until its last accumulated batch, and each batch's own would give other gradients for other
    accumulations and numbers of processes. `last` is the weight of the last step. It goes on after resuming.
    """

    def __init__(self, args: DistillationConfig) -> None:
        self.fixed = None if args.intermediate_weight == "auto" else float(args.intermediate_weight)
        dtype = torch.float32 if args.device.type == "mps" else torch.float64
        self._value = torch.tensor(self.fixed or 0.0, dtype=dtype, device=args.device)
        self._last = self._value
        self._sums = torch.zeros(3, dtype=dtype, device=args.device)  # L_logits, L_is, tokens

    def join(self, trainer: Trainer) -> None:
        """Takes part in a trainer's steps."""
        self._accelerator = trainer.accelerator
        if self.fixed is None:
            trainer.add_callback(self)

    @property
    def last(self) -> float:
        return self._last.item()

    def used_on(self, logits: Tensor, states: Tensor, num_tokens: int) -> Tensor:
        """The weight for a batch whose losses sum up to `logits` and `states`, which the next step's will follow."""
        if self.fixed is None:
            sums = [logits.detach(), states.detach(), torch.full_like(logits, num_tokens)]
            self._sums += torch.stack(sums).to(self._sums.dtype)
        return self._value.to(states.dtype)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"value": self._value.item()}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._value = torch.full_like(self._value, stored["attributes"]["value"] if stored else 0.0)
        self._last = self._value
        self._sums.zero_()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        logits, states, tokens = self._accelerator.reduce(self._sums.clone(), "sum")
        self._last = self._value
        ratio = logits / states.clamp(min=SMALLEST_MEAN * tokens)
        self._value = torch.where(tokens > 0, ratio, self._value)
        self._sums.zero_()
