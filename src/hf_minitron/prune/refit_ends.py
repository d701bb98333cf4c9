"""What surrounds the halves in refit: the embedding, what it takes over of dropped layers, and norms as trimmed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_minitron.prune.refit_basis import Basis

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
