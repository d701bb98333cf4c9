"""The stage ``distill`` as the command line and recipes run it: two checkpoints and text in, a trained student out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_minitron.checkpoint import Checkpoint, check_output_dir, copy_companions, write_tensors
from hf_minitron.data import check_row_length, describe_source, fingerprint_rows, load_text, pack_rows
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.sharding import save_whole
from hf_minitron.distill.teacher import check_quantization, load_model
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.hardware import fast_dtype, parse_dtype
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


@dataclass
class DistillArguments:
    """Which student learns from which teacher, on which text."""

    student_model: str = field(metadata={"help": "Hub id or folder of the pruned model to train."})
    dataset: str = field(
        metadata={"help": "Training text: Hub data set id, file, folder or glob (txt, jsonl, json, parquet)."}
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the teacher, usually the model that was pruned."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder that hf-minitron cache-teacher wrote; takes the teacher's place."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text; found by itself where only one can."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out text, read like --dataset."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on (default: validation, or train of another source)."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per packed row (default: what the student takes, at most 4096)."}
    )
    isolate_documents: bool = field(
        default=False,
        metadata={
            "help": "Restart positions after every document of a packed row and keep attention within documents, in "
            "student and teacher. Off by default, as the papers do not say and no gain was measured."
        },
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Use at most so many packed rows for training."})
    max_eval_rows: int = field(default=256, metadata={"help": "Use at most so many packed rows for evaluation."})
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub student."})
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."})
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16 or float16 (auto: bfloat16 where it is fast, else float32)."},
    )
    teacher_quantization: str | None = field(
        default=None, metadata={"help": "8bit or 4bit: the teacher's linear layers in bitsandbytes' formats."}
    )
    teacher_device_map: str | None = field(
        default=None,
        metadata={"help": "Where the teacher runs: auto spreads it over the devices (default: the student's device)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the models' repositories bring along."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace output_dir if it is not empty."})


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


@dataclass(frozen=True)
class PackedRows:
    """Packed rows and what the lineage says of them; ``facts["fingerprint"]`` is that of the rows."""

    dataset: Dataset
    facts: dict[str, Any]


@dataclass(frozen=True)
class DistillInputs:
    """What the students of one teacher can share: rows that are packed, and the teacher, loaded when first needed."""

    teacher: Checkpoint | CachedTeacher
    teacher_dtype: torch.dtype
    teacher_quantization: str | None
    teacher_device_map: str | dict[str, str] | None
    trust_remote_code: bool
    train: PackedRows
    held_out: PackedRows | None
    max_length: int

    @cached_property
    def teacher_model(self) -> PreTrainedModel | CachedTeacher:
        """The teacher in memory, or its cache: the same one for every student."""
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher
        how = (self.teacher_quantization, self.teacher_device_map)
        return _load(self.teacher, self.teacher_dtype, self.trust_remote_code, *how)


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
    student = _open(arguments.student_model, arguments.student_revision, arguments)
    if inputs is None:
        inputs = load_inputs(arguments, config, student)
    _check_vocabularies(student, inputs.teacher, config)
    if resume is None:
        _empty(output_dir)
    train, held_out = inputs.train, inputs.held_out
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    student_model = _load(student, torch.float32, arguments.trust_remote_code)
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


def load_inputs(
    arguments: DistillArguments, config: DistillationConfig, student: Checkpoint | None = None
) -> DistillInputs:
    """Reads the text and finds the teacher, after checking that they fit the student."""
    teacher, how = open_teacher(arguments, config.device)
    student = student or _open(arguments.student_model, arguments.student_revision, arguments)
    _check_vocabularies(student, teacher, config)
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    max_length, drawn = arguments.max_length, {}
    if isinstance(teacher, CachedTeacher):
        teacher.check_tokenizer(tokenizer)
        max_length = teacher.check_length(max_length)
        drawn = teacher.manifest["data"]
    max_length = check_row_length(student.config, max_length, "max_length")
    with PartialState().main_process_first():
        train = _train_rows(arguments, config, tokenizer, max_length, drawn.get("train"))
        held_out = held_out_rows(arguments, tokenizer, max_length, drawn.get("held_out"))
    return DistillInputs(teacher, *how, arguments.trust_remote_code, train, held_out, max_length)


def open_teacher(arguments: Any, device: torch.device) -> tuple[Checkpoint | CachedTeacher, tuple[Any, ...]]:
    """The teacher that the options name, or its cache, and in which dtype, bits and where its model is to be loaded."""
    cache = getattr(arguments, "teacher_cache", None)
    if cache is not None and getattr(arguments, "isolate_documents", False):
        raise ValueError(
            "isolate_documents changes what a teacher says of packed rows, and caches hold what it said without. "
            "Give --teacher-model, or leave isolate_documents out."
        )
    if (arguments.teacher_model is None) == (cache is None):
        raise ValueError(
            f"teacher_model={arguments.teacher_model}, teacher_cache={cache}: the student learns from one of the two. "
            "Give --teacher-model to run the teacher, or --teacher-cache to read what it said."
        )
    dtype = parse_dtype(arguments.teacher_dtype) or fast_dtype(device)
    check_quantization(arguments.teacher_quantization, dtype)
    device_map = arguments.teacher_device_map
    if arguments.teacher_quantization and device_map is None:
        device_map = {"": str(device)}
    how = (dtype, arguments.teacher_quantization, device_map)
    if cache is not None:
        return CachedTeacher.open(cache), how
    return _open(arguments.teacher_model, arguments.teacher_revision, arguments), how


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


def _open(model: str, revision: str | None, arguments: DistillArguments) -> Checkpoint:
    return Checkpoint.open(model, revision=revision, trust_remote_code=arguments.trust_remote_code)


def _check_vocabularies(student: Checkpoint, teacher: Checkpoint | CachedTeacher, config: DistillationConfig) -> None:
    """The same check as the Trainer's, but before weights and data are read."""
    cached = isinstance(teacher, CachedTeacher)
    sizes = (student.config.vocab_size, teacher.vocab_size if cached else teacher.config.vocab_size)
    if sizes[0] != sizes[1] and config.vocab_limit is None:
        raise ValueError(
            f"the student has vocab_size={sizes[0]}, the teacher {sizes[1]}: the KL compares token by token. "
            "Use a teacher with the same tokenizer, or --vocab-limit if the difference is padding."
        )


def read_rows(
    source: str,
    how: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    most: int | None,
    seed: int,
    drawn: dict[str, Any] | None = None,
) -> PackedRows:
    """Packed rows of a source at random, at most ``most``; of those ``drawn`` for a cache, if there is one.

    A packed row depends on the order of the documents, so a cache's draw is made again, and its first rows taken.
    """
    draw = drawn or {"max_rows": most, "seed": seed}
    rows = pack_rows(load_text(source, **how), tokenizer, length, max_rows=draw["max_rows"], seed=draw["seed"])
    if most is not None and most < len(rows):
        rows = rows.select(range(most))
    return PackedRows(rows, describe_source(source, **how) | {"fingerprint": fingerprint_rows(rows)})


def _train_rows(
    arguments: DistillArguments,
    config: DistillationConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    drawn: dict[str, Any] | None,
) -> PackedRows:
    """Rows at random, no more than the run's steps can use, so that a stream is only read as far as needed."""
    most = arguments.max_train_rows
    if config.max_steps > 0:
        rows_per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        most = min(most or sys.maxsize, config.max_steps * rows_per_step)
    how = {"config_name": arguments.dataset_config, "split": arguments.dataset_split}
    how["text_column"] = arguments.text_column
    seed = config.seed if config.data_seed is None else config.data_seed
    return read_rows(arguments.dataset, how, tokenizer, max_length, most, seed, drawn)


def held_out_rows(
    arguments: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, drawn: dict[str, Any] | None = None
) -> PackedRows | None:
    """Rows at random, but the same ones whatever the run's seed."""
    if arguments.eval_dataset is None:
        return None
    same = arguments.eval_dataset == arguments.dataset
    how = {"split": _eval_split(arguments), "text_column": arguments.text_column}
    how["config_name"] = arguments.dataset_config if same else None
    most = arguments.max_eval_rows
    return read_rows(arguments.eval_dataset, how, tokenizer, max_length, most, seed=0, drawn=drawn)


def _eval_split(arguments: DistillArguments) -> str:
    same = arguments.eval_dataset == arguments.dataset
    split = arguments.eval_split or ("validation" if same else "train")
    if same and split == arguments.dataset_split:
        raise ValueError(
            f"eval_dataset and dataset are both {arguments.dataset}, split {split}: held-out text must not be "
            "trained on. Give another."
        )
    return split


def _load(
    source: Checkpoint,
    dtype: torch.dtype,
    trust_remote_code: bool,
    quantization: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    how = {"quantization": quantization, "device_map": device_map, "trust_remote_code": trust_remote_code}
    return load_model(source, dtype, **how)


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
