"""One source of a streamed mix, read document by document, with a position from which reading goes on exactly.

The shuffle buffers of `datasets` lose their content when their state is loaded again. Here documents are shuffled block
by block instead: a position is where a block begins in the source, by ``IterableDataset.state_dict``, and how many of
its documents were taken. Going on reads that block again and nothing before it, but for what the source's format needs
to find its place (the part of a JSON file that comes before, none of the other files).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_minitron.data import tokenize_documents

logger = logging.getLogger(__name__)

DOCUMENTS_PER_READ = 100  # of one reader; also its block where nothing is shuffled
CHARACTERS_PER_CALL = 1 << 18  # that the tokenizer gets at once, about 65,000 tokens
MIN_FILES_PER_READER = 16  # from here on an uneven number of files is even enough


@dataclass(frozen=True)
class ReadingOrder:
    """In which order a source's documents come, and how often: without end if ``epochs`` is None.

    ``seed`` tells sources and runs apart. With ``shuffle_buffer`` 0 documents keep the source's order; else files are
    shuffled, and documents within blocks of that many.
    """

    seed: tuple[int, ...]
    shuffle_buffer: int
    epochs: int | None

    def files_seed(self, epoch: int) -> int:
        """For `IterableDataset.set_epoch`, which shuffles the files unless it is 0."""
        return int(np.random.default_rng([*self.seed, epoch]).integers(1, 2**62)) if self.shuffle_buffer else 0

    def order(self, num_documents: int, *block: int) -> np.ndarray:
        """The order of a block's documents; ``block`` is its reader, epoch and number."""
        if not self.shuffle_buffer:
            return np.arange(num_documents)
        return np.random.default_rng([*self.seed, *block]).permutation(num_documents)


class DocumentReader:
    """The documents of ``texts`` (column ``text``) that fall to reader ``index`` of ``count``, as token ids.

    Files are dealt out to readers where there are as many for each, or at least 16 for each; otherwise every reader
    reads all and keeps each ``count``-th document. ``name`` is the source's, for messages.
    """

    def __init__(
        self,
        name: str,
        texts: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        order: ReadingOrder,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self.name, self.tokenizer, self.order = name, tokenizer, order
        by_files = texts.num_shards % count == 0 or texts.num_shards >= MIN_FILES_PER_READER * count
        self._files = (count, index) if by_files else (1, 0)
        self._stride = (0, 1) if by_files else (index, count)
        self._index, self._source = index, texts
        self._block_size = order.shuffle_buffer or DOCUMENTS_PER_READ
        self.num_tokens = self.num_documents = 0
        self._go_to({"epoch": 0, "block": 0, "start": None, "taken": 0})

    def ready(self) -> bool:
        """Whether there is another document; reads the next block if this one is used up."""
        while not self._ended and self._taken >= len(self._block):
            self._read_block()
        return not self._ended

    def take(self) -> list[int]:
        """The next document, of which `ready` knows."""
        if not self._tokenized:
            chunk = _up_to_characters(self._block[self._taken :], CHARACTERS_PER_CALL)
            self._tokenized.extend(tokenize_documents(chunk, self.tokenizer))
        document = self._tokenized.popleft()
        self._taken += 1
        self.num_documents += 1
        self.num_tokens += len(document)
        return document

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is, as plain JSON values, and what was taken so far."""
        place = {"epoch": self._epoch, "block": self._number, "start": self._start, "taken": self._taken}
        return place | {"num_documents": self.num_documents, "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken, in the same source with the same order, index and count."""
        self.num_documents, self.num_tokens = state["num_documents"], state["num_tokens"]
        self._go_to(state)
        if not self._ended and self._taken:
            self._read_block()

    def _go_to(self, place: dict[str, Any]) -> None:
        self._epoch, self._number, self._start = place["epoch"], place["block"], place["start"]
        self._ended = self.order.epochs is not None and self._epoch >= self.order.epochs
        self._taken = place["taken"]
        self._block: list[str] = []
        self._tokenized: deque[list[int]] = deque()
        self._next = self._start
        self._texts: Iterator[dict[str, list[str]]] | None = None

    def _read_block(self) -> None:
        """The next block of this epoch, or the begin of the next epoch; the first time, the one we were sent to."""
        first = self._texts is None
        if first:
            self._open()
        texts = self._read_texts()
        if not texts:
            self._next_epoch()
            return
        if not first:
            self._number, self._taken = self._number + 1, 0
        self._start, self._next = self._next, self._opened.state_dict()
        order = self.order.order(len(texts), self._index, self._epoch, self._number)
        self._block = [texts[i] for i in order]
        if self._taken > len(texts):
            raise ValueError(f"{self.name} has changed since its place was noted. Restore it, or start the run again.")

    def _open(self) -> None:
        num_shards, index = self._files
        self._opened = self._source.shard(num_shards=num_shards, index=index, contiguous=False)
        self._opened.set_epoch(self.order.files_seed(self._epoch))
        if self._start is not None:
            self._opened.load_state_dict(self._start)
        index, stride = self._stride
        # `iter`, as plain iteration would deal out files to the workers of a data loader once more.
        batches = self._opened.iter(batch_size=stride * min(DOCUMENTS_PER_READ, self._block_size))
        self._texts = (batch["text"][index::stride] for batch in batches)

    def _read_texts(self) -> list[str]:
        size, texts = self._block_size, []
        shown = self._index == 0 and self.order.shuffle_buffer and not self._block
        with tqdm(total=size, desc=f"filling the buffer of {self.name}", unit=" documents", leave=False,
                  disable=None if shown else True) as bar:  # fmt: skip
            for more in self._texts or ():
                texts += more
                bar.update(len(more))
                if len(texts) >= size:
                    break
        return texts

    def _next_epoch(self) -> None:
        if not self._block and not self._number:
            readers = max(self._files[0], self._stride[1])
            raise ValueError(
                f"{self.name} has too few documents for {readers} readers (processes times workers): there is none "
                f"for reader {self._index}. Give it more, or use fewer dataloader_num_workers."
            )
        self._go_to({"epoch": self._epoch + 1, "block": 0, "start": None, "taken": 0})
        if not self._ended and self._index == 0:
            logger.info("%s was read to its end %d times and begins again.", self.name, self._epoch)


def _up_to_characters(texts: list[str], num_characters: int) -> list[str]:
    """At least one text, and more until they hold so many characters."""
    for count, text in enumerate(texts, start=1):
        num_characters -= len(text)
        if num_characters <= 0:
            return texts[:count]
    return texts
