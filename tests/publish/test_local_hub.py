"""The local Hub itself, with the real huggingface_hub client: what it stores, refuses, and does wrong on demand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from local_hub import Fault, LocalHub, User, git_id

R = "alice/m"


@pytest.fixture
def api(local_hub):
    api = HfApi(endpoint=local_hub.url, token="hf_alice")
    api.create_repo(R)
    return api


def count(hub, method, path):
    return sum(r["method"] == method and re.search(path, r["path"]) is not None for r in hub.requests)


def put(api, name, data, **kw):
    return api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=R, **kw)


def get(hub, name, tmp_path, **kw):
    return Path(hf_hub_download(R, name, endpoint=hub.url, token="hf_alice", cache_dir=tmp_path / "cache", **kw))


def raw(hub, method, url, body=b"", **headers):
    request = urllib.request.Request(
        url if "://" in url else hub.url + url, body if method in ("PUT", "POST") else None, headers, method=method
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


AUTH = {"Authorization": "Bearer hf_alice"}


# Faults during uploads


@pytest.mark.parametrize("status, headers, least", [(500, {}, 1), (503, {}, 1), (429, {"Retry-After": "1"}, 2)])
def test_upload_is_retried_by_the_client(api, local_hub, tmp_path, status, headers, least):
    local_hub.faults.append(Fault("status", "/lfs/", method="PUT", status=status, headers=headers))
    data, start = os.urandom(3_000_000), time.time()
    put(api, "a.bin", data)
    assert time.time() - start >= least and count(local_hub, "PUT", "/lfs/") == 2
    assert get(local_hub, "a.bin", tmp_path).read_bytes() == data


def test_connection_cut_in_the_middle_of_an_upload(api, local_hub, tmp_path):
    local_hub.faults.append(Fault("drop", "/lfs/", method="PUT", keep=2 << 20))
    data = os.urandom(20 << 20)
    put(api, "a.bin", data)
    assert [r["received"] for r in local_hub.requests if r["method"] == "PUT"] == [2 << 20, 20 << 20]
    assert get(local_hub, "a.bin", tmp_path).read_bytes() == data


def test_interrupted_folder_upload_resumes_by_file(api, local_hub, tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.safetensors").write_bytes(os.urandom(1_000_000))
    local_hub.faults.append(Fault("status", "/lfs/", method="PUT", nth=3, times=2, status=400))
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id=R, folder_path=folder)
    assert api.list_repo_files(R) == [".gitattributes"]  # nothing half-published
    done = sum(r["status"] == 200 for r in local_hub.requests if r["method"] == "PUT")
    local_hub.requests.clear()
    local_hub.faults.clear()
    api.upload_folder(repo_id=R, folder_path=folder)
    assert count(local_hub, "PUT", "/lfs/") == 4 - done < 4  # only the missing objects
    assert len(api.list_repo_files(R)) == 5
    local_hub.requests.clear()
    api.upload_folder(repo_id=R, folder_path=folder)  # nothing changed: no upload, no commit
    assert count(local_hub, "PUT", "") == count(local_hub, "POST", "/commit/") == 0


def test_failed_commit_is_not_retried_and_keeps_the_objects(api, local_hub):
    head = api.model_info(R).sha
    local_hub.faults.append(Fault("status", "/commit/", status=500))
    with pytest.raises(HfHubHTTPError):
        put(api, "a.bin", b"x" * 10)
    assert api.model_info(R).sha == head and count(local_hub, "POST", "/commit/") == 1
    local_hub.requests.clear()
    put(api, "a.bin", b"x" * 10)
    assert count(local_hub, "PUT", "") == 0 and "a.bin" in api.list_repo_files(R)


def test_lost_answer_to_a_commit_that_was_done(api, local_hub):
    head = api.model_info(R).sha
    local_hub.faults.append(Fault("lost", "/commit/"))
    with pytest.raises(Exception) as error:
        put(api, "a.txt", b"x")
    assert type(error.value).__module__.startswith("httpx2")
    assert api.model_info(R).sha != head  # it was done all the same
    assert put(api, "a.txt", b"x").oid == api.model_info(R).sha  # and doing it again changes nothing
    assert len(api.list_repo_commits(R)) == 2


# Faults during downloads


def test_truncated_download_is_resumed_with_a_range(api, local_hub, tmp_path):
    data = os.urandom(30 << 20)
    put(api, "a.bin", data)
    local_hub.faults.append(Fault("truncate", "/lfs/", method="GET", keep=25 << 20))
    assert get(local_hub, "a.bin", tmp_path).read_bytes() == data
    gets = [(r["status"], r["sent"]) for r in local_hub.requests if r["method"] == "GET" and "/lfs/" in r["path"]]
    assert gets == [(200, 25 << 20), (206, 10 << 20)]  # the client keeps whole chunks of 10 MiB


def test_truncated_small_file(api, local_hub, tmp_path):
    put(api, "a.txt", b"hello world")
    local_hub.faults.append(Fault("truncate", "/resolve/", method="GET", keep=3))
    assert get(local_hub, "a.txt", tmp_path).read_bytes() == b"hello world"


def test_corrupted_download_goes_unnoticed_by_the_client_until_verified(api, local_hub, tmp_path):
    data = os.urandom(1_000_000)
    put(api, "a.bin", data)
    local_hub.faults.append(Fault("corrupt", "/lfs/", method="GET"))
    path = snapshot_download(R, endpoint=local_hub.url, token="hf_alice", cache_dir=tmp_path / "cache")
    assert (Path(path) / "a.bin").read_bytes() != data  # size is all that huggingface_hub checks
    found = api.verify_repo_checksums(R, cache_dir=tmp_path / "cache")
    assert [m["path"] if isinstance(m, dict) else m.path for m in found.mismatches] == ["a.bin"]


def test_server_error_during_download_is_not_retried(api, local_hub, tmp_path):
    put(api, "a.bin", b"x" * 100)
    local_hub.faults.append(Fault("status", "/lfs/", method="GET", status=500))
    with pytest.raises(HfHubHTTPError):
        get(local_hub, "a.bin", tmp_path)
    assert get(local_hub, "a.bin", tmp_path).read_bytes() == b"x" * 100


def test_slow_server(api, local_hub, tmp_path):
    put(api, "a.txt", b"x")
    local_hub.faults.append(Fault("delay", "/resolve/", method="HEAD", delay=1.5))
    assert get(local_hub, "a.txt", tmp_path, etag_timeout=0.5).read_bytes() == b"x"
    assert count(local_hub, "HEAD", "/resolve/") == 2  # nothing was cached, so the client tried again, more patiently
    local_hub.faults[:] = [Fault("delay", "/resolve/", method="HEAD", delay=1.5)]
    put(api, "a.txt", b"y")
    assert get(local_hub, "a.txt", tmp_path, etag_timeout=0.5).read_bytes() == b"x"  # stale, from the cache


# Strictness


def grant(hub, oid, size):
    body = json.dumps(
        {
            "operation": "upload",
            "transfers": ["basic"],
            "objects": [{"oid": oid, "size": size}],
            "ref": {"name": "main"},
        }
    )
    return json.loads(raw(hub, "POST", f"/{R}.git/info/lfs/objects/batch", body.encode(), **AUTH)[1])["objects"][0]


def test_lfs_content_is_verified(api, local_hub):
    data = b"abc" * 1000
    oid = hashlib.sha256(data).hexdigest()
    href = grant(local_hub, oid, len(data))["actions"]["upload"]["href"]
    assert raw(local_hub, "PUT", href, data[:-1])[0] == 400
    assert raw(local_hub, "PUT", href, b"abd" * 1000)[0] == 400
    assert raw(local_hub, "PUT", href, data, **AUTH)[0] == 403  # a token must not be sent to the CDN
    assert raw(local_hub, "PUT", href[:-1] + "_", data)[0] == 403
    assert not (local_hub.blobs / oid).exists() and len(list(local_hub.blobs.iterdir())) == 1
    assert raw(local_hub, "PUT", href, data)[0] == 200
    assert "actions" not in grant(local_hub, oid, len(data))


def commit(hub, *lines, header=None, rev="main", **headers):
    head = {"key": "header", "value": {"summary": "s"} if header is None else header}
    body = b"\n".join(json.dumps(line).encode() for line in [head, *lines])
    status, answer, _ = raw(
        hub,
        "POST",
        f"/api/models/{R}/commit/{rev}",
        body,
        **{"Content-Type": "application/x-ndjson", **AUTH, **headers},
    )
    return status, json.loads(answer)


def file(path, content="eA==", **more):
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64", **more}}


@pytest.mark.parametrize("path", ["", "/a", "a/../b", ".git/config", "a//b", "./a", "a/"])
def test_bad_paths(api, local_hub, path):
    assert commit(local_hub, file(path))[0] == 400


def test_bad_commits(api, local_hub):
    other = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    assert commit(local_hub, other)[0] == 400  # never uploaded
    assert commit(local_hub, file("a", "***"))[0] == 400
    assert commit(local_hub, {"key": "symlink", "value": {"path": "a"}})[0] == 400
    assert commit(local_hub, header={})[0] == 400
    assert commit(local_hub, file("a"), **{"Content-Type": "application/json"})[0] == 400
    assert commit(local_hub, file("a"), file("a/b"))[0] == 400
    assert commit(local_hub, file("a"), rev="nope")[0] == 404
    assert commit(local_hub, file("README.md", "LS0tCmxpY2Vuc2U6IGZvbwotLS0K"))[0] == 400  # license: foo
    assert commit(local_hub, file("big", "A" * (15 << 20)))[0] == 400  # 11 MiB without LFS
    assert commit(local_hub, file("a"), header={"summary": "s", "parentCommit": "0" * 40})[0] == 412
    assert len(api.list_repo_commits(R)) == 1  # all or nothing
    assert raw(local_hub, "GET", "/api/models/alice/m/treesize/main", **AUTH)[0] == 501


def test_two_writers_with_the_same_parent(api, local_hub):
    head, results = api.model_info(R).sha, []

    def write(n):
        try:
            results.append(
                put(HfApi(endpoint=local_hub.url, token="hf_alice"), f"{n}.txt", b"x", parent_commit=head).oid
            )
        except HfHubHTTPError as error:
            results.append(error.response.status_code)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 6 and results.count(412) == 5 and len(api.list_repo_commits(R)) == 2


def test_ids_are_those_of_git(api, tmp_path):
    put(api, "a.txt", b"hello\n")
    assert api.get_paths_info(R, "a.txt")[0].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a" == git_id(b"hello\n")
    data = os.urandom(1000)
    put(api, "w.safetensors", data)
    info = api.get_paths_info(R, "w.safetensors")[0]
    assert info.lfs.sha256 == hashlib.sha256(data).hexdigest() and info.size == 1000
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{info.lfs.sha256}\nsize 1000\n".encode()
    assert info.blob_id == git_id(pointer) and info.lfs.pointer_size == len(pointer)


# Rights, restart, command line


def test_rights(local_hub, api, tmp_path):
    api.create_repo("alice/secret", private=True)
    reader, bob, nobody = (HfApi(endpoint=local_hub.url, token=t) for t in ("hf_alice_read", "hf_bob", False))
    assert reader.model_info("alice/secret").private
    for who, status in ((bob, 404), (nobody, 401)):
        with pytest.raises(RepositoryNotFoundError) as error:
            who.model_info("alice/secret")
        assert error.value.response.status_code == status
    for who, status in ((reader, 403), (bob, 403), (nobody, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            put(who, "x.txt", b"x")
        assert error.value.response.status_code == status
    pr = put(bob, "x.txt", b"x", create_pr=True)
    assert pr.pr_revision == "refs/pr/1" and "x.txt" not in api.list_repo_files(R)
    local_hub.repos["models", R].state["gated"] = "auto"
    put(api, "x.txt", b"x")
    with pytest.raises(GatedRepoError):
        hf_hub_download(R, "x.txt", endpoint=local_hub.url, token="hf_bob", cache_dir=tmp_path)


def test_organizations(tmp_path):
    with LocalHub(tmp_path / "hub", users=(User("ann", "t", orgs=("acme",)),)) as hub:
        api = HfApi(endpoint=hub.url, token="t")
        assert api.create_repo("acme/m").repo_id == "acme/m" and api.whoami()["orgs"][0]["name"] == "acme"


def test_restart(tmp_path):
    data = os.urandom(100_000)
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo(R, private=True)
        put(api, "a.bin", data)
        api.create_tag(R, tag="v1")
        head = api.model_info(R).sha
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        assert api.model_info(R, revision="v1").sha == head and api.model_info(R).private
        assert get(hub, "a.bin", tmp_path, revision="v1").read_bytes() == data


def test_command_line_and_xet_hint(tmp_path):
    fault = '{"kind": "status", "path": "whoami", "status": 418}'
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("local_hub.py"), "--root", str(tmp_path / "hub"), "--fault", fault],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = server.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        env = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_TOKEN": "hf_alice",
            "HF_HUB_DISABLE_XET": "0",
            "HF_HOME": str(tmp_path),
        }
        code = "from huggingface_hub import HfApi; a = HfApi(); a.create_repo('alice/x')\n"
        code += "a.upload_file(path_or_fileobj=b'x', path_in_repo='a.bin', repo_id='alice/x')"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and "xet" in done.stderr
        with pytest.raises(HfHubHTTPError, match="418"):
            HfApi(endpoint=url, token="hf_alice").whoami()
        assert HfApi(endpoint=url, token="hf_alice").whoami()["name"] == "alice"
    finally:
        server.terminate()
        server.wait()
