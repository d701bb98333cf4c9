"""Settings of distillation and of what it shares with teacher correction: the Trainer's own, and the loss's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments

from hf_minitron.distill.divergences import Divergence, TokenLoss
from hf_minitron.distill.layer_pairs import check_pairs
from hf_minitron.distill.state_losses import LOSS_NAMES, METRICS


@dataclass
class TokenMeanArguments(TrainingArguments):
    """Settings of a `TokenMeanTrainer`: the Trainer's own, without those that would change what its loss means."""

    kd_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits are in memory at a time; by default it follows the device."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Hide NaN and infinite losses from the log, at the price of a synchronisation per batch. "
            "Training stops on them either way, at the next log or save."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "kd_chunk_size")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False would weigh tokens differently in every process: the loss is a "
                "mean over all tokens of the global batch. Leave it True."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no meaning here: the loss is "
                "computed without it. Use 0.0."
            )


def check_count(settings: Any, name: str) -> None:
    """Raises ValueError for a setting that is neither left out nor a positive number."""
    value = getattr(settings, name)
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} is not a positive count. Leave it out for the default.")


@dataclass
class DistillationConfig(TokenMeanArguments):
    """Settings of `DistillationTrainer`: the Trainer's own, and the loss's.

    Peak learning rate, schedule and warm-up default to those of Llama-3.1-Minitron (P2 Table 4). For its decay to a
    tenth of the peak give `lr_scheduler_type="cosine_with_min_lr"` with `lr_scheduler_kwargs={"min_lr_rate": 0.1}`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate (P2: 1e-4)."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Schedule after warm-up (P2: cosine)."}
    )
    warmup_steps: float = field(
        default=40, metadata={"help": "Steps of linear warm-up, or their share below 1 (P2: 40)."}
    )
    divergence: Divergence = field(
        default="forward_kl",
        metadata={
            "help": "What the student minimises: forward_kl, KL(teacher || student), as the papers do; reverse_kl; js, "
            "the generalized Jensen-Shannon divergence; or mse or cosine between logits (P1's ablation)."
        },
    )
    js_beta: float = field(
        default=0.5,
        metadata={"help": "The teacher's share in the mixture of divergence js: between 0 (forward) and 1 (reverse)."},
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of both distributions in the divergence, which is multiplied by its square. Not for "
            "mse and cosine."
        },
    )
    ce_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the student's cross-entropy on the data, added to the divergence. P2 uses 0."},
    )
    vocab_limit: int | None = field(
        default=None,
        metadata={
            "help": "Use only the first vocab_limit rows of both heads and renormalise: the tokenizer's length, when "
            "student and teacher pad their vocabularies differently."
        },
    )
    intermediate_losses: list[str] | None = field(
        default=None,
        metadata={
            "help": "Also compare states inside student and teacher (P1), for students that lost many layers: emb, the "
            "embeddings; o, outputs of layers; i, inputs of feed-forwards; att, relations of queries, keys and values. "
            "P1 found emb o best."
        },
    )
    intermediate_metric: str = field(
        default="cosine", metadata={"help": "How emb, o and i are compared: cosine (P1's best) or mse."}
    )
    intermediate_layers: str | None = field(
        default=None,
        metadata={
            "help": "Layers to compare, as student:teacher from 0, such as 13:29 or 5:11,13:29 (default: the student's "
            "last but two with the one it was cut from, or with the teacher's last but two)."
        },
    )
    intermediate_weight: str = field(
        default="auto",
        metadata={
            "help": "Weight of the intermediate losses' sum: a number, or auto for the logits' loss divided by it, as "
            "it was in the step before."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        TokenLoss(self.divergence, self.temperature, self.ce_weight, self.js_beta)  # raises what is wrong
        check_count(self, "vocab_limit")
        self._check_intermediate()

    def _check_intermediate(self) -> None:
        names = self.intermediate_losses
        if names is not None and (not names or len(set(names)) < len(names) or not set(names) <= {*LOSS_NAMES}):
            raise ValueError(
                f"intermediate_losses={names}: each is one of {', '.join(LOSS_NAMES)}, at most once. Name at least "
                "one, or leave it out."
            )
        if self.intermediate_metric not in METRICS:
            raise ValueError(
                f"intermediate_metric={self.intermediate_metric!r} is unknown. Use {' or '.join(METRICS)}."
            )
        if self.intermediate_layers is not None:
            check_pairs(self.intermediate_layers)
            if not {*(names or ())} - {"emb"}:
                raise ValueError(
                    f"intermediate_layers={self.intermediate_layers} has no effect with intermediate_losses={names}: "
                    "it says which layers o, i and att compare. Add one of these, or leave it out."
                )
        if not _is_weight(self.intermediate_weight):
            raise ValueError(
                f"intermediate_weight={self.intermediate_weight} is not a finite number of at least 0. Use "
                "one, or auto for the ratio of the losses."
            )


def _is_weight(text: str | float) -> bool:
    try:
        number = float(text)
    except ValueError:
        return text == "auto"
    return math.isfinite(number) and number >= 0
