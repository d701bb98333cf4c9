"""How far a policy has moved from its reference: the exact KL per token on given responses."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
import transformers.integrations.deepspeed as deepspeed_integration
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

CHUNK = 256  # positions whose probabilities are in fp32 at a time


@torch.no_grad()
def mean_token_kl(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Iterable[tuple[list[int], list[int]]]
) -> float:
    """The mean over all response tokens of KL(policy || reference), in nats, each over the whole vocabulary.

    `rows` are the token ids of prompts and responses. At every position of a response both models see the same prompt
    and the same beginning of it: this is not the KL of whole responses sampled from the policy, whose expectation is
    the sum of such terms over its own samples. Both models are whole and on one device; rows go through them one by
    one, so that padding changes nothing.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, response in rows:
        ids = torch.tensor([[*prompt, *response]], device=policy.device)
        positions = slice(len(prompt) - 1, -1) if prompt else slice(0, -1)  # the first token of all is not predicted
        logits = [model(input_ids=ids, use_cache=False).logits[0, positions] for model in (policy, reference)]
        for own, other in zip(*(part.split(CHUNK) for part in logits), strict=True):
            own, other = own.float().log_softmax(-1), other.float().log_softmax(-1)
            total += kl_div(other, own, reduction="sum", log_target=True).double().cpu()
        count += logits[0].shape[0]
    if not count:
        raise ValueError("There are no response tokens to compare the models on.")
    return (total / count).item()


@contextmanager
def whole_models() -> Any:
    """Models that are loaded in the block are whole in this process, also where DeepSpeed would split them."""
    found = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = found
