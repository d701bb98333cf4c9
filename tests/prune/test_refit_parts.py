"""The parts of refit on numbers with known answers: moments, solves, eliminations, bases, streams."""

from __future__ import annotations

import pytest
import torch

from hf_minitron.prune import refit_moments
from hf_minitron.prune.refit_basis import StreamStatistics, rotate, select_channels
from hf_minitron.prune.refit_choice import eliminate, eliminate_heads, rank_by_energy
from hf_minitron.prune.refit_moments import CrossMoments, Evidence, effective_rank
from hf_minitron.prune.refit_solve import Linear, compensate, fit_linear
from hf_minitron.prune.refit_streams import StreamStore, split_rows


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_do_not_depend_on_batches(monkeypatch):
    x, y = draw(1000, 6) + 100, draw(1000, 3, seed=1)
    whole = CrossMoments(center=True)
    whole.add(x, y)
    monkeypatch.setattr(refit_moments, "CHUNK_TOKENS", 64)
    parts = CrossMoments(center=True)
    for part_x, part_y in zip(x.split(37), y.split(37), strict=True):
        parts.add(part_x, part_y)
    torch.testing.assert_close(parts.yx, whole.yx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.xx, whole.xx, rtol=1e-5, atol=1e-5)  # variances of 1 about means of 100


def test_sums_are_float64(monkeypatch):
    monkeypatch.setattr(refit_moments, "CHUNK_TOKENS", 1)
    moments = CrossMoments()
    moments.add(torch.tensor([[4096.0]] + [[0.5]] * 5000))  # in fp32 16777216 + 0.25 would stay 16777216
    assert moments.xx.item() == (4096.0**2 + 5000 * 0.25) / 5001
    assert moments.xx.dtype == torch.float64


def test_ridge_recovers_a_map_and_its_bias():
    x, truth, bias = draw(400, 5) + 2, draw(3, 5, seed=1), draw(3, seed=2)
    evidence = Evidence(center=True)
    evidence.add(x, x @ truth.T + bias)
    fit = fit_linear(evidence, Linear(torch.zeros(3, 5), torch.zeros(3)), ridge=1e-9)
    torch.testing.assert_close(fit.linear.weight, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit.linear.bias, bias, rtol=1e-4, atol=1e-3)


def test_ridge_keeps_the_prior_where_nothing_was_seen():
    x, prior = torch.zeros(50, 4), draw(2, 4)
    x[:, 0] = draw(50)
    evidence = Evidence()
    evidence.add(x, 3 * x[:, :1].expand(-1, 2))
    found = fit_linear(evidence, Linear(prior), ridge=1e-6).linear.weight
    torch.testing.assert_close(found[:, 1:], prior[:, 1:])
    torch.testing.assert_close(found[:, 0], torch.full((2,), 3.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guard", [True, False])
def test_guard_keeps_slices_that_are_better_on_held_out_rows(guard):
    x, truth = draw(4, 16), draw(3, 16, seed=1)
    evidence = Evidence()
    evidence.add(x, x @ truth.T + 5 * draw(4, 3, seed=2))  # four noisy tokens for sixteen inputs
    held_out = draw(200, 16, seed=3)
    evidence.add(held_out, held_out @ truth.T, held_out=True)
    sliced = Linear(truth + 0.01)
    fit = fit_linear(evidence, sliced, ridge=1e-6, guard=guard)
    assert fit.fell_back is guard
    assert (fit.linear is sliced) is guard
    assert guard or fit.after > fit.before


def test_errors_are_relative_to_the_target():
    x, truth = draw(300, 8), draw(4, 8, seed=1)
    evidence = Evidence()
    evidence.add(x, x @ truth.T)
    evidence.add(x, x @ truth.T, held_out=True)
    fit = fit_linear(evidence, Linear(torch.zeros(4, 8)), ridge=1e-9)
    assert fit.before == pytest.approx(1)
    assert fit.after < 1e-5


def test_elimination_is_that_of_one_by_one():
    a, weight = draw(500, 30) @ draw(30, 30, seed=1), draw(7, 30, seed=2)
    covariance = (a.T @ a).double() / 500
    assert eliminate(covariance, weight, 11, block=5) == one_by_one(covariance, weight.double(), 11)
    assert eliminate(covariance, weight, 11, block=1) == eliminate(covariance, weight, 11, block=64)


def one_by_one(covariance: torch.Tensor, weight: torch.Tensor, keep: int) -> list[int]:
    """The loss after refit is computed anew for every candidate of every removal."""
    damped = covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance))
    kept = list(range(len(covariance)))
    while len(kept) > keep:
        explained = {}
        for candidate in kept:
            rest = [i for i in kept if i != candidate]
            wanted = weight @ damped[:, rest]
            explained[candidate] = (torch.linalg.solve(damped[rest][:, rest], wanted.T) * wanted.T).sum().item()
        kept.remove(max(explained, key=explained.get))
    return kept


def test_one_of_two_twins_is_kept():
    a = draw(300, 6)
    a[:, 5] = a[:, 4]  # strong twins: by energy both stay, by elimination one can stand for the other
    a[:, 4:] *= 3
    covariance, weight = (a.T @ a).double() / 300, torch.ones(2, 6)
    assert {4, 5} < set(rank_by_energy(covariance, weight, 5))
    kept = eliminate(covariance, torch.eye(6), 5)
    assert (4 in kept) != (5 in kept)
    whole = torch.eye(6)
    compensated = compensate(covariance, whole, torch.tensor(kept), 1e-9)
    torch.testing.assert_close(a[:, kept] @ compensated.T, a, rtol=1e-3, atol=1e-2)


def test_heads_that_others_can_stand_for_go_first():
    a = draw(400, 16)  # two groups of two heads of four channels
    a[:, 4:8] = a[:, 0:4]
    covariance, weight = (a.T @ a).double() / 400, draw(5, 16, seed=1)
    weight[:, 12:] = 0
    groups, heads = eliminate_heads(covariance, weight, 4, 2, 2, 1)
    assert groups == [0, 1]
    assert heads[0] in (0, 1)
    assert heads[1] == 2
    weight[:, 8:] = 0
    assert eliminate_heads(covariance, weight, 4, 2, 1, 2) == ([0], [0, 1])


def test_planted_subspace_is_found():
    directions = torch.linalg.qr(draw(12, 5).double())[0]
    h = draw(600, 5, seed=1).double() @ directions.T
    statistics = StreamStatistics()
    for seed in range(3):
        weight = draw(20, 12, seed=seed + 2).double()
        statistics.add(h.T @ h / 600, weight.T @ weight)
    basis = rotate(statistics, 5)
    projector = basis.read @ basis.write
    torch.testing.assert_close(projector.double(), directions @ directions.T, rtol=1e-4, atol=1e-4)
    assert basis.gain == pytest.approx((12 / 5) ** 0.5)
    assert effective_rank(statistics.covariance) == pytest.approx(5, abs=0.3)


def test_directions_that_nobody_reads_go():
    h, weight = draw(600, 6).double(), draw(9, 6, seed=1).double()
    h[:, 0] *= 3  # the strongest channel, unread
    weight[:, 0] = 0
    statistics = StreamStatistics()
    statistics.add(h.T @ h / 600, weight.T @ weight)
    assert abs(rotate(statistics, 5).write[:, 0]).max() < 0.05
    assert abs(rotate(statistics, 5, reader_aware=False).write[:, 0]).max() > 0.9
    assert select_channels(statistics, 5).kept_channels == [1, 2, 3, 4, 5]


def test_streams_beyond_the_limit_go_to_disk():
    store = StreamStore(max_bytes=1000)
    states = [draw(2, 50, seed=seed) for seed in range(5)]
    for number, tensor in enumerate(states):
        store[number] = tensor
    assert store.num_on_disk == 3
    store[4] = states[0]
    assert torch.equal(store[4], states[0])
    assert all(torch.equal(store[number], states[number]) for number in range(4))


def test_every_eighth_row_is_held_out():
    batches = split_rows([[i, i] for i in range(20)], 8)
    assert [len(batch.input_ids) for batch in batches] == [8, 8, 1, 3]
    assert batches[-1].held_out
    assert batches[-1].input_ids[:, 0].tolist() == [1, 9, 17]
    assert not any(batch.held_out for batch in split_rows([[1, 2]], 8))
