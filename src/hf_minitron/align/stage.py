"""The stage ``sft`` as the command line and recipes run it: a checkpoint and lessons in, a fine-tuned one out."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, set_seed

from hf_minitron.adapters import LoraArguments, add_adapters
from hf_minitron.align.arguments import SFTArguments
from hf_minitron.align.conversations import check_lessons, load_held_out_records, load_train_records
from hf_minitron.align.sft import SupervisedConfig, SupervisedTrainer
from hf_minitron.align.templates import add_chat_template, check_chat_template, fit_model, training_tokenizer
from hf_minitron.checkpoint import Checkpoint, load_weights
from hf_minitron.data import check_row_length, fingerprint_rows
from hf_minitron.lineage import Stage
from hf_minitron.training import (
    SCHEDULE,
    TrainingReport,
    empty_folder,
    find_resume,
    lora_settings,
    save_trained,
    told_settings,
)

LOG_FILE = "sft_log.json"
TOLD_ELSEWHERE = ("model", "dataset", "eval_dataset", "max_length")
# Numbers of an evaluation that tell nothing about the model.
_TIMINGS = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch")


def fine_tune_checkpoint(
    arguments: SFTArguments, config: SupervisedConfig, lora: LoraArguments | None = None
) -> TrainingReport:
    """Trains a model on what assistants said and writes it, in its own dtype, with tokenizer and lineage.

    The model trains with fp32 weights, whatever it is stored in. A base model is given a chat template on request
    (`templates.py`), with rows for the tokens that are new. An interrupted run leaves ``checkpoint-*`` folders in
    ``output_dir`` and goes on with ``resume_from_checkpoint`` ("true", or one of them). With ``lora`` only adapters are
    trained, which are merged into what is written.
    """
    lora = lora or LoraArguments()
    settings = told_settings(arguments, config, SupervisedConfig, SCHEDULE, TOLD_ELSEWHERE)
    stage = Stage("sft", settings=settings | lora_settings(lora))
    output_dir = Path(config.output_dir)
    resume = find_resume(output_dir, config.resume_from_checkpoint, arguments.overwrite)
    source = Checkpoint.open(
        arguments.model, revision=arguments.model_revision, trust_remote_code=config.trust_remote_code
    )
    config.max_length = check_row_length(source.config, config.max_length, "max_length")
    train, held_out = load_train_records(arguments, config.seed), load_held_out_records(arguments)
    kinds = {
        check_lessons(records.rows, name)
        for name, records in (("dataset", train), ("eval_dataset", held_out))
        if records
    }
    if len(kinds) > 1:
        raise ValueError("dataset and eval_dataset are one messages, the other prompt and completion: use one format.")
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    check_chat_template(tokenizer, arguments.chat_template, train.conversational)
    added = add_chat_template(tokenizer, arguments.chat_template) if arguments.chat_template else []
    if added and lora.lora_r is not None:
        raise ValueError(
            f"chat_template={arguments.chat_template} adds {', '.join(added)}, whose embeddings adapters would leave "
            "untrained. Leave --lora-r out, or use --chat-template plain, which adds none."
        )
    marked = training_tokenizer(tokenizer) if "messages" in kinds else tokenizer
    if resume is None:
        empty_folder(output_dir)
    model = load_weights(source, torch.float32, trust_remote_code=config.trust_remote_code)
    if arguments.chat_template:
        fit_model(model, tokenizer, config.seed)
    if lora.lora_r is not None:
        set_seed(config.seed)
        model = add_adapters(model, lora)
    config.eval_on_start = held_out is not None
    trainer = SupervisedTrainer(
        model, config, train.rows, eval_dataset=held_out.rows if held_out else None, processing_class=marked
    )
    report = train_and_measure(trainer, output_dir, resume)
    stage.inputs = {"source": source.described}
    stage.data = {"max_length": config.max_length, "train": train.facts}
    stage.data["train"]["fingerprint"] = fingerprint_rows(trainer.train_dataset)
    stage.data |= {"held_out": held_out.facts} if held_out else {}
    report.record(stage)
    save_trained(trainer, source, output_dir, stage, LOG_FILE, tokenizer if arguments.chat_template else None)
    return report


def train_and_measure(trainer: Trainer, output_dir: Path, resume: str | None) -> TrainingReport:
    """Trains one of TRL's trainers; with held-out data, tells what it measured at the start and at the end."""
    held_out = trainer.eval_dataset is not None
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    after = _metrics(trainer.evaluate()) if held_out else {}
    first = next((entry for entry in trainer.state.log_history if "eval_loss" in entry and not entry["step"]), {})
    tokens = int(trainer._total_train_tokens)
    return TrainingReport(output_dir, tokens, after, _metrics(first), trainer.state.log_history, seconds)


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Evaluation's numbers without their prefix and without timings."""
    own = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return {name: value for name, value in own.items() if not name.endswith(_TIMINGS)}
