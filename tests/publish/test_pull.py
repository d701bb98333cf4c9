"""Loading from a Hub that fails on demand: the right bytes or one clear error; nothing in silence."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from local_hub import Fault

from hf_minitron import hub_files
from hf_minitron.hub_files import fetch_snapshot, git_blob_id, sha256_of

REPO = "alice/small"
PATTERNS = ["*.json", "*.safetensors"]


def pull(**options) -> Path:
    return fetch_snapshot(REPO, allow_patterns=PATTERNS, **options)


def num_gets(hub) -> int:
    return sum(r["method"] == "GET" and ("/lfs/" in r["path"] or "/resolve/" in r["path"]) for r in hub.requests)


@pytest.fixture
def source(hub, checkpoint) -> Path:
    """The folder that the repository holds, private, as two commits; the first is tagged v1."""
    api = HfApi(endpoint=hub.url, token="hf_alice")
    api.create_repo(REPO, private=True)
    for tag in ("v1", None):
        folder = {"repo_id": REPO, "folder_path": checkpoint, "allow_patterns": ["*.json", "*.safetensors"]}
        api.upload_folder(**folder, ignore_patterns=["*/*"])
        if tag:
            api.create_tag(REPO, tag=tag)
            (checkpoint / "generation_config.json").write_text('{"second": true}')
    hub.requests.clear()
    return checkpoint


def assert_same(folder: Path, source: Path) -> None:
    names = {path.name for path in source.iterdir() if path.suffix in (".json", ".safetensors")}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_a_revision_becomes_a_commit(hub, source):
    repo = hub.repos["models", REPO]
    folder = pull()
    assert_same(folder, source)
    assert folder.name == repo.commit("main")["id"]
    first = pull(revision="v1")
    assert first.name == repo.commit("v1")["id"] != folder.name
    assert (first / "generation_config.json").read_text() == "{}"
    assert pull(revision=first.name) == first


def test_what_is_cached_is_neither_sent_nor_hashed_again(hub, source, monkeypatch):
    pull()
    hub.requests.clear()
    monkeypatch.setattr(hub_files, "has_content", lambda *_: pytest.fail("hashed again"))
    assert_same(pull(), source)
    assert not num_gets(hub)


@pytest.mark.parametrize("path", ["/api/models/", "/tree/", "/resolve/", "/lfs/"])
@pytest.mark.parametrize("status", [500, 429])
def test_an_error_on_any_request_is_overcome(hub, source, path, status):
    headers = {"Retry-After": "0"} if status == 429 else {}
    hub.faults.append(Fault("status", path, status=status, headers=headers))
    assert_same(pull(), source)
    assert hub.faults[0].hits > 1


@pytest.mark.parametrize("kind", [{"kind": "truncate", "keep": 100}, {"kind": "drop"}, {"kind": "lost"}])
def test_a_truncated_or_cut_download_is_completed(hub, source, kind):
    hub.faults.append(Fault(path="/lfs/", method="GET", **kind))
    assert_same(pull(), source)


def test_killed_half_way_a_rerun_completes(hub, source, tmp_path):
    hub.faults.append(Fault("delay", "/lfs/", method="GET", delay=60))
    code = f"from hf_minitron.hub_files import *; fetch_snapshot({REPO!r}, allow_patterns={PATTERNS})"
    env = os.environ | hub.env(constants.HF_HOME)
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    while not any(r["method"] == "GET" and "/lfs/" in r["path"] for r in hub.requests):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_same(pull(), source)


@pytest.mark.parametrize("path", ["/lfs/", "/resolve/main-or-commit/config.json"])
def test_a_corrupted_download_is_noticed_and_replaced(hub, source, caplog, path):
    path = path.replace("main-or-commit", ".*")
    hub.faults.append(Fault("corrupt", path, method="GET"))
    assert_same(pull(), source)
    name = "model.safetensors" if "lfs" in path else "config.json"
    assert f"{name} of alice/small has not the checksum" in caplog.text


def test_a_download_that_is_always_corrupted_is_an_error_and_nothing_stays(hub, source):
    hub.faults.append(Fault("corrupt", "/lfs/", method="GET", times=99))
    with pytest.raises(OSError, match=r"model\.safetensors of alice/small came 3 times with another content"):
        pull()
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]
    hub.faults.clear()
    assert_same(pull(), source)


def test_a_damaged_cache_is_replaced_online_and_refused_offline(hub, source, monkeypatch):
    weights = pull() / "model.safetensors"
    sound = weights.read_bytes()

    def damage() -> None:
        blob = weights.resolve()
        blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))

    damage()
    assert_same(pull(), source)
    damage()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"model\.safetensors is damaged"):
        pull()


def test_without_a_connection_the_cache_is_used_and_it_is_said(hub, source, caplog, monkeypatch):
    folder = pull(revision="v1")
    pull()
    caplog.clear()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(revision="v1") == folder and not hub.requests
    assert f"offline mode is on (HF_HUB_OFFLINE); using {REPO} as cached, commit {folder.name}" in caplog.text
    with pytest.raises(ConnectionError, match=r"has no whole copy of alice/small at revision v2"):
        pull(revision="v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    caplog.clear()
    hub.faults.append(Fault("status", "", times=999, status=503))
    newest = pull()
    assert "failed again and again, at last with 503" in caplog.text and f"commit {newest.name}" in caplog.text


def test_a_stale_cache_is_not_used_when_one_request_is_slow(hub, source, monkeypatch, caplog):
    old = pull()
    HfApi(endpoint=hub.url, token="hf_alice").upload_file(
        path_or_fileobj=b"[1]", path_in_repo="config.json", repo_id=REPO
    )
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 0.5)
    hub.faults.append(Fault("delay", "/api/models/", delay=3))
    new = pull()
    assert new != old and (new / "config.json").read_text() == "[1]" and "trying again" in caplog.text


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        ("hf_bob", FileNotFoundError, "does not exist, or it is private and this token may not see it"),
        ("hf_expired", PermissionError, r"does not accept the token \(401.*has expired: make a new one at http"),
    ],
)
def test_no_stranger_gets_what_the_cache_holds(hub, source, token, error, message):
    folder = pull()
    for revision in (None, folder.name):
        with pytest.raises(error, match=message) as caught:
            pull(token=token, revision=revision)
        assert token not in str(caught.value)


def test_nobody_gets_a_private_model_and_strangers_no_gated_one(hub, source, monkeypatch):
    folder = pull()
    repo = hub.repos["models", REPO]
    repo.state |= {"private": False, "gated": "auto"}
    for revision in (None, folder.name):
        with pytest.raises(
            PermissionError, match=r"is gated \(403 Access to alice/small is restricted.*Ask for access"
        ):
            pull(token="hf_bob", revision=revision)
    assert_same(pull(), source)
    repo.state |= {"private": True, "gated": False}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"the Hub wants a token \(401.*hf auth login"):
        pull()


def test_a_revision_or_model_that_is_not_there(hub, source):
    with pytest.raises(FileNotFoundError, match=r"alice/small at revision v9: the repository has no such revision"):
        pull(revision="v9")
    with pytest.raises(FileNotFoundError, match="looking up alice/none: it does not exist, or it is private"):
        fetch_snapshot("alice/none", allow_patterns=PATTERNS)


def test_checksums_are_those_of_git_and_lfs(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hello\n")
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert sha256_of(path) == hashlib.sha256(b"hello\n").hexdigest()
