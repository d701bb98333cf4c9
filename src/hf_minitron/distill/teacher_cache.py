"""A teacher read from disk: what it said about every row of a data set, found again by the row's content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architectures import get_logit_transform
from hf_minitron.distill.cache_files import MANIFEST, Shard, check_file, hash_file, read_manifest
from hf_minitron.distill.compatibility import HeadFacts, check_heads, head_facts
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.fingerprints import dataset_keys, hash_tokenizer, keys_tensor
from hf_minitron.distill.teacher import HeadTargets, TopKTargets

MAX_OPEN_SHARDS = 64


class CachedTeacher:
    """Stands for a teacher in `DistillationTrainer`, without its weights.

    Every file is checked against the manifest's SHA-256 before anything in it is used: manifest, index and head when
    the cache is opened, a shard when a process reads from it first.
    """

    needs_row_keys = True

    def __init__(self, folder: Path, manifest: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.folder, self.manifest, self.device = folder, manifest, torch.device(device)
        self.kind: str = manifest["kind"]
        index = load_file(check_file(folder, manifest["index"]))
        self._keys = index["keys"].numpy()
        self._order = np.argsort(self._keys[:, 0], kind="stable")
        self._first_words = self._keys[self._order, 0]
        self._lengths = index["lengths"].numpy().astype(np.int64)
        self._shard_of = np.repeat(np.arange(len(manifest["shards"])), [s["num_rows"] for s in manifest["shards"]])
        self._starts = _starts_in_shards(self._lengths, self._shard_of)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._head = {}
        if self.kind == "exact":
            head = load_file(check_file(folder, manifest["head"]))
            self._head = {name: tensor.to(self.device) for name, tensor in head.items()}

    @classmethod
    def open(cls, folder: str | Path, device: torch.device | str = "cpu") -> CachedTeacher:
        """Reads manifest, index and head. Raises ValueError or FileNotFoundError for what is not a whole cache."""
        folder = Path(folder).expanduser()
        manifest = read_manifest(folder)
        missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(manifest['shards'])} shards, such as {missing[0]}: it was not "
                "copied completely. Copy it again, or run hf-minitron cache-teacher again with --overwrite."
            )
        return cls(folder, manifest, device)

    @property
    def knows_labels(self) -> bool:
        return self.kind == "exact"

    @property
    def vocab_size(self) -> int:
        """Entries that the teacher's distribution is over."""
        return self.manifest["vocab_size"]

    @property
    def num_rows(self) -> int:
        return len(self._lengths)

    @property
    def source(self) -> dict[str, Any]:
        """What this is, for the lineage: the teacher's identity, and the cache by the hash of its manifest."""
        names = ("kind", "top_k", "dtype", "num_rows", "num_tokens")
        facts = {name: self.manifest[name] for name in names if name in self.manifest}
        facts |= {"path": self.folder.resolve().name, "manifest_sha256": hash_file(self.folder / MANIFEST)}
        return self.manifest["teacher"] | {"cache": facts}

    def to(self, device: torch.device | str) -> CachedTeacher:
        """Puts the head on a device; targets come there too."""
        self.device = torch.device(device)
        self._head = {name: tensor.to(self.device) for name, tensor in self._head.items()}
        return self

    def targets(self, inputs: Mapping[str, Tensor], row_keys: Tensor | None) -> HeadTargets | TopKTargets:
        """What the teacher said about the rows of a batch, 0 at padding; flat, rows * length tokens."""
        if row_keys is None:
            raise ValueError(
                "The batch has no row_keys, by which a cached teacher finds its rows. Use CausalLMCollator with "
                "row_keys=True, or give your collator's batches hf_minitron.distill.fingerprints.keys_tensor(...)."
            )
        shape = inputs["input_ids"].shape
        found = self.find(row_keys.cpu().numpy())
        if (found < 0).any():
            raise ValueError(
                f"{self.folder} lacks {int((found < 0).sum())} of {len(found)} rows of a batch. Rows are known by "
                "their token ids, and those of a stream are only looked up when they come. Use the data, packing and "
                "seed that the cache was made with, or run the teacher (--teacher-model)."
            )
        tensors = self._read(found, shape)
        if self.kind == "exact":
            transform = get_logit_transform(self._config)
            return HeadTargets(tensors["hidden"], self._head["weight"], self._head.get("bias"), transform)
        return TopKTargets(tensors["token_ids"], tensors["log_probs"], tensors["tail_mass"], self.vocab_size)

    def gathered(self, targets: HeadTargets | TopKTargets) -> nullcontext[HeadTargets | TopKTargets]:
        """The targets as they are: a cached head is always whole."""
        return nullcontext(targets)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Positions [rows] of keys, int64 [rows, 2]; -1 for those that are not here."""
        at = np.searchsorted(self._first_words, keys[:, 0])
        found = np.full(len(keys), -1)
        for row, (start, key) in enumerate(zip(at, keys, strict=True)):
            while start < len(self._order) and self._first_words[start] == key[0]:
                if self._keys[self._order[start], 1] == key[1]:
                    found[row] = self._order[start]
                    break
                start += 1
        return found

    def check_rows(self, dataset: Any, name: str) -> None:
        """Raises ValueError, with their number, if rows of a data set are not in the cache. A stream is not read."""
        if dataset is None or isinstance(dataset, IterableDataset | torch.utils.data.IterableDataset):
            return
        if isinstance(dataset, Mapping):
            for part, rows in dataset.items():
                self.check_rows(rows, f"{name}[{part!r}]")
            return
        rows = dataset if isinstance(dataset, Dataset | Sequence) else [dataset[i] for i in range(len(dataset))]
        keys = dataset_keys(rows)
        missing = int((self.find(keys_tensor(keys).numpy()) < 0).sum()) if keys else 0
        if missing:
            raise ValueError(
                f"{missing:,} of {len(keys):,} rows of {name} are not in the cache {self.folder}, which has "
                f"{self.num_rows:,}. Rows are known by their token ids: use the data, packing and seed that the cache "
                "was made with (its manifest.json tells), or cache these rows."
            )

    def check_student(self, student: PreTrainedModel, args: DistillationConfig, processing_class: Any = None) -> None:
        """Raises ValueError, with the difference, if the cache does not fit a student and its run."""
        if isinstance(processing_class, PreTrainedTokenizerBase):
            self.check_tokenizer(processing_class)
        facts, vocab_limit = head_facts("student", student), args.vocab_limit
        if self.kind == "exact":
            check_heads(facts, HeadFacts(self.vocab_size, self._config), vocab_limit)
            return
        get_logit_transform(facts.config)  # raises if it is not known
        for name, needed in (("temperature", 1), ("divergence", "forward_kl")):
            if getattr(args, name) != needed:
                raise ValueError(
                    f"{name}={getattr(args, name)} needs the teacher's whole distribution, and {self.folder} holds the "
                    f"top {self.manifest['top_k']} and the mass of the rest. Use {name}={needed}, or an exact cache."
                )
        entries = min(vocab_limit or facts.vocab_size, facts.vocab_size)
        if entries != self.vocab_size:
            raise ValueError(
                f"The student's distribution has {entries} entries (vocab_limit={vocab_limit}, head "
                f"{facts.vocab_size}), the cached teacher's {self.vocab_size}: the KL needs one vocabulary. Set "
                f"vocab_limit={self.vocab_size} if only padding differs, or make the cache with another --vocab-limit."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError unless the tokenizer has the vocabulary and merges that the cache was made with."""
        made_with, found = self.manifest.get("tokenizer_sha256"), hash_tokenizer(tokenizer)
        if made_with not in (None, found):
            raise ValueError(
                f"The cache {self.folder} was made with another tokenizer: vocabulary and merges {made_with[:12]}…, "
                f"the student's {found[:12]}…. Token ids mean other words; use the teacher's tokenizer."
            )

    def check_length(self, max_length: int | None) -> int | None:
        """The length of the cache's packed rows. Raises ValueError if another is asked for."""
        context = self.manifest["context"]
        length = context.get("max_length", max_length)
        if max_length not in (None, length):
            raise ValueError(
                f"max_length={max_length}, but the rows of the cache {self.folder} have {length} tokens (packing "
                f"{context.get('packing')}). Use --max-length {length}, or make another cache."
            )
        return length

    def verify(self) -> None:
        """Checks every shard against the manifest now, instead of when it is first read."""
        for number in range(len(self.manifest["shards"])):
            self._shard(number)

    @property
    def _config(self) -> Any:
        """What the teacher's config says of its logits."""
        return SimpleNamespace(**self.manifest["teacher_config"])

    def _read(self, rows: np.ndarray, shape: torch.Size) -> dict[str, Tensor]:
        """Every tensor of the rows, [rows * length, ...], on the device."""
        batch: dict[str, Tensor] = {}
        for row, position in enumerate(rows):
            shard, length = self._shard(int(self._shard_of[position])), int(self._lengths[position])
            if length > shape[1]:
                raise ValueError(
                    f"A row of {length} tokens does not fit the batch {tuple(shape)}: it was cut after its key was "
                    "taken. Take keys of the rows as the model reads them."
                )
            for name in shard.names:
                if name not in batch:
                    batch[name] = shard.empty(name, shape, pinned=self.device.type == "cuda")
                shard.read_into(name, int(self._starts[position]), batch[name][row, :length])
        return {name: tensor.flatten(0, 1).to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _shard(self, number: int) -> Shard:
        """An open shard, checked once; the one that was not used for longest is closed."""
        if number not in self._open:
            facts = self.manifest["shards"][number]
            if number not in self._verified:
                check_file(self.folder, facts)
                self._verified.add(number)
            self._open[number] = Shard(self.folder / facts["file"])
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]


def _starts_in_shards(lengths: np.ndarray, shard_of: np.ndarray) -> np.ndarray:
    """Where each row begins in its shard, in tokens."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first = np.r_[True, shard_of[1:] != shard_of[:-1]]
    return starts - np.repeat(starts[first], np.bincount(shard_of))
