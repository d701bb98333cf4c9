"""Rows of token ids of unequal length, put together into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_minitron.distill.fingerprints import keys_tensor, row_key
from hf_minitron.distill.kd_inputs import IGNORE_INDEX


@dataclass
class CausalLMCollator:
    """Stacks rows of unequal length into `input_ids`, `labels` and, only when something is masked, `attention_mask`.

    Rows are padded on the right. Padding is known by length, never by its token: a text's own EOS counts even where
    EOS is also the pad token. A row's `labels` are kept when it has them; otherwise its `input_ids` are the labels,
    and -100 at padding and where its `attention_mask` is 0. The Trainer's shift by one happens later.

    With ``row_keys`` the batch also has `row_keys`, int64 [rows, 2], by which a cached teacher finds the rows.

    With `document_end`, the id that closes every document, `position_ids` start at 0 again after each: transformers
    then keeps attention within documents (sdpa, eager and flex attention; flash attention in batches of one row). It
    does so only where no attention mask is passed, so that rows of unequal length are refused.
    """

    pad_token_id: int = 0
    row_keys: bool = False
    document_end: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for index, row in enumerate(rows):
            for name, value in zip(columns, _row_tensors(index, row), strict=True):
                columns[name].append(value)
        padding = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "attention_mask": 0}
        batch = {
            name: nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding[name])
            for name, values in columns.items()
        }
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        if self.row_keys:
            pairs = zip(columns["input_ids"], columns["attention_mask"], strict=True)
            batch["row_keys"] = keys_tensor([row_key(ids.numpy(), mask.numpy()) for ids, mask in pairs])
        if self.document_end is not None:
            if "attention_mask" in batch:
                raise ValueError(
                    "The batch has padding, with which transformers lets attention cross documents. Pack rows to one "
                    "length (data.pack_rows), or leave document_end out."
                )
            batch["position_ids"] = restarting_positions(batch["input_ids"], self.document_end)
        return batch


def isolating_collator(
    tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, model: PreTrainedModel
) -> CausalLMCollator:
    """Rows whose documents do not see each other; refuses where they still would."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "isolate_documents: the tokenizer has no eos token, so packed documents have no end. Leave it out."
        )
    rows = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    if "flash" in str(model.config._attn_implementation) and rows > 1:
        raise ValueError(
            f"isolate_documents with {model.config._attn_implementation} and {rows} rows per device: transformers "
            "isolates documents there in batches of one row only. Set per_device_train_batch_size and "
            "per_device_eval_batch_size to 1 and raise gradient_accumulation_steps, or use sdpa."
        )
    return CausalLMCollator(tokenizer.eos_token_id, document_end=tokenizer.eos_token_id)


def pad_token_id(model: PreTrainedModel, processing_class: Any) -> int:
    """Any valid id would do, because padding is masked; the models' own makes batches readable."""
    for source in (processing_class, model.config):
        pad_token_id = getattr(source, "pad_token_id", None)
        if isinstance(pad_token_id, int) and pad_token_id >= 0:
            return pad_token_id
    return 0


def restarting_positions(input_ids: Tensor, document_end: int) -> Tensor:
    """Positions of tokens in their documents, [rows, length]; `document_end` is the last token of one."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    is_first = nn.functional.pad(input_ids[:, :-1] == document_end, (1, 0), value=True)
    return positions - positions.where(is_first, 0).cummax(dim=1).values


def _row_tensors(index: int, row: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """One row's input_ids, labels and attention_mask, [length] each."""
    input_ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    if input_ids.numel() == 0:
        raise ValueError(f"Row {index} of the batch has no tokens: there is nothing to learn from it. Filter it out.")
    mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(input_ids)), dtype=torch.long)
    labels = row.get("labels")
    labels = input_ids.where(mask != 0, IGNORE_INDEX) if labels is None else torch.as_tensor(labels, dtype=torch.long)
    if not input_ids.shape == labels.shape == mask.shape:
        raise ValueError(
            f"Row {index} of the batch has {len(input_ids)} input_ids, {len(labels)} labels and {len(mask)} entries of "
            "attention_mask: each token has one of each."
        )
    return input_ids, labels, mask
