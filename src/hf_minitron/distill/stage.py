"""The stage ``distill`` as the command line and recipes run it: two checkpoints and text in, a trained student out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

from hf_minitron.adapters import LoraArguments, add_adapters
from hf_minitron.checkpoint import Checkpoint, check_output_dir
from hf_minitron.distill.advice import log_advice
from hf_minitron.distill.collator import isolating_collator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import (
    DistillArguments,
    DistillInputs,
    check_vocabularies,
    load_checked,
    load_inputs,
    open_checkpoint,
)
from hf_minitron.distill.layer_pairs import StudentOrigin, read_origin
from hf_minitron.distill.parallel_correction import ParallelCorrection, check_correction, save_teacher
from hf_minitron.distill.pushing import LOG_FILE, push_output
from hf_minitron.distill.state_losses import LOSS_NAMES
from hf_minitron.distill.stream_inputs import STREAM_OPTIONS
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.trainer import DistillationTrainer
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

_ALWAYS_TOLD = ("divergence", "temperature", "ce_weight", *SCHEDULE)
_TOLD_ELSEWHERE = {"student_model", "teacher_model", "teacher_cache", "dataset", "eval_dataset", *STREAM_OPTIONS}


def distill_checkpoint(
    arguments: DistillArguments,
    config: DistillationConfig,
    lora: LoraArguments | None = None,
    correction: ParallelCorrection | None = None,
    inputs: DistillInputs | None = None,
) -> TrainingReport:
    """Trains the student on the teacher's logits and writes it, in its own dtype, with tokenizer and lineage.

    The student trains with fp32 weights, whatever it is stored in. An interrupted run leaves ``checkpoint-*`` folders
    in ``output_dir`` and goes on with ``resume_from_checkpoint`` ("true", or one of them). With ``lora`` only adapters
    are trained, which are merged into what is written. With ``correction`` the teacher is trained meanwhile, and
    written too if that is asked for. ``inputs`` are those of an earlier ``load_inputs`` with the same arguments; by
    default they are read now.
    """
    lora, correction = lora or LoraArguments(), correction or ParallelCorrection()
    corrects = correction.teacher_correction is not None
    if corrects:
        arguments = check_correction(arguments, correction)
    stage = Stage("distill", settings=_settings(arguments, config) | lora_settings(lora) | correction.settings())
    output_dir = Path(config.output_dir)
    resume = find_resume(output_dir, config.resume_from_checkpoint, arguments.overwrite)
    _check_teacher_dir(correction.corrected_teacher_dir, output_dir, arguments.overwrite or resume is not None)
    student = open_checkpoint(arguments.student_model, arguments.student_revision, arguments)
    if inputs is None:
        inputs = load_inputs(arguments, config, student)
    check_vocabularies(student, inputs.teacher, config)
    if resume is None:
        empty_folder(output_dir)
    train, held_out = inputs.train, inputs.held_out
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    student_model = load_checked(student, torch.float32, arguments.trust_remote_code)
    if lora.lora_r is not None:
        set_seed(config.seed)
        student_model = add_adapters(student_model, lora)
    else:
        log_advice(student.folder, config.learning_rate)
    trainer = DistillationTrainer(
        model=student_model,
        teacher_model=inputs.load_teacher() if corrects else inputs.teacher_model,
        args=config,
        train_dataset=train.dataset,
        eval_dataset=held_out.dataset if held_out else None,
        processing_class=tokenizer,
        student_origin=_origin(student, inputs.teacher) if config.intermediate_losses else None,
        data_collator=isolating_collator(tokenizer, config, student_model) if arguments.isolate_documents else None,
        teacher_correction=correction if corrects else None,
    )
    before = _metrics(trainer.evaluate()) if held_out and resume is None else {}
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    after = _metrics(trainer.evaluate()) if held_out else {}
    report = TrainingReport(output_dir, trainer.num_tokens_seen, after, before, trainer.state.log_history, seconds)
    teacher = inputs.teacher.described if isinstance(inputs.teacher, Checkpoint) else inputs.teacher.source
    stage.inputs = {"student": student.described, "teacher": teacher}
    stage.data = {"max_length": inputs.max_length, "train": trainer.describe_stream() or train.facts}
    stage.data |= {"held_out": held_out.facts} if held_out else {}
    report.record(stage)
    save_trained(trainer, student, output_dir, stage, LOG_FILE)
    if correction.corrected_teacher_dir is not None:
        folder = Path(correction.corrected_teacher_dir)
        save_teacher(trainer, inputs.teacher, folder, _record_of_teacher(stage))
    if config.push_to_hub and trainer.is_world_process_zero():
        push_output(config)
    return report


def _settings(arguments: DistillArguments, config: DistillationConfig) -> dict[str, Any]:
    return told_settings(arguments, config, DistillationConfig, _ALWAYS_TOLD, _TOLD_ELSEWHERE)


def _check_teacher_dir(folder: str | None, output_dir: Path, overwrite: bool) -> None:
    """Where a corrected teacher is to be written, if at all, must not be the student's place, nor hold anything."""
    if folder is None:
        return
    if Path(folder).resolve() == output_dir.resolve():
        raise ValueError(f"corrected_teacher_dir and output_dir are both {output_dir}: give one of its own to each.")
    check_output_dir(folder, overwrite)


def _record_of_teacher(stage: Stage) -> Stage:
    """The record of the teacher that was corrected meanwhile, its metrics named as in a correction."""
    own = {"teacher_lm_loss": "lm_loss", "teacher_perplexity": "perplexity", "num_tokens": "num_tokens"}
    metrics = {
        when: {"held_out": {own[name]: value for name, value in found.items() if name in own}}
        for when, found in (stage.metrics or {}).items()
    }
    inputs = {"teacher": stage.inputs["teacher"]}
    return dataclasses.replace(stage, stage="correct", inputs=inputs, metrics=metrics, files=None)


def _origin(student: Checkpoint, teacher: Checkpoint | CachedTeacher) -> StudentOrigin | None:
    """Where the student's lineage says it was cut from; a cache has no layers to say it of."""
    if isinstance(teacher, CachedTeacher):
        return None
    return read_origin(student.folder, student.config, teacher.config)


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Evaluation's numbers without their prefix and without timings."""
    names = ("kl", "lm_loss", "teacher_lm_loss", "perplexity", "teacher_perplexity", "top1_agreement", "num_tokens")
    names += tuple(f"intermediate_{name}" for name in LOSS_NAMES)
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
