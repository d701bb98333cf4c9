"""Claim: SFT lowers the held-out loss on its own format; each round of RPO raises the held-out reward margin, where a
model of this size can see what is preferred, and stays within 0.5 nats a token of its reference.

Measures  both before and after every stage of the chain from a base model to an aligned one, on real data. "Shuffled"
          pairs prefer a real response to the same words in another order; "preferences" are 300 pairs that ask for
          judgement. Rewards are 1 and 0.
Needs     ../shared/data (tinystories-656k, GSM8K's and MBPP's training parts, GPTeacher's roleplay, the 300 pairs);
          without it nothing is measured.
Command   python benchmarks/alignment.py [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from _measuring import describe_machine
from transformers.utils import logging as transformers_logging

from hf_minitron.align.arguments import RPOArguments, SFTArguments
from hf_minitron.align.rounds import align_checkpoint
from hf_minitron.align.rpo import RPOConfig
from hf_minitron.align.sft import SupervisedConfig
from hf_minitron.align.stage import fine_tune_checkpoint
from hf_minitron.publish.tables import markdown_table

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "models" / "tinystories-656k"


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    if not SHARED.is_dir():
        print(f"skipped: {SHARED} is not there", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # where the Trainer prints its logs
        start = time.process_time()
        data = write_data(SHARED, Path(folder), options.train_rows, options.held_out_rows)
        rows = fine_tunings(options, data, Path(folder))
        for name in ("shuffled", "preferences"):
            rows += preferences(name, options, data, Path(folder))
        seconds = time.process_time() - start
    facts = {"settings": vars(options) | {"model": str(options.model.name)}, "machine": describe_machine()}
    facts |= {"rows": rows, "cpu_seconds": round(seconds)}
    print(json.dumps(facts, indent=2, default=str) if options.json else report(rows))


def parse_options() -> argparse.Namespace:
    """How much of everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--held-out-rows", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--sft-steps", type=int, default=30)
    parser.add_argument("--sft-rate", type=float, default=3e-3)
    parser.add_argument("--rpo-steps", type=int, default=12)
    parser.add_argument("--rpo-rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def write_data(shared: Path, folder: Path, train_rows: int, held_out_rows: int) -> dict[str, tuple[Path, Path]]:
    """Files of training and held-out records for every stage; no test split of a benchmark is touched."""
    maths = [
        {"question": row["question"], "answer": row["answer"]} for row in _lines(shared / "bench/gsm8k/train.jsonl")
    ]
    code = [row for row in _lines(shared / "bench/mbpp.jsonl") if 601 <= row["task_id"] <= 974]  # MBPP's training part
    talks = [_talk(row["question"], row["answer"]) for row in maths]
    talks[: 2 * len(code) : 2] = [_talk(row["text"], row["code"].replace("\r", "")) for row in code]
    roles = json.loads((shared / "sft_pref/gpteacher_roleplay.json").read_text(encoding="utf-8"))
    roles = [_talk(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in roles]
    pairs = [_pair(row) for row in json.loads((shared / "sft_pref/dpo_en_demo.json").read_text(encoding="utf-8"))]
    pairs = [row for row in pairs if row["chosen"] != row["rejected"]]
    spoiled, roles = [_spoiled(row["messages"], index) for index, row in enumerate(roles[:1000])], roles[1000:]
    files = {}
    named = {"math-code": talks, "instructions": roles, "preferences": pairs, "shuffled": spoiled}
    for name, rows in named.items():
        parts = {"train": rows[:-held_out_rows][:train_rows], "held-out": rows[-held_out_rows:]}
        for part, own in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in own)
            (folder / f"{name}-{part}.jsonl").write_text(text, encoding="utf-8")
        files[name] = (folder / f"{name}-train.jsonl", folder / f"{name}-held-out.jsonl")
    return files


def fine_tunings(options: argparse.Namespace, data: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Held-out loss before and after each of the two."""
    found, model = [], options.model
    for name, template in (("math-code", "chatml"), ("instructions", None)):
        config = SupervisedConfig(
            output_dir=str(folder / name),
            learning_rate=options.sft_rate,
            max_steps=options.sft_steps,
            **_common(options),
        )
        train, held_out = map(str, data[name])
        arguments = SFTArguments(str(model), train, eval_dataset=held_out, chat_template=template)
        report = fine_tune_checkpoint(arguments, config)
        found.append(
            {"stage": f"SFT, {name}", "before": report.metrics_before["loss"], "after": report.metrics["loss"]}
        )
        print(found[-1], file=sys.stderr, flush=True)
        model = folder / name
    return found


def preferences(name: str, options: argparse.Namespace, data: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Held-out margins and the KL of two rounds."""
    config = RPOConfig(
        output_dir=str(folder / f"rpo-{name}"), learning_rate=options.rpo_rate, max_steps=options.rpo_steps,
        beta=options.beta, warmup_steps=2, **_common(options),
    )  # fmt: skip
    train, held_out = map(str, data[name])
    arguments = RPOArguments(str(folder / "instructions"), train, eval_dataset=held_out, constant_rewards=True)
    found = []
    for one in align_checkpoint(arguments, config).rounds:
        before, after = one["metrics"]["before"], one["metrics"]["after"]
        found.append({
            "stage": f"RPO on {name}, round {one['settings']['round']}",
            "before": before["loss"], "after": after["loss"],
            "margin": after["rewards/margins"], "accuracy": after["rewards/accuracies"], "kl": after["kl_to_reference"],
        })  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """A line per stage."""
    header = ("stage", "held-out loss before", "after", "margin", "accuracy", "KL to the reference, nats a token")
    keys = ("before", "after", "margin", "accuracy", "kl")
    lines = [(row["stage"], *(f"{row[key]:.4f}" if key in row else "" for key in keys)) for row in rows]
    return markdown_table(header, lines)


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_length": options.max_length, "per_device_train_batch_size": options.rows_per_step, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
        "per_device_eval_batch_size": 8, "logging_steps": 1000,
    }  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    prompt = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    sides = {side: [{"role": "assistant", "content": row[side]["value"]}] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **sides}


def _spoiled(messages: list[dict[str, str]], seed: int) -> dict[str, Any]:
    """A pair that prefers a response to its own words in another order."""
    words = messages[1]["content"].split()
    random.Random(seed).shuffle(words)
    return {"prompt": messages[:1], "chosen": messages[1:], "rejected": [messages[1] | {"content": " ".join(words)}]}


if __name__ == "__main__":
    main()
