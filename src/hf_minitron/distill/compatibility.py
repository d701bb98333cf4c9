"""Whether a student can be trained on a teacher's distribution, checked before any work; and where its backbone is."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

# Scalings of the logits after the head that `fused_linear_kd` does not apply, by the configs' key.
LOGIT_SCALING_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_models(student: PreTrainedModel, teacher: PreTrainedModel, vocab_limit: int | None) -> None:
    """Raises ValueError when one shares weights with the other, and when the fused loss cannot compare them."""
    modules = set(student.modules())
    shared = {id(parameter) for parameter in student.parameters()} & {id(value) for value in teacher.parameters()}
    if teacher in modules or shared:
        raise ValueError(
            "Teacher and student share modules or parameters, so freezing one freezes the other and both would be "
            "saved. Load the teacher on its own, or copy.deepcopy it."
        )
    sizes = {}
    for role, model in (("student", student), ("teacher", teacher)):
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"The {role}, {type(model).__name__}, has no language-model head: use a causal one.")
        if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
            raise ValueError(
                f"The {role}'s head is a {type(head).__name__} of peft: the loss reads the head's own weight and would "
                "miss what is added to it. Leave the head out of target_modules and modules_to_save."
            )
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"The {role}'s head has a bias, which the loss would ignore: not supported.")
        for key in LOGIT_SCALING_KEYS:
            if getattr(model.config, key, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"The {role}'s {key}={getattr(model.config, key)} changes its logits after the head, which the "
                    "loss would ignore: not supported."
                )
        sizes[role] = head.weight.shape[0]
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
