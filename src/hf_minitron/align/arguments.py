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


@dataclass
class RPOArguments(DataArguments):
    """Reward-aware preference optimization: records are `prompt`, `chosen` and `rejected`, or prompts to sample for."""

    rounds: int = field(
        default=2, metadata={"help": "Rounds; each takes the result of the one before as its reference (P2: 2)."}
    )
    constant_rewards: bool = field(
        default=False, metadata={"help": "Take 1 and 0 as rewards of chosen and rejected, whatever the data say."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a reward model (one output) that labels the pairs."}
    )
    reward_endpoint: str | None = field(
        default=None,
        metadata={"help": "Address of an OpenAI-compatible reward endpoint (.../v1); its key is in REWARD_API_KEY."},
    )
    reward_endpoint_model: str | None = field(default=None, metadata={"help": "Name of the endpoint's model."})
    reward_attribute: str | None = field(
        default=None, metadata={"help": "Token whose log-probability the endpoint gives as reward, as in helpfulness."}
    )
    reward_batch_size: int = field(default=8, metadata={"help": "Responses that are scored at a time."})
    num_samples: int | None = field(
        default=None,
        metadata={
            "help": "Sample so many responses to every prompt from the model of each round, and learn from the best "
            "and the worst (default: learn from the pairs of the data)."
        },
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens of a sampled response, at most."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Temperature of sampled responses."})
    sampling_top_p: float = field(default=1.0, metadata={"help": "Sample from the most likely tokens of this share."})
    sampling_batch_size: int = field(default=8, metadata={"help": "Prompts that are answered at a time."})
    kl_rows: int = field(
        default=32, metadata={"help": "Held-out pairs on which the KL to the reference is measured; 0: none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "reward_batch_size", "max_new_tokens", "sampling_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use at least 1.")
        sources = {"constant_rewards": self.constant_rewards, "reward_model": self.reward_model}
        given = [name for name, value in (sources | {"reward_endpoint": self.reward_endpoint}).items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what rewards are: give one of them.")
        if (self.reward_endpoint is None) != (self.reward_endpoint_model is None):
            raise ValueError("reward_endpoint and reward_endpoint_model go together: give both, or neither.")
        if self.reward_attribute is not None and self.reward_endpoint is None:
            raise ValueError("reward_attribute is for endpoints: give --reward-endpoint, or leave it out.")
        if self.num_samples is not None:
            if self.num_samples < 2:
                raise ValueError(f"num_samples={self.num_samples}: a best and a worst need at least 2.")
            if not (self.reward_model or self.reward_endpoint):
                raise ValueError("num_samples without a judge of what is sampled: give --reward-model or "
                                 "--reward-endpoint.")  # fmt: skip

    @property
    def judged(self) -> bool:
        """Whether rewards are made here, not read from the data."""
        return bool(self.constant_rewards or self.reward_model or self.reward_endpoint)


def bf16_unless_cpu(config: TRLConfig) -> None:
    """TRL computes in bfloat16 unless told otherwise; on a CPU that is slow, or not the same everywhere: not there."""
    if config.bf16 is None and not config.fp16:
        config.bf16 = not config.use_cpu and torch.accelerator.is_available()
