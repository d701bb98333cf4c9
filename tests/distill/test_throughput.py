"""Tokens per second and FLOP utilisation: the formula, the clock, and silence on unknown hardware."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from hf_minitron.distill import throughput
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.throughput import Throughput, count_matrix_parameters
from hf_minitron.distill.trainer import DistillationTrainer

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama = helpers["tiny_llama"]


@pytest.mark.parametrize("tied", [False, True])
def test_flops_count_heads_but_no_look_ups(tied):
    student, teacher = tiny_llama(16, seed=1, tied=tied), tiny_llama(24, seed=2)
    matrices = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16) + 16 + 64 * 16
    assert count_matrix_parameters(student) == matrices
    teacher_matrices = sum(p.numel() for p in teacher.parameters()) - 64 * 24
    measured = Throughput(student, teacher.requires_grad_(False), torch.device("cpu"), 1)
    assert measured.flops_per_token == 6 * matrices + 2 * teacher_matrices


def test_utilisation_is_of_all_known_gpus(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    measured = Throughput(tiny_llama(16, seed=1), tiny_llama(24, seed=2), torch.device("cuda"), 8)
    now[0] = 114.0
    measured.leave_out(4.0)
    found = measured.measures(5000)
    assert found["tokens_per_second"] == 500
    assert found["flop_utilisation"] == pytest.approx(500 * measured.flops_per_token / (8 * 989e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    unknown = Throughput(tiny_llama(16, seed=1), tiny_llama(24, seed=2), torch.device("cuda"), 8)
    assert unknown.measures(5).keys() == {"tokens_per_second"}


def test_train_logs_tell_the_speed(tmp_path):
    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    models = tiny_llama(16, seed=1), tiny_llama(24, seed=2)
    trainer = DistillationTrainer(*models, args, train_dataset=helpers["uneven_rows"](8))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and "flop_utilisation" not in entry for entry in logs)
