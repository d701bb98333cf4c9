"""A transformers.Trainer whose loss and metrics are exact means over tokens, computed without whole logits.

What distillation and teacher correction share: everything but the loss itself.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_minitron.distill.compatibility import backbone
from hf_minitron.distill.config import TokenMeanArguments
from hf_minitron.distill.failures import BatchWatch, advised_on_memory
from hf_minitron.distill.kd_inputs import IGNORE_INDEX
from hf_minitron.distill.measures import BatchLosses, Measures, TokensSeen, perplexity
from hf_minitron.distill.sharding import prepared_evaluation, redirected_forward
from hf_minitron.distill.stream_training import StreamTrainer
from hf_minitron.distill.throughput import Throughput

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


class TokenMeanTrainer(StreamTrainer):
    """Trains `model` on a loss that is a mean over targets, the same under any accumulation, padding and processes.

    Rows are dicts with `input_ids` and optionally `labels`, where -100 marks positions that are no targets. Loss and
    metrics are means over the targets of the whole global batch. Train logs add the means of `names` since the last
    log, `num_tokens_seen`, the targets trained on so far, `tokens_per_second` and, on known GPUs, `flop_utilisation`.
    Evaluation reports means over the whole set, and the perplexity of every cross-entropy. `helper` is a second model
    that runs in every step, for the count of operations.

    A subclass gives `batch_losses`. Raises FloatingPointError when the loss stops being finite, and ValueError for
    several GPUs in one process and parallelism that splits rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TokenMeanArguments,
        data_collator: Collator,
        names: Sequence[str],
        helper: PreTrainedModel | None = None,
        callbacks: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would copy the model to each of them in every "
                "step. Start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
            )
        super().__init__(
            model=model, args=args, data_collator=data_collator, callbacks=[TokensSeen(), *(callbacks or [])], **options
        )
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("Tensor, context and sequence parallelism split the loss's inputs: use data parallelism.")
        # compute_loss divides by num_items_in_batch, which counts shifted labels of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True
        self.compile_backbone(model)
        self._batches = BatchWatch()
        self._throughput = Throughput(model, helper, args.device, self.accelerator.num_processes)
        self._measures = Measures(args.device, names)
        self._train_sums, self._eval_sums = self._measures.zeros(), self._measures.zeros()

    @abstractmethod
    def batch_losses(
        self, model: nn.Module, inputs: dict[str, Tensor], following: Tensor, factor: Tensor | float | None
    ) -> BatchLosses:
        """The loss of a batch without its labels; `following` [rows * length] are the next tokens, -100 for none.

        In training the loss is multiplied by `factor` before its gradient is taken; it is None otherwise.
        """

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
        call, the loss is the mean over this batch's own targets. With `return_outputs`, also the tokens' values,
        [rows, length] each, about the token that follows.
        """
        inputs, following = self._split_off_labels(inputs)
        if num_items_in_batch is None:
            factor = 1 / max(int((following != IGNORE_INDEX).sum()), 1)
        else:
            factor = self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        found = self.batch_losses(model, inputs, following, factor if model.training else None)
        loss = found.loss * factor
        if model.training:
            sums = self._measures.row_sums(found, 1).sum(0)
            self._batches.check(sums)
            self._train_sums += sums
        if not return_outputs:
            return loss
        shape = inputs["input_ids"].shape
        return loss, {name: value.view(shape) for name, value in found.outputs.items() if value is not None}

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
        inputs, following = self._split_off_labels(self._prepare_inputs(inputs))
        with torch.no_grad():
            found = self.batch_losses(model, inputs, following, None)
        row_sums = self._measures.row_sums(found, inputs["input_ids"].shape[0])
        # Processes get equally many rows by repeating some in the last batch; gather_for_metrics drops those again.
        self._eval_sums += self.accelerator.gather_for_metrics(row_sums).sum(0)
        return found.loss / max(found.num_tokens, 1), None, None

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
        for whose in ("", "teacher_"):
            if f"{whose}lm_loss" in means:
                means[f"{whose}perplexity"] = perplexity(means[f"{whose}lm_loss"])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages to a train log. Every process must call it, as the Trainer does."""
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
                    **self.extra_logs(),
                    num_tokens_seen=seen.at_last_log,
                    **self._throughput.measures(int(sums[-1])),
                )
        super().log(logs, start_time)

    def compile_backbone(self, model: PreTrainedModel) -> None:
        """With torch.compile, if the arguments ask for it; the rest of the model is redirected anew in every step."""
        if self.args.torch_compile:
            backbone(model).compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def extra_logs(self) -> dict[str, float]:
        """What a train log has beside means."""
        return {}

    def run_redirected(self, model: nn.Module, inputs: dict[str, Tensor], forward: Callable[..., Tensor]) -> Tensor:
        """What `forward(inner model, **inputs)` returns when `model` is called, so that its wrappers' hooks run."""
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)

        def forward_inner(**inputs: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return forward(inner, **inputs)

        with redirected_forward(inner, forward_inner):
            return model(**inputs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._tokens_seen().since_last_log = int(self._reduced_train_sums()[-1])
        super()._save_checkpoint(model, trial)

    def _split_off_labels(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch without its labels, and for every position the token that follows, flat."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f"The batch has {sorted(inputs)} but no labels. Use a collator such as CausalLMCollator.")
        return inputs, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()

    def _reduced_train_sums(self) -> list[float]:
        """Sums since the last log over all processes. Raises FloatingPointError, in all of them, if not finite."""
        sums = self.accelerator.reduce(self._train_sums.clone(), "sum").tolist()
        last = max((entry["step"] for entry in self.state.log_history if "loss" in entry), default=0)
        named = dict(zip(self._measures.names, sums, strict=True))
        self._batches.check_sums(named, f"between steps {last} and {self.state.global_step}")
        return sums

    def _tokens_seen(self) -> TokensSeen:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TokensSeen))
