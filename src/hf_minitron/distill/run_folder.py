"""The folder of a training run: whether it may be used, where an earlier run goes on, how the result is written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_minitron.adapters import LoraArguments, merged_copy, plain_state
from hf_minitron.checkpoint import Checkpoint, check_output_dir, copy_companions, write_tensors
from hf_minitron.distill.parallel_correction import ParallelCorrection
from hf_minitron.distill.sharding import save_adapters, save_whole
from hf_minitron.lineage import Stage, append_stage, publishable, settings_dict

_TOLD_ELSEWHERE = {  # by the lineage: inputs, data
    "student_model",
    "teacher_model",
    "teacher_cache",
    "dataset",
    "eval_dataset",
    "general_dataset",
    "output_dir",
    "corrected_teacher_dir",
    "logging_dir",
    "run_name",
}
_TOLD_ELSEWHERE |= {"overwrite", "resume_from_checkpoint", "disable_tqdm", "report_to"}  # nothing about the result


def find_resume(config: TrainingArguments, overwrite: bool) -> str | None:
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
    if resume is None and last is not None and not overwrite:
        raise FileExistsError(
            f"output_dir={output_dir} holds {Path(last).name} of an earlier run. Add --resume-from-checkpoint true to "
            "go on from it, or --overwrite to start again."
        )
    if resume is None:
        check_output_dir(output_dir, overwrite)
    return resume


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The newest ``checkpoint-*`` whose writing was not cut off: the Trainer writes its own state last."""
    whole = [path for path in output_dir.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def empty_folder(output_dir: Path) -> None:
    """Makes the folder, or removes what is in it; every process must call this."""
    if PartialState().is_main_process:
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True)
    PartialState().wait_for_everyone()


def chosen_settings(arguments: Any, config: TrainingArguments, always: Sequence[str]) -> dict[str, Any]:
    """What was asked for, but not what inputs and data tell; of the Trainer's settings those that were changed.

    Those of ``always``, and learning rate, schedule, warm-up and seed, are told in any case.
    """
    asked = {key: value for key, value in settings_dict(arguments).items() if key not in _TOLD_ELSEWHERE}
    # Not those of a config made here: a second one in a process would set up its devices anew.
    fields = dataclasses.fields(config)
    default = publishable({f.name: f.default for f in fields if f.default is not dataclasses.MISSING})
    default["accelerator_config"] = str(AcceleratorConfig())
    always = (*always, "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")
    chosen = settings_dict(config)
    changed = {k: v for k, v in chosen.items() if k in always or (v or None) != (default.get(k) or None)}
    return asked | {key: value for key, value in changed.items() if key not in _TOLD_ELSEWHERE}


def told_of(options: LoraArguments | ParallelCorrection) -> dict[str, Any]:
    """What the lineage says of options that are off unless their first field is given."""
    first = dataclasses.fields(options)[0].name
    if getattr(options, first) is None:
        return {}
    return {key: value for key, value in settings_dict(options).items() if value and key not in _TOLD_ELSEWHERE}


def save_trained(trainer: Trainer, source: Checkpoint, output_dir: Path, stage: Stage, log_file: str) -> None:
    """Writes the trained model over its checkpoints' folder, as `write_checkpoint` does, with its log.

    Every process must call this: sharded weights are gathered.
    """
    gathered = output_dir / ".gathered.tmp"
    save_whole(trainer, str(gathered))
    if trainer.is_world_process_zero():
        write_log(trainer, gathered, stage, log_file)
        write_checkpoint(gathered, source, output_dir, stage)
    trainer.accelerator.wait_for_everyone()


def save_trained_adapters(trainer: Trainer, source: Checkpoint, output_dir: Path, stage: Stage, log_file: str) -> None:
    """The same with adapters alone, as a folder of peft's, which needs the model they were trained on."""
    gathered = output_dir / ".gathered.tmp"
    facts = source.source
    save_adapters(trainer, str(gathered), facts.get("id", str(source.folder)), facts.get("commit"))
    if trainer.is_world_process_zero():
        write_log(trainer, gathered, stage, log_file)
        copy_companions(source.folder, gathered)
        _move_in(gathered, output_dir, stage, source)
    trainer.accelerator.wait_for_everyone()


def save_teacher(trainer: Trainer, source: Checkpoint, output_dir: Path, stage: Stage) -> None:
    """Writes a teacher that was corrected while it taught, and is whole in every process; its adapters are merged."""
    if trainer.is_world_process_zero():
        gathered = output_dir / ".gathered.tmp"
        teacher = trainer.teacher_model
        if isinstance(teacher, PeftModel):
            teacher = merged_copy(teacher, plain_state(teacher))
        teacher.save_pretrained(gathered)
        write_checkpoint(gathered, source, output_dir, stage)
    trainer.accelerator.wait_for_everyone()


def write_log(trainer: Trainer, folder: Path, stage: Stage, log_file: str) -> None:
    """The log of a run as JSON, which `stage` names."""
    text = json.dumps(trainer.state.log_history, indent=1)
    (folder / log_file).write_text(text + "\n", encoding="utf-8")
    stage.files = {log_file: "training log"}


def write_checkpoint(gathered: Path, source: Checkpoint, output_dir: Path, stage: Stage) -> None:
    """Takes a folder with a whole model over into ``output_dir``: weights in the source's dtype, the lineage last.

    Tokenizer and the like are the source's. A folder with ``minitron.json`` is complete.
    """
    whole = output_dir / ".whole.tmp"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    trained = Checkpoint.open(gathered)
    _write_in_dtype_of(source, trained, whole)
    copy_companions(source.folder, whole)
    for name in stage.files or ():
        os.replace(gathered / name, whole / name)
    _move_in(whole, output_dir, stage, source)
    shutil.rmtree(gathered)


def _move_in(folder: Path, output_dir: Path, stage: Stage, source: Checkpoint) -> None:
    for path in [*folder.iterdir()]:
        os.replace(path, output_dir / path.name)
    append_stage(stage, output_dir, source.folder)
    shutil.rmtree(folder)


def _write_in_dtype_of(source: Checkpoint, trained: Checkpoint, folder: Path) -> None:
    """Copies weights and config, each tensor in the dtype that the source stores it in."""
    dtypes = {name: source.dtype(name) if name in source else source.config.dtype for name in trained.names}
    sizes = {name: math.prod(trained.shape(name)) * dtypes[name].itemsize for name in trained.names}
    write_tensors(folder, sizes, lambda name: trained.read(name).to(dtypes[name]))
    trained.config.dtype = source.config.dtype
    trained.config.save_pretrained(folder)
