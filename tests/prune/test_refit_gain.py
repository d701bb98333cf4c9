"""The last norm's gain: found where it is planted, as low as any optimizer gets, the same for any chunking."""

from __future__ import annotations

import pytest
import torch

from hf_minitron.architectures import LogitTransform
from hf_minitron.prune import refit_gain
from hf_minitron.prune.refit_gain import HeadInputs, Heads, fit_gain, num_gain_tokens

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.5),
    "capped": LogitTransform(scale=1.0, softcap=10.0),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_planted_gain_is_found(transform):
    head, states = 0.5 * draw(50, 12), draw(3000, 12, seed=1)
    gain = 0.5 + torch.rand(12, generator=torch.Generator().manual_seed(2))
    inputs = HeadInputs(states / gain, states)
    found, report = fit_gain(Heads(head, head, transform), inputs, inputs, ridge=1e-6)
    torch.testing.assert_close(found, gain, rtol=0.02, atol=0)
    assert report["after"] < 1e-4 < 0.04 < report["before"]


def test_no_optimizer_gets_lower():
    """Heads of different widths: nothing is exact, and the optimum is unknown."""
    small, big = 0.5 * draw(80, 10), 0.4 * draw(80, 16, seed=1)
    y = draw(2000, 16, seed=2)
    x = y[:, :10] + 0.5 * draw(2000, 10, seed=3)
    gain, _ = fit_gain(Heads(small, big), HeadInputs(x, y), None, ridge=1e-6)
    best = torch.ones(10, requires_grad=True)
    optimizer = torch.optim.LBFGS([best], max_iter=100, line_search_fn="strong_wolfe")

    def divergence(gain: torch.Tensor) -> torch.Tensor:
        student, teacher = ((x * gain) @ small.T).log_softmax(-1), (y @ big.T).log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = divergence(best)
        loss.backward()
        return loss

    optimizer.step(closure)
    reached, optimum, start = divergence(gain), divergence(best), divergence(torch.ones(10))
    assert optimum <= reached < optimum + 0.02 * (start - optimum)


def test_ones_stay_where_held_out_tokens_want_them():
    head, states = 0.5 * draw(50, 12), draw(500, 12, seed=1)
    misleading, truth = HeadInputs(states / 2, states), HeadInputs(states, states)
    gain, report = fit_gain(Heads(head, head), misleading, truth, ridge=1e-6)
    assert torch.equal(gain, torch.ones(12))
    assert report["fell_back"] and report["after"] == report["before"]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_chunks_change_nothing(monkeypatch, transform):
    heads = Heads(0.5 * draw(50, 12), 0.5 * draw(50, 16, seed=4), transform)
    inputs = HeadInputs(draw(700, 12, seed=1), draw(700, 16, seed=2))
    whole, before = fit_gain(heads, inputs, inputs, 0.01)
    monkeypatch.setattr(refit_gain, "LOGIT_BYTES", 50 * 4 * 4 * 33)  # 33 tokens at a time, the source's anew
    parts, after = fit_gain(heads, inputs, inputs, 0.01)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert after == pytest.approx(before, rel=1e-5)


def test_dead_states_change_nothing():
    head = draw(20, 4)
    gain, _ = fit_gain(Heads(head, head), HeadInputs(torch.zeros(9, 4), torch.zeros(9, 4)), None, 0.01)
    assert torch.equal(gain, torch.ones(4))


def test_number_of_tokens_follows_the_width():
    assert [num_gain_tokens(width) for width in (8, 168, 4096)] == [1024, 3360, 16384]
