"""The table of families: every tensor has its axes, and the papers' models come out with exactly their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from transformers import CONFIG_MAPPING, GPT2Config, PreTrainedConfig

from hf_minitron.architectures import AXES, FAMILIES, get_family, get_head_dim
from hf_minitron.prune.plan import PruneConfig, build_empty, count_parameters, target_config, target_sizes


@dataclass(frozen=True)
class Published:
    """A model of the family and what the papers (or their published checkpoints) made of it by width pruning."""

    config: dict
    source: tuple[int, int]  # parameters: in all, and without embedding and head
    prune: PruneConfig
    pruned: tuple[int, int]
    derived_head_dim: tuple[int, int]  # head_dim and parameters in all, were head_dim left to be derived
    settings: dict = field(default_factory=dict)  # of the source that pruning must leave alone


LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED = {  # one line a family: a test fails for a family that has none
    "llama": Published(
        config={
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA_ROPE,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        source=(8_030_261_248, 6_979_588_096),
        prune=PruneConfig(hidden_size=3072, intermediate_size=9216),
        pruned=(4_512_746_496, 3_724_741_632),
        derived_head_dim=(96, 4_261_088_256),
        settings={"rope_parameters": LLAMA_ROPE, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    ),
    "mistral": Published(
        config={
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        source=(12_247_782_400, 10_905_605_120),
        prune=PruneConfig(hidden_size=4096, intermediate_size=11520),
        pruned=(8_414_105_600, 7_340_363_776),
        derived_head_dim=(128, 8_414_105_600),
        settings={"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "sliding_window": None},
    ),
}
DISTINCT = {  # a length of its own for every axis: q is 48, kv 16
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LENGTHS = {"vocab": 61, "hidden": 24, "ffn": 40, "q": 48, "kv": 16}


def test_every_family_has_a_published_model():
    assert set(PUBLISHED) == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str):
    published = PUBLISHED[name]
    config = _config(name, published.config)
    assert _counts(config) == published.source
    target = target_config(config, target_sizes(config, published.prune))
    assert _counts(target) == published.pruned
    assert {key: getattr(target, key) for key in published.settings} == published.settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_head_dim_is_explicit_in_the_target(name: str):
    published = PUBLISHED[name]
    config = _config(name, published.config)
    values = target_config(config, target_sizes(config, published.prune)).to_dict()
    assert values["head_dim"] == 128
    derived = _config(name, values | {"head_dim": None})
    assert (get_head_dim(derived), _counts(derived)[0]) == published.derived_head_dim


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_dim_that_was_derived_is_written_out(name: str):
    config = _config(name, DISTINCT)
    config.head_dim = None
    target = target_config(config, target_sizes(config, PruneConfig(hidden_size=12)))
    assert target.head_dim == 24 // 6


def test_parts_add_up():
    counts = count_parameters(_config("llama", PUBLISHED["llama"].config))
    assert counts["embedding"] == counts["head"] == 128256 * 4096
    assert counts["attention"] == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    assert counts["feed_forward"] == 32 * 3 * 4096 * 14336
    assert counts["norms"] == 65 * 4096
    assert counts["total"] == sum(counts[part] for part in ("embedding", "head", "attention", "feed_forward", "norms"))


def test_a_tied_head_is_counted_once():
    counts = count_parameters(_config("llama", DISTINCT | {"tie_word_embeddings": True}))
    assert counts["head"] == 0
    assert counts["total"] - counts["non_embedding"] == counts["embedding"] == 61 * 24


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_axes_are_as_long_as_the_tensor(name: str, biased: bool):
    config = _config(name, DISTINCT | {"attention_bias": biased, "mlp_bias": biased})
    tensors = build_empty(config).state_dict()
    for tensor_name, tensor in tensors.items():
        axes = FAMILIES[name].axes(tensor_name)
        assert tuple(LENGTHS[axis] for axis in axes) == tuple(tensor.shape), tensor_name
    assert FAMILIES[name].embedding in tensors
    assert FAMILIES[name].head in tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_of_the_table_is_a_tensor_of_the_family(name: str):
    """Nothing in the table is misspelt or left over: with all biases on, the model has each of its tensors."""
    family = FAMILIES[name]
    tensors = set(build_empty(_config(name, DISTINCT | {"attention_bias": True, "mlp_bias": True})).state_dict())
    written = {family.layer_name(0, inner) for inner in family.layer_tensors} | set(family.outer_tensors)
    assert written <= tensors
    assert {axis for axes in family.layer_tensors.values() for axis in axes.split()} <= set(AXES)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_read_the_axis_they_rank(name: str):
    """The input of a site is the last axis of its weight; the norms' outputs are the hidden channels."""
    family = FAMILIES[name]
    assert family.axes(family.layer_name(0, f"{family.neuron_site}.weight"))[-1] == "ffn"
    assert family.axes(family.layer_name(0, f"{family.head_site}.weight"))[-1] == "q"
    layer = build_empty(_config(name, DISTINCT)).get_submodule(family.layers)[0]
    norms = {n for n, module in layer.named_modules() if n.endswith("norm")}
    assert set(family.norm_sites) == norms
    for site in (family.neuron_site, family.head_site, *family.norm_sites):
        assert isinstance(layer.get_submodule(site), torch.nn.Module)


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_names_go_both_ways(name: str):
    family = FAMILIES[name]
    assert family.split_layer(family.layer_name(12, "mlp.up_proj.weight")) == (12, "mlp.up_proj.weight")
    assert family.split_layer(family.embedding) == (None, None)


def test_unknown_tensor_is_named():
    with pytest.raises(ValueError, match=r"mlp\.router\.weight.*unknown in family 'llama'.*architectures\.py"):
        FAMILIES["llama"].axes("model.layers.0.mlp.router.weight")


def test_unsupported_family_lists_the_supported_and_the_way_to_add_one():
    with pytest.raises(ValueError, match=r"model_type='gpt2'") as error:
        get_family(GPT2Config())
    message = str(error.value)
    assert all(name in message for name in FAMILIES)
    assert "architectures.py" in message
    assert "tests/test_architectures.py" in message


def test_head_dim_of_a_config_that_leaves_it_out():
    config = _config("llama", DISTINCT)
    assert get_head_dim(config) == 8
    config.head_dim = None
    assert get_head_dim(config) == 4
    del config.head_dim
    assert get_head_dim(config) == 4


def _config(name: str, values: dict) -> PreTrainedConfig:
    return CONFIG_MAPPING[name](**{key: value for key, value in values.items() if key != "model_type"})


def _counts(config: PreTrainedConfig) -> tuple[int, int]:
    counts = count_parameters(config)
    return counts["total"], counts["non_embedding"]
