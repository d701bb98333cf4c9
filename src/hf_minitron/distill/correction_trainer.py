"""`CorrectionTrainer`: trains a teacher on the distillation data by the language-model loss (P2, arXiv 2408.11796)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, SchedulerType, TrainerCallback

from hf_minitron.distill.ce_head import CEOutput
from hf_minitron.distill.collator import CausalLMCollator, pad_token_id
from hf_minitron.distill.compatibility import head_facts
from hf_minitron.distill.config import TokenMeanArguments
from hf_minitron.distill.head_loss import head_cross_entropy
from hf_minitron.distill.measures import BatchLosses
from hf_minitron.distill.teacher import last_hidden
from hf_minitron.distill.token_trainer import Collator, TokenMeanTrainer
from hf_minitron.distill.trained_weights import check_method

PEAK_SHARE = 1 / 5  # of the original peak (P2, "Teacher Correction")
DEFAULT_LEARNING_RATE = 6e-5


@dataclass
class TeacherCorrectionConfig(TokenMeanArguments):
    """Settings of a teacher's correction: the Trainer's own, and what is trained.

    P2 (arXiv 2408.11796, "Teacher Correction"): 120 warm-up steps, a fifth of the original peak learning rate, the
    original schedule, batch and minimum. The defaults take those of Llama 3.1 8B as the original, 3e-4 with a cosine
    (arXiv 2407.21783, Table 3 and section 3.4.1); for another teacher give `original_learning_rate`.
    """

    method: str = field(
        default="full",
        metadata={
            "help": "What is trained: full, all weights; lora, adapters on linear layers; norm, only the gains (and "
            "biases) of normalization layers."
        },
    )
    learning_rate: float = field(
        default=DEFAULT_LEARNING_RATE,
        metadata={"help": "Peak learning rate (P2: a fifth of the teacher's original one; Llama 3.1 8B had 3e-4)."},
    )
    original_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak of the teacher's own pretraining: learning_rate becomes a fifth of it."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Schedule after warm-up (P2: the teacher's original one)."}
    )
    warmup_steps: float = field(
        default=120, metadata={"help": "Steps of linear warm-up, or their share below 1 (P2: 120)."}
    )

    def __post_init__(self) -> None:
        original = self.original_learning_rate
        if original is not None:
            if not 0 < original < 1:
                raise ValueError(f"original_learning_rate={original} is not between 0 and 1. A peak is such as 3e-4.")
            rates = [DEFAULT_LEARNING_RATE, PEAK_SHARE * original]
            if not any(math.isclose(float(self.learning_rate), rate) for rate in rates):
                raise ValueError(
                    f"learning_rate={self.learning_rate} and original_learning_rate={original}, a fifth of which is "
                    f"{rates[1]:g}: give one of the two."
                )
            self.learning_rate = rates[1]
        super().__post_init__()
        check_method("method", self.method)


class CorrectionTrainer(TokenMeanTrainer):
    """Trains `model`, a teacher, on text: the cross-entropy of the token that follows, without whole logits.

    Rows, means and logs are those of `TokenMeanTrainer`; `loss` and `lm_loss` are the same. What of the teacher
    requires a gradient is trained: `trained_weights.choose_trained` gives the methods.

    Raises ValueError when nothing requires one, and for rows with ids beyond the model's vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TeacherCorrectionConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Collator | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        vocab_size = head_facts("teacher", model).vocab_size
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "No parameter of the teacher requires a gradient, so there is nothing to train. Choose what is trained "
                "by trained_weights.choose_trained(model, method, ...), or model.requires_grad_(True)."
            )
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, rows in {"train_dataset": train_dataset, **named}.items():
            check_ids(rows, vocab_size, name)
        super().__init__(
            model,
            args,
            data_collator or CausalLMCollator(pad_token_id(model, processing_class)),
            ("loss", "lm_loss"),
            callbacks=callbacks,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )

    def batch_losses(
        self, model: nn.Module, inputs: dict[str, Tensor], following: Tensor, factor: Tensor | float | None
    ) -> BatchLosses:
        """The teacher's pass over a batch."""
        results: list[CEOutput] = []

        def forward(teacher: PreTrainedModel, **inputs: Tensor) -> Tensor:
            hidden = last_hidden(teacher, inputs)
            results.append(head_cross_entropy(hidden, teacher, following, self.args.kd_chunk_size))
            return results[-1].loss

        loss = self.run_redirected(model, inputs, forward)
        found = results.pop()
        values = {"loss": found.token_ce, "lm_loss": found.token_ce}
        return BatchLosses(loss, values, found.token_mask, found.num_tokens, {"token_ce": found.token_ce})


def check_ids(rows: Any, vocab_size: int, name: str) -> None:
    """Raises ValueError when a row of a data set has a token that the model does not know."""
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        ids = np.asarray(pc.list_flatten(table["input_ids"].combine_chunks()))
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(
                f"{name} has token ids from {ids.min()} to {ids.max()}, and the teacher knows {vocab_size}: the rows "
                "were made with another tokenizer. Use the teacher's own."
            )
