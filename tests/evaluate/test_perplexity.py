"""Perplexity against direct computations, and that windows, batches and chunks do not change it."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_minitron.evaluate import perplexity
from hf_minitron.evaluate.perplexity import evaluate_perplexity, ratio_standard_error, row_losses

TEXTS = [
    "Once upon a time there was a small model.",
    "The lazy dog learned from a big brown fox, again and again, until the fox was tired. " * 3,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 日本語 🦊",
    "a",
]


@pytest.fixture
def model(tiny_llama_config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(tiny_llama_config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the uniform distribution of a fresh model
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def direct_losses(model, ids):
    """Losses of all tokens but the first, from the whole logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def document_ids(tokenizer, text):
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def num_tokens(tokenizer, texts=TEXTS):
    return sum(len(document_ids(tokenizer, text)) - 1 for text in texts)


def without_special_tokens(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def test_one_short_document_equals_the_models_logits(model, tiny_tokenizer):
    expected = direct_losses(model, document_ids(tiny_tokenizer, TEXTS[0]))
    result = evaluate_perplexity(model, tiny_tokenizer, TEXTS[:1])
    assert result.num_tokens == len(expected)
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)
    assert (result.context_length, result.stride, result.standard_error) == (64, 32, None)


def test_the_models_own_loss_is_the_same(model, tiny_tokenizer):
    ids = torch.tensor([document_ids(tiny_tokenizer, TEXTS[0])])
    with torch.inference_mode():
        expected = model(ids, labels=ids).loss.item()
    assert evaluate_perplexity(model, tiny_tokenizer, TEXTS[:1]).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("context_length", "stride"), [(16, 1), (16, 5), (16, 8), (16, 16), (2, 1), (64, 33)])
def test_every_token_is_scored_once_with_the_context_of_its_window(model, tiny_tokenizer, context_length, stride):
    ids = document_ids(tiny_tokenizer, TEXTS[1])
    assert len(ids) > 80
    total, scored = 0.0, 0
    while scored < len(ids) - 1:  # the definition, one window after the other
        begin = 0 if scored == 0 else scored + stride - context_length
        begin = max(0, math.ceil(begin / stride) * stride)
        end = min(begin + context_length, len(ids) - 1)
        total += direct_losses(model, ids[begin : end + 1])[scored - begin :].sum().item()
        scored = end
    result = evaluate_perplexity(model, tiny_tokenizer, [TEXTS[1]], context_length=context_length, stride=stride)
    assert result.num_tokens == len(ids) - 1
    assert result.loss == pytest.approx(total / (len(ids) - 1), rel=1e-6)


@pytest.mark.parametrize("num_ids", [2, 3, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_windows_cover_every_position_once(num_ids, stride):
    windows = list(perplexity._windows(0, num_ids, 16, stride))
    assert [i for w in windows for i in range(w.score_from, w.end)] == list(range(num_ids - 1))
    assert all(w.begin <= w.score_from < w.end <= w.begin + 16 for w in windows)
    assert all(w.score_from - w.begin >= 16 - stride for w in windows[1:])


def test_stride_changes_the_context_but_not_the_count(model, tiny_tokenizer):
    disjoint = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=16, stride=16)
    sliding = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=16, stride=4)
    assert disjoint.num_tokens == sliding.num_tokens == num_tokens(tiny_tokenizer)
    assert disjoint.num_bytes == sliding.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert abs(disjoint.loss - sliding.loss) > 1e-4


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batch_size_does_not_matter(model, tiny_tokenizer, batch_size):
    one = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=24, stride=7, batch_size=1)
    many = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=24, stride=7, batch_size=batch_size)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.standard_error == pytest.approx(one.standard_error, rel=1e-5)


def test_chunks_of_logits_do_not_matter_and_are_small(model, tiny_tokenizer, monkeypatch):
    whole = evaluate_perplexity(model, tiny_tokenizer, TEXTS)
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", 4 * model.config.vocab_size * 5)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.shape[:-1].numel()))
    assert evaluate_perplexity(model, tiny_tokenizer, TEXTS).loss == pytest.approx(whole.loss, rel=1e-6)
    assert max(sizes[2:]) == 5  # the first two look at the head
    assert sum(sizes[2:]) == whole.num_tokens  # nothing but scored positions


def test_uniform_output_has_the_loss_log_of_the_vocabulary(model, tiny_tokenizer):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=16)
    assert result.loss == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)
    assert result.perplexity == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-6)


def test_bits_per_byte_counts_utf8(model, tiny_tokenizer):
    text = TEXTS[2]
    assert len(text.encode()) > len(text) + 10
    result = evaluate_perplexity(model, tiny_tokenizer, [text])
    assert result.num_bytes == len(text.encode())
    expected = result.loss * result.num_tokens / math.log(2) / len(text.encode())
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-12)


def test_tokens_are_weighted_alike_and_documents_give_the_standard_error(model, tiny_tokenizer):
    losses = [direct_losses(model, document_ids(tiny_tokenizer, text)).numpy() for text in (TEXTS[0], TEXTS[2], "fox")]
    sums, counts = [x.sum() for x in losses], [len(x) for x in losses]
    loss = sum(sums) / sum(counts)
    error = math.sqrt(3 / 2 * sum((s - loss * n) ** 2 for s, n in zip(sums, counts, strict=True))) / sum(counts)
    model.config.max_position_embeddings = 512  # rotary: no window
    result = evaluate_perplexity(model, tiny_tokenizer, [TEXTS[0], TEXTS[2], "fox"])
    assert result.num_documents == 3
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.standard_error == pytest.approx(error, rel=1e-5)


def test_without_a_start_token_the_first_token_and_its_bytes_are_left_out(model, tiny_tokenizer):
    tokenizer = without_special_tokens(tiny_tokenizer)
    text = "The quick 🦊"
    ids = tokenizer(text)["input_ids"]
    first = tokenizer.decode(ids[:1])
    result = evaluate_perplexity(model, tokenizer, [text, "a"])
    assert result.num_documents == 1  # of "a" nothing is left
    assert result.num_tokens == len(ids) - 1
    assert result.num_bytes == len(text.encode()) - len(first.encode())
    assert result.loss == pytest.approx(direct_losses(model, ids).mean().item(), rel=1e-6)


def test_eos_starts_a_document_where_there_is_no_bos(model, tiny_tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>")
    ids = [tokenizer.eos_token_id, *tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]]
    result = evaluate_perplexity(model, tokenizer, TEXTS[:1])
    assert result.loss == pytest.approx(direct_losses(model, ids).mean().item(), rel=1e-6)


def test_max_tokens_cuts_the_last_document_and_its_bytes(model, tiny_tokenizer):
    first = num_tokens(tiny_tokenizer, TEXTS[:1])
    result = evaluate_perplexity(model, tiny_tokenizer, TEXTS, max_tokens=first + 4)
    ids = tiny_tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert (result.num_tokens, result.num_documents) == (first + 4, 2)
    assert result.num_bytes == len(TEXTS[0].encode()) + len(tiny_tokenizer.decode(ids[:4]).encode())


def test_max_tokens_stops_reading(model, tiny_tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": TEXTS[0]}

    texts = IterableDataset.from_generator(endless)
    assert evaluate_perplexity(model, tiny_tokenizer, texts, max_tokens=50).num_tokens == 50
    assert len(read) <= 50


def test_a_data_set_is_the_same_as_its_strings(model, tiny_tokenizer):
    rows = Dataset.from_dict({"text": [*TEXTS, "", None]})
    assert evaluate_perplexity(model, tiny_tokenizer, rows) == evaluate_perplexity(model, tiny_tokenizer, TEXTS)


def test_a_model_that_caps_its_logits_is_scored_by_its_own_forward(tiny_tokenizer, tiny_llama_config):
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: getattr(tiny_llama_config, name) for name in (*names, "num_hidden_layers")}
    config = Gemma2Config(**sizes, max_position_embeddings=64, final_logit_softcapping=0.5, attn_implementation="eager")
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    expected = direct_losses(model, document_ids(tiny_tokenizer, TEXTS[0])).mean().item()
    assert evaluate_perplexity(model, tiny_tokenizer, TEXTS[:1]).loss == pytest.approx(expected, rel=1e-6)
    one = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=16, stride=5, batch_size=1)
    many = evaluate_perplexity(model, tiny_tokenizer, TEXTS, context_length=16, stride=5)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)


def test_modes_are_restored_and_nothing_is_trained(model, tiny_tokenizer):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    evaluate_perplexity(model, tiny_tokenizer, TEXTS[:1])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off(model, tiny_tokenizer):
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    quiet = evaluate_perplexity(model.eval(), tiny_tokenizer, TEXTS[:1])
    assert evaluate_perplexity(model.train(), tiny_tokenizer, TEXTS[:1]) == quiet


def test_result_is_ready_for_json(model, tiny_tokenizer):
    facts = evaluate_perplexity(model, tiny_tokenizer, TEXTS[:1]).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert "standard_error" not in facts  # one document has none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 16, "stride": 17}, "stride=17"),
        ({"stride": 0}, "stride=0"),
        ({"context_length": 1}, "context_length=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_sizes_that_make_no_sense(model, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model, tiny_tokenizer, TEXTS, **options)


@pytest.mark.parametrize("texts", [[], ["", "  \n"], Dataset.from_dict({"text": [""]})])
def test_no_text(model, tiny_tokenizer, texts):
    with pytest.raises(ValueError, match="no token to score"):
        evaluate_perplexity(model, tiny_tokenizer, texts)


def test_one_string_is_not_a_list_of_documents(model, tiny_tokenizer):
    with pytest.raises(TypeError, match="one string"):
        evaluate_perplexity(model, tiny_tokenizer, TEXTS[0])


def test_nan_is_an_error_and_the_mode_is_restored(model, tiny_tokenizer):
    model.train()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="loss=nan"):
        evaluate_perplexity(model, tiny_tokenizer, TEXTS[:1])
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 4])
def test_row_losses_are_those_of_every_row(model, batch_size):
    rows = torch.randint(0, 300, (5, 12), generator=torch.Generator().manual_seed(0)).tolist()
    nats = row_losses(model, rows, batch_size=batch_size)
    assert nats == pytest.approx([direct_losses(model, row).sum().item() for row in rows], rel=1e-6)


def test_the_paired_error_is_that_of_the_differences_and_forgets_what_rows_share():
    generator = np.random.default_rng(0)
    hard, one, other = generator.normal(40, 10, 200), generator.normal(0, 0.5, 200), generator.normal(1, 0.5, 200)
    tokens = np.full(200, 20)
    difference = (other - one) / 20
    expected = difference.std(ddof=1) / math.sqrt(200)
    assert ratio_standard_error((hard + other) - (hard + one), tokens) == pytest.approx(expected)
    assert ratio_standard_error(hard + one, tokens) > 10 * expected
    assert ratio_standard_error(hard[:1], tokens[:1]) is None


def test_rows_without_a_prediction_and_nan_are_refused(model):
    for rows in ([], [[1, 2], [3]]):
        with pytest.raises(ValueError, match="two tokens"):
            row_losses(model, rows)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        row_losses(model, [[1, 2, 3]])
