"""How far two texts are apart as bags of tokens and of pairs of tokens, beside how far equal ones are by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Jensen-Shannon divergence in bits, 0 to 1: of two texts, and by chance, of two halves of one of them.

    All are between halves, so between equally many tokens; ``floor`` is the larger of the two texts' own.
    """

    divergence: float
    floor: float

    @property
    def excess(self) -> float:
        """What is left above chance, at least 0."""
        return max(0.0, self.divergence - self.floor)


def compare_texts(new: np.ndarray, reference: np.ndarray, vocab_size: int, order: int) -> Distance:
    """Distance of rows of token ids [rows, length] by single tokens (``order`` 1) or by neighbours (2).

    Rows must be in random order, with at least two of each; as many are used of both. With P and Q the shares of the
    tokens and M their mean, JS = H(M) - (H(P) + H(Q)) / 2 (Lin, 1991, "Divergence Measures Based on the Shannon
    Entropy"). It is biased upwards where tokens are rare, and so is the floor.
    """
    count = min(len(new), len(reference)) // 2
    if count < 1:
        raise ValueError(f"{len(new)} and {len(reference)} rows: both texts need at least two to be halved.")
    halves = [_events(rows, vocab_size, order) for text in (new, reference) for rows in (text[:count], text[-count:])]
    between = (jensen_shannon(halves[0], halves[2]) + jensen_shannon(halves[1], halves[3])) / 2
    return Distance(between, max(jensen_shannon(*halves[:2]), jensen_shannon(*halves[2:])))


def jensen_shannon(one: np.ndarray, other: np.ndarray) -> float:
    """Divergence in bits of the distributions of two lists of events."""
    _, index = np.unique(np.concatenate([one, other]), return_inverse=True)
    size = index.max() + 1
    p, q = (np.bincount(part, minlength=size) / len(part) for part in (index[: len(one)], index[len(one) :]))
    return max(0.0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def token_shares(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Share of every token [vocabulary]."""
    return np.bincount(rows.ravel(), minlength=vocab_size) / rows.size


def divergence_by_token(new: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """What each token adds to the divergence of two distributions [vocabulary], in bits."""
    mean = (new + reference) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(p > 0, p * np.log2(p / mean), 0.0) for p in (new, reference)]
    return (terms[0] + terms[1]) / 2


def _events(rows: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    rows = rows.astype(np.int64)
    return rows.ravel() if order == 1 else (rows[:, :-1] * vocab_size + rows[:, 1:]).ravel()


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())
