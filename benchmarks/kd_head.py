"""Claim: loss and gradient over a big vocabulary take a fraction of naive's memory and less time than any other.

Measures  a divergence between two language-model heads and its gradients by the student's hidden states and head.
          Peak memory: of every method in a fresh process, over what the inputs take. Time: in turns, in one process.
          Error of loss and gradients: against fp64, on a smaller slice, with models at several KLs from each other.
Methods   of `_kd_methods.py`. naive: whole logits of both, log_softmax, kl_div, backward; hf-minitron:
          `fused_linear_kd`; and the losses of TRL, Liger and torchtune. One that is not installed (`make benchmark`
          installs them), or has no such divergence, is listed as missing.
Command   python benchmarks/kd_head.py [--tokens N] [--vocab V] [--device cuda --dtype bfloat16] [--json] ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from _kd_methods import DIVERGENCES, METHODS, Heads, Loss, Unsupported
from _measuring import Times, describe_machine, medians, peak_growth, run_afresh, show_spread, spreads, time_in_turns
from torch import Tensor

BASELINE = "naive"
LOGIT_SPREAD = 4.0  # standard deviation of a token's logits
KLS = (0.5, 0.05, 0.005)  # nats, about: early and late in a distillation


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    if options.peak_of:
        print(json.dumps({"peak_bytes": measure_peak(options, METHODS[options.peak_of](options.divergence))}))
        return
    facts = measure(options)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Sizes, device and repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden-student", type=int, default=768)
    parser.add_argument("--hidden-teacher", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--divergence", default="forward_kl", choices=DIVERGENCES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="naive is always run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-tokens", type=int, default=64, help="of the slice whose gradient fp64 checks")
    parser.add_argument("--check-vocab", type=int, default=8192, help="of the same slice")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", choices=METHODS, help="print only the peak memory of this method, in bytes")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, by method; bytes and seconds."""
    wanted = {name: load for name, load in METHODS.items() if name in (BASELINE, *options.methods)}
    methods, missing = load_methods(wanted, options.divergence)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "peak_of", "methods")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    peaks = {name: run_afresh(__file__, *words, f"--peak-of={name}")["peak_bytes"] for name in methods}
    errors = measure_errors(options, methods)
    times = measure_times(options, methods)
    return {
        "settings": settings,
        "machine": describe_machine(),
        "missing": missing,
        "gradient_bytes": gradient_bytes(options),
        "methods": {
            name: {
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / max(peaks[BASELINE], 1),
                "seconds": medians(times[name]),
                "time_ratio": spreads(times[name], times[BASELINE]),
                "errors": errors[name],
            }
            for name in methods
        },
    }


def load_methods(loaders: dict[str, Callable[[str], Loss]], divergence: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """The methods that are installed and have the divergence, and what is missing of the others."""
    methods, missing = {}, {}
    for name, load in loaders.items():
        try:
            methods[name] = load(divergence)
        except (ImportError, Unsupported) as error:
            missing[name] = str(error)
    return methods, missing


def measure_peak(options: argparse.Namespace, loss: Loss) -> int:
    """Growth of peak memory over the inputs, in bytes, in the first loss and gradient of this process."""
    heads = build(options, options.tokens, options.vocab, KLS[0])
    return peak_growth(lambda: loss(heads).backward(), options.device)


def measure_times(options: argparse.Namespace, methods: dict[str, Loss]) -> dict[str, list[Times]]:
    """Times of loss and gradient, in turns, after one turn that does not count: some compile themselves in it."""
    heads = build(options, options.tokens, options.vocab, KLS[0])

    def step(loss: Loss) -> None:
        loss(heads).backward()
        heads.student_hidden.grad = heads.student_weight.grad = None

    for loss in methods.values():
        step(loss)
    return time_in_turns(
        {name: lambda loss=loss: step(loss) for name, loss in methods.items()}, options.repeats, options.device
    )


def measure_errors(options: argparse.Namespace, methods: dict[str, Loss]) -> dict[str, dict[str, dict[str, float]]]:
    """By method and KL: errors of loss and gradients relative to naive in fp64 (gradients: by Frobenius norm)."""
    errors: dict[str, dict[str, dict[str, float]]] = {name: {} for name in methods}
    for kl in KLS:
        heads = build(options, options.check_tokens, options.check_vocab, kl)
        exact_loss, *exact = differentiate(METHODS[BASELINE](options.divergence), heads.to(torch.float64))
        for name, loss in methods.items():
            value, *gradients = differentiate(loss, heads)
            pairs = zip(gradients, exact, strict=True)
            relative = [((one - other).norm() / other.norm()).item() for one, other in pairs]
            errors[name][str(kl)] = {
                "loss_error": (value / exact_loss - 1).abs().item(),
                "hidden_gradient_error": relative[0],
                "weight_gradient_error": relative[1],
            }
    return errors


def differentiate(loss: Loss, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by the student's hidden states and head, in fp64."""
    value = loss(heads)
    gradients = torch.autograd.grad(value, heads[:2])
    return value.detach().double(), *(gradient.double() for gradient in gradients)


def build(options: argparse.Namespace, tokens: int, vocab: int, kl: float) -> Heads:
    """Two random heads at about a KL of `kl` nats: equal in three quarters of the channels, the others their own.

    Written in place: nothing bigger than the inputs is in memory, so that it does not hide a method's peak.
    """
    generator = torch.Generator(options.device).manual_seed(0)
    shared = min(options.hidden_student, options.hidden_teacher) * 3 // 4

    def fill(size: int, hidden: int, common: Tensor | None, scales: tuple[float, float]) -> Tensor:
        matrix = torch.empty(size, hidden, dtype=getattr(torch, options.dtype), device=options.device)
        matrix.normal_(generator=generator)
        matrix[:, :shared].mul_(scales[0])
        matrix[:, shared:].mul_(scales[1])
        if common is not None:
            matrix[:, :shared] = common[:, :shared]
        return matrix

    found = {}
    for role, hidden in (("teacher", options.hidden_teacher), ("student", options.hidden_student)):
        scales = LOGIT_SPREAD / shared**0.5, (kl / (hidden - shared)) ** 0.5
        found[f"{role}_hidden"] = fill(tokens, hidden, found.get("teacher_hidden"), (1.0, 1.0))
        found[f"{role}_weight"] = fill(vocab, hidden, found.get("teacher_weight"), scales)
    heads = Heads(**found)
    heads.student_hidden.requires_grad_()
    heads.student_weight.requires_grad_()
    return heads


def gradient_bytes(options: argparse.Namespace) -> int:
    """What the two gradients take: no method can do with less."""
    return (options.tokens + options.vocab) * options.hidden_student * getattr(torch, options.dtype).itemsize


def report(facts: dict[str, Any]) -> str:
    """A table and how to read it."""
    from hf_minitron.publish.tables import markdown_table

    settings, rows, errors = facts["settings"], [], []
    for name, method in facts["methods"].items():
        memory = f"{method['peak_bytes'] / 2**20:,.0f}", f"{method['peak_ratio']:.2f}"
        times = [(f"{method['seconds'][clock]:.3f}", show_spread(r)) for clock, r in method["time_ratio"].items()]
        rows.append((name, *memory, *(cell for pair in times for cell in pair)))
        errors.append((name, *(show_error(error) for error in method["errors"].values())))
    clocks = [column for clock in method["seconds"] for column in (f"{clock} s", "/ naive")]
    lines = [
        f"{settings['divergence']}, {settings['tokens']} tokens, vocabulary {settings['vocab']:,}, hidden "
        f"{settings['hidden_student']} and {settings['hidden_teacher']}, {settings['dtype']} on {settings['device']}, "
        f"{settings['repeats']} repeats",
        markdown_table(("method", "extra MiB", "/ naive", *clocks), rows),
        f"Extra: over the inputs; the gradients alone are {facts['gradient_bytes'] / 2**20:,.0f} MiB.\n",
        markdown_table(("error of loss / dhidden / dweight", *(f"at KL {kl}" for kl in KLS)), errors),
        f"Relative to fp64, on {settings['check_tokens']} tokens and a vocabulary of {settings['check_vocab']:,}.",
    ]
    return "\n".join([*lines, *(f"missing: {name} ({why})" for name, why in facts["missing"].items())])


def show_error(error: dict[str, float]) -> str:
    """The three errors in one cell."""
    return " / ".join(f"{error[key]:.1e}" for key in ("loss_error", "hidden_gradient_error", "weight_gradient_error"))


if __name__ == "__main__":
    main()
