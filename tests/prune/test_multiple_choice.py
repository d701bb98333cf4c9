"""Questions for depth pruning from files: how rows are read, tokenized, drawn and judged, and what is no question."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_minitron.prune.multiple_choice import Question, QuestionSet, Request, load_questions

BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "bench"
LENGTH = 4096  # more than any question here has, unless said


def judge(question: Question, *log_probs: float) -> float:
    return question.judge(log_probs, [False] * len(log_probs))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHOICES = {"context": "The fox jumps over", "choices": ["the dog", "a time", "models"], "gold": 1}
OPTIONS = {"context_options": ["The fox saw that", "The dog saw that"], "continuation": "it was lazy", "gold": 0}


@pytest.fixture
def load(tmp_path, tiny_tokenizer):
    """Loads questions from rows that are written to a file first."""

    def load_rows(*rows: dict, **options) -> QuestionSet:
        path = write_lines(tmp_path / "questions.jsonl", rows)
        return load_questions(path, tiny_tokenizer, **{"max_length": LENGTH} | options)

    return load_rows


def decode(tokenizer, question):
    return [(tokenizer.decode(r.context), tokenizer.decode(r.continuation)) for r in question.requests]


def test_one_context_and_several_continuations(load, tiny_tokenizer):
    (question,) = load(CHOICES).questions
    expected = [
        ("The fox jumps over", " the dog"),
        ("The fox jumps over", " a time"),
        ("The fox jumps over", " models"),
    ]
    assert decode(tiny_tokenizer, question) == expected
    assert judge(question, -3, -2, -4) == 1
    assert judge(question, -1, -2, -4) == 0
    assert judge(question, -2, -2, -4) == 0  # of equal ones the first, as numpy's argmax in the harness


def test_several_contexts_and_one_continuation(load, tiny_tokenizer):
    (question,) = load(OPTIONS).questions
    assert decode(tiny_tokenizer, question) == [
        ("The fox saw that", " it was lazy"),
        ("The dog saw that", " it was lazy"),
    ]
    assert judge(question, -1, -2) == 1
    assert judge(question, -2, -1) == 0


def test_the_score_is_the_models_choice(load, tiny_llama_config, tiny_tokenizer):
    """The log-probabilities of the requests' tokens, from the logits of each whole text."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(tiny_llama_config)).eval()
    model.lm_head.weight.data.mul_(20)
    for row, texts in (
        (CHOICES, [f"{CHOICES['context']} {choice}" for choice in CHOICES["choices"]]),
        (OPTIONS, [f"{context} {OPTIONS['continuation']}" for context in OPTIONS["context_options"]]),
    ):
        log_probs = []
        for text, request in zip(texts, load(row).questions[0].requests, strict=True):
            ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
            assert request.context + request.continuation == ids[0].tolist()
            with torch.no_grad():
                nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            log_probs.append(-nats[-len(request.continuation) :].sum().item())
        best = log_probs.index(max(log_probs))
        for gold in range(len(texts)):
            assert judge(load(row | {"gold": gold}).questions[0], *log_probs) == float(gold == best)


def test_acc_norm_divides_by_bytes(load):
    row = {"context": "x", "choices": ["ab", "éé"], "gold": 1}
    (question,) = load(row, metric="acc_norm").questions
    assert judge(question, -1.0, -1.9) == 1  # -0.5 and -0.475 per byte; per character the first would win
    assert judge(question, -1.0, -2.1) == 0
    assert judge(load(row).questions[0], -1.0, -1.9) == 0
    (question,) = load(OPTIONS, metric="acc_norm").questions
    assert judge(question, -1, -2) == 1


@pytest.mark.parametrize("context", ["query", "question", "ctx", "prompt"])
@pytest.mark.parametrize("choices", ["endings", "options"])
@pytest.mark.parametrize("gold", ["label", "answer"])
def test_fields_of_public_files(load, context, choices, gold):
    row = {context: CHOICES["context"], choices: CHOICES["choices"], gold: CHOICES["gold"], "ind": 4, "split": "val"}
    assert load(row).description == load(CHOICES).description


@pytest.mark.parametrize("gold", [1, "1", " 1", "B", "b", "B "])
def test_gold_is_an_index_a_digit_or_a_letter(load, gold):
    found = load(CHOICES | {"gold": gold})
    assert judge(found.questions[0], -3, -2, -4) == 1
    assert found.description == load(CHOICES).description


def test_a_json_list_and_both_forms_in_one_file(tmp_path, tiny_tokenizer, load):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([CHOICES, OPTIONS]))
    listed = load_questions(str(path), tiny_tokenizer, max_length=LENGTH)
    assert [len(question.requests) for question in listed.questions] == [3, 2]
    assert listed.description["fingerprint"] == load(CHOICES, OPTIONS).description["fingerprint"]


def test_rows_are_taken_as_written(load, tiny_tokenizer):
    rows = [
        CHOICES | {"choices": ["2001-01-01", "2002-02-02\u2028"], "gold": "B"},
        {"gold": 0, **OPTIONS, "choices": None},
    ]
    found = load(*rows).questions
    assert decode(tiny_tokenizer, found[0])[1] == ("The fox jumps over", " 2002-02-02\u2028")
    assert judge(found[0], -2, -1) == judge(found[1], -1, -2) == 1


@pytest.mark.parametrize(
    ("context", "continuation"), [("Look:", " here"), ("Look: ", "here"), ("Look:\n", "here"), ("Look:", "here")]
)
def test_context_and_continuation_are_parted_by_one_space(load, tiny_tokenizer, context, continuation):
    (question,) = load(CHOICES | {"context": context, "choices": [continuation, "there"]}).questions
    parted = "\n" if "\n" in context else " "
    assert decode(tiny_tokenizer, question)[0] == ("Look:", f"{parted}here")  # white space is the continuation's


def test_without_a_context_bos_stands_for_it(load, tiny_tokenizer):
    (question,) = load(CHOICES | {"context": ""}).questions
    assert {tuple(request.context) for request in question.requests} == {(tiny_tokenizer.bos_token_id,)}
    assert tiny_tokenizer.decode(question.requests[0].continuation) == "the dog"


def test_what_the_lineage_says(load):
    description = load(CHOICES, OPTIONS).description
    assert json.loads(json.dumps(description)) == description
    fingerprint = description.pop("fingerprint")
    expected = {"task": "questions.jsonl", "metric": "acc", "num_fewshot": 0, "num_questions": 2, "seed": 0}
    assert description == expected
    assert len(fingerprint) == 64
    for changed in (CHOICES | {"gold": 0}, CHOICES | {"context": "The fox jumps"}):
        assert load(changed, OPTIONS).description["fingerprint"] != fingerprint


def test_a_draw_is_fixed_by_its_seed_and_includes_smaller_ones(load, caplog):
    rows = [CHOICES | {"context": f"Number {i}"} for i in range(20)]
    everything = [question.requests for question in load(*rows).questions]

    def draw(num_questions, seed=0):
        found = load(*rows, num_questions=num_questions, seed=seed)
        assert found.description["num_questions"] == len(found.questions)
        return [everything.index(question.requests) for question in found.questions]

    assert draw(8) == sorted(draw(8)) == draw(8)
    assert len(set(draw(8))) == 8
    assert set(draw(5)) < set(draw(8))
    assert draw(8, seed=1) != draw(8)
    assert draw(20) == list(range(20))
    with caplog.at_level(logging.WARNING):
        assert len(draw(21)) == 20
    assert "There are 20 questions; num_questions=21" in caplog.text


def test_long_contexts_lose_their_beginning(load, caplog):
    whole = load(CHOICES | {"choices": ["x", "models and dogs"]}).questions[0].requests
    size = len(whole[1].context) + len(whole[1].continuation)
    with caplog.at_level(logging.WARNING):
        cut = load(CHOICES | {"choices": ["x", "models and dogs"]}, max_length=size - 3).questions[0].requests
    assert cut[0] == whole[0]
    assert cut[1] == Request(whole[1].context[3:], whole[1].continuation)
    assert f"1 contexts lost their beginning to fit into max_length={size - 3} tokens" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 3}, r"line 1: gold=3 is none of its 3 options. Give an index from 0 to 2 or a letter from A to C."),
        ({"gold": -1}, "gold=-1"),
        ({"gold": "D"}, "gold='D'"),
        ({"gold": "?"}, r"gold='\?'"),
        ({"gold": "a time"}, "gold='a time'"),
        ({"gold": ""}, "gold=''"),
        ({"gold": 1.0}, "gold=1.0"),
        ({"gold": True}, "gold=True"),
        ({"gold": None}, "line 1 has the fields context, choices. A question has context, choices and gold, or"),
        ({"context": None}, "line 1 has the fields choices, gold"),
        ({"label": 0}, "line 1 has gold and label, each of which could be the gold. Keep one"),
        ({"question": "What?"}, "line 1 has context and question, each of which could be the context"),
        ({"continuation": "so"}, "line 1 has the fields context, choices, gold, continuation"),
        ({"choices": ["one"]}, "line 1: options=.* must be a list of at least two"),
        ({"choices": []}, r"options=\[\] must be a list"),
        ({"choices": "AB"}, "options='AB' must be a list"),
        ({"choices": ["a", " "]}, "line 1: .* must be strings, and the continuations not empty"),
        ({"choices": [1, 2]}, "must be strings"),
        ({"context": 5}, "must be strings"),
    ],
)
def test_rows_that_are_no_question(load, change, message):
    with pytest.raises(ValueError, match=message):
        load({key: value for key, value in (CHOICES | change).items() if value is not None})


def test_the_row_is_named(load):
    with pytest.raises(ValueError, match=r"questions.jsonl line 2: gold=7 is none"):
        load(CHOICES, CHOICES | {"gold": 7}, num_questions=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "f1"}, "metric='f1': questions of a file are scored by acc or acc_norm"),
        ({"num_fewshot": 5}, "num_fewshot=5: questions.jsonl is asked as it is. Write examples into its contexts"),
        ({"num_questions": 0}, "num_questions=0, num_fewshot=0, max_length=4096: the least are 1, 0 and 2"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 4}, r"line 1: a continuation of \d+ tokens and at least one of context do not fit into max_le"),
    ],
)
def test_options_that_do_not_fit(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(CHOICES, **options)


def test_a_model_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer=None: questions are text"):
        load_questions(write_lines(tmp_path / "a.jsonl", [CHOICES]), None, max_length=LENGTH)


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "folder/none", "none.yaml", "folder/none.yml"])
def test_files_that_are_not_there(tiny_tokenizer, name):
    if name.endswith(("yaml", "yml")):
        pytest.importorskip("lm_eval")
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file. Give"):
        load_questions(name, tiny_tokenizer, max_length=LENGTH)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.jsonl", b'\n{"context": "broken', "a.jsonl line 2 is not JSON: Unterminated string"),
        ("a.json", b"[1, 2", "a.json is not JSON: Expecting"),
        ("a.json", b"[1, 2]", "a.json row 1 is a int. A question is an object"),
        ("a.txt", b"What?", "a.txt line 1 is not JSON: .*Give questions as JSON lines or as a JSON list"),
        ("a.parquet", b"PAR1\xff", "a.parquet is not UTF-8 text"),
    ],
)
def test_files_that_hold_no_questions(tmp_path, tiny_tokenizer, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / name, tiny_tokenizer, max_length=LENGTH)


def test_text_of_no_token_of_its_own(load):
    with pytest.raises(ValueError, match=r"line 1: '<s>' after '' leaves no token to be scored"):
        load(CHOICES | {"context": "", "choices": ["<s>", "a"]})


@pytest.mark.parametrize(
    ("name", "num_questions", "first"),
    [
        (
            "winogrande_dev",
            1267,
            ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
        ),
        ("arc_challenge_test", 1172, (None, " Planetary density will decrease.")),
        ("hellaswag_val_1000", 1000, (None, " go down a rock and stop.")),
    ],
)
def test_public_files_as_they_are(tiny_tokenizer, name, num_questions, first):
    path = BENCH / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    found = load_questions(path, tiny_tokenizer, max_length=4096)
    assert found.description["num_questions"] == len(found.questions) == num_questions
    context, continuation = decode(tiny_tokenizer, found.questions[0])[0]
    assert continuation == first[1]
    assert first[0] in (None, context)
    rows = map(json.loads, path.read_text().splitlines())
    for question, row in zip(found.questions, rows, strict=True):
        gold = row.get("gold", row.get("label"))
        assert judge(question, *(-1e-9 if i == gold else -1e9 for i in range(len(question.requests)))) == 1


@pytest.mark.parametrize("task", ["winogrande", "mine.yaml"])
def test_without_the_harness(tiny_tokenizer, monkeypatch, task):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-minitron\[evaluation\]', or give a local .jsonl"):
        load_questions(task, tiny_tokenizer, max_length=LENGTH)
