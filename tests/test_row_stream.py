"""Rows of a stream: the same as `pack_rows` makes, of the asked for weights, and resumed at the exact row."""

from __future__ import annotations

import itertools
import json
import logging

import datasets
import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_minitron.data import load_text, pack_rows
from hf_minitron.mixes import MixSource, open_mix
from hf_minitron.row_stream import tokens_given_out

LENGTH = 32


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Documents of which each says its source and number: 5 files, one file, and lists of strings."""
    folder = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(0)

    def documents(name, count):
        return [f"{name}{i} " + "x y z " * int(generator.integers(0, 12)) for i in range(count)]

    (folder / "files").mkdir()
    texts = {"a": documents("a", 103), "b": documents("b", 40), "c": documents("c", 60)}
    for number in range(5):
        rows = [{"text": text} for text in texts["a"][number * 21 : number * 21 + 21]] + [{"text": "  "}]
        (folder / "files" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["b"]))
    Dataset.from_dict({"texts": [texts["c"][i : i + 3] for i in range(0, 60, 3)]}).to_parquet(folder / "c.parquet")
    paths = {"a": folder / "files", "b": folder / "b.jsonl", "c": folder / "c.parquet"}
    return paths, texts


@pytest.fixture
def stream(sources, tiny_tokenizer):
    def open_stream(weights, **options):
        mix = [MixSource(str(sources[0][name]), weight) for name, weight in weights.items()]
        return open_mix(mix, tiny_tokenizer, LENGTH, **({"seed": 5, "shuffle_buffer": 16} | options))

    return open_stream


def ids(rows, most=None):
    return [row["input_ids"].tolist() for row in itertools.islice(rows, most)]


def whole_documents(rows, tokenizer):
    """The documents that end in these rows, but for the first, which may have begun before."""
    return tokenizer.decode([token for row in rows for token in row]).split("</s>")[:-1]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_one_source_in_its_order_gives_the_rows_that_pack_rows_makes(stream, sources, name, tiny_tokenizer):
    rows = stream({name: 1}, shuffle_buffer=0, epochs=1)
    expected = pack_rows(load_text(sources[0][name]), tiny_tokenizer, LENGTH)["input_ids"]
    assert ids(rows) == list(map(list, expected)) and len(expected) > 20
    twice = ids(stream({name: 1}, shuffle_buffer=0, epochs=2))
    assert twice[: len(expected)] == ids(rows) and len(twice) in (2 * len(expected), 2 * len(expected) + 1)


@pytest.mark.parametrize("options", [{}, {"shuffle_buffer": 0}, {"epochs": 2}, {"epochs": 2, "stopping": "all"}])
def test_it_goes_on_at_the_exact_row_from_every_row(stream, options):
    """Within blocks, at their ends, at the ends of files, epochs and sources, and in the midst of long documents."""
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    reader = stream(weights, **options).read()
    rows, states = [], [json.dumps(reader.state_dict())]
    most = 700 if "epochs" in options else 250
    for row in itertools.islice(reader, most):
        rows.append(row["input_ids"].tolist())
        states.append(json.dumps(reader.state_dict()))
    last = json.loads(states[-1])
    assert max(source["epoch"] for source in last["sources"]) >= 1 and (len(rows) < most) == ("epochs" in options)
    other = stream(weights, **options)
    for number in [*range(0, len(rows), 7), len(rows) - 1, len(rows)]:
        resumed = other.read(state=json.loads(states[number]))
        until = min(number + 8, len(rows))
        assert ids(resumed, until - number) == rows[number:until], number
        assert resumed.fingerprint == json.loads(states[until])["fingerprint"]
        assert "epochs" not in options or until < len(rows) or next(resumed, None) is None


def test_a_state_goes_straight_to_its_block_and_file(stream, monkeypatch):
    """What was read before is not tokenized, and files before the state's are not opened, again."""
    mix = stream({"a": 1}, shuffle_buffer=0)
    reader = mix.read()
    rows = ids(reader, 60)
    place = reader.state_dict()
    assert place["num_rows"] == 60 and place["sources"][0]["start"] is None  # a block of 100 documents
    reader = stream({"a": 1}, shuffle_buffer=20).read()
    while (state := reader.state_dict())["sources"][0]["block"] < 3 and reader.num_rows < 200:
        next(reader)
    assert state["sources"][0]["start"] is not None
    documents = []
    monkeypatch.setattr("hf_minitron.document_reader.tokenize_documents", lambda texts, _: documents.extend(texts) or
                        [[2] * 40 for _ in texts])  # fmt: skip
    next(stream({"a": 1}, shuffle_buffer=20).read(state=state))
    assert 0 < len(documents) <= 20 and len(rows) == 60


def test_shuffling_follows_seed_and_epoch_and_loses_no_document(stream, sources, tiny_tokenizer):
    orders = []
    for seed in (1, 1, 2):
        rows = ids(stream({"a": 1}, seed=seed, epochs=2))
        orders.append(whole_documents(rows, tiny_tokenizer))
    first, again, other = orders
    texts = sources[1]["a"]
    assert first == again != other and first[:103] != texts
    assert sorted(first[:103]) == sorted(texts) and set(first[103:]) <= set(texts)
    assert first[:90] != first[103:193]
    displaced = [abs(texts.index(text) - i) for i, text in enumerate(first[:103])]
    assert max(displaced) > 21  # files are shuffled too


def test_tokens_meet_the_weights(stream):
    weights = {"a": 0.6, "b": 3 * 0.1, "c": 0.1}
    reader = stream(weights).read()
    for count in (100, 1000):
        list(itertools.islice(reader, count - reader.num_rows))
        tokens = tokens_given_out(reader.state_dict())
        assert sum(tokens) == count * LENGTH
        # Every source within about one document, of at most 80 tokens, of its share.
        assert np.abs(np.array(tokens) - count * LENGTH * np.array([0.6, 0.3, 0.1])).max() < 160
    described = stream(weights).describe([reader.state_dict()])
    assert [source["num_tokens"] for source in described["sources"]] == tokens
    assert [source["weight"] for source in described["sources"]] == [0.6, 0.3, 0.1]
    assert described["sources"][1]["epochs_begun"] > 5 and described["num_rows"] == 1000


def test_stopping(stream, sources, tiny_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    ends = {}
    for stopping in ("first", "all"):
        reader = stream({"a": 0.5, "b": 0.5}, epochs=1, stopping=stopping).read()
        documents = whole_documents(ids(reader), tiny_tokenizer)
        ends[stopping] = documents
        assert next(reader, None) is None
    everything = sources[1]["a"] + sources[1]["b"]
    assert len(ends["all"]) >= len(everything) - 3 and set(ends["all"]) <= set(everything)
    assert ends["first"] == ends["all"][: len(ends["first"])] and len(ends["first"]) < 110
    assert "has ended" in caplog.text


@pytest.mark.parametrize("count", [2, 5])
def test_readers_share_the_documents_without_repeats(stream, sources, tiny_tokenizer, count):
    """By files where there are as many for each (5 readers of 5 files), else by documents."""
    for name in ("a", "b", "c"):
        mix, seen = stream({name: 1}, epochs=1), []
        for index in range(count):
            reader = mix.read(index, count)
            rows = ids(reader)
            ends = whole_documents(rows, tiny_tokenizer)
            # the last document may be cut off with the last row, or be whole in what is left over
            assert reader.readers[0].num_documents - len(ends) <= 4
            seen += ends
        assert len(seen) == len(set(seen)) and set(seen) <= set(sources[1][name])
        assert len(seen) >= len(sources[1][name]) - 4 * count
        drawn = [mix.read(index, count) for index in range(count)]
        for reader in drawn:
            ids(reader)
        assert sum(reader.readers[0].num_documents for reader in drawn) == len(sources[1][name])


def test_readers_resume_too(stream):
    mix = stream({"a": 0.5, "c": 0.5})
    for index, count in ((1, 2), (4, 5)):
        reader = mix.read(index, count)
        rows, state = ids(reader, 37), json.dumps(reader.state_dict())
        rest = ids(reader, 30)
        assert ids(mix.read(index, count, json.loads(state)), 30) == rest != rows[:30]


def test_a_data_loader_with_workers_gives_every_reader_once(stream):
    mix = stream({"a": 0.5, "b": 0.5}, epochs=1)
    expected = [tuple(row) for index in range(2) for row in ids(mix.read(index, 2))]
    loaded = [tuple(row["input_ids"].tolist()) for row in DataLoader(mix, batch_size=None, num_workers=2)]
    assert sorted(loaded) == sorted(expected)


def test_data_sets_can_be_sources(tiny_tokenizer, sources):
    texts = Dataset.from_dict({"text": sources[1]["a"]})
    for source in (texts, texts.to_iterable_dataset(num_shards=4)):
        mix = open_mix([MixSource(source)], tiny_tokenizer, LENGTH, shuffle_buffer=0, epochs=1)
        assert ids(mix) == list(map(list, pack_rows(texts, tiny_tokenizer, LENGTH)["input_ids"]))
        reader = open_mix([MixSource(source)], tiny_tokenizer, LENGTH, shuffle_buffer=8).read()
        ids(reader, 20)
        state = reader.state_dict()
        again = open_mix([MixSource(source)], tiny_tokenizer, LENGTH, shuffle_buffer=8).read(state=state)
        assert ids(again, 40) == ids(reader, 40)


def test_too_few_documents_for_the_readers(stream, tiny_tokenizer):
    source = MixSource(Dataset.from_dict({"text": ["one", "two"]}))
    mix = open_mix([source], tiny_tokenizer, LENGTH)
    assert ids(mix.read(1, 2), 3)
    with pytest.raises(ValueError, match=r"Dataset has too few documents for 3 readers .* none\s+for reader 2"):
        next(mix.read(2, 3))


def test_text_that_changed_since_is_noticed(stream, tiny_tokenizer):
    def mix(texts):
        return open_mix([MixSource(Dataset.from_dict({"text": texts}))], tiny_tokenizer, LENGTH, epochs=1)

    reader = mix(["a long text " * 20] * 8).read()
    ids(reader, 5)
    with pytest.raises(ValueError, match="Dataset has changed since its place was noted"):
        mix(["a"] * 8).read(state=reader.state_dict())
