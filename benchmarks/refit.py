"""Claim: refit starts much closer to the teacher than plain Minitron, and the lead lasts; how much, and how long?

Measures  held-out loss after pruning and along a short distillation, for Minitron's slices and for refit in both modes,
          each at the best of the same four learning rates; by width, and with --drop-layers by depth. Also the time of
          refit by the scoring forward pass on the same rows, and the steps that a method needs to reach Minitron's
          final loss, as a share of Minitron's. Means over data seeds.
Data      the quickstart's teacher on the standard library's source; with --models also the two story models and the
          stories in ../shared/data, where they are there.
Command   python benchmarks/refit.py [--models quickstart 260k 656k] [--removed 25 50 66] [--seeds N] [--steps N] ...
          The full run: --models quickstart 260k 656k --removed 25 50 66 --seeds 3 --steps 600
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _measuring import describe_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_minitron.data import load_text, pack_rows
from hf_minitron.distill.kd_head import fused_linear_kd
from hf_minitron.prune.importance import score_model
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig
from hf_minitron.publish.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "text" / "tinystories"
ROW_LENGTH = 256
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Subject:
    """A teacher and, by per cent of its parameters removed, hidden_size and intermediate_size."""

    folder: Path
    widths: dict[int, tuple[int, int]]


SUBJECTS = {
    "quickstart": Subject(QUICKSTART / "teacher", {25: (216, 448), 50: (168, 320), 66: (128, 224)}),
    "260k": Subject(SHARED / "models" / "stories260k-hf", {25: (56, 132), 50: (48, 84), 66: (32, 88)}),
    "656k": Subject(SHARED / "models" / "tinystories-656k", {25: (104, 320), 50: (80, 200), 66: (56, 160)}),
}
METHODS = {
    "minitron": {"method": "minitron"},
    "refit": {"method": "refit"},
    "refit, sequential": {"method": "refit", "refit_mode": "sequential"},
}


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = [line for name in options.models for line in measure_subject(name, options, Path(folder))]
    facts = {"settings": vars(options), "machine": describe_machine(), "found": found}
    print(json.dumps(facts, indent=2) if options.json else report(found))


def parse_options() -> argparse.Namespace:
    """Which models, how much is removed, how long training is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["quickstart"], choices=list(SUBJECTS))
    parser.add_argument("--removed", nargs="*", type=int, default=[50], choices=[25, 50, 66], help="per cent, by width")
    parser.add_argument("--drop-layers", nargs="*", type=int, default=[], help="drop each of these layers on its own")
    parser.add_argument("--methods", nargs="+", default=["minitron", "refit"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="0: only after pruning")
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--eval-rows", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure_subject(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A record for every target, method and seed: loss after pruning, and the curve of every learning rate."""
    subject = SUBJECTS[name]
    if not subject.folder.is_dir():
        print(f"skipped: {subject.folder} is not there", file=sys.stderr)
        return
    texts = find_texts(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    teacher = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
    held_out = torch.tensor(read_rows(texts["held_out"], tokenizer, options.eval_rows, None))
    reference = loss_of(teacher, held_out)
    for seed in range(options.seeds):
        rows = read_rows(texts["train"], tokenizer, options.calibration_rows, seed)
        training = torch.tensor(
            read_rows(texts["train"], tokenizer, max(1, options.steps) * options.rows_per_step, seed + 100)
        )
        pruner = PrunerForCausalLM(teacher)
        start = time.process_time()
        pruner.scores = score_model(teacher, rows, progress=False)
        scoring = time.process_time() - start
        for target, sizes in targets(subject, options):
            for method in options.methods:
                start = time.process_time()
                student = pruner.prune(PruneConfig(**sizes, **METHODS[method]), rows, progress=False)
                seconds = time.process_time() - start
                pruned = loss_of(student, held_out)
                curves = {
                    rate: distil(student, teacher, training, held_out, rate, options)
                    if options.steps
                    else [(0, pruned)]
                    for rate in (LEARNING_RATES if options.steps else (0.0,))
                }
                record = {
                    "model": name,
                    "target": target,
                    "method": method,
                    "seed": seed,
                    "removed": 1 - student.num_parameters() / teacher.num_parameters(),
                    "teacher": reference,
                    "pruned": pruned,
                    "cost": seconds / scoring,
                    "curves": curves,
                    "fell_back": bool(pruner.planned.info.get("fell_back", False)),
                }
                finals = {rate: round(curve[-1][1], 3) for rate, curve in curves.items()}
                print(f"{name} {target} {method} seed {seed}: {pruned:.3f} {finals}", file=sys.stderr, flush=True)
                yield record


def targets(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for removed in options.removed:
        hidden, ffn = subject.widths[removed]
        yield f"width −{removed} %", {"hidden_size": hidden, "intermediate_size": ffn}
    for layer in options.drop_layers:
        yield f"without layer {layer}", {"drop_layers": [layer]}


def find_texts(name: str, folder: Path) -> dict[str, Path]:
    if name != "quickstart":
        return {"train": STORIES / "train_5000.jsonl", "held_out": STORIES / "stories_3000.json"}
    sys.path.insert(0, str(QUICKSTART))
    from stdlib_corpus import write_corpus

    return write_corpus(folder)


def read_rows(text: Path, tokenizer: Any, count: int, seed: int | None) -> list[list[int]]:
    return pack_rows(load_text(text), tokenizer, ROW_LENGTH, max_rows=count, seed=seed)["input_ids"]


@torch.no_grad()
def loss_of(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Mean next-token loss in nats."""
    model.eval()
    return mean(model(input_ids=row[None], labels=row[None]).loss.item() for row in rows)


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    training: torch.Tensor,
    held_out: torch.Tensor,
    learning_rate: float,
    options: argparse.Namespace,
) -> list[tuple[int, float]]:
    """(step, held-out loss) along a distillation by forward KL: AdamW, cosine, a tenth of the steps to warm up."""
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(1, options.steps // 10))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    curve = [(0, loss_of(student, held_out))]
    for step, batch in enumerate(training.split(options.rows_per_step), start=1):
        student.train()
        with torch.no_grad():
            known = teacher.model(input_ids=batch).last_hidden_state.flatten(0, 1)
        states = student.model(input_ids=batch).last_hidden_state.flatten(0, 1)
        weights = torch.ones(len(states))
        found = fused_linear_kd(states, student.lm_head.weight, known, teacher.lm_head.weight, weights)
        (found.loss / len(states)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        cosine.step()
        if step % options.eval_every == 0 or step == options.steps:
            curve.append((step, loss_of(student, held_out)))
    return curve


def report(found: list[dict[str, Any]]) -> str:
    """One line per model, target and method; the curve is that of the learning rate with the best final loss."""
    header = ("model", "target", "method", "removed", "teacher", "pruned", "gap / plain's", "best rate")
    rows = []
    for model, target in dict.fromkeys((record["model"], record["target"]) for record in found):
        group = [record for record in found if (record["model"], record["target"]) == (model, target)]
        plain = [record for record in group if record["method"] == "minitron"]
        for method in dict.fromkeys(record["method"] for record in group):
            own = [record for record in group if record["method"] == method]
            rate = best_rate(own)
            rows.append((model, target, method, *line(own, plain, rate)))
    return markdown_table((*header, "distilled", "steps to plain's final loss", "time / scoring"), rows)


def line(own: list[dict[str, Any]], plain: list[dict[str, Any]], rate: float) -> tuple[str, ...]:
    gap = mean(record["pruned"] - record["teacher"] for record in own)
    plain_gap = mean(record["pruned"] - record["teacher"] for record in plain) if plain else float("nan")
    ratios = [share_of_steps(record["curves"][rate], final_loss(plain, record["seed"])) for record in own if plain]
    reached = [f"{ratio:.2f}" if ratio is not None else "not reached" for ratio in ratios]
    cost = mean(record["cost"] for record in own)
    return (
        f"{100 * own[0]['removed']:.0f} %",
        f"{own[0]['teacher']:.3f}",
        f"{mean(record['pruned'] for record in own):.3f}",
        f"{gap / plain_gap:.2f}",
        f"{rate:g}",
        f"{mean(record['curves'][rate][-1][1] for record in own):.3f}",
        ", ".join(reached),
        "" if own[0]["method"] == "minitron" else f"{cost:.1f}",
    )


def best_rate(records: list[dict[str, Any]]) -> float:
    return min(records[0]["curves"], key=lambda rate: mean(record["curves"][rate][-1][1] for record in records))


def final_loss(plain: list[dict[str, Any]], seed: int) -> float:
    rate = best_rate(plain)
    return next(record["curves"][rate][-1][1] for record in plain if record["seed"] == seed)


def share_of_steps(curve: list[tuple[int, float]], wanted: float) -> float | None:
    """The first evaluated step at which the loss is reached, as a share of all steps."""
    steps = max(curve[-1][0], 1)
    return next((step / steps for step, loss in curve if loss <= wanted), None)


if __name__ == "__main__":
    main()
