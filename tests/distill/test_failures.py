"""A run that cannot go on says why: the batch that gave a NaN, the setting to lower when memory runs out."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_minitron.distill import head_loss
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.trainer import DistillationTrainer

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))


def make_trainer(folder: Path, **options) -> DistillationTrainer:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 3,
        "save_steps": 3,
        "warmup_steps": 0,
    }
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "output_dir": str(folder)}
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 64, (12,), generator=generator).tolist()} for _ in range(24)]
    models = helpers["tiny_llama"](16, seed=1), helpers["tiny_llama"](24, seed=2)
    return DistillationTrainer(*models, DistillationConfig(**(settings | options)), train_dataset=rows)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_names_its_step_and_rows_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, accumulation):
    """Poison in the second batch of the fifth step, or in the only one; it is found at the next log, at step 6."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    batches, loss = [], head_loss.fused_linear_kd

    def poisoned(student_hidden, *args, **kwargs):
        if len(batches) == 5 * accumulation:
            student_hidden = student_hidden * torch.nan
        return loss(student_hidden, *args, **kwargs)

    step = trainer.compute_loss
    monkeypatch.setattr(head_loss, "fused_linear_kd", poisoned)
    monkeypatch.setattr(trainer, "compute_loss", lambda m, inputs, **k: batches.append(inputs) or step(m, inputs, **k))
    with pytest.raises(FloatingPointError, match="between steps 3 and 6") as error:
        trainer.train()
    rows = batches[5 * accumulation - 1]["input_ids"].numpy().astype("<i8")
    names = [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()[:16] for row in rows]
    assert f"first bad batch is in step 5, rows {names}" in str(error.value)
    assert str(rows[0, :8].tolist()) in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert all(value.isfinite().all() for value in load(tmp_path / "checkpoint-3").values())


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(head_loss, "fused_linear_kd", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        make_trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=3).train()
    message = str(error.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "per_device_train_batch_size=4 with gradient_accumulation_steps=6" in message
    assert message.index("activation_checkpointing=True") < message.index("kd_chunk_size") < message.index("max_length")
    options = {"per_device_train_batch_size": 1, "activation_checkpointing": True, "kd_chunk_size": 64}
    with pytest.raises(torch.OutOfMemoryError) as error:
        make_trainer(tmp_path, **options).train()
    message = str(error.value)
    assert "per_device_train_batch_size" not in message and "activation_checkpointing" not in message
    assert "kd_chunk_size below 64" in message
