"""What a student's lineage says about how to train it: one that was refit wants a lower learning rate."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from hf_minitron.lineage import read_lineage

logger = logging.getLogger(__name__)


def log_advice(folder: str | Path, learning_rate: float) -> None:
    """Says which learning rate a student that was refit, and not trained since, probably wants; changes nothing."""
    stages = read_lineage(folder)
    if not stages or stages[-1].get("stage") != "prune":
        return
    share = gap_share(stages[-1].get("settings", {}))
    if share is None:
        return
    factor = learning_rate_factor(share)
    logger.info(
        "the student was refit: on held-out calibration rows its gap to the source is %.2f of plain slicing's. In "
        "docs/refit.md's measurements such students did best at about %.2g of the learning rate that a sliced one "
        "wants; a higher one undoes the head start. If learning_rate=%g was chosen for sliced students, try %.2g.",
        *(share, factor, learning_rate, factor * learning_rate),
    )


def gap_share(settings: dict[str, Any]) -> float | None:
    """The refit model's gap to its source as a share of the sliced one's, between 0 and 1; None if that is not known.

    ``settings`` are those of a ``prune`` stage; the losses are those on held-out calibration rows.
    """
    losses = settings.get("held_out_loss", {})
    if (
        settings.get("method") != "refit"
        or settings.get("fell_back")
        or not {"refit", "sliced", "source"} <= set(losses)
    ):
        return None
    gap = losses["sliced"] - losses["source"]
    return min(max((losses["refit"] - losses["source"]) / gap, 0.0), 1.0) if gap > 0 else None


def learning_rate_factor(share: float) -> float:
    """0.7 √share, but at least a tenth: the less is left to repair, the smaller the steps.

    By eye through the best rates on four models, in benchmarks/refit.py and the prototypes, tried a factor of 2 or 2.5
    apart (docs/refit.md).
    """
    return max(0.7 * math.sqrt(share), 0.1)
