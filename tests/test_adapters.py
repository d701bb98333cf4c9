"""LoRA options: what gets adapters, what is refused, and merging."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minitron.adapters import LoraArguments, add_adapters, merged_copy


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


def adapted_names(model) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_every_linear_layer_but_the_head_gets_adapters(model):
    adapted = add_adapters(model, LoraArguments(lora_r=4))
    assert adapted_names(adapted) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(("lora_" in name) == value.requires_grad for name, value in adapted.named_parameters())
    assert adapted.active_peft_config.lora_alpha == 8


def test_layers_are_chosen_by_the_ends_of_their_names(model):
    arguments = LoraArguments(
        lora_r=2, lora_alpha=3, lora_dropout=0.1, lora_target_modules=["0.self_attn.q_proj", "v_proj"]
    )
    adapted = add_adapters(model, arguments)
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    layers = range(model.config.num_hidden_layers)
    ends = {"0.self_attn.q_proj", *(f"{layer}.self_attn.v_proj" for layer in layers)}
    assert names == {f"base_model.model.model.layers.{end}" for end in ends}
    config = adapted.active_peft_config
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (2, 3, 0.1, False)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_copy_says_what_the_adapted_model_says(model, use_dora, tied):
    model.config.tie_word_embeddings = tied
    model = type(model)(model.config)
    adapted = add_adapters(model, LoraArguments(lora_r=4, use_dora=use_dora)).eval()
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    before = copy.deepcopy(adapted.state_dict())
    merged = merged_copy(adapted, copy.deepcopy(before))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        plain = type(model)(model.config).eval()
        plain.load_state_dict(merged.state_dict())
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, expected, atol=1e-3)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 4, "use_dora": True}, "lora_alpha, use_dora without lora_r"),
        ({"lora_r": 0}, "lora_r=0 is no rank"),
        ({"lora_r": 4, "lora_alpha": 0}, "lora_alpha=0 would scale"),
        ({"lora_r": 4, "lora_dropout": 1.0}, "lora_dropout=1.0 is not a probability"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraArguments(**options)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("query", r"'query' is the name of no linear layer. There are \['down_proj'"),
        ("lm_head", "'lm_head' is the head"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(model, target, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(model, LoraArguments(lora_r=4, lora_target_modules=["q_proj", target]))
