"""A strict Hub on loopback, this process pointed at it, and small checkpoint folders to push."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.numpy import save_file

from hf_minitron import hub_access


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which tests then import by its name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


local_hub_module = load_beside("local_hub")
load_beside("lineages")

TOKEN = "hf_alice"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def quiet_client_without_xet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The local hub does not speak xet, which the client uses unasked, and is there where the Hub is switched off."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[local_hub_module.LocalHub]:
    """A fresh hub; a client process gets ``local_hub.env(home)``."""
    with local_hub_module.LocalHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def hub(local_hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> local_hub_module.LocalHub:
    """The hub, with this process as its client: alice's token, an empty cache, short waits."""
    home = tmp_path / "home"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    values = {
        "ENDPOINT": local_hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": local_hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_access, "FIRST_WAIT", 0.01)
    return local_hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint folder with lineage, and beside what belongs on the Hub things that do not."""
    return write_checkpoint(tmp_path / "small-model")


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Config, random weights, tokenizer files, a one-stage lineage; optimizer, logs, caches and an .env."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": random.normal(size=(64, 16)).astype(np.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stage = {"stage": "prune", "inputs": {"source": {"id": "acme/big", "commit": "c" * 40, "card": {"license": "mit"}}}}
    files = {
        "config.json": json.dumps(CONFIG),
        "generation_config.json": "{}",
        "tokenizer.json": '{"model": {}}',
        "tokenizer_config.json": "{}",
        "minitron.json": json.dumps({"format_version": 1, "stages": [stage]}),
        "prune_plan.json": "{}",
        "distill_log.json": "[]",
        "plots/loss.png": "not really",
        "optimizer.pt": "state",
        "training_args.bin": "pickle",
        "trainer_state.json": "{}",
        "checkpoint-10/model.safetensors": "half trained",
        "runs/events.log": "log",
        "run.log": "log",
        ".env": "SECRET=1",
        ".cache/huggingface/x.lock": "",
        "notes.txt": "mine",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
