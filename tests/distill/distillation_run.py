"""One distillation step of tiny models: `torchrun distillation_run.py OUTPUT ROWS ACCUMULATION`.

Tied, untied, and untied from a cached teacher.

Writes metrics, log and gradient as JSON to OUTPUT; ROWS are per process. Run by test_trainer_processes.py; the tests
in this folder also use its functions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
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
    """Keeps the gradient that the optimizer sees."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {name: parameter.grad.tolist() for name, parameter in model.named_parameters()}


def one_step(tied: bool, rows_per_device: int, accumulation: int, cache: Path | None = None) -> dict[str, Any]:
    """Evaluates 7 rows, trains one step on 8, and returns metrics, the step's log and its whole gradient.

    With ``cache`` the teacher is cached in that folder first, and the student learns from there.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=rows_per_device,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            logging_steps=1,
            ce_weight=0.25,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
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
        metrics = trainer.evaluate()
        trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "main": trainer.is_world_process_zero(),
        "log": next(entry for entry in trainer.state.log_history if "loss" in entry),
        "metrics": metrics,
        "gradient": gradient.values,
    }


def main(output: str, rows_per_device: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    results = {head: one_step(head == "tied", rows_per_device, accumulation) for head in ("tied", "untied")}
    results["cached"] = one_step(False, rows_per_device, accumulation, Path(output).with_name("cache"))
    if results["tied"]["main"]:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
