"""Tables and curves of the refit benchmark's arms."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from hf_minitron.publish.plots import plot_losses
from hf_minitron.publish.tables import markdown_table

TOKENS_PER_ROW = 256
Arm = dict[str, Any]
Curve = list[tuple[int, float]]


def best_rate(arms: list[Arm]) -> float:
    """The rate with the least final loss on seed 0."""
    first = [arm for arm in arms if arm["seed"] == 0]
    if not first:
        raise ValueError("no arm of seed 0 is there to choose a learning rate by: measure seed 0 first.")
    return min(first, key=lambda arm: arm["curve"][-1][1])["rate"]


def at_best_rate(arms: list[Arm], **wanted: Any) -> list[Arm]:
    """One arm per seed, at the rate chosen on seed 0."""
    own = [arm for arm in arms if wanted.items() <= arm.items()]
    if not own:
        return []
    rate = best_rate(own)
    return sorted((arm for arm in own if arm["rate"] == rate), key=lambda arm: arm["seed"])


def report(arms: list[Arm]) -> str:
    """After pruning, along distillation, and by refit's shorter runs."""
    return "\n\n".join(table for table in (report_pruned(arms), report_curves(arms), report_shorter(arms)) if table)


def report_pruned(arms: list[Arm]) -> str:
    """Loss after pruning, and the gap to the teacher as a share of plain's, over seeds."""
    rows = []
    for model, target in targets(arms):
        group = [arm for arm in arms if (arm["model"], arm["target"]) == (model, target)]
        plain = by_seed([arm for arm in group if arm["method"] == "minitron"])
        for method in dict.fromkeys(arm["method"] for arm in group):
            own = by_seed([arm for arm in group if arm["method"] == method])
            shares = [gap(arm) / gap(plain[seed]) for seed, arm in own.items() if seed in plain]
            cost = [arm["prune_seconds"] / arm["scoring_seconds"] for arm in own.values()]
            first = next(iter(own.values()))
            rows.append(
                (
                    model,
                    target,
                    method + (" (fell back)" if any(arm["fell_back"] for arm in own.values()) else ""),
                    len(own),
                    f"{100 * first['removed']:.0f} %",
                    f"{first['teacher']:.3f}",
                    spread([arm["pruned"] for arm in own.values()], 3),
                    "" if method == "minitron" else spread(shares, 2),
                    "" if method == "minitron" else spread(cost, 1),
                )
            )
    header = ("model", "target", "method", "seeds", "removed", "teacher", "after pruning", "gap / plain's")
    return markdown_table((*header, "cost / scoring"), rows)


def report_curves(arms: list[Arm]) -> str:
    """Final losses by method and number of steps, and where refit's curve crosses plain's final loss."""
    rows = []
    for model, target in targets(arms):
        for steps in sorted({arm["steps"] for arm in arms if arm["method"] == "minitron"} - {0}):
            where = {"model": model, "target": target, "steps": steps}
            plain = {arm["seed"]: arm for arm in at_best_rate(arms, **where, method="minitron")}
            for method in dict.fromkeys(arm["method"] for arm in arms):
                own = at_best_rate(arms, **where, method=method)
                if not own or not plain:
                    continue
                tried = sorted(
                    {arm["rate"] for arm in arms if where.items() <= arm.items() and arm["method"] == method}
                )
                ratios = [
                    crossing(arm["curve"], plain[arm["seed"]]["curve"][-1][1]) for arm in own if arm["seed"] in plain
                ]
                rows.append(
                    (
                        model,
                        target,
                        steps,
                        method,
                        len(own),
                        f"{own[0]['rate']:g}" + edge(own[0]["rate"], tried),
                        spread([arm["curve"][-1][1] for arm in own], 3),
                        "" if method == "minitron" else show_ratios(ratios),
                    )
                )
    header = ("model", "target", "steps", "method", "seeds", "best rate", "final loss")
    return markdown_table((*header, "steps to plain's final loss, share"), rows) if rows else ""


def report_shorter(arms: list[Arm]) -> str:
    """Runs of refit that were planned short (their schedule decays), against plain's final loss at full length."""
    rows = []
    for model, target in targets(arms):
        where = {"model": model, "target": target}
        for full in sorted({arm["steps"] for arm in arms if arm["method"] == "minitron"} - {0}):
            plain = {arm["seed"]: arm for arm in at_best_rate(arms, **where, method="minitron", steps=full)}
            shorter = {a["steps"] for a in arms if where.items() <= a.items() and a["method"] == "refit"}
            for steps in sorted(step for step in shorter if 0 < step < full and plain):
                own = [a for a in at_best_rate(arms, **where, method="refit", steps=steps) if a["seed"] in plain]
                if own:
                    lead = [plain[arm["seed"]]["curve"][-1][1] - arm["curve"][-1][1] for arm in own]
                    final = spread([arm["curve"][-1][1] for arm in own], 3)
                    reached = f"{sum(value >= 0 for value in lead)} of {len(lead)}"
                    row = (model, target, full, f"{steps} (1/{full / steps:.3g})", f"{own[0]['rate']:g}", final)
                    rows.append((*row, spread(lead, 3), reached))
    header = ("model", "target", "plain's steps", "refit's steps", "rate", "refit's final loss")
    return markdown_table((*header, "below plain's final", "reached"), rows) if rows else ""


def plot(arms: list[Arm], folder: Path) -> list[Path]:
    """A picture for every model, target and number of steps: loss along distillation, at each method's best rate."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for model, target in targets(arms):
        for steps in sorted({arm["steps"] for arm in arms if arm["method"] == "minitron"} - {0}):
            curves = {}
            for method in dict.fromkeys(arm["method"] for arm in arms):
                for arm in at_best_rate(arms, model=model, target=target, steps=steps, method=method)[:1]:
                    tokens = TOKENS_PER_ROW * arm["rows_per_step"]
                    curves[method] = [(step * tokens, loss) for step, loss in arm["curve"]]
                    teacher = arm["teacher"]
            if len(curves) > 1:
                name = f"{model}-{target.replace(' ', '-')}-{steps}.png"
                paths.append(plot_losses(folder / name, curves, {"teacher": teacher}, "held-out loss (nats per token)"))
    return paths


def targets(arms: list[Arm]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((arm["model"], arm["target"]) for arm in arms))


def by_seed(arms: list[Arm]) -> dict[int, Arm]:
    """The first arm of every seed: pruning is the same for all rates."""
    return {arm["seed"]: arm for arm in reversed(arms)}


def gap(arm: Arm) -> float:
    return arm["pruned"] - arm["teacher"]


def crossing(curve: Curve, wanted: float) -> float | None:
    """The share of all steps after which the loss is reached, straight between evaluations; None if never."""
    for (before, above), (after, below) in zip(curve[:1] + curve, curve, strict=False):
        if below <= wanted:
            part = 1.0 if above <= below else (above - wanted) / (above - below)
            return (before + part * (after - before)) / curve[-1][0]
    return None


def edge(rate: float, tried: list[float]) -> str:
    """Says when the best rate is the least or the greatest of those tried."""
    return " (edge)" if len(tried) > 1 and rate in (tried[0], tried[-1]) else ""


def show_ratios(ratios: list[float | None]) -> str:
    reached = [ratio for ratio in ratios if ratio is not None]
    missed = f", {len(ratios) - len(reached)} not reached" if len(reached) < len(ratios) else ""
    return (spread(reached, 2) if reached else "none") + missed


def spread(values: list[float], digits: int) -> str:
    """The mean, with the least and the greatest where there are several."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
