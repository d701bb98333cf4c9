"""Tiny random models of every family in the table, on which the identities of pruning are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_minitron.architectures import FAMILIES, get_family
from hf_minitron.prune.target import PruneConfig

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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # some classes default to one beyond this vocabulary
}
PECULIAR = {  # what a family has beyond sizes: layers that differ, windows shorter than the rows, factors, caps
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"sliding_window": 8, "partial_rotary_factor": 0.5},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
}
BIASED = {"attention_bias": True, "mlp_bias": True}


def _variants() -> dict[str, tuple[str, dict]]:
    found = {}
    for name in FAMILIES:
        found[name] = (name, {})
        found[f"{name}-tied"] = (name, {"tie_word_embeddings": True})
        found[f"{name}-ungrouped"] = (name, {"num_key_value_heads": 6})
        biased = {key: value for key, value in BIASED.items() if hasattr(CONFIG_MAPPING[name](), key)}
        if biased:
            found[f"{name}-biased"] = (name, biased)
    return found


VARIANTS = _variants()
DROP_HEADS = [name for name, family in FAMILIES.items() if "num_attention_heads" not in family.fixed]


def make_config(family: str, **settings) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**TINY | PECULIAR.get(family, {}) | settings)


def make_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    """A model whose every parameter is random, so that nothing is equal by chance; gains are around 1."""
    model = AutoModelForCausalLM.from_config(make_config(family, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            module = model.get_submodule(name.rpartition(".")[0])
            gain = 1 - _gain_at_zero(module) if name.endswith("norm.weight") else 0
            parameter.copy_(0.2 * noise + gain)
            parameter.data = parameter.data.to(dtype)  # model.to() would round the rotary frequencies too
    return model.eval()


def halve(config: PreTrainedConfig, **settings) -> PruneConfig:
    """About half of everything that the family lets shrink."""
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 4}
    return PruneConfig(**{key: n for key, n in sizes.items() if key not in get_family(config).fixed}, **settings)


def find_projections(model: PreTrainedModel, layer: int, axis: str) -> list[dict[str, torch.Tensor]]:
    """What reads the residual stream into ``axis``, in the table's order: views of the rows of weight and bias.

    Stacked projections count one by one, so that ``kv`` gives keys and values of every family.
    """
    family, found = get_family(model.config), []
    held = {name: tensor.detach() for name, tensor in model.named_parameters()}
    length = {"q": "num_attention_heads", "kv": "num_key_value_heads", "ffn": "intermediate_size"}
    for inner, axes in family.layer_tensors.items():
        first, *rest = axes.split()
        if rest != ["hidden"]:
            continue
        weight = held[family.layer_name(layer, inner)]
        bias = held.get(family.layer_name(layer, inner.removesuffix("weight") + "bias"))
        stacked = first.split("+")
        lengths = [getattr(model.config, length[part]) * (1 if part == "ffn" else TINY["head_dim"]) for part in stacked]
        for index, part in enumerate(stacked):
            if part == axis:
                both = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
                found.append({name: tensor.split(lengths)[index] for name, tensor in both.items()})
    return found


@torch.no_grad()
def plant_gain(norm: torch.nn.Module, gain: torch.Tensor) -> None:
    """Makes a norm multiply by ``gain`` and add nothing, also where its weight is the gain less one."""
    norm.weight.copy_(gain - _gain_at_zero(norm))
    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()


@torch.no_grad()
def _gain_at_zero(norm: torch.nn.Module) -> float:
    """What a norm multiplies by when its weight is zero, found by trying: 0, or 1 where the gain is one more."""
    norm = copy.deepcopy(norm)
    for parameter in norm.parameters():
        parameter.zero_()
    signs = 1 - 2.0 * (torch.arange(len(norm.weight)) % 2)
    return norm(signs).abs().mean().round().item()


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    return make_model


@pytest.fixture
def build_config() -> Callable[..., PreTrainedConfig]:
    return make_config


@pytest.fixture
def half_of() -> Callable[..., PruneConfig]:
    return halve


@pytest.fixture
def projections() -> Callable[..., list[dict[str, torch.Tensor]]]:
    return find_projections


@pytest.fixture
def set_gain() -> Callable[..., None]:
    return plant_gain


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def source(request) -> PreTrainedModel:
    """A model of each family, tied and untied, with and without grouped queries, and with biases where it has them."""
    family, settings = request.param
    return make_model(family, **settings)


@pytest.fixture(params=[v for v in VARIANTS if VARIANTS[v][0] in DROP_HEADS])
def source_of_heads(request) -> PreTrainedModel:
    """Like ``source``, of the families that can drop heads."""
    family, settings = VARIANTS[request.param]
    return make_model(family, **settings)


@pytest.fixture(params=FAMILIES)
def family_name(request) -> str:
    return request.param


@pytest.fixture(params=DROP_HEADS)
def family_of_heads(request) -> str:
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
