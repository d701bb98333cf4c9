"""One method of distillation_step.py in a process of its own: trains some steps, prints times, memory and losses.

It runs under the Python that has the method's library, which need not have this project. Every method is a
transformers.Trainer with the same arguments, the same rows in the same order, and models with the same weights, and
minimises the mean over the targets of the forward KL at temperature 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INITIAL_STD = 0.02
LOGIT_SPREAD = 2.0  # standard deviation of a token's logits
RATE = 1e-5


def main() -> None:
    """Runs the method that the settings name; what is not installed is the answer `missing`."""
    settings = json.loads(sys.argv[1])
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = run(settings, folder)
    except ImportError as error:
        found = {"missing": str(error)}
    print(json.dumps(found))


def run(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of every step but the first by clock, bytes at the start and at the peak, losses and gradient norms."""
    make_trainer = METHODS[settings["method"]](settings)  # imports its library first: it may patch transformers
    student, teacher = (build(settings, role) for role in ("student", "teacher"))
    if settings["method"] == "sft":
        teacher = None
    clock = step_clock(settings["device"])
    trainer = make_trainer(student, teacher, arguments(settings, folder), rows_of(settings))
    trainer.add_callback(clock)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return {
        "seconds": clock.seconds(),
        "start_bytes": clock.start_bytes,
        "peak_bytes": memory(settings["device"], peak=True),
        "losses": [log["loss"] for log in logs],
        "grad_norms": [float(log["grad_norm"]) for log in logs],
    }


def load_ours(settings: dict[str, Any]) -> Callable[..., Any]:
    """This project's."""
    from hf_minitron import DistillationConfig, DistillationTrainer

    in_order = _in_order(DistillationTrainer)
    return lambda student, teacher, args, rows: in_order(student, teacher, DistillationConfig(**args), rows)


def load_trl(settings: dict[str, Any]) -> Callable[..., Any]:
    """TRL's DistillationTrainer on given rows: their first token is the prompt, the others are the completion."""
    from trl import DistillationConfig, DistillationTrainer

    class OffPolicy(_in_order(DistillationTrainer)):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            ids = torch.tensor([row["input_ids"] for row in inputs], device=self.accelerator.device)
            found = {}
            for name, part in (("prompt", ids[:, :1]), ("completion", ids[:, 1:])):
                found |= {f"{name}_ids": part, f"{name}_mask": torch.ones_like(part)}
            return found | {"num_items_in_batch": found["completion_mask"].sum()}

    def make(student: Any, teacher: Any, args: dict[str, Any], rows: Any) -> Any:
        config = DistillationConfig(beta=0.0, temperature=1.0, **args)
        return OffPolicy(student, teacher, config, train_dataset=rows, processing_class=tokenizer())

    return make


def load_gkd(settings: dict[str, Any]) -> Callable[..., Any]:
    """TRL's GKDTrainer, off-policy."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    in_order = _in_order(GKDTrainer)

    def make(student: Any, teacher: Any, args: dict[str, Any], rows: Any) -> Any:
        config = GKDConfig(beta=0.0, lmbda=0.0, temperature=1.0, max_length=None, **args)
        tools = {"data_collator": collate, "processing_class": tokenizer()}
        return in_order(student, teacher, config, train_dataset=rows, **tools)

    return make


def load_modelopt(settings: dict[str, Any]) -> Callable[..., Any]:
    """NVIDIA ModelOpt's KDTrainer."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    in_order = _in_order(KDTrainer)

    def make(student: Any, teacher: Any, args: dict[str, Any], rows: Any) -> Any:
        device = torch.device(settings["device"])
        return in_order(
            model=student,
            args=TrainingArguments(**args),
            train_dataset=rows,
            data_collator=collate,
            distill_args={"teacher_model": teacher.to(device), "temperature": 1.0},
        )

    return make


def load_sft(settings: dict[str, Any]) -> Callable[..., Any]:
    """TRL's SFTTrainer: cross-entropy without a teacher, a bound on what a step with one may take."""
    from trl import SFTConfig, SFTTrainer

    in_order = _in_order(SFTTrainer)

    def make(student: Any, teacher: None, args: dict[str, Any], rows: Any) -> Any:
        config = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **args)
        tools = {"data_collator": collate, "processing_class": tokenizer()}
        return in_order(student, config, train_dataset=rows, **tools)

    return make


METHODS = {
    "hf-minitron": load_ours,
    "trl": load_trl,
    "trl-gkd": load_gkd,
    "modelopt": load_modelopt,
    "sft": load_sft,
}


def _in_order(trainer: type) -> type:
    """The trainer, reading its rows as they come."""

    class InOrder(trainer):
        def _get_train_sampler(self, *unused: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def build(settings: dict[str, Any], role: str) -> Any:
    """A Llama whose weights follow from their names alone, in every version of transformers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**settings[role], use_cache=False)
    with torch.device(settings["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings["dtype"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator(settings["device"]).manual_seed(zlib.crc32(f"{role} {name}".encode()))
            if parameter.dim() > 1:
                std = LOGIT_SPREAD / config.hidden_size**0.5 if "lm_head" in name else INITIAL_STD
                parameter.normal_(std=std, generator=generator)
    return model


def arguments(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """What every Trainer is given."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": settings["rows"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": settings["steps"] + 1,  # the first is not timed
        "optim": "adamw_torch",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "bf16": False,  # the weights have the dtype; no autocast
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": settings["device"] == "cpu",
    }


def rows_of(settings: dict[str, Any]) -> Any:
    """As many random rows as the steps take."""
    from datasets import Dataset

    shape = (settings["rows"] * (settings["steps"] + 1), settings["row_length"])
    ids = torch.randint(0, settings["student"]["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length; every token but the first is a target."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def tokenizer() -> Any:
    """TRL's trainers ask for one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def step_clock(device: str) -> Any:
    """A callback that notes when steps end, from the first on, and the memory in use when training begins."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start_bytes = 0

        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        def on_train_begin(self, *unused: Any, **more: Any) -> None:
            self.start_bytes = memory(device)

        def on_step_end(self, *unused: Any, **more: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.ends.append((time.perf_counter(), time.process_time()))

        def seconds(self) -> list[dict[str, float]]:
            pairs = zip(self.ends[1:], self.ends[:-1], strict=True)
            return [{"wall": end[0] - start[0], "cpu": end[1] - start[1]} for end, start in pairs]

    return Clock()


def memory(device: str, peak: bool = False) -> int:
    """Bytes, now or at their peak: on CUDA those allocated, else the process's resident ones (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    main()
