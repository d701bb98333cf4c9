"""Preference pairs with rewards: where the rewards are, and what is wrong with them, found before any training."""

from __future__ import annotations

import logging
import math
from typing import Any

from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

REWARD_COLUMNS = ("chosen_reward", "rejected_reward")


def name_rewards(dataset: Dataset | IterableDataset, columns: tuple[str, str], name: str) -> Dataset | IterableDataset:
    """The data set with its two reward columns under the names of `REWARD_COLUMNS`."""
    there = dataset.column_names or list(next(iter(dataset), {}))
    missing = [column for column in columns if column not in there]
    if missing:
        raise ValueError(
            f"{name} has no column {' or '.join(missing)}; it has {', '.join(there)}. Name the columns by "
            "--chosen-reward-column and --rejected-reward-column, or add them by label_rewards."
        )
    for column, wanted in zip(columns, REWARD_COLUMNS, strict=True):
        if column != wanted:
            dataset = (dataset.remove_columns(wanted) if wanted in there else dataset).rename_column(column, wanted)
    return dataset


def check_pairs(dataset: Dataset | IterableDataset, name: str, drop_inverted: bool) -> Dataset | IterableDataset:
    """The pairs that can teach something. Raises ValueError for a reward that is not a finite number.

    Left out are pairs of two equal responses, whose margin is 0 whatever the policy, and with `drop_inverted` those
    whose rejected response has the higher reward. Both are counted and reported. Of streams nothing is known ahead:
    they are filtered as they come, and their batches are checked.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda row: not _is_equal(row) and not (drop_inverted and _is_inverted(row)))
    rewards = {column: dataset[column][:] for column in REWARD_COLUMNS}
    for column, values in rewards.items():
        for row, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"{name}: {column} of row {row} is {value!r}, and rewards are finite numbers. Label the data "
                    "again, or leave such rows out."
                )
    inverted = [low > high for high, low in zip(*rewards.values(), strict=True)]
    equal = [_is_equal(row) for row in dataset.select_columns(["chosen", "rejected"])]
    if count := sum(inverted):
        done = "they are left out" if drop_inverted else "they pull the other way; --drop-inverted leaves them out"
        logger.warning("%s: in %d of %d pairs the rejected response has the higher reward: %s.",
                       *(name, count, len(dataset), done))  # fmt: skip
    if count := sum(equal):
        logger.warning("%s: %d of %d pairs have two equal responses and are left out.", name, count, len(dataset))
    kept = [row for row in range(len(dataset)) if not equal[row] and not (drop_inverted and inverted[row])]
    if not kept:
        raise ValueError(f"{name}: none of its {len(dataset)} pairs is left to learn from.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _is_equal(row: dict[str, Any]) -> bool:
    return row["chosen"] == row["rejected"]


def _is_inverted(row: dict[str, Any]) -> bool:
    return row["rejected_reward"] > row["chosen_reward"]
