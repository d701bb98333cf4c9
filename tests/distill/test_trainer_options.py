"""What the Trainer offers besides, under the redirected forward: checkpointing, compilation, 8-bit optimizers, LoRA."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.whole_weights import save_whole

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama, uneven_rows = helpers["tiny_llama"], helpers["uneven_rows"]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(folder, student=None, rows=None, **options):
    """Trains and returns the trainer, its last gradient and its losses."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    gradients = Gradients()
    trainer = DistillationTrainer(
        student or tiny_llama(16, seed=1),
        tiny_llama(24, seed=2),
        DistillationConfig(output_dir=str(folder), **(settings | options)),
        train_dataset=rows or uneven_rows(8),
        eval_dataset=uneven_rows(6, seed=1),
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.values, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("option", ["gradient_checkpointing", "activation_checkpointing"])
def test_activation_checkpointing_gives_the_same_gradient(tmp_path, monkeypatch, option, reentrant):
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(x.shape) or forward(self, x))
    _, plain, loss = train(tmp_path)
    num_plain = len(calls)
    options = {option: True, f"{option}_kwargs": {"use_reentrant": reentrant}}
    _, checkpointed, same_loss = train(tmp_path, **options)
    assert len(calls) - num_plain == num_plain + 2  # the student's two layers once more; the teacher's are not
    assert same_loss == loss and plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], rtol=1e-6, atol=0), name


def test_compiled_backbones_give_the_same_losses(tmp_path):
    """The backend "eager" traces without generating code; rows of one length are traced once.

    The hooks that record intermediate states are traced too, and do not break the graph.
    """
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(0, 64, (12,), generator=generator).tolist()} for _ in range(12)]
    states = {"intermediate_losses": ["emb", "att", "i", "o"]}
    plain, _, expected = train(tmp_path, rows=rows, max_steps=3, **states)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer, _, losses = train(tmp_path, rows=rows, max_steps=3, **compiled, **states)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # student and teacher, each whole
    assert trainer.evaluate()["eval_intermediate_o"] == pytest.approx(plain.evaluate()["eval_intermediate_o"], rel=1e-5)
    assert all("_orig_mod" not in name for name in trainer.model.state_dict())


def test_an_8_bit_optimizer_makes_nearly_the_same_step(tmp_path):
    pytest.importorskip("bitsandbytes")
    student = tiny_llama(128, seed=1)  # bitsandbytes keeps states of fewer than 4096 elements in 32 bits
    before = copy.deepcopy(student.state_dict())
    exact, _, _ = train(tmp_path, copy.deepcopy(student), optim="adamw_torch")
    eight, _, _ = train(tmp_path, student, optim="adamw_bnb_8bit")
    dtypes = {value.dtype for state in eight.optimizer.optimizer.state.values() for value in state.values()
              if torch.is_tensor(value)}  # fmt: skip
    assert torch.uint8 in dtypes
    for (name, one), two in zip(exact.model.named_parameters(), eight.model.parameters(), strict=True):
        assert (one - two).norm() < 0.1 * (one - before[name]).norm(), name


# --- LoRA


def lora_student(**options):
    base = tiny_llama(16, seed=1)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options))


def test_a_lora_student_trains_its_adapters_alone(tmp_path):
    _, _, plain = train(tmp_path)
    student = lora_student()
    before = copy.deepcopy(student.state_dict())
    trainer, gradient, losses = train(tmp_path, student, max_steps=3)
    assert losses[0] == pytest.approx(plain[0], rel=1e-6)  # adapters start as nothing
    assert gradient and all("lora_" in name for name in gradient)
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_a_lora_student_is_saved_merged(tmp_path):
    trainer, _, _ = train(tmp_path, lora_student(), max_steps=3)
    before = copy.deepcopy(trainer.model.state_dict())
    save_whole(trainer, str(tmp_path / "merged"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(plain(ids).logits, expected, atol=1e-5)
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_adapters_on_the_head_are_refused(tmp_path, where):
    options = {"target_modules": ["q_proj"]} | {where: ["lm_head"]}
    student = get_peft_model(tiny_llama(16, seed=1), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=r"head is a .* of peft"):
        train(tmp_path, student)
