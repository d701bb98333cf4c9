"""The loss of a model's head: against what a teacher gives as targets, a head of its own or top-k; or on the text."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from hf_minitron.architectures import get_logit_transform
from hf_minitron.distill.ce_head import CEOutput, fused_linear_ce
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.kd_head import KDOutput, fused_linear_kd
from hf_minitron.distill.kd_inputs import IGNORE_INDEX
from hf_minitron.distill.sharding import whole
from hf_minitron.distill.teacher import HeadTargets, TopKTargets
from hf_minitron.distill.top_k_head import fused_linear_topk_kd


def compare_heads(
    hidden: Tensor,
    student: PreTrainedModel,
    targets: HeadTargets | TopKTargets,
    following: Tensor,
    args: DistillationConfig,
) -> KDOutput:
    """The loss of the student's hidden states [tokens, hidden] and head; `following` [tokens] are the next tokens."""
    head = student.get_output_embeddings()
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


def head_cross_entropy(
    hidden: Tensor, model: PreTrainedModel, following: Tensor, chunk_size: int | None = None
) -> CEOutput:
    """The language-model loss of hidden states [tokens, hidden]; `following` [tokens] are the next tokens."""
    head = model.get_output_embeddings()
    return fused_linear_ce(
        hidden,
        whole(head.weight),
        following,
        (following != IGNORE_INDEX).float(),
        bias=getattr(head, "bias", None),
        transform=get_logit_transform(model.config),
        chunk_size=chunk_size or "auto",
    )
