"""The alignment recipe, run as a user runs it, and the papers' numbers in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import align  # noqa: E402


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("align") / "out"
    command = [sys.executable, RECIPES / "align.py", "--smoke", "--output_dir", output_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return output_dir, done.stdout


def test_it_tells_what_every_stage_did(smoke):
    lines = smoke[1].splitlines()[-5:]
    for line, name in zip(lines, ("math and code", "instructions"), strict=False):
        before, after = line.removeprefix(f"{name}: held-out loss ").split(" -> ")
        assert float(after) < float(before)
    assert [line.split(":")[0] for line in lines[2:4]] == ["RPO round 1", "RPO round 2"]
    assert all(float(line.split("margin ")[1].split(",")[0]) > 0.1 for line in lines[2:4])
    assert lines[-1] == f"Wrote {smoke[0] / 'aligned'}"


def test_the_aligned_model_is_an_ordinary_one_with_its_whole_lineage(smoke):
    folder = smoke[0] / "aligned"
    stages = json.loads((folder / "minitron.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["sft", "sft", "rpo", "rpo"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and model.config.vocab_size == len(tokenizer) == 260
    assert [stage["settings"]["beta"] for stage in stages[2:]] == [0.05, 0.05]


def test_the_published_settings():
    assert {"4B": align.Settings(5e-6, 9e-7), "8B": align.Settings(4e-6, 7e-7)} == align.SIZES
    assert (align.BETA, align.ROUNDS, align.RPO_SCHEDULE["warmup_steps"]) == (0.05, 2, 10)


def test_real_runs_need_models_and_data(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["align.py", "--output-dir", "x", "--model", "y"])
    with pytest.raises(SystemExit):
        align.parse_arguments()
    assert "--math-code, --instructions, --preferences: needed without --smoke" in capsys.readouterr().err
