"""The files of a teacher's cache: their names, the manifest, checksums, and shards read at positions.

A cache is a folder of safetensors and JSON. ``manifest.json`` is written last and tells all the rest: kind, teacher,
tokenizer, context, data, and the SHA-256 of every file. ``index.safetensors`` has the rows' keys and lengths in the
order in which the shards hold them, ``head.safetensors`` the teacher's head (kind "exact").

- kind "exact": ``hidden`` [tokens, hidden size], what the head reads. The loss is that of the live teacher.
- kind "topk": ``token_ids`` (uint32) and ``log_probs``, [tokens, k], most likely first, and ``tail_mass`` (fp32)
  [tokens], the probability of all other tokens together.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST, PLAN, INDEX, HEAD = "manifest.json", "plan.json", "index.safetensors", "head.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U32": torch.uint32}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own checksum and format."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = (folder / PLAN).is_file()
        raise FileNotFoundError(
            f"{folder} is an unfinished cache: run the same hf-minitron cache-teacher command again to finish it."
            if begun
            else f"{folder} has no {MANIFEST}: it is no teacher's cache. Make one with hf-minitron cache-teacher."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stored, version = manifest.pop("checksum"), manifest["format_version"]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole manifest ({error!r}). Copy the cache again.") from None
    if stored != checksum(manifest):
        raise ValueError(f"{path} was changed or damaged: its checksum differs. Copy the cache again.")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version={version}: this hf-minitron reads {FORMAT_VERSION}.")
    return manifest


def checksum(facts: Mapping[str, Any]) -> str:
    """sha256 of facts as canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(folder: Path, facts: Mapping[str, Any]) -> Path:
    """The path of a file of the manifest, if it is there and whole; FileNotFoundError or ValueError otherwise."""
    path = folder / facts["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {facts['file']}: it was not copied completely. Copy it again.")
    if path.stat().st_size != facts["num_bytes"] or hash_file(path) != facts["sha256"]:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not the manifest's {facts['sha256'][:12]}…. Copy it again, or make "
            "the cache anew."
        )
    return path


def describe_file(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"file": path.name, "num_bytes": path.stat().st_size, "sha256": hash_file(path)}


class Shard:
    """One open safetensors file, read at positions straight into a batch.

    That needs no more memory than a memory map, and on filesystems where page faults are dear it is many times faster.
    """

    def __init__(self, path: Path) -> None:
        self._file: io.FileIO = path.open("rb", buffering=0)
        size = int.from_bytes(self._file.read(8), "little")
        self._header = json.loads(self._file.read(size))
        self._header.pop("__metadata__", None)
        self._base = 8 + size
        self.names = sorted(self._header)

    def empty(self, name: str, shape: torch.Size, pinned: bool) -> Tensor:
        """Zeros [*shape, ...] for entries of a tensor."""
        facts = self._header[name]
        return torch.zeros(*shape, *facts["shape"][1:], dtype=_DTYPES[facts["dtype"]], pin_memory=pinned)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Reads len(out) rows of a tensor from row ``start`` on; ``out`` is contiguous."""
        into = memoryview(out.view(torch.uint8).numpy()).cast("B")
        row_bytes = math.prod(out.shape[1:]) * out.dtype.itemsize
        self._file.seek(self._base + self._header[name]["data_offsets"][0] + start * row_bytes)
        while into:
            count = self._file.readinto(into)
            if not count:
                raise OSError(f"{self._file.name} ended early: it was changed while it was read.")
            into = into[count:]

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()
