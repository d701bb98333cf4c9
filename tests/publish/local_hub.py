"""A strict Hugging Face Hub for tests: one file, real storage, loopback only.

    python local_hub.py --port 0 --root DIR        # prints its URL on the first line
    HF_ENDPOINT=<that URL> HF_TOKEN=hf_alice HF_HUB_DISABLE_XET=1 python your_script.py

From Python: ``with LocalHub(root) as hub: ...``; in tests the fixtures of conftest.py. Set HF_ENDPOINT and
HF_HUB_DISABLE_XET before ``huggingface_hub`` is imported. Xet has to be switched off in the client, because
huggingface_hub 2.x uploads by xet without asking whether the server speaks it.

Real: contents are kept under their hash; a commit has a full tree, parent, author and message; branches, tags and
``refs/pr/N`` are independent refs; all of it survives a restart. Large files go by Git LFS to a second port, which
plays CDN and S3: it serves only URLs that were handed out, and refuses requests with an Authorization header.

Strict: an upload whose size or SHA-256 is not the announced one is thrown away; a commit may only name LFS objects
uploaded to that very repo; a stale ``parentCommit`` is 412; paths and README metadata are checked at commit time
too. What is missing (xet, repo settings, discussions, ...) is 501. There is no multipart, pagination or .gitignore.

Errors follow the Hub. Unknown token: 401. Missing or private repo: 401 to anonymous, else 404. Readable but not
writable, or a read-only token: 403. The 401 has ``X-Error-Code``, as the client recognises it without only by https.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import json
import mmap
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import yaml

REGULAR_LIMIT, CHUNK = 10 << 20, 1 << 20  # bytes; files above the limit must go by LFS, as on the Hub
LFS_SUFFIXES = "bin bz2 ckpt gguf gz h5 model msgpack npy npz onnx parquet pb pickle pkl pt pth safetensors tar zip"
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split()).encode()
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c
    mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
NAME = re.compile(r"(?![^/]*(--|\.\.))[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?")
REPO_ID = re.compile(rf"({NAME.pattern}/)?{NAME.pattern}")
REF_NAME = re.compile(r"(?!refs/)(?!.*(\.\.|//|\.lock$))[A-Za-z0-9_][\w./+-]*(?<![/.])")
Row = dict[str, Any]  # a file or folder as in the Hub's tree listings: type, path, oid, size and, for LFS files, lfs
Answer = tuple[int, dict[str, str], bytes | memoryview]  # status, headers, body


class HubError(Exception):
    """An HTTP error answer. ``code`` becomes X-Error-Code, which decides the exception class in the client."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        codes = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.status, self.headers = status, {**codes, **headers}


class User(NamedTuple):
    name: str
    token: str
    role: str = "write"  # or "read"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


@dataclass
class Fault:
    """Makes the ``nth`` request that matches ``method`` and ``path`` (a regex) go wrong, ``times`` times in a row.

    kind: ``status`` answers ``status`` and ``headers`` (say, Retry-After), doing nothing; ``delay`` waits ``delay``
    seconds, then serves; ``drop`` reads ``keep`` bytes of the body, then cuts the connection; ``lost`` does the work,
    then cuts the connection instead of answering; ``truncate`` cuts after ``keep`` bytes of the answer's body;
    ``corrupt`` flips the first byte of the answer's body.
    """

    kind: str
    path: str
    method: str = ""
    nth: int = 1
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    keep: int = 0
    hits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("status", "delay", "drop", "lost", "truncate", "corrupt"):
            raise ValueError(f"unknown kind of fault: {self.kind}")

    def strikes(self, method: str, path: str) -> bool:
        matches = self.method in ("", method) and re.search(self.path, path) is not None
        self.hits += matches
        return matches and self.nth <= self.hits < self.nth + self.times


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


def git_id(data: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def make_row(path: str, size: int, oid: str) -> Row:
    """A regular file, if ``oid`` is the git id of its content, or an LFS file, if it is the SHA-256."""
    if len(oid) == 40:
        return {"type": "file", "path": path, "oid": oid, "size": size}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
    lfs = {"oid": oid, "size": size, "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "oid": git_id(pointer), "size": size, "lfs": lfs}


def folders_above(path: str) -> list[str]:
    """From the root, which is "", to the folder that holds the path."""
    return [""] + [path[:n] for n, char in enumerate(path) if char == "/"]


def with_folders(tree: dict[str, Row]) -> dict[str, Row]:
    """All files and folders by path."""
    rows = dict(tree)
    for folder in {"", *(folder for path in tree for folder in folders_above(path))}:
        oids = "".join(path + row["oid"] for path, row in tree.items() if folder in folders_above(path))
        rows[folder] = {"type": "directory", "path": folder, "oid": git_id(oids.encode(), "tree"), "size": 0}
    return rows


def read_card(text: str) -> tuple[dict[str, Any], list[str]]:
    """Metadata of a README.md and what is wrong with it, by the main rules the Hub has for model cards."""
    block = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    try:
        meta = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML: {error}"]
    if not isinstance(meta, dict):
        return {}, ["metadata must be a mapping"]
    errors = []
    tests: dict[str, Callable[[str], Any]] = {"license": LICENSES.__contains__, "base_model": REPO_ID.fullmatch}
    for key in ("license", "base_model", "datasets", "tags", "language", "library_name", "pipeline_tag"):
        value = [] if meta.get(key) is None else meta[key]
        values = value if isinstance(value, list) or key == "tags" else [value]
        if not isinstance(values, list) or not all(isinstance(v, str) and tests.get(key, bool)(v) for v in values):
            errors.append(f'"{key}" with value {value!r} is not valid, see https://hf.co/docs/hub/model-cards')
    return meta, errors


class Repo:
    """A repository with its history: one JSON file, which is replaced at every change."""

    def __init__(self, hub: LocalHub, kind: str, name: str, private: bool = False) -> None:
        self.hub, self.id, self.owner = hub, name, name.split("/")[0]
        self.file = hub.root / f"{kind}--{name.replace('/', '--')}.json"
        self.url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        new: dict[str, Any] = {"private": private, "gated": False, "refs": {}, "commits": {}, "lfs": {}}
        self.state: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else new
        self.refs: dict[str, str] = self.state["refs"]
        self.lfs: dict[str, int] = self.state["lfs"]  # SHA-256 and size of all objects uploaded to this repo

    def save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state))
        temporary.replace(self.file)

    def commit(self, rev: str) -> dict[str, Any]:
        """The commit that a branch, tag, ref, commit id or unique beginning of a commit id stands for."""
        for ref in (rev, f"refs/heads/{rev}", f"refs/tags/{rev}"):
            rev = self.refs.get(ref, rev)
        found: list[dict[str, Any]] = [data for oid, data in self.state["commits"].items() if oid.startswith(rev)]
        if len(found) != 1 or len(rev) < 7:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return found[0]

    def text(self, rev: str, path: str) -> str:
        row = self.commit(rev)["tree"].get(path)
        return (self.hub.blobs / row.get("lfs", row)["oid"]).read_text(errors="replace") if row else ""

    def add_commit(
        self, ref: str, tree: dict[str, Row], author: str, parent: str, title: str, message: str = ""
    ) -> str:
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        data = {"parent": parent, "date": date, "title": title, "message": message, "tree": tree}
        oid = git_id(json.dumps([author, data]).encode(), "commit")
        self.state["commits"][oid] = {"id": oid, "authors": [{"user": author}], **data}
        self.refs[ref] = oid
        self.save()
        return oid

    def info(self, rev: str, blobs: bool) -> dict[str, Any]:
        commit, card = self.commit(rev), read_card(self.text(rev, "README.md"))[0]
        library, pipeline, links = card.get("library_name"), card.get("pipeline_tag"), []
        for key in ("license", "base_model"):
            values = card.get(key) or []
            links += [f"{key}:{value}" for value in (values if isinstance(values, list) else [values])]
        siblings = []
        for path, row in commit["tree"].items():
            lfs = {"lfs": {**row["lfs"], "sha256": row["lfs"]["oid"]}} if "lfs" in row else {}
            siblings.append(
                {"rfilename": path, **({"size": row["size"], "blobId": row["oid"], **lfs} if blobs else {})}
            )
        return {
            **{"id": self.id, "modelId": self.id, "author": self.owner, "sha": commit["id"], "siblings": siblings},
            **{"lastModified": commit["date"], "private": self.state["private"], "gated": self.state["gated"]},
            **{"library_name": library, "pipeline_tag": pipeline, "cardData": card or None, "downloads": 0, "likes": 0},
            "tags": [tag for tag in (library, pipeline, *(card.get("tags") or []), *links) if tag],
        }


class LocalHub:
    """The server, started and stopped by ``with``."""

    def __init__(self, root: str | Path, port: int = 0, users: tuple[User, ...] = ()) -> None:
        self.root, self.blobs = Path(root).resolve(), Path(root).resolve() / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.users = users or (User("alice", "hf_alice"), User("alice", "hf_alice_read", "read"), User("bob", "hf_bob"))
        self.lock = threading.RLock()
        self.faults: list[Fault] = []  # append to make requests go wrong
        self.requests: list[dict[str, Any]] = []  # all that were served
        self.grants: dict[str, tuple[Repo, str, int]] = {}  # token of a CDN URL: repo, SHA-256 and size
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", number), handler) for number in (port, 0)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        names = [file.stem.split("--") for file in self.root.glob("*.json")]
        self.repos = {(kind, f"{owner}/{name}"): Repo(self, kind, f"{owner}/{name}") for kind, owner, name in names}

    def __enter__(self) -> LocalHub:
        for server in self.servers:
            server.socket.listen(64)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def env(self, home: str | Path, token: str = "hf_alice") -> dict[str, str]:
        """Environment variables for a client process that talks to this hub only; ``home`` is its HF_HOME."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": str(home), **switches}

    def add_blob(self, data: bytes) -> str:
        if not (self.blobs / (oid := git_id(data))).exists():
            (self.blobs / oid).write_bytes(data)
        return oid

    def add_lfs(self, repo: Repo, source: Iterator[bytes], oid: str, size: int) -> None:
        """Streams an object into the blob store; other or incomplete content is refused and not kept."""
        temporary, digest, total = self.blobs / secrets.token_hex(8), hashlib.sha256(), 0
        try:
            with temporary.open("wb") as out:
                for data in source:
                    digest.update(data)
                    total += out.write(data)
            if (digest.hexdigest(), total) != (oid, size):
                raise HubError(400, f"{total} bytes with sha256 {digest.hexdigest()} instead of {size} with {oid}")
            temporary.replace(self.blobs / oid)
        finally:
            temporary.unlink(missing_ok=True)
        with self.lock:
            repo.lfs[oid] = size
            repo.save()

    def grant(self, repo: Repo, oid: str, size: int) -> str:
        """A URL on the CDN whose bearer may put or get this object."""
        self.grants[token := secrets.token_hex(16)] = (repo, oid, size)
        return f"{self.cdn}/lfs/{oid}?token={token}"

    def open(self, user: User | None, kind: str, name: str) -> Repo:
        """The repo, if this user may see it."""
        repo = self.repos.get((kind, name))
        if repo is None or (repo.state["private"] and not (user and user.owns(repo.owner))):
            reason = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise HubError(*reason, "RepoNotFound")
        return repo

    def writer(self, user: User | None, owner: str, to_pull_request: bool = False) -> User:
        """The user, if allowed to write; anyone signed in may open a pull request."""
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.role != "write" or not (to_pull_request or user.owns(owner)):
            raise HubError(403, f"You don't have the rights to write under the namespace {owner!r} with this token")
        return user


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
REPO = "(?P<kind>models|datasets|spaces)/(?P<owner>[^/]+)/(?P<name>[^/]+)"
WEB = "(?:(?P<kind>datasets|spaces)/)?(?P<owner>[^/]+)/(?P<name>[^/]+?)"
REV, PATH = "(?P<rev>[^/]+)", "(?P<path>.+)"


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Registers a handler. If the pattern names a repo, the handler gets it as ``repo``, once the user may see it."""
    return lambda handler: [ROUTES.append((method, re.compile(pattern), handler)), handler][1]  # type: ignore


class Handler(BaseHTTPRequestHandler):
    """One connection. The routes use ``query``, ``body``, ``user``, ``hub`` and return an ``Answer``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LocalHub

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        if (user := self.user) is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": user.role}}
        orgs = [{"type": "org", "name": org} for org in user.orgs]
        return as_json({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        meta, errors = read_card(json.loads(self.body)["content"])
        warnings = [] if meta or errors else [{"message": "empty or missing yaml metadata in repo card"}]
        return as_json({"errors": [{"message": e} for e in errors], "warnings": warnings}, 400 if errors else 200)

    @route("POST|DELETE", "/api/repos/(?:create|delete)")
    def create_or_delete_repo(self) -> Answer:
        payload = json.loads(self.body)
        kind, owner = (
            f"{payload.get('type') or 'model'}s",
            payload.get("organization") or getattr(self.user, "name", ""),
        )
        user, key = self.hub.writer(self.user, owner), (kind, f"{owner}/{payload['name']}")
        if kind not in ("models", "datasets", "spaces") or not NAME.fullmatch(payload["name"]):
            raise HubError(400, f"Invalid repo type or name: {key}")
        if self.command == "DELETE":
            self.hub.open(user, *key).file.unlink()
            del self.hub.repos[key]
            return as_json({})
        if key in self.hub.repos:
            return as_json({"error": "You already created this repo", "url": self.hub.repos[key].url}, 409)
        repo = Repo(self.hub, *key, private=payload.get("visibility") == "private")
        row = make_row(".gitattributes", len(GITATTRIBUTES), self.hub.add_blob(GITATTRIBUTES))
        repo.add_commit("refs/heads/main", {".gitattributes": row}, user.name, "", "initial commit")
        self.hub.repos[key] = repo
        return as_json({"url": repo.url})

    @route("GET", f"/api/{REPO}(?:/revision/{REV})?")
    def repo_info(self, repo: Repo, rev: str = "main") -> Answer:
        return as_json(repo.info(rev, self.query.get("blobs") == "true"))

    @route("GET", f"/api/{REPO}/tree/{REV}(?:/{PATH})?")
    def list_tree(self, repo: Repo, rev: str, path: str = "") -> Answer:
        rows, deep = with_folders(repo.commit(rev)["tree"]), self.query.get("recursive") == "true"
        if rows.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return as_json([row for p, row in sorted(rows.items()) if p and path in folders_above(p)[0 if deep else -1 :]])

    @route("POST", f"/api/{REPO}/paths-info/{REV}")
    def paths_info(self, repo: Repo, rev: str) -> Answer:
        rows, asked = with_folders(repo.commit(rev)["tree"]), parse_qsl(self.body.decode())
        return as_json([rows[path] for key, path in asked if key == "paths" and path in rows])

    @route("GET", f"/api/{REPO}/commits/{REV}")
    def list_commits(self, repo: Repo, rev: str) -> Answer:
        commits = [repo.commit(rev)]
        while parent := commits[-1]["parent"]:
            commits.append(repo.commit(parent))
        return as_json([{key: value for key, value in commit.items() if key != "tree"} for commit in commits])

    @route("GET", f"/api/{REPO}/refs")
    def list_refs(self, repo: Repo) -> Answer:
        kinds = {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "converts": "refs/convert/",
            "pullRequests": "refs/pr/",
        }
        rows = [{"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid} for ref, oid in repo.refs.items()]
        return as_json({kind: [row for row in rows if row["ref"].startswith(kinds[kind])] for kind in kinds})

    @route("POST|DELETE", f"/api/{REPO}/(?P<what>branch|tag)/{REV}")
    def change_ref(self, repo: Repo, what: str, rev: str) -> Answer:
        self.hub.writer(self.user, repo.owner)
        payload = json.loads(self.body or "{}")
        name, target = payload.get("tag", rev), payload.get("startingPoint") or ("main" if what == "branch" else rev)
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        if self.command == "DELETE":
            if name == "main" or not repo.refs.pop(ref, ""):
                raise HubError(404, f"Cannot delete {ref}", "RevisionNotFound")
        elif ref in repo.refs or not REF_NAME.fullmatch(name):
            raise HubError(409 if ref in repo.refs else 400, f"Reference already exists or is invalid: {ref}")
        else:
            repo.refs[ref] = repo.commit(target)["id"]
        repo.save()
        return as_json({"success": True})

    @route("POST", f"/api/{REPO}/preupload/{REV}")
    def preupload(self, repo: Repo, rev: str) -> Answer:
        self.hub.writer(self.user, repo.owner, "create_pr" in self.query)
        tree, files = repo.commit(rev)["tree"], []
        globs = [line.split()[0] for line in repo.text(rev, ".gitattributes").splitlines() if "filter=lfs" in line]
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], tree.get(file["path"])
            tracked = any(fnmatch.fnmatchcase(path if "/" in glob else path.rpartition("/")[2], glob) for glob in globs)
            lfs = tracked or file["size"] > REGULAR_LIMIT or b"\0" in base64.b64decode(file["sample"])
            oid = old.get("lfs", old)["oid"] if old and ("lfs" in old) == lfs else None  # unchanged files are skipped
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    @route("POST", rf"/{WEB}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: Repo) -> Answer:
        payload, answers = json.loads(self.body), []
        self.hub.writer(self.user, repo.owner, "ref" not in payload)  # the client leaves ref out for pull requests
        for item in payload["objects"]:
            answers.append({"oid": item["oid"], "size": item["size"]})
            if (
                payload["operation"] != "upload"
                or not re.fullmatch("[0-9a-f]{64}", item["oid"])
                or not item["size"] >= 0
            ):
                answers[-1]["error"] = {"code": 422, "message": "Only uploads of objects with a SHA-256 and a size"}
            elif item["oid"] not in repo.lfs:  # otherwise there is nothing to do
                answers[-1]["actions"] = {"upload": {"href": self.hub.grant(repo, item["oid"], item["size"])}}
        return as_json({"transfer": "basic", "objects": answers})

    @route("POST", f"/api/{REPO}/commit/{REV}")
    def commit(self, repo: Repo, rev: str) -> Answer:
        user = self.hub.writer(self.user, repo.owner, as_pr := "create_pr" in self.query)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if self.headers["Content-Type"] != "application/x-ndjson" or lines[0]["key"] != "header":
            raise HubError(400, "A commit is application/x-ndjson and starts with a header")
        header, ref = lines[0]["value"], rev if rev.startswith("refs/pr/") else f"refs/heads/{rev}"
        parent = header.get("parentCommit") or ""
        head = repo.commit(parent or ref) if as_pr else repo.commit(ref)
        if not head["id"].startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree, pull_request = dict(head["tree"]), {}
        for line in lines[1:]:
            self.apply(repo, tree, line["key"], line["value"])
        if as_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, pull_request = f"refs/pr/{number}", {"pullRequestUrl": f"{repo.url}/discussions/{number}"}
        oid = repo.add_commit(ref, tree, user.name, head["id"], header["summary"], header.get("description") or "")
        return as_json({"success": True, "commitOid": oid, "commitUrl": f"{repo.url}/commit/{oid}", **pull_request})

    def apply(self, repo: Repo, tree: dict[str, Row], key: str, value: dict[str, Any]) -> None:
        """Applies one operation of a commit to ``tree``."""
        path = value["path"].removesuffix("/") if key == "deletedFolder" else value["path"]
        if {"", ".", "..", ".git"} & set(path.split("/")) or "\0" in path:
            raise HubError(400, f"Invalid path in repo: {path!r}")
        inside = [file for file in tree if file.startswith(path + "/")]
        if key in ("file", "lfsFile") and (inside or any(folder in tree for folder in folders_above(path))):
            raise HubError(400, f"{path} would be both a file and a folder")
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            if value["encoding"] != "base64" or len(data) > REGULAR_LIMIT:
                raise HubError(400, f"{path} is not base64, or too large to be committed without LFS")
            if path == "README.md" and (errors := read_card(data.decode(errors="replace"))[1]):
                raise HubError(400, "Invalid metadata in README.md: " + " ".join(errors))
            tree[path] = make_row(path, len(data), self.hub.add_blob(data))
        elif key == "lfsFile":
            size = repo.lfs.get(value["oid"])
            if value["algo"] != "sha256" or size is None or value.get("size", size) != size:
                raise HubError(400, f"{path}: no LFS object {value['oid']} of this size was uploaded to this repo")
            tree[path] = make_row(path, size, value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            if not (gone := inside if key == "deletedFolder" else [path] if path in tree else []):
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for file in gone:
                del tree[file]
        else:
            raise HubError(400, f"Unknown operation {key!r}")

    @route("GET", f"/{WEB}/resolve/{REV}/{PATH}")
    def resolve(self, repo: Repo, rev: str, path: str) -> Answer:
        if repo.state["gated"] and not (self.user and self.user.owns(repo.owner)):
            raise HubError(403 if self.user else 401, f"Access to {repo.id} is restricted.", "GatedRepo")
        commit = repo.commit(rev)
        row, headers = commit["tree"].get(path), {"X-Repo-Commit": commit["id"]}
        if row is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        if "lfs" not in row:
            return self.send_blob(row["oid"], **headers)
        linked = {
            "X-Linked-Size": str(row["size"]),
            "X-Linked-ETag": f'"{row["lfs"]["oid"]}"',
            "ETag": f'"{row["oid"]}"',
        }
        return 302, {"Location": self.hub.grant(repo, row["lfs"]["oid"], row["size"]), **linked, **headers}, b""

    def send_blob(self, oid: str, **headers: str) -> Answer:
        """The content, or the one byte range asked for."""
        with (self.hub.blobs / oid).open("rb") as file:
            size = file.seek(0, 2)
            body = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{oid}"', **headers}
        if (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))) is None:
            return 200, headers, body
        first, last = asked.groups()
        start = int(first) if first else max(0, size - int(last))
        body = body[start : int(last) + 1 if first and last else size]
        if not body:
            raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
        return 206, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{size}", **headers}, body

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        self.record: dict[str, Any] = {"method": self.command, "path": path, "status": 0, "received": 0, "sent": 0}
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.strikes(self.command, path)), Fault("delay", ""))
            self.hub.requests.append(self.record)
        try:
            time.sleep(fault.delay)
            if fault.kind == "drop":
                list(self.stream(fault.keep))
                raise ConnectionError
            try:
                if fault.kind == "status":
                    raise HubError(fault.status, "Injected fault", **fault.headers)
                answer = self.serve_cdn() if self.server is self.hub.servers[1] else self.serve_hub(path)
            except HubError as error:
                answer = as_json({"error": str(error)}, error.status, **error.headers)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                answer = as_json({"error": f"Malformed request: {error!r}"}, 400)
            list(self.stream())  # what the answer did not need
            if fault.kind == "lost":
                raise ConnectionError
            self.send(answer, fault)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve_hub(self, path: str) -> Answer:
        header, tokens = self.headers.get("Authorization"), {f"Bearer {user.token}": user for user in self.hub.users}
        if header is not None and header not in tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user, self.body = tokens.get(header or ""), b"".join(self.stream())
        for methods, pattern, handler in ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command.replace("HEAD", "GET") in methods.split("|"):
                args: dict[str, Any] = {
                    key: unquote(text) for key, text in match.groupdict().items() if text is not None
                }
                with self.hub.lock:
                    if "owner" in args:
                        name = args.pop("owner") + "/" + args.pop("name")
                        args["repo"] = self.hub.open(self.user, args.pop("kind", "models"), name)
                    return handler(self, **args)
        raise HubError(501, f"local_hub does not implement {self.command} {path} (for xet, set HF_HUB_DISABLE_XET=1)")

    def serve_cdn(self) -> Answer:
        repo, oid, size = self.hub.grants.get(self.query.get("token", ""), (None, "", 0))
        if repo is None or "Authorization" in self.headers:
            raise HubError(403, "Needs a URL that was handed out, and no Authorization header besides")
        if self.command != "PUT":
            return self.send_blob(oid)
        self.hub.add_lfs(repo, self.stream(), oid, size)
        return as_json({})

    def stream(self, limit: int = 1 << 62) -> Iterator[bytes]:
        """The rest of the request's body, up to byte ``limit``; a body that ends too early is a ConnectionError."""
        end = min(limit, int(self.headers.get("Content-Length") or 0))
        while (left := end - self.record["received"]) > 0:
            if not (data := self.rfile.read(min(CHUNK, left))):
                raise ConnectionError
            self.record["received"] += len(data)
            yield data

    def send(self, answer: Answer, fault: Fault) -> None:
        self.record["status"], headers, body = answer
        self.send_response(self.record["status"])
        for name, value in {**headers, "Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8)}.items():
            self.send_header(name, re.sub(r"[^\x20-\x7e]+", " ", value))
        self.end_headers()
        body = memoryview(body)[: 0 if self.command == "HEAD" else None]
        if fault.kind == "corrupt" and body:
            body = memoryview(bytes([body[0] ^ 0xFF]) + body[1:])
        for start in range(0, len(body), CHUNK):
            end = min(start + CHUNK, fault.keep) if fault.kind == "truncate" else start + CHUNK
            self.record["sent"] += self.wfile.write(body[start:end])
        if self.record["sent"] < len(body):
            raise ConnectionError

    def log_message(self, format: str, *args: Any) -> None: ...  # hub.requests has them


def main() -> None:
    parser = argparse.ArgumentParser(description="A strict Hugging Face Hub for tests, on 127.0.0.1 only.")
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free port")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds all data")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="JSON", help="fields of a Fault; may be repeated"
    )
    args = parser.parse_args()
    with LocalHub(args.root, args.port) as hub, suppress(KeyboardInterrupt):
        hub.faults += [Fault(**json.loads(text)) for text in args.fault]
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
