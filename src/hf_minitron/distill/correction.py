"""The stage ``correct-teacher``: a teacher and text of another distribution in, a teacher that is at home there out.

P2 (arXiv 2408.11796, "Teacher Correction"): without the original pretraining data, a teacher fine-tuned on the
distillation data first makes a student whose loss is more than 6 % lower.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from hf_minitron.adapters import LoraArguments
from hf_minitron.checkpoint import Checkpoint
from hf_minitron.data import check_row_length
from hf_minitron.distill.collator import isolating_collator
from hf_minitron.distill.correction_trainer import CorrectionTrainer, TeacherCorrectionConfig
from hf_minitron.distill.inputs import (
    PackedRows,
    as_in_distill,
    find_tokenizer,
    held_out_rows,
    load_checked,
    open_checkpoint,
    read_rows,
    train_rows,
)
from hf_minitron.distill.sharding import shards_weights
from hf_minitron.distill.stream_inputs import STREAM_OPTIONS, stream_sources
from hf_minitron.distill.teacher import check_quantization
from hf_minitron.distill.throughput import count_trained
from hf_minitron.distill.trained_weights import check_precision, choose_trained
from hf_minitron.hardware import parse_dtype
from hf_minitron.lineage import Stage
from hf_minitron.mixes import MixSource
from hf_minitron.row_stream import Stopping
from hf_minitron.training import (
    SCHEDULE,
    empty_folder,
    find_resume,
    lora_settings,
    save_trained,
    save_trained_adapters,
    told_settings,
)

LOG_FILE = "correction_log.json"
_TOLD_ELSEWHERE = {"teacher_model", "dataset", "eval_dataset", "general_dataset", *STREAM_OPTIONS}
logger = logging.getLogger(__name__)


@dataclass
class CorrectTeacherArguments:
    """Which teacher is corrected on which text, and what it must not forget."""

    teacher_model: str = field(metadata={"help": "Hub id or folder of the teacher."})
    dataset: str | None = as_in_distill("dataset")
    dataset_mix: str | None = as_in_distill("dataset_mix")
    streaming: bool = as_in_distill("streaming")
    shuffle_buffer: int | None = as_in_distill("shuffle_buffer")
    dataset_epochs: int | None = as_in_distill("dataset_epochs")
    stopping: Stopping = field(default="first", metadata=as_in_distill("stopping").metadata)
    dataset_config: str | None = as_in_distill("dataset_config")
    dataset_split: str = as_in_distill("dataset_split")
    text_column: str | None = as_in_distill("text_column")
    eval_dataset: str | None = as_in_distill("eval_dataset")
    eval_split: str | None = as_in_distill("eval_split")
    general_dataset: str | None = field(
        default=None,
        metadata={"help": "Text like that of the teacher's own training: what it forgets of it is reported."},
    )
    general_split: str = field(default="train", metadata={"help": "Split of --general-dataset."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per packed row (default: what the teacher takes, at most 4096)."}
    )
    isolate_documents: bool = field(
        default=False,
        metadata={"help": "As in distill: keep attention within the documents of a packed row."},
    )
    max_train_rows: int | None = as_in_distill("max_train_rows")
    max_eval_rows: int = as_in_distill("max_eval_rows")
    teacher_revision: str | None = as_in_distill("teacher_revision")
    teacher_dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights in memory. With --method lora also bfloat16 or float16, as they are frozen."},
    )
    teacher_quantization: str | None = as_in_distill("teacher_quantization")
    adapter_only: bool = field(
        default=False,
        metadata={"help": "With --method lora: write only the adapters, a folder of peft's, instead of merging them."},
    )
    trust_remote_code: bool = as_in_distill("trust_remote_code")
    overwrite: bool = as_in_distill("overwrite")


@dataclass(frozen=True)
class CorrectionReport:
    """What correction gave: by held-out set its metrics before and after, what was trained, tokens, log, warnings.

    The sets are ``held_out``, text like that trained on, and ``general``, what the teacher may forget; each is there
    only if it was given.
    """

    output_dir: Path
    method: str
    num_trained: int
    num_tokens: int
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    warnings: tuple[str, ...]
    log_history: list[dict[str, Any]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"output_dir": str(self.output_dir)}


def correct_teacher(
    arguments: CorrectTeacherArguments, config: TeacherCorrectionConfig, lora: LoraArguments | None = None
) -> CorrectionReport:
    """Trains the teacher on text by its language-model loss and writes it, in its own dtype, with its lineage.

    An interrupted run goes on as one of ``distill_checkpoint`` does. Adapters are merged, unless they are all that is
    wanted; those of a quantized teacher into its weights as they were used, that is quantized and back. The teacher is
    measured before and after on the held-out sets there are; where it got worse on what it was trained for, or on the
    general set, that is a warning, and the original stays where it was.
    """
    lora = lora or LoraArguments()
    _check_settings(arguments, config, lora)
    sources = stream_sources(arguments, config)
    settings = told_settings(arguments, config, TeacherCorrectionConfig, ("method", *SCHEDULE), _TOLD_ELSEWHERE)
    stage = Stage("correct", settings=settings | lora_settings(lora))
    output_dir = Path(config.output_dir)
    resume = find_resume(output_dir, config.resume_from_checkpoint, arguments.overwrite)
    source = open_checkpoint(arguments.teacher_model, arguments.teacher_revision, arguments)
    tokenizer = own_tokenizer(source)
    max_length = check_row_length(source.config, arguments.max_length, "max_length")
    with PartialState().main_process_first():
        train, held_out = _load_rows(arguments, config, tokenizer, max_length, sources)
    if resume is None:
        empty_folder(output_dir)
    dtype = parse_dtype(arguments.teacher_dtype) or torch.float32
    device_map = {"": str(config.device)} if arguments.teacher_quantization else None
    how = (arguments.teacher_quantization, device_map)
    model = load_checked(source, dtype, arguments.trust_remote_code, *how)
    model = choose_trained(model, config.method, lora, config.seed)
    num_trained = count_trained(model)
    trainer = CorrectionTrainer(
        model,
        config,
        train_dataset=train.dataset,
        eval_dataset={name: rows.dataset for name, rows in held_out.items()} or None,
        processing_class=tokenizer,
        data_collator=isolating_collator(tokenizer, config, model) if arguments.isolate_documents else None,
    )
    if arguments.teacher_quantization and shards_weights(trainer.accelerator):
        raise ValueError(
            f"teacher_quantization={arguments.teacher_quantization} under ZeRO-3 or FSDP: quantized weights are not "
            "sharded. Use DDP, ZeRO-1 or ZeRO-2, or leave the quantization out."
        )
    before = _measure(trainer, held_out)  # a resumed run loads its weights only when it trains
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    after = _measure(trainer, held_out)
    warnings = tuple(judge(before, after, config.learning_rate))
    for warning in warnings if trainer.is_world_process_zero() else ():
        logger.warning("%s", warning)
    stage.inputs = {"teacher": source.described}
    stage.data = {"max_length": max_length, "train": trainer.describe_stream() or train.facts}
    stage.data |= {name: rows.facts for name, rows in held_out.items()}
    stage.tokens = trainer.num_tokens_seen
    stage.metrics = {"before": before, "after": after} if after else None
    save = save_trained_adapters if arguments.adapter_only else save_trained
    save(trainer, source, output_dir, stage, LOG_FILE)
    log = trainer.state.log_history
    found = (num_trained, trainer.num_tokens_seen, before, after, warnings, log, seconds)
    return CorrectionReport(output_dir, config.method, *found)


def own_tokenizer(source: Checkpoint) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises ValueError where there is none, as text means nothing to it without."""
    tokenizer = find_tokenizer(source)
    if tokenizer is None:
        raise ValueError(
            f"{source.folder} has no tokenizer: the text must become tokens as in the teacher's own training. Copy its "
            "tokenizer.json and tokenizer_config.json there."
        )
    return tokenizer


def judge(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], learning_rate: float) -> list[str]:
    """Sentences on the sets on which the teacher got worse."""
    change = {name: after[name]["lm_loss"] - before[name]["lm_loss"] for name in after}
    numbers = {name: f"from {before[name]['lm_loss']:.4f} to {after[name]['lm_loss']:.4f}" for name in after}
    sentences = []
    if change.get("held_out", -1) >= 0:
        sentences.append(
            f"Correction did not help: the loss on the held-out text of the new kind went {numbers['held_out']}. The "
            f"original teacher is untouched: use that, or lower learning_rate={learning_rate:g}, or train longer."
        )
    if "general" in change and change["general"] > max(0.0, -change.get("held_out", 0.0)):
        gained = f" and won only {-change['held_out']:.4f} on the new one" if change.get("held_out", 0) < 0 else ""
        sentences.append(
            f"The teacher forgot: the loss on the general text rose {numbers['general']}, by "
            f"{change['general']:.4f}{gained}. Mix general text into the data, train less of it (--method lora or "
            "norm), or lower the learning rate."
        )
    return sentences


def _check_settings(arguments: CorrectTeacherArguments, config: TeacherCorrectionConfig, lora: LoraArguments) -> None:
    """What needs no model to be wrong."""
    if config.method != "lora" and (lora.lora_r is not None or arguments.adapter_only):
        given = "adapter_only" if arguments.adapter_only else f"lora_r={lora.lora_r}"
        raise ValueError(f"{given} with method={config.method}: only lora has adapters. Add --method lora.")
    dtype = parse_dtype(arguments.teacher_dtype) or torch.float32
    check_quantization(arguments.teacher_quantization, dtype)
    check_precision(config.method, arguments.teacher_quantization is not None, dtype)
    same = arguments.general_dataset is not None and arguments.general_dataset == arguments.dataset
    if same and arguments.general_split == arguments.dataset_split:
        raise ValueError(
            f"general_dataset and dataset are both {arguments.dataset}, split {arguments.general_split}: what is "
            "trained on cannot tell what is forgotten. Give text like that of the teacher's own training."
        )


def _load_rows(
    arguments: CorrectTeacherArguments,
    config: TeacherCorrectionConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sources: list[MixSource] | None,
) -> tuple[PackedRows, dict[str, PackedRows]]:
    """Rows to train on, and by name those to measure on."""
    train = train_rows(arguments, config, tokenizer, max_length, sources)
    held_out = {"held_out": held_out_rows(arguments, tokenizer, max_length)}
    if arguments.general_dataset is not None:
        how = {"config_name": None, "split": arguments.general_split, "text_column": None}
        most = arguments.max_eval_rows
        held_out["general"] = read_rows(arguments.general_dataset, how, tokenizer, max_length, most, seed=0)
    return train, {name: rows for name, rows in held_out.items() if rows is not None}


def _measure(trainer: CorrectionTrainer, held_out: dict[str, PackedRows]) -> dict[str, dict[str, float]]:
    """Loss, perplexity and tokens by set."""
    if not held_out:
        return {}
    metrics = trainer.evaluate()
    names = ("lm_loss", "perplexity", "num_tokens")
    return {rows: {name: metrics[f"eval_{rows}_{name}"] for name in names} for rows in held_out}
