"""Documents of a packed row that do not see each other give what they give alone."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import pytest
import torch

from hf_minitron.distill.collator import CausalLMCollator, restarting_positions
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.stage import distill_checkpoint

tiny_llama = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))["tiny_llama"]
END = 63
DOCUMENTS = [[1, 2, 3, END], [END], [4, 5, END], [6, 7, 8, 9]]  # an empty one, and one that the row cuts


def test_positions_start_again_after_each_end():
    rows = torch.tensor([[*itertools.chain(*DOCUMENTS)], [*range(1, 13)]])
    assert restarting_positions(rows, END).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3], [*range(12)]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_gives_the_logits_of_its_documents(attention):
    model = tiny_llama(16, seed=1).eval()
    model.set_attn_implementation(attention)
    row = {"input_ids": [*itertools.chain(*DOCUMENTS)]}
    batch = CausalLMCollator(document_end=END)([row, {"input_ids": [*range(12)]}])
    assert "attention_mask" not in batch
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([document])).logits[0] for document in DOCUMENTS])
        mixed = model(inputs["input_ids"], use_cache=False).logits[0]
    assert torch.allclose(packed, alone, atol=1e-5)
    assert not torch.allclose(mixed, alone, atol=1e-2)


def test_padding_is_refused():
    with pytest.raises(ValueError, match="lets attention cross documents"):
        CausalLMCollator(document_end=END)([{"input_ids": [1, 2]}, {"input_ids": [3]}])


def test_the_stage_isolates_documents(tmp_path, tiny_checkpoint, tiny_text, held_out_text):
    def run(name: str, **options):
        paths = {"student_model": tiny_checkpoint, "teacher_model": tiny_checkpoint, "dataset": tiny_text}
        paths = {key: str(path) for key, path in (paths | {"eval_dataset": held_out_text}).items()}
        settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        config = DistillationConfig(output_dir=str(tmp_path / name), **settings)
        return distill_checkpoint(DistillArguments(**paths, max_length=64, **options), config)

    together, apart = run("together"), run("apart", isolate_documents=True)
    assert together.metrics_before["lm_loss"] != pytest.approx(apart.metrics_before["lm_loss"], rel=1e-4)
    assert apart.metrics_before["kl"] < 1e-3  # the teacher's documents are isolated too
