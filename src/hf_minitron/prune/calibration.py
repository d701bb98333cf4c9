"""Calibration rows: packed token ids on which importance is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_minitron.data import check_row_length, describe_source, fingerprint_rows, load_text, pack_rows

WHICH_TEXT = ("config_name", "split", "text_column", "revision", "token")  # options of load_text that pick the text
NUM_SAMPLES = 1024  # P1 2.2 and P2 both use 1024 random samples


def read_calibration(
    calibration: Any,
    get_tokenizer: Callable[[], PreTrainedTokenizerBase],
    config: PreTrainedConfig,
    how_to_read: dict[str, Any],
) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows of token ids from text or rows, and what the lineage says of them; rows need no tokenizer."""
    described = {}
    if is_text_source(calibration):
        which = {key: how_to_read[key] for key in WHICH_TEXT if key in how_to_read}
        described = {"calibration": describe_source(calibration, **which) | {"seed": how_to_read.get("seed", 0)}}
        calibration = load_calibration(calibration, get_tokenizer(), config, **how_to_read)
    rows = check_rows(calibration, config.vocab_size)
    return rows, {"fingerprint": fingerprint_rows(Dataset.from_dict({"input_ids": rows})), **described}


def load_calibration(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    num_samples: int = NUM_SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    **how_to_read: Any,
) -> Dataset:
    """Rows of exactly ``sequence_length`` token ids in the column ``input_ids``, at most ``num_samples`` at random.

    Rows are packed, never padded: padding would enter the importance of every channel. ``source`` and ``how_to_read``
    are those of ``load_text``. Fewer rows than asked for are used as they are; none at all is an error.
    """
    length = check_row_length(config, sequence_length, "sequence_length")
    if num_samples < 1:
        raise ValueError(
            f"num_samples={num_samples}: at least one calibration row is needed. The papers use {NUM_SAMPLES}."
        )
    texts = load_text(source, **how_to_read)
    return pack_rows(texts, tokenizer, length, max_rows=num_samples, seed=seed)


def is_text_source(calibration: Any) -> bool:
    """Whether ``calibration`` names text to be tokenized, rather than being rows of token ids already."""
    return isinstance(calibration, str | Path) or "text" in (getattr(calibration, "column_names", None) or ())


def check_rows(calibration: Any, vocab_size: int) -> list[list[int]]:
    """Rows of token ids, checked: of equal length, not empty, inside the vocabulary."""
    rows = calibration["input_ids"] if hasattr(calibration, "column_names") else calibration
    rows = [row.tolist() if isinstance(row, torch.Tensor) else row for row in rows]
    if wrong := [
        row for row in rows if not isinstance(row, list | tuple) or any(type(token) is not int for token in row)
    ]:
        raise TypeError(
            f"a calibration row is {str(wrong[0])[:40]!r}: each must be a list of token ids. Give text as a "
            "file, folder, Hub id or a data set with a text column."
        )
    lengths = {len(row) for row in rows}
    if not rows or lengths == {0}:
        raise ValueError(
            "calibration is empty: importance needs at least one row of tokens. Give text or rows of token ids."
        )
    if len(lengths) > 1:
        raise ValueError(
            f"calibration rows have {min(lengths)} to {max(lengths)} tokens: padding would enter the scores, "
            "so rows must be equally long. Pack them."
        )
    smallest, largest = min(map(min, rows)), max(map(max, rows))
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"calibration holds token {smallest if smallest < 0 else largest}, the model has vocab_size={vocab_size}: "
            f"they were made by another tokenizer. Use the model's own."
        )
    return rows
