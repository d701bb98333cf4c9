"""CausalLMCollator: padding by length, labels and masks, and the rows it refuses."""

from __future__ import annotations

import pytest
import torch

from hf_minitron.distill.collator import CausalLMCollator


def test_collator_pads_by_length_not_by_token():
    end = 7
    batch = CausalLMCollator(pad_token_id=end)([{"input_ids": [1, end, 2, end]}, {"input_ids": [3, end]}])
    assert batch["input_ids"].tolist() == [[1, end, 2, end], [3, end, end, end]]
    assert batch["labels"].tolist() == [[1, end, 2, end], [3, end, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_collator_makes_no_mask_for_full_rows_and_keeps_labels():
    full = CausalLMCollator()([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}, {"input_ids": [4, 5, 6]}])
    assert set(full) == {"input_ids", "labels"}
    given = CausalLMCollator()([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": torch.tensor([3])}])
    assert given["labels"].tolist() == [[-100, 2], [3, -100]]
    masked = CausalLMCollator()([{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}])
    assert masked["labels"].tolist() == [[1, 2, -100]] and masked["attention_mask"].tolist() == [[1, 1, 0]]


def test_collator_refuses_broken_rows():
    with pytest.raises(ValueError, match="Row 1 of the batch has no tokens"):
        CausalLMCollator()([{"input_ids": [1]}, {"input_ids": []}])
    with pytest.raises(ValueError, match="3 input_ids, 2 labels"):
        CausalLMCollator()([{"input_ids": [1, 2, 3], "labels": [1, 2]}])
