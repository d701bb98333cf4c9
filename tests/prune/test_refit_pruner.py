"""Refit through ``PrunerForCausalLM`` and the stage: options, files, lineage, and what can be done with the result."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.lineage import read_lineage
from hf_minitron.prune.plan import PrunePlan
from hf_minitron.prune.preview import ModelArguments
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.stage import CalibrationArguments, PruneOutput, prune_checkpoint
from hf_minitron.prune.target import PruneConfig

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
LEARNING = {"learning_rate": 1e-3, "warmup_steps": 0, "lr_scheduler_type": "constant"}


@pytest.fixture
def refit_folder(tiny_checkpoint, tiny_text, tmp_path):
    calibration = CalibrationArguments(calibration_dataset=str(tiny_text), num_samples=48, sequence_length=32)
    output = PruneOutput(str(tmp_path / "small"))
    # The model is random, so its loss on held-out rows does not tell what is better.
    prune = PruneConfig(**SIZES, method="refit", refit_without=["guard"])
    prune_checkpoint(ModelArguments(str(tiny_checkpoint)), calibration, prune, output)
    return tmp_path / "small"


def test_result_is_an_ordinary_checkpoint(refit_folder, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(refit_folder)
    assert model.dtype == torch.bfloat16
    assert {key: getattr(model.config, key) for key in SIZES} == SIZES
    assert model.config.head_dim == 8
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=5, min_new_tokens=5, pad_token_id=1).shape == (1, 8)


def test_lineage_says_how_it_was_solved(refit_folder):
    (stage,) = read_lineage(refit_folder)
    settings = stage["settings"]
    assert settings["method"] == "refit"
    assert settings["mode"] == "teacher_forced"
    assert settings["ridge"] == 0.01
    assert len(settings["moments_sha256"]) == 64
    assert 0 < settings["layers"]["0"]["self_attn.q_proj"]["after"] < 1
    assert stage["data"]["seed"] == 0
    plan = json.loads((refit_folder / "prune_plan.json").read_text())
    assert [len(kept) for kept in plan["kept_neurons"]] == [32, 32]


def test_result_is_pruned_again_and_distilled(refit_folder, tiny_checkpoint, tiny_text, tmp_path):
    pruner = PrunerForCausalLM.from_pretrained(refit_folder, dtype="float32")
    pruner.score(str(tiny_text), num_samples=16, sequence_length=32, progress=False)
    smaller = pruner.prune(PruneConfig(hidden_size=16, method="refit"))  # on the rows of score()
    pruner.save_pretrained(tmp_path / "smaller")
    assert len(read_lineage(tmp_path / "smaller")) == 2
    rows = [{"input_ids": list(range(5 + i, 21 + i))} for i in range(4)]
    config = DistillationConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, **LEARNING
    )
    teacher = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    before = copy.deepcopy(smaller.state_dict())
    trainer = DistillationTrainer(smaller, teacher, config, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in smaller.state_dict().items())


def test_rows_are_needed(tiny_checkpoint):
    pruner = PrunerForCausalLM.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="give prune\\(config, calibration\\), or call score"):
        pruner.prune(PruneConfig(hidden_size=24, method="refit"))
    with pytest.raises(ValueError, match="call prune\\(config, rows\\)"):
        pruner.plan(PruneConfig(hidden_size=24, method="refit"))


def test_text_is_needed_on_the_command_line(tiny_checkpoint, tmp_path):
    prune = PruneConfig(hidden_size=24, method="refit")
    with pytest.raises(ValueError, match="give --calibration-dataset"):
        prune_checkpoint(
            ModelArguments(str(tiny_checkpoint)), CalibrationArguments(), prune, PruneOutput(str(tmp_path / "x"))
        )


def test_a_refit_plan_cannot_be_sliced_by(refit_folder, tiny_checkpoint):
    pruner = PrunerForCausalLM.from_pretrained(tiny_checkpoint)
    plan = PrunePlan.load(refit_folder / "prune_plan.json")
    with pytest.raises(ValueError, match="solved on calibration rows"):
        pruner.prune(plan)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refit_mode": "parallel"}, "refit_mode='parallel' is unknown"),
        ({"refit_without": ["basis"]}, "refit_without='basis' is unknown"),
        ({"refit_ridge": 0.0}, "must be positive"),
        ({"stats_memory": -1.0}, "must not be negative"),
        ({"head_residual": True}, "Leave it out"),
        ({"iterations": 2}, "other methods than minitron"),
    ],
)
def test_options_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        PruneConfig(method="refit", **settings)
