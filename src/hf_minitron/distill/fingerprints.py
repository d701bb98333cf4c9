"""What rows and tokenizers are known by: hashes of their content, never a position or a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

KEY_BYTES = 16


def row_key(input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> bytes:
    """16 bytes that stand for a row: BLAKE2b of its token ids as little-endian int32.

    A mask with zeros changes what a model makes of the row, so it is part of the key; a mask of ones is not.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(input_ids, dtype="<i4").tobytes(), digest_size=KEY_BYTES)
    if attention_mask is not None and not np.all(attention_mask):
        digest.update(np.asarray(attention_mask, dtype=bool).tobytes())
    return digest.digest()


def keys_tensor(keys: Sequence[bytes]) -> Tensor:
    """Keys as int64 [rows, 2], which a batch can carry through data loaders and to devices."""
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).view(-1, 2)


def dataset_keys(rows: Dataset | Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The key of every row of a data set with `input_ids` and perhaps `attention_mask`, in its order."""
    if not isinstance(rows, Dataset):
        return [row_key(_array(row["input_ids"]), _array(row.get("attention_mask"))) for row in rows]
    columns = [name for name in ("input_ids", "attention_mask") if name in rows.column_names]
    keys = []
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        lists = [table[name].combine_chunks() for name in columns]
        ends = np.cumsum(np.asarray(pc.list_value_length(lists[0])))[:-1]
        split = [np.split(np.asarray(pc.list_flatten(column)), ends) for column in lists]
        keys += [row_key(*parts) for parts in zip(*split, strict=True)]
    return keys


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer's vocabulary, added tokens included, and of its merges where it has some.

    The same size with other content gives another hash; its name, padding side or chat template do not matter.
    """
    content: list[Any] = [sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content.append(json.loads(backend.to_str())["model"].get("merges"))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where an id stands for one token at the student and for another at the teacher.

    Ids that only one of the two knows, such as an added pad token, do no harm.
    """
    texts = [{number: token for token, number in each.get_vocab().items()} for each in (student, teacher)]
    differing = sorted(number for number in texts[0].keys() & texts[1].keys() if texts[0][number] != texts[1][number])
    if differing:
        examples = ", ".join(f"{number} is {texts[0][number]!r} / {texts[1][number]!r}" for number in differing[:3])
        raise ValueError(
            f"Student and teacher have tokenizers that differ in {len(differing)} of {len(texts[0])} ids: {examples}. "
            "The KL compares token by token, so both need the same. Use the teacher that the student was pruned from, "
            "or give the student its tokenizer."
        )


def _array(values: Any) -> np.ndarray | None:
    return None if values is None else np.asarray(values)
