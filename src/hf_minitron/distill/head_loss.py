"""The loss of a student's head against what its teacher gives as targets: a head of its own, or top-k."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from hf_minitron.architectures import get_logit_transform
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
