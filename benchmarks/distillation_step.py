"""Claim: a whole distillation step is faster than other trainers', takes less memory, and has the same loss.

Measures  steps of a trainer from batch to batch: the passes of teacher and student, loss, backward, clipping, AdamW,
          logging. Every method trains the same weights on the same rows in a process of its own; methods take turns.
          Times are means over the steps of a turn but for its first, ratios are taken turn by turn. Memory is the peak
          of the process, whole and over what it holds before the first step (both models). Losses and gradient norms
          of the first step are compared with ours.
Methods   of `_step_methods.py`. hf-minitron: `DistillationTrainer`; trl: TRL's trainer of that name, given rows instead
          of what it generates; trl-gkd: TRL's GKDTrainer, off-policy; modelopt: NVIDIA ModelOpt's KDTrainer; sft: TRL's
          SFTTrainer, cross-entropy without a teacher, as a bound. All: forward KL, temperature 1, gradient
          accumulation 1, no activation checkpointing, one dtype.
Command   python benchmarks/distillation_step.py [--size small|large-vocabulary|llama-3.1] [--device cuda] [--json] ...
          ModelOpt needs an older transformers, so an environment of its own:
              python -m venv .venv-modelopt
              .venv-modelopt/bin/pip install nvidia-modelopt "transformers<5.15" accelerate datasets peft requests
          which is found there, or by --modelopt-python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from _measuring import Times, describe_machine, medians, show_spread, spreads
from _step_methods import METHODS
from transformers import LlamaConfig, LlamaForCausalLM

from hf_minitron.distill.throughput import count_matrix_parameters
from hf_minitron.hardware import peak_flops
from hf_minitron.publish.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
OURS = "hf-minitron"
WITHOUT_TEACHER = "sft"
MODELOPT_PYTHON = ROOT / ".venv-modelopt" / "bin" / "python"


def llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, head_dim: int | None = None
) -> dict[str, int]:
    """The sizes of a Llama as its config names them."""
    return {
        "hidden_size": hidden,
        "head_dim": head_dim or hidden // heads,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


SIZES = {  # teacher, student, rows a step, tokens a row
    "tiny": (llama(48, 96, 2, 4, 2, 512), llama(32, 64, 1, 2, 2, 512), 2, 16),
    "small": (llama(768, 2048, 8, 12, 12, 32768), llama(384, 1024, 4, 6, 6, 32768), 2, 256),
    "large-vocabulary": (llama(512, 1408, 4, 8, 8, 128256), llama(256, 704, 4, 4, 4, 128256), 2, 256),
    # Llama-3.1-8B and Llama-3.1-Minitron-4B-Width (arXiv 2408.11796, Table 3)
    "llama-3.1": (llama(4096, 14336, 32, 32, 8, 128256, 128), llama(3072, 9216, 32, 32, 8, 128256, 128), 2, 4096),
}


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    facts = measure(options)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Sizes, device and repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=SIZES, help="small on cpu, llama-3.1 on cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--rows", type=int, help="of a step")
    parser.add_argument("--row-length", type=int, help="tokens of a row")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help=f"{OURS} is always run")
    parser.add_argument("--steps", type=int, default=2, help="timed, of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--modelopt-python", default=MODELOPT_PYTHON if MODELOPT_PYTHON.exists() else sys.executable)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.size = options.size or ("llama-3.1" if options.device == "cuda" else "small")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.rows = options.rows or SIZES[options.size][2]
    options.row_length = options.row_length or SIZES[options.size][3]
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, by method; bytes and seconds."""
    teacher, student, *_ = SIZES[options.size]
    settings = {name: getattr(options, name) for name in ("device", "dtype", "rows", "row_length", "steps")}
    settings |= {"teacher": teacher, "student": student}
    runs, missing = take_turns(options, settings)
    times = {name: [mean_times(run["seconds"]) for run in turns] for name, turns in runs.items()}
    models = {role: count_parameters(settings[role]) for role in ("teacher", "student")}
    return {
        "settings": {**settings, "size": options.size, "turns": options.turns},
        "machine": describe_machine(),
        "parameters": {role: parameters for role, (parameters, _) in models.items()},
        "missing": missing,
        "methods": {name: describe(name, turns, times, runs, models, settings) for name, turns in runs.items()},
    }


def take_turns(
    options: argparse.Namespace, settings: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What every method's processes print, turn by turn, and why others have none; every second turn goes backwards."""
    names = [name for name in METHODS if name in (OURS, *options.methods)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    for turn in range(options.turns):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            if name in missing:
                continue
            python = options.modelopt_python if name == "modelopt" else sys.executable
            found = run_method(python, {**settings, "method": name})
            if "missing" in found:
                missing[name] = found["missing"]
            else:
                runs[name].append(found)
    if OURS in missing:
        raise RuntimeError(f"{OURS} itself did not run: {missing[OURS]}")
    return {name: turns for name, turns in runs.items() if name not in missing}, missing


def run_method(python: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `_step_methods.py` prints last under this Python, or why it printed nothing, as `missing`."""
    command = [python, Path(__file__).with_name("_step_methods.py"), json.dumps(settings)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        return {"missing": str(error)}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"missing": f"failed: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"}


def mean_times(steps: list[Times]) -> Times:
    """The mean step by each clock. On CUDA the wall's alone: the processor's says nothing there."""
    return {clock: mean(step[clock] for step in steps) for clock in steps[0]}


def describe(
    name: str,
    turns: list[dict[str, Any]],
    times: dict[str, list[Times]],
    runs: dict[str, list[dict[str, Any]]],
    models: dict[str, tuple[int, int]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """One method's figures, and what they are of ours."""
    ours = runs[OURS]
    growth = {key: median(run["peak_bytes"] - run["start_bytes"] for run in runs[key]) for key in (name, OURS)}
    seconds = medians(times[name])
    speed = settings["rows"] * settings["row_length"] / seconds["wall"]
    found = {
        "seconds": seconds,
        "time_ratio": spreads(times[name], times[OURS]),
        "tokens_per_second": speed,
        "peak_bytes": median(run["peak_bytes"] for run in turns),
        "growth_bytes": growth[name],
        "growth_ratio": growth[name] / growth[OURS],
        "loss": turns[0]["losses"][0],
        "grad_norm": turns[0]["grad_norms"][0],
    }
    for key, values in (("loss", "losses"), ("grad_norm", "grad_norms")):
        found[f"{key}_difference"] = abs(turns[0][values][0] / ours[0][values][0] - 1)
    flops = 6 * models["student"][1] + (0 if name == WITHOUT_TEACHER else 2 * models["teacher"][1])
    peak = peak_flops(torch.cuda.get_device_name()) if settings["device"] == "cuda" else None
    return found | ({"flop_utilisation": speed * flops / peak} if peak else {})


def count_parameters(sizes: dict[str, int]) -> tuple[int, int]:
    """All of a model's parameters, and those that a token is multiplied with."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.num_parameters(), count_matrix_parameters(model)


def report(facts: dict[str, Any]) -> str:
    """A table and how to read it."""
    settings, methods = facts["settings"], facts["methods"]
    clocks = ["wall"] if settings["device"] == "cuda" else ["wall", "cpu"]
    rows = [show_method(method, clocks, name) for name, method in methods.items()]
    header = ["method", "tokens/s", *(f"{clock} / ours" for clock in clocks), "peak MiB", "over the models", "/ ours"]
    header += ["loss, difference", "of the gradient's norm"]
    if "flop_utilisation" in methods[OURS]:
        header.append("FLOP utilisation")
    sizes = " and ".join(f"{count / 1e6:,.1f}M ({role})" for role, count in facts["parameters"].items())
    lines = [
        f"{settings['rows']} rows of {settings['row_length']} tokens a step, vocabulary "
        f"{settings['student']['vocab_size']:,}, {sizes} parameters, {settings['dtype']} on {settings['device']}, "
        f"{settings['turns']} turns of {settings['steps']} steps",
        markdown_table(header, rows),
    ]
    return "\n".join([*lines, *(f"missing: {name} ({why})" for name, why in facts["missing"].items())])


def show_method(method: dict[str, Any], clocks: list[str], name: str) -> list[str]:
    """A row of the table. The bound has another loss, so there is nothing to compare it with."""
    row = [name, f"{method['tokens_per_second']:,.0f}", *(show_spread(method["time_ratio"][clock]) for clock in clocks)]
    row += [f"{method[key] / 2**20:,.0f}" for key in ("peak_bytes", "growth_bytes")]
    row.append(f"{method['growth_ratio']:.2f}")
    keys = ("loss_difference", "grad_norm_difference")
    row += ["", ""] if name in (WITHOUT_TEACHER, OURS) else [f"{method[key]:.1e}" for key in keys]
    return [*row, f"{method['flop_utilisation']:.1%}"] if "flop_utilisation" in method else row


if __name__ == "__main__":
    main()
