"""Options of `hf-minitron sft` and `hf-minitron rpo` beside the Trainer's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl.trainer.base_config import _BaseConfig as TRLConfig


@dataclass
class DataArguments:
    """Which model learns from which records."""

    model: str = field(metadata={"help": "Hub id or folder of the model to train."})
    dataset: str = field(
        metadata={"help": "Records to train on: Hub data set id, file, folder or glob (jsonl, json, parquet, csv)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out records, read like --dataset."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on (default: validation, or train of another source)."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on at most so many records, at random."})
    max_eval_rows: int = field(default=256, metadata={"help": "Use at most so many records for evaluation."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    overwrite: bool = field(default=False, metadata={"help": "Replace output_dir if it is not empty."})

    def __post_init__(self) -> None:
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: use at least 1, or leave it out.")


@dataclass
class SFTArguments(DataArguments):
    """Supervised fine-tuning: records are `messages`, or `prompt` and `completion`."""

    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template for a base model that has none: chatml, llama3 (whose tokens Llama 3 has) or plain "
            "(no new tokens)."
        },
    )


def bf16_unless_cpu(config: TRLConfig) -> None:
    """TRL computes in bfloat16 unless told otherwise; on a CPU that is slow, or not the same everywhere: not there."""
    if config.bf16 is None and not config.fp16:
        config.bf16 = not config.use_cpu and torch.accelerator.is_available()
