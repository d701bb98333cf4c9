"""Whether a student can be trained on a teacher's distribution, checked before any work; and where its backbone is."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from hf_minitron.architectures import get_logit_transform


def check_models(student: PreTrainedModel, teacher: PreTrainedModel, vocab_limit: int | None) -> None:
    """Raises ValueError when one shares weights with the other, and when the fused loss cannot compare them.

    It knows what the families of the table do to their logits after the head; of others, only that they do nothing.
    """
    modules = set(student.modules())
    shared = {id(parameter) for parameter in student.parameters()} & {id(value) for value in teacher.parameters()}
    if teacher in modules or shared:
        raise ValueError(
            "Teacher and student share modules or parameters, so freezing one freezes the other and both would be "
            "saved. Load the teacher on its own, or copy.deepcopy it."
        )
    check_heads(head_facts("student", student), head_facts("teacher", teacher), vocab_limit)


class HeadFacts(NamedTuple):
    """What of a model decides whether its logits can be compared; ``config`` says what it does to them."""

    vocab_size: int
    config: Any


def head_facts(role: str, model: PreTrainedModel) -> HeadFacts:
    """The facts of a model's head. Raises ValueError when it has none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"The {role}, {type(model).__name__}, has no language-model head: use a causal one.")
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ValueError(
            f"The {role}'s head is a {type(head).__name__} of peft: the loss reads the head's own weight and would "
            "miss what is added to it. Leave the head out of target_modules and modules_to_save."
        )
    shape = getattr(head.weight, "ds_shape", head.weight.shape)  # ZeRO-3 loads weights in parts
    return HeadFacts(shape[0], model.config)


def check_heads(student: HeadFacts, teacher: HeadFacts, vocab_limit: int | None) -> None:
    """Raises ValueError when the fused loss cannot compare the logits of two heads."""
    sizes = {}
    for role, facts in (("student", student), ("teacher", teacher)):
        get_logit_transform(facts.config)
        sizes[role] = facts.vocab_size
    smaller = min(sizes.values())
    if vocab_limit is None and sizes["student"] != sizes["teacher"]:
        raise ValueError(
            f"The student has {sizes['student']} vocabulary entries and the teacher {sizes['teacher']}: the KL "
            f"needs one vocabulary. If only the padding differs, set vocab_limit to the tokenizer's length, at most "
            f"{smaller}."
        )
    if vocab_limit is not None and vocab_limit > smaller:
        raise ValueError(f"vocab_limit={vocab_limit} is more than the {smaller} entries that both models have.")


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal model whose last hidden state the head reads; of a PeftModel, with its adapters."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model
