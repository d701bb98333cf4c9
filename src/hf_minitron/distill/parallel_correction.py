"""Teacher correction in parallel: the teacher is trained on the text while the student learns from it (P2).

P2 (arXiv 2408.11796, "Teacher Correction") finds two ways on par: to correct first and then prune and distil, or to
prune the original at once and distil from a teacher that is corrected meanwhile. This is the latter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from hf_minitron.adapters import LoraArguments, merged_copy, plain_state
from hf_minitron.checkpoint import Checkpoint
from hf_minitron.distill.head_loss import head_cross_entropy
from hf_minitron.distill.sharding import shards_weights
from hf_minitron.distill.teacher import HeadTargets, LiveTeacher
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.trained_weights import DEFAULT_RANK, check_method, check_precision, choose_trained
from hf_minitron.hardware import parse_dtype
from hf_minitron.lineage import Stage, settings_dict
from hf_minitron.training import write_checkpoint

CORRECTION_FILE = "teacher_correction.safetensors"  # in a checkpoint of the training

CACHED = (
    "teacher_correction trains the teacher, and a cache holds what it said before. Give the teacher itself "
    "(--teacher-model), or correct it first (hf-minitron correct-teacher) and cache it then."
)


@dataclass
class ParallelCorrection:
    """Correct the teacher while it teaches; off unless `teacher_correction` is given.

    Both learn from the same batches: the student from the teacher as it is, then the teacher from the text, so that one
    forward pass of the teacher serves both. Its optimizer is AdamW with the student's betas, weight decay and clipping.
    """

    teacher_correction: str | None = field(
        default=None,
        metadata={
            "help": "Also train the teacher on the text: full, all its weights; lora, adapters; norm, only its norms' "
            "gains (default: it stays as it is)."
        },
    )
    teacher_learning_rate: float = field(
        default=6e-5,
        metadata={"help": "The teacher's peak learning rate (P2: a fifth of its original one; Llama 3.1 8B had 3e-4)."},
    )
    teacher_lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "The teacher's schedule after warm-up, over the steps of the run."}
    )
    teacher_warmup_steps: float = field(
        default=120, metadata={"help": "The teacher's steps of linear warm-up, or their share below 1 (P2: 120)."}
    )
    teacher_lora_r: int | None = field(
        default=None, metadata={"help": f"Rank of the teacher's adapters (default: {DEFAULT_RANK})."}
    )
    teacher_lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Ends of the names of the teacher's layers that get adapters (default: all but the head)."},
    )
    corrected_teacher_dir: str | None = field(
        default=None, metadata={"help": "Also write the teacher as it is at the end into this folder."}
    )

    def __post_init__(self) -> None:
        names = ("teacher_lora_r", "teacher_lora_target_modules", "corrected_teacher_dir")
        given = [name for name in names if getattr(self, name) is not None]
        if self.teacher_correction is None:
            if given:
                raise ValueError(f"{', '.join(given)} without teacher_correction: the teacher is not trained. Give it.")
            return
        check_method("teacher_correction", self.teacher_correction)
        if self.teacher_correction != "lora" and {*given} - {"corrected_teacher_dir"}:
            raise ValueError(
                f"{', '.join(given)} with teacher_correction={self.teacher_correction}: only lora has adapters. Leave "
                "them out, or use lora."
            )
        if not 0 <= self.teacher_learning_rate < 1:
            raise ValueError(
                f"teacher_learning_rate={self.teacher_learning_rate} is not between 0 and 1. P2 uses a fifth of the "
                "teacher's original peak, such as 6e-5."
            )
        if self.teacher_warmup_steps < 0:
            raise ValueError(f"teacher_warmup_steps={self.teacher_warmup_steps} is negative: use 0 for none.")

    def settings(self) -> dict[str, Any]:
        """What the lineage says of it; nothing where the teacher is not corrected."""
        told = {} if self.teacher_correction is None else settings_dict(self)
        return {name: value for name, value in told.items() if name != "corrected_teacher_dir"}

    @property
    def lora(self) -> LoraArguments:
        """The adapters' settings, for the method that has some."""
        rank = self.teacher_lora_r or DEFAULT_RANK
        return LoraArguments(lora_r=rank, lora_target_modules=self.teacher_lora_target_modules)


def save_teacher(trainer: Trainer, source: Checkpoint, output_dir: Path, stage: Stage) -> None:
    """Writes a teacher that was corrected while it taught, and is whole in every process; its adapters are merged."""
    if trainer.is_world_process_zero():
        gathered = output_dir / ".gathered.tmp"
        teacher = trainer.teacher_model
        if isinstance(teacher, PeftModel):
            teacher = merged_copy(teacher, plain_state(teacher))
        teacher.save_pretrained(gathered)
        write_checkpoint(gathered, source, output_dir, stage)
    trainer.accelerator.wait_for_everyone()


def check_correction(arguments: Any, correction: ParallelCorrection) -> Any:
    """The options of ``distill``, its teacher in a format that can be trained; refused, before any work, if it cannot.

    ``arguments`` are a `DistillArguments`.
    """
    if arguments.teacher_cache is not None:
        raise ValueError(CACHED)
    if arguments.teacher_dtype == "auto" and correction.teacher_correction != "lora":
        arguments = dataclasses.replace(arguments, teacher_dtype="float32")
    quantized = arguments.teacher_quantization is not None
    check_precision(correction.teacher_correction, quantized, parse_dtype(arguments.teacher_dtype) or torch.float32)
    return arguments


def prepare_correction(
    teacher: PreTrainedModel | CachedTeacher, args: TrainingArguments, correction: ParallelCorrection
) -> PreTrainedModel:
    """The teacher with gradients for what is to be trained of it. Raises ValueError where it cannot be corrected."""
    if isinstance(teacher, CachedTeacher):
        raise ValueError(CACHED)
    places = set((getattr(teacher, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise ValueError(
            f"teacher_correction with a teacher that is spread over {sorted(map(str, places))}: so would its gradients "
            "be. Leave teacher_device_map out, or correct it first (hf-minitron correct-teacher)."
        )
    if args.fp16:
        raise ValueError(
            "teacher_correction under fp16: only the student's gradients are scaled into its range. Use bf16."
        )
    return choose_trained(teacher, correction.teacher_correction, correction.lora, args.seed)


class CorrectedTeacher(LiveTeacher, TrainerCallback):
    """A live teacher with an optimizer and a schedule of its own, which steps whenever the student has.

    Every process holds the whole teacher, also under ZeRO-1 and 2, and gradients are averaged over them before a step:
    two processes do what one does. Under ZeRO-3 and FSDP its weights would be in parts: ValueError.
    """

    def __init__(self, trainer: Trainer, model: PreTrainedModel, correction: ParallelCorrection) -> None:
        if shards_weights(trainer.accelerator):
            raise ValueError(
                "teacher_correction under ZeRO-3 or FSDP: the teacher's own steps need its whole weights in every "
                "process. Use DDP, ZeRO-1 or ZeRO-2, or correct the teacher first (hf-minitron correct-teacher runs "
                "under all of them)."
            )
        super().__init__(model, trainer.args.device, trainer.accelerator, frozen=False)
        self._trainer, self._args, self._settings = trainer, trainer.args, correction
        self._optimizer: torch.optim.Optimizer | None = None
        self._resume_from: Path | None = None

    def learn(self, inputs: Mapping[str, Tensor], following: Tensor, factor: Tensor | float) -> HeadTargets:
        """The student's targets, after adding the gradient of the batch's summed language-model loss times `factor`.

        `following` [tokens] are the next tokens, -100 for none.
        """
        with torch.enable_grad():
            hidden = self.hidden(inputs)
            loss = head_cross_entropy(hidden, self.model, following, self._args.kd_chunk_size).loss * factor
        loss.backward()
        return self.as_targets(hidden.detach())

    def logs(self) -> dict[str, float]:
        """The learning rate of the teacher's next step."""
        return {"teacher_learning_rate": self._scheduler.get_last_lr()[0]} if self._optimizer is not None else {}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the optimizer, or takes it from the checkpoint that the run goes on from."""
        self._make_optimizer(state.max_steps)
        if self._resume_from is not None:
            self._restore(self._resume_from)
            self._resume_from = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The teacher's own step, on the batch of the student's."""
        trained = [parameter for parameter in self._trained().values() if parameter.grad is not None]
        if self._trainer.accelerator.num_processes > 1:
            for parameter in trained:
                parameter.grad = self._trainer.accelerator.reduce(parameter.grad, "mean")
        if self._args.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, self._args.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()

    def save(self, folder: str) -> None:
        """The trained weights, their optimizer's state and the schedule's, beside the student's in a checkpoint."""
        tensors = {}
        for name, parameter in self._trained().items():
            state = self._optimizer.state.get(parameter, {})
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{key}.{name}": value for key, value in state.items()}
        tensors = {name: value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        metadata = {"scheduler": json.dumps(self._scheduler.state_dict())}
        save_file(tensors, Path(folder) / CORRECTION_FILE, metadata=metadata)

    def load(self, folder: str) -> None:
        """What `save` wrote; its optimizer's state when there is an optimizer."""
        if not (Path(folder) / CORRECTION_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} has no {CORRECTION_FILE}: it was written by a run without teacher_correction. Go on with "
                "that run's settings, or start again."
            )
        self._resume_from = Path(folder)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _make_optimizer(self, num_training_steps: int) -> None:
        args, settings, trained = self._args, self._settings, self._trained()
        decayed = set(self._trainer.get_decay_parameter_names(self.model))
        groups = [
            {"params": [value for name, value in trained.items() if (name in decayed) == decays], "weight_decay": decay}
            for decays, decay in ((True, args.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.teacher_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        warmup = settings.teacher_warmup_steps
        self._scheduler = get_scheduler(
            settings.teacher_lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=int(warmup) if warmup >= 1 else round(warmup * num_training_steps),
            num_training_steps=num_training_steps,
        )

    def _restore(self, folder: Path) -> None:
        trained = self._trained()
        with safe_open(folder / CORRECTION_FILE, framework="pt") as stored, torch.no_grad():
            names = set(stored.keys())
            if {name.removeprefix("weight.") for name in names if name.startswith("weight.")} != trained.keys():
                raise ValueError(
                    f"{folder / CORRECTION_FILE} holds other weights than teacher_correction="
                    f"{self._settings.teacher_correction} trains. Go on with that run's settings, or start again."
                )
            for name, parameter in trained.items():
                parameter.copy_(stored.get_tensor(f"weight.{name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in names:
                        value = stored.get_tensor(f"{key}.{name}")
                        place = "cpu" if key == "step" else parameter.device
                        self._optimizer.state[parameter][key] = value.to(place)
            self._scheduler.load_state_dict(json.loads(stored.metadata()["scheduler"]))
        for group, rate in zip(self._optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
