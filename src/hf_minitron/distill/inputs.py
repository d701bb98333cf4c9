"""What a distillation takes in: which student and teacher, or its cache, and packed rows of text."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_minitron.checkpoint import Checkpoint
from hf_minitron.data import check_row_length, describe_source, fingerprint_rows, held_out_split, load_text, pack_rows
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.fingerprints import check_same_tokens
from hf_minitron.distill.intermediate import check_has_states
from hf_minitron.distill.stream_inputs import data_seed, open_stream, stream_sources
from hf_minitron.distill.teacher import check_quantization, load_model
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.hardware import fast_dtype, parse_dtype
from hf_minitron.mixes import MixSource
from hf_minitron.row_stream import RowStream, Stopping


@dataclass
class DistillArguments:
    """Which student learns from which teacher, on which text."""

    student_model: str = field(metadata={"help": "Hub id or folder of the pruned model to train."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Training text: Hub data set id, file, folder or glob (txt, jsonl, json, parquet)."},
    )
    dataset_mix: str | None = field(
        default=None,
        metadata={
            "help": "YAML or JSON file that lists several sources with weights (docs/data.md); takes the place of "
            "--dataset and is streamed."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and pack --dataset while training, not before; needs --max-steps."},
    )
    shuffle_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Streams: shuffle the documents of each source within blocks of so many, and the files "
            "(default: 10,000; 0 keeps the order)."
        },
    )
    dataset_epochs: int | None = field(
        default=None, metadata={"help": "Streams: read each source so many times (default: again without end)."}
    )
    stopping: Stopping = field(
        default="first",
        metadata={"help": "Streams with --dataset-epochs: end with the first source that ends, or with all of them."},
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


def as_in_distill(name: str) -> Any:
    """An option that ``distill`` has too, with its default and help, for the dataclass of another command."""
    option = {option.name: option for option in dataclasses.fields(DistillArguments)}[name]
    return field(default=option.default, metadata=option.metadata)


def text_to_read() -> Any:
    """`dataset` where it must be given."""
    return field(metadata=as_in_distill("dataset").metadata)


@dataclass(frozen=True)
class PackedRows:
    """Packed rows and what the lineage says of them; ``facts["fingerprint"]`` is that of the rows.

    What was read of a stream is known after training: `DistillationTrainer.describe_stream`.
    """

    dataset: Dataset | RowStream
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
        return self.load_teacher()

    def load_teacher(self) -> PreTrainedModel | CachedTeacher:
        """The same, but a model of one's own."""
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher
        how = (self.teacher_quantization, self.teacher_device_map)
        return load_checked(self.teacher, self.teacher_dtype, self.trust_remote_code, *how)


def load_inputs(
    arguments: DistillArguments, config: DistillationConfig, student: Checkpoint | None = None
) -> DistillInputs:
    """Reads the text and finds the teacher, after checking that they fit the student."""
    sources = stream_sources(arguments, config)
    teacher, how = open_teacher(arguments, config.device)
    check_has_states(isinstance(teacher, CachedTeacher), config)
    student = student or open_checkpoint(arguments.student_model, arguments.student_revision, arguments)
    check_vocabularies(student, teacher, config)
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    max_length, drawn = arguments.max_length, {}
    if isinstance(teacher, CachedTeacher):
        teacher.check_tokenizer(tokenizer)
        max_length = teacher.check_length(max_length)
        drawn = teacher.manifest["data"]
    elif (teacher_tokenizer := find_tokenizer(teacher)) is not None:
        check_same_tokens(tokenizer, teacher_tokenizer)
    max_length = check_row_length(student.config, max_length, "max_length")
    with PartialState().main_process_first():
        train = train_rows(arguments, config, tokenizer, max_length, sources, drawn.get("train"))
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
    return open_checkpoint(arguments.teacher_model, arguments.teacher_revision, arguments), how


def open_checkpoint(model: str, revision: str | None, arguments: DistillArguments) -> Checkpoint:
    """The headers of a student or teacher, with what the options say of foreign code."""
    return Checkpoint.open(model, revision=revision, trust_remote_code=arguments.trust_remote_code)


def check_vocabularies(student: Checkpoint, teacher: Checkpoint | CachedTeacher, config: DistillationConfig) -> None:
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


def find_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights, if there is one."""
    if not any((checkpoint.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(checkpoint.folder)


def train_rows(
    arguments: Any,
    config: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sources: list[MixSource] | None = None,
    drawn: dict[str, Any] | None = None,
) -> PackedRows:
    """The stream of ``sources``; without, rows at random, no more than the run's steps can use.

    A data set on the Hub is therefore only read as far as needed.
    """
    if sources is not None:
        stream = open_stream(sources, arguments, config, tokenizer, max_length)
        return PackedRows(stream, stream.describe())
    most = arguments.max_train_rows
    if config.max_steps > 0:
        rows_per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        most = min(most or sys.maxsize, config.max_steps * rows_per_step)
    how = {"config_name": arguments.dataset_config, "split": arguments.dataset_split}
    how["text_column"] = arguments.text_column
    return read_rows(arguments.dataset, how, tokenizer, max_length, most, data_seed(config), drawn)


def held_out_rows(
    arguments: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, drawn: dict[str, Any] | None = None
) -> PackedRows | None:
    """Rows at random, but the same ones whatever the run's seed."""
    if arguments.eval_dataset is None:
        return None
    same = arguments.eval_dataset == arguments.dataset
    how = {"split": held_out_split(arguments), "text_column": arguments.text_column}
    how["config_name"] = arguments.dataset_config if same else None
    most = arguments.max_eval_rows
    return read_rows(arguments.eval_dataset, how, tokenizer, max_length, most, seed=0, drawn=drawn)


def load_checked(
    source: Checkpoint,
    dtype: torch.dtype,
    trust_remote_code: bool,
    quantization: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """A checkpoint's model in ``dtype``; refused when a weight is NaN or Inf."""
    how = {"quantization": quantization, "device_map": device_map, "trust_remote_code": trust_remote_code}
    return load_model(source, dtype, **how)
