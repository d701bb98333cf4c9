"""Reading text from everywhere, packing it, and saying in the lineage what was read."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, LargeList, List, Value
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hf_minitron import data
from hf_minitron.data import describe_source, fingerprint_rows, iterate_texts, load_text, pack_rows

SHARED_TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"


@pytest.fixture(autouse=True)
def offline_with_a_cache_of_its_own(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data, "HfApi", lambda **options: pytest.fail("the Hub was asked"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(dataset):
    assert list(dataset.column_names or ["text"]) == ["text"]
    return [row["text"] for row in dataset]


# Reading


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "wiki.valid.raw", "strange.suffix", "none", "odd [1]*.txt"])
def test_a_plain_text_file_is_one_document(folder, name, streaming):
    (folder / name).write_text("One line.\n\nAnother one: é\n")
    dataset = load_text(folder / name, streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert texts_of(dataset) == ["One line.\n\nAnother one: é\n"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "strings.json", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_files_of_records(folder, name, streaming):
    texts = ["first\nstory", "second, with a comma", "dritte Erzählung"]
    rows, path = [{"text": text, "id": i} for i, text in enumerate(texts)], folder / name
    if name == "list.json":
        path.write_text(json.dumps(rows))
    elif name == "strings.json":
        path.write_text(json.dumps(texts))
    elif name == "a.parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif name == "a.csv":
        Dataset.from_list(rows).to_csv(path)
    elif name == "a.jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write_lines(path, rows)
    assert texts_of(load_text(str(path), streaming=streaming)) == texts


def test_lists_of_strings_are_documents_each(folder):
    (folder / "a.json").write_text(json.dumps({"texts": ["one", "", "two"]}))
    assert texts_of(load_text(folder / "a.json")) == ["one", "two"]
    assert texts_of(load_text(folder / "a.json", streaming=True)) == ["one", "two"]


def test_a_folder_is_read_in_order_of_names_without_what_is_no_data(folder):
    (folder / "sub").mkdir()
    (folder / ".git").mkdir()
    (folder / "__pycache__").mkdir()
    for name in ("b.txt", "sub/c.md", "a.py"):
        (folder / name).write_text(name)
    for name in (".hidden.txt", "README.md", "LICENSE.txt", ".git/x.txt", "__pycache__/a.py", "plot.png"):
        (folder / name).write_bytes(b"\xff not data")
    assert texts_of(load_text(folder)) == ["a.py", "b.txt", "sub/c.md"]


def test_a_glob(folder):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (folder / name).write_text(name)
    assert texts_of(load_text(f"{folder}/*.txt")) == ["a.txt", "b.txt"]
    assert texts_of(load_text(f"{folder}/**/[b]*")) == ["b.txt"]


def test_one_kind_of_data_beside_a_readme(folder):
    (folder / "README.md").write_text("About.")
    (folder / "config.json").write_text("{}")
    write_lines(folder / "a.jsonl", [{"text": "story"}])
    assert texts_of(load_text(folder)) == ["story"]


def test_mixed_kinds_are_listed(folder):
    (folder / "notes.txt").write_text("notes")
    write_lines(folder / "a.jsonl", [{"text": "story"}])
    with pytest.raises(ValueError, match=r"json \(such as a.jsonl\), text \(such as notes.txt\)"):
        load_text(folder)
    with pytest.raises(ValueError, match="mixes kinds"):
        load_text(f"{folder}/*")


def test_a_folder_without_text_files(folder):
    (folder / "plot.png").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="no text, JSON, Parquet or CSV"):
        load_text(folder)


def test_file_names_tell_the_splits_of_records(folder):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "valid", "my_test.v2", "held_out"):
        write_lines(folder / f"{name}.jsonl", [{"text": name}])
    assert texts_of(load_text(folder)) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts_of(load_text(folder, split="validation")) == ["valid"]
    assert texts_of(load_text(folder, split="test")) == ["my_test.v2"]
    assert texts_of(load_text(folder, split="train[:1]+test")) == ["train-00000-of-00002", "my_test.v2"]
    assert describe_source(folder, split="validation")["files"] == ["valid.jsonl"]
    with pytest.raises(ValueError, match=r"split='dev': .* has no 'dev', only"):
        load_text(folder, split="dev")


def test_file_names_tell_nothing_where_they_are_documents_or_were_chosen(folder):
    for name in ("test_x.py", "train.py"):
        (folder / name).write_text(name)
    assert texts_of(load_text(folder)) == ["test_x.py", "train.py"]
    path = write_lines(folder / "test.jsonl", [{"text": "chosen"}])
    assert texts_of(load_text(path)) == texts_of(load_text(f"{folder}/test*.jsonl")) == ["chosen"]


@pytest.mark.parametrize("source", ["./nowhere", "~/no/such/file", "/no/such", "owner/*", "data.jsonl", "a/b.txt.gz"])
def test_what_looks_like_a_path_never_goes_to_the_hub(source, monkeypatch):
    monkeypatch.setattr(data, "load_dataset", lambda *args, **options: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match="no such file, folder or match"):
        load_text(source)
    with pytest.raises(FileNotFoundError, match="no such file, folder or match"):
        describe_source(Path("owner/name"))


@pytest.mark.parametrize(("streaming", "expected"), [(None, True), (True, True), (False, False)])
def test_a_hub_id_is_streamed_by_default(monkeypatch, streaming, expected):
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        rows = Dataset.from_dict({"text": ["from the Hub"]})
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(data, "load_dataset", load)
    dataset = load_text("owner/name", config_name="en", split="test", revision="abc", token="t", streaming=streaming)
    assert texts_of(dataset) == ["from the Hub"]
    options = {"split": "test", "revision": "abc", "token": "t", "streaming": expected}
    assert calls == [(("owner/name", "en"), options)]


def test_a_path_that_exists_wins_over_a_hub_id(folder, monkeypatch):
    (folder / "owner" / "name").mkdir(parents=True)
    (folder / "owner" / "name" / "a.txt").write_text("local")
    monkeypatch.chdir(folder)
    assert texts_of(load_text("owner/name")) == ["local"]


def test_a_hub_id_that_is_not_there(monkeypatch):
    def load(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub.")

    monkeypatch.setattr(data, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"neither a path here nor a Hub data set .*doesn't exist"):
        load_text("owner/name")


@pytest.mark.parametrize("options", [{"config_name": "en"}, {"revision": "main"}])
def test_options_of_the_hub_are_refused_for_files(folder, options):
    (folder / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="are for Hub data sets"):
        load_text(folder, **options)


def test_a_file_in_another_encoding_is_named(folder):
    (folder / "a.txt").write_text("fine")
    (folder / "b.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        load_text(folder)


def test_a_broken_json_file_is_named(folder):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read as json"):
        load_text(folder / "a.jsonl")


# Columns


def both_kinds(columns, features=None):
    rows = Dataset.from_dict(columns, features=features)
    yield rows
    yield rows.to_iterable_dataset()
    yield IterableDataset.from_generator(lambda: iter(rows))  # knows no features


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"content": ["c"], "text": ["t"], "story": ["s"]}, {}, "t"),
        ({"story": ["s"], "content": ["c"]}, {}, "c"),
        ({"story": ["s"], "title": ["x"]}, {}, "s"),
        ({"body": ["b"], "id": [1]}, {}, "b"),
        ({"body": ["b"], "text": ["t"]}, {"text_column": "body"}, "b"),
        ({"body": ["b"], "text": [1]}, {}, "b"),
        ({"body": ["b"], "tags": [["x", "y"]]}, {}, "b"),
    ],
)
def test_which_column_is_read(columns, options, expected):
    for dataset in both_kinds(columns):
        assert texts_of(load_text(dataset, **options)) == [expected]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, {}, r"2 columns of strings. Its columns are 'a', 'b'. .*--text-column"),
        ({"a": [1]}, {}, "0 columns of strings"),
        ({"a": ["x"]}, {"text_column": "b"}, "text_column='b' is not there in"),
        ({"a": ["x"], "b": [1]}, {"text_column": "b"}, "text_column='b' is not text in"),
        ({"text": ["", None, " \n"]}, {}, "no text in its column 'text'"),
    ],
)
def test_columns_that_cannot_be_read(columns, options, message):
    for dataset in both_kinds(columns):
        with pytest.raises(ValueError, match=message):
            load_text(dataset, **options)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_has_no_text(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is empty: there is no text"):
        load_text(folder / name)


def test_empty_rows_are_dropped():
    for dataset in both_kinds({"text": ["a", "", None, " \n", "b "]}):
        assert texts_of(load_text(dataset)) == ["a", "b "]


def test_large_strings_and_formats_are_fine():
    rows = Dataset.from_dict({"text": ["a"]}, features=Features({"text": Value("large_string")}))
    assert texts_of(load_text(rows.with_format("numpy"))) == ["a"]


def test_a_dictionary_of_splits_is_refused():
    with pytest.raises(TypeError, match=r"DatasetDict of \['test'\]: pass one of its splits"):
        load_text(DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}))


def test_texts_are_checked():
    assert list(iterate_texts(["a", "", None, "\n", "b"])) == ["a", "b"]
    with pytest.raises(TypeError, match="one string"):
        list(iterate_texts("abc"))
    with pytest.raises(TypeError, match="a document is a int"):
        list(iterate_texts([1]))
    with pytest.raises(ValueError, match="have no 'text'"):
        list(iterate_texts(Dataset.from_dict({"body": ["a"]})))


def test_nothing_is_left_in_the_users_folders(folder, tiny_tokenizer):
    Dataset.from_dict({"text": ["some text", "", "more text"] * 50}).save_to_disk(folder / "saved")
    (folder / "plain").mkdir()
    (folder / "plain" / "a.txt").write_text("some text " * 50)
    before = sorted(folder.rglob("*"))
    pack_rows(load_text(Dataset.load_from_disk(folder / "saved")), tiny_tokenizer, 8, max_rows=2, seed=0)
    pack_rows(load_text(folder / "plain"), tiny_tokenizer, 8, max_rows=2, seed=0)
    assert sorted(folder.rglob("*")) == before


# Packing


DOCUMENTS = [f"Document number {i}: the quick brown fox. " * (i % 7 + 1) for i in range(40)]


def stream_of(tokenizer, documents=DOCUMENTS):
    """All tokens in a row, as packing has to keep them."""
    return [
        i for d in documents for i in [*tokenizer(d, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]


def rows_of(stream, length):
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


@pytest.mark.parametrize("block_characters", [1, 300, 1 << 22])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_packing_keeps_every_token_in_order(monkeypatch, tiny_tokenizer, length, block_characters):
    monkeypatch.setattr(data, "BLOCK_CHARACTERS", block_characters)
    documents = DOCUMENTS[:10]
    expected = rows_of(stream_of(tiny_tokenizer, documents), length)
    for texts in (documents, iter(documents), *both_kinds({"text": documents})):
        rows = pack_rows(texts, tiny_tokenizer, length)
        assert isinstance(rows, Dataset)
        assert rows["input_ids"][:] == expected


@pytest.mark.parametrize("max_rows", [1, 5, 20])
def test_the_first_rows(tiny_tokenizer, max_rows):
    rows = pack_rows(DOCUMENTS, tiny_tokenizer, 32, max_rows=max_rows)
    assert rows["input_ids"][:] == rows_of(stream_of(tiny_tokenizer), 32)[:max_rows]


@pytest.mark.parametrize(("seed", "buffer"), [(None, 0), (0, 10)])
def test_reading_stops_when_enough_is_there(monkeypatch, tiny_tokenizer, seed, buffer):
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", buffer)
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": DOCUMENTS[0]}

    features = Features({"text": Value("string")})
    texts = load_text(IterableDataset.from_generator(endless, features=features))
    assert len(read) <= 2  # only to see whether there is text
    read.clear()
    rows = pack_rows(texts, tiny_tokenizer, 32, max_rows=3, seed=seed)
    needed = -(-3 * 32 // len(stream_of(tiny_tokenizer, DOCUMENTS[:1])))
    assert len(rows) == 3
    assert needed <= len(read) <= needed + buffer + 2


def test_a_seed_samples_documents_reproducibly(tiny_tokenizer):
    def sample(seed, texts=DOCUMENTS):
        return pack_rows(texts, tiny_tokenizer, 32, max_rows=6, seed=seed)["input_ids"][:]

    first = rows_of(stream_of(tiny_tokenizer), 32)[:6]
    assert sample(1) == sample(1) != sample(2)
    assert first not in (sample(1), sample(2))
    assert sample(1, Dataset.from_dict({"text": DOCUMENTS})) == sample(1)
    stream = Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()
    assert sample(1, stream) == sample(1, stream) != first


def test_a_seed_samples_rows_of_one_big_document(tiny_tokenizer):
    text = " ".join(map(str, range(3000)))
    everything = rows_of(stream_of(tiny_tokenizer, [text]), 32)
    chosen = pack_rows([text], tiny_tokenizer, 32, max_rows=6, seed=0)["input_ids"][:]
    numbers = [everything.index(row) for row in chosen]
    assert len(set(numbers)) == 6
    assert max(numbers) > len(everything) // 2


def test_a_seed_without_a_limit_only_shuffles(tiny_tokenizer):
    rows = pack_rows(DOCUMENTS, tiny_tokenizer, 1, seed=3)["input_ids"][:]
    assert rows != rows_of(stream_of(tiny_tokenizer), 1)
    assert sorted(rows) == sorted(rows_of(stream_of(tiny_tokenizer), 1))


def test_bos_stands_in_front_only_if_the_tokenizer_puts_it_there(tiny_tokenizer):
    backend = tiny_tokenizer.backend_tokenizer.__class__.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    without = pack_rows(["fox"], tiny_tokenizer, 1)["input_ids"][:]
    assert without[-1] == [tiny_tokenizer.eos_token_id] and without[0] != [tiny_tokenizer.bos_token_id]
    assert pack_rows(["fox"], with_bos, 1)["input_ids"][:] == [[with_bos.bos_token_id], *without]


def test_without_eos_documents_follow_each_other(tiny_tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    ids = tokenizer(["fox", "dog"], add_special_tokens=False)["input_ids"]
    assert pack_rows(["fox", "dog"], tokenizer, 1)["input_ids"][:] == [[i] for document in ids for i in document]


def test_long_documents_are_neither_truncated_nor_warned_about(tiny_tokenizer, caplog, monkeypatch):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>", model_max_length=16
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        rows = pack_rows([DOCUMENTS[6]], tokenizer, 8)
        assert "longer than" not in caplog.text
        assert len(rows) == len(stream_of(tokenizer, [DOCUMENTS[6]])) // 8 > 4
        assert "longer than" in caplog.text  # the tokenizer does warn, if it is not told to be quiet


def test_fewer_rows_than_asked_for_are_announced(tiny_tokenizer, caplog):
    rows = pack_rows(DOCUMENTS, tiny_tokenizer, 64, max_rows=10_000)
    assert len(rows) == len(stream_of(tiny_tokenizer)) // 64
    assert f"gives {len(rows)} rows of 64 tokens; max_rows=10000" in caplog.text


def test_not_even_one_row(tiny_tokenizer):
    num_tokens = len(stream_of(tiny_tokenizer))
    assert num_tokens > 1000
    message = f"{num_tokens:,} tokens in 40 documents are fewer than one row of sequence_length=100000"
    with pytest.raises(ValueError, match=message):
        pack_rows(DOCUMENTS, tiny_tokenizer, 100_000, max_rows=4)


@pytest.mark.parametrize(("length", "max_rows"), [(0, None), (8, 0)])
def test_sizes_that_make_no_sense(tiny_tokenizer, length, max_rows):
    with pytest.raises(ValueError, match="must be at least 1"):
        pack_rows(DOCUMENTS, tiny_tokenizer, length, max_rows=max_rows)


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bars_of_datasets_stay_as_they_were(tiny_tokenizer, enabled):
    was_disabled = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if enabled else datasets.disable_progress_bars)()
        pack_rows(DOCUMENTS, tiny_tokenizer, 8)
        with pytest.raises(TypeError):
            pack_rows([1], tiny_tokenizer, 8)
        assert datasets.are_progress_bars_disabled() != enabled
    finally:
        (datasets.disable_progress_bars if was_disabled else datasets.enable_progress_bars)()


# Fingerprints and lineage


def test_fingerprint_is_the_documented_hash():
    rows = [[1, 2, 3], [4], [], [70_000, 5]]
    lengths = np.array([3, 1, 0, 2], dtype="<i8").tobytes()
    ids = np.array([1, 2, 3, 4, 70_000, 5], dtype="<i8").tobytes()
    expected = hashlib.sha256(hashlib.sha256(lengths).digest() + hashlib.sha256(ids).digest()).hexdigest()
    for kind in (List(Value("int32")), List(Value("int64")), LargeList(Value("int64"))):
        dataset = Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": kind}))
        assert fingerprint_rows(dataset) == expected
        assert fingerprint_rows(dataset.add_column("labels", rows).with_format("torch")) == expected
        assert fingerprint_rows(dataset.select([3, 2, 1, 0]).select([3, 2, 1, 0])) == expected  # indices, not slices


def test_fingerprint_sees_order_boundaries_and_values():
    def fingerprint(rows):
        return fingerprint_rows(Dataset.from_dict({"input_ids": rows}))

    different = [[[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]], [[1, 2], [4]], [[1, 2], [3], []]]
    assert len({fingerprint(rows) for rows in different}) == len(different)
    many = [[i, i + 1] for i in range(2500)]  # more than one batch
    assert fingerprint(many) != fingerprint([*many[:-1], [0, 0]])


def test_one_file_is_described_by_its_name_and_hash(folder):
    (folder / "a.txt").write_text("text")
    expected = {
        "kind": "files",
        "files": ["a.txt"],
        "num_files": 1,
        "num_bytes": 4,
        "sha256": hashlib.sha256(b"text").hexdigest(),
    }
    assert describe_source(folder / "a.txt") == describe_source(str(folder)) == expected


def test_files_are_described_as_sha256sum_lists_them(folder):
    (folder / "sub").mkdir()
    names = sorted([f"{i:02}.txt" for i in range(24)] + ["sub/a.txt"])
    for name in names:
        (folder / name).write_text(name)
    listing = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in names)
    facts = describe_source(folder, text_column="text")
    assert facts["files"] == names[:20]
    assert facts["num_files"] == 25
    assert facts["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert facts["text_column"] == "text"
    assert str(folder) not in json.dumps(facts)
    moved = shutil.copytree(folder, folder.parent / "elsewhere")
    assert describe_source(moved, text_column="text") == facts
    (moved / "00.txt").write_text("changed")
    assert describe_source(moved)["sha256"] != facts["sha256"]


def test_a_hub_id_is_described_with_its_commit_and_without_the_token(monkeypatch):
    class Api:
        def __init__(self, token):
            assert token == "hf_secret"

        def dataset_info(self, repo_id, revision, timeout):
            assert (repo_id, revision) == ("owner/name", "main")
            return type("Info", (), {"sha": "0123abc"})

    monkeypatch.setattr(data, "HfApi", Api)
    facts = describe_source("owner/name", config_name="en", revision="main", token="hf_secret")
    assert facts == {
        "kind": "hub",
        "id": "owner/name",
        "config": "en",
        "revision": "main",
        "commit": "0123abc",
        "split": "train",
    }


def test_a_commit_that_cannot_be_found_out_is_left_out(monkeypatch):
    class Api:
        def __init__(self, token):
            pass

        def dataset_info(self, repo_id, revision, timeout):
            raise ConnectionError("no network")

    monkeypatch.setattr(data, "HfApi", Api)
    assert describe_source("owner/name") == {"kind": "hub", "id": "owner/name", "split": "train"}


def test_a_data_set_is_described_by_its_fingerprint():
    rows = Dataset.from_dict({"text": ["a", "b"]})
    facts = describe_source(rows)
    assert facts == {"kind": "dataset", "fingerprint": rows._fingerprint, "num_rows": 2}
    assert describe_source(Dataset.from_dict({"text": ["a", "b"]})) == facts
    assert describe_source(Dataset.from_dict({"text": ["a", "c"]})) != facts
    assert describe_source(rows.to_iterable_dataset()) == {"kind": "dataset"}


# Real text


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="the shared text is not here")
def test_real_files(tiny_tokenizer):
    assert len(load_text(SHARED_TEXT / "tinystories" / "train_5000.jsonl")) == 5000
    assert len(load_text(SHARED_TEXT / "tinystories" / "stories_3000.json")) == 3000
    wikitext = load_text(SHARED_TEXT / "wikitext2")
    assert len(wikitext) == 2
    rows = pack_rows(wikitext, tiny_tokenizer, 512, max_rows=16, seed=0)
    assert np.array(rows["input_ids"][:]).shape == (16, 512)
