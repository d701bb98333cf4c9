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
    """E[x xᵀ], E[y xᵀ] and, with ``keep_targets``, E[y yᵀ], over tokens with inputs x and targets y.

    With ``center`` they are covariances about the means, for fits that have a bias. Everything is float64 on the device
    of the activations. Sums become moments in place when one is first read; nothing is added after that. Peak memory is
    that of the moments and, while adding, of one product in fp32.
    """

    center: bool = False
    keep_targets: bool = False
    count: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _origins: dict[str, Tensor] = field(default_factory=dict)
    _finished: bool = False

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds tokens: ``x`` (..., n) and ``y`` (..., m)."""
        assert not self._finished, "the moments have been read"
        x = x.reshape(-1, x.shape[-1]).float()
        y = None if y is None else y.reshape(-1, y.shape[-1]).float()
        for start in range(0, len(x), CHUNK_TOKENS):
            self._add_chunk(x[start : start + CHUNK_TOKENS], None if y is None else y[start : start + CHUNK_TOKENS])

    def _add_chunk(self, x: Tensor, y: Tensor | None) -> None:
        self.count += len(x)
        if self.center:
            x, y = self._shift("x", x), None if y is None else self._shift("y", y)
        self._add("xx", x.T @ x)
        self._add("x", x.double().sum(0))
        if y is not None:
            self._add("yx", y.T @ x)
            self._add("y", y.double().sum(0))
            if self.keep_targets:
                self._add("yy", y.T @ y)

    def _shift(self, name: str, values: Tensor) -> Tensor:
        """Less the first chunk's mean: in fp32, products of large means would drown the variances."""
        if name not in self._origins:
            self._origins[name] = values.mean(0)
        return values - self._origins[name]

    def _add(self, name: str, product: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(product)
        else:
            self._sums[name] = product.double()

    def _read(self, name: str) -> Tensor:
        if not self._finished:
            self._finished = True
            for total in self._sums.values():
                total.div_(self.count)
            for product, moment in self._sums.items() if self.center else ():
                if len(product) == 2:
                    moment.addr_(self._sums[product[0]], self._sums[product[1]], alpha=-1)
        return self._sums[name]

    @property
    def x_mean(self) -> Tensor:
        """(n,), or zeros without ``center``."""
        mean = self._read("x")
        return mean + self._origins["x"] if self.center else torch.zeros_like(mean)

    @property
    def y_mean(self) -> Tensor:
        """(m,), or zeros without ``center``."""
        mean = self._read("y")
        return mean + self._origins["y"] if self.center else torch.zeros_like(mean)

    @property
    def xx(self) -> Tensor:
        """E[x xᵀ], (n, n)."""
        return self._read("xx")

    @property
    def energy(self) -> Tensor:
        """E[x²] of every channel, (n,), about zero."""
        return self.xx.diagonal() + self.x_mean.square()

    @property
    def yx(self) -> Tensor:
        """E[y xᵀ], (m, n)."""
        return self._read("yx")

    @property
    def yy(self) -> Tensor:
        """E[y yᵀ], (m, m)."""
        return self._read("yy")


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
    """tr(C)² / |C|²: of how many equal directions this has the spread (the participation ratio); n² FLOPs."""
    return float(covariance.trace() ** 2 / covariance.norm().square().clamp(min=torch.finfo(torch.float64).tiny))
