"""A cache's folder while it is written: its plan, the shards that are whole, files that are there or not.

``plan.json`` says what the folder is to hold, and a ``rows-*.json`` beside a shard that it is whole. The manifest takes
their place at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_minitron.checkpoint import check_output_dir
from hf_minitron.distill.cache_files import MANIFEST, PLAN


def check_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Whether the cache is there already. Raises FileExistsError if the folder is for anything else."""
    path = next((folder / name for name in (MANIFEST, PLAN) if (folder / name).is_file()), None)
    if path is None or overwrite:
        begun = folder.is_dir() and all(entry.name.startswith(f".{PLAN}.") for entry in folder.iterdir())
        check_output_dir(folder, overwrite or begun)  # a kill may leave a plan half written
        return False
    there = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key in plan.keys() | there.keys() - _NOT_PLANNED if plan.get(key) != there.get(key)]
    if different:
        one, other = ({key: facts.get(key) for key in sorted(different)} for facts in (there, plan))
        raise FileExistsError(
            f"{folder} holds {'a' if path.name == MANIFEST else 'an unfinished'} cache that differs in "
            f"{', '.join(sorted(different))}: there {one}, asked for {other}. Give another output_dir, or --overwrite."
        )
    return path.name == MANIFEST


_NOT_PLANNED = {"index", "head", "shards", "checksum", "versions"}


def prepare_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Leaves the plan and finished shards in the folder, and nothing else of an earlier run."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink()
    if not (folder / PLAN).is_file():
        write_json(plan, folder / PLAN)


def finished_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """The note of a shard that is whole; None if it is not."""
    note = note_path(folder, number)
    if not note.is_file():
        return None
    facts = json.loads(note.read_text(encoding="utf-8"))
    path = folder / facts["file"]
    return facts if path.is_file() and path.stat().st_size == facts["num_bytes"] else None


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"rows-{number:05}.safetensors"


def note_path(folder: Path, number: int) -> Path:
    """What says that a shard is whole, until the manifest does."""
    return folder / f"rows-{number:05}.json"


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.chmod((path.parent.stat().st_mode & 0o444) | 0o200)  # safetensors leaves it to the owner alone
    os.replace(temporary, path)


def write_json(facts: dict[str, Any], path: Path) -> None:
    """Writes a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
