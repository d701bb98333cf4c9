"""A search in words: the table of candidates, what was left out and why, and the command that comes next."""

from __future__ import annotations

from typing import Any

from hf_minitron.prune.search import SHORT, describe_budget, format_cost
from hf_minitron.publish.tables import markdown_table
from hf_minitron.ranking.arguments import RankingArguments
from hf_minitron.ranking.order import RankedCandidate
from hf_minitron.ranking.scoring import SCORES_FILE
from hf_minitron.ranking.stage import LOSSES_PLOT, REPORT_FILE, SIZES_PLOT, SearchReport

MAX_LISTED = 100  # rows of a table; --json has them all


def describe_search(report: SearchReport, arguments: RankingArguments) -> str:
    """The listing or the ranking as Markdown, with a closing ``Next`` line."""
    listing, source = report.listing, report.source_parameters
    lines = [
        f"{len(listing.candidates)} of {listing.num_combinations} combinations fit {describe_budget(report.budget)} "
        f"(source: {source['total']:,} parameters, {source['non_embedding']:,} without embeddings).",
        *map(str, listing.left_out),
        "",
    ]
    if report.winner is None:
        return "\n".join([*lines, _listing_table(report), "", *_next_after_listing(report)])
    return "\n".join([*lines, _ranking_table(report), "", *_next_after_ranking(report, arguments)])


def _listing_table(report: SearchReport) -> str:
    has_cost = report.budget.has_limit
    header = [*SHORT.values(), "parameters", "non-embedding", *([report.budget.budget_on] if has_cost else [])]
    rows = []
    for c in report.listing.candidates[:MAX_LISTED]:
        cost = [format_cost(c.cost, report.budget)] if has_cost else []
        rows.append([*(f"{c.sizes[key]:,}" for key in SHORT), f"{c.total:,}", f"{c.non_embedding:,}", *cost])
    more = len(report.listing.candidates) - MAX_LISTED
    note = f"\n\n... and {more} more: --json lists all, a smaller --tolerance fewer." if more > 0 else ""
    return markdown_table(header, rows) + note


def _ranking_table(report: SearchReport) -> str:
    header = ["rank", *SHORT.values(), "parameters", "loss ± s.e.", "above the best ± s.e.", "seconds"]
    rows = [
        [
            c.rank or "failed",
            *(f"{c.sizes[key]:,}" for key in SHORT),
            f"{c.total:,}",
            _with_error(c.loss, c.standard_error),
            "" if c.rank == 1 else _with_error(c.difference, c.difference_standard_error),
            "" if c.seconds is None else f"{c.seconds:.0f}",
        ]
        for c in report.ranking
    ]
    notes = [f"{c.name} failed: {c.error}" for c in report.ranking if c.error]
    close = [c.name for c in report.ranking[1:] if _is_close(c)]
    if close:
        notes.append(f"Within two standard errors of the best: {', '.join(close)}.")
    notes.append(f"Teacher's loss on the same rows: {report.teacher_loss:.4f}.")
    return "\n\n".join([markdown_table(header, rows), "\n".join(notes)])


def _is_close(candidate: RankedCandidate) -> bool:
    error = candidate.difference_standard_error
    return candidate.loss is not None and error is not None and candidate.difference <= 2 * error


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _next_after_listing(report: SearchReport) -> list[str]:
    sizes = report.listing.candidates[0].sizes
    return [
        "To rank them, repeat the command with --dataset TRAIN --eval-dataset HELD_OUT --calibration-dataset TRAIN "
        "--output-dir DIR.",
        f"Next, for the first of them: hf-minitron prune {report.model} {_size_options(report, sizes)} "
        "--calibration-dataset DATA --output-dir DIR",
    ]


def _next_after_ranking(report: SearchReport, arguments: RankingArguments) -> list[str]:
    winner, folder = report.winner, report.output_dir
    scores = arguments.scores or f"{folder}/{SCORES_FILE}"
    options = _size_options(report, winner.sizes)
    if winner.sizes["num_hidden_layers"] < report.source_sizes["num_hidden_layers"]:
        options += f" --depth-metric {arguments.depth_metric} --depth-pattern {arguments.depth_pattern}"
    options += " --head-residual true" if arguments.head_residual else ""
    return [
        f"Wrote {folder}/{REPORT_FILE}, {LOSSES_PLOT} and {SIZES_PLOT}; the best candidate's checkpoints: "
        f"{folder}/candidates/{winner.name}/pruned and, briefly trained, .../student",
        f"Next: hf-minitron prune {report.model} {options} --scores {scores} --output-dir DIR",
    ]


def _size_options(report: SearchReport, sizes: dict[str, Any]) -> str:
    shrinking = [key for key in sizes if sizes[key] != report.source_sizes[key]]
    return " ".join(f"--{key.replace('_', '-')} {sizes[key]}" for key in shrinking)
