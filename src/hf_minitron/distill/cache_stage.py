"""The stage ``cache-teacher`` as the command line runs it: a teacher and text in, a cache of what it says out."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import concatenate_datasets
from transformers import AutoTokenizer

from hf_minitron.data import check_row_length
from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, processes, write_cache
from hf_minitron.distill.fingerprints import hash_tokenizer
from hf_minitron.distill.inputs import as_in_distill, held_out_rows, open_teacher, read_rows, text_to_read
from hf_minitron.distill.teacher import load_model
from hf_minitron.hardware import parse_dtype


@dataclass
class CacheTeacherArguments:
    """Which teacher is asked about which rows, and what is kept of its answers."""

    teacher_model: str = field(metadata={"help": "Hub id or folder of the teacher."})
    dataset: str = text_to_read()
    output_dir: str = field(metadata={"help": "Folder of the cache. An unfinished one with the same settings goes on."})
    kind: Literal["exact", "topk"] = field(
        default="exact",
        metadata={
            "help": "exact: the states that the teacher's head reads, and the head; the loss is the live teacher's. "
            "topk: the most likely tokens and the probability of all others together."
        },
    )
    top_k: int = field(default=64, metadata={"help": "Most likely tokens that --kind topk keeps."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Of the stored states (exact) or log-probabilities (topk)."}
    )
    vocab_limit: int | None = field(
        default=None, metadata={"help": "With --kind topk, as in distill: only the first entries, renormalised."}
    )
    dataset_config: str | None = as_in_distill("dataset_config")
    dataset_split: str = as_in_distill("dataset_split")
    text_column: str | None = as_in_distill("text_column")
    eval_dataset: str | None = as_in_distill("eval_dataset")
    eval_split: str | None = as_in_distill("eval_split")
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per packed row (default: what the teacher takes, at most 4096)."}
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Cache at most so many training rows; distill then draws from these."}
    )
    max_eval_rows: int = as_in_distill("max_eval_rows")
    seed: int = field(default=42, metadata={"help": "Of the order of the documents; distill follows it."})
    batch_size: int = field(default=8, metadata={"help": "Rows that the teacher reads at a time."})
    max_shard_bytes: int = field(default=1_000_000_000, metadata={"help": "Size that no shard exceeds."})
    teacher_revision: str | None = as_in_distill("teacher_revision")
    teacher_dtype: str = as_in_distill("teacher_dtype")
    teacher_quantization: str | None = as_in_distill("teacher_quantization")
    teacher_device_map: str | None = as_in_distill("teacher_device_map")
    trust_remote_code: bool = as_in_distill("trust_remote_code")
    overwrite: bool = as_in_distill("overwrite")


@dataclass(frozen=True)
class CacheReport:
    """What was cached, and how long it took this time."""

    output_dir: Path
    kind: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    bytes_per_token: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"output_dir": str(self.output_dir)}


def cache_teacher(arguments: CacheTeacherArguments) -> CacheReport:
    """Runs the teacher once over the rows that ``distill`` would train and evaluate on, and writes what it says.

    Under ``accelerate launch`` or ``torchrun`` every process writes shards of its own.
    """
    start, state = time.monotonic(), processes()
    form = CacheFormat(
        arguments.kind, arguments.top_k, parse_dtype(arguments.dtype), arguments.vocab_limit, arguments.max_shard_bytes
    )
    source, (dtype, quantization, device_map) = open_teacher(arguments, state.device)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    max_length = check_row_length(source.config, arguments.max_length, "max_length")
    how = {"config_name": arguments.dataset_config, "split": arguments.dataset_split}
    how["text_column"] = arguments.text_column
    with state.main_process_first():
        most, seed = arguments.max_train_rows, arguments.seed
        parts = {"train": read_rows(arguments.dataset, how, tokenizer, max_length, most, seed)}
        if (held_out := held_out_rows(arguments, tokenizer, max_length)) is not None:
            parts["held_out"] = held_out
    drawn = {"train": {"max_rows": most, "seed": seed}, "held_out": {"max_rows": arguments.max_eval_rows, "seed": 0}}
    facts = TeacherFacts(
        teacher=source.source | {"dtype": str(dtype).removeprefix("torch.")} | _known(quantization=quantization),
        tokenizer_sha256=hash_tokenizer(tokenizer),
        context={"max_length": max_length, "packing": "wrapped"},
        data={name: part.facts | {"num_rows": len(part.dataset)} | drawn[name] for name, part in parts.items()},
    )
    trust = arguments.trust_remote_code
    model = load_model(source, dtype, quantization=quantization, device_map=device_map, trust_remote_code=trust)
    if device_map is None:
        model = model.to(state.device)
    rows = concatenate_datasets([part.dataset for part in parts.values()])
    cache = write_cache(
        model, rows, arguments.output_dir, form, facts,
        batch_size=arguments.batch_size, overwrite=arguments.overwrite,
    )  # fmt: skip
    facts = cache.manifest
    num_bytes = sum(path.stat().st_size for path in cache.folder.iterdir())
    counts = (facts["num_rows"], facts["num_tokens"], num_bytes, facts["bytes_per_token"])
    return CacheReport(cache.folder, cache.kind, *counts, round(time.monotonic() - start, 3))


def _known(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}
