"""Claim: what a shift report says before tokens are spent tells how much a correction will give.

Measures  for texts from near to far, on the quickstart's teacher: the distance by tokens and by pairs, above chance,
          from the teacher's own samples and from text of its own training; the teacher's loss; and by how much a short
          correction of all weights lowers it on held-out text of the same kind.
Data      modules of the standard library that the teacher never saw, its test suites, Python's help topics; more by
          --texts. Of every text the last quarter is held out.
Command   python benchmarks/shift.py [--texts NAME=FILE ...] [--json] ...
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _measuring import describe_machine
from datasets import Dataset
from teacher_correction import QUICKSTART, RATES, correct, load_teacher, say
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_minitron.data import load_text, pack_rows
from hf_minitron.distill.shift import compare, sample_rows
from hf_minitron.publish.tables import markdown_table


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    facts = measure(options)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Texts and amounts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="*", default=[], metavar="NAME=FILE", help="further texts")
    parser.add_argument("--rows", type=int, default=128, help="rows to compare")
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="of a correction")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Distances in bits, losses in nats per token."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(QUICKSTART / "teacher"), load_teacher()
    with tempfile.TemporaryDirectory() as folder:
        texts = load_texts(options, Path(folder))
        known = pack(texts.pop("train"), tokenizer, options.rows, options)
    samples = sample_rows(teacher.eval(), tokenizer, options.rows, options.row_length, 32, seed=0)
    found = {}
    for name, documents in texts.items():
        split = len(documents) * 3 // 4
        train = pack(documents[:split], tokenizer, max(options.rows, options.steps * options.rows_per_step), options)
        held_out = pack(documents[split:], tokenizer, options.eval_rows, options)
        rows = np.asarray(train["input_ids"])[: options.rows]
        facts: dict[str, Any] = {}
        for kind, reference in (("samples", samples), ("training text", np.asarray(known["input_ids"]))):
            shift = compare(teacher, tokenizer, rows, reference, kind, batch_size=32)
            facts[kind] = {"tokens": shift.tokens_apart.excess, "pairs": shift.pairs_apart.excess}
            facts[kind] |= {"gap": shift.loss - shift.reference_loss, "advice": shift.advice}
        facts["loss"] = shift.loss
        sets = {"train": train, "held_out": held_out, "general": known.select(range(2))}
        _, corrected = correct(copy.deepcopy(teacher), "full", RATES["full"], sets, options, 0)
        facts["before"], facts["after"] = (corrected[when]["held_out"] for when in ("before", "after"))
        found[name] = facts
        say(f"{name}: {facts}")
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    return {"settings": settings, "machine": describe_machine(), "texts": found}


def load_texts(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Documents by name, in a random but fixed order; ``train`` is what the teacher was trained on."""
    from pydoc_data.topics import topics

    sys.path.insert(0, str(QUICKSTART))
    from stdlib_corpus import write_corpus

    corpus = write_corpus(folder)
    files = {"train": corpus["train"], "unseen modules": corpus["held_out"], "test suites": corpus["tests"]}
    texts = {name: load_text(path)["text"] for name, path in files.items()}
    texts["help topics"] = [text for _, text in sorted(topics.items())]
    for word in options.texts:
        name, _, path = word.partition("=")
        texts[name] = load_text(path)["text"]
        if len(texts[name]) == 1:  # one file of plain text: its paragraphs
            texts[name] = [part for part in texts[name][0].split("\n\n") if part.strip()]
    draw = np.random.default_rng(0)
    return {name: [documents[i] for i in draw.permutation(len(documents))] for name, documents in texts.items()}


def pack(documents: list[str], tokenizer: Any, count: int, options: argparse.Namespace) -> Dataset:
    return pack_rows(documents, tokenizer, options.row_length, max_rows=count, seed=0)


def report(facts: dict[str, Any]) -> str:
    """One line a text."""
    rows = []
    for name, found in facts["texts"].items():
        distances = [
            f"{found[kind][what]:.3f}" for kind in ("samples", "training text") for what in ("tokens", "pairs")
        ]
        gaps = [f"{found[kind]['gap']:+.2f}" for kind in ("samples", "training text")]
        change = f"{found['after'] - found['before']:+.3f} ({100 * (found['after'] / found['before'] - 1):+.0f} %)"
        rows.append((name, *distances, *gaps, f"{found['before']:.3f}", change))
    header = ("text", "samples: tokens", "pairs", "training text: tokens", "pairs", "loss gap: samples")
    return markdown_table((*header, "training text", "held-out loss", "correction"), rows)


if __name__ == "__main__":
    main()
