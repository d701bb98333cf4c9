"""``push_checkpoint`` against a strict Hub that fails on demand: all of it or nothing, once, and nothing private."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from lineages import LINEAGES
from local_hub import Fault, User

from hf_minitron.hub_files import git_blob_id, sha256_of
from hf_minitron.publish.hub import check_may_write, push_checkpoint

REPO = "alice/small"
PUSHED = {
    *("README.md", "config.json", "distill_log.json", "generation_config.json", "minitron.json", "model.safetensors"),
    *("plots/loss.png", "prune_plan.json", "tokenizer.json", "tokenizer_config.json"),
}
REQUESTS = {  # every request of a push, by method and path
    "whoami": ("GET", "/whoami"),
    "validate": ("POST", "/validate-yaml"),
    "create": ("POST", "/repos/create"),
    "look": ("GET", "/api/models/[^/]+/[^/]+/revision/"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "commit": ("POST", "/commit/"),
}


def api(hub, token: str = "hf_alice") -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def count(hub, method: str, path: str) -> int:
    return sum(r["method"] == method and re.search(path, r["path"]) is not None for r in hub.requests)


def num_commits(hub, repo: str = REPO) -> int:
    return len(hub.repos["models", repo].state["commits"]) - 1  # without the initial one


def assert_published(hub, folder: Path, revision: str = "main") -> None:
    """Every file on the hub is byte by byte the folder's, and nothing else is there."""
    tree = hub.repos["models", REPO].commit(revision)["tree"]
    assert set(tree) == PUSHED | {".gitattributes"}
    for name in PUSHED:
        path, row = folder / name, tree[name]
        wanted = sha256_of(path) if "lfs" in row else git_blob_id(path.read_bytes())
        assert row.get("lfs", row)["oid"] == wanted, name


def test_one_private_commit_with_what_belongs_and_nothing_else(hub, checkpoint):
    result = push_checkpoint(checkpoint, REPO)
    assert_published(hub, checkpoint)
    assert num_commits(hub) == 1 and hub.repos["models", REPO].state["private"]
    head = api(hub).model_info(REPO)
    assert (result.commit, result.url) == (head.sha, f"{hub.url}/{REPO}/commit/{head.sha}")
    assert result.committed and result.private and result.lineage[0]["stage"] == "prune"
    assert set(result.files) == PUSHED and result.files["plots/loss.png"] == 10
    assert {"optimizer.pt", ".env", "run.log", "checkpoint-10/model.safetensors", "notes.txt"} <= set(result.left_out)
    assert head.card_data.base_model == "acme/big" and head.card_data.license == "mit"


def test_the_hub_shows_base_model_relation_license_and_results(hub, checkpoint):
    (checkpoint / "minitron.json").write_text(json.dumps({"format_version": 1, "stages": LINEAGES["distilled"]}))
    push_checkpoint(checkpoint, REPO)
    info = api(hub).model_info(REPO)
    card = info.card_data
    assert (card.base_model, card.base_model_relation) == ("meta-llama/Llama-3.1-8B", "finetune")
    assert card.license == "llama3.1" and "license:llama3.1" in info.tags
    assert {result.metric_value for result in card.eval_results} >= {0.735, 0.605, 2.25}


def test_pushing_again_does_nothing_and_a_change_is_one_commit_more(hub, checkpoint):
    first = push_checkpoint(checkpoint, REPO)
    hub.requests.clear()
    again = push_checkpoint(checkpoint, REPO)
    assert (again.commit, again.committed) == (first.commit, False)
    assert not count(hub, "PUT", "") and not count(hub, "POST", "/commit/")
    (checkpoint / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    changed = push_checkpoint(checkpoint, REPO)
    assert changed.committed and num_commits(hub) == 2 and not count(hub, "PUT", "")
    assert_published(hub, checkpoint)


def test_dry_run_lists_exactly_what_would_go_and_sends_nothing(hub, checkpoint, tmp_path):
    before = sorted(path for path in checkpoint.rglob("*"))
    planned = push_checkpoint(checkpoint, REPO, dry_run=True)
    assert not hub.requests and sorted(path for path in checkpoint.rglob("*")) == before
    pushed = push_checkpoint(checkpoint, REPO)
    assert planned.files == pushed.files == {name: (checkpoint / name).stat().st_size for name in sorted(PUSHED)}
    assert planned.left_out == pushed.left_out and planned.commit is None


def test_a_public_repository_branch_and_pull_request(hub, checkpoint, caplog):
    api(hub).create_repo(REPO, private=False)
    result = push_checkpoint(checkpoint, REPO, revision="v2")
    assert result.revision == "v2" and result.private is False and "is public" in caplog.text
    assert_published(hub, checkpoint, "v2")
    assert list(hub.repos["models", REPO].commit("main")["tree"]) == [".gitattributes"]
    proposed = push_checkpoint(checkpoint, REPO, create_pr=True)
    assert (proposed.revision, proposed.pull_request) == ("refs/pr/1", f"{hub.url}/{REPO}/discussions/1")
    assert_published(hub, checkpoint, "refs/pr/1")
    again = push_checkpoint(checkpoint, REPO, create_pr=True)
    assert (again.pull_request, again.committed) == (proposed.pull_request, False)
    with pytest.raises(ValueError, match="pull requests go to main"):
        push_checkpoint(checkpoint, REPO, create_pr=True, revision="v2")


def test_a_card_by_hand_goes_as_it_is(hub, checkpoint):
    (checkpoint / "README.md").write_text("# By hand, without metadata\n")
    push_checkpoint(checkpoint, REPO)
    assert hub.repos["models", REPO].text("main", "README.md") == "# By hand, without metadata\n"
    assert_published(hub, checkpoint)


def test_a_bare_name_is_put_under_the_accounts(hub, checkpoint):
    assert push_checkpoint(checkpoint, "small").repo_id == REPO


def test_weights_of_another_layout_are_replaced_in_the_same_commit(hub, checkpoint):
    api(hub).create_repo(REPO)
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        api(hub).upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=REPO)
    before = num_commits(hub)
    result = push_checkpoint(checkpoint, REPO)
    assert_published(hub, checkpoint)
    assert len(result.deleted) == 3 and num_commits(hub) == before + 1


# A bad network


@pytest.mark.parametrize("request_name", list(REQUESTS))
@pytest.mark.parametrize("status", [500, 429])
def test_an_error_on_any_request_is_overcome(hub, checkpoint, request_name, status):
    method, path = REQUESTS[request_name]
    headers = {"Retry-After": "0"} if status == 429 else {}
    fault = Fault("status", path, method=method, status=status, headers=headers)
    hub.faults.append(fault)
    result = push_checkpoint(checkpoint, REPO)
    assert fault.hits > 1 and result.committed
    assert_published(hub, checkpoint)
    assert num_commits(hub) == 1


@pytest.mark.parametrize("request_name", ["whoami", "create", "look", "preupload", "batch", "commit"])
def test_a_lost_answer_is_overcome_and_no_commit_made_twice(hub, checkpoint, request_name):
    method, path = REQUESTS[request_name]
    hub.faults.append(Fault("lost", path, method=method))
    push_checkpoint(checkpoint, REPO)
    assert_published(hub, checkpoint)
    assert num_commits(hub) == 1 and count(hub, "POST", "/commit/") == 1


def test_a_lost_answer_to_a_pull_request_opens_no_second(hub, checkpoint):
    api(hub).create_repo(REPO)
    hub.faults.append(Fault("lost", "/commit/"))
    result = push_checkpoint(checkpoint, REPO, create_pr=True)
    assert (
        result.revision == "refs/pr/1"
        and len(api(hub).list_repo_refs(REPO, include_pull_requests=True).pull_requests) == 1
    )


def test_a_hub_that_stays_down_is_one_error_and_a_rerun_completes(hub, checkpoint):
    hub.faults.append(Fault("status", "/commit/", times=99, status=503))
    with pytest.raises(
        ConnectionError, match=r"pushing to alice/small failed again and again, at last with 503"
    ) as error:
        push_checkpoint(checkpoint, REPO)
    assert error.value.__cause__ is None and "same command once more" in str(error.value)
    assert list(hub.repos["models", REPO].commit("main")["tree"]) == [".gitattributes"]
    hub.faults.clear()
    hub.requests.clear()
    assert push_checkpoint(checkpoint, REPO).committed
    assert_published(hub, checkpoint)
    assert not count(hub, "PUT", "")  # the weights had arrived


def test_waiting_as_long_as_the_hub_says(hub, checkpoint):
    hub.faults.append(Fault("status", "/commit/", status=429, headers={"Retry-After": "1"}))
    start = time.monotonic()
    push_checkpoint(checkpoint, REPO)
    assert time.monotonic() - start > 1


@pytest.mark.parametrize("fault", [{"kind": "delay", "delay": 30}, {"kind": "drop", "keep": 100}])
def test_a_stalled_or_cut_upload_is_given_up_and_repeated(hub, checkpoint, fault):
    hub.faults.append(Fault(path="/lfs/", method="PUT", **fault))
    start = time.monotonic()
    push_checkpoint(checkpoint, REPO, stall_seconds=0.5)
    assert time.monotonic() - start < 20 and count(hub, "PUT", "/lfs/") == 2
    assert_published(hub, checkpoint)


def test_somebody_elses_commit_is_not_overwritten(hub, checkpoint, monkeypatch):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 17}))
    preupload = HfApi.preupload_lfs_files

    def meanwhile(self, *arguments, **options):
        monkeypatch.setattr(HfApi, "preupload_lfs_files", preupload)
        api(hub).upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id=REPO)
        return preupload(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(OSError, match="somebody else committed to main meanwhile"):
        push_checkpoint(checkpoint, REPO)
    assert hub.repos["models", REPO].text("main", "config.json") == "theirs"


def test_killed_half_way_nothing_is_published_and_a_rerun_completes(hub, checkpoint, tmp_path):
    hub.faults.append(Fault("delay", "/commit/", delay=60))
    code = f"from hf_minitron.publish.hub import *; push_checkpoint({str(checkpoint)!r}, {REPO!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | hub.env(tmp_path / "home"))
    while not count(hub, "POST", "/commit/"):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(hub.repos["models", REPO].commit("main")["tree"]) == [".gitattributes"]
    hub.faults.clear()
    hub.requests.clear()
    push_checkpoint(checkpoint, REPO)
    assert_published(hub, checkpoint)
    assert not count(hub, "PUT", "") and num_commits(hub) == 1


def test_a_file_that_changes_during_the_push_is_noticed(hub, checkpoint, monkeypatch):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "tokenizer.json").write_text("{}")
    preupload = HfApi.preupload_lfs_files

    def change(self, *arguments, **options):
        (checkpoint / "prune_plan.json").write_text('{"changed": 1}')
        return preupload(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", change)
    with pytest.raises(OSError, match=r"differs from the folder in prune_plan\.json"):
        push_checkpoint(checkpoint, REPO)


# Rights and secrets


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_alice_read", r"the token of alice may only read\. Make one with write permission at http"),
        ("hf_expired", r"does not accept the token \(401 .*\)\. It is wrong, revoked or has expired"),
        ("hf_bob", r"this token may not do that \(403 You don't have the rights to write under the namespace 'alice'"),
    ],
)
def test_tokens_that_may_not_write(hub, checkpoint, token, message):
    with pytest.raises(PermissionError, match=message) as error:
        push_checkpoint(checkpoint, REPO, token=token)
    assert token not in str(error.value)
    assert ("models", REPO) not in hub.repos
    with pytest.raises(PermissionError, match="pushing to alice/small"):
        check_may_write(REPO, token) if token != "hf_bob" else push_checkpoint(checkpoint, REPO, token=token)


def test_without_a_token_and_for_a_strangers_private_repository(hub, checkpoint, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist, or it is private and this token may not see it"):
        api(hub).create_repo(REPO, private=True)
        push_checkpoint(checkpoint, REPO, token="hf_bob", create_pr=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"there is none\. Run `hf auth login`, or set HF_TOKEN"):
        push_checkpoint(checkpoint, REPO)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        (
            "minitron.json",
            json.dumps({"format_version": 1, "stages": [{"stage": "x", "note": "hf_" + "aB3" * 12}]}),
            "Hugging",
        ),
        ("tokenizer_config.json", json.dumps({"note": "token hf_alice here"}), "your own"),
        ("distill_log.json", json.dumps(["AKIA" + "ABCDEFGH12345678"]), "AWS"),
        ("README.md", "by hand\n\n-----BEGIN OPENSSH PRIVATE KEY-----\n", "private key"),
        ("chat_template.jinja", "{# ghp_" + "a1" * 18 + " #}", "GitHub"),
    ],
)
def test_secrets_in_files_stop_the_push_before_anything_is_sent(hub, checkpoint, name, text, kind):
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}, line \d, holds what looks like .*{kind}") as error:
        push_checkpoint(checkpoint, REPO)
    assert not hub.requests and "aB3aB3" not in str(error.value)


def test_no_token_and_no_signed_url_in_logs_errors_and_files(hub, checkpoint, caplog, tmp_path):
    secret = "hf_" + "Zq7" * 12
    hub.users = (*hub.users, User("alice", secret))
    caplog.set_level(logging.INFO)
    hub.faults += [Fault("status", "/lfs/", method="PUT"), Fault("lost", "/commit/"), Fault("drop", "/lfs/", nth=2)]
    push_checkpoint(checkpoint, REPO, token=secret)
    assert "trying again" in caplog.text and "thrown while requesting PUT" in caplog.text
    hub.faults.append(Fault("status", "", times=999, status=500))
    with pytest.raises(ConnectionError) as error:
        push_checkpoint(checkpoint, REPO, token=secret)
    written = [path.read_text(errors="replace") for path in checkpoint.rglob("*") if path.is_file()]
    told = "\n".join([caplog.text, repr(error.value), str(error.value.__context__ is not None), *written])
    assert secret not in told and "Zq7" not in told
    assert "?token=" not in caplog.text and not [grant for grant in hub.grants if grant in caplog.text]


# What is no checkpoint


def test_what_is_not_whole_is_refused_before_anything_is_sent(hub, checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        push_checkpoint(tmp_path / "nothing", REPO)
    with pytest.raises(ValueError, match="Repo id"):
        push_checkpoint(checkpoint, "a/b/c")
    (checkpoint / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        push_checkpoint(checkpoint, REPO)
    (checkpoint / "tokenizer.json").write_text("{}")
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        push_checkpoint(checkpoint, REPO)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        push_checkpoint(checkpoint, REPO)
    assert not hub.requests


def test_a_card_that_the_hub_refuses_stops_before_the_upload(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: my-own\n---\nby hand\n")
    with pytest.raises(ValueError, match=r"README\.md: the Hub does not take its metadata.*license"):
        push_checkpoint(checkpoint, REPO)
    assert ("models", REPO) not in hub.repos
