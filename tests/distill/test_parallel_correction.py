"""A teacher that is corrected while it teaches: its steps, the student's, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, write_cache
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.parallel_correction import ParallelCorrection
from hf_minitron.distill.trainer import DistillationTrainer

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama, uneven_rows = helpers["tiny_llama"], helpers["uneven_rows"]
METHODS = ("full", "lora", "norm")


def correction(method: str = "full", **options) -> ParallelCorrection:
    defaults = {"teacher_learning_rate": 1e-3, "teacher_warmup_steps": 2}
    return ParallelCorrection(teacher_correction=method, **(defaults | options))


def make_trainer(folder: Path, corrects: ParallelCorrection | None, teacher=None, **options) -> DistillationTrainer:
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "warmup_steps": 0}
    return DistillationTrainer(
        tiny_llama(16, seed=1),
        teacher or tiny_llama(24, seed=2),
        DistillationConfig(output_dir=str(folder), **(settings | options)),
        train_dataset=uneven_rows(8),
        eval_dataset=uneven_rows(7, seed=1),
        teacher_correction=corrects,
    )


def train_logs(trainer: DistillationTrainer) -> list[dict[str, float]]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    clock = ("tokens_per_second", "teacher_learning_rate")
    return [{name: value for name, value in entry.items() if name not in clock} for entry in logs]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_at_learning_rate_zero_it_is_plain_distillation_step_by_step(tmp_path, method):
    options = {"gradient_accumulation_steps": 2, "intermediate_losses": ["emb", "o"], "ce_weight": 0.5}
    plain = make_trainer(tmp_path / "plain", None, **options)
    parallel = make_trainer(tmp_path / method, correction(method, teacher_learning_rate=0.0), **options)
    before = weights(parallel.teacher_model)
    plain.train()
    parallel.train()
    assert train_logs(parallel) == train_logs(plain)
    assert all(torch.equal(value, before[name]) for name, value in weights(parallel.teacher_model).items())
    for name, value in weights(plain.model).items():
        assert torch.equal(value, weights(parallel.model)[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_exactly_its_own_weights_are_trained(tmp_path, method):
    trainer = make_trainer(tmp_path, correction(method), max_steps=4)
    before = weights(trainer.teacher_model)
    trainer.train()
    wanted = {"full": lambda name: True, "lora": lambda name: "lora_" in name, "norm": lambda name: "norm" in name}
    for name, value in weights(trainer.teacher_model).items():
        assert torch.equal(value, before[name]) != wanted[method](name), name
    assert all(value.grad is None for value in trainer.teacher_model.parameters())


def test_the_teachers_steps_are_those_of_a_plain_loop(tmp_path):
    """AdamW on the mean cross-entropy of the whole batch, clipped, after each of the student's steps."""
    teacher = tiny_llama(24, seed=2)
    reference = copy.deepcopy(teacher)
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.5}
    trainer = make_trainer(tmp_path, correction("full"), teacher, **options)
    batches, learn = [], trainer.correction.learn

    def recorded(inputs, following, factor):
        batches.append((inputs["input_ids"], inputs.get("attention_mask"), following))
        return learn(inputs, following, factor)

    trainer.correction.learn = recorded
    trainer.train()
    decayed = {name: p for name, p in reference.named_parameters() if "norm" not in name}
    others = [p for name, p in reference.named_parameters() if "norm" in name]
    groups = [{"params": [*decayed.values()], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    rates = [0.0, 5e-4, 1e-3]  # two steps of warm-up
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        pairs = batches[2 * step : 2 * step + 2]
        count = sum(int((following != -100).sum()) for *_, following in pairs)
        for ids, mask, following in pairs:
            logits = reference(ids, attention_mask=mask).logits.flatten(0, 1)
            (nn.functional.cross_entropy(logits, following, reduction="sum") / count).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), (_, other) in zip(teacher.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_the_student_learns_from_the_teacher_as_it_was_before_its_step(tmp_path):
    """The first log is plain distillation's; the teacher's loss falls from step to step."""
    plain, parallel = (
        make_trainer(tmp_path / "a", None),
        make_trainer(tmp_path / "b", correction(teacher_warmup_steps=0)),
    )
    plain.train()
    parallel.train()
    first, second = train_logs(parallel)[:2], train_logs(plain)[:2]
    assert first[0] == second[0] and first[1] != second[1]
    trainer = make_trainer(tmp_path / "c", correction(), max_steps=20)
    before = trainer.evaluate(uneven_rows(8))["eval_teacher_lm_loss"]
    trainer.train()
    assert trainer.evaluate(uneven_rows(8))["eval_teacher_lm_loss"] < 0.9 * before
    assert [entry["teacher_learning_rate"] for entry in trainer.state.log_history if "loss" in entry][:3] == [
        5e-4,
        1e-3,
        pytest.approx(1e-3, rel=0.1),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_resuming_restores_the_teacher_its_optimizer_and_its_schedule(tmp_path, method):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = make_trainer(tmp_path / "straight", correction(method), **options)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", correction(method), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    for trainer in (straight, resumed):
        assert trainer.state.global_step == 6
    for name, value in weights(straight.teacher_model).items():
        assert torch.equal(value, weights(resumed.teacher_model)[name]), name
    for name, value in weights(straight.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name
    assert train_logs(resumed)[3:] == train_logs(straight)[3:]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for name, corrects in (("plain", None), ("norm", correction("norm"))):
        make_trainer(tmp_path / name, corrects, **options).train()
    for name, error, message in (
        ("plain", FileNotFoundError, "without teacher_correction"),
        ("norm", ValueError, "other weights than teacher_correction=full trains"),
    ):
        with pytest.raises(error, match=message):
            make_trainer(tmp_path / "new", correction("full"), **options).train(
                resume_from_checkpoint=str(tmp_path / name / "checkpoint-2")
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_lora_r": 4}, "teacher_lora_r without teacher_correction"),
        ({"teacher_correction": "some"}, "teacher_correction='some' is unknown. Use one of full, lora, norm"),
        ({"teacher_correction": "norm", "teacher_lora_r": 4}, "only lora has adapters"),
        ({"teacher_correction": "full", "teacher_learning_rate": 3.0}, "teacher_learning_rate=3.0 is not between"),
        ({"teacher_correction": "full", "teacher_warmup_steps": -1}, "teacher_warmup_steps=-1 is negative"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelCorrection(**options)


def test_teachers_that_cannot_be_corrected_are_refused(tmp_path):
    teacher = tiny_llama(24, seed=2)
    form = CacheFormat("exact", dtype=torch.float32)
    cache = write_cache(teacher, uneven_rows(15), tmp_path / "cache", form, TeacherFacts({}))
    with pytest.raises(ValueError, match=r"a cache holds what it said before. Give the teacher itself"):
        make_trainer(tmp_path, correction(), cache)
    with pytest.raises(ValueError, match=r"A teacher in bfloat16 corrected by the method norm: .* Load it in float32"):
        make_trainer(tmp_path, correction("norm"), tiny_llama(24, seed=2).bfloat16())
    with pytest.raises(ValueError, match=r"'query' is the name of no linear layer. There are"):
        make_trainer(tmp_path, correction("lora", teacher_lora_target_modules=["query"]))
    spread = tiny_llama(24, seed=2)
    spread.hf_device_map = {"model": "cpu", "lm_head": 0}
    with pytest.raises(ValueError, match=r"spread over \['0', 'cpu'\]"):
        make_trainer(tmp_path, correction(), spread)
