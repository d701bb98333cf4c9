"""Which directions of the residual stream refit keeps, and the maps between the two streams that follow.

The ideal stream of the small model is s = P h. Where the family allows it, P = Qᵀ D with orthonormal Q, else P selects
channels. D = I, or diag(√final gain) where embedding and head are tied: then the rotated embedding E D Q and the
rotated head (E D²) D⁻¹ Q are one and the same matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_minitron.prune.refit_choice import eliminate, rank_by_energy
from hf_minitron.prune.refit_moments import effective_rank

SPECTRUM_POINTS = 256
FLOOR = 1e-9  # eigenvalues below this share of the largest count as that much


@dataclass(frozen=True)
class Basis:
    """``write`` (d', d) maps the source's stream to the ideal one, ``read`` (d, d') takes readers of normed streams.

    A folded reader W becomes W ``read``. ``gain`` is what norms over d' channels multiply by so that kept directions
    come out as large as they were: √(d ρ / d') with ρ the share of the normed stream's energy that is kept.
    ``kept_channels`` is None for a rotation. ``norm_ratio`` is rms(D h) / rms(h), the mean over tokens: ``read`` holds
    it, and a tied head, which cannot, leaves it to the last norm.
    """

    write: Tensor
    read: Tensor
    gain: float
    kept_channels: list[int] | None
    norm_ratio: float = 1.0

    @property
    def rotated(self) -> bool:
        return self.kept_channels is None

    @property
    def is_identity(self) -> bool:
        return not self.rotated and len(self.kept_channels) == self.write.shape[1]


@dataclass
class StreamStatistics:
    """What the basis is chosen from, summed over all places that read the stream; all (d, d) in float64.

    ``covariance`` sums C_i = E[x xᵀ] of what is read at place i, ``reading`` sums G_i / tr(G_i C_i) with G_i = WᵀW of
    its readers: how much each direction moves what is read, every place counting the same.
    """

    covariance: Tensor | float = 0.0
    reading: Tensor | float = 0.0

    def add(self, covariance: Tensor, reader_gram: Tensor) -> None:
        """One place that reads."""
        energy = float((covariance * reader_gram).sum())
        self.covariance = self.covariance + covariance
        if energy > 0:
            self.reading = self.reading + reader_gram / energy

    def describe(self, basis: Basis) -> dict[str, Any]:
        """For the lineage: the stream's effective rank, the share of its energy that is kept, and its spectrum.

        The spectrum is pairs of a direction's number, from the strongest, and its share of the energy, for at most
        ``SPECTRUM_POINTS`` evenly spaced directions.
        """
        kept = basis.gain**2 * basis.write.shape[0] / basis.write.shape[1]
        shares = torch.linalg.eigvalsh(self.covariance).flip(0).clamp(min=0) / self.covariance.trace()
        stride = -(-len(shares) // SPECTRUM_POINTS)
        spectrum = [[index, float(f"{shares[index]:.3g}")] for index in range(0, len(shares), stride)]
        rank = round(effective_rank(self.covariance), 2)
        return {"effective_rank": rank, "energy_kept": round(kept, 6), "spectrum": spectrum}


def rotate(statistics: StreamStatistics, keep: int, scale: Tensor | None = None, reader_aware: bool = True) -> Basis:
    """The ``keep`` directions that vary most and are read most.

    They are the first eigenvectors of the geometric mean C # G = C^½ (C^-½ G C^-½)^½ C^½ of the stream's covariance and
    the readers' Gram matrix; of C alone unless ``reader_aware``. ``scale`` is the diagonal of D; the statistics are
    then those of D h. FLOPs: about 50 d³.
    """
    covariance = statistics.covariance
    measure = covariance
    if reader_aware:
        identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        reading = statistics.reading / statistics.reading.trace() + 1e-6 * identity
        root, inverse_root = _power(covariance, 0.5), _power(covariance, -0.5)
        measure = root @ _power(inverse_root @ reading @ inverse_root, 0.5) @ root
    directions = torch.linalg.eigh((measure + measure.T) / 2)[1].flip(1)[:, :keep]
    return rotation_basis(directions, covariance, scale)


def rotation_basis(directions: Tensor, covariance: Tensor, scale: Tensor | None = None) -> Basis:
    """The basis of orthonormal ``directions`` (d, d')."""
    scale = torch.ones(len(directions), dtype=torch.float64, device=directions.device) if scale is None else scale
    scale = scale.double()
    # Norms over D h divide by rms(D h) where the source's divide by rms(h): readers take over the mean ratio.
    ratio = (covariance.trace() / (covariance.diagonal() / scale.square()).sum()).sqrt()
    write, read = (scale[:, None] * directions).T, ratio * directions / scale[:, None]
    share = float(((directions.T @ covariance) * directions.T).sum() / covariance.trace())
    return Basis(write.float().contiguous(), read.float().contiguous(), _gain(directions, share), None, float(ratio))


def select_channels(statistics: StreamStatistics, keep: int, by_elimination: bool = True) -> Basis:
    """The ``keep`` channels from which what is read can be refit best, by backward elimination or by energy."""
    choose = eliminate if by_elimination else rank_by_energy
    kept = choose(statistics.covariance, _power(statistics.reading, 0.5), keep)
    return selection_basis(kept, statistics.covariance)


def selection_basis(kept: list[int], covariance: Tensor) -> Basis:
    """The basis that selects the channels ``kept``."""
    directions = torch.eye(len(covariance), device=covariance.device)[:, kept]
    diagonal = covariance.diagonal()
    share = float(diagonal[kept].sum() / diagonal.sum())
    return Basis(directions.T.contiguous(), directions, _gain(directions, share), kept)


def identity_basis(size: int, device: str | torch.device = "cpu") -> Basis:
    """All channels as they are."""
    return selection_basis(list(range(size)), torch.eye(size, dtype=torch.float64, device=device))


def _gain(directions: Tensor, share: float) -> float:
    size, keep = directions.shape
    return math.sqrt(size * share / keep)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semidefinite matrix, eigenvalues floored."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=FLOOR * float(values.max())) ** exponent) @ vectors.T
