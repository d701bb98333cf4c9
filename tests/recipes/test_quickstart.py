"""The quickstart, run as a user runs it, and the rules of its data and its embedded model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import quickstart  # noqa: E402
import stdlib_corpus  # noqa: E402


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("quickstart") / "out"
    command = [sys.executable, QUICKSTART / "quickstart.py", "--smoke", "--output-dir", output_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return output_dir, done.stdout


def test_it_prints_a_table_of_the_four_models(smoke):
    output_dir, printed = smoke
    for name in ("teacher", "pruned", "pruned + distilled", "random + distilled"):
        assert f"| {name} " in printed and f"### {name}\n" in (output_dir / "results.md").read_text()
    facts = json.loads((output_dir / "quickstart.json").read_text())["models"]
    assert 0.45 < facts["pruned"]["parameters"] / facts["teacher"]["parameters"] < 0.55
    assert facts["teacher"]["bits_per_byte"] < facts["pruned"]["bits_per_byte"]


def test_the_student_loads_in_plain_transformers_with_its_lineage(smoke):
    student = smoke[0] / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    assert model.config.hidden_size == 168 and model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("import os")["input_ids"]) == "import os"
    stages = json.loads((student / "minitron.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["prune", "distill"]
    assert stages[0]["data"]["files"] == stages[1]["data"]["train"]["files"] == ["train.jsonl"]
    assert stages[1]["data"]["held_out"]["files"] == ["held_out.jsonl"]


def test_plots_lie_beside_the_table(smoke):
    for name in ("losses.png", "importance.png"):
        assert (smoke[0] / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in (
            smoke[0] / "results.md"
        ).read_text()


def test_it_replaces_only_what_it_made(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(SystemExit, match="not made by the quickstart"):
        quickstart.prepare_folder(tmp_path)
    (tmp_path / quickstart.MARKER).write_text("{}")
    quickstart.prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [quickstart.MARKER]


def test_held_out_modules_are_held_out_by_their_name_alone():
    assert stdlib_corpus.is_held_out("collections.__init__") and not stdlib_corpus.is_held_out("json.decoder")
    share = sum(stdlib_corpus.is_held_out(f"module{i}") for i in range(5000)) / 5000
    assert abs(share - 0.08) < 0.015


def test_training_text_and_held_out_text_are_disjoint(tmp_path):
    paths = stdlib_corpus.write_corpus(tmp_path)
    modules = {part: [json.loads(line)["module"] for line in path.open()] for part, path in paths.items()}
    assert len(modules["train"]) > 300 and len(modules["held_out"]) > 20
    assert not set(modules["train"] + modules["tests"]) & set(modules["held_out"])
    assert not any(map(stdlib_corpus.is_held_out, modules["train"] + modules["tests"]))
    texts = {part: {hashlib.sha256(line.encode()).digest() for line in path.open()} for part, path in paths.items()}
    assert not texts["train"] & texts["held_out"]


def test_the_embedded_teacher_is_what_the_issue_of_it_says():
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "teacher")
    config = model.config
    assert model.dtype == torch.bfloat16 and not config.tie_word_embeddings and config.num_hidden_layers >= 8
    assert config.num_key_value_heads < config.num_attention_heads and 2000 <= config.vocab_size <= 4096
    assert 5e6 < model.num_parameters() < 7.5e6
    assert (QUICKSTART / "teacher" / "model.safetensors").stat().st_size <= 14_000_000
    assert "held-out bits per byte" in (QUICKSTART / "teacher" / "README.md").read_text()
