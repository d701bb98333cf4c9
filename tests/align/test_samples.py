"""On-policy pairs: seeds, resumption, the best and the worst, ties, and what vLLM would be asked."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from hf_minitron.align import samples
from hf_minitron.align.samples import Sampling, sample_pairs, sample_responses
from hf_minitron.checkpoint import Checkpoint

PROMPTS = ["the quick", "a lazy dog", "owls", "while the fox", "again"]
SAMPLING = Sampling(num_samples=3, max_new_tokens=6, batch_size=2, seed=1)


@pytest.fixture
def source(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint)


def by_length(exchanges):
    return [float(len(str(exchange.response))) for exchange in exchanges]


def test_the_seed_decides_what_is_sampled(tmp_path, source, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_minitron"):
        found = sample_responses(source, PROMPTS, SAMPLING, tmp_path / "a")
    assert "of 15 responses were cut off after 6 tokens" in caplog.text
    assert [len(responses) for responses in found] == [3] * 5 and len({text for row in found for text in row}) > 10
    torch.rand(7)
    assert sample_responses(source, PROMPTS, SAMPLING, tmp_path / "b") == found
    other = Sampling(num_samples=3, max_new_tokens=6, batch_size=2, seed=2)
    assert sample_responses(source, PROMPTS, other, tmp_path / "b") != found


def test_a_stopped_run_goes_on_and_samples_the_same(tmp_path, source, monkeypatch):
    whole = sample_responses(source, PROMPTS, SAMPLING, tmp_path / "whole")
    lines = (tmp_path / "whole" / "samples-0.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "samples-0.jsonl").write_text(lines[0] + lines[1][:30])
    answered = []
    make = samples._by_transformers

    def counted(*arguments):
        generate = make(*arguments)
        return lambda texts, seed: answered.append(texts) or generate(texts, seed)

    monkeypatch.setattr(samples, "_by_transformers", counted)
    assert sample_responses(source, PROMPTS, SAMPLING, tmp_path / "parts") == whole
    assert answered == [PROMPTS[2:4], PROMPTS[4:]]
    assert (tmp_path / "parts" / "samples-0.jsonl").read_text() == "".join(lines)


def test_the_best_and_the_worst_make_a_pair_and_ties_are_counted(tmp_path, source, caplog):
    def judge(exchanges):
        return [0.5 if exchange.prompt == "owls" else float(len(exchange.response)) for exchange in exchanges]

    with caplog.at_level(logging.INFO, logger="hf_minitron"):
        pairs = sample_pairs(source, PROMPTS, judge, SAMPLING, tmp_path)
    assert "1 of 5 prompts are left out: all responses have one reward" in caplog.text
    assert pairs["prompt"][:] == [prompt for prompt in PROMPTS if prompt != "owls"]
    responses = dict(zip(PROMPTS, sample_responses(source, PROMPTS, SAMPLING, tmp_path), strict=True))
    for pair in pairs:
        lengths = [len(text) for text in responses[pair["prompt"]]]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(lengths), min(lengths))
        assert len(pair["chosen"]) == max(lengths) and pair["rejected"] in responses[pair["prompt"]]
    with pytest.raises(ValueError, match="None of 5 prompts has responses of different rewards"):
        sample_pairs(source, PROMPTS, lambda_of_one, SAMPLING, tmp_path / "flat")


def lambda_of_one(exchanges):
    return [1.0] * len(exchanges)


def test_chats_are_written_by_the_template_and_answered_as_messages(tmp_path, source, monkeypatch):
    texts = []
    monkeypatch.setattr(samples, "_choose_generator", lambda: lambda *_: lambda batch, seed: (
        texts.extend(batch) or [[f"{text}{n}" + "x" * n for n in range(3)] for text in batch], 0))  # fmt: skip
    monkeypatch.setattr(
        samples.AutoTokenizer, "from_pretrained", lambda folder, of=AutoTokenizer.from_pretrained: _chatty(of(folder))
    )
    prompt = [{"role": "user", "content": "hi"}]
    (pair,) = sample_pairs(source, [prompt], by_length, SAMPLING, tmp_path)
    assert texts == ["user: hi\nassistant: "]
    assert pair["prompt"] == prompt and pair["chosen"] == [{"role": "assistant", "content": "user: hi\nassistant: 2xx"}]


def _chatty(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def test_vllm_is_asked_for_the_same(tmp_path, source, monkeypatch):
    """Against a stand-in: vLLM itself is not installed where the tests run."""
    asked = []

    class LLM:
        def __init__(self, model, seed):
            asked.append((model, seed))

        def generate(self, prompts, how, use_tqdm):
            asked.append((prompts, how))
            one = SimpleNamespace(text="yes", finish_reason="stop")
            cut = SimpleNamespace(text="no", finish_reason="length")
            return [SimpleNamespace(outputs=[one, cut, one]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.setattr(samples, "_choose_generator", lambda: samples._by_vllm)
    assert sample_responses(source, PROMPTS[:2], SAMPLING, tmp_path) == [["yes", "no", "yes"]] * 2
    (model, seed), (prompts, how) = asked
    assert (model, seed) == (str(source.folder), 1)
    assert prompts[0]["prompt_token_ids"] == AutoTokenizer.from_pretrained(source.folder)("the quick")["input_ids"]
    assert (how["n"], how["max_tokens"], how["temperature"], how["top_p"]) == (3, 6, 1.0, 1.0)


def test_settings_that_sample_nothing_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"temperature=0\.0, top_p=1\.0: samples differ only above"):
        Sampling(2, temperature=0.0)
    with pytest.raises(ValueError, match="no prompts"):
        sample_responses(source, [], SAMPLING, tmp_path)
