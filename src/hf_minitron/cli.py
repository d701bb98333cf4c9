"""``hf-minitron``: one sub-command per stage, whose options are the fields of the stage's dataclasses."""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hf_minitron import __version__

USER_ERRORS = (ValueError, OSError, FloatingPointError)  # OSError: files, disk, Hub


@dataclass(frozen=True)
class Command:
    """A sub-command: the field that its first word fills, dataclasses of its options, its function, its summary.

    ``report`` says the result in words and ``plot``, where there is one, draws it. Names are resolved when the command
    runs, so that ``hf-minitron --help`` need not import torch.
    """

    summary: str
    positional: str
    options: tuple[str, ...]
    run: str
    report: Callable[..., str]
    when_stopped: str = "nothing incomplete stands under the output's name"
    plot: Callable[..., None] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"hf-minitron {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {words[0]!r} is no command. Use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_minitron").setLevel(logging.INFO)
    try:
        return run_command(words[0], words[1:])
    except KeyboardInterrupt:
        print(f"\nstopped; {COMMANDS[words[0]].when_stopped}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def overview() -> str:
    """What ``hf-minitron --help`` prints: the stages in their order."""
    lines = [f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-minitron COMMAND ... [--config FILE.yaml]",
            "",
            "Make a big language model small. The stages, in order:",
            *lines,
            "",
            "hf-minitron COMMAND --help lists a command's options. Options may stand in a YAML file; flags win "
            "over it.",
        ]
    )


def run_command(name: str, words: list[str]) -> int:
    """Parses the words of one command, runs its stage and prints the summary."""
    command = COMMANDS[name]
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    parsed = _parse(name, command, words)
    result = _resolve(command.run)(*parsed)
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        if command.plot is not None:
            command.plot(result, *parsed)
        print(json.dumps(result.as_dict(), indent=2) if as_json else command.report(result, *parsed))
    return 0


def _parse(name: str, command: Command, words: list[str]) -> tuple[Any, ...]:
    from trl import TrlParser

    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words and not words[0].startswith("-"):
        words[:1] = [f"--{command.positional}", words[0]]
    what = command.positional.split("_")[0].upper()
    parser = TrlParser(
        [_resolve(option) for option in command.options],
        prog=f"hf-minitron {name}",
        usage=f"hf-minitron {name} {what} [options] [--config FILE.yaml] [--json]",
        description=command.summary,
        allow_abbrev=False,
    )
    *parsed, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    options = [option for action in parser._actions for option in action.option_strings]
    for word in unknown:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.split("=")[0], options, n=2)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"See hf-minitron {name} --help."
            raise ValueError(f"{word} is no option of hf-minitron {name}. {hint}")
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: hf-minitron {name} takes {what} first, then options. See hf-minitron {name} --help."
        )
    return tuple(parsed)


def _resolve(name: str) -> Any:
    module, attribute = name.rsplit(".", 1)
    return getattr(import_module(f"hf_minitron.{module}"), attribute)


def report_plan(report: Any, model: Any, prune: Any) -> str:
    """Sizes and parameters before and after, and the command that does it."""
    from hf_minitron.publish.tables import markdown_table

    rows = [
        (key, f"{before:,}", f"{report.sizes[key]:,}", _percent(report.sizes[key], before))
        for key, before in report.source_sizes.items()
    ]
    for part, before in report.source_parameters.items():
        rows.append(
            (
                f"parameters: {part}",
                f"{before:,}",
                f"{report.parameters[part]:,}",
                _percent(report.parameters[part], before),
            )
        )
    sizes = " ".join(
        f"--{key.replace('_', '-')} {size}" for key, size in report.sizes.items() if size != report.source_sizes[key]
    )
    if prune.drop_layers:
        sizes += f" --drop-layers {' '.join(map(str, prune.drop_layers))}"
    table = markdown_table(("", "source", "pruned", "kept"), rows)
    warnings = "".join(f"\n\nWarning: {warning}" for warning in report.warnings)
    return f"{table}{warnings}\n\nNext: hf-minitron prune {report.model} {sizes} --calibration-dataset DATA --output-dir DIR"


def report_prune(report: Any, model: Any, calibration: Any, prune: Any, output: Any, task: Any) -> str:
    """The same table, and how to go on."""
    table = report_plan(report, model, prune).split("\n\nNext:")[0]
    layers = ""
    if len(report.kept_layers) < report.source_sizes["num_hidden_layers"]:
        layers = f"\n\nKept layers: {', '.join(map(str, report.kept_layers))}"
    return (
        f"{table}{layers}\n\nWrote {output.output_dir}\nNext: hf-minitron distill {output.output_dir} --teacher-model "
        f"{model.model} --dataset DATA --output-dir DIR"
    )


def report_scores(scores: Any, model: Any, calibration: Any, output: Any, scan: Any, task: Any) -> str:
    """What was scored and where it lies."""
    axes = ", ".join(scores.axes)
    return (
        f"Scored {axes} on {scores.info['num_samples']:,} rows ({scores.info['num_tokens']:,} tokens); wrote "
        f"{output.output_file}\n"
        f"Next: hf-minitron prune {model.model} --scores {output.output_file} --hidden-size N "
        "--intermediate-size M --output-dir DIR"
    )


def report_score_files(report: Any, arguments: Any) -> str:
    """What was scored, and importance by layer, by residual channel and by block of layers removed."""
    from hf_minitron.publish.tables import markdown_table

    scores, info = report.scores, report.scores.info
    model = info.get("model", {})
    facts = {
        "model": " @ ".join([*(model[key] for key in ("id", "path") if key in model), *_short_hashes(model)]),
        "rows": _number(info.get("num_samples")),
        "tokens": _number(info.get("num_tokens")),
        "aggregation": "{} over rows, {} over tokens".format(*scores.aggregation),
        "neuron signal": scores.neuron_signal or "–",
    }
    files = f"{len(arguments.files)} files, merged" if len(arguments.files) > 1 else "1 file"
    tables = [markdown_table(("scores", files), list(facts.items()))]
    if report.layers:
        header = ("layer", "block importance", "best half of neurons holds", "least head", "greatest head")
        rows = [
            (
                layer,
                _short(row.block_importance),
                _share(row.best_neurons),
                _short(row.least_head),
                _short(row.greatest_head),
            )
            for layer, row in enumerate(report.layers)
        ]
        tables.append(markdown_table(header, rows))
    if report.hidden_energy:
        rows = [
            (f"{channels:,} of {len(scores.hidden):,}", _share(share))
            for channels, share in report.hidden_energy.items()
        ]
        tables.append(markdown_table(("best residual channels", "share of squared scores"), rows))
    if report.removals:
        header = ("removal scan", "least missed", "damage", "standard error", "intact")
        tables.append(markdown_table(header, [_removal_row(removal) for removal in report.removals]))
    wrote = [path for path in (arguments.output_file, arguments.plot_dir) if path is not None]
    return "\n\n".join([*tables, *([f"Wrote {' and '.join(wrote)}"] if wrote else [])])


def _short_hashes(model: dict[str, str]) -> list[str]:
    return [model[key][:12] for key in ("commit", "sha256") if key in model]


def _removal_row(removal: Any) -> tuple[str, ...]:
    start, end = removal.best_start, removal.best_start + removal.num_dropped - 1
    numbers = (removal.damage[start], removal.standard_error[start], removal.intact)
    block = f"layer {start}" if start == end else f"layers {start}–{end}"
    return (f"{removal.metric}, blocks of {removal.num_dropped}", block, *(_short(float(number)) for number in numbers))


def plot_score_files(report: Any, arguments: Any) -> None:
    """Writes the pictures of importance, if asked to."""
    if arguments.plot_dir is not None:
        from hf_minitron.publish.plots import plot_scores

        scores = {axis: getattr(report.scores, axis) for axis in report.scores.axes}
        plot_scores(arguments.plot_dir, scores, report.removals)


def report_search(
    report: Any, model: Any, space: Any, budget: Any, calibration: Any, arguments: Any, config: Any
) -> str:
    """The candidates that fit, or their ranking."""
    from hf_minitron.ranking.report import describe_search

    return describe_search(report, arguments)


def report_distill(report: Any, arguments: Any, config: Any) -> str:
    """Held-out metrics before and after, and how to go on."""
    from hf_minitron.publish.tables import markdown_table

    lines = []
    if report.metrics:
        rows = [(key, _number(report.metrics_before.get(key)), _number(value)) for key, value in report.metrics.items()]
        lines.append(markdown_table(("held-out", "before", "after"), rows) + "\n")
    lines.append(f"Trained on {report.num_tokens:,} tokens; wrote {report.output_dir}")
    lines.append(f"Next: hf-minitron evaluate {report.output_dir} --dataset HELD_OUT")
    return "\n".join(lines)


def report_evaluation(result: Any, arguments: Any) -> str:
    """Loss, perplexity and bits per byte."""
    from hf_minitron.publish.tables import markdown_table

    return markdown_table(
        ("measure", arguments.model), [(key, _number(value)) for key, value in result.as_dict().items()]
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _short(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


COMMANDS = {
    "plan": Command(
        "Show sizes and parameters before and after, from the config alone.",
        "model",
        ("prune.preview.ModelArguments", "prune.target.PruneConfig"),
        "prune.preview.plan_pruning",
        report_plan,
    ),
    "score": Command(
        "Measure importance of neurons, heads, channels and layers on calibration text.",
        "model",
        (
            "prune.preview.ModelArguments",
            "prune.arguments.CalibrationArguments",
            "prune.arguments.ScoreOutput",
            "prune.arguments.ScanArguments",
            "prune.arguments.DepthTaskArguments",
        ),
        "prune.stage.score_checkpoint",
        report_scores,
    ),
    "scores": Command(
        "Inspect, merge and plot score files.",
        "files",
        ("prune.score_report.ScoreFileArguments",),
        "prune.score_report.inspect_scores",
        report_score_files,
        plot=plot_score_files,
    ),
    "search": Command(
        "List the architectures that fit a budget; with --dataset, also rank them by short distillation.",
        "model",
        (
            "prune.preview.ModelArguments",
            "prune.search.SearchSpace",
            "prune.search.Budget",
            "prune.arguments.CalibrationArguments",
            "ranking.arguments.RankingArguments",
            "ranking.arguments.ShortDistillationConfig",
        ),
        "ranking.stage.search_checkpoint",
        report_search,
        "the same command goes on: finished candidates are read back",
    ),
    "prune": Command(
        "Write a smaller checkpoint that keeps what matters most.",
        "model",
        (
            "prune.preview.ModelArguments",
            "prune.arguments.CalibrationArguments",
            "prune.target.PruneConfig",
            "prune.arguments.PruneOutput",
            "prune.arguments.DepthTaskArguments",
        ),
        "prune.stage.prune_checkpoint",
        report_prune,
    ),
    "distill": Command(
        "Train the pruned model on its teacher's logits.",
        "student_model",
        ("distill.stage.DistillArguments", "distill.config.DistillationConfig"),
        "distill.stage.distill_checkpoint",
        report_distill,
        "add --resume-from-checkpoint true to go on from the last checkpoint-* folder, if there is one",
    ),
    "evaluate": Command(
        "Loss, perplexity and bits per byte on held-out text.",
        "model",
        ("evaluate.stage.EvaluateArguments",),
        "evaluate.stage.evaluate_checkpoint",
        report_evaluation,
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
