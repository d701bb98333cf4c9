"""Claim: loss and gradient over a big vocabulary take a fraction of naive's memory, and no more time.

Measures  the forward KL between two language-model heads and its gradients by the student's hidden states and head.
          Peak memory: of every method in a fresh process, over what the inputs take. Time: in turns, in one process.
          Error of the gradients: against fp64, on a smaller slice.
Methods   naive: whole logits of both, log_softmax, kl_div, backward; hf-minitron: ``fused_linear_kd``. Another one is a
          loader in METHODS; one whose package is not installed is listed as missing.
Command   python benchmarks/kd_head.py [--tokens N] [--vocab V] [--device cuda --dtype bfloat16] [--json] ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _measuring import Times, describe_machine, medians, peak_growth, run_afresh, show_spread, spreads, time_in_turns
from torch import Tensor
from torch.nn import functional as F

BASELINE = "naive"
LOGIT_SPREAD = 4.0  # standard deviation of a token's logits
OWN_SPREAD = 0.5  # of it, what either model has for itself: the KL is about a quarter of a nat


class Heads(NamedTuple):
    """student_hidden [N, Hs], student_weight [V, Hs], teacher_hidden [N, Ht], teacher_weight [V, Ht]."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    def to(self, dtype: torch.dtype) -> Heads:
        """A copy, whose student parts are leaves that take gradients."""
        student = [tensor.detach().to(dtype).clone().requires_grad_() for tensor in self[:2]]
        return Heads(*student, *(tensor.to(dtype) for tensor in self[2:]))


Loss = Callable[[Heads], Tensor]  # KL(teacher || student), a mean over the tokens, in nats


def load_naive() -> Loss:
    """Whole logits; the distributions in fp32 whatever the logits are (in fp64 if these are)."""

    def loss(heads: Heads) -> Tensor:
        student = heads.student_hidden @ heads.student_weight.t()
        with torch.no_grad():
            teacher = heads.teacher_hidden @ heads.teacher_weight.t()
        dtype = torch.promote_types(student.dtype, torch.float32)
        logs = [F.log_softmax(logits, dim=-1, dtype=dtype) for logits in (student, teacher)]
        return F.kl_div(*logs, reduction="batchmean", log_target=True)

    return loss


def load_fused() -> Loss:
    """This project's."""
    from hf_minitron.distill.kd_head import fused_linear_kd

    def loss(heads: Heads) -> Tensor:
        ones = torch.ones(len(heads.student_hidden), device=heads.student_hidden.device)
        return fused_linear_kd(*heads, ones).loss / len(ones)

    return loss


METHODS: dict[str, Callable[[], Loss]] = {"naive": load_naive, "hf-minitron": load_fused}


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    if options.peak_of:
        print(json.dumps({"peak_bytes": measure_peak(options, METHODS[options.peak_of]())}))
        return
    facts = measure(options)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Sizes, device and repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden-student", type=int, default=768)
    parser.add_argument("--hidden-teacher", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-tokens", type=int, default=64, help="of the slice whose gradient fp64 checks")
    parser.add_argument("--check-vocab", type=int, default=8192, help="of the same slice")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, by method; bytes and seconds."""
    methods, missing = load_methods(METHODS)
    settings = vars(options).copy()
    for name in ("json", "peak_of"):
        del settings[name]
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
                **errors[name],
            }
            for name in methods
        },
    }


def load_methods(loaders: dict[str, Callable[[], Loss]]) -> tuple[dict[str, Loss], dict[str, str]]:
    """The methods that are installed, and of the others what their import says."""
    methods, missing = {}, {}
    for name, load in loaders.items():
        try:
            methods[name] = load()
        except ImportError as error:
            missing[name] = str(error)
    return methods, missing


def measure_peak(options: argparse.Namespace, loss: Loss) -> int:
    """Growth of peak memory over the inputs, in bytes, in the first loss and gradient of this process."""
    heads = build(options, options.tokens, options.vocab)
    return peak_growth(lambda: loss(heads).backward(), options.device)


def measure_times(options: argparse.Namespace, methods: dict[str, Loss]) -> dict[str, list[Times]]:
    """Times of loss and gradient, in turns."""
    heads = build(options, options.tokens, options.vocab)

    def step(loss: Loss, heads: Heads) -> None:
        loss(heads).backward()
        heads.student_hidden.grad = heads.student_weight.grad = None

    start = heads.student_hidden[:8].detach().requires_grad_()
    few = heads._replace(student_hidden=start, teacher_hidden=heads.teacher_hidden[:8])
    for loss in methods.values():
        step(loss, few)  # warm up
    return time_in_turns(
        {name: lambda loss=loss: step(loss, heads) for name, loss in methods.items()}, options.repeats, options.device
    )


def measure_errors(options: argparse.Namespace, methods: dict[str, Loss]) -> dict[str, dict[str, float]]:
    """Errors of loss and gradients relative to naive in fp64 on the same numbers (gradients: by Frobenius norm)."""
    heads = build(options, options.check_tokens, options.check_vocab)
    exact_loss, *exact = differentiate(METHODS[BASELINE](), heads.to(torch.float64))
    errors = {}
    for name, loss in methods.items():
        value, *gradients = differentiate(loss, heads)
        relative = [((one - other).norm() / other.norm()).item() for one, other in zip(gradients, exact, strict=True)]
        errors[name] = {
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


def build(options: argparse.Namespace, tokens: int, vocab: int) -> Heads:
    """Two heads that mostly agree, as late in a distillation: random, but equal in the channels that both have.

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
        scales = LOGIT_SPREAD / shared**0.5, OWN_SPREAD / (hidden - shared) ** 0.5
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

    settings, rows = facts["settings"], []
    for name, method in facts["methods"].items():
        errors = (f"{method[key]:.1e}" for key in ("loss_error", "hidden_gradient_error", "weight_gradient_error"))
        memory = f"{method['peak_bytes'] / 2**20:,.0f}", f"{method['peak_ratio']:.2f}"
        times = [(f"{method['seconds'][clock]:.3f}", show_spread(r)) for clock, r in method["time_ratio"].items()]
        rows.append((name, *memory, *(cell for pair in times for cell in pair), *errors))
    clocks = [column for clock in method["seconds"] for column in (f"{clock} s", "/ naive")]
    header = ("method", "extra MiB", "/ naive", *clocks, "loss error", "dhidden error", "dweight error")
    lines = [
        f"{settings['tokens']} tokens, vocabulary {settings['vocab']:,}, hidden {settings['hidden_student']} and "
        f"{settings['hidden_teacher']}, {settings['dtype']} on {settings['device']}, {settings['repeats']} repeats",
        markdown_table(header, rows),
        f"Extra: over the inputs; the gradients alone are {facts['gradient_bytes'] / 2**20:,.0f} MiB. Errors: relative "
        f"to fp64, on {settings['check_tokens']} tokens and a vocabulary of {settings['check_vocab']:,}.",
    ]
    return "\n".join([*lines, *(f"missing: {name} ({why})" for name, why in facts["missing"].items())])


if __name__ == "__main__":
    main()
