"""Rows of token ids from a streamed mix: drawn from sources by weight, packed, and resumed at the exact row."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_minitron.document_reader import DocumentReader, ReadingOrder

logger = logging.getLogger(__name__)

Stopping = Literal["first", "all"]


@dataclass
class RowStream(torch.utils.data.IterableDataset):
    """Rows `{"input_ids": int32 [sequence_length]}` of a mix, made by `open_mix`; as an iterable, those of one reader.

    Under several readers (processes times workers of a data loader) each reads its own documents and packs its own
    rows; the rows depend on the number of readers, and are the same whenever that is the same.
    """

    texts: list[tuple[str, IterableDataset]]
    weights: list[float]
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    facts: list[dict[str, Any]] = field(repr=False)
    seed: int
    shuffle_buffer: int
    epochs: int | None
    stopping: Stopping

    def read(self, index: int = 0, count: int = 1, state: dict[str, Any] | None = None) -> RowReader:
        """The rows of reader ``index`` of ``count``, from their begin or from where a reader's ``state`` was taken."""
        readers = []
        for number, (name, texts) in enumerate(self.texts):
            order = ReadingOrder((self.seed, number), self.shuffle_buffer, self.epochs)
            readers.append(DocumentReader(name, texts, self.tokenizer, order, index, count))
        reader = RowReader(readers, self.weights, self.sequence_length, self.stopping)
        if state is not None:
            reader.load_state_dict(state)
        return reader

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = torch.utils.data.get_worker_info()
        return self.read() if worker is None else self.read(worker.id, worker.num_workers)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a state to mean the same place, as plain JSON values."""
        names = ("sequence_length", "seed", "shuffle_buffer", "epochs", "stopping")
        return {"sources": self.facts, "weights": self.weights} | {name: getattr(self, name) for name in names}

    def describe(self, states: Sequence[dict[str, Any] | None] = ()) -> dict[str, Any]:
        """For the lineage: sources, weights, options and, given the states of all readers, what was read so far.

        ``num_tokens`` of each source are those in rows that were given out; ``fingerprint`` is the sha256 of the
        readers' own fingerprints in their order. An epoch counts once it has begun.
        """
        facts = [source | {"weight": round(weight, 6)} for source, weight in zip(self.facts, self.weights, strict=True)]
        told = {"kind": "stream", "sources": facts, "shuffle_buffer": self.shuffle_buffer, "epochs": self.epochs}
        told |= {"stopping": None if self.epochs is None else self.stopping}
        known = [state for state in states if state is not None]
        if known:
            for number, source in enumerate(facts):
                source["num_tokens"] = sum(tokens_given_out(state)[number] for state in known)
                source["epochs_begun"] = max(state["sources"][number]["epoch"] for state in known) + 1
            digests = "".join(state["fingerprint"] for state in known)
            told |= {"num_rows": sum(state["num_rows"] for state in known), "num_readers": len(states)}
            told["fingerprint"] = hashlib.sha256(digests.encode()).hexdigest()
        return {key: value for key, value in told.items() if value is not None}


class RowReader:
    """An iterator over rows that knows its place: `state_dict` after a row leads `load_state_dict` to the next one.

    A state is small, because it holds no text: it is the place of the last document that was drawn, and how many of its
    tokens are in rows already. ``fingerprint`` chains the rows: sha256 of the one before and the row as int32.
    """

    def __init__(self, readers: list[DocumentReader], weights: list[float], length: int, stopping: Stopping) -> None:
        self.readers, self.weights, self.length, self.stopping = readers, weights, length, stopping
        self.num_rows, self.fingerprint = 0, ""
        self._running = list(range(len(readers)))
        self._row: list[int] = []
        self._document: list[int] = []
        self._offset = 0
        self._before: tuple[int, dict[str, Any]] | None = None  # the last draw: its source, and where that stood

    def __iter__(self) -> RowReader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            piece = self._document[self._offset : self._offset + self.length - len(self._row)]
            self._row += piece
            self._offset += len(piece)
            if len(self._row) == self.length:
                break
            if not self._draw():
                raise StopIteration
        row, self._row = np.asarray(self._row, dtype="<i4"), []
        self.num_rows += 1
        self.fingerprint = hashlib.sha256(self.fingerprint.encode() + row.tobytes()).hexdigest()
        return {"input_ids": row}

    def state_dict(self) -> dict[str, Any]:
        """The place after the last row, as plain JSON values."""
        sources = [reader.state_dict() for reader in self.readers]
        source, before = self._before or (None, None)
        if source is not None:
            sources[source] = before
        facts = {"num_rows": self.num_rows, "fingerprint": self.fingerprint}
        return {"sources": sources, "cut": source, "offset": self._offset} | facts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken. Raises ValueError if the text there is another now."""
        for reader, place in zip(self.readers, state["sources"], strict=True):
            reader.load_state_dict(place)
        self.num_rows, self.fingerprint = state["num_rows"], state["fingerprint"]
        self._running, self._row, self._document, self._before = list(range(len(self.readers))), [], [], None
        if state["cut"] is not None:
            drawn = self._draw()
            if not drawn or self._before[0] != state["cut"] or state["offset"] > len(self._document):
                name = self.readers[state["cut"]].name
                raise ValueError(f"{name} has changed since its place was noted. Restore it, or start the run again.")
        self._offset = state["offset"]

    def _draw(self) -> bool:
        """Takes the next document, from the source that has given the fewest tokens for its weight, if one has any."""
        while self._running:
            served = {i: self.readers[i].num_tokens / self.weights[i] for i in self._running}
            source = min(served, key=served.__getitem__)
            reader = self.readers[source]
            if reader.ready():
                self._before = (source, reader.state_dict())
                self._document, self._offset = reader.take(), 0
                return True
            logger.info("%s has ended.", reader.name)
            self._running = [] if self.stopping == "first" else [i for i in self._running if i != source]
        return False


def tokens_given_out(state: dict[str, Any]) -> list[int]:
    """By source, the tokens in the rows before a reader's state."""
    tokens = [source["num_tokens"] for source in state["sources"]]
    if state["cut"] is not None:
        tokens[state["cut"]] += state["offset"]
    return tokens
