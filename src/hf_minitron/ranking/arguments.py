"""Options of a search: which text and teacher rank the candidates, and how shortly they train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.prune.arguments import CalibrationArguments
from hf_minitron.prune.preview import ModelArguments
from hf_minitron.prune.target import PruneConfig


def _same(dataclass_: type, name: str, **changes: Any) -> Any:
    """A field with the default and the help of another dataclass's."""
    other = dataclass_.__dataclass_fields__[name]
    return field(**({"default": other.default, "metadata": dict(other.metadata)} | changes))


@dataclass
class RankingArguments:
    """Text and teacher for every candidate's short distillation; without ``dataset`` candidates are only listed."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Training text (Hub data set id, file, folder or glob). Given, every candidate is pruned, "
            "distilled briefly and ranked; left out, the candidates are only listed, and nothing is written."
        },
    )
    dataset_config: str | None = _same(DistillArguments, "dataset_config")
    dataset_split: str = _same(DistillArguments, "dataset_split")
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out text that candidates are ranked on, read like --dataset."}
    )
    eval_split: str | None = _same(DistillArguments, "eval_split")
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per packed row (default: what the model takes, at most 4096)."}
    )
    max_eval_rows: int = _same(DistillArguments, "max_eval_rows")
    teacher_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the teacher (default: the model that is pruned)."}
    )
    teacher_revision: str | None = _same(DistillArguments, "teacher_revision")
    teacher_dtype: str = _same(DistillArguments, "teacher_dtype")
    scores: str | None = field(
        default=None, metadata={"help": "Scores written by `hf-minitron score`, instead of a calibration data set."}
    )
    depth_metric: str = _same(PruneConfig, "depth_metric", default="block_importance")
    depth_pattern: str = _same(PruneConfig, "depth_pattern", default="scattered")
    head_residual: bool = _same(PruneConfig, "head_residual")
    keep_checkpoints: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoints of all candidates, not of the best alone."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what output_dir holds, and start again."})

    def __post_init__(self) -> None:
        self.prune_config()

    def prune_config(self, **sizes: int) -> PruneConfig:
        """How candidates are pruned; without sizes, to nothing smaller."""
        how = {key: getattr(self, key) for key in ("depth_metric", "depth_pattern", "head_residual")}
        return PruneConfig(**how, **sizes)

    def distill_arguments(self, model: ModelArguments, calibration: CalibrationArguments) -> DistillArguments:
        """Those of ``distill``, with the model that is pruned as the student."""
        shared = {f.name for f in dataclasses.fields(self)} & set(DistillArguments.__dataclass_fields__)
        values = {key: getattr(self, key) for key in shared}
        if self.teacher_model is None:
            values |= {"teacher_model": model.model, "teacher_revision": model.revision}
        return DistillArguments(
            student_model=model.model,
            student_revision=model.revision,
            text_column=calibration.text_column,
            trust_remote_code=model.trust_remote_code,
            **values,
        )


@dataclass
class ShortDistillationConfig(DistillationConfig):
    """Settings of every candidate's distillation: those of ``distill``, made short, with ten measurements on the way.

    P1 trains candidates for 400 steps; their ranking settled after about 300.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results and the best candidate's checkpoints; continued if begun."}
    )
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps for each candidate (P1: 400)."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up, or their share below 1."})
    eval_strategy: str = field(default="steps", metadata={"help": "When the loss is measured on the way."})
    eval_steps: float = field(default=0.1, metadata={"help": "Steps between measurements, or their share below 1."})
    logging_steps: float = field(default=0.1, metadata={"help": "Steps between log entries, or their share below 1."})
    save_strategy: str = field(
        default="no",
        metadata={"help": "steps: an interrupted candidate resumes at its last save; no: it starts again."},
    )

    def __post_init__(self) -> None:
        wanted = self.output_dir
        super().__post_init__()
        self.output_dir = wanted  # the Trainer's class would name a folder of its own
