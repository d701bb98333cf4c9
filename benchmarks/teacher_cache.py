"""Claim: a training step from a cached teacher skips the teacher's pass, and an exact cache gives the same loss.

Measures  (1) time of a distillation step (loss and gradient of one batch) with the teacher live, from an exact cache
          and from a top-k cache, in turns; random Llamas, the teacher bigger than the student. (2) bytes a token,
          tokens a second that caching takes, rows a second that reading gives: first with checking the shards' SHA-256,
          then without. (3) loss and gradient against the live teacher's in fp32, of the quickstart's teacher and its
          student pruned to half, on held-out modules of the standard library.
Command   python benchmarks/teacher_cache.py [--rows N] [--row-length N] [--top-k K] [--repeats N] [--json] ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measuring import describe_machine, medians, show_spread, spreads, time_in_turns
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_minitron.data import load_text, pack_rows
from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, write_cache
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig
from hf_minitron.publish.tables import markdown_table

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
FACTS = TeacherFacts(teacher={"path": "benchmark"})


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        facts = {
            "settings": {name: value for name, value in vars(options).items() if name != "json"},
            "machine": describe_machine(),
            **measure_steps(options, Path(folder)),
            "fidelity": measure_fidelity(options, Path(folder)),
        }
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Sizes, rows and repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-hidden-size", type=int, default=768)
    parser.add_argument("--teacher-layers", type=int, default=12)
    parser.add_argument("--student-hidden-size", type=int, default=384)
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2, help="rows a step")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--fidelity-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def formats(options: argparse.Namespace) -> dict[str, CacheFormat]:
    """The caches that are compared, by what tables call them."""
    return {
        "exact, fp32": CacheFormat("exact", dtype=torch.float32),
        "exact, bf16": CacheFormat("exact", dtype=torch.bfloat16),
        f"top {options.top_k}, bf16": CacheFormat("topk", options.top_k, torch.bfloat16),
    }


def measure_steps(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times of a step, and what writing and reading the caches takes."""
    teacher = build(options, options.teacher_hidden_size, options.teacher_layers, seed=1)
    student = build(options, options.student_hidden_size, options.student_layers, seed=2)
    shape = (options.rows, options.row_length)
    ids = torch.randint(0, options.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row} for row in ids.tolist()]
    caches, found = {}, {}
    for name, form in formats(options).items():
        start = time.perf_counter()
        cache = write_cache(teacher, rows, folder / name, form, FACTS, batch_size=options.batch_size)
        found[name] = {"caching_tokens_per_second": ids.numel() / (time.perf_counter() - start)}
        found[name] |= {"bytes_per_token": cache.manifest["bytes_per_token"]} | reading_rates(folder / name, rows)
        caches[name] = cache
    steps = {
        name: step_of(student, source, rows, options, folder) for name, source in {"live": teacher, **caches}.items()
    }
    for step in steps.values():
        step()  # warm up, and check the shards
    times = time_in_turns(steps, options.repeats)
    speed = {name: {"seconds": medians(t), "time_ratio": spreads(t, times["live"])} for name, t in times.items()}
    parameters = {"teacher": teacher.num_parameters(), "student": student.num_parameters()}
    return {"parameters": parameters, "steps": speed, "caches": found}


def build(options: argparse.Namespace, hidden_size: int, layers: int, seed: int) -> PreTrainedModel:
    """A random Llama in fp32, its head scaled so that its logits spread by about 4."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden_size // 64),
            num_key_value_heads=max(1, hidden_size // 64),
            max_position_embeddings=options.row_length,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.normal_(std=4 / hidden_size**0.5)
    return model


def trainer_of(student: PreTrainedModel, teacher: Any, folder: Path) -> DistillationTrainer:
    """A trainer whose loss and collator are used; nothing is saved."""
    args = DistillationConfig(output_dir=str(folder / "run"), use_cpu=True, report_to="none", save_strategy="no")
    return DistillationTrainer(student, teacher, args)


def step_of(
    student: PreTrainedModel, teacher: Any, rows: list, options: argparse.Namespace, folder: Path
) -> Callable[[], Any]:
    """Loss and gradient of the next batch, the optimizer's step left out."""
    trainer = trainer_of(student, teacher, folder)
    size = options.batch_size
    batches = itertools.cycle([rows[start : start + size] for start in range(0, len(rows) - size + 1, size)])

    def step() -> None:
        loss = trainer.compute_loss(student, trainer.data_collator(next(batches)))
        loss.backward()
        student.zero_grad()

    return step


def reading_rates(folder: Path, rows: list) -> dict[str, float]:
    """Rows a second, read one at a time, of a cache that was just opened and once its shards are checked."""
    batches = [CausalLMCollator(row_keys=True)([row]) for row in rows]
    cache, rates = CachedTeacher.open(folder), {}
    for name in ("first", "then"):
        start = time.perf_counter()
        for batch in batches:
            cache.targets(batch, batch["row_keys"])
        rates[f"rows_per_second_{name}"] = len(rows) / (time.perf_counter() - start)
    return rates


def measure_fidelity(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Loss and gradient of a pruned student against a real teacher: live in fp32, and from every cache."""
    sys.path.insert(0, str(QUICKSTART))
    from stdlib_corpus import write_corpus

    corpus = write_corpus(folder / "corpus")
    pruner = PrunerForCausalLM.from_pretrained(QUICKSTART / "teacher", dtype=torch.float32)
    pruner.score(corpus["train"], num_samples=16, sequence_length=256, progress=False)
    student = pruner.prune(PruneConfig(hidden_size=168, intermediate_size=320)).float()
    teacher = AutoModelForCausalLM.from_pretrained(QUICKSTART / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "teacher")
    text = load_text(corpus["held_out"])
    rows = list(pack_rows(text, tokenizer, 256, max_rows=options.fidelity_rows, seed=0))
    sources: dict[str, Any] = {"live": teacher}
    for name, form in formats(options).items():
        sources[name] = write_cache(teacher, rows, folder / f"real {name}", form, FACTS, batch_size=3)
    found, reference = {}, None
    for name, source in sources.items():
        trainer = trainer_of(student, source, folder)
        student.zero_grad()
        loss = trainer.compute_loss(student, trainer.data_collator(rows))
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in student.parameters()]).double()
        reference = gradient if reference is None else reference
        error = ((gradient - reference).norm() / reference.norm()).item()
        found[name] = {"loss": loss.item(), "gradient_error": error}
    for values in found.values():
        values["loss_error"] = abs(values["loss"] / found["live"]["loss"] - 1)
    return found


def report(facts: dict[str, Any]) -> str:
    """The tables of RESULTS.md."""
    settings = facts["settings"]
    rows = []
    for name, step in facts["steps"].items():
        cache = facts["caches"].get(name, {})
        keys = ("bytes_per_token", "caching_tokens_per_second", "rows_per_second_first", "rows_per_second_then")
        rates = [f"{cache[key]:,.0f}" if cache else "" for key in keys]
        ratios = [show_spread(step["time_ratio"][clock]) for clock in ("wall", "cpu")]
        rows.append((name, f"{step['seconds']['cpu']:.2f}", *ratios, *rates))
    header = ("teacher", "cpu s a step", "wall / live", "cpu / live", "bytes a token", "tokens/s cached")
    header += ("rows/s, checking", "rows/s")
    fidelity = [
        (name, f"{row['loss']:.6f}", f"{row['loss_error']:.1e}", f"{row['gradient_error']:.1e}")
        for name, row in facts["fidelity"].items()
    ]
    sizes = " and ".join(f"{count / 1e6:.1f}M ({role})" for role, count in facts["parameters"].items())
    lines = [
        f"{settings['batch_size']} rows of {settings['row_length']} tokens a step, vocabulary "
        f"{settings['vocab_size']:,}, {sizes} parameters, fp32, {settings['repeats']} turns",
        markdown_table(header, rows),
        markdown_table(("teacher", "loss", "relative difference", "of the gradient"), fidelity),
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
