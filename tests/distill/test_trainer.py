"""DistillationTrainer: one gradient for every batch split, exact evaluation, resuming, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, TrainerCallback, TrainingArguments

from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.trainer import DistillationTrainer

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama, uneven_rows, one_step = helpers["tiny_llama"], helpers["uneven_rows"], helpers["one_step"]


def make_config(folder: Path, **options) -> DistillationConfig:
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DistillationConfig(output_dir=str(folder), **{**defaults, **options})


def make_trainer(folder: Path, student=None, teacher=None, rows=None, eval_rows=None, **options) -> DistillationTrainer:
    return DistillationTrainer(
        student or tiny_llama(16, seed=1),
        teacher or tiny_llama(24, seed=2),
        make_config(folder, **options),
        train_dataset=rows or uneven_rows(8),
        eval_dataset=eval_rows or uneven_rows(7, seed=1),
    )


def train_logs(trainer: DistillationTrainer) -> list[dict[str, float]]:
    """What was logged, but for the clock's share."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in logs]


@torch.no_grad()
def reference_metrics(student, teacher, rows, temperature=1.0, vocab_limit=None) -> dict[str, float]:
    """Means over all targets from full logits in fp64, row by row: no padding, no batches."""
    names = ("kl", "lm_loss", "teacher_lm_loss", "top1_agreement")
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        student_logits, teacher_logits = (
            model.eval()(ids).logits[0, :-1, :vocab_limit].double() for model in (student, teacher)
        )
        labels = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        used = labels != -100
        log_student = (student_logits / temperature).log_softmax(-1)
        log_teacher = (teacher_logits / temperature).log_softmax(-1)
        kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        ce, teacher_ce = (
            nn.functional.cross_entropy(logits, labels, reduction="none") for logits in (student_logits, teacher_logits)
        )
        agreement = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double()
        sums += torch.stack([value[used].sum() for value in (kl, ce, teacher_ce, agreement)])
        count += int(used.sum())
    return {**dict(zip(names, (sums / count).tolist(), strict=True)), "num_tokens": count}


# --- one gradient, however the batch is split


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_does_not_depend_on_accumulation(tied):
    reference = one_step(tied, rows_per_device=8, accumulation=1)
    for accumulation in (2, 4, 8):
        step = one_step(tied, rows_per_device=8 // accumulation, accumulation=accumulation)
        for name, values in reference["gradient"].items():
            expected = torch.tensor(values)
            difference = (torch.tensor(step["gradient"][name]) - expected).norm()
            assert difference < 1e-6 * expected.norm(), (name, accumulation)
        for name in ("loss", "kl", "lm_loss", "num_tokens_seen"):
            assert step["log"][name] == pytest.approx(reference["log"][name], rel=1e-6)


def test_direct_call_is_the_mean_over_the_batch(tmp_path):
    student, teacher = tiny_llama(16, seed=1), tiny_llama(24, seed=2)
    trainer = make_trainer(tmp_path, student, teacher)
    rows = uneven_rows(3)
    batch = CausalLMCollator()(rows)
    expected = reference_metrics(student, teacher, rows)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected["kl"], rel=1e-5)
    assert all(value.shape == batch["input_ids"].shape for value in outputs.values())
    counted = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
    assert counted.item() == pytest.approx(expected["kl"] * expected["num_tokens"] / 5, rel=1e-5)


def test_masked_labels_are_no_targets(tmp_path):
    rows = [{**row, "labels": [-100] * 2 + row["input_ids"][2:]} for row in uneven_rows(6)]
    student, teacher = tiny_llama(16, seed=1), tiny_llama(24, seed=2)
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, eval_rows=rows, ce_weight=0.5)
    expected = reference_metrics(student, teacher, rows)
    metrics = trainer.evaluate()
    assert metrics["eval_num_tokens"] == expected["num_tokens"]
    assert metrics["eval_loss"] == pytest.approx(expected["kl"] + 0.5 * expected["lm_loss"], rel=1e-5)


# --- evaluation and logs


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_evaluation_equals_full_logits(tmp_path, temperature):
    student, teacher, rows = tiny_llama(16, seed=1), tiny_llama(24, seed=2), uneven_rows(7, seed=1)
    metrics = make_trainer(tmp_path, student, teacher, eval_rows=rows, temperature=temperature).evaluate()
    expected = reference_metrics(student, teacher, rows, temperature)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert metrics["eval_loss"] == pytest.approx(temperature**2 * expected["kl"], rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected["lm_loss"]), rel=1e-5)
    assert metrics["eval_teacher_perplexity"] == pytest.approx(math.exp(expected["teacher_lm_loss"]), rel=1e-5)


def test_evaluation_of_several_sets_and_other_prefixes(tmp_path):
    sets = {"a": uneven_rows(4, seed=3), "b": uneven_rows(5, seed=4)}
    trainer = make_trainer(tmp_path, eval_rows=sets)
    metrics = trainer.evaluate()
    alone = {name: trainer.evaluate(rows, metric_key_prefix=f"test_{name}") for name, rows in sets.items()}
    for name in sets:
        assert metrics[f"eval_{name}_kl"] == alone[name][f"test_{name}_kl"]
        assert f"eval_{name}_loss" in metrics
    assert metrics["eval_a_kl"] != metrics["eval_b_kl"]


def test_first_train_log_equals_full_logits(tmp_path):
    rows = uneven_rows(8)
    student, teacher = tiny_llama(16, seed=1), tiny_llama(24, seed=2)
    expected = reference_metrics(copy.deepcopy(student), teacher, rows)
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, gradient_accumulation_steps=4, max_steps=3)
    trainer.train()
    logs = train_logs(trainer)
    assert logs[0]["loss"] == pytest.approx(expected["kl"], rel=1e-5)
    for name in ("kl", "lm_loss", "teacher_lm_loss", "top1_agreement"):
        assert logs[0][name] == pytest.approx(expected[name], rel=1e-5), name
    assert [log["num_tokens_seen"] for log in logs] == [expected["num_tokens"] * step for step in (1, 2, 3)]
    assert trainer.num_tokens_seen == logs[2]["num_tokens_seen"]
    assert logs[2]["teacher_lm_loss"] == pytest.approx(expected["teacher_lm_loss"], rel=1e-5)
    assert logs[2]["lm_loss"] != logs[0]["lm_loss"]


# --- learning


def test_identical_teacher_and_student_have_loss_zero(tmp_path):
    student = tiny_llama(16, seed=1)
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(tmp_path, student, copy.deepcopy(student), weight_decay=0.0)
    trainer.train()
    assert [log["loss"] for log in train_logs(trainer)] == [0.0, 0.0]
    assert all(log["top1_agreement"] == 1.0 and log["grad_norm"] == 0.0 for log in train_logs(trainer))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_distilling_a_perturbed_copy_reduces_the_divergence(tmp_path):
    teacher = tiny_llama(16, seed=2)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    rows = uneven_rows(8)
    trainer = make_trainer(tmp_path, student, teacher, rows, rows, max_steps=30, learning_rate=1e-2)
    teacher_before = copy.deepcopy(teacher.state_dict())
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert after["eval_kl"] < 0.2 * before["eval_kl"]
    assert all(torch.equal(value, teacher_before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and student.training is False
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_the_forward_is_given_back(tmp_path):
    student = tiny_llama(16, seed=1)
    trainer = make_trainer(tmp_path, student)
    trainer.train()
    assert "forward" not in student.__dict__
    assert student(torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)


def test_mixed_precision_leaves_the_loss_precise(tmp_path):
    """Backbones run in bf16 under autocast; accelerate's own forward comes back after each redirection."""
    logs = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16, max_steps=1)
        trainer.train()
        logs[bf16] = train_logs(trainer)[0]
    assert logs[True]["loss"] != logs[False]["loss"]
    assert logs[True]["loss"] == pytest.approx(logs[False]["loss"], rel=0.05)
    assert trainer.model(torch.tensor([[1, 2]])).logits.dtype == torch.float32  # accelerate's forward makes them so


def test_activation_checkpointing_gives_the_same_gradient(tmp_path):
    norms = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, activation_checkpointing=checkpointing, max_steps=1)
        trainer.train()
        norms.append(train_logs(trainer)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_padding_to_different_vocabularies(tmp_path):
    student, teacher = tiny_llama(16, seed=1, vocab_size=72), tiny_llama(24, seed=2, vocab_size=80)
    rows = uneven_rows(7)
    metrics = make_trainer(tmp_path, student, teacher, rows, rows, vocab_limit=64).evaluate()
    expected = reference_metrics(student, teacher, rows, vocab_limit=64)
    assert metrics["eval_kl"] == pytest.approx(expected["kl"], rel=1e-5)
    with pytest.raises(ValueError, match=r"student has 72 vocabulary entries and the teacher 80.*at most 72"):
        make_trainer(tmp_path, student, teacher)
    with pytest.raises(ValueError, match="vocab_limit=73 is more than the 72"):
        make_trainer(tmp_path, student, teacher, vocab_limit=73)


# --- checkpoints


def test_resuming_continues_bit_for_bit(tmp_path):
    """A save between two logs also keeps the count of tokens."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "warmup_steps": 2}

    def fresh(name: str) -> DistillationTrainer:
        return make_trainer(tmp_path / name, rows=uneven_rows(7), **options)

    straight = fresh("straight")
    straight.train()
    resumed = fresh("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, one), (_, other) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    # The log of step 4 averages since the save; from then on all is the same.
    one, other = ({log["step"]: log for log in train_logs(trainer)} for trainer in (straight, resumed))
    assert one.keys() == other.keys() == {2, 4, 6}
    assert one[6] == other[6] and one[2] == other[2]
    assert resumed.num_tokens_seen == straight.num_tokens_seen > 0
    assert one[4]["num_tokens_seen"] == other[4]["num_tokens_seen"]


def test_a_checkpoint_holds_the_student_alone(tmp_path):
    student = tiny_llama(16, seed=1)
    names = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    make_trainer(tmp_path, student, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()} == names  # noqa: SIM118
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    assert sum(moment["exp_avg"].numel() for moment in moments) == sum(p.numel() for p in student.parameters())
    assert (folder / "training_args.bin").stat().st_size < 50_000
    assert "num_tokens_seen" in json.loads((folder / "trainer_state.json").read_text())["log_history"][-1]


# --- what is refused


class PoisonStudent(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight[3, 0] = torch.nan


@pytest.mark.parametrize("filtered", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, filtered):
    trainer = make_trainer(
        tmp_path, max_steps=6, logging_nan_inf_filter=filtered, save_strategy="steps", save_steps=3, logging_steps=2
    )
    trainer.add_callback(PoisonStudent())
    with pytest.raises(FloatingPointError, match="between steps 2 and 3"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is not a finite number above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"ce_weight": -0.1}, "ce_weight=-0.1 is not a finite weight"),
        ({"divergence": "kl"}, "divergence='kl' is unknown"),
        ({"divergence": "js", "js_beta": 0.0}, "js_beta=0.0 is not between 0 and 1"),
        ({"divergence": "cosine", "temperature": 2.0}, "temperature=2.0 has no effect on divergence='cosine'"),
        ({"vocab_limit": 0}, "vocab_limit=0"),
        ({"kd_chunk_size": -1}, "kd_chunk_size=-1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_models_that_cannot_be_compared_are_refused(tmp_path):
    student = tiny_llama(16, seed=1)
    with pytest.raises(ValueError, match="share modules or parameters"):
        make_trainer(tmp_path, student, student)
    nested = tiny_llama(16, seed=1)
    nested.add_module("teacher", tiny_llama(24, seed=2))
    with pytest.raises(ValueError, match="share modules or parameters"):
        make_trainer(tmp_path, nested, nested.teacher)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"logit_scale=0.0625 of model_type='cohere'"):
        make_trainer(tmp_path, student, CohereForCausalLM(CohereConfig(vocab_size=64, **sizes)))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = make_config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs are visible.*accelerate launch"):
        DistillationTrainer(tiny_llama(16, seed=1), tiny_llama(24, seed=2), args, train_dataset=uneven_rows(2))
    with pytest.raises(TypeError, match="use DistillationConfig"):
        DistillationTrainer(tiny_llama(16, seed=1), tiny_llama(24, seed=2), TrainingArguments(str(tmp_path)))


def test_end_tokens_in_the_text_count_although_they_are_the_pad_token(tmp_path):
    end = 7
    rows = [{"input_ids": [1, end, 2, 3, end]}, {"input_ids": [4, end]}, {"input_ids": [end, end, 5, end]}]
    student, teacher = tiny_llama(16, seed=1), tiny_llama(24, seed=2)
    student.config.pad_token_id = end
    trainer = make_trainer(tmp_path, student, teacher, rows, rows)
    assert trainer.data_collator.pad_token_id == end
    metrics = trainer.evaluate()
    assert metrics["eval_num_tokens"] == 4 + 1 + 3
    assert metrics["eval_kl"] == pytest.approx(reference_metrics(student, teacher, rows)["kl"], rel=1e-5)
