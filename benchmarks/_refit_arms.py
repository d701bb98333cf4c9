"""What the refit benchmark measures: teachers and their texts, pruned students, and one distillation (an arm)."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_minitron.data import load_text, pack_rows
from hf_minitron.distill.kd_head import fused_linear_kd
from hf_minitron.prune.importance import score_model
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "text" / "tinystories"
ROW_LENGTH = 256


@dataclass(frozen=True)
class Subject:
    """A teacher; by per cent of its parameters removed, hidden_size and intermediate_size; the learning rates tried."""

    folder: Path
    widths: dict[int, tuple[int, int]]
    rates: tuple[float, ...]


SUBJECTS = {
    "quickstart": Subject(
        QUICKSTART / "teacher", {25: (216, 448), 50: (168, 320), 66: (128, 224)}, (3e-4, 8e-4, 2e-3, 5e-3)
    ),
    "260k": Subject(
        SHARED / "models" / "stories260k-hf", {25: (56, 132), 50: (48, 84), 66: (32, 88)}, (1e-3, 2e-3, 4e-3, 8e-3)
    ),
    "656k": Subject(
        SHARED / "models" / "tinystories-656k",
        {25: (104, 320), 50: (80, 200), 66: (56, 160)},
        (2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
}
METHODS = {
    "minitron": {"method": "minitron"},
    "refit": {"method": "refit"},
    "refit, sequential": {"method": "refit", "refit_mode": "sequential"},
}


def sizes_of(subject: Subject, target: str) -> dict[str, Any]:
    """What ``PruneConfig`` takes for a target such as ``width 50`` (per cent removed) or ``without 2+3`` (layers)."""
    kind, _, value = target.partition(" ")
    if kind == "width":
        hidden, ffn = subject.widths[int(value)]
        return {"hidden_size": hidden, "intermediate_size": ffn}
    return {"drop_layers": [int(layer) for layer in value.split("+")]}


@dataclass
class Bench:
    """A teacher with its rows: for one data seed, calibration and training rows are different rows of one shuffle.

    Held-out rows come from other documents; stories that are in both files are left out of them.
    """

    name: str
    seed: int
    folder: Path
    num_calibration: int
    num_held_out: int
    scoring_seconds: float | None = None
    _states: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subject = SUBJECTS[self.name]
        texts = find_texts(self.name, self.folder)
        tokenizer = AutoTokenizer.from_pretrained(self.subject.folder)
        self.teacher = AutoModelForCausalLM.from_pretrained(self.subject.folder, dtype=torch.float32).eval()
        self.held_out = torch.tensor(read_rows(texts["held_out"], tokenizer, self.num_held_out, None))
        rows = read_rows(texts["train"], tokenizer, None, self.seed)
        self.calibration, self.training = rows[: self.num_calibration], torch.tensor(rows[self.num_calibration :])
        self.reference = loss_of(self.teacher, self.held_out)
        self._pruner: PrunerForCausalLM | None = None

    @property
    def pruner(self) -> PrunerForCausalLM:
        """Scored when first asked for; ``scoring_seconds`` is the processor time of that pass."""
        if self._pruner is None:
            self._pruner = PrunerForCausalLM(self.teacher)
            start = time.process_time()
            self._pruner.scores = score_model(self.teacher, self.calibration, progress=False)
            self.scoring_seconds = time.process_time() - start
        return self._pruner

    def prune(self, target: str, method: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        """A student, and what is recorded of it: loss, share removed, cost in scoring passes."""
        pruner = self.pruner
        start = time.process_time()
        config = PruneConfig(**sizes_of(self.subject, target), **METHODS[method])
        student = pruner.prune(config, self.calibration, progress=False)
        seconds = time.process_time() - start
        return student, {
            "removed": 1 - student.num_parameters() / self.teacher.num_parameters(),
            "teacher": self.reference,
            "pruned": loss_of(student, self.held_out),
            "fell_back": bool(pruner.planned.info.get("fell_back", False)),
            "scoring_seconds": self.scoring_seconds,
            "prune_seconds": seconds,
        }

    def batches(self, steps: int, rows_per_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids and the teacher's last hidden states, which are computed once; rows repeat when they run out."""
        parts = self.training[: len(self.training) // rows_per_step * rows_per_step].split(rows_per_step)
        for step in range(steps):
            index = step % len(parts)
            if index not in self._states:
                with torch.no_grad():
                    self._states[index] = self.teacher.model(input_ids=parts[index]).last_hidden_state.flatten(0, 1)
            yield parts[index], self._states[index]

    def distil(
        self, student: PreTrainedModel, rate: float, steps: int, rows_per_step: int, points: list[int]
    ) -> list[tuple[int, float]]:
        """(step, held-out loss) at ``points``, along a distillation by forward KL.

        AdamW, a tenth of the steps to warm up, then cosine to zero, gradients clipped to 1.
        """
        student = copy.deepcopy(student).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(1, steps // 10))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        curve = []
        for step, (batch, known) in enumerate(self.batches(steps, rows_per_step), start=1):
            states = student.model(input_ids=batch).last_hidden_state.flatten(0, 1)
            weights = torch.ones(len(states))
            found = fused_linear_kd(states, student.lm_head.weight, known, self.teacher.lm_head.weight, weights)
            (found.loss / len(states)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            cosine.step()
            if step in points:
                curve.append((step, loss_of(student, self.held_out)))
                student.train()
        return curve


def find_texts(name: str, folder: Path) -> dict[str, Path]:
    """Files to train on and to evaluate on, without common documents."""
    if name == "quickstart":
        sys.path.insert(0, str(QUICKSTART))
        from stdlib_corpus import write_corpus

        return write_corpus(folder)
    train, held_out = STORIES / "train_5000.jsonl", folder / "held_out.jsonl"
    known = {_opening(json.loads(line)["text"]) for line in train.read_text(encoding="utf-8").splitlines()}
    stories = json.loads((STORIES / "stories_3000.json").read_text(encoding="utf-8"))["texts"]
    fresh = [story for story in stories if _opening(story) not in known]  # 2984 of 3000
    held_out.write_text("".join(json.dumps({"text": story}) + "\n" for story in fresh), encoding="utf-8")
    return {"train": train, "held_out": held_out}


def _opening(text: str) -> str:
    return " ".join(text.split())[:100]


def read_rows(text: Path, tokenizer: Any, count: int | None, seed: int | None) -> list[list[int]]:
    return pack_rows(load_text(text), tokenizer, ROW_LENGTH, max_rows=count, seed=seed)["input_ids"]


@torch.no_grad()
def loss_of(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Mean next-token loss in nats."""
    model.eval()
    sums = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(8)]
    return sum(sums) / len(rows)
