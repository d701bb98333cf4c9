"""Push by the command line, pull by repository id in a fresh process: the same logits, and the commit on record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_minitron import DistillationConfig, DistillationTrainer, PruneConfig, PrunerForCausalLM, cli

REPO = "alice/tiny-pruned"
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_minitron import PruneConfig, PrunerForCausalLM
repo, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, dtype="auto")
with torch.no_grad():
    torch.save(model(torch.arange(16)[None]).logits, output + "/logits.pt")
pruner = PrunerForCausalLM.from_pretrained(repo)
pruner.prune(PruneConfig(intermediate_size=16, method="random"))
pruner.save_pretrained(output + "/again")
"""


def test_push_and_pull_by_id_give_the_same_logits(hub, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    for path in tiny_checkpoint.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: code\n---\n")
    pruner = PrunerForCausalLM.from_pretrained(tmp_path / "source")
    pruner.prune(PruneConfig(hidden_size=16, intermediate_size=32, method="random"))
    folder = pruner.save_pretrained(tmp_path / "pruned")
    assert cli.main(["push", str(folder), "--repo-id", REPO, "--dry-run"]) == 0
    assert "Nothing was sent" in capsys.readouterr().out and ("models", REPO) not in hub.repos
    for name in ("checkpoint-1/optimizer.pt", "checkpoint-1/rng.pth", "run.log"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert cli.main(["push", str(folder), "--repo-id", REPO]) == 0
    printed = capsys.readouterr().out
    head = HfApi(endpoint=hub.url, token="hf_alice").model_info(REPO)
    assert f"Committed: {hub.url}/{REPO}/commit/{head.sha} (private; prune); checksums agree" in printed
    assert "Stays here: checkpoint-1/, run.log\n" in printed
    assert (head.card_data.license, head.card_data.language) == ("apache-2.0", "code")

    env = os.environ | hub.env(tmp_path / "home of another")
    done = subprocess.run([sys.executable, "-c", LOAD, REPO, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(torch.arange(16)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)
    stages = json.loads((tmp_path / "again" / "minitron.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["prune", "prune"]
    source = stages[1]["inputs"]["source"]
    assert (source["id"], source["commit"], source["card"]["license"]) == (REPO, head.sha, "apache-2.0")


def test_a_pruner_pushes_what_it_planned(hub, tiny_checkpoint):
    pruner = PrunerForCausalLM.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="nothing is planned yet"):
        pruner.push_to_hub("alice/planned")
    pruner.prune(PruneConfig(hidden_size=16, method="random"))
    result = pruner.push_to_hub("alice/planned", private=False)
    assert result.private is False and result.lineage[-1]["stage"] == "prune"
    assert {"model.safetensors", "prune_plan.json", "README.md", "tokenizer.json"} <= set(result.files)
    text = hub.repos["models", "alice/planned"].text("main", "README.md")
    assert text.startswith("---\n") and "\n# planned\n" in text and Path(tiny_checkpoint).name in text


def test_training_checks_the_right_to_push_first_and_pushes_what_it_wrote(
    hub, tiny_checkpoint, tiny_text, tmp_path, capsys
):
    words = ["distill", tiny_checkpoint, "--teacher-model", tiny_checkpoint, "--dataset", tiny_text, "--max-steps", 2]
    words += [
        "--max-length",
        32,
        "--report-to",
        "none",
        "--use-cpu",
        "true",
        "--save-steps",
        1,
        "--output-dir",
        tmp_path / "out",
    ]
    words = [*map(str, words), "--push-to-hub", "true", "--hub-model-id", "alice/student"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_alice_read")
        assert cli.main(words) == 2
    assert "the token of alice may only read" in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("checkpoint-*")]
    assert cli.main([*words, "--overwrite", "true"]) == 0
    files = set(hub.repos["models", "alice/student"].commit("main")["tree"])
    assert {"model.safetensors", "minitron.json", "distill_log.json", "README.md", "tokenizer.json"} < files
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert (
        len(hub.repos["models", "alice/student"].state["commits"]) == 2 and (tmp_path / "out" / "checkpoint-2").is_dir()
    )
    assert "hf_alice" not in (tmp_path / "out" / "minitron.json").read_text()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16  # the source's, not the trainer's


def test_a_trainer_pushes_what_it_has_in_memory(hub, tiny_checkpoint, tiny_tokenizer, tmp_path):
    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32) for _ in range(2))
    rows = Dataset.from_dict({"input_ids": [[i, 2, 3, 4, 5, 6, 7, 8] for i in range(8)]})
    config = DistillationConfig(
        str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, push_to_hub=True, hub_token="hf_alice",
        hub_model_id="alice/in-memory", save_strategy="no", disable_tqdm=True, hub_private_repo=False,
    )  # fmt: skip
    trainer = DistillationTrainer(student, teacher, config, rows, processing_class=tiny_tokenizer)
    assert not hub.requests  # none in constructors
    trainer.train()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    result = trainer.push_to_hub(commit_message="First")
    assert result.committed and result.private is False and [s["stage"] for s in result.lineage] == ["distill"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], trainer.model.lm_head.weight)
    assert result.lineage[0]["data"]["train"]["num_rows"] == 8
    assert result.lineage[0]["inputs"]["teacher"] == {"path": tiny_checkpoint.name}
    assert result.lineage[0]["tokens"] == trainer.num_tokens_seen and "hf_alice" not in str(result.lineage)
    trainer.save_model()  # the Trainer's own way to push: nothing has changed
    assert len(hub.repos["models", "alice/in-memory"].state["commits"]) == 2


def test_push_errors_are_one_line(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert cli.main(["push", str(checkpoint), "--repo-id", REPO]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: pushing to {REPO}: the Hub does not accept the token (401 ")
