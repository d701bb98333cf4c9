"""The table of families: every tensor has its axes, and the papers' models come out with exactly their sizes."""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, CohereConfig, GPT2Config, PreTrainedConfig

from hf_minitron.architectures import (
    AXES,
    FAMILIES,
    LogitTransform,
    get_family,
    get_head_dim,
    get_logit_transform,
    support_table,
)
from hf_minitron.prune.target import PruneConfig, build_empty, count_parameters, target_config, target_sizes


@dataclass(frozen=True)
class Pruned:
    """What pruning made of a published model, by the papers and their published checkpoints."""

    prune: PruneConfig
    parameters: tuple[int, int]
    derived_head_dim: tuple[int, int] | None = None  # head_dim and parameters in all, were head_dim left to be derived


@dataclass(frozen=True)
class Published:
    """A model of the family: its config, and its parameters in all and without embedding and head."""

    config: dict
    parameters: tuple[int, int]
    pruned: tuple[Pruned, ...] = ()
    settings: dict = field(default_factory=dict)  # of the source that pruning must leave alone


def _sizes(vocab: int, hidden: int, ffn: int, layers: int, heads: int, groups: int, **others) -> dict:
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    return sizes | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | others


LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NEMO_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
NEMOTRON_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
PUBLISHED = {  # one line a family: a test fails for a family that has none
    "llama": Published(  # Llama-3.1-8B
        _sizes(
            *(128256, 4096, 14336, 32, 32, 8),
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters=LLAMA_ROPE,
            bos_token_id=128000,
            eos_token_id=128001,
        ),
        (8_030_261_248, 6_979_588_096),
        (
            Pruned(PruneConfig(3072, 9216), (4_512_746_496, 3_724_741_632), (96, 4_261_088_256)),
            Pruned(PruneConfig(num_hidden_layers=16), (4_540_469_248, 3_489_796_096)),
        ),
        {"rope_parameters": LLAMA_ROPE, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    ),
    "mistral": Published(  # Mistral-NeMo-12B
        _sizes(
            *(131072, 5120, 14336, 40, 32, 8),
            head_dim=128,
            max_position_embeddings=131072,
            sliding_window=None,
            rope_parameters=NEMO_ROPE,
        ),
        (12_247_782_400, 10_905_605_120),
        (Pruned(PruneConfig(4096, 11520), (8_414_105_600, 7_340_363_776), (128, 8_414_105_600)),),
        {"rope_parameters": NEMO_ROPE, "sliding_window": None},
    ),
    "nemotron": Published(  # Nemotron-4-15B → Minitron-8B and Minitron-4B
        _sizes(256000, 6144, 24576, 32, 48, 8, head_dim=128, rope_parameters=NEMOTRON_ROPE),
        (15_628_775_424, 12_483_047_424),
        (
            Pruned(PruneConfig(4096, 16384), (8_271_699_968, 6_174_547_968), (85, 7_640_457_216)),
            Pruned(PruneConfig(3072, 9216, 24), (4_190_509_056, 2_617_645_056), (128, 4_190_509_056)),
        ),
        {"rope_parameters": NEMOTRON_ROPE, "hidden_act": "relu2", "num_key_value_heads": 8},
    ),
    # Not pruned by the papers: Qwen2.5-7B, Qwen3-8B, Granite-3.3-8B, SmolLM3-3B, Phi-3-mini-4k, Gemma-2-2B, Gemma-3-1B
    # and OLMo-2-7B; in all they have what their checkpoints on the Hub say they have.
    "qwen2": Published(_sizes(152064, 3584, 18944, 28, 28, 4), (7_615_616_512, 6_525_621_760)),
    "qwen3": Published(_sizes(151936, 4096, 12288, 36, 32, 8, head_dim=128), (8_190_735_360, 6_946_075_648)),
    "granite": Published(
        _sizes(49159, 4096, 12800, 40, 32, 8, tie_word_embeddings=True), (8_170_864_640, 7_969_509_376)
    ),
    "smollm3": Published(_sizes(128256, 2048, 11008, 36, 16, 4), (3_075_098_624, 2_812_430_336)),
    "phi3": Published(_sizes(32064, 3072, 8192, 32, 32, 32), (3_821_079_552, 3_624_078_336)),
    "gemma2": Published(_sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256), (2_614_341_888, 2_024_517_888)),
    "gemma3_text": Published(_sizes(262144, 1152, 6912, 26, 4, 1, head_dim=256), (999_885_952, 697_896_064)),
    "olmo2": Published(_sizes(100352, 4096, 11008, 32, 32, 32), (7_298_617_344, 6_476_533_760)),
}
PRUNED = [
    pytest.param(name, pruned, id=f"{name}-{pruned.parameters[0] / 1e9:.2f}B")
    for name, published in PUBLISHED.items()
    for pruned in published.pruned
]
DISTINCT = {  # a length of its own for every axis: q is 48, kv 16
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTHS = {"vocab": 61, "hidden": 24, "ffn": 40, "q": 48, "kv": 16, "head_dim": 8}
README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_family_has_a_published_model():
    assert set(PUBLISHED) == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str):
    assert _counts(_config(name, PUBLISHED[name].config)) == PUBLISHED[name].parameters


@pytest.mark.parametrize(("name", "pruned"), PRUNED)
def test_parameters_of_published_pruned_models(name: str, pruned: Pruned):
    config, settings = _config(name, PUBLISHED[name].config), PUBLISHED[name].settings
    target = target_config(config, target_sizes(config, pruned.prune))
    assert _counts(target) == pruned.parameters
    assert {key: getattr(target, key) for key in settings} == settings


@pytest.mark.parametrize(("name", "pruned"), [p for p in PRUNED if p.values[1].derived_head_dim])
def test_head_dim_is_explicit_in_the_target(name: str, pruned: Pruned):
    config = _config(name, PUBLISHED[name].config)
    values = target_config(config, target_sizes(config, pruned.prune)).to_dict()
    assert values["head_dim"] == 128
    derived = _config(name, values | {"head_dim": None})
    assert (get_head_dim(derived), _counts(derived)[0]) == pruned.derived_head_dim


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_dim_that_was_derived_is_written_out(name: str):
    """Also where the class has no such field; classes with a default of their own never derive it."""
    config = CONFIG_MAPPING[name](**{key: value for key, value in DISTINCT.items() if key != "head_dim"})
    default = getattr(CONFIG_MAPPING[name], "head_dim", None)
    if default is None:
        config.head_dim = None
    target = target_config(config, target_sizes(config, PruneConfig(hidden_size=12)))
    assert target.to_dict()["head_dim"] == (24 // 6 if default is None else default)


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
        lengths = tuple(sum(LENGTHS[part] for part in axis.split("+")) for axis in axes)
        assert lengths == tuple(tensor.shape), tensor_name
    assert FAMILIES[name].embedding in tensors
    assert FAMILIES[name].head in tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_of_the_table_is_a_tensor_of_the_family(name: str):
    """Nothing in the table is misspelt or left over: with all biases on, the model has each of its tensors."""
    family = FAMILIES[name]
    tensors = set(build_empty(_config(name, DISTINCT | {"attention_bias": True, "mlp_bias": True})).state_dict())
    written = {family.layer_name(0, inner) for inner in family.layer_tensors} | set(family.outer_tensors)
    assert written <= tensors
    assert set(" ".join(family.layer_tensors.values()).replace("+", " ").split()) <= set(AXES)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_read_the_axis_they_rank(name: str):
    """The input of a site is the last axis of its weight; the norms' outputs are the hidden channels."""
    family = FAMILIES[name]
    assert family.axes(family.layer_name(0, f"{family.neuron_site}.weight"))[-1] == "ffn"
    assert family.axes(family.layer_name(0, f"{family.head_site}.weight"))[-1] == "q"
    layer = build_empty(_config(name, DISTINCT)).get_submodule(family.layers)[0]
    norms = {n for n, module in layer.named_modules() if n.endswith("norm")}
    assert set(family.norm_sites) == {n for n in norms if family.layer_tensors[f"{n}.weight"] == "hidden"}
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


def test_readme_shows_the_support_table(capsys, monkeypatch):
    """``python -m hf_minitron.architectures`` prints it; paste what it prints."""
    monkeypatch.delitem(sys.modules, "hf_minitron.architectures")
    runpy.run_module("hf_minitron.architectures", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed == support_table() + "\n"
    assert f"<!-- support table -->\n{printed}<!-- end of support table -->" in README.read_text(encoding="utf-8")


def test_the_support_table_says_what_the_rows_say():
    rows = {line.split("`")[1]: line for line in support_table().splitlines() if line.startswith("| `")}
    assert set(rows) == set(FAMILIES)
    assert rows["olmo2"] == "| `olmo2` | yes | yes | no | no | yes | yes | attention |"
    assert rows["nemotron"] == "| `nemotron` | yes | yes | yes | yes | yes | yes | attention, feed-forward, norms |"
    assert rows["mistral"] == "| `mistral` | yes | yes | yes | yes | yes | yes | none |"
    assert "`olmo2` keeps its query heads and key/value groups: its q_norm and k_norm" in support_table()


def test_head_dim_of_a_config_that_leaves_it_out():
    config = _config("llama", DISTINCT)
    assert get_head_dim(config) == 8
    config.head_dim = None
    assert get_head_dim(config) == 4
    del config.head_dim
    assert get_head_dim(config) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_the_transformed_output_of_the_head(name: str):
    """Of a model whose config caps and divides as strongly as it can, and of one that does neither."""
    family = FAMILIES[name]
    asked = {"final_logit_softcapping": 0.3, "logits_scaling": 4.0}
    plain = {"final_logit_softcapping": None, "logits_scaling": 1.0}
    ids = torch.arange(40)[None] % 61
    for settings in (asked, plain):
        torch.manual_seed(0)
        config = _config(name, DISTINCT | settings | {"initializer_range": 0.5})
        model = AutoModelForCausalLM.from_config(config).eval()
        transform = get_logit_transform(model.config)
        with torch.no_grad():
            expected = transform.scale * model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
            if transform.softcap is not None:
                expected = transform.softcap * torch.tanh(expected / transform.softcap)
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
        transformed = settings is asked and bool(family.logit_divisor or family.logit_softcap)
        assert (transform != LogitTransform()) == transformed


def test_logits_of_a_family_outside_the_table_are_those_of_the_head_or_refused():
    assert get_logit_transform(GPT2Config()) == LogitTransform()
    with pytest.raises(ValueError, match=r"logit_scale=0.0625 of model_type='cohere'.*architectures\.py"):
        get_logit_transform(CohereConfig())
    with pytest.raises(ValueError, match=r"softcap=0.0 of the logits"):
        LogitTransform(softcap=0.0)
    with pytest.raises(ValueError, match=r"scale=inf"):
        LogitTransform(scale=float("inf"))


def _config(name: str, values: dict) -> PreTrainedConfig:
    return CONFIG_MAPPING[name](**{key: value for key, value in values.items() if key != "model_type"})


def _counts(config: PreTrainedConfig) -> tuple[int, int]:
    counts = count_parameters(config)
    return counts["total"], counts["non_embedding"]
