"""Second moments of calibration activations for refit: what every solve and every choice is computed from.

Products are taken in fp32 over at most ``CHUNK_TOKENS`` tokens and summed in float64, so that neither the number of
tokens nor how they are batched matters (1e-5). Cost: 2 n² FLOPs a token for n channels, 2 n m more for the products
with m targets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_TOKENS = 4096


@dataclass
class CrossMoments:
    """Sums over tokens of x xᵀ, y xᵀ and, with ``keep_targets``, y yᵀ, for inputs x and targets y.

    With ``center`` the covariances are those about the means, for fits that have a bias. Everything is float64 on the
    device of the activations.
    """

    center: bool = False
    keep_targets: bool = False
    count: int = 0
    _xx: Tensor | float = 0.0
    _yx: Tensor | float = 0.0
    _yy: Tensor | float = 0.0
    _x: Tensor | float = 0.0
    _y: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds tokens: ``x`` (..., n) and ``y`` (..., m)."""
        x = x.reshape(-1, x.shape[-1]).float()
        y = None if y is None else y.reshape(-1, y.shape[-1]).float()
        for start in range(0, len(x), CHUNK_TOKENS):
            self._add_chunk(x[start : start + CHUNK_TOKENS], None if y is None else y[start : start + CHUNK_TOKENS])

    def _add_chunk(self, x: Tensor, y: Tensor | None) -> None:
        self._xx = self._xx + (x.T @ x).double()
        self._x = self._x + x.double().sum(0)
        self.count += len(x)
        if y is not None:
            self._yx = self._yx + (y.T @ x).double()
            self._y = self._y + y.double().sum(0)
            if self.keep_targets:
                self._yy = self._yy + (y.T @ y).double()

    @property
    def x_mean(self) -> Tensor:
        """(n,), or zeros without ``center``."""
        return self._x / self.count if self.center else torch.zeros_like(self._x)

    @property
    def y_mean(self) -> Tensor:
        """(m,), or zeros without ``center``."""
        return self._y / self.count if self.center else torch.zeros_like(self._y)

    @property
    def xx(self) -> Tensor:
        """E[x xᵀ], (n, n)."""
        return self._xx / self.count - torch.outer(self.x_mean, self.x_mean)

    @property
    def energy(self) -> Tensor:
        """E[x²] of every channel, (n,), about zero."""
        return self._xx.diagonal() / self.count

    @property
    def yx(self) -> Tensor:
        """E[y xᵀ], (m, n)."""
        return self._yx / self.count - torch.outer(self.y_mean, self.x_mean)

    @property
    def yy(self) -> Tensor:
        """E[y yᵀ], (m, m)."""
        return self._yy / self.count - torch.outer(self.y_mean, self.y_mean)


@dataclass
class Evidence:
    """Moments of the rows that are fitted and, apart from them, of the rows that judge the fit."""

    center: bool = False
    fitted: CrossMoments = field(init=False)
    held_out: CrossMoments = field(init=False)

    def __post_init__(self) -> None:
        self.fitted = CrossMoments(self.center)
        self.held_out = CrossMoments(self.center, keep_targets=True)

    def add(self, x: Tensor, y: Tensor | None = None, held_out: bool = False) -> None:
        """Adds tokens to one of the two."""
        (self.held_out if held_out else self.fitted).add(x, y)


class MomentsFingerprint:
    """A digest of all moments that a refit was computed from; the same on the same machine for the same rows."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, moments: CrossMoments) -> None:
        """Takes in the diagonal of E[x xᵀ], rounded to fp32."""
        self._digest.update(moments.xx.diagonal().float().cpu().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def effective_rank(covariance: Tensor) -> float:
    """exp of the entropy of the eigenvalues' shares: of how many equal directions this has the spread."""
    shares = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))
