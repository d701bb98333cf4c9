"""DistillationTrainer's divergences, and heads with bias, capped or divided logits: against whole logits."""

from __future__ import annotations

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hf_minitron.architectures import LogitTransform, get_logit_transform
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.divergences import TokenLoss, token_losses
from hf_minitron.distill.trainer import DistillationTrainer

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama, uneven_rows = helpers["tiny_llama"], helpers["uneven_rows"]

NAMES = ("forward_kl", "reverse_kl", "js", "mse", "cosine")
METRICS = ("loss", "kl", "lm_loss", "teacher_lm_loss", "top1_agreement")


def make_trainer(folder: Path, student, teacher, rows, **options) -> DistillationTrainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    config = DistillationConfig(output_dir=str(folder), **{**defaults, **options})
    return DistillationTrainer(student, teacher, config, train_dataset=rows, eval_dataset=rows)


@torch.no_grad()
def metrics_from_whole_logits(student, teacher, rows, settings: TokenLoss) -> dict[str, float]:
    """Means over all targets of what the models' own forward gives, in fp64: the transforms are theirs."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = [model.eval()(ids).logits[0, :-1].double() for model in (student, teacher)]
        found.append(torch.stack([v.double() for v in token_losses(settings, *logits, ids[0, 1:], False)[0]]))
    return dict(zip(METRICS, torch.cat(found, dim=1).mean(1).tolist(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_is_what_is_logged_and_goes_down(tmp_path, name):
    teacher = tiny_llama(16, seed=2)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    rows, temperature = uneven_rows(8), 1.0 if name in ("mse", "cosine") else 2.0
    settings = TokenLoss(name, temperature, 0.1, 0.3)
    expected = metrics_from_whole_logits(copy.deepcopy(student), teacher, rows, settings)
    trainer = make_trainer(
        tmp_path, student, teacher, rows, max_steps=20, divergence=name, temperature=temperature, ce_weight=0.1,
        js_beta=0.3,
    )  # fmt: skip
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for metric in METRICS:
        assert before[f"eval_{metric}"] == pytest.approx(expected[metric], rel=1e-4), metric
        assert log[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    floor = 0.1 * expected["teacher_lm_loss"]  # about what the cross-entropy leaves
    assert after["eval_loss"] - floor < 0.7 * (before["eval_loss"] - floor)
    assert after["eval_kl"] < before["eval_kl"]


def build(family: str, seed: int, hidden_size: int = 16, **settings) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64,
        "hidden_size": hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes | settings))


def biased(seed: int, hidden_size: int = 16) -> PreTrainedModel:
    """A Llama whose head has a bias, as Phi's has."""
    model = tiny_llama(hidden_size, seed)
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(hidden_size, 64, bias=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
        model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return model


PAIRS = {
    "gemma2": lambda: (
        build("gemma2", 1, final_logit_softcapping=2.0),
        build("gemma2", 2, hidden_size=24, final_logit_softcapping=3.0),
    ),
    "granite": lambda: (build("granite", 1, logits_scaling=0.5), build("granite", 2, 24, logits_scaling=0.25)),
    "biased": lambda: (biased(1), biased(2, 24)),
    "gemma2 teaches llama": lambda: (tiny_llama(16, 1), build("gemma2", 2, final_logit_softcapping=2.0)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_are_those_of_the_models(tmp_path, pair):
    student, teacher = PAIRS[pair]()
    rows, settings = uneven_rows(8), TokenLoss(ce_weight=0.5)
    expected = metrics_from_whole_logits(copy.deepcopy(student), teacher, rows, settings)
    head = student.get_output_embeddings()
    trainer = make_trainer(tmp_path, student, teacher, rows, ce_weight=0.5)
    metrics = trainer.evaluate()
    for metric in METRICS:
        assert metrics[f"eval_{metric}"] == pytest.approx(expected[metric], rel=1e-4), metric
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in head.named_parameters())
    if "biased" not in pair:
        assert get_logit_transform(teacher.config) != LogitTransform()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("pair", ["gemma2", "granite", "biased"])
def test_the_gradient_is_that_of_the_models_own_logits(tmp_path, pair):
    student, teacher = PAIRS[pair]()
    rows = uneven_rows(1)
    trainer = make_trainer(tmp_path, student, teacher, rows)
    trainer.compute_loss(trainer.model, trainer.data_collator(rows)).backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    ids = torch.tensor([rows[0]["input_ids"]])
    logs = [model(ids).logits[0, :-1].log_softmax(-1) for model in (student, teacher)]
    nn.functional.kl_div(*logs, reduction="batchmean", log_target=True).backward()
    for name, parameter in student.named_parameters():
        error = (parameter.grad - found[name]).norm()
        assert error <= 1e-4 * parameter.grad.norm() + 1e-7, name
