"""The main job on real checkpoints: importance beats chance after the same distillation (skipped without ../shared)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.stage import distill_checkpoint
from hf_minitron.prune.arguments import CalibrationArguments, PruneOutput
from hf_minitron.prune.preview import ModelArguments
from hf_minitron.prune.stage import prune_checkpoint
from hf_minitron.prune.target import PruneConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
STORIES = SHARED / "text" / "tinystories"
SIZES = {  # about half of the parameters
    "tinystories-656k": {"hidden_size": 80, "intermediate_size": 192},
    "stories260k-hf": {"hidden_size": 48, "intermediate_size": 96},
}


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories models and texts are not here")
@pytest.mark.parametrize("name", list(SIZES))
def test_pruned_and_distilled_beats_randomly_pruned_and_distilled(name, tmp_path):
    losses = {}
    for method in ("minitron", "random"):
        report = prune_and_distil(SHARED / "models" / name, method, SIZES[name], tmp_path / method)
        losses[method] = report.metrics["lm_loss"]
        assert report.metrics["kl"] < report.metrics_before["kl"]
    assert report.metrics["teacher_lm_loss"] < losses["minitron"] < losses["random"]


def prune_and_distil(teacher, method, sizes, folder):
    prune_checkpoint(
        ModelArguments(str(teacher)),
        CalibrationArguments(str(STORIES / "train_5000.jsonl"), num_samples=64, sequence_length=256),
        PruneConfig(**sizes, method=method),
        PruneOutput(str(folder / "pruned")),
    )
    arguments = DistillArguments(
        student_model=str(folder / "pruned"),
        teacher_model=str(teacher),
        dataset=str(STORIES / "train_5000.jsonl"),
        eval_dataset=str(STORIES / "stories_3000.json"),
        max_length=256,
        max_eval_rows=32,
    )
    config = DistillationConfig(
        output_dir=str(folder / "student"),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return distill_checkpoint(arguments, config)
