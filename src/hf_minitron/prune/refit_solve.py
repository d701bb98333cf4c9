"""Ridge regressions in closed form, pulled toward the sliced weights, and their errors on held-out rows.

    W = argmin E|W x + b − (T y + c)|² + λ |W − W₀|²  =  (T E[y xᵀ] + λ W₀) (E[x xᵀ] + λ I)⁻¹,   λ = ridge · mean E[x²]

with moments about the means, and b = T ȳ + c − W x̄, where there is a bias. With few tokens the result tends to the
prior W₀ instead of blowing up, and λ > 0 makes rank-deficient moments harmless. FLOPs: n³/3 for the Cholesky factor and
2 n² for each of the m rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_minitron.prune.refit_moments import CrossMoments, Evidence, effective_rank

RIDGE = 1e-2
ROWS = 4096  # of a map, solved and judged at a time


@dataclass(frozen=True)
class Linear:
    """A linear map: ``weight`` (out, in), and ``bias`` (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, indices: Tensor | None) -> Linear:
        """The map to some of its outputs; None means all."""
        if indices is None:
            return self
        indices = indices.to(self.weight.device)
        return Linear(self.weight[indices], None if self.bias is None else self.bias[indices])


@dataclass(frozen=True)
class Fit:
    """A solution and its mean squared error on held-out rows, relative to the target's, beside that of slicing.

    ``before`` and ``after`` are None where no rows were held out. ``fell_back`` says that the sliced weights were kept,
    since they were better there. ``effective_rank`` is that of the inputs.
    """

    linear: Linear
    before: float | None
    after: float | None
    fell_back: bool
    effective_rank: float

    def as_dict(self) -> dict[str, float | bool | None]:
        """For the lineage."""
        found = {"before": self.before, "after": self.after, "effective_rank": round(self.effective_rank, 1)}
        return found | ({"fell_back": True} if self.fell_back else {})


def fit_linear(
    evidence: Evidence,
    prior: Linear,
    teacher: Linear | None = None,
    *,
    sliced: Linear | None = None,
    ridge: float = RIDGE,
    guard: bool = True,
) -> Fit:
    """The map from x to what ``teacher`` makes of y (None: to y itself), pulled toward ``prior``.

    With ``guard`` it is ``sliced`` (None: the prior), where that is better on held-out rows. The result has a bias if
    the prior has one; the evidence is then to be centred.
    """
    sliced = sliced or prior
    found = solve_ridge(evidence.fitted, prior, teacher, ridge)
    rank = effective_rank(evidence.fitted.xx)
    if evidence.held_out.count == 0:
        return Fit(found, None, None, False, rank)
    scale = _target_energy(evidence.held_out, teacher)
    before = mean_squared_error(evidence.held_out, sliced, teacher) / scale
    after = mean_squared_error(evidence.held_out, found, teacher) / scale
    if guard and not after <= before:
        return Fit(sliced, before, before, True, rank)
    return Fit(found, before, after, False, rank)


def solve_ridge(moments: CrossMoments, prior: Linear, teacher: Linear | None, ridge: float) -> Linear:
    """The formula above, in float64, returned in the prior's dtype; rows are solved ``ROWS`` at a time."""
    strength = ridge * float(moments.xx.diagonal().mean())
    if not strength > 0:  # an input that is always zero: nothing to learn
        return prior
    factor = factorize(moments.xx, strength)
    weight = torch.empty_like(prior.weight)
    for rows in _row_blocks(prior):
        wanted = _cross(moments, teacher, rows) + strength * prior.weight[rows].double()
        weight[rows] = torch.cholesky_solve(wanted.T, factor).T.to(weight.dtype)
    if prior.bias is None:
        return Linear(weight)
    mean = _apply(teacher, moments.y_mean)
    return Linear(weight, (mean - weight.double() @ moments.x_mean).to(prior.bias.dtype))


def compensate(covariance: Tensor, weight: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """``weight`` (m, n) on the inputs ``kept`` alone, (m, kept), with what can be told of the others from them added.

    W C[:, K] (C[K, K] + λ I)⁻¹, pulled toward the slice W[:, K].
    """
    kept = kept.to(covariance.device)
    strength = ridge * float(covariance.diagonal()[kept].mean())
    if not strength > 0:
        return weight[:, kept]
    wanted = weight.double() @ covariance[:, kept] + strength * weight[:, kept].double()
    factor = factorize(covariance[kept][:, kept], strength)
    return torch.cholesky_solve(wanted.T, factor).T.to(weight.dtype)


def mean_squared_error(moments: CrossMoments, linear: Linear, teacher: Linear | None) -> float:
    """E|W x + b − (T y + c)|², summed over outputs; the moments are to hold y yᵀ."""
    spread = _target_spread(moments, teacher)
    for rows in _row_blocks(linear):
        weight = linear.weight[rows].double()
        spread = spread + ((weight @ moments.xx - 2 * _cross(moments, teacher, rows)) * weight).sum()
    shift = _apply(linear, moments.x_mean) - _apply(teacher, moments.y_mean)
    return max(float(spread + shift.square().sum()), 0.0)


def factorize(covariance: Tensor, strength: float) -> Tensor:
    """The Cholesky factor of ``covariance + strength · I``; rounding below zero is met by ten times the strength."""
    failed = torch.empty((), dtype=torch.int32, device=covariance.device)
    for _ in range(12):
        factor = covariance.clone()
        factor.diagonal().add_(strength)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not int(failed):
            return factor
        strength *= 10
    raise ValueError(
        "the moments of the calibration activations are not positive semidefinite: they hold NaN or Inf. Check the "
        "weights and the calibration rows."
    )


def _row_blocks(linear: Linear) -> list[slice]:
    """Rows of a map that may be as many as a vocabulary: float64 copies of all at once would take gigabytes."""
    return [slice(start, start + ROWS) for start in range(0, len(linear.weight), ROWS)]


def _cross(moments: CrossMoments, teacher: Linear | None, rows: slice) -> Tensor:
    """Rows of E[(T y) xᵀ]."""
    return moments.yx[rows] if teacher is None else teacher.weight[rows].double() @ moments.yx


def _apply(linear: Linear | None, mean: Tensor) -> Tensor:
    if linear is None:
        return mean
    found = torch.cat([linear.weight[rows].double() @ mean for rows in _row_blocks(linear)])
    return found if linear.bias is None else found + linear.bias.double()


def _target_spread(moments: CrossMoments, teacher: Linear | None) -> Tensor:
    if teacher is None:
        return moments.yy.diagonal().sum()
    blocks = (teacher.weight[rows].double() for rows in _row_blocks(teacher))
    return sum(((weight @ moments.yy) * weight).sum() for weight in blocks)


def _target_energy(moments: CrossMoments, teacher: Linear | None) -> float:
    return max(float(_target_spread(moments, teacher)), torch.finfo(torch.float64).tiny)
