"""The stage ``evaluate``: result, lineage, files."""

from __future__ import annotations

import json
import shutil

import pytest

from hf_minitron.evaluate.stage import EvaluateArguments, evaluate_checkpoint
from hf_minitron.lineage import Stage, append_stage, read_lineage


def test_it_appends_to_a_lineage_and_leaves_other_folders_alone(tmp_path, tiny_checkpoint, held_out_text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    arguments = EvaluateArguments(str(folder), str(held_out_text), context_length=32, stride=16, dtype="float32")
    result = evaluate_checkpoint(arguments)
    assert not (folder / "minitron.json").exists()
    append_stage(Stage("prune"), folder)
    assert evaluate_checkpoint(arguments) == result
    stages = read_lineage(folder)
    assert [stage["stage"] for stage in stages] == ["prune", "evaluate"]
    assert stages[1]["metrics"]["bits_per_byte"] == result.bits_per_byte
    assert stages[1]["settings"]["stride"] == 16 and str(tmp_path) not in json.dumps(stages[1])


def test_the_result_goes_to_a_file_too(tmp_path, tiny_checkpoint, held_out_text):
    output = tmp_path / "result.json"
    result = evaluate_checkpoint(EvaluateArguments(str(tiny_checkpoint), str(held_out_text), output_file=str(output)))
    assert json.loads(output.read_text())["metrics"]["loss"] == result.loss


def test_a_wrong_dtype_is_refused_at_once(tiny_checkpoint, held_out_text):
    with pytest.raises(ValueError, match="dtype='int4'"):
        evaluate_checkpoint(EvaluateArguments(str(tiny_checkpoint), str(held_out_text), dtype="int4"))
