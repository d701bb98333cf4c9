"""How many tokens trl's trainers have read, kept across an interruption; TRL itself counts anew."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


class TokenCount(TrainerCallback, ExportableState):
    """Writes the tokens that a trainer has read, prompts included, into its checkpoints, and goes on from there."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": int(self.trainer._total_train_tokens)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the checkpoint's count; 0 at the start."""
        self.trainer._total_train_tokens = state.stateful_callbacks[type(self).__name__]["attributes"]["total"]
