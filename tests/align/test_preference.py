"""The distances of RPO against direct formulas, their limits and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from hf_minitron.align.preference import DISTANCES, rpo_loss

BETA = 0.3


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    return 10 * torch.randn(2, 200, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [0.3]])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def direct(delta: float, gap: float, distance: str) -> float:
    """Written out from the definition, with math's own functions."""
    p, q = sigmoid(gap), sigmoid(BETA * delta)
    if distance == "squared":
        return (BETA * delta - gap) ** 2
    if distance == "forward_kl":
        p, q = q, p
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_loss_is_its_formula(pairs, distance):
    expected = [direct(*pair, distance) for pair in pairs.T.tolist()]
    torch.testing.assert_close(rpo_loss(*pairs, BETA, distance).tolist(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_it_is_zero_where_the_margins_agree_and_positive_elsewhere(pairs, distance):
    delta, gap = pairs
    assert rpo_loss(gap / BETA, gap, BETA, distance).abs().max() < 1e-12
    assert rpo_loss(delta, gap, BETA, distance).min() > 0


def test_backward_kl_tends_to_dpo(pairs):
    delta, _ = pairs
    dpo = -logsigmoid(BETA * delta)
    errors = [(rpo_loss(delta, torch.full_like(delta, g), BETA) - dpo).abs().max().item() for g in (5.0, 20.0, 1e6)]
    assert errors[0] > 1e-3 > 1e-6 > errors[1] and errors[2] == 0


def test_backward_kl_is_cross_entropy_less_the_labels_entropy(pairs):
    delta, gap = pairs
    label = gap.sigmoid()
    entropy = binary_cross_entropy_with_logits(gap, label, reduction="none")
    expected = binary_cross_entropy_with_logits(BETA * delta, label, reduction="none") - entropy
    torch.testing.assert_close(rpo_loss(delta, gap, BETA), expected, rtol=0, atol=1e-9)


def test_squared_at_half_a_reward_is_ipo(pairs):
    delta, _ = pairs
    ipo = (delta - 1 / (2 * BETA)) ** 2
    found = rpo_loss(delta, torch.full_like(delta, 0.5), BETA, "squared")
    torch.testing.assert_close(found, BETA**2 * ipo, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients(pairs, distance):
    delta = pairs[0, :20].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: rpo_loss(d, pairs[1, :20], BETA, distance), delta)


@pytest.mark.parametrize("distance", DISTANCES)
def test_extreme_margins_stay_finite_in_half_precision_too(distance):
    delta = torch.tensor([-3e4, 3e4, 0.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    loss = rpo_loss(delta, torch.tensor([500.0, -500.0, 1e4, 0.0]), BETA, distance)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.sum().backward()
    assert delta.grad.isfinite().all()


def test_unknown_distances_are_refused():
    with pytest.raises(ValueError, match="distance='kl' is unknown: use one of backward_kl, forward_kl, squared"):
        rpo_loss(torch.zeros(1), torch.zeros(1), 1.0, "kl")
