"""Claim: refit starts much closer to the teacher than plain Minitron, and the lead lasts; how much, and how long?

Measures  held-out loss after pruning and along a distillation, for Minitron's slices and for refit, each at the best
          of the same four learning rates, by width and by depth; the tokens that refit needs for Minitron's final
          loss, along its one curve and by runs of its own that are short (--shorter); the time of refit in scoring
          passes. The rate of each method is chosen on seed 0, at the full number of steps, and used for other seeds.
Data      the quickstart's teacher on the standard library's source; with --models also the two story models and the
          stories in ../shared/data, where they are there. Calibration, training and held-out rows are apart.
Resuming  each finished arm (model, target, method, seed, rate, steps) is a line of --results; what is there is not
          measured again. Without --results nothing is kept. --report measures nothing: it prints the tables of
          --results (default: the committed ones), and with --plot-dir draws the curves.
Command   python benchmarks/refit.py [--models quickstart 260k 656k] [--targets "width 50" "without 2+3"] ...
          The full run is benchmarks/refit.sh; it takes hours on one core and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _measuring import describe_machine
from _refit_arms import METHODS, SUBJECTS, Bench
from _refit_cost import measure_cost, report_cost
from _refit_report import best_rate, plot, report
from transformers.utils import logging as transformers_logging

COMMITTED = Path(__file__).with_suffix(".jsonl")
KEYS = ("model", "target", "method", "seed", "rate", "steps")
SETTINGS = ("rows_per_step", "calibration_rows", "eval_rows")


def main() -> None:
    """Measures what is missing and prints, or only prints."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    if options.cost:
        with tempfile.TemporaryDirectory() as folder:
            benches = [
                Bench(model, 0, Path(folder), options.calibration_rows, options.eval_rows) for model in options.models
            ]
            costs = [measure_cost(bench, options.targets[0]) for bench in benches]
        print(json.dumps(costs, indent=2) if options.json else report_cost(costs))
        return
    if options.report:
        arms = load(options.results or COMMITTED)
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = options.results or Path(folder) / "arms.jsonl"
            asked = measure(options, results, Path(folder))
            arms = asked if options.json else load(results)
    if options.plot_dir:
        plot(arms, options.plot_dir)
    facts = {"settings": vars(options), "machine": describe_machine(), "arms": arms}
    print(json.dumps(facts, indent=2, default=str) if options.json else report(arms))


def parse_options() -> argparse.Namespace:
    """Which models, how much is removed, how long training is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["quickstart"], choices=list(SUBJECTS))
    parser.add_argument("--targets", nargs="+", default=["width 50"], help="'width PERCENT' or 'without LAYER+LAYER'")
    parser.add_argument("--methods", nargs="+", default=["minitron", "refit"], choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60, help="0: only after pruning")
    parser.add_argument("--shorter", nargs="*", type=int, default=[], help="also runs of refit over so many steps")
    parser.add_argument("--rates-of-steps", type=int, help="take each method's best rate found with so many steps")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--eval-rows", type=int, default=32)
    parser.add_argument("--results", type=Path, help="file of arms, read and appended to")
    parser.add_argument("--cost", action="store_true", help="instead of all else, what each part of a refit costs")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--plot-dir", type=Path, help="folder for the curves, as PNG")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def load(results: Path) -> list[dict[str, Any]]:
    """Arms measured so far; a last line that was cut off is left out."""
    if not results.exists():
        return []
    lines = results.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def measure(options: argparse.Namespace, results: Path, folder: Path) -> list[dict[str, Any]]:
    """Every arm that ``options`` asks for, those of ``results`` as they are."""
    asked = []
    for model in options.models:
        if not SUBJECTS[model].folder.is_dir():
            print(f"skipped: {SUBJECTS[model].folder} is not there", file=sys.stderr)
            continue
        for seed in options.seeds:
            asked += measure_seed(model, seed, options, results, folder / model)
    return asked


def measure_seed(
    model: str, seed: int, options: argparse.Namespace, results: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    """The arms of one teacher and one seed of its data, which are opened when the first missing arm needs them."""
    bench: Bench | None = None
    for target in options.targets:
        for method in options.methods:
            student = None
            for steps in (options.steps, *(options.shorter if method != "minitron" else ())):
                for rate in rates(model, target, method, seed, steps, options, results):
                    key = dict(zip(KEYS, (model, target, method, seed, rate, steps), strict=True))
                    key |= {name: getattr(options, name) for name in SETTINGS}
                    found = next((arm for arm in load(results) if key.items() <= arm.items()), None)
                    if found is None:
                        folder.mkdir(exist_ok=True)
                        held = options.calibration_rows, options.eval_rows
                        bench = bench or Bench(model, seed, folder, *held)
                        if student is None:
                            student, facts = bench.prune(target, method)
                        found = key | facts | run(bench, student, key, facts["pruned"])
                        append(results, found)
                    yield found


def rates(
    model: str, target: str, method: str, seed: int, steps: int, options: argparse.Namespace, results: Path
) -> tuple[float, ...]:
    """All rates on seed 0; on others the one that is best there. No training: none."""
    if steps == 0:
        return (0.0,)
    chosen_at = options.rates_of_steps or (steps if seed != 0 else None)
    if chosen_at is None:
        return SUBJECTS[model].rates
    key = {"model": model, "target": target, "method": method, "seed": 0, "steps": chosen_at}
    return (best_rate([arm for arm in load(results) if key.items() <= arm.items()]),)


def run(bench: Bench, student: Any, key: dict[str, Any], pruned: float) -> dict[str, Any]:
    start = time.process_time()
    points = evaluation_points(key["steps"])
    curve = bench.distil(student, key["rate"], key["steps"], key["rows_per_step"], points) if key["steps"] else []
    final = curve[-1][1] if curve else pruned
    words = f"{key['model']}, {key['target']}, {key['method']}, seed {key['seed']}, {key['steps']} steps at"
    print(f"{words} {key['rate']:g}: {pruned:.3f} to {final:.3f}", file=sys.stderr, flush=True)
    return {"curve": [(0, pruned), *curve], "distil_seconds": time.process_time() - start}


def evaluation_points(steps: int) -> list[int]:
    """Steps at which the loss is taken: each about 1.3 times as far as the one before, and the last."""
    points, step = {steps}, 2.0
    while step < steps:
        points.add(round(step))
        step = max(step * 1.3, step + 1)
    return sorted(points)


def append(results: Path, arm: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(arm) + "\n")


if __name__ == "__main__":
    main()
