"""Streamed mixes: several sources of text with weights, packed into rows of token ids while a model trains on them.

``open_mix`` opens sources as a `RowStream`; its `RowReader`s give rows and know their place, so that a stopped run goes
on at the exact row. Weights are shares of *tokens*: the next document is always drawn from the source that has given
the fewest tokens for its weight, so that after every document each source is within one document of its share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_minitron.data import SHUFFLE_BUFFER, describe_source, load_text
from hf_minitron.row_stream import RowStream, Stopping

MAX_HASHED_BYTES = 1 << 30  # of a source's files, for the lineage: about two seconds
MAX_PARTS = 64  # of a data set in memory, for as many readers


@dataclass(frozen=True)
class MixSource:
    """One source, as `load_text` takes it, and its weight: its share of the tokens, relative to the others'."""

    source: str | os.PathLike | Dataset | IterableDataset
    weight: float = 1.0
    config_name: str | None = None
    split: str = "train"
    text_column: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self.source).__name__ if isinstance(self.source, Dataset | IterableDataset) else str(self.source)

    @property
    def how(self) -> dict[str, Any]:
        """How it is read, for `load_text` and `describe_source`."""
        return {name: getattr(self, name) for name in ("config_name", "split", "text_column", "revision")}


def read_mix(path: str | os.PathLike) -> list[MixSource]:
    """The sources that a YAML or JSON file lists: mappings of `MixSource`'s fields, of which only `source` must be.

    Raises FileNotFoundError, and ValueError naming the entry that is wrong.
    """
    file = Path(path).expanduser()
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML too
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path} holds no list of sources. Write one entry for each, such as "
            "'- {source: owner/name, weight: 0.7}'."
        )
    known = [option.name for option in fields(MixSource)]
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ValueError(f"{path}: entry {number}, {entry!r}, does not name its source. Add 'source: ID or PATH'.")
        if unknown := [key for key in entry if key not in known]:
            raise ValueError(f"{path}: entry {number} has {unknown[0]!r}, but only {', '.join(known)} are known.")
    return check_mix([MixSource(**entry) for entry in entries])


def check_mix(sources: Sequence[MixSource]) -> list[MixSource]:
    """The sources, if their weights are positive numbers and none comes twice. Nothing is opened."""
    if not sources:
        raise ValueError("A mix of no sources has no text: give at least one.")
    seen = set()
    for source in sources:
        weight = source.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"weight={weight!r} of {source.name}: a weight is a source's share of the tokens, relative to the "
                "others'. Give a positive number, or leave the source out."
            )
        passed_in = isinstance(source.source, Dataset | IterableDataset)
        key = (id(source.source) if passed_in else source.name, source.config_name, source.split)
        if key in seen:
            raise ValueError(f"{source.name} ({source.split}) comes twice: name it once, with the sum of weights.")
        seen.add(key)
    return list(sources)


def open_mix(
    sources: Sequence[MixSource],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    seed: int = 0,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    epochs: int | None = None,
    stopping: Stopping = "first",
    token: str | bool | None = None,
) -> RowStream:
    """Opens sources as a stream of rows; only their first documents are read here.

    Rows have exactly ``sequence_length`` ids and are packed as by `pack_rows`; of one source without shuffling they are
    the same rows. Files are shuffled, and documents within blocks of ``shuffle_buffer``; 0 keeps every source's order.

    A source that ends begins again, shuffled anew, ``epochs`` times in all, by default without end. When one has ended,
    the stream ends (``stopping="first"``) or goes on with the others until the last has ended ("all"), at the weights
    they have relative to each other. The tokens after the last full row are lost then.

    A source on the Hub is pinned to the commit it has now. A data set that is passed in must not shuffle itself by a
    buffer, whose content would be lost when reading goes on later.

    Raises ValueError for weights, options and sources without text, and for a tokenizer without eos, as nothing would
    part documents; FileNotFoundError for a source that is not there.
    """
    check_mix(sources)
    check_stream_options(shuffle_buffer, epochs, stopping)
    if sequence_length < 2:
        raise ValueError(f"{sequence_length=}: a row needs 2 tokens at least, one to predict the other.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos token, so that packed documents would run into each other. Set "
            "tokenizer.eos_token, or save it with the model."
        )
    opened, facts = [], []
    for source in sources:
        known = describe_source(source.source, **source.how, token=token, max_hashed_bytes=MAX_HASHED_BYTES)
        how = source.how | ({"revision": known["commit"]} if "commit" in known else {})
        texts = load_text(source.source, **how, streaming=True, token=token)
        if isinstance(texts, Dataset):
            texts = texts.to_iterable_dataset(num_shards=min(len(texts), MAX_PARTS))
        opened.append((source.name, texts))
        facts.append(known)
    return RowStream(
        opened,
        [source.weight / sum(source.weight for source in sources) for source in sources],
        tokenizer,
        sequence_length,
        facts,
        seed,
        shuffle_buffer,
        epochs,
        stopping,
    )


def check_stream_options(shuffle_buffer: int, epochs: int | None, stopping: str) -> None:
    """Raises ValueError for values, and a combination, that mean nothing."""
    if shuffle_buffer < 0 or (epochs is not None and epochs < 1):
        raise ValueError(f"{shuffle_buffer=}, {epochs=}: use 0 or more documents, and 1 epoch or more, or None.")
    if stopping not in get_args(Stopping):
        raise ValueError(f"{stopping=}: a mix ends with its first source that ends, or with all. Use first or all.")
    if stopping == "all" and epochs is None:
        raise ValueError(
            "stopping=all says what happens when sources end, but without a number of epochs they begin again without "
            "end. Give one, or leave stopping out."
        )
