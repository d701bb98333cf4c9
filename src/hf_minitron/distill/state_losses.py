"""How far a student's hidden states are from its teacher's, token by token: cosine, squared error, relations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_minitron.distill.kd_products import precise_dtype

LOSS_NAMES = ("emb", "att", "i", "o")
METRICS = ("cosine", "mse")
QUERIES_AT_A_TIME = 512  # whose relations to the tokens before them are in memory
FAR_BELOW = -1e9  # a score that leaves nothing after the softmax, and is finite so that differences are too


def state_distance(student: Tensor, teacher: Tensor, metric: str) -> Tensor:
    """[tokens]: 1 - cosine of two states [tokens, width], or their squared difference averaged over the width."""
    dtype = precise_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if metric == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)


def relation_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_heads: Sequence[int],
    teacher_heads: Sequence[int],
    attention_mask: Tensor | None = None,
) -> Tensor:
    """[rows, length]: MiniLMv2's self-attention relations (arXiv 2012.15828, section 3), summed over their kinds.

    Of each kind, queries, keys and values, both models give states [rows, length, heads * head_dim]. The channels are
    split into as many relation heads as divide the heads of both, of d channels each; a token's relation to the others
    is softmax(x_i . x_j / sqrt(d)) over j, and its loss KL(teacher || student), averaged over relation heads. MiniLMv2
    is bidirectional; here a token relates to itself and those before it, padding left out, as in attention.
    """
    rows, length = student[0].shape[:2]
    kinds = []
    for own, taught, *counts in zip(student, teacher, student_heads, teacher_heads, strict=True):
        heads = math.gcd(*counts)
        dtype = precise_dtype(own, taught)
        split = [x.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (own, taught)]  # [rows, heads, len, d]
        kinds.append([])
        for start in range(0, length, QUERIES_AT_A_TIME):
            stop = min(start + QUERIES_AT_A_TIME, length)
            parts = [
                checkpoint(_relations_of_queries, *(x[row] for x in split), start, stop, mask, use_reentrant=False)
                for row in range(rows)
                for mask in [None if attention_mask is None else attention_mask[row, :stop]]
            ]
            kinds[-1].append(torch.stack(parts))
    return torch.stack([torch.cat(blocks, dim=1) for blocks in kinds]).sum(0)


def _relations_of_queries(student: Tensor, teacher: Tensor, start: int, stop: int, mask: Tensor | None) -> Tensor:
    """[stop - start] losses of tokens start..stop of one row, whose states are [heads, length, d]."""
    at = torch.arange(stop, device=student.device)
    allowed = at[None, :] <= at[start:, None]
    if mask is not None:
        allowed = allowed & (mask != 0)
    logs = []
    for states in (student, teacher):
        scores = states[:, start:stop] @ states[:, :stop].mT / math.sqrt(states.shape[-1])
        logs.append(scores.masked_fill(~allowed, FAR_BELOW).log_softmax(-1))
    own, taught = logs
    return (taught.exp() * (taught - own)).sum(-1).mean(0)
