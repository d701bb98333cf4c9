"""`DistillationTrainer`: a transformers.Trainer whose loss is the fused divergence from a teacher.

By default the papers' method: forward KL on logits only, temperature 1, no cross-entropy (P2, arXiv 2408.11796,
"Retraining"; P1, arXiv 2407.14679, section 3). Off-policy: the teacher reads the same rows as the student, first, and
leaves only its last hidden state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_minitron.distill.collator import CausalLMCollator, pad_token_id
from hf_minitron.distill.compatibility import backbone, check_models
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.failures import BatchWatch, advised_on_memory
from hf_minitron.distill.head_loss import compare_heads
from hf_minitron.distill.intermediate import IntermediateStates, NoIntermediateStates
from hf_minitron.distill.kd_head import KDOutput
from hf_minitron.distill.kd_inputs import IGNORE_INDEX
from hf_minitron.distill.layer_pairs import StudentOrigin
from hf_minitron.distill.measures import Measures, TokensSeen, perplexity
from hf_minitron.distill.sharding import prepared_evaluation, redirected_forward
from hf_minitron.distill.stream_training import StreamTrainer
from hf_minitron.distill.teacher import LiveTeacher, Teacher, last_hidden
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.throughput import Throughput


class DistillationTrainer(StreamTrainer):
    """Trains `model`, the student, to give the distribution over the next token that `teacher_model` gives.

    Rows are dicts with `input_ids` and optionally `labels`, where -100 marks positions that are no targets. Loss and
    metrics are means over the targets of the whole global batch, whatever the gradient accumulation, the padding and
    the number of processes. `teacher_model` is frozen, put in eval mode and moved to the device; it is never saved. It
    may also be a `CachedTeacher`: then all rows must be in its cache, which is checked here, and none runs. The rows of
    a `RowStream` as `train_dataset` are only looked up when they come.

    `loss` is what is minimised. Train logs add `kl`, which is KL(teacher || student) whatever the divergence, so that
    runs compare (at the configured temperature, without its square), `lm_loss` (the student's cross-entropy),
    `teacher_lm_loss` and `top1_agreement`, averaged over the targets since the last log, `num_tokens_seen`, the targets
    trained on so far, `tokens_per_second` and, on known GPUs, `flop_utilisation`. Evaluation reports averages and
    perplexities over the whole set. All in nats, but for the loss where it compares logits. With a top-k cache `kl` is
    that over the kept tokens and the rest, and the teacher's own loss is not known.

    `args.intermediate_losses` adds P1's losses between states inside both models (`intermediate.py`), logged by name,
    with their weight; evaluation keeps them out of its loss. `student_origin` (`layer_pairs.read_origin`) says which
    layers and channels of the teacher the student was cut from, for the default of what is compared.

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
        student_origin: StudentOrigin | None = None,
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
        self._states = NoIntermediateStates()
        if args.intermediate_losses:
            self._states = IntermediateStates(model, teacher_model, args, student_origin)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or CausalLMCollator(pad_token_id(model, processing_class), row_keys=cached),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[TokensSeen(), *(callbacks or [])],
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
        self._measures = Measures(args.device, self.teacher.knows_labels, self._states.names)
        self._train_sums, self._eval_sums = self._measures.zeros(), self._measures.zeros()
        self._states.join(self)

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
        with self._states.training():
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
        kd, states = self._distill(model, inputs)
        if num_items_in_batch is None:
            loss = kd.loss / max(kd.num_tokens, 1)
        else:
            loss = kd.loss * (self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1))
        if model.training:
            sums = self._measures.row_sums(kd, 1, states).sum(0)
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
            kd, states = self._distill(model, inputs)
        row_sums = self._measures.row_sums(kd, inputs["input_ids"].shape[0], states)
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
        self._eval_sums = self._measures.zeros()
        start = time.perf_counter()
        with prepared_evaluation(self):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means = self._measures.means(self._eval_sums.tolist())
        self._throughput.leave_out(time.perf_counter() - start)
        means["perplexity"] = perplexity(means["lm_loss"])
        if "teacher_lm_loss" in means:
            means["teacher_perplexity"] = perplexity(means["teacher_lm_loss"])
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
                means = self._measures.means(sums)
                del means["num_tokens"], means["loss"]  # the Trainer has a loss of its own
                logs.update(
                    means,
                    **self._states.logs(),
                    num_tokens_seen=seen.at_last_log,
                    **self._throughput.measures(int(sums[-1])),
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._tokens_seen().since_last_log = int(self._reduced_train_sums()[-1])
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self._states.detached():
            super()._save(output_dir, self._states.student_alone(state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._states.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._states.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with nullcontext() if self.is_fsdp_enabled else self._states.detached():  # FSDP's own files have all parts
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _distill(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[KDOutput, dict[str, Tensor]]:
        """The teacher's and then the student's pass over a batch, flat: rows * length tokens. Also states' losses."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f"The batch has {sorted(inputs)} but no labels. Use a collator such as CausalLMCollator.")
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        row_keys = inputs.pop("row_keys", None)
        with torch.no_grad(), self.accelerator.autocast(), self._states.watch("teacher"):
            targets = self.teacher.targets(inputs, row_keys)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        results: list[tuple[KDOutput, dict[str, Tensor]]] = []

        def forward(**student_inputs: Tensor) -> Tensor:
            with self.accelerator.autocast():
                with self._states.watch("student"):
                    hidden = last_hidden(student, student_inputs)
                kd = compare_heads(hidden, student, targets, following, self.args)
                results.append((kd, self._states.add_to(kd, following, student_inputs)))
            return kd.loss

        with self.teacher.gathered(targets) as targets, redirected_forward(student, forward):
            loss = model(**inputs)
        kd, states = results.pop()
        kd.loss = loss
        return kd, states

    def _reduced_train_sums(self) -> list[float]:
        """Sums since the last log over all processes. Raises FloatingPointError, in all of them, if not finite."""
        sums = self.accelerator.reduce(self._train_sums.clone(), "sum").tolist()
        last = max((entry["step"] for entry in self.state.log_history if "loss" in entry), default=0)
        named = dict(zip(self._measures.names, sums, strict=True))
        self._batches.check_sums(named, f"between steps {last} and {self.state.global_step}")
        return sums

    def _tokens_seen(self) -> TokensSeen:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TokensSeen))
