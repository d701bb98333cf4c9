"""`SupervisedTrainer`: which tokens are learned, and that batches, accumulation and packing do not change what."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_minitron.align.sft import SupervisedConfig, SupervisedTrainer
from hf_minitron.align.templates import add_chat_template, training_tokenizer

OPTIONS = {"per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "max_length": 128, "seed": 3}
OPTIONS |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
OPTIONS |= {"gradient_checkpointing": False, "max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant"}


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    add_chat_template(tokenizer, "plain")
    return training_tokenizer(tokenizer)


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {n: p.grad.clone() for n, p in model.named_parameters()}


def train(folder, model, rows, tokenizer, eval_rows=None, **options):
    gradients = Gradients()
    trainer = SupervisedTrainer(
        copy.deepcopy(model),
        SupervisedConfig(output_dir=str(folder), **(OPTIONS | options)),
        Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=copy.deepcopy(tokenizer),
        callbacks=[gradients],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, gradients.values, losses


def targets_by_hand(row, tokenizer):
    """Ids and, for each, whether the loss is on it."""
    if "messages" in row:
        found = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], found["assistant_masks"]
    start = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    return ids, [0] * len(start) + [1] * (len(ids) - len(start))


def loss_by_hand(model, rows, tokenizer):
    total = count = 0
    for row in rows:
        ids, mask = targets_by_hand(row, tokenizer)
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        kept = torch.tensor(mask[1:], dtype=torch.bool)
        total, count = total - logs[kept].sum().item(), count + int(kept.sum())
    return total / count, count


@pytest.mark.parametrize("kind", ["talks", "lessons"])
def test_the_loss_is_on_the_assistants_words_alone(tmp_path, model, tokenizer, kind, request):
    rows = request.getfixturevalue(kind)
    expected, _ = loss_by_hand(model, rows[:8], tokenizer)
    trainer, _, losses = train(tmp_path, model, rows[:8], tokenizer, rows[8:15], learning_rate=1e-9)
    assert losses == pytest.approx([expected], rel=1e-5)
    held_out, count = loss_by_hand(model, rows[8:15], tokenizer)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(held_out, rel=1e-5) and metrics["eval_num_targets"] == count


@pytest.mark.parametrize("kind", ["talks", "lessons"])
def test_accumulation_and_packing_change_no_gradient(tmp_path, model, tokenizer, kind, request):
    """Packed rows are isolated by their positions; with them one batch is one or two long rows."""
    rows = request.getfixturevalue(kind)[:8]
    _, one, losses = train(tmp_path, model, rows, tokenizer)
    _, four, again = train(
        tmp_path, model, rows, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert again == pytest.approx(losses, rel=1e-5)
    packed_trainer, packed, third = train(tmp_path, model, rows, tokenizer, packing=True)
    assert len(packed_trainer.train_dataset) < 8 and third == pytest.approx(losses, rel=1e-5)
    for name, value in one.items():
        for other in (four, packed):
            assert (other[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_does_not_depend_on_its_batches(tmp_path, model, tokenizer, talks, packing):
    found = []
    for size in (1, 3, 8):
        options = {"per_device_eval_batch_size": size, "packing": packing, "learning_rate": 1e-9}
        trainer, _, _ = train(tmp_path, model, talks[:8], tokenizer, talks[8:15], **options)
        found.append(trainer.evaluate()["eval_loss"])
    assert found == pytest.approx([loss_by_hand(model, talks[8:15], tokenizer)[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_what_does_not_fit_is_counted(tmp_path, model, tokenizer, lessons, caplog, packing):
    long_prompt = {"prompt": "fox " * 60, "completion": "dog"}
    long_answer = {"prompt": "fox ", "completion": "dog " * 60}
    with caplog.at_level(logging.WARNING, logger="hf_minitron"):
        train(tmp_path, model, [*lessons[:6], long_prompt, long_answer], tokenizer, packing=packing, max_length=48)
    assert "train: 1 of 8 prompts fill max_length=48 on their own and are left out" in caplog.text
    assert "train: 1 of 8 records reach max_length=48, where they are cut" in caplog.text
    with pytest.raises(ValueError, match="train: no prompt is shorter than max_length=4: raise it"):
        train(tmp_path, model, [long_prompt], tokenizer, packing=packing, max_length=4)


def test_settings_that_would_mislead_are_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_packing=True"):
        SupervisedConfig(output_dir=str(tmp_path), eval_packing=True)
    with pytest.raises(ValueError, match=r"chat_template_path would not fit the model .* Use --chat-template"):
        SupervisedConfig(output_dir=str(tmp_path), chat_template_path="chat.jinja")


def test_defaults_are_the_published_rates_and_fp32_on_cpus(tmp_path):
    config = SupervisedConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.learning_rate == 5e-6 and config.bf16 is False
    assert SupervisedConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16 is True
