"""Tiny models and rows, and one distillation step of them under any engine, for the tests in this folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, write_cache
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.trainer import DistillationTrainer


def tiny_llama(hidden_size: int, seed: int, tied: bool = False, vocab_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # wide enough for teacher and student to disagree
    )
    return LlamaForCausalLM(config)


def uneven_rows(count: int, seed: int = 0, vocab_size: int = 64) -> list[dict[str, list[int]]]:
    """Rows of 3 to 20 tokens: every batch is padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, vocab_size, (n,), generator=generator).tolist()} for n in lengths]


class GradientCapture(TrainerCallback):
    """Keeps the gradient that the optimizer sees, gathered from wherever its parts are."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.deepspeed_engine = getattr(getattr(self, "trainer", None), "deepspeed", None)
        if self.deepspeed_engine is not None:  # its optimizer steps inside accelerate's backward
            from deepspeed.utils import safe_get_full_grad

            step = self.deepspeed_engine.step

            def captured_step(*args: Any, **kwargs: Any) -> Any:
                self.keep({name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()})
                return step(*args, **kwargs)

            self.deepspeed_engine.step = captured_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.deepspeed_engine is None:
            self.keep({name: parameter.grad for name, parameter in model.named_parameters()})

    def keep(self, gradients: dict[str, Tensor]) -> None:
        whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
        self.values = {name: gradient.tolist() for name, gradient in whole.items()}


# Two steps, as the weight of the second is a ratio of the first; the students here are narrower than their teachers.
WITH_STATES = {"intermediate_losses": ["emb", "att", "i", "o"], "max_steps": 2}


def engine_options(engine: str) -> dict[str, Any]:
    """What TrainingArguments need for "ddp" (or one process), "zero1" to "zero3" and "fsdp2"."""
    if engine.startswith("zero"):
        automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config: dict[str, Any] = dict.fromkeys((*automatic, "gradient_clipping"), "auto")
        config |= {"zero_optimization": {"stage": int(engine[-1])}, "zero_allow_untested_optimizer": True}
        return {"deepspeed": config}
    return {"fsdp": True, "fsdp_config": {"version": 2}} if engine == "fsdp2" else {}


def sharding(model: nn.Module) -> str:
    """Whether a model's parameters are "whole", or in parts, by DeepSpeed ("ds_id") or FSDP2 ("DTensor")."""
    kinds = {"ds_id" if hasattr(p, "ds_id") else type(p).__name__ for p in model.parameters()}
    return {"Parameter": "whole"}.get(kind := kinds.pop(), kind) if len(kinds) == 1 else str(kinds)


def one_step(
    tied: bool, rows_per_device: int, accumulation: int, engine: str = "ddp", cache: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluates 7 rows, trains one step on 8, and returns metrics, the step's log and its whole gradient.

    With ``cache`` the teacher is cached in that folder first, and the student learns from there. With ``max_steps``
    among the ``options`` of the config, log and gradient are those of the last step.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 1} | engine_options(engine) | options
        args = DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=rows_per_device,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            logging_steps=1,
            ce_weight=0.25,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        student, teacher = tiny_llama(16, seed=1, tied=tied), tiny_llama(24, seed=2)
        if cache is not None:
            form = CacheFormat("exact", dtype=torch.float32, max_shard_bytes=4000)
            teacher = write_cache(teacher, uneven_rows(8) + uneven_rows(7, seed=1), cache, form, TeacherFacts({}))
        gradient = GradientCapture()
        trainer = DistillationTrainer(
            student,
            teacher,
            args,
            train_dataset=uneven_rows(8),
            eval_dataset=uneven_rows(7, seed=1),
            callbacks=[gradient],
        )
        gradient.trainer = trainer
        metrics = trainer.evaluate()
        trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
        "sharding": {"student": sharding(student), "teacher": "cached" if cache else sharding(teacher)},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry][-1],
        "metrics": metrics,
        "gradient": gradient.values,
    }
