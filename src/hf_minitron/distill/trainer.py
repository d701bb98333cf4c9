"""`DistillationTrainer`: a transformers.Trainer whose loss is the fused divergence from a teacher.

By default the papers' method: forward KL on logits only, temperature 1, no cross-entropy (P2, arXiv 2408.11796,
"Retraining"; P1, arXiv 2407.14679, section 3). Off-policy: the teacher reads the same rows as the student, first, and
leaves only its last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_minitron.distill.collator import CausalLMCollator, pad_token_id
from hf_minitron.distill.compatibility import check_models
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.head_loss import compare_heads
from hf_minitron.distill.intermediate import IntermediateStates, NoIntermediateStates
from hf_minitron.distill.kd_head import KDOutput
from hf_minitron.distill.layer_pairs import StudentOrigin
from hf_minitron.distill.measures import KD_VALUES, BatchLosses
from hf_minitron.distill.parallel_correction import CorrectedTeacher, ParallelCorrection, prepare_correction
from hf_minitron.distill.teacher import LiveTeacher, Teacher, last_hidden
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.token_trainer import TokenMeanTrainer


class DistillationTrainer(TokenMeanTrainer):
    """Trains `model`, the student, to give the distribution over the next token that `teacher_model` gives.

    Rows are dicts with `input_ids` and optionally `labels`, where -100 marks positions that are no targets. Loss and
    metrics are means over the targets of the whole global batch, whatever the gradient accumulation, the padding and
    the number of processes. `teacher_model` is frozen, put in eval mode and moved to the device; it is never saved. It
    may also be a `CachedTeacher`: then all rows must be in its cache, which is checked here, and none runs. The rows of
    a `RowStream` as `train_dataset` are only looked up when they come. With `teacher_correction` the teacher is trained
    on the text meanwhile, by a step after each of the student's.

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
        teacher_correction: ParallelCorrection | None = None,
    ) -> None:
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args is a {type(args).__name__}, without the loss's settings: use DistillationConfig.")
        cached = isinstance(teacher_model, CachedTeacher)
        if cached:
            teacher_model.check_student(model, args, processing_class)
        else:
            check_models(model, teacher_model, args.vocab_limit)
        if teacher_correction is not None:
            teacher_model = prepare_correction(teacher_model, args, teacher_correction)
        elif not cached:
            teacher_model.requires_grad_(False)
        self._states = NoIntermediateStates()
        if args.intermediate_losses:
            self._states = IntermediateStates(model, teacher_model, args, student_origin)
        unknown = {"teacher_lm_loss"} if cached and not teacher_model.knows_labels else set()
        super().__init__(
            model,
            args,
            data_collator or CausalLMCollator(pad_token_id(model, processing_class), row_keys=cached),
            [*(name for name in KD_VALUES if name not in unknown), *self._states.names],
            helper=None if cached else teacher_model,
            callbacks=callbacks,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.teacher_model = teacher_model
        self.correction: CorrectedTeacher | None = None
        self.teacher: Teacher
        if cached:
            self.teacher = teacher_model.to(args.device)
            teacher_model.check_rows(train_dataset, "train_dataset")
            teacher_model.check_rows(eval_dataset, "eval_dataset")
        else:
            if teacher_correction is not None:
                self.teacher = self.correction = CorrectedTeacher(self, teacher_model, teacher_correction)
                self.add_callback(self.correction)
            else:
                self.teacher = LiveTeacher(teacher_model, args.device, self.accelerator)
            self.compile_backbone(teacher_model)
        self._states.join(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, also right after an `evaluate`."""
        with self._states.training():
            return super().train(*args, **kwargs)

    def batch_losses(
        self, model: nn.Module, inputs: dict[str, Tensor], following: Tensor, factor: Tensor | float | None
    ) -> BatchLosses:
        """The teacher's and then the student's pass over a batch; a teacher that is corrected learns from it too."""
        inputs = dict(inputs)
        row_keys = inputs.pop("row_keys", None)
        with torch.no_grad(), self.accelerator.autocast(), self._states.watch("teacher"):
            if self.correction is None or factor is None:
                targets = self.teacher.targets(inputs, row_keys)
            else:
                targets = self.correction.learn(inputs, following, factor)
        results: list[tuple[KDOutput, dict[str, Tensor]]] = []

        def forward(student: PreTrainedModel, **student_inputs: Tensor) -> Tensor:
            with self._states.watch("student"):
                hidden = last_hidden(student, student_inputs)
            kd = compare_heads(hidden, student, targets, following, self.args)
            results.append((kd, self._states.add_to(kd, following, student_inputs)))
            return kd.loss

        with self.teacher.gathered(targets) as targets:
            loss = self.run_redirected(model, inputs, forward)
        kd, states = results.pop()
        values = {"loss": kd.token_loss, "kl": kd.token_kl, "lm_loss": kd.token_ce}
        values |= {"teacher_lm_loss": kd.teacher_token_ce, "top1_agreement": kd.top1_agreement}
        outputs = {name: getattr(kd, name) for name in ("token_kl", "token_ce", "teacher_token_ce", "top1_agreement")}
        return BatchLosses(loss, values | states, kd.token_mask, kd.num_tokens, outputs)

    def extra_logs(self) -> dict[str, float]:
        """The weight of intermediate losses, and the learning rate of a teacher that is corrected."""
        return self._states.logs() | (self.correction.logs() if self.correction is not None else {})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self._states.detached():
            super()._save(output_dir, self._states.student_alone(state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._states.save(output_dir)
            if self.correction is not None:
                self.correction.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._states.load(checkpoint)
            if self.correction is not None:
                self.correction.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with nullcontext() if self.is_fsdp_enabled else self._states.detached():  # FSDP's own files have all parts
            super()._load_from_checkpoint(resume_from_checkpoint, model)
