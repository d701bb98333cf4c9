"""Data of fine-tuning and alignment: records in TRL's standard formats, found wrong before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import is_conversational

from hf_minitron.data import describe_source, held_out_split, load_records


@dataclass(frozen=True)
class Records:
    """Rows as they are stored, and what the lineage says of them."""

    rows: Dataset
    facts: dict[str, Any]

    @property
    def conversational(self) -> bool:
        """Whether rows hold messages instead of texts."""
        return is_conversational(self.rows[0])


def load_train_records(arguments: Any, seed: int) -> Records:
    """The records to train on: all, or `max_train_rows` of them at random."""
    where = {"config_name": arguments.dataset_config, "split": arguments.dataset_split}
    return _load(arguments.dataset, where, arguments.max_train_rows, seed)


def load_held_out_records(arguments: Any) -> Records | None:
    """The records to evaluate on, at most `max_eval_rows` at random, the same ones whatever the run's seed."""
    if arguments.eval_dataset is None:
        return None
    where = {"split": held_out_split(arguments)}
    where["config_name"] = arguments.dataset_config if arguments.eval_dataset == arguments.dataset else None
    return _load(arguments.eval_dataset, where, arguments.max_eval_rows, 0)


def check_lessons(rows: Dataset, name: str) -> str:
    """Which of TRL's formats for fine-tuning rows have: "messages" or "completion".

    Raises ValueError for other columns, and for a row without any words of the assistant's to learn from.
    """
    columns = rows.column_names
    if "messages" in columns:
        for index, messages in enumerate(rows["messages"]):
            if not any(message["role"] == "assistant" and message["content"] for message in messages or ()):
                raise ValueError(
                    f"{name}: row {index} has no message of an assistant: there is nothing to learn in it."
                )
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        for index, completion in enumerate(rows["completion"]):
            if not completion:
                raise ValueError(f"{name}: row {index} has no completion: there is nothing to learn in it.")
        return "completion"
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}. Fine-tuning reads messages (a list of role and content), or "
        "prompt and completion (texts, or such lists): rename or convert them."
    )


def _load(source: str, where: dict[str, Any], most: int | None, seed: int) -> Records:
    rows = load_records(source, **where, streaming=False)
    if not len(rows):
        raise ValueError(f"{source} has no rows: there is nothing to read.")
    if most is not None and most < len(rows):
        rows = rows.shuffle(seed=seed).select(range(most))
    return Records(rows, describe_source(source, **where) | {"num_rows": len(rows)})
