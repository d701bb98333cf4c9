"""What the trainer asks of a teacher: for a batch of rows, the targets of the distillation loss.

A live teacher runs on the batch; a cached one (teacher_cache.py) reads what it said about these rows before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from hf_minitron.architectures import LogitTransform, get_logit_transform
from hf_minitron.checkpoint import Checkpoint, load_weights
from hf_minitron.distill.compatibility import backbone
from hf_minitron.distill.sharding import gathered, prepare_teacher, redirected_forward

Quantization = Literal["8bit", "4bit"]


class HeadTargets(NamedTuple):
    """The states that the teacher's head reads, [tokens, hidden], and the head: [vocabulary, hidden], [vocabulary].

    ``transform`` is what the teacher does to its head's output.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()


class TopKTargets(NamedTuple):
    """Per token the k most likely next tokens and their log-probabilities, [tokens, k], and the rest's mass [tokens].

    ``vocab_size`` counts the entries that the distribution is over.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail_mass: Tensor
    vocab_size: int


class Teacher(Protocol):
    """A live or a cached teacher, as the trainer sees it."""

    @property
    def needs_row_keys(self) -> bool:
        """Whether batches must say by ``row_keys`` [rows, 2] which rows they hold."""

    @property
    def knows_labels(self) -> bool:
        """Whether the probability of every label is known, and with it the teacher's cross-entropy."""

    def targets(self, inputs: Mapping[str, Tensor], row_keys: Tensor | None) -> HeadTargets | TopKTargets:
        """About every position of a batch, padding included, flat: rows * length tokens."""

    def gathered(self, targets: HeadTargets | TopKTargets) -> AbstractContextManager[HeadTargets | TopKTargets]:
        """The targets with a whole head, as long as the block runs."""


class LiveTeacher:
    """A model that runs on every batch: in eval mode, on ``device`` unless it is spread over several.

    It is frozen, unless it is corrected meanwhile.
    """

    needs_row_keys = False
    knows_labels = True

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        accelerator: Accelerator | None = None,
        frozen: bool = True,
    ) -> None:
        if model.get_output_embeddings().weight.is_meta:
            raise ValueError(
                "The device map offloads the teacher's head, which every step reads: give it a device, "
                'such as device_map={"lm_head": 0, ...}.'
            )
        self.device, self.model = device, model.eval()
        if frozen:
            model.requires_grad_(False)
        self._wrapped = prepare_teacher(model, accelerator, device)

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Tensor], row_keys: Tensor | None = None) -> HeadTargets:
        """Runs the backbone; no logits are made."""
        return self.as_targets(self.hidden(inputs))

    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The states that the head reads, [tokens, hidden]."""

        def forward(**inputs: Tensor) -> Tensor:
            return last_hidden(self.model, inputs)

        with redirected_forward(self.model, forward):  # through its wrapper, which gathers sharded layers one by one
            return self._wrapped(**inputs).to(self.device)

    def as_targets(self, hidden: Tensor) -> HeadTargets:
        """What the student compares itself with."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        bias = None if bias is None else bias.to(self.device)
        return HeadTargets(hidden, head.weight, bias, get_logit_transform(self.model.config))

    @contextmanager
    def gathered(self, targets: HeadTargets) -> Iterator[HeadTargets]:
        """The same with the whole of the head, if that is sharded, as long as the block runs."""
        with gathered(self.model.get_output_embeddings()) as weight:
            yield targets._replace(weight=weight.to(self.device))


def last_hidden(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The state that the head reads, [rows * length, hidden], by the backbone alone: no logits are made."""
    return backbone(model)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def load_model(
    source: Checkpoint,
    dtype: torch.dtype,
    *,
    quantization: Quantization | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A checkpoint's model in ``dtype``, its linear layers but for the head in 8 or 4 bits if asked for.

    Both are bitsandbytes': LLM.int8() (Dettmers et al. 2022), and NF4 with quantized scales (Dettmers et al. 2023)
    that multiplies in ``dtype``. ``device_map`` is that of ``from_pretrained``: "auto" spreads the layers over the
    devices there are. A quantized model must be loaded where it stays, so give one if it is not to be the default GPU.
    """
    how = {"device_map": device_map, "quantization_config": check_quantization(quantization, dtype)}
    return load_weights(source, dtype, trust_remote_code=trust_remote_code, **how)


def check_quantization(quantization: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The library's settings for a name. Raises ValueError for another name and when bitsandbytes is not installed."""
    if quantization is None:
        return None
    if quantization not in get_args(Quantization):
        raise ValueError(
            f"teacher_quantization={quantization!r}: bitsandbytes has {' and '.join(get_args(Quantization))}. Use one "
            "of these, or leave it out."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"teacher_quantization={quantization} needs bitsandbytes, which is not installed: pip install "
            "'hf-minitron[quantization]'."
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
