"""The stage ``distill`` as the command line and recipes run it: two checkpoints and text in, a trained student out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_minitron.checkpoint import Checkpoint, check_output_dir, copy_companions, write_tensors
from hf_minitron.distill.advice import log_advice
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import (
    DistillArguments,
    DistillInputs,
    check_vocabularies,
    load_checked,
    load_inputs,
    open_checkpoint,
)
from hf_minitron.distill.sharding import save_whole
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.lineage import Stage, append_stage, publishable, settings_dict

LOG_FILE = "distill_log.json"
_TOLD_ELSEWHERE = {
    "student_model",
    "teacher_model",
    "teacher_cache",
    "dataset",
    "eval_dataset",
    "output_dir",
    "logging_dir",
    "run_name",
}
_TOLD_ELSEWHERE |= {"overwrite", "resume_from_checkpoint", "disable_tqdm", "report_to"}  # nothing about the result


@dataclass(frozen=True)
class DistillReport:
    """What training gave: held-out metrics before and after (empty without held-out text), tokens, the log, seconds."""

    output_dir: Path
    num_tokens: int
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    log_history: list[dict[str, Any]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"output_dir": str(self.output_dir)}


def distill_checkpoint(
    arguments: DistillArguments, config: DistillationConfig, inputs: DistillInputs | None = None
) -> DistillReport:
    """Trains the student on the teacher's logits and writes it, in its own dtype, with tokenizer and lineage.

    The student trains with fp32 weights, whatever it is stored in. An interrupted run leaves ``checkpoint-*`` folders
    in ``output_dir`` and goes on with ``resume_from_checkpoint`` ("true", or one of them). ``inputs`` are those of an
    earlier ``load_inputs`` with the same arguments; by default they are read now.
    """
    stage = Stage("distill", settings=_settings(arguments, config))
    output_dir, resume = Path(config.output_dir), _find_resume(arguments, config)
    student = open_checkpoint(arguments.student_model, arguments.student_revision, arguments)
    if inputs is None:
        inputs = load_inputs(arguments, config, student)
    check_vocabularies(student, inputs.teacher, config)
    if resume is None:
        _empty(output_dir)
    train, held_out = inputs.train, inputs.held_out
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    student_model = load_checked(student, torch.float32, arguments.trust_remote_code)
    log_advice(student.folder, config.learning_rate)
    trainer = DistillationTrainer(
        model=student_model,
        teacher_model=inputs.teacher_model,
        args=config,
        train_dataset=train.dataset,
        eval_dataset=held_out.dataset if held_out else None,
        processing_class=tokenizer,
        data_collator=_isolating_collator(tokenizer, config, student_model) if arguments.isolate_documents else None,
    )
    before = _metrics(trainer.evaluate()) if held_out and resume is None else {}
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    after = _metrics(trainer.evaluate()) if held_out else {}
    report = DistillReport(output_dir, trainer.num_tokens_seen, after, before, trainer.state.log_history, seconds)
    stage.inputs = {"student": student.source, "teacher": inputs.teacher.source}
    stage.data = {"max_length": inputs.max_length, "train": train.facts}
    stage.data |= {"held_out": held_out.facts} if held_out else {}
    stage.tokens = report.num_tokens
    stage.metrics = {"before": before, "after": after} if after else None
    save_student(trainer, student, output_dir, stage)
    return report


def save_student(trainer: DistillationTrainer, source: Checkpoint, output_dir: Path, stage: Stage) -> None:
    """Writes the trained student over its checkpoints' folder: weights in the source's dtype, the lineage last.

    A folder with ``minitron.json`` is therefore complete. Every process must call this: sharded weights are gathered.
    """
    gathered, whole = output_dir / ".gathered.tmp", output_dir / ".student.tmp"
    save_whole(trainer, str(gathered))
    if trainer.is_world_process_zero():
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(parents=True)
        trained = Checkpoint.open(gathered)
        _write_in_dtype_of(source, trained, whole)
        copy_companions(source.folder, whole)
        (whole / LOG_FILE).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")
        stage.files = {LOG_FILE: "training log"}
        for path in [*whole.iterdir()]:
            os.replace(path, output_dir / path.name)
        append_stage(stage, output_dir, source.folder)
        shutil.rmtree(whole)
        shutil.rmtree(gathered)
    trainer.accelerator.wait_for_everyone()


def _write_in_dtype_of(source: Checkpoint, trained: Checkpoint, folder: Path) -> None:
    """Copies weights and config, each tensor in the dtype that the source stores it in."""
    dtypes = {name: source.dtype(name) if name in source else source.config.dtype for name in trained.names}
    sizes = {name: math.prod(trained.shape(name)) * dtypes[name].itemsize for name in trained.names}
    write_tensors(folder, sizes, lambda name: trained.read(name).to(dtypes[name]))
    trained.config.dtype = source.config.dtype
    trained.config.save_pretrained(folder)


def _find_resume(arguments: DistillArguments, config: DistillationConfig) -> str | None:
    """The checkpoint to go on from, if that was asked for; refuses a folder whose content would be lost or mixed up."""
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    last = last_whole_checkpoint(output_dir)
    if resume is not None and str(resume).lower() in ("true", "last"):
        if last is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint={resume}: {output_dir} has no checkpoint-* folder. "
                "Leave the option out to start."
            )
        return last
    if resume is None and last is not None and not arguments.overwrite:
        raise FileExistsError(
            f"output_dir={output_dir} holds {Path(last).name} of an earlier run. Add --resume-from-checkpoint true to "
            "go on from it, or --overwrite to start again."
        )
    if resume is None:
        check_output_dir(output_dir, arguments.overwrite)
    return resume


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The newest ``checkpoint-*`` whose writing was not cut off: the Trainer writes its own state last."""
    whole = [path for path in output_dir.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _empty(output_dir: Path) -> None:
    if PartialState().is_main_process:
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True)
    PartialState().wait_for_everyone()


def _settings(arguments: DistillArguments, config: DistillationConfig) -> dict[str, Any]:
    """What was asked for, but not what inputs and data tell; of the Trainer's settings those that were changed."""
    asked = {key: value for key, value in settings_dict(arguments).items() if key not in _TOLD_ELSEWHERE}
    # Not those of a config made here: a second one in a process would set up its devices anew.
    fields = dataclasses.fields(DistillationConfig)
    default = publishable({f.name: f.default for f in fields if f.default is not dataclasses.MISSING})
    default["accelerator_config"] = str(AcceleratorConfig())
    chosen = settings_dict(config)
    always = ("divergence", "temperature", "ce_weight", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")
    changed = {k: v for k, v in chosen.items() if k in always or (v or None) != (default.get(k) or None)}
    return asked | {key: value for key, value in changed.items() if key not in _TOLD_ELSEWHERE}


def _isolating_collator(
    tokenizer: PreTrainedTokenizerBase, config: DistillationConfig, student: PreTrainedModel
) -> CausalLMCollator:
    """Rows whose documents do not see each other; refuses where they still would."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "isolate_documents: the tokenizer has no eos token, so packed documents have no end. Leave it out."
        )
    rows = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
    if "flash" in str(student.config._attn_implementation) and rows > 1:
        raise ValueError(
            f"isolate_documents with {student.config._attn_implementation} and {rows} rows per device: transformers "
            "isolates documents there in batches of one row only. Set per_device_train_batch_size and "
            "per_device_eval_batch_size to 1 and raise gradient_accumulation_steps, or use sdpa."
        )
    return CausalLMCollator(tokenizer.eos_token_id, document_end=tokenizer.eos_token_id)


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Evaluation's numbers without their prefix and without timings."""
    names = ("kl", "lm_loss", "teacher_lm_loss", "perplexity", "teacher_perplexity", "top1_agreement", "num_tokens")
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
