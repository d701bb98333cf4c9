"""Live teachers: dtypes, bits, places, and what they give the loss."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minitron.checkpoint import Checkpoint
from hf_minitron.distill import teacher as teacher_module
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.teacher import LiveTeacher, check_quantization, load_model
from hf_minitron.distill.trainer import DistillationTrainer

ROWS = [{"input_ids": list(range(5, 25))}, {"input_ids": list(range(40, 52))}]


def targets(model, device="cpu"):
    batch = CausalLMCollator()(ROWS)
    del batch["labels"]
    return LiveTeacher(model, torch.device(device)).targets(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_and_a_device_map(tiny_checkpoint, dtype):
    source = Checkpoint.open(tiny_checkpoint)
    plain = targets(load_model(source, dtype))
    mapped = targets(load_model(source, dtype, device_map="auto"))
    assert plain.hidden.dtype == plain.weight.dtype == dtype and plain.hidden.shape == (40, 32)
    assert torch.equal(plain.hidden, mapped.hidden) and not plain.hidden.requires_grad
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    logits = reference(torch.tensor([ROWS[0]["input_ids"]])).logits[0]
    torch.testing.assert_close((plain.hidden[:20] @ plain.weight.t()).float(), logits, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("quantization", "layer", "error"), [("8bit", "Linear8bitLt", 0.03), ("4bit", "Linear4bit", 0.3)]
)
def test_quantized_teachers_are_close_and_train_a_student(tmp_path, tiny_checkpoint, quantization, layer, error):
    pytest.importorskip("bitsandbytes")
    source = Checkpoint.open(tiny_checkpoint)
    model = load_model(source, torch.float32, quantization=quantization, device_map={"": "cpu"})
    assert type(model.model.layers[0].mlp.down_proj).__name__ == layer
    assert model.lm_head.weight.dtype == torch.float32  # the loss reads it
    found, exact = targets(model), targets(load_model(source, torch.float32))
    difference = (found.hidden[:20] - exact.hidden[:20]).norm() / exact.hidden[:20].norm()
    assert 0 < difference < error
    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    student = load_model(source, torch.float32)
    trainer = DistillationTrainer(student, model, args, train_dataset=ROWS, eval_dataset=ROWS)
    assert 0 < trainer.evaluate()["eval_kl"] < 0.5
    trainer.train()
    assert all(not parameter.requires_grad for parameter in model.parameters())


def test_other_bits_and_a_missing_library_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"teacher_quantization='2bit'.*8bit and 4bit"):
        check_quantization("2bit", torch.float32)
    assert check_quantization(None, torch.float32) is None
    assert check_quantization("4bit", torch.bfloat16).bnb_4bit_compute_dtype == torch.bfloat16
    monkeypatch.setattr(teacher_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes.*pip install 'hf-minitron\[quantization\]'"):
        check_quantization("8bit", torch.float32)


def test_a_head_that_the_device_map_offloads_is_refused(tiny_checkpoint):
    model = load_model(Checkpoint.open(tiny_checkpoint), torch.float32)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="offloads the teacher's head"):
        LiveTeacher(model, torch.device("cpu"))
