"""The exact KL per token against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minitron.align import divergence
from hf_minitron.align.divergence import mean_token_kl

ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14, 15]), ([], [20, 21, 22])]


@pytest.fixture(scope="module")
def models(tiny_checkpoint):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for value in policy.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return policy, reference


def test_it_is_its_definition_token_by_token(models, monkeypatch):
    expected = []
    for prompt, response in ROWS:
        ids = [*prompt, *response]
        for position in range(max(1, len(prompt)), len(ids)):
            with torch.no_grad():
                p, q = (m(torch.tensor([ids[:position]])).logits[0, -1].double().softmax(-1) for m in models)
            expected.append((p * (p / q).log()).sum().item())
    assert len(expected) == 2 + 5 + 2
    assert mean_token_kl(*models, ROWS) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    monkeypatch.setattr(divergence, "CHUNK", 2)
    assert mean_token_kl(*models, ROWS) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert mean_token_kl(*models[::-1], ROWS) != pytest.approx(sum(expected) / len(expected), rel=1e-2)


def test_a_model_is_at_no_distance_from_itself(models):
    assert mean_token_kl(models[0], copy.deepcopy(models[0]), ROWS) == 0
    with pytest.raises(ValueError, match="no response tokens"):
        mean_token_kl(*models, [])
