"""`DistillationTrainer`: a transformers.Trainer whose loss is the fused divergence from a teacher.

By default the papers' method: forward KL on logits only, temperature 1, no cross-entropy (P2, arXiv 2408.11796,
"Retraining"; P1, arXiv 2407.14679, section 3). Off-policy: the teacher reads the same rows as the student, first, and
leaves only its last hidden state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_minitron.architectures import get_logit_transform
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.compatibility import backbone, check_models
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.failures import BatchWatch, advised_on_memory
from hf_minitron.distill.kd_head import KDOutput, fused_linear_kd
from hf_minitron.distill.kd_inputs import IGNORE_INDEX
from hf_minitron.distill.pushing import PushingTrainer
from hf_minitron.distill.sharding import prepared_evaluation, redirected_forward, whole
from hf_minitron.distill.teacher import HeadTargets, LiveTeacher, Teacher, TopKTargets, last_hidden
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.throughput import Throughput
from hf_minitron.distill.top_k_head import fused_linear_topk_kd

# Sums over tokens that training and evaluation report, in this order.
SUM_NAMES = ("loss", "kl", "lm_loss", "teacher_lm_loss", "top1_agreement", "num_tokens")


class DistillationTrainer(PushingTrainer):
    """Trains `model`, the student, to give the distribution over the next token that `teacher_model` gives.

    Rows are dicts with `input_ids` and optionally `labels`, where -100 marks positions that are no targets. Loss and
    metrics are means over the targets of the whole global batch, whatever the gradient accumulation, the padding and
    the number of processes. `teacher_model` is frozen, put in eval mode and moved to the device; it is never saved. It
    may also be a `CachedTeacher`: then all rows must be in its cache, which is checked here, and none runs.

    `loss` is what is minimised. Train logs add `kl`, which is KL(teacher || student) whatever the divergence, so that
    runs compare (at the configured temperature, without its square), `lm_loss` (the student's cross-entropy),
    `teacher_lm_loss` and `top1_agreement`, averaged over the targets since the last log, `num_tokens_seen`, the targets
    trained on so far, `tokens_per_second` and, on known GPUs, `flop_utilisation`. Evaluation reports averages and
    perplexities over the whole set. All in nats, but for the loss where it compares logits. With a top-k cache `kl` is
    that over the kept tokens and the rest, and the teacher's own loss is not known.

    Raises ValueError when the two models cannot be compared, and FloatingPointError when the loss stops being finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | CachedTeacher,
        args: DistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args is a {type(args).__name__}, without the loss's settings: use DistillationConfig.")
        cached = isinstance(teacher_model, CachedTeacher)
        if cached:
            teacher_model.check_student(model, args, processing_class)
        else:
            check_models(model, teacher_model, args.vocab_limit)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would copy the student to each of them in every "
                "step. Start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or CausalLMCollator(_pad_token_id(model, processing_class), row_keys=cached),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_TokensSeen(), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("Tensor, context and sequence parallelism split the loss's inputs: use data parallelism.")
        # compute_loss divides by num_items_in_batch, which counts shifted labels of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True
        self.teacher_model = teacher_model
        self.teacher: Teacher = (
            teacher_model.to(args.device) if cached else LiveTeacher(teacher_model, args.device, self.accelerator)
        )
        if args.torch_compile:
            for each in (model,) if cached else (model, teacher_model):
                backbone(each).compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self._batches = BatchWatch()
        running = None if cached else teacher_model
        self._throughput = Throughput(model, running, args.device, self.accelerator.num_processes)
        if cached:
            teacher_model.check_rows(train_dataset, "train_dataset")
            teacher_model.check_rows(eval_dataset, "eval_dataset")
        self._train_sums = self._new_sums()
        self._eval_sums = self._new_sums()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, also right after an `evaluate`.

        An evaluation before training leaves the model prepared without an optimizer (transformers 5.23, accelerate
        1.15): not wrapped in DDP, so that every process would silently train alone, or in a DeepSpeed engine that
        cannot train. That is undone here.
        """
        if self.is_deepspeed_enabled:
            self.deepspeed, self.model_wrapped = None, self.model
        if self.model_wrapped is self.model and not self.is_fsdp_enabled:
            self.model._is_accelerate_prepared = False
        self._throughput.restart()
        return super().train(*args, **kwargs)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """accelerate must not compile the whole model: its redirected forward is new in every step."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    @property
    def num_tokens_seen(self) -> int:
        """Targets trained on in all processes, as of the last log; the end of `train` counts as one."""
        return self._tokens_seen().at_last_log

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """sum of the batch's losses * num_processes / num_items_in_batch: gradients are averaged over processes.

        `num_items_in_batch` counts the targets of all processes and accumulated batches. Without it, as in a direct
        call, the loss is the mean over this batch's own targets. With `return_outputs`, also a dict of `token_kl`,
        `token_ce`, `teacher_token_ce` and `top1_agreement`, each [rows, length], about the token that follows.
        """
        kd = self._distill(model, inputs)
        if num_items_in_batch is None:
            loss = kd.loss / max(kd.num_tokens, 1)
        else:
            loss = kd.loss * (self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1))
        if model.training:
            sums = self._row_sums(kd, rows=1).sum(0)
            self._batches.check(sums)
            self._train_sums += sums
        if not return_outputs:
            return loss
        names = ("token_kl", "token_ce", "teacher_token_ce", "top1_agreement")
        found = {name: getattr(kd, name) for name in names}
        return loss, {name: value.view_as(inputs["input_ids"]) for name, value in found.items() if value is not None}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, with a message for running out of memory, and the batch's name for when its loss is NaN."""
        self._batches.remember(inputs, self.state.global_step + 1)
        with advised_on_memory(self.args):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Adds the batch's sums to the evaluation; its logits are never whole, so only its mean loss is returned."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            kd = self._distill(model, inputs)
        row_sums = self._row_sums(kd, rows=inputs["input_ids"].shape[0])
        # Processes get equally many rows by repeating some in the last batch; gather_for_metrics drops those again.
        self._eval_sums += self.accelerator.gather_for_metrics(row_sums).sum(0)
        return kd.loss / max(kd.num_tokens, 1), None, None

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's loop, its mean of batch means replaced by means over all targets."""
        self._eval_sums = self._new_sums()
        start = time.perf_counter()
        with prepared_evaluation(self):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means = self._means(self._eval_sums.tolist())
        self._throughput.leave_out(time.perf_counter() - start)
        means["perplexity"] = _perplexity(means["lm_loss"])
        if "teacher_lm_loss" in means:
            means["teacher_perplexity"] = _perplexity(means["teacher_lm_loss"])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the distillation's averages to a train log. Every process must call it, as the Trainer does."""
        if "loss" in logs or "train_loss" in logs:
            sums = self._reduced_train_sums()
            self._train_sums.zero_()
            self._batches.forget()
            seen = self._tokens_seen()
            seen.at_last_log += int(sums[-1])
            seen.since_last_log = 0
            if "loss" in logs:
                means = self._means(sums)
                del means["num_tokens"], means["loss"]  # the Trainer has a loss of its own
                logs.update(means, num_tokens_seen=seen.at_last_log, **self._throughput.measures(int(sums[-1])))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._tokens_seen().since_last_log = int(self._reduced_train_sums()[-1])
        super()._save_checkpoint(model, trial)

    def _distill(self, model: nn.Module, inputs: dict[str, Tensor]) -> KDOutput:
        """The teacher's and then the student's pass over a batch. Tokens of the output: rows * length, flat."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f"The batch has {sorted(inputs)} but no labels. Use a collator such as CausalLMCollator.")
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        row_keys = inputs.pop("row_keys", None)
        with torch.no_grad(), self.accelerator.autocast():
            targets = self.teacher.targets(inputs, row_keys)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        results: list[KDOutput] = []

        def forward(**student_inputs: Tensor) -> Tensor:
            with self.accelerator.autocast():
                hidden = last_hidden(student, student_inputs)
                kd = self._compare(hidden, student, targets, following)
            results.append(kd)
            return kd.loss

        with self.teacher.gathered(targets) as targets, redirected_forward(student, forward):
            loss = model(**inputs)
        kd = results.pop()
        kd.loss = loss
        return kd

    def _compare(
        self, hidden: Tensor, student: PreTrainedModel, targets: HeadTargets | TopKTargets, following: Tensor
    ) -> KDOutput:
        """The loss of the student's hidden states [tokens, hidden] and head against the teacher's targets."""
        head, args = student.get_output_embeddings(), self.args
        options = {
            "token_weight": (following != IGNORE_INDEX).float(),
            "labels": following,
            "temperature": args.temperature,
            "ce_weight": args.ce_weight,
            "student_bias": getattr(head, "bias", None),
            "student_transform": get_logit_transform(student.config),
            "chunk_size": args.kd_chunk_size or "auto",
        }
        if isinstance(targets, TopKTargets):
            *kept, vocab_size = targets
            return fused_linear_topk_kd(hidden, whole(head.weight), *kept, vocab_limit=vocab_size, **options)
        return fused_linear_kd(
            hidden,
            whole(head.weight),
            targets.hidden,
            targets.weight,
            teacher_bias=targets.bias,
            teacher_transform=targets.transform,
            divergence=args.divergence,
            js_beta=args.js_beta,
            vocab_limit=args.vocab_limit,
            **options,
        )

    def _new_sums(self) -> Tensor:
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        return torch.zeros(len(SUM_NAMES), dtype=dtype, device=self.args.device)

    def _row_sums(self, kd: KDOutput, rows: int) -> Tensor:
        """Sums over each row's targets, [rows, len(SUM_NAMES)], left on the device."""
        counted = kd.token_mask
        unknown = torch.zeros_like(kd.token_kl)
        teacher_ce = unknown if kd.teacher_token_ce is None else kd.teacher_token_ce
        columns = (kd.token_loss, kd.token_kl, kd.token_ce, teacher_ce, kd.top1_agreement, counted)
        return torch.stack([c.detach().to(self._train_sums.dtype).view(rows, -1).sum(1) for c in columns], dim=1)

    def _reduced_train_sums(self) -> list[float]:
        """Sums since the last log over all processes. Raises FloatingPointError, in all of them, if not finite."""
        sums = self.accelerator.reduce(self._train_sums.clone(), "sum").tolist()
        if not all(math.isfinite(value) for value in sums):
            last = max((entry["step"] for entry in self.state.log_history if "loss" in entry), default=0)
            raise FloatingPointError(
                f"The distillation loss became NaN or infinite between steps {last} and {self.state.global_step}: "
                f"{dict(zip(SUM_NAMES, sums, strict=True))}. {self._batches.describe()}Lower learning_rate, set "
                "max_grad_norm, or resume from the last checkpoint, which is from before; with fp16, use bf16."
            )
        return sums

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over tokens of the SUM_NAMES that are known, and their number; NaN when there are none."""
        values = dict(zip(SUM_NAMES, sums, strict=True))
        count = int(values.pop("num_tokens"))
        if not self.teacher.knows_labels:
            del values["teacher_lm_loss"]
        means = {name: value / count if count else math.nan for name, value in values.items()}
        return {**means, "num_tokens": count}

    def _tokens_seen(self) -> _TokensSeen:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, _TokensSeen))


class _TokensSeen(TrainerCallback, ExportableState):
    """Carries the count of trained targets through checkpoints, in trainer_state.json."""

    def __init__(self) -> None:
        self.at_last_log = 0
        self.since_last_log = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"at_last_log": self.at_last_log + self.since_last_log}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.at_last_log = stored["attributes"]["at_last_log"] if stored else 0
        self.since_last_log = 0


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows a double


def _pad_token_id(model: PreTrainedModel, processing_class: Any) -> int:
    """Any valid id would do, because padding is masked; the models' own makes batches readable."""
    for source in (processing_class, model.config):
        pad_token_id = getattr(source, "pad_token_id", None)
        if isinstance(pad_token_id, int) and pad_token_id >= 0:
            return pad_token_id
    return 0
