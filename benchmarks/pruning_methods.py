"""Claim: what the papers found about choosing what to prune shows on a small model too, at equal parameters.

Measures  held-out loss of the quickstart's teacher after pruning, without retraining: random, each of P1's nine
          aggregations, both signals of neurons, head residual, several steps, and for depth each criterion, contiguous
          and scattered; also the accuracy on held-out multiple-choice questions (which of four lines comes next), the
          kind of metric that P2 chooses layers by. Mean and standard error over calibration seeds.
Data      the standard library's source, as in the quickstart: calibration text and the questions that choose layers
          are from its training part, loss and the questions that judge from its held-out part.
Command   python benchmarks/pruning_methods.py [--num-layers-dropped 2] [--seeds N] [--json] ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _measuring import describe_machine
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_minitron.data import load_text
from hf_minitron.evaluate.perplexity import evaluate_perplexity
from hf_minitron.prune.calibration import load_calibration
from hf_minitron.prune.importance import score_model
from hf_minitron.prune.iterative import plan_iteratively
from hf_minitron.prune.multiple_choice import Question, load_questions
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.scan import scan_questions, scan_rows
from hf_minitron.prune.scores import STATISTICS, ImportanceScores
from hf_minitron.prune.target import PruneConfig
from hf_minitron.publish.tables import markdown_table

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
WIDTHS = {2: (224, 493), 4: (192, 384)}  # layers dropped -> hidden_size and intermediate_size of equal parameters
HEADS = 4  # of 8: for the head residual, at parameters of its own
CONTEXT_LINES = 6


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        facts = measure(options, Path(folder))
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Sizes and amounts of data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers-dropped", type=int, default=2, choices=sorted(WIDTHS))
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of 256 tokens")
    parser.add_argument("--questions", type=int, default=100, help="to choose layers by, and as many to judge by")
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Loss (nats per token) and accuracy of every method and seed."""
    bench = Bench(options, folder)
    found: dict[str, dict[str, list[float]]] = {}
    parameters = {}
    for seed in range(options.seeds):
        for name, build in bench.methods(seed):
            model = build()
            parameters[name] = model.num_parameters()
            for key, value in bench.judge(model).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
            print(f"seed {seed}: {name}: {found[name]['loss'][-1]:.3f}", file=sys.stderr, flush=True)
    return {
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "machine": describe_machine(),
        "teacher": {"parameters": bench.model.num_parameters()} | bench.judge(bench.model),
        "methods": {name: {"parameters": parameters[name], **values} for name, values in found.items()},
    }


class Bench:
    """The teacher, its data, and every method that prunes it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        sys.path.insert(0, str(QUICKSTART))
        from stdlib_corpus import write_corpus

        self.options, self.corpus = options, write_corpus(folder)
        self.model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "teacher", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "teacher")
        hidden, ffn = WIDTHS[options.num_layers_dropped]
        self.width = PruneConfig(hidden_size=hidden, intermediate_size=ffn)
        self.depth = PruneConfig(num_hidden_layers=self.model.config.num_hidden_layers - options.num_layers_dropped)
        self.held_out = load_text(self.corpus["held_out"])
        self.judging = self.questions("held_out", seed=0)

    def methods(self, seed: int) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
        """Names, and functions that give the pruned model, calibrated on the rows of ``seed``."""
        rows = load_calibration(
            self.corpus["train"],
            self.tokenizer,
            self.model.config,
            num_samples=self.options.rows,
            sequence_length=256,
            seed=seed,
        )["input_ids"]
        yield "width: (l2, mean), the papers' choice", lambda: self.prune(self.width, self.score(rows))
        yield "width: random", lambda: self.prune(dataclasses.replace(self.width, method="random", seed=seed))
        for sequence in STATISTICS:
            scores = self.score(rows, sequence)
            for batch in STATISTICS:
                if (batch, sequence) != ("l2", "mean"):
                    scored = dataclasses.replace(scores, aggregation=(batch, sequence))
                    yield f"width: ({batch}, {sequence})", lambda scored=scored: self.prune(self.width, scored)
        first = self.score(rows, neuron_signal="first_projection")
        yield "width: neurons by the first projection", lambda: self.prune(self.width, first)
        for steps in (2, 4):
            yield f"width: {steps} steps", lambda steps=steps: self.prune_in_steps(rows, steps)
        for residual in (False, True):
            prune = PruneConfig(num_attention_heads=HEADS, head_residual=residual)
            name = f"heads: 8 to {HEADS}{' with' if residual else ' without'} head residual"
            yield name, lambda prune=prune: self.prune(prune, self.score(rows))
        scans = self.scan(rows, seed)
        for metric, pattern in product(
            ("random", "block_importance", "lm_loss", "accuracy"), ("contiguous", "scattered")
        ):
            how = {"method": "random", "seed": seed} if metric == "random" else {"depth_metric": metric}
            prune = dataclasses.replace(self.depth, depth_pattern=pattern, **how)
            yield f"depth: {metric}, {pattern}", lambda prune=prune: self.prune(prune, scans)

    def score(self, rows: list, sequence: str = "mean", **signal: str) -> ImportanceScores:
        return score_model(self.model, rows, aggregation=("l2", sequence), progress=False, **signal)

    def scan(self, rows: list, seed: int) -> ImportanceScores:
        lengths = sorted({1, self.options.num_layers_dropped})
        scores = ImportanceScores(("l2", "mean"), self.model.config.head_dim)
        for metric in ("block_importance", "lm_loss"):
            scores.moments |= scan_rows(self.model, rows, num_dropped=lengths, metric=metric, progress=False)
        questions = self.questions("train", seed)
        scores.moments |= scan_questions(self.model, questions, num_dropped=lengths, batch_size=32, progress=False)
        return scores

    def prune(self, prune: PruneConfig, scores: ImportanceScores | None = None) -> PreTrainedModel:
        pruner = PrunerForCausalLM(self.model)
        pruner.scores = scores
        return pruner.prune(prune)

    def prune_in_steps(self, rows: list, steps: int) -> PreTrainedModel:
        pruner = PrunerForCausalLM(self.model)
        prune = dataclasses.replace(self.width, iterations=steps)
        plan = plan_iteratively(pruner, prune, lambda current, _: current.score(rows, progress=False))
        return pruner.prune(plan)

    def questions(self, part: str, seed: int) -> list[Question]:
        path = self.corpus[part].with_name(f"questions-{part}-{seed}.jsonl")
        write_questions(self.corpus[part], path, self.options.questions, seed)
        return load_questions(path, self.tokenizer, metric="acc_norm", max_length=512).questions

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        context = model.config.max_position_embeddings
        loss = evaluate_perplexity(
            model,
            self.tokenizer,
            self.held_out,
            context_length=context,
            stride=context,
            max_tokens=self.options.eval_tokens,
            progress=False,
        ).loss
        return {"loss": loss, "accuracy": accuracy(model, self.judging)}


def write_questions(corpus: Path, path: Path, count: int, seed: int) -> None:
    """Which of four lines follows these? The other three are from anywhere else, as deeply indented."""
    texts = [json.loads(line)["text"].splitlines() for line in corpus.read_text(encoding="utf-8").splitlines()]
    draw, by_indent = random.Random(seed), {}
    for text in texts:
        for line in text:
            if len(line.strip()) > 12:
                by_indent.setdefault(indent(line), []).append(line)
    rows = []
    while len(rows) < count:
        text = draw.choice(texts)
        if len(text) <= CONTEXT_LINES:
            continue
        start = draw.randrange(len(text) - CONTEXT_LINES)
        line = text[start + CONTEXT_LINES]
        others = by_indent.get(indent(line), [])
        if len(line.strip()) <= 12 or len(others) < 50:
            continue
        choices = [line, *draw.sample(others, 3)]
        if len(set(choices)) < 4:
            continue
        draw.shuffle(choices)
        context = "\n".join(text[start : start + CONTEXT_LINES]) + "\n"
        rows.append({"context": context, "choices": choices, "gold": choices.index(line)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@torch.no_grad()
def accuracy(model: PreTrainedModel, questions: list[Question]) -> float:
    """Mean score over questions, one padded forward pass for each."""
    scores = []
    for question in questions:
        rows = [torch.tensor([*request.context, *request.continuation]) for request in question.requests]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        log_probs = model.eval()(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        found = []
        for row, request in enumerate(question.requests):
            begin, wanted = len(request.context) - 1, torch.tensor(request.continuation)
            found.append(log_probs[row, begin + torch.arange(len(wanted)), wanted].sum().item())
        scores.append(question.judge(found, [False] * len(found)))
    return statistics.mean(scores)


def report(facts: dict[str, Any]) -> str:
    """A table in the order of the methods, best loss of each parameter count marked."""
    teacher, methods = facts["teacher"], facts["methods"]
    rows = [("teacher", f"{teacher['parameters']:,}", f"{teacher['loss']:.3f}", f"{teacher['accuracy']:.3f}")]
    for name, values in methods.items():
        rows.append((name, f"{values['parameters']:,}", spread(values["loss"]), spread(values["accuracy"])))
    table = markdown_table(("method", "parameters", "held-out loss", "held-out accuracy"), rows)
    return f"{table}\n\nMean ± standard error over {facts['settings']['seeds']} calibration seeds; chance is 0.25."


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
