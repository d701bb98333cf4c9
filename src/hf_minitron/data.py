"""Text comes in here: for calibration, distillation and evaluation alike.

``load_text`` reads any source as rows of the one column ``text``; ``pack_rows`` turns them into rows of token ids;
``fingerprint_rows`` and ``describe_source`` say in the lineage what was read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of whichever client the Hub library stands on
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import pack_dataset

from hf_minitron.text_files import describe_text_files, find_text_files, load_text_files

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "content", "story")  # taken in this order when no column is named
MAX_DEFAULT_LENGTH = 4096  # tokens of a packed row, where the model allows more
BLOCK_CHARACTERS = 1 << 22  # tokenized and packed at a time; about a million tokens
SHUFFLE_BUFFER = 10_000  # documents held to shuffle a stream


def load_text(
    source: str | os.PathLike | Dataset | IterableDataset,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    revision: str | None = None,
    streaming: bool | None = None,
    token: str | bool | None = None,
) -> Dataset | IterableDataset:
    """The documents of ``source``, one a row, in the one column ``text``; rows without text are left out.

    ``source`` is a data set, a Hub id (streamed unless ``streaming=False``), or a file, folder or glob: plain text is
    one document a file; JSON (lines, a list of records or of strings), Parquet and CSV are one a row; all may be
    compressed (.gz, .bz2, .xz, .zst). A path that exists wins over a Hub id. In a folder of records the file names tell
    the splits, as on the Hub (``train.jsonl``, ``test-00000-of-00002.parquet``); if any does, files that name none are
    left out. Plain text, globs and single files are all ``train``.

    The text is in ``text_column``; else in ``text``, ``content`` or ``story``; else in the only column that holds
    strings, or the only one that holds lists of strings, each then a document.

    Raises FileNotFoundError if nothing is there, ValueError for mixed kinds of files, an unknown split, a column that
    is not there, is not text or cannot be guessed, and for a source without any text.
    """
    how = {"config_name": config_name, "split": split, "revision": revision, "streaming": streaming, "token": token}
    return _only_text(load_records(source, **how), text_column, _name_of(source))


def load_records(
    source: str | os.PathLike | Dataset | IterableDataset,
    *,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool | None = None,
    token: str | bool | None = None,
) -> Dataset | IterableDataset:
    """The rows of ``source`` with all their columns; sources and errors are those of ``load_text``."""
    if _is_dataset(source):
        return source
    if files := find_text_files(source):
        if config_name is not None or revision is not None:
            raise ValueError(f"{config_name=}, {revision=} are for Hub data sets; {source} is a path: leave them out.")
        return load_text_files(files, split, bool(streaming))
    return _load_from_hub(str(source), config_name, split, revision, streaming is None or streaming, token)


def held_out_split(arguments: Any) -> str:
    """The split of ``eval_dataset`` to evaluate on; raises ValueError for what is trained on too."""
    same = arguments.eval_dataset == arguments.dataset
    split = arguments.eval_split or ("validation" if same else "train")
    if same and split == arguments.dataset_split:
        raise ValueError(
            f"eval_dataset and dataset are both {arguments.dataset}, split {split}: held-out text must not be "
            "trained on. Give another."
        )
    return split


def iterate_texts(texts: Iterable[str] | Dataset | IterableDataset) -> Iterator[str]:
    """The documents of an iterable of strings or of a data set with the column ``text``, empty ones left out."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"texts={texts[:40]!r} is one string: give a list of documents, or load_text(...) of a path.")
    if isinstance(texts, Dataset | IterableDataset):
        if texts.column_names and "text" not in texts.column_names:
            raise ValueError(f"columns {texts.column_names} have no 'text': pass the data set through load_text first.")
        texts = (row["text"] for row in texts)
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"a document is a {type(text).__name__}: each must be a string.")
        if text and not text.isspace():
            yield text


def pack_rows(
    texts: Iterable[str] | Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    max_rows: int | None = None,
    seed: int | None = None,
) -> Dataset:
    """Rows of exactly ``sequence_length`` token ids in the column ``input_ids`` (int32, in memory: 4 bytes a token).

    Every document is tokenized whole, without special tokens, and closed by eos if the tokenizer has one; bos stands
    in front only if the tokenizer adds it by itself, as the model then saw it in training. Documents follow each other
    (``trl.pack_dataset``, strategy "wrapped") and rows may cut them anywhere; only the tokens after the last full row
    of the whole data set are lost.

    Without ``seed`` these are the first ``max_rows`` rows. With it, documents are shuffled first (a stream: within
    10,000 of them, and its shards) and the rows are a sample of what was read. Reading stops when ``max_rows`` are
    there; without ``max_rows`` everything is read, which for a big Hub stream may be more than memory holds.

    Raises ValueError if not even one row comes out.
    """
    if sequence_length < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"{sequence_length=}, {max_rows=}: both must be at least 1.")
    documents = iterate_texts(texts if seed is None else _shuffle(texts, seed))
    blocks: list[Dataset] = []
    rest: list[int] = []
    num_documents = num_rows = 0
    with _no_progress_bars(), tqdm(total=max_rows, desc="packing", unit=" rows", disable=None) as bar:
        while max_rows is None or num_rows < max_rows:
            # A token is hardly ever shorter than a character, so this much is needed in any case.
            missing = BLOCK_CHARACTERS if max_rows is None else (max_rows - num_rows) * sequence_length - len(rest)
            block = _take_characters(documents, min(BLOCK_CHARACTERS, missing))
            if not block:
                break
            num_documents += len(block)
            rows, rest = _pack_block([rest, *tokenize_documents(block, tokenizer)], sequence_length)
            if len(rows):
                blocks.append(rows)
                num_rows += len(rows)
                bar.update(len(rows))
    if not blocks:
        raise ValueError(
            f"{len(rest):,} tokens in {num_documents:,} documents are fewer than one row of {sequence_length=}. "
            "Use more text or a shorter sequence_length."
        )
    if max_rows is not None and num_rows < max_rows:
        logger.warning("The text gives %d rows of %d tokens; max_rows=%d.", num_rows, sequence_length, max_rows)
    rows = concatenate_datasets(blocks)
    if max_rows is None or num_rows <= max_rows:
        return rows
    return rows.select(
        range(max_rows) if seed is None else np.random.default_rng(seed).permutation(num_rows)[:max_rows]
    )


def tokenize_documents(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of whole documents, without special tokens but for eos at the end, and bos where the tokenizer adds it."""
    ids = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    start = first if first == [tokenizer.bos_token_id] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*start, *document, *end] for document in ids]


def check_row_length(config: PreTrainedConfig, length: int | None, option: str) -> int:
    """The tokens of a packed row: ``length`` if the model takes that many, by default all it takes up to 4096.

    ``option`` is the setting's name, for the message.
    """
    limit = getattr(config, "max_position_embeddings", None) or MAX_DEFAULT_LENGTH
    length = min(MAX_DEFAULT_LENGTH, limit) if length is None else length
    if not 1 < length <= limit:
        raise ValueError(
            f"{option}={length}: the model takes 2 to {limit} tokens (max_position_embeddings). Choose a length in "
            "that range."
        )
    return length


def fingerprint_rows(dataset: Dataset) -> str:
    """sha256 over the token ids of the column ``input_ids`` and where rows end, as little-endian int64.

    It is the hash of two digests, that of all row lengths and that of all ids, so storage and batching do not matter.
    """
    lengths, ids = hashlib.sha256(), hashlib.sha256()
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        column = table["input_ids"].combine_chunks()
        lengths.update(np.asarray(pc.list_value_length(column)).astype("<i8").tobytes())
        ids.update(np.asarray(pc.list_flatten(column)).astype("<i8").tobytes())
    return hashlib.sha256(lengths.digest() + ids.digest()).hexdigest()


def describe_source(
    source: str | os.PathLike | Dataset | IterableDataset,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    max_hashed_bytes: int | None = None,
) -> dict[str, Any]:
    """What was read, for the lineage: no absolute paths, no tokens; what is unknown is left out.

    A Hub id comes with the commit it stands for now, if the Hub can be asked. Files come with their names, relative to
    their common folder, and a sha256: of one file that of its content, of several that of the listing which
    ``sha256sum`` prints for them; none if they are bigger than ``max_hashed_bytes`` together. A data set that was
    passed in has its own fingerprint.
    """
    if _is_dataset(source):
        facts = {"kind": "dataset", "fingerprint": getattr(source, "_fingerprint", None)}
        facts["num_rows"] = len(source) if isinstance(source, Dataset) else None
    elif files := find_text_files(source):
        facts = describe_text_files(files, split, max_hashed_bytes)
    else:
        commit = _resolve_commit(str(source), revision, token)
        facts = {"kind": "hub", "id": str(source), "config": config_name, "revision": revision, "commit": commit}
    facts |= {"split": split if facts["kind"] == "hub" else None, "text_column": text_column}
    return {key: value for key, value in facts.items() if value is not None}


def _name_of(source: Any) -> str:
    return type(source).__name__ if _is_dataset(source) else str(source)


def _is_dataset(source: Any) -> bool:
    if isinstance(source, dict):
        raise TypeError(f"source is a {type(source).__name__} of {list(source)}: pass one of its splits.")
    return isinstance(source, Dataset | IterableDataset)


def _load_from_hub(
    name: str, config_name: str | None, split: str, revision: str | None, streaming: bool, token: str | bool | None
) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config_name, split=split, revision=revision, streaming=streaming, token=token)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{name} is neither a path here nor a Hub data set to be read: {error}") from error


def _only_text(dataset: Dataset | IterableDataset, text_column: str | None, name: str) -> Dataset | IterableDataset:
    dataset = dataset.with_format(None)
    features = dataset.features or Dataset.from_list(list(dataset.take(100))).features
    column, is_list = _find_text_column(features, text_column, name)
    dataset = dataset.select_columns([column])
    dataset = dataset if column == "text" else dataset.rename_column(column, "text")
    # In memory, as `datasets` would otherwise put its cache files beside a data set that the user saved; a stream row
    # by row, as it would otherwise read a thousand rows ahead.
    options = {"keep_in_memory": True} if isinstance(dataset, Dataset) else {"batch_size": 1}
    with _no_progress_bars():
        if is_list:
            lists = {"remove_columns": ["text"], "features": Features({"text": Value("string")})}
            dataset = dataset.map(_flatten, input_columns=["text"], batched=True, **lists, **options)
        filtered = dataset.filter(_have_text, input_columns=["text"], batched=True, **options)
    if next(iter(filtered), None) is None:
        raise ValueError(f"{name} has no text in its column {column!r}: all is empty. Name another --text-column.")
    return dataset if isinstance(dataset, Dataset) and len(filtered) == len(dataset) else filtered


def _find_text_column(features: Features, text_column: str | None, name: str) -> tuple[str, bool]:
    """The column to read and whether it holds lists of strings."""
    strings = [column for column, kind in features.items() if _is_string(kind)]
    lists = [column for column, kind in features.items() if _is_string(getattr(kind, "feature", None))]
    columns = f"Its columns are {', '.join(map(repr, features)) or 'none'}"
    if text_column is not None:
        if text_column not in strings + lists:
            problem = "is not text" if text_column in features else "is not there"
            raise ValueError(
                f"text_column={text_column!r} {problem} in {name}. {columns}; text is in {strings + lists}."
            )
        return text_column, text_column in lists
    for column in TEXT_COLUMNS:
        if column in strings:
            return column, False
    if len(strings) == 1 or (not strings and len(lists) == 1):
        return (strings or lists)[0], not strings
    raise ValueError(f"{name} has {len(strings)} columns of strings. {columns}. Name the one to read by --text-column.")


def _is_string(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _have_text(texts: list[str | None]) -> list[bool]:
    return [bool(text) and not text.isspace() for text in texts]


def _flatten(lists: list[list[str] | None]) -> dict[str, list[str]]:
    return {"text": [text for strings in lists for text in strings or ()]}


def _shuffle(texts: Iterable[str] | Dataset | IterableDataset, seed: int) -> Dataset | IterableDataset:
    if isinstance(texts, IterableDataset):
        return texts.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    if not isinstance(texts, Dataset):
        texts = Dataset.from_dict({"text": list(iterate_texts(texts))})
    return texts.shuffle(seed=seed, keep_in_memory=True)


def _take_characters(documents: Iterator[str], num_characters: int) -> list[str]:
    block: list[str] = []
    for document in documents:
        block.append(document)
        num_characters -= len(document)
        if num_characters <= 0:
            break
    return block


def _pack_block(documents: list[list[int]], sequence_length: int) -> tuple[Dataset, list[int]]:
    """Full rows, and the tokens after the last of them, which open the next block."""
    dataset = Dataset.from_dict({"input_ids": documents}, features=Features({"input_ids": List(Value("int32"))}))
    rows = pack_dataset(dataset, sequence_length, strategy="wrapped", map_kwargs={"batch_size": None})
    last = rows[-1]["input_ids"]
    return (rows, []) if len(last) == sequence_length else (rows.select(range(len(rows) - 1)), last)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`datasets` draws a bar for every block and filter; ours is enough."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _resolve_commit(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    try:
        return HfApi(token=token).dataset_info(repo_id, revision=revision, timeout=10).sha
    except (HTTPError, OSError) as error:
        logger.warning("The commit of %s is unknown, as the Hub cannot be asked: %s", repo_id, error)
        return None
