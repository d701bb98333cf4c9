"""minitron.json: records in order, no secrets, no guesses, and never half a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from hf_minitron import lineage
from hf_minitron.lineage import Stage, append_stage, publishable, read_lineage, settings_dict, write_lineage

TOKEN = "hf_" + "aB3dEfGhIjKlMnOpQrStUvWxYz01234567"  # the form of a Hub token, but none


def test_stages_are_appended_in_order_from_folder_to_folder(tmp_path: Path):
    folders = [tmp_path / name for name in ("pruned", "distilled", "aligned")]
    for folder in folders:
        folder.mkdir()
    append_stage(Stage("prune"), folders[0], None)
    append_stage(Stage("distill"), folders[1], folders[0])
    append_stage(Stage("rpo"), folders[2], folders[1])
    names = [[stage["stage"] for stage in read_lineage(folder)] for folder in folders]
    assert names == [["prune"], ["prune", "distill"], ["prune", "distill", "rpo"]]
    assert read_lineage(folders[2])[:2] == read_lineage(folders[1])


def test_an_original_model_has_no_lineage(tmp_path: Path):
    assert read_lineage(tmp_path) == []
    assert read_lineage(None) == []


def test_a_record_says_what_is_known_and_leaves_out_what_is_not():
    record = Stage("prune", inputs={"source": {"id": "a/b", "commit": "c0ffee"}}, tokens=0).as_dict()
    assert record["inputs"] == {"source": {"id": "a/b", "commit": "c0ffee"}}
    assert record["tokens"] == 0  # known to be none, which is not unknown
    assert record["seconds"] >= 0
    assert {"started", "versions", "hardware"} <= set(record)
    assert not {"data", "metrics", "files", "settings"} & set(record)


def test_seconds_run_from_the_making_of_the_record(monkeypatch: pytest.MonkeyPatch):
    now = iter((100.0, 112.5))
    monkeypatch.setattr(lineage.time, "monotonic", lambda: next(now))
    assert Stage("prune").as_dict()["seconds"] == 12.5


@pytest.mark.parametrize("key", ["token", "hub_token", "HF_TOKEN", "password", "api_key", "client_secret"])
def test_entries_named_like_a_secret_are_dropped(key: str):
    assert publishable({"a": {key: "x", "kept": 1}}) == {"a": {"kept": 1}}
    assert Stage("prune", settings={key: "x", "kept": 1}).as_dict()["settings"] == {"kept": 1}


@pytest.mark.parametrize("key", ["num_tokens", "tokens", "tokenizer", "max_new_tokens", "num_input_tokens_seen"])
def test_counts_of_tokens_are_no_secrets(key: str):
    assert publishable({key: 3}) == {key: 3}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (TOKEN, "hf_***"),
        (f"https://user:{TOKEN}@huggingface.co/a/b", "https://user:hf_***@huggingface.co/a/b"),
        (["--token", TOKEN], ["--token", "hf_***"]),
        ("sk-proj-Ab1Cd2Ef3Gh4Ij5Kl6Mn7", "sk-***"),
        ("out/hf_minitron_quickstart", "out/hf_minitron_quickstart"),
        ("src/hf_minitron/checkpoint.py", "src/hf_minitron/checkpoint.py"),
    ],
)
def test_values_like_a_token_are_masked(value, shown):
    assert publishable({"kept": value}) == {"kept": shown}


def test_no_secret_reaches_the_file(tmp_path: Path):
    stage = Stage("prune", settings={"hub_token": TOKEN, "note": TOKEN}, inputs={"source": {"url": f"x/{TOKEN}"}})
    stage.metrics, stage.data = {"log": [TOKEN]}, {"token": TOKEN}
    path = append_stage(stage, tmp_path)
    assert TOKEN[5:] not in path.read_text(encoding="utf-8")


def test_settings_become_plain_values():
    class Kind(Enum):
        A = "a"

    @dataclass
    class Settings:
        kind: Kind = Kind.A
        path: Path = Path("x/y")
        sizes: tuple[int, ...] = (1, 2)
        left_out: int | None = None
        off: bool = False
        token: str = TOKEN

    settings = settings_dict(Settings())
    assert settings == {"kind": "a", "path": "x/y", "sizes": [1, 2], "off": False}
    assert json.loads(json.dumps(settings)) == settings
    assert settings_dict(None) == {}


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 1, "stages": [', "\udcff"])
def test_broken_json_is_a_clear_error(tmp_path: Path, text: str):
    (tmp_path / "minitron.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"minitron\.json is not valid JSON.*Restore it"):
        read_lineage(tmp_path)


@pytest.mark.parametrize("text", ['{"format_version": 2, "stages": []}', '{"stages": []}', "[]", "null"])
def test_another_format_is_a_clear_error(tmp_path: Path, text: str):
    (tmp_path / "minitron.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"format_version=(2|None): this hf-minitron reads 1"):
        read_lineage(tmp_path)


@pytest.mark.parametrize("text", ['{"format_version": 1}', '{"format_version": 1, "stages": {}}'])
def test_a_lineage_without_stages_is_a_clear_error(tmp_path: Path, text: str):
    (tmp_path / "minitron.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="no list of stages"):
        read_lineage(tmp_path)


def test_a_failed_write_leaves_the_old_lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_lineage(tmp_path, [{"stage": "prune"}])
    with pytest.raises(TypeError):
        write_lineage(tmp_path, [{"stage": object()}])
    assert read_lineage(tmp_path) == [{"stage": "prune"}]

    real_write = Path.write_text

    def disk_full(self: Path, text: str, **options):
        real_write(self, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_lineage(tmp_path, [{"stage": "prune"}, {"stage": "distill"}])
    assert read_lineage(tmp_path) == [{"stage": "prune"}]


def test_the_file_is_readable_text(tmp_path: Path):
    path = write_lineage(tmp_path, [{"stage": "prune", "note": "größer"}])
    text = path.read_text(encoding="utf-8")
    assert "größer" in text
    assert text.endswith("}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["minitron.json"]
