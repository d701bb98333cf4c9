"""What each part of a refit costs: processor time, and FLOPs of its matrix products, without those of parts inside."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from _refit_arms import METHODS, Bench, sizes_of
from torch.utils.flop_counter import FlopCounterMode

from hf_minitron.prune import refit, refit_half, refit_head, refit_observe
from hf_minitron.prune.layerwise import LayerwiseModel, LoadedLayer
from hf_minitron.prune.refit_moments import CrossMoments
from hf_minitron.prune.target import PruneConfig
from hf_minitron.publish.tables import markdown_table

PARTS = {
    "runs of layers": [(LoadedLayer, "read"), (LoadedLayer, "core"), (LoadedLayer, "add"), (LayerwiseModel, "embed")],
    "moments": [(CrossMoments, "add")],
    "directions": [(refit_observe, "rotate"), (refit_observe, "select_channels")],
    "choice of neurons and heads": [(refit_half, "eliminate"), (refit_half, "eliminate_heads")],
    "solves": [(refit_half, "fit_linear"), (refit_half, "compensate"), (refit_head, "fit_linear")],
    "last norm's gain": [(refit_head, "fit_gain")],
    "judging against slicing": [(refit, "judge"), (refit, "mean_loss")],
}


def measure_cost(bench: Bench, target: str, method: str = "refit") -> dict[str, Any]:
    """By part, processor seconds and, in a second run, GFLOP; beside the seconds of the scoring pass."""
    config = PruneConfig(**sizes_of(bench.subject, target), **METHODS[method])

    def run() -> None:
        bench.pruner.prune(config, bench.calibration, progress=False)

    bench.pruner  # noqa: B018 - scored here, so that libraries are warm
    seconds = by_part(run, time.process_time)
    with FlopCounterMode(display=False) as counter:
        flops = by_part(run, counter.get_total_flops)
    return {
        "model": bench.name,
        "target": target,
        "scoring_seconds": bench.scoring_seconds,
        "seconds": seconds,
        "gflop": {part: count / 1e9 for part, count in flops.items()},
    }


def report_cost(costs: list[dict[str, Any]]) -> str:
    """One line per part, in scoring passes."""
    rows = []
    for cost in costs:
        for part, seconds in cost["seconds"].items():
            share = seconds / cost["scoring_seconds"]
            rows.append((cost["model"], part, f"{seconds:.2f}", f"{share:.2f}", f"{cost['gflop'].get(part, 0):.1f}"))
        whole, flops = sum(cost["seconds"].values()), sum(cost["gflop"].values())
        rows.append((cost["model"], "in all", f"{whole:.2f}", f"{whole / cost['scoring_seconds']:.2f}", f"{flops:.1f}"))
    return markdown_table(("model", "part", "processor seconds", "scoring passes", "GFLOP in products"), rows)


def by_part(run: Callable[[], None], clock: Callable[[], float]) -> dict[str, float]:
    """How much ``clock`` goes on within each part, less what it does in parts inside."""
    spent: dict[str, float] = defaultdict(float)
    stack: list[str] = ["the rest"]
    last = [clock()]

    def switch() -> None:
        now = clock()
        spent[stack[-1]] += now - last[0]
        last[0] = now

    with wrapped(stack, switch):
        run()
    switch()
    return dict(spent)


@contextmanager
def wrapped(stack: list[str], switch: Callable[[], None]) -> Iterator[None]:
    """Every function of PARTS notes on ``stack`` which part is running."""
    originals = [(owner, name, getattr(owner, name), part) for part, all_ in PARTS.items() for owner, name in all_]

    def noting(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def inner(*arguments: Any, **settings: Any) -> Any:
            switch()
            stack.append(part)
            try:
                return function(*arguments, **settings)
            finally:
                switch()
                stack.pop()

        return inner

    try:
        for owner, name, function, part in originals:
            setattr(owner, name, noting(function, part))
        yield
    finally:
        for owner, name, function, _ in originals:
            setattr(owner, name, function)
