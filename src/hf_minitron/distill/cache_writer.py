"""Writes a teacher's cache: one forward pass over every row, in shards that are whole or not there.

Which rows a shard holds depends on the rows and the settings alone, so any number of processes writes the same files,
and a run that was killed goes on with the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architectures import LOGIT_KEYS, get_logit_transform
from hf_minitron.distill.cache_files import FORMAT_VERSION, HEAD, INDEX, MANIFEST, PLAN, checksum, describe_file
from hf_minitron.distill.cache_folder import (
    check_folder,
    finished_shard,
    note_path,
    prepare_folder,
    save_tensors,
    shard_name,
    write_json,
)
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.compatibility import head_facts
from hf_minitron.distill.divergences import transformed
from hf_minitron.distill.fingerprints import dataset_keys, keys_tensor
from hf_minitron.distill.kd_inputs import Model
from hf_minitron.distill.kd_products import Head
from hf_minitron.distill.teacher import last_hidden
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.hardware import parse_dtype, versions

logger = logging.getLogger(__name__)

LOGITS_BYTES = 2**28  # of the teacher's logits, in fp32, at a time
HEAD_CONFIG_KEYS = ("model_type", "hidden_size", "vocab_size", *LOGIT_KEYS)

Rows = Dataset | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CacheFormat:
    """What is stored of every token: all that the head reads, or the k most likely next tokens and the rest's mass."""

    kind: Literal["exact", "topk"] = "exact"
    top_k: int = 64
    dtype: torch.dtype = torch.bfloat16
    vocab_limit: int | None = None
    max_shard_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "topk"):
            raise ValueError(f"kind={self.kind!r}: a cache is exact or topk. Use one of these.")
        if parse_dtype(self.dtype) is None:
            raise ValueError("dtype is that of the stored numbers: give float32, bfloat16 or float16.")
        if self.kind == "exact" and self.vocab_limit is not None:
            raise ValueError(
                f"vocab_limit={self.vocab_limit} is for top-k caches: an exact one holds the whole head, and the "
                "training run limits it. Leave it out."
            )
        for name in ("top_k", "vocab_limit", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not a positive number.")

    def bytes_per_token(self, hidden_size: int) -> int:
        """Bytes of one token in a shard."""
        size = self.dtype.itemsize
        return hidden_size * size if self.kind == "exact" else self.top_k * (4 + size) + 4


@dataclass(frozen=True)
class TeacherFacts:
    """What the manifest says of teacher, tokenizer and data, as far as it is known."""

    teacher: dict[str, Any]
    tokenizer_sha256: str | None = None
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


def write_cache(
    model: PreTrainedModel,
    rows: Rows,
    output_dir: str | Path,
    form: CacheFormat,
    facts: TeacherFacts,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
) -> CachedTeacher:
    """Caches what a teacher says about rows of `input_ids`, each once, and opens the result.

    Every process of a distributed run must call this with the same arguments. In a folder that an interrupted call
    with the same rows and settings left, finished shards are kept. A finished cache of the same rows and settings is
    opened as it is.

    Raises FileExistsError for a folder with anything else in it, unless it may be overwritten, ValueError for settings
    that the teacher cannot meet, OSError when the disk is too small, FloatingPointError when the teacher's output is
    not finite.
    """
    writer = _Writer(model.eval(), rows, form, facts, batch_size)
    folder, state = Path(output_dir).expanduser(), processes()
    done = check_folder(folder, writer.plan, overwrite)
    state.wait_for_everyone()
    if not done:
        if state.is_main_process:
            prepare_folder(folder, writer.plan | {"versions": versions()}, overwrite)
            writer.check_space(folder)
        state.wait_for_everyone()
        pending = [number for number in range(len(writer.shards)) if finished_shard(folder, number) is None]
        if kept := len(writer.shards) - len(pending):
            logger.info("%s: %d of %d shards are there already.", folder, kept, len(writer.shards))
        state.wait_for_everyone()
        numbers = pending[state.process_index :: state.num_processes]
        for number in tqdm(numbers, desc="caching", unit=" shards", disable=None if state.is_main_process else True):
            writer.write_shard(folder, number)
        state.wait_for_everyone()
        if state.is_main_process:
            writer.finish(folder)
        state.wait_for_everyone()
    return CachedTeacher.open(folder)


def processes() -> PartialState:
    """The processes of this run, on CPUs too; one that has finished waits up to a day for the others."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


class _Writer:
    """The rows of a cache, laid out in shards, and what makes one of them."""

    def __init__(
        self, model: PreTrainedModel, rows: Rows, form: CacheFormat, facts: TeacherFacts, batch_size: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a positive number of rows.")
        self.model, self.rows, self.form, self.facts, self.batch_size = model, rows, form, facts, batch_size
        self.vocab_size = _check_teacher(model, form)
        self.head = model.get_output_embeddings()
        self.bias = getattr(self.head, "bias", None)
        keys = dataset_keys(rows)
        if not keys:
            raise ValueError("There are no rows to cache. Use more text.")
        first: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        self.keys, self.chosen = list(first), list(first.values())
        self.lengths = [len(rows[index]["input_ids"]) for index in self.chosen]
        self.bytes_per_token = form.bytes_per_token(self.head.weight.shape[1])
        self.shards = list(self._lay_out())

    def _lay_out(self) -> Iterator[range]:
        """Ranges of rows that fill a shard; a row that is bigger than a shard has one to itself."""
        start = filled = 0
        for row, length in enumerate(self.lengths):
            size = length * self.bytes_per_token
            if row > start and filled + size > self.form.max_shard_bytes:
                yield range(start, row)
                start, filled = row, 0
            filled += size
        yield range(start, len(self.lengths))

    @cached_property
    def plan(self) -> dict[str, Any]:
        """All that decides what the shards hold."""
        config = self.model.config
        plan = {
            "format_version": FORMAT_VERSION,
            "kind": self.form.kind,
            "top_k": self.form.top_k if self.form.kind == "topk" else None,
            "dtype": str(self.form.dtype).removeprefix("torch."),
            "vocab_size": self.vocab_size,
            "teacher": self.facts.teacher,
            "teacher_config": {key: getattr(config, key) for key in HEAD_CONFIG_KEYS if hasattr(config, key)},
            "tokenizer_sha256": self.facts.tokenizer_sha256,
            "context": self.facts.context,
            "data": self.facts.data,
            "rows_sha256": checksum({"keys": [key.hex() for key in self.keys]}),
            "num_rows": len(self.keys),
            "num_tokens": sum(self.lengths),
            "bytes_per_token": self.bytes_per_token,
            "max_shard_bytes": self.form.max_shard_bytes,
        }
        return json.loads(json.dumps({key: value for key, value in plan.items() if value is not None}))

    def check_space(self, folder: Path) -> None:
        """Raises OSError when what is missing does not fit the disk."""
        missing = [rows for number, rows in enumerate(self.shards) if finished_shard(folder, number) is None]
        needed = sum(self.lengths[row] for rows in missing for row in rows) * self.bytes_per_token
        if self.form.kind == "exact":
            needed += self.head.weight.numel() * self.head.weight.element_size()
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"{folder} has {free / 1e9:.1f} GB free, the cache needs {needed / 1e9:.1f} GB "
                f"({self.bytes_per_token:,} bytes a token). Use fewer rows, --kind topk, a smaller --top-k, or another "
                "disk."
            )

    def write_shard(self, folder: Path, number: int) -> None:
        """Computes and writes one shard, and then the note that it is whole."""
        rows = self.shards[number]
        parts: dict[str, list[Tensor]] = {}
        for start in range(rows.start, rows.stop, self.batch_size):
            batch = range(start, min(start + self.batch_size, rows.stop))
            for name, tensor in self._encode(self._hidden(batch), batch).items():
                parts.setdefault(name, []).append(tensor.cpu())
        path = folder / shard_name(number)
        save_tensors({name: torch.cat(tensors) for name, tensors in parts.items()}, path)
        note = describe_file(path) | {"num_rows": len(rows), "num_tokens": sum(self.lengths[row] for row in rows)}
        write_json(note, note_path(folder, number))

    @torch.no_grad()
    def _hidden(self, rows: range) -> Tensor:
        """What the head reads, [tokens, hidden], without padding."""
        device = self.model.get_input_embeddings().weight.device
        batch = CausalLMCollator()([self.rows[self.chosen[row]] for row in rows])
        del batch["labels"]
        length = batch["input_ids"].shape[1]
        try:
            hidden = last_hidden(self.model, {name: tensor.to(device) for name, tensor in batch.items()})
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"The teacher ran out of memory on {len(rows)} rows of up to {length} tokens. Lower --batch-size, or "
                "use --teacher-quantization or --teacher-device-map auto."
            ) from error
        lengths = torch.tensor([self.lengths[row] for row in rows], device=hidden.device)
        kept = torch.arange(length, device=hidden.device) < lengths.unsqueeze(1)
        return hidden[kept.flatten()]

    @torch.no_grad()
    def _encode(self, hidden: Tensor, rows: range) -> dict[str, Tensor]:
        """What is stored of tokens. Raises FloatingPointError if it is not finite."""
        if self.form.kind == "exact":
            tensors = {"hidden": hidden.to(self.form.dtype)}
        else:
            step = max(1, LOGITS_BYTES // (4 * self.vocab_size))
            parts = [self._top_k(chunk) for chunk in hidden.split(step)]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FloatingPointError(
                    f"The teacher's {name} for rows {rows.start} to {rows.stop - 1} are not finite in "
                    f"{tensor.dtype}. Use --dtype bfloat16 or float32, or another --teacher-dtype."
                )
        return tensors

    def _top_k(self, hidden: Tensor) -> dict[str, Tensor]:
        """Most likely tokens, their log-probabilities and the mass of all others, from fp32 logits."""
        model = Model(hidden.to(self.head.weight.device), self.head.weight, self.bias)
        head = Head(model, self.vocab_size, torch.float32)
        logits = model.hidden.new_empty(len(hidden), self.vocab_size, dtype=torch.float32)
        head.project(model.hidden.to(head.dtype), out=logits)
        logits = transformed(logits, get_logit_transform(self.model.config))
        total = logits.logsumexp(-1, keepdim=True)
        kept, ids = logits.topk(self.form.top_k)
        rest = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return {
            "token_ids": ids.to(torch.uint32),
            "log_probs": (kept - total).to(self.form.dtype),
            "tail_mass": (rest - total).exp().squeeze(-1),
        }

    def write_head_and_index(self, folder: Path) -> dict[str, Any]:
        """Writes them, and says what the manifest says of them."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        save_tensors({"keys": keys_tensor(self.keys), "lengths": lengths}, folder / INDEX)
        found = {"index": describe_file(folder / INDEX)}
        if self.form.kind == "exact":
            tensors = {"weight": self.head.weight} | ({} if self.bias is None else {"bias": self.bias})
            save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / HEAD)
            found["head"] = describe_file(folder / HEAD)
        return found

    def finish(self, folder: Path) -> None:
        """Writes the manifest, with which the folder is a cache, and removes what only served the way there."""
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        manifest = plan | self.write_head_and_index(folder)
        manifest["shards"] = [finished_shard(folder, number) for number in range(len(self.shards))]
        manifest["checksum"] = checksum(manifest)
        write_json(manifest, folder / MANIFEST)
        for number in range(len(self.shards)):
            note_path(folder, number).unlink()
        (folder / PLAN).unlink()


def _check_teacher(model: PreTrainedModel, form: CacheFormat) -> int:
    """The entries of the distribution that is cached, after checking that it can be."""
    facts = head_facts("teacher", model)
    if not model.get_output_embeddings().weight.is_floating_point():
        raise ValueError("The teacher's head is quantized, and the loss reads its weights: load it without that.")
    if form.kind == "exact":
        return facts.vocab_size
    get_logit_transform(facts.config)  # raises if it is not known
    vocab_size = form.vocab_limit or facts.vocab_size
    if max(vocab_size, form.top_k) > facts.vocab_size or form.top_k > vocab_size:
        raise ValueError(
            f"top_k={form.top_k}, vocab_limit={form.vocab_limit}: the teacher has {facts.vocab_size} vocabulary "
            "entries, vocab_limit is at most that and top_k at most vocab_limit. Lower them."
        )
    return vocab_size
