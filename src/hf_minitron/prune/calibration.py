"""Calibration rows: packed token ids on which importance is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_minitron.data import load_text, pack_rows

NUM_SAMPLES = 1024  # P1 2.2 and P2 both use 1024 random samples
MAX_SEQUENCE_LENGTH = 4096  # tokens, where the model allows more


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
    limit = getattr(config, "max_position_embeddings", None) or MAX_SEQUENCE_LENGTH
    sequence_length = min(MAX_SEQUENCE_LENGTH, limit) if sequence_length is None else sequence_length
    if not 1 < sequence_length <= limit:
        raise ValueError(
            f"sequence_length={sequence_length}: the model takes 2 to {limit} tokens "
            "(max_position_embeddings). Choose a length in that range."
        )
    if num_samples < 1:
        raise ValueError(
            f"num_samples={num_samples}: at least one calibration row is needed. The papers use {NUM_SAMPLES}."
        )
    texts = load_text(source, **how_to_read)
    return pack_rows(texts, tokenizer, sequence_length, max_rows=num_samples, seed=seed)


def is_text_source(calibration: Any) -> bool:
    """Whether ``calibration`` names text to be tokenized, rather than being rows of token ids already."""
    return isinstance(calibration, str | Path) or "text" in (getattr(calibration, "column_names", None) or ())
