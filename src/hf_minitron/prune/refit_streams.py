"""Calibration rows in batches, and the residual streams at a layer's boundary: in memory, or beyond a limit on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HELD_OUT_SHARE = 8  # every eighth row judges, the others are fitted


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, tokens), and whether they judge rather than being fitted."""

    input_ids: Tensor
    held_out: bool


def split_rows(rows: Sequence[Sequence[int]], batch_size: int) -> list[Batch]:
    """Batches to fit, then batches held out: every eighth row, from the second on; of a single row nothing is."""
    ids = torch.as_tensor([list(row) for row in rows])
    held_out = torch.arange(len(ids)) % HELD_OUT_SHARE == 1
    return [
        Batch(part, is_held_out)
        for is_held_out, chosen in ((False, ids[~held_out]), (True, ids[held_out]))
        if len(chosen)
        for part in chosen.split(batch_size)
    ]


class StreamStore:
    """Tensors by number. The first ``max_bytes`` stay in memory (on the CPU), the others go to a temporary folder."""

    def __init__(self, max_bytes: float):
        self._max_bytes, self._bytes = max_bytes, 0
        self._held: dict[int, Tensor | Path] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def __setitem__(self, number: int, states: Tensor) -> None:
        states = states.detach().float().cpu().contiguous()
        before = self._held.get(number)
        if isinstance(before, Tensor):
            self._bytes -= before.nbytes
        if isinstance(before, Path) or self._bytes + states.nbytes > self._max_bytes:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="hf-minitron-")
            path = Path(self._folder.name) / f"{number}.safetensors"
            save_file({"states": states}, path)
            self._held[number] = path
        else:
            self._held[number] = states
            self._bytes += states.nbytes

    def __getitem__(self, number: int) -> Tensor:
        held = self._held[number]
        return load_file(held)["states"] if isinstance(held, Path) else held

    @property
    def num_on_disk(self) -> int:
        return sum(isinstance(held, Path) for held in self._held.values())
