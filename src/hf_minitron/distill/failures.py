"""What a run says when it cannot go on: which batch gave a NaN, and which setting to lower when memory runs out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_minitron.hardware import is_out_of_memory

MAX_BATCHES = 64  # that are remembered; more would only fill memory where logs are rare


class BatchWatch:
    """Finds the first batch since the last log whose loss was not finite, with one synchronisation in 64 batches.

    Batches are told by the sha256 of each row's token ids (int64, padding included), which can be looked up in the
    data whatever the shuffling; the hashes are only made when a batch has failed, from its ids that are kept on the
    device until the next log.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, Tensor]] = []
        self._finite: list[Tensor] = []

    def remember(self, inputs: Mapping[str, Any], step: int) -> None:
        """Notes a batch before its loss is known; `step` counts from 1."""
        del self._batches[len(self._finite) :]
        if len(self._batches) >= MAX_BATCHES and bool(torch.stack(self._finite).all()):
            self.forget()
        if len(self._batches) < MAX_BATCHES:  # full, and one is bad: the first such is all that is wanted
            self._batches.append((step, inputs["input_ids"]))

    def check(self, sums: Tensor) -> None:
        """Notes whether the last batch's sums are finite, on their device."""
        if len(self._finite) < len(self._batches):
            self._finite.append(sums.isfinite().all())

    def check_sums(self, sums: Mapping[str, float], when: str) -> None:
        """Raises FloatingPointError unless all are finite; of sums over all processes, so that all of them stop."""
        if not all(math.isfinite(value) for value in sums.values()):
            raise FloatingPointError(
                f"The loss became NaN or infinite {when}: {dict(sums)}. {self.describe()}Lower "
                "learning_rate, set max_grad_norm, or resume from the last checkpoint, which is from before; with "
                "fp16, use bf16."
            )

    def forget(self) -> None:
        """After a log that found everything finite."""
        self._batches.clear()
        self._finite.clear()

    def describe(self) -> str:
        """A sentence on the first bad batch of this process, or nothing if all of its batches were good."""
        for (step, ids), finite in zip(self._batches, self._finite, strict=False):
            if not bool(finite):
                rows = [hashlib.sha256(row.cpu().to(torch.int64).numpy().tobytes()).hexdigest()[:16] for row in ids]
                first = ids[:, :8].tolist()
                return f"The first bad batch is in step {step}, rows {rows}, which begin with the ids {first}. "
        return ""


@contextmanager
def advised_on_memory(args: TrainingArguments) -> Iterator[None]:
    """Raises torch.OutOfMemoryError with the settings that would help, the cheapest first; on CPUs too."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{error}\n{_advice(args)}") from error


def _advice(args: TrainingArguments) -> str:
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = []
    if rows > 1:
        advice.append(
            f"per_device_train_batch_size={rows // 2} with gradient_accumulation_steps={2 * steps}, which gives the "
            "same gradient" + ("" if rows % 2 == 0 else " of nearly as many rows")
        )
    if not args.activation_checkpointing:
        advice.append("activation_checkpointing=True (a third more time)")
    chunk = f"below {args.kd_chunk_size}" if args.kd_chunk_size else "of 512, say"
    advice.append(f"a kd_chunk_size {chunk}, if it was the loss that did not fit")
    advice.append("a smaller max_length")
    return f"Out of memory in a training step. Try, in this order: {'; '.join(advice)}; or shard (docs/distributed.md)."
