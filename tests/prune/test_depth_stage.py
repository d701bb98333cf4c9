"""Depth, head residual and steps from the command line: what is measured, written, recorded and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minitron import cli
from hf_minitron.checkpoint import Checkpoint
from hf_minitron.lineage import read_lineage
from hf_minitron.prune.depth import list_removals
from hf_minitron.prune.plan import PrunePlan
from hf_minitron.prune.scores import ImportanceScores


@pytest.fixture
def folder(build_model, tiny_tokenizer, save_model) -> Path:
    return save_model(build_model(vocab_size=len(tiny_tokenizer), num_hidden_layers=6), tiny_tokenizer)


@pytest.fixture
def text(tiny_text: Path) -> list[str]:
    return ["--calibration-dataset", str(tiny_text), "--num-samples", "6", "--sequence-length", "16"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"context": f"{n} small models", "choices": [" learn", " dog"], "gold": n % 2} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "open", lambda *_, **__: pytest.fail("opened the weights"))


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def plan_of(folder: Path) -> PrunePlan:
    return PrunePlan.load(folder / "prune_plan.json")


@pytest.mark.parametrize(
    ("metric", "pattern"), [("lm_loss", "contiguous"), ("lm_loss", "scattered"), ("block_importance", "contiguous"),
                            ("block_importance", "scattered")]
)  # fmt: skip
def test_layers_go_by_the_metric_and_pattern_asked_for(folder, text, tmp_path, capsys, metric, pattern):
    out = tmp_path / "small"
    options = ["--num-hidden-layers", 4, "--depth-metric", metric, "--depth-pattern", pattern, "--output-dir", out]
    assert run("prune", folder, *options, *text) == 0
    printed = capsys.readouterr().out
    kept = plan_of(out).kept_layers
    assert f"Kept layers: {', '.join(map(str, kept))}" in printed and len(kept) == 4
    gone = sorted(set(range(6)) - set(kept))
    assert pattern == "scattered" or gone == [gone[0], gone[0] + 1]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    stage = read_lineage(out)[-1]
    assert stage["settings"]["depth"] == {"metric": metric, "pattern": pattern}
    assert stage["settings"]["kept_layers"] == kept
    assert stage["metrics"]["parameters"]["total"] == model.num_parameters()


def test_accuracy_needs_questions_but_no_text(folder, questions, tmp_path):
    out = tmp_path / "small"
    options = ["--num-hidden-layers", 4, "--depth-metric", "accuracy", "--depth-task", questions, "--output-dir", out]
    assert run("prune", folder, *options, "--depth-num-questions", 5) == 0
    scan = read_lineage(out)[-1]["settings"]["scans"]["removal.accuracy.2"]
    assert scan["task"]["num_questions"] == 5 and len(plan_of(out).kept_layers) == 4


def test_a_scan_is_saved_merged_with_the_scores_and_used_later(folder, text, tmp_path, capsys):
    scores = tmp_path / "scores.safetensors"
    options = ["--num-dropped-layers", 1, 2, "--output-file", scores]
    assert run("score", folder, *text, *options) == 0
    held = ImportanceScores.load(scores)
    assert held.axes == ("neurons", "heads", "hidden", "layers")
    assert [(r.metric, r.num_dropped) for r in list_removals(held)] == [("lm_loss", 1), ("lm_loss", 2)]
    best = list_removals(held)[1].best_start
    for pattern, expected in (("contiguous", {best, best + 1}), ("scattered", None)):
        out = tmp_path / pattern
        words = ["--num-hidden-layers", 4, "--depth-pattern", pattern, "--intermediate-size", 20, "--output-dir", out]
        capsys.readouterr()
        assert run("prune", folder, *words, "--scores", scores) == 0
        assert expected is None or set(range(6)) - set(plan_of(out).kept_layers) == expected
        assert "P2 prunes width or depth, not both" in capsys.readouterr().out
    assert run("prune", folder, "--num-hidden-layers", 3, "--scores", scores, "--output-dir", tmp_path / "no") == 2
    assert "needs lm_loss without blocks of 3 layers" in capsys.readouterr().err


def test_layers_dropped_by_hand_need_nothing(folder, tmp_path, logits_of):
    out = tmp_path / "small"
    assert run("prune", folder, "--drop-layers", 1, 4, "--output-dir", out) == 0
    assert plan_of(out).kept_layers == [0, 2, 3, 5]
    source = AutoModelForCausalLM.from_pretrained(folder)
    del source.model.layers[4], source.model.layers[1]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out)), logits_of(source))


def test_pruning_in_steps(folder, text, tmp_path, capsys):
    out = tmp_path / "small"
    words = ["--intermediate-size", 20, "--num-hidden-layers", 4, "--iterations", 2, "--output-dir", out]
    assert run("prune", folder, *words, *text) == 0
    settings = read_lineage(out)[-1]["settings"]
    assert [step["intermediate_size"] for step in settings["iterations"]] == [30, 20]
    assert [step["num_hidden_layers"] for step in settings["iterations"]] == [5, 4]
    words = ["--intermediate-size", 20, "--iterations", 2, "--output-dir", tmp_path / "b", "--scores", "x"]
    assert run("prune", folder, *words) == 2
    assert "give --calibration-dataset, not --scores" in capsys.readouterr().err


def test_the_head_residual_reaches_the_weights(folder, text, tmp_path):
    for name, options in (("plain", []), ("residual", ["--head-residual", "true"])):
        words = ["--num-attention-heads", 4, "--output-dir", tmp_path / name, *options]
        assert run("prune", folder, *words, *text) == 0
    plain, residual = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "residual"))
    changed = [n for n, p in plain.named_parameters() if not torch.equal(p, residual.get_parameter(n))]
    assert changed == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(6)]
    assert read_lineage(tmp_path / "residual")[-1]["settings"]["head_residual"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop-layers", 6], "6 is no layer, they count from 0 to 5"),
        (["--drop-layers", 1, 1], "names layer 1 more than once"),
        (["--drop-layers", 0, 1, 2, 3, 4, 5], "names all 6 layers"),
        (["--num-hidden-layers", 0], "num_hidden_layers=0: pruning keeps between 1 and the source's 6"),
        (["--num-hidden-layers", 6], "nothing to prune"),
        (["--num-hidden-layers", 4], "importance is measured on text: give --calibration-dataset"),
        (["--num-hidden-layers", 4, "--depth-metric", "ppl"], "depth_metric='ppl' is unknown"),
        (["--num-attention-heads", 2, "--head-residual", "true"], "Keep at least 2, or leave head_residual out"),
    ],
)
def test_what_is_refused_before_weights_are_read(folder, tmp_path, capsys, no_weights, words, message):
    assert run("prune", folder, *words, "--output-dir", tmp_path / "small") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_scans_of_more_layers_than_there_are(folder, text, tmp_path, capsys):
    words = ["--num-dropped-layers", 6, "--output-file", tmp_path / "scores.safetensors"]
    assert run("score", folder, *text, *words) == 2
    assert "num_dropped=[6]: of 6 layers between 1 and 5 can go" in capsys.readouterr().err


def test_a_task_that_cannot_be_had_offline(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--num-hidden-layers", 4, "--depth-metric", "accuracy", "--output-dir", tmp_path / "small"]
    assert run("prune", folder, *words, "--depth-task", tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.fixture
def logits_of():
    ids = torch.arange(12)[None]

    @torch.no_grad()
    def compute(model) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return compute
