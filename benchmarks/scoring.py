"""Claim: scoring all axes takes at most 1.10 x a bare forward pass over the same rows, and keeps nothing but vectors.

Measures  seconds of ``score_model`` over those of ``model.base_model`` on a random Llama, in turns; the bytes that the
          scores hold; and, in fresh processes over one batch, by how much peak memory grows with and without scoring.
Command   python benchmarks/scoring.py [--rows N] [--repeats N] [--json] ...
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from _measuring import describe_machine, medians, peak_growth, run_afresh, show_spread, spreads, time_in_turns
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_minitron.prune.importance import ImportanceScores, score_model

CLAIMED_RATIO = 1.10


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    if options.peak_of:
        print(json.dumps({"peak_bytes": measure_peak(options, options.peak_of)}))
        return
    facts = measure(options)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """The model's shape, the rows and the repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=1408)
    parser.add_argument("--num-hidden-layers", type=int, default=8)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--num-key-value-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="per row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", choices=("forward", "scoring"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; bytes and seconds."""
    settings = vars(options).copy()
    for name in ("json", "peak_of"):
        del settings[name]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    peaks = {
        name: run_afresh(__file__, *words, f"--peak-of={name}")["peak_bytes"] for name in ("forward", "scoring")
    }  # first, while this process is small
    model, rows = build(options)
    runs = {
        "forward": lambda: forward(model, rows, options.batch_size),
        "scoring": lambda: score_model(model, rows, batch_size=options.batch_size, progress=False),
    }
    runs["forward"]()  # warm up
    scores = runs["scoring"]()
    times = time_in_turns(runs, options.repeats)
    ratio = spreads(times["scoring"], times["forward"])
    return {
        "settings": settings,
        "machine": describe_machine(),
        "seconds": {name: medians(turns) for name, turns in times.items()},
        "ratio": ratio,
        "verdict": judge(ratio["wall"]),
        "held_bytes": held_bytes(scores),
        "stream_bytes": min(options.rows, options.batch_size) * options.tokens * options.hidden_size * 4,
        "largest_rank": max(moments.mean.dim() for moments in scores.moments.values()),
        "peak_bytes": peaks,
    }


def build(options: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor]:
    """A random Llama in fp32 and the rows [rows, tokens] of random ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        vocab_size=options.vocab_size,
        max_position_embeddings=options.tokens,
    )
    rows = torch.randint(0, options.vocab_size, (options.rows, options.tokens))
    return LlamaForCausalLM(config).eval(), rows


@torch.no_grad()
def forward(model: PreTrainedModel, rows: torch.Tensor, batch_size: int) -> None:
    """The bare pass that scoring stands on: no head, no logits."""
    for batch in rows.split(batch_size):
        model.base_model(input_ids=batch, use_cache=False)


def judge(ratio: dict[str, float]) -> str:
    """What the turns say of the claim; nothing, if they lie on both sides of it."""
    if ratio["min"] <= CLAIMED_RATIO < ratio["max"]:
        return f"is undecided (median {ratio['median']:.2f}): turns lie on both sides. Measure on a quiet machine"
    return "holds in every turn" if ratio["max"] <= CLAIMED_RATIO else "does NOT hold"


def held_bytes(scores: ImportanceScores) -> int:
    """What the scores hold after the pass: a mean and a sum of squared deviations per channel."""
    tensors = [tensor for moments in scores.moments.values() for tensor in (moments.mean, moments.deviation)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_peak(options: argparse.Namespace, name: str) -> int:
    """Growth of peak memory over one batch, in bytes."""
    model, rows = build(options)
    rows = rows[: options.batch_size]
    if name == "forward":
        return peak_growth(lambda: forward(model, rows, options.batch_size))
    return peak_growth(lambda: score_model(model, rows, batch_size=options.batch_size, progress=False))


def report(facts: dict[str, Any]) -> str:
    """The figures in words."""
    settings, seconds, peak = facts["settings"], facts["seconds"], facts["peak_bytes"]
    share = facts["held_bytes"] / facts["stream_bytes"]
    return "\n".join(
        [
            f"{settings['rows']} rows of {settings['tokens']} tokens, {settings['repeats']} repeats",
            *(
                f"{clock} time: forward {seconds['forward'][clock]:.2f} s, scoring all axes "
                f"{seconds['scoring'][clock]:.2f} s, ratio {show_spread(ratio)}"
                for clock, ratio in facts["ratio"].items()
            ),
            f"claimed: at most {CLAIMED_RATIO:.2f} in wall time, which {facts['verdict']}",
            f"scores hold {facts['held_bytes']:,} bytes, {share:.1%} of the {facts['stream_bytes']:,} bytes of one "
            f"batch's residual stream; largest rank {facts['largest_rank']}",
            f"peak memory of one batch grows by {peak['forward'] / 2**20:.0f} MiB in the forward pass, "
            f"{peak['scoring'] / 2**20:.0f} MiB in scoring",
        ]
    )


if __name__ == "__main__":
    main()
