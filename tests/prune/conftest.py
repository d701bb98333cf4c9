"""Tiny random models of every family in the table, on which the identities of pruning are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_minitron.architectures import FAMILIES

TINY = {  # every axis has a length of its own, and head_dim is not hidden_size / num_attention_heads
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BIASED = {"attention_bias": True, "mlp_bias": True}


def _variants() -> dict[str, tuple[str, dict]]:
    found = {}
    for name, family in FAMILIES.items():
        found[name] = (name, {})
        found[f"{name}-tied"] = (name, {"tie_word_embeddings": True})
        found[f"{name}-ungrouped"] = (name, {"num_key_value_heads": 6})
        if any(inner.endswith(".bias") for inner in family.layer_tensors):
            found[f"{name}-biased"] = (name, BIASED)
    return found


VARIANTS = _variants()


def make_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    """A model whose every parameter, gains and biases too, is random, so that nothing is equal by chance."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**TINY | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (1 if name.endswith("norm.weight") else 0))
            parameter.data = parameter.data.to(dtype)  # model.to() would round the rotary frequencies too
    return model.eval()


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    return make_model


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def source(request) -> PreTrainedModel:
    """A model of each family, tied and untied, with and without grouped queries, and with biases where it has them."""
    family, settings = request.param
    return make_model(family, **settings)


@pytest.fixture(params=FAMILIES)
def family_name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def rows() -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (7, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits(rows: torch.Tensor) -> Callable[[PreTrainedModel], torch.Tensor]:
    """The logits of a model over ``rows``, as float32."""

    @torch.no_grad()
    def compute(model: PreTrainedModel) -> torch.Tensor:
        return model(input_ids=rows, use_cache=False).logits.float()

    return compute


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model, and a tokenizer if given, as a checkpoint folder and returns the folder."""

    def save(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None, name: str = "source", **options
    ) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return save
