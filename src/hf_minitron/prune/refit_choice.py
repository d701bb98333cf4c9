"""Which neurons, channels or heads refit keeps: backward elimination by what their loss costs after the rest is refit.

For inputs a with C = E[a aᵀ] and a map W, removing input j and refitting the others costs |W_j|² / [C⁻¹]_jj, where W
and C⁻¹ are those of the inputs that are left (optimal brain surgeon; Hassibi and Stork 1992). Both follow every removal
by a rank-one downdate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_minitron.prune.refit_solve import factorize

DAMPING = 1e-4  # of the mean of C's diagonal
BLOCK = 128  # removals between two updates of the whole matrices


def eliminate(covariance: Tensor, weight: Tensor, keep: int, block: int = BLOCK) -> list[int]:
    """Kept indices, ascending, of n inputs with ``covariance`` (n, n) that ``weight`` (m, n) reads.

    The order of removals is exactly that of the one-by-one algorithm; its downdates are gathered and applied
    ``block`` at a time as matrix products. FLOPs for r removals: 2 n³ to invert, 2 n² r for C⁻¹, 4 m n r for W, and
    2 n r · block for what is gathered; for n = 14336 and r = 5120 that is 9e12, not O(n⁴) = 4e16.
    """
    inverse = _damped_inverse(covariance)
    weight = weight.double().clone()
    alive = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    remaining = len(inverse) - keep
    while remaining > 0:
        count = min(block, remaining)
        _eliminate_block(inverse, weight, alive, count)
        remaining -= count
    return alive.nonzero().flatten().tolist()


def _eliminate_block(inverse: Tensor, weight: Tensor, alive: Tensor, count: int) -> None:
    """``count`` removals; ``inverse`` and ``weight`` are written once at the end."""
    diagonal, energy = inverse.diagonal().clone(), weight.square().sum(0)
    columns = torch.zeros(len(inverse), count, dtype=inverse.dtype, device=inverse.device)  # C⁻¹ −= columns columnsᵀ
    shares = torch.zeros_like(columns)  # W −= removed sharesᵀ
    removed = torch.zeros(len(weight), count, dtype=inverse.dtype, device=inverse.device)
    for step in range(count):
        cost = torch.where(alive, energy / diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny), torch.inf)
        index = int(cost.argmin())
        column = inverse[:, index] - columns[:, :step] @ columns[index, :step]
        gone = weight[:, index] - removed[:, :step] @ shares[index, :step]
        pivot = column[index].clamp(min=torch.finfo(column.dtype).tiny)
        share = column / pivot
        overlap = gone @ weight - (gone @ removed[:, :step]) @ shares[:, :step].T
        energy = (energy - 2 * share * overlap + share.square() * gone.square().sum()).clamp(min=0)
        columns[:, step], shares[:, step], removed[:, step] = column / pivot.sqrt(), share, gone
        diagonal = diagonal - columns[:, step].square()
        alive[index] = False
    inverse.addmm_(columns, columns.T, alpha=-1)  # in place: no third matrix of that size
    weight.addmm_(removed, shares.T, alpha=-1)


def eliminate_heads(
    covariance: Tensor, weight: Tensor, head_dim: int, heads_per_group: int, keep_groups: int, keep_per_group: int
) -> tuple[list[int], list[int]]:
    """Kept key/value groups and kept query heads, ascending, equally many heads in every kept group.

    ``covariance`` (q, q) is that of all heads' outputs and ``weight`` (m, q) reads them. Whole groups go first, one at
    a time, then heads out of the groups that have too many; a block of inputs J costs tr(W_J [C⁻¹]_JJ⁻¹ W_Jᵀ).
    """
    inverse, weight = _damped_inverse(covariance), weight.double().clone()
    heads = {head: torch.arange(head * head_dim, (head + 1) * head_dim) for head in range(len(inverse) // head_dim)}
    groups = {
        group: list(range(group * heads_per_group, (group + 1) * heads_per_group))
        for group in range(len(heads) // heads_per_group)
    }
    while len(groups) > keep_groups:
        blocks = {group: torch.cat([heads[head] for head in members]) for group, members in groups.items()}
        cheapest = min(blocks, key=lambda group: (_block_cost(inverse, weight, blocks[group]), group))
        _remove_block(inverse, weight, blocks[cheapest])
        del groups[cheapest]
    while crowded := [head for members in groups.values() if len(members) > keep_per_group for head in members]:
        cheapest = min(crowded, key=lambda head: (_block_cost(inverse, weight, heads[head]), head))
        _remove_block(inverse, weight, heads[cheapest])
        groups[cheapest // heads_per_group].remove(cheapest)
    return sorted(groups), sorted(head for members in groups.values() for head in members)


def rank_by_energy(covariance: Tensor, weight: Tensor, keep: int) -> list[int]:
    """The ``keep`` inputs with the most energy in what is read, E[a_j²] |W_j|²: elimination's ablation."""
    energy = covariance.diagonal() * weight.double().square().sum(0)
    return sorted(torch.sort(energy, descending=True, stable=True).indices[:keep].tolist())


def rank_heads_by_energy(
    covariance: Tensor, weight: Tensor, head_dim: int, heads_per_group: int, keep_groups: int, keep_per_group: int
) -> tuple[list[int], list[int]]:
    """Like ``eliminate_heads``, by the energy of each head's output."""
    energy = (covariance.diagonal() * weight.double().square().sum(0)).unflatten(0, (-1, head_dim)).sum(1)
    energy = energy.unflatten(0, (-1, heads_per_group))
    groups = sorted(_first(energy.sum(1), keep_groups))
    return groups, [g * heads_per_group + h for g in groups for h in sorted(_first(energy[g], keep_per_group))]


def _first(values: Tensor, keep: int) -> Sequence[int]:
    return torch.sort(values, descending=True, stable=True).indices[:keep].tolist()


def _damped_inverse(covariance: Tensor) -> Tensor:
    strength = DAMPING * float(covariance.diagonal().mean())
    factor = factorize(covariance.double(), strength or 1.0)
    return torch.cholesky_inverse(factor, out=factor)


def _block_cost(inverse: Tensor, weight: Tensor, block: Tensor) -> float:
    block = block.to(inverse.device)
    solved = torch.linalg.solve(inverse[block][:, block], weight[:, block].T)
    return float((solved * weight[:, block].T).sum())


def _remove_block(inverse: Tensor, weight: Tensor, block: Tensor) -> None:
    """Downdates in place; rows and columns of what is gone become those of the identity, its weights zero."""
    block = block.to(inverse.device)
    share = torch.linalg.solve(inverse[block][:, block], inverse[block])
    weight -= weight[:, block] @ share
    inverse -= inverse[:, block] @ share
    inverse[block, :], inverse[:, block] = 0, 0
    inverse[block, block] = 1
    weight[:, block] = 0
