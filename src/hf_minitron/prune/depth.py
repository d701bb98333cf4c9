"""Which layers can go: what a model loses when one layer or a block of contiguous ones is removed (P1 2.2, P2 "Depth").

Three metrics of the damage, all larger when the layers matter more:

    block_importance   1 − E[cos(input, output)] of the block: 0 if it changes nothing, 2 if it negates (P1 2.2)
    lm_loss            rise of the loss on calibration rows without the block, nats per token (P1 2.2)
    accuracy           fall of a multiple-choice task's accuracy without the block (P2; there it is Winogrande)

P1 is arXiv 2407.14679, P2 is arXiv 2408.11796. P2 drops a contiguous block chosen by accuracy: scattered layers chosen
one by one gave a better LM loss and chance accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_minitron.prune.scores import ImportanceScores, Moments

METRICS = ("block_importance", "lm_loss", "accuracy")
PATTERNS = ("contiguous", "scattered")


@dataclass(frozen=True)
class Removal:
    """What is lost without layers ``start`` to ``start + num_dropped − 1``, for every start (L − num_dropped + 1,).

    ``damage`` is against ``intact``, the whole model's value, sample by sample; ``standard_error`` is that of the
    damage over samples (rows or questions), NaN for one.
    """

    metric: str
    num_dropped: int
    damage: Tensor
    standard_error: Tensor
    intact: float

    @property
    def best_start(self) -> int:
        """Where the block begins that is missed least; of equal ones the last, so that lower layers stay."""
        return int((self.damage == self.damage.min()).nonzero().max())


def removal_key(metric: str, num_dropped: int) -> str:
    """Under which name a scan stands in the moments of ``ImportanceScores``."""
    return f"removal.{metric}.{num_dropped}"


def read_removal(scores: ImportanceScores | None, metric: str, num_dropped: int) -> Removal:
    """A scan out of the scores; single layers by block importance are part of every scoring pass."""
    moments = {} if scores is None else scores.moments
    found = moments.get(removal_key(metric, num_dropped))
    if found is not None:
        error = _standard_error(found)
        return Removal(metric, num_dropped, found.mean.cpu()[:-1], error[:-1], float(found.mean[-1]))
    if (metric, num_dropped) == ("block_importance", 1) and "layers.0" in moments:
        error = torch.cat([_standard_error(moments[f"layers.{layer}"]) for layer in range(len(scores.layers))])
        return Removal(metric, 1, scores.layers.double(), error, 0.0)
    what = "single layers" if num_dropped == 1 else f"blocks of {num_dropped} layers"
    raise ValueError(
        f"num_hidden_layers shrinks, which needs {metric} without {what}. Call scan_layers(..., "
        f"num_dropped={num_dropped}, metric={metric!r}) first, load scores that have it, or give drop_layers."
    )


def list_removals(scores: ImportanceScores) -> list[Removal]:
    """All scans that the scores hold, by metric and number of layers."""
    keys = [key.split(".") for key in scores.moments if key.startswith("removal.")]
    found = sorted((METRICS.index(metric), int(num_dropped)) for _, metric, num_dropped in keys)
    return [read_removal(scores, METRICS[metric], num_dropped) for metric, num_dropped in found]


def choose_layers(scores: ImportanceScores | None, metric: str, pattern: str, num_layers: int, keep: int) -> list[int]:
    """The layers that stay, ascending: all but the block, or the single layers, that are missed least.

    Ties keep the lower layer. 32 → 16 by P2's rule keeps 0–14 and 31 where removing 15–30 hurts least.
    """
    num_dropped = num_layers - keep
    removal = read_removal(scores, metric, num_dropped if pattern == "contiguous" else 1)
    if len(removal.damage) != num_layers - removal.num_dropped + 1:
        raise ValueError(
            f"the scan saw a model of {len(removal.damage) + removal.num_dropped - 1} layers, this one has "
            f"{num_layers}: it belongs to another model. Scan this one."
        )
    if pattern == "contiguous":
        start = removal.best_start
        return [layer for layer in range(num_layers) if not start <= layer < start + num_dropped]
    order = torch.sort(removal.damage, descending=True, stable=True).indices
    return sorted(order[:keep].tolist())


def check_dropped_layers(drop_layers: Sequence[int], num_layers: int) -> list[int]:
    """The layers to drop by hand, ascending; refused when out of range, repeated, or all there are."""
    dropped = list(drop_layers)
    wrong = [layer for layer in dropped if type(layer) is not int or not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(f"drop_layers={dropped}: {wrong[0]!r} is no layer, they count from 0 to {num_layers - 1}.")
    repeated = sorted({layer for layer in dropped if dropped.count(layer) > 1})
    if repeated:
        raise ValueError(f"drop_layers={dropped} names layer {repeated[0]} more than once. Name each layer once.")
    if len(dropped) == num_layers:
        raise ValueError(f"drop_layers names all {num_layers} layers: nothing would be left. Keep at least one.")
    return sorted(dropped)


def check_num_dropped(num_dropped: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Lengths of blocks to scan, ascending, each at least 1 and fewer than the model's layers."""
    lengths = (num_dropped,) if isinstance(num_dropped, int) else tuple(num_dropped)
    if not lengths or any(type(n) is not int or not 1 <= n < num_layers for n in lengths):
        raise ValueError(f"num_dropped={num_dropped}: of {num_layers} layers between 1 and {num_layers - 1} can go.")
    return tuple(sorted(set(lengths)))


def check_scan_metric(metric: str, allowed: Sequence[str] = METRICS) -> None:
    """One of the metrics of damage."""
    if metric not in allowed:
        raise ValueError(f"metric={metric!r} is unknown here. Use one of {', '.join(allowed)}.")


def _standard_error(moments: Moments) -> Tensor:
    """Of the mean over samples; NaN for a single one."""
    if moments.count < 2:
        return torch.full_like(moments.mean.cpu(), math.nan)
    return (moments.deviation.cpu().clamp_min(0) / (moments.count - 1) / moments.count).sqrt()
