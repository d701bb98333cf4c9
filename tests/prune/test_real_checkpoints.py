"""Pruning of trained models: keeping everything is exact, and importance beats chance on held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_minitron.data import load_text, pack_rows
from hf_minitron.prune.depth import read_removal
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig, count_parameters

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODELS, STORIES = DATA / "models", DATA / "text" / "tinystories"
SIZES = {  # about half the parameters
    "tinystories-656k": {"hidden_size": 80, "intermediate_size": 192},
    "stories260k-hf": {"hidden_size": 40, "intermediate_size": 120},
}
LENGTH = 128


@pytest.fixture(scope="module", params=SIZES)
def folder(request) -> Path:
    path = MODELS / request.param
    if not (path / "model.safetensors").is_file() or not (STORIES / "stories_3000.json").is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def held_out(folder: Path) -> torch.Tensor:
    return _rows(folder, "stories_3000.json", num_rows=16)


@pytest.fixture(scope="module")
def scored(folder: Path) -> PrunerForCausalLM:
    pruner = PrunerForCausalLM.from_pretrained(folder)
    pruner.score(_rows(folder, "train_5000.jsonl", num_rows=32, seed=0), progress=False)
    return pruner


def test_keeping_everything_is_bit_identical(folder: Path, held_out: torch.Tensor, tmp_path: Path):
    source = AutoModelForCausalLM.from_pretrained(folder)
    pruner = PrunerForCausalLM.from_pretrained(folder)
    kept = pruner.prune(PruneConfig())
    loaded = AutoModelForCausalLM.from_pretrained(pruner.save_pretrained(tmp_path / "kept"))
    for model in (kept, loaded):
        assert torch.equal(model(input_ids=held_out[:2]).logits, source(input_ids=held_out[:2]).logits)


def test_importance_keeps_more_than_chance(folder: Path, scored: PrunerForCausalLM, held_out: torch.Tensor):
    sizes = SIZES[folder.name]
    pruned = scored.prune(PruneConfig(**sizes))
    share = count_parameters(pruned.config)["total"] / count_parameters(scored.config)["total"]
    assert 0.4 < share < 0.6
    loss, teacher_loss = _loss(pruned, held_out), _loss(scored.model, held_out)
    random = [_loss(scored.prune(PruneConfig(**sizes, method="random", seed=s)), held_out) for s in range(3)]
    assert teacher_loss < loss < sum(random) / 3


@pytest.mark.parametrize("size", [{"num_attention_heads": 4}, {"num_key_value_heads": 2}, {"intermediate_size": 120}])
def test_every_axis_by_itself_keeps_more_than_chance(scored: PrunerForCausalLM, held_out: torch.Tensor, size: dict):
    loss = _loss(scored.prune(PruneConfig(**size)), held_out)
    random = [_loss(scored.prune(PruneConfig(**size, method="random", seed=s)), held_out) for s in range(3)]
    assert loss < sum(random) / 3


def test_the_scan_knows_which_layers_to_drop(folder: Path, held_out: torch.Tensor):
    """The block chosen on training text loses less on held-out text than the block it calls the worst."""
    pruner = PrunerForCausalLM.from_pretrained(folder)
    num_layers = pruner.config.num_hidden_layers
    if num_layers < 3:
        pytest.skip(f"{folder.name} has {num_layers} layers: too few to choose from")
    rows = _rows(folder, "train_5000.jsonl", num_rows=16, seed=0)
    scores = pruner.scan_layers(rows, num_dropped=2, progress=False)
    damage = read_removal(scores, "lm_loss", 2).damage
    best = pruner.prune(PruneConfig(num_hidden_layers=num_layers - 2))
    worst = int(damage.argmax())
    worst_loss = _loss(pruner.prune(PruneConfig(drop_layers=[worst, worst + 1])), held_out)
    assert _loss(pruner.model, held_out) < _loss(best, held_out) < worst_loss
    prompt = {"input_ids": held_out[:1, :16], "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(best.generate(**prompt, use_cache=True), best.generate(**prompt, use_cache=False))


def _rows(folder: Path, file: str, num_rows: int, seed: int | None = None) -> torch.Tensor:
    rows = pack_rows(
        load_text(STORIES / file), AutoTokenizer.from_pretrained(folder), LENGTH, max_rows=num_rows, seed=seed
    )
    return torch.tensor(rows["input_ids"])


@torch.no_grad()
def _loss(model: PreTrainedModel, rows: torch.Tensor) -> float:
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
