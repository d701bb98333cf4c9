"""The stages ``score`` and ``prune`` as the command line and recipes run them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hf_minitron.checkpoint import check_output_dir
from hf_minitron.prune.importance import AXES, ImportanceScores, check_aggregation, check_axes, check_batch_size
from hf_minitron.prune.plan import SIZE_OF, PruneConfig
from hf_minitron.prune.preview import ModelArguments, PlanReport, plan_pruning
from hf_minitron.prune.pruner import PrunerForCausalLM


@dataclass
class CalibrationArguments:
    """Which text importance is measured on, and how."""

    calibration_dataset: str | None = field(
        default=None,
        metadata={"help": "Text for calibration: Hub data set id, file, folder or glob (txt, jsonl, json, parquet)."},
    )
    calibration_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    calibration_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text; found by itself where only one can."}
    )
    num_samples: int = field(default=1024, metadata={"help": "Calibration rows, drawn at random (the papers: 1024)."})
    sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens per calibration row (default: what the model takes, at most 4096)."}
    )
    calibration_seed: int = field(default=0, metadata={"help": "Seed of the random draw of rows."})
    batch_size: int = field(default=8, metadata={"help": "Rows per forward pass; does not change the scores."})
    batch_aggregation: str = field(
        default="l2", metadata={"help": "How scores are aggregated over rows: l2, mean or var."}
    )
    sequence_aggregation: str = field(
        default="mean", metadata={"help": "How scores are aggregated over a row's tokens: l2, mean or var."}
    )
    axes: list[str] = field(default_factory=lambda: list(AXES), metadata={"help": f"Axes to score: {' '.join(AXES)}."})

    def __post_init__(self) -> None:
        check_axes(self.axes)
        check_aggregation((self.batch_aggregation, self.sequence_aggregation))
        check_batch_size(self.batch_size)


@dataclass
class ScoreOutput:
    """Where scores go."""

    output_file: str = field(default="scores.safetensors", metadata={"help": "File to write the scores to."})


@dataclass
class PruneOutput:
    """Where the pruned checkpoint goes, and scores that exist already."""

    output_dir: str = field(metadata={"help": "Folder for the pruned checkpoint."})
    scores: str | None = field(
        default=None, metadata={"help": "Scores written by `hf-minitron score`, instead of a calibration data set."}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as stored."})
    device_map: str | None = field(
        default=None, metadata={"help": "Where the model is put for scoring, as in transformers (auto, cpu, cuda)."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace output_dir if it is not empty."})


def score_checkpoint(model: ModelArguments, calibration: CalibrationArguments, output: ScoreOutput) -> ImportanceScores:
    """Scores a checkpoint and writes the scores to a file."""
    path = Path(output.output_file)
    if path.is_dir():
        raise IsADirectoryError(
            f"output_file={path} is a folder: give the name of a file, such as {path / 'scores.safetensors'}."
        )
    _check_calibration(calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    pruner = _open(model)
    scores = _score(pruner, calibration)
    scores.save(path)
    return scores


def prune_checkpoint(
    model: ModelArguments, calibration: CalibrationArguments, prune: PruneConfig, output: PruneOutput
) -> PlanReport:
    """Scores (unless scores are given, or none are needed), plans, trims and writes the smaller checkpoint."""
    check_output_dir(output.output_dir, output.overwrite)
    report = plan_pruning(model, prune)  # from the config alone: sizes are checked before weights are fetched
    if report.sizes == report.source_sizes:
        raise ValueError(
            f"nothing to prune: the sizes asked for are the source's, {report.sizes}. Give a smaller --hidden-size "
            "or --intermediate-size."
        )
    scores = None if output.scores is None else ImportanceScores.load(output.scores)
    needs_scores = scores is None and prune.method != "random"
    if needs_scores:
        _check_calibration(calibration)
        _check_scored_axes(calibration, report)
    pruner = _open(model, output.dtype, output.device_map)
    pruner.scores = _score(pruner, calibration) if needs_scores else scores
    pruner.set_plan(pruner.plan(prune))
    pruner.save_pretrained(output.output_dir, overwrite=output.overwrite)
    return report


def _check_calibration(calibration: CalibrationArguments) -> None:
    if calibration.calibration_dataset is None:
        raise ValueError("importance is measured on text: give --calibration-dataset, or --scores, or --method random.")


def _check_scored_axes(calibration: CalibrationArguments, report: PlanReport) -> None:
    """Every axis that shrinks is to be scored; said before the scoring."""
    shrinking = [axis for axis, key in SIZE_OF.items() if report.sizes[key] < report.source_sizes[key]]
    if missing := [axis for axis in shrinking if axis not in calibration.axes]:
        raise ValueError(
            f"axes={' '.join(calibration.axes)}: {SIZE_OF[missing[0]]} shrinks, which needs importance of {missing[0]}"
            f". Use --axes {' '.join(shrinking)}."
        )


def _open(model: ModelArguments, dtype: str = "auto", device_map: str | None = None) -> PrunerForCausalLM:
    return PrunerForCausalLM.from_pretrained(
        model.model,
        revision=model.revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=model.trust_remote_code,
    )


def _score(pruner: PrunerForCausalLM, calibration: CalibrationArguments) -> ImportanceScores:
    return pruner.score(
        calibration.calibration_dataset,
        axes=tuple(calibration.axes),
        aggregation=(calibration.batch_aggregation, calibration.sequence_aggregation),
        batch_size=calibration.batch_size,
        num_samples=calibration.num_samples,
        sequence_length=calibration.sequence_length,
        seed=calibration.calibration_seed,
        config_name=calibration.calibration_config,
        split=calibration.calibration_split,
        text_column=calibration.text_column,
    )
