"""From a pruned and distilled base model to an instruct model: two fine-tunings and two rounds of RPO.

Makes     OUTPUT/math-code, OUTPUT/instruct and OUTPUT/aligned: checkpoints for plain transformers, the last one with
          the lineage of all stages.
Method    MN-Minitron (arXiv 2408.11796, "Instruction tuning"): math-and-code SFT, instruction SFT, two rounds of
          Reward-aware Preference Optimization (arXiv 2406.11704, section 3.3), each from the result of the last.
Data      yours, in TRL's formats: messages, or prompt and completion, for the two fine-tunings; prompt, chosen,
          rejected, chosen_reward and rejected_reward for RPO (or --reward-model to label them).
Needs     8 GPUs of 80 GB for 4B or 8B parameters with recipes/accelerate/eight_gpus_zero3.yaml. --smoke needs a CPU
          and a minute: tiny random weights, built-in text, the same code.
Command   accelerate launch --config_file recipes/accelerate/eight_gpus_zero3.yaml recipes/align.py --model BASE \
              --size 4B --math-code DATA --instructions DATA --preferences DATA --output-dir DIR
          python recipes/align.py --smoke --output-dir DIR
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_minitron.align.arguments import RPOArguments, SFTArguments
from hf_minitron.align.rounds import RPOReport, align_checkpoint
from hf_minitron.align.rpo import RPOConfig
from hf_minitron.align.sft import SupervisedConfig
from hf_minitron.align.stage import fine_tune_checkpoint
from hf_minitron.training import TrainingReport


@dataclass(frozen=True)
class Settings:
    """Learning rates of the two methods."""

    sft_learning_rate: float
    rpo_learning_rate: float


# P2 names the stages and not their settings; these are the ones published for Minitron models of the two sizes.
SIZES = {"4B": Settings(5e-6, 9e-7), "8B": Settings(4e-6, 7e-7)}
BETA = 0.05  # the same source; NeMo-Aligner's default is 0.2
ETA = 1.0  # NeMo-Aligner's default
RPO_SCHEDULE = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}  # the same source
ROUNDS = 2  # P2; Nemotron-4 340B took three
# Stated nowhere, ours: sequences in a global batch, and epochs.
GLOBAL_BATCH = 128
EPOCHS = 1
SMOKE = {"max_steps": 6, "use_cpu": True, "max_length": 128, "logging_steps": 3}
WORDS = ("one", "two", "three", "four", "five", "six", "seven")
SMOKE_SETTINGS = Settings(3e-2, 3e-3)  # random weights need another pace


def main() -> None:
    arguments = parse_arguments()
    folder, settings = arguments.output_dir, SMOKE_SETTINGS if arguments.smoke else SIZES[arguments.size]
    if arguments.smoke:
        with PartialState(cpu=True).main_process_first():
            write_smoke_inputs(arguments, folder / "inputs")
    math_code = fine_tune(arguments, settings, arguments.model, arguments.math_code, folder / "math-code")
    instruct = fine_tune(arguments, settings, folder / "math-code", arguments.instructions, folder / "instruct")
    aligned = align(arguments, settings, folder / "instruct", arguments.preferences, folder / "aligned")
    if PartialState().is_main_process:
        print(describe(math_code, instruct, aligned))


def parse_arguments() -> argparse.Namespace:
    """Models, data and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of the base model")
    parser.add_argument("--size", choices=list(SIZES), default="4B", help="whose learning rates are used")
    parser.add_argument("--math-code", nargs="+", metavar="DATA", help="math-and-code lessons, and held-out ones")
    parser.add_argument("--instructions", nargs="+", metavar="DATA", help="instruction lessons, and held-out ones")
    parser.add_argument("--preferences", nargs="+", metavar="DATA", help="pairs, and held-out ones")
    parser.add_argument("--chat-template", help="chat template for a base model that has none (default: chatml)")
    parser.add_argument("--reward-model", help="labels the pairs; without it their reward columns are read")
    parser.add_argument("--rows-per-device", type=int, default=4)
    parser.add_argument("--output-dir", "--output_dir", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="run every step on tiny inputs, to see that it works")
    arguments = parser.parse_args()
    needed = ("model", "math_code", "instructions", "preferences")
    if not arguments.smoke and (missing := [name for name in needed if getattr(arguments, name) is None]):
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in missing)}: needed without --smoke")
    return arguments


def fine_tune(
    arguments: argparse.Namespace, settings: Settings, model: str | Path, data: list[str], folder: Path
) -> TrainingReport:
    """One of the two fine-tunings; the first gives a base model its chat template."""
    first = folder.name == "math-code"
    template = (arguments.chat_template or "chatml") if first and not _has_template(model) else None
    config = SupervisedConfig(learning_rate=settings.sft_learning_rate, packing=True, **_training(arguments, folder))
    return fine_tune_checkpoint(SFTArguments(str(model), *_data(data), chat_template=template), config)


def align(
    arguments: argparse.Namespace, settings: Settings, model: str | Path, data: list[str], folder: Path
) -> RPOReport:
    """Both rounds of RPO."""
    config = RPOConfig(
        learning_rate=settings.rpo_learning_rate, beta=BETA, eta=ETA, **RPO_SCHEDULE, **_training(arguments, folder)
    )
    given = _data(data)
    told = RPOArguments(str(model), *given, rounds=ROUNDS, reward_model=arguments.reward_model)
    return align_checkpoint(told, config)


def describe(math_code: TrainingReport, instruct: TrainingReport, aligned: RPOReport) -> str:
    """What each stage did to its held-out data."""
    lines = [
        f"{name}: held-out loss {report.metrics_before['loss']:.3f} -> {report.metrics['loss']:.3f}"
        for name, report in (("math and code", math_code), ("instructions", instruct))
        if report.metrics
    ]
    for one in aligned.rounds:
        if after := one.get("metrics", {}).get("after"):
            lines.append(
                f"RPO round {one['settings']['round']}: held-out reward margin {after['rewards/margins']:.3f}, "
                f"KL to its reference {after['kl_to_reference']:.4f} nats a token"
            )
    return "\n".join([*lines, f"Wrote {aligned.output_dir}"])


def write_smoke_inputs(arguments: argparse.Namespace, folder: Path) -> None:
    """A tiny random Llama that reads bytes, and some lines for every stage, named in `arguments`."""
    arguments.model = str(folder / "base")
    arguments.math_code, arguments.instructions, arguments.preferences = (
        [str(folder / f"{name}.jsonl"), str(folder / f"{name}-held-out.jsonl")]
        for name in ("math-code", "instructions", "preferences")
    )
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        arguments.model
    )
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=256)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(arguments.model)
    sums = [_talk(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a in range(8) for b in range(8)]
    words = [_talk(f"Say {word} in capitals.", word.upper()) for word in WORDS]
    worse = _talk("", "No idea!")["messages"][1:]
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": worse,
         "chosen_reward": 1.0 + index % 2, "rejected_reward": 0.0} for index, row in enumerate(sums)
    ]  # fmt: skip
    for name, rows in (("math-code", sums), ("instructions", words * 4), ("preferences", pairs)):
        for part, own in (("", rows[:-8]), ("-held-out", rows[-8:])):
            text = "".join(json.dumps(row) + "\n" for row in own)
            (folder / f"{name}{part}.jsonl").write_text(text, encoding="utf-8")


def _talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _training(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = arguments.rows_per_device
    steps = max(1, GLOBAL_BATCH // (rows * PartialState().num_processes))
    common = {"output_dir": str(folder), "per_device_train_batch_size": rows, "report_to": "none"}
    if arguments.smoke:
        return common | SMOKE | {"save_strategy": "no"}
    return common | {"gradient_accumulation_steps": steps, "num_train_epochs": EPOCHS, "bf16": True}


def _data(data: list[str]) -> tuple[Any, ...]:
    """Of `SFTArguments` and `RPOArguments`: dataset, its configuration and split, held-out data."""
    return data[0], None, "train", *(data[1:2] or [None])


def _has_template(model: str | Path) -> bool:
    return AutoTokenizer.from_pretrained(model).chat_template is not None


if __name__ == "__main__":
    main()
