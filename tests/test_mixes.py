"""Files that list a mix, and what is refused before anything is read."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hf_minitron import mixes
from hf_minitron.mixes import MixSource, check_mix, check_stream_options, open_mix, read_mix


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_file_lists_sources_as_yaml_or_json(tmp_path):
    entries = [
        {"source": "HuggingFaceFW/fineweb-edu", "weight": 0.7, "config_name": "sample-10BT", "revision": "main"},
        {"source": "code/*.jsonl.zst", "weight": 3, "text_column": "content", "split": "test"},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    (tmp_path / "mix.yaml").write_text(
        "- source: HuggingFaceFW/fineweb-edu\n  weight: 0.7\n  config_name: sample-10BT\n  revision: main\n"
        "- {source: code/*.jsonl.zst, weight: 3, text_column: content, split: test}\n"
    )
    expected = [MixSource(**entry) for entry in entries]
    assert read_mix(tmp_path / "mix.json") == read_mix(tmp_path / "mix.yaml") == expected
    assert expected[0].split == "train" and expected[1].how["split"] == "test"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "neither YAML nor JSON"),
        ("source: x", "holds no list of sources"),
        ("[]", "holds no list of sources"),
        ("- {weight: 1}", "entry 1, {'weight': 1}, does not name its source"),
        ("- {source: x}\n- {source: y, wieght: 2}", "entry 2 has 'wieght', but only source, weight, config_name"),
        ("- {source: x, weight: 0}", r"weight=0 of x: .*Give a positive number"),
        ("- {source: x, weight: -0.5}", "weight=-0.5 of x"),
        ("- {source: x, weight: half}", "weight='half' of x"),
        ("- {source: x, weight: true}", "weight=True of x"),
        ("- {source: x, weight: .nan}", "weight=nan of x"),
        ("- {source: x}\n- {source: x, weight: 2}", r"x \(train\) comes twice"),
    ],
)
def test_a_wrong_file_is_refused_with_its_entry(tmp_path, text, message):
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mix(path)


def test_the_same_source_may_give_two_splits():
    assert len(check_mix([MixSource("x"), MixSource("x", split="test")])) == 2
    with pytest.raises(ValueError, match="A mix of no sources"):
        check_mix([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-1, None, "first"), "shuffle_buffer=-1"),
        ((0, 0, "first"), "epochs=0"),
        ((0, 1, "last"), "stopping='last'"),
        ((0, None, "all"), "stopping=all says what happens when sources end"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        check_stream_options(*options)
    check_stream_options(0, 1, "all")


def test_bad_sources_are_refused_when_the_mix_is_opened(tmp_path, tiny_tokenizer, tiny_text):
    good = MixSource(str(tiny_text))
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_mix([good, MixSource(str(tmp_path / "none.jsonl"))], tiny_tokenizer, 32)
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(ValueError, match="has no text in its column 'text'"):
        open_mix([good, MixSource(str(tmp_path / "blank.jsonl"))], tiny_tokenizer, 32)
    with pytest.raises(ValueError, match="text_column='body' is not there"):
        open_mix([MixSource(str(tiny_text), text_column="body")], tiny_tokenizer, 32)
    with pytest.raises(ValueError, match="sequence_length=1"):
        open_mix([good], tiny_tokenizer, 1)
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no eos token"):
        open_mix([good], without_eos, 32)


def test_facts_name_the_files_and_hash_those_that_are_small(tiny_tokenizer, tiny_text, monkeypatch):
    facts = open_mix([MixSource(str(tiny_text), 2)], tiny_tokenizer, 32, epochs=3).describe()
    assert facts["kind"] == "stream" and facts["epochs"] == 3 and facts["stopping"] == "first"
    assert facts["sources"][0]["files"] == ["train.jsonl"] and len(facts["sources"][0]["sha256"]) == 64
    assert facts["sources"][0]["weight"] == 1.0 and str(tiny_text.parent) not in json.dumps(facts)
    monkeypatch.setattr(mixes, "MAX_HASHED_BYTES", 100)
    facts = open_mix([MixSource(str(tiny_text))], tiny_tokenizer, 32).describe()
    assert "sha256" not in facts["sources"][0] and facts["sources"][0]["num_bytes"] > 100 and "stopping" not in facts


def test_a_source_on_the_hub_is_pinned_to_its_commit(tiny_tokenizer, monkeypatch):
    asked = []

    def load(source, **how):
        asked.append((source, how["revision"]))
        return Dataset.from_dict({"text": ["a document"]})

    monkeypatch.setattr(mixes, "load_text", load)
    monkeypatch.setattr("hf_minitron.data._resolve_commit", lambda *_: "c0ffee")
    facts = open_mix([MixSource("owner/name", revision="v1")], tiny_tokenizer, 32).describe()
    assert asked == [("owner/name", "c0ffee")]
    assert facts["sources"][0] | {"weight": 1.0} == {
        "kind": "hub", "id": "owner/name", "revision": "v1", "commit": "c0ffee", "split": "train", "weight": 1.0
    }  # fmt: skip
