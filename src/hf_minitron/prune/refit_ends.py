"""The two ends of the stream in refit: what the embedding takes over, and the head that reads the last states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_minitron.prune.refit_basis import Basis
from hf_minitron.prune.refit_moments import CrossMoments, Evidence
from hf_minitron.prune.refit_solve import Linear, factorize, mean_squared_error

SHRINKAGE = 5  # tokens: a mean over so few occurrences counts half


class TokenMeans:
    """The mean of what dropped first layers add, by token: E[h_k − h_0 | token], shrunk toward zero for rare tokens."""

    def __init__(self, vocab_size: int, hidden_size: int):
        self._sums, self._counts = torch.zeros(vocab_size, hidden_size), torch.zeros(vocab_size)

    def add(self, input_ids: Tensor, added: Tensor) -> None:
        """``added`` (rows, tokens, hidden) for ``input_ids`` (rows, tokens)."""
        ids = input_ids.flatten().cpu()
        self._sums.index_add_(0, ids, added.flatten(0, 1).float().cpu())
        self._counts.index_add_(0, ids, torch.ones(len(ids)))

    def rows(self) -> Tensor:
        """(vocab, hidden), to be added to the embedding's outputs."""
        return self._sums / (self._counts + SHRINKAGE)[:, None]


def embed_in(basis: Basis, embedding: Tensor, scales_by_width: bool) -> Tensor:
    """The small embedding (vocab, d'): every row mapped to the ideal stream, for the multiplier that it will get."""
    if basis.is_identity:
        return embedding
    found = embedding @ basis.write.T.to(embedding.device)
    return found * (basis.write.shape[1] / basis.write.shape[0]) ** 0.5 if scales_by_width else found


def fit_final_gain(evidence: Evidence, embedding: Tensor, head: Tensor, ridge: float) -> tuple[Tensor, dict]:
    """What to multiply every channel x of the last norm by, (d',), so that a tied head gives the source's logits.

    argmin_c E|E diag(c) x − W y|² with E (vocab, d') the small embedding and W (vocab, d) the source's head: the linear
    system (EᵀE ∘ E[x xᵀ]) c = diag(Eᵀ W E[y xᵀ]). It is pulled toward the best scalar, which is kept where it is better
    on held-out rows. Also the relative errors there, as in ``Fit``, before any scaling and after.
    """
    small, teacher = embedding.double(), Linear(head)
    moments = evidence.fitted
    system = (small.T @ small) * moments.xx
    wanted = ((head.double().T @ small).T * moments.yx.T).sum(1)
    scalar = float(wanted.sum() / system.sum())
    strength = ridge * float(system.diagonal().mean())
    factor = factorize(system, strength)
    vector = torch.cholesky_solve((wanted + strength * scalar)[:, None], factor)[:, 0]
    candidates = [torch.ones_like(vector), torch.full_like(vector, scalar), vector]
    if not evidence.held_out.count:
        return vector.float(), {}
    errors = [_relative_error(evidence.held_out, small * scale, teacher) for scale in candidates]
    best = min(range(1, 3), key=errors.__getitem__)
    return candidates[best].float(), {"before": errors[0], "after": errors[best]}


def _relative_error(moments: CrossMoments, weight: Tensor, teacher: Linear) -> float:
    silent = Linear(torch.zeros_like(weight))
    energy = mean_squared_error(moments, silent, teacher)
    return mean_squared_error(moments, Linear(weight), teacher) / max(energy, torch.finfo(torch.float64).tiny)


def trimmed_norms(
    basis: Basis, weights: Iterator[tuple[str, Tensor]], gain_offset: float, reads: bool
) -> dict[str, Tensor]:
    """Weight (and bias) of a norm over the small stream, by their names in the source's norm.

    A norm that ``reads`` the stream multiplies by the basis's gain: alone, where readers took over the source's gains,
    else with the kept channels' own.
    """
    found = {}
    for name, tensor in weights:
        if basis.is_identity:
            found[name] = tensor
        elif basis.rotated:
            found[name] = torch.full((basis.write.shape[0],), basis.gain - gain_offset)
        else:
            kept = tensor[torch.tensor(basis.kept_channels, device=tensor.device)]
            scaled = (kept + gain_offset) * (basis.gain if reads else 1.0) - gain_offset
            found[name] = scaled if name == "weight" else kept
    return found
