"""Calibration rows: packed token ids on which importance is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_minitron.data import check_row_length, load_text, pack_rows

NUM_SAMPLES = 1024  # P1 2.2 and P2 both use 1024 random samples


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
