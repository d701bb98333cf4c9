"""Chat templates: what they write, their marks, new tokens and the rows that these get."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM
from trl.chat_template_utils import is_chat_template_stop_token_trained, qwen2_5_chat_template

from hf_minitron.align.templates import (
    CHAT_TEMPLATES,
    add_chat_template,
    check_chat_template,
    fit_model,
    training_tokenizer,
)

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "well"},
]
WRITTEN = {
    "chatml": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "ho<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nwell<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nho<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "well<|eot_id|>",
    "plain": "### system:\nbe kind</s>\n### user:\nhi</s>\n### assistant:\nho</s>\n### user:\nmore</s>\n"
    "### assistant:\nwell</s>\n",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "</s>"}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


def model_of(config, tied=False, rows=300):
    config = config.__class__.from_dict(config.to_dict() | {"tie_word_embeddings": tied, "vocab_size": rows})
    torch.manual_seed(1)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_what_a_template_writes_and_what_of_it_is_learned(tokenizer, name, caplog):
    with caplog.at_level(logging.INFO, logger="hf_minitron"):
        add_chat_template(tokenizer, name)
    assert f"The chat template {name} is added" in caplog.text and "(assistant's words)" in caplog.text
    assert "generation %}" not in tokenizer.chat_template  # marks are for training; not every reader knows them
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == WRITTEN[name]
    start = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert WRITTEN[name].startswith(start) and WRITTEN[name][len(start) :].startswith("well")
    marked = training_tokenizer(tokenizer)
    found = marked.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    learned = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned) == f"ho{ENDS[name]}well{ENDS[name]}"
    assert is_chat_template_stop_token_trained(marked) or name == "plain"  # whose end is no added token here
    assert tokenizer.eos_token == ENDS[name] and len(tokenizer.encode(ENDS[name])) == 1


def test_bos_stands_in_front_where_the_tokenizer_adds_it(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    add_chat_template(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "<s>" + WRITTEN["chatml"]
    marked = training_tokenizer(tokenizer).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(marked["assistant_masks"]) > 2 and marked["input_ids"][0] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_rows_for_new_tokens_leave_the_rest_and_ties_alone(tokenizer, tiny_llama_config, tied):
    model = model_of(tiny_llama_config, tied)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert add_chat_template(tokenizer, "chatml") == ["<|im_start|>", "<|im_end|>"]
        fit_model(model, tokenizer, seed=0)
        torch.testing.assert_close(model(ids).logits[..., :300], expected, rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == model.lm_head.out_features == len(model.lm_head.weight) == len(tokenizer) == 302
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(value[: len(old[name])], old[name]), name
    new = model.model.embed_tokens.weight[300:]
    assert new.isfinite().all() and not torch.equal(new[0], torch.zeros_like(new[0]))
    again = model_of(tiny_llama_config, tied)
    fit_model(again, tokenizer, seed=0)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)  # the seed decides
    assert model.config.eos_token_id == 301 and model.generation_config.eos_token_id == [301, 1]


@pytest.mark.parametrize(("rows", "expected"), [(320, 320), (300, 302), (256 + 64, 320)])
def test_spare_rows_are_used_first(tokenizer, tiny_llama_config, rows, expected):
    model = model_of(tiny_llama_config, rows=rows)
    add_chat_template(tokenizer, "chatml")
    fit_model(model, tokenizer, seed=0)
    assert model.lm_head.out_features == expected


def test_aligned_rows_stay_aligned(tokenizer, tiny_llama_config):
    tokenizer.add_tokens([f"<spare{i}>" for i in range(20)])
    model = model_of(tiny_llama_config, rows=320)
    add_chat_template(tokenizer, "chatml")
    fit_model(model, tokenizer, seed=0)
    assert len(tokenizer) == 322 and model.lm_head.out_features == 384


def test_one_template_twice_is_nothing_and_another_is_refused(tokenizer):
    add_chat_template(tokenizer, "chatml")
    assert add_chat_template(tokenizer, "chatml") == []
    with pytest.raises(ValueError, match="chat_template=plain: the tokenizer has a chat template of its own"):
        add_chat_template(tokenizer, "plain")
    with pytest.raises(ValueError, match="chat_template='chat' is unknown: use one of chatml, llama3, plain"):
        add_chat_template(tokenizer, "chat")


def test_plain_needs_an_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"ends turns by eos, which the tokenizer lacks. Use chatml"):
        add_chat_template(tokenizer, "plain")


def test_templates_without_marks_are_marked_or_refused(tokenizer):
    tokenizer.chat_template = qwen2_5_chat_template
    assert "generation %}" in training_tokenizer(tokenizer).chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"no \{% generation %\} marks .* or give the data as prompt and completion"):
        training_tokenizer(tokenizer)
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    tokenizer.chat_template = marked
    assert training_tokenizer(tokenizer).chat_template == marked


def test_conversations_need_a_template(tokenizer):
    with pytest.raises(ValueError, match=r"no chat template. Add one by --chat-template: chatml, llama3, plain"):
        check_chat_template(tokenizer, None, conversational=True)
    check_chat_template(tokenizer, "chatml", conversational=True)
    check_chat_template(tokenizer, None, conversational=False)
