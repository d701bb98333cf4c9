"""One commit with a folder's files, made once, over a network that loses requests and answers.

Before each attempt the repository is looked at, so that a commit whose answer got lost is found there instead of made
twice; ``parent_commit`` keeps it from overwriting what somebody else has changed meanwhile. Large files are up before
the commit; those that arrived are not sent again, by this run or the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError

from hf_minitron.hub_access import persist
from hf_minitron.hub_files import git_blob_id, sha256_of
from hf_minitron.publish.contents import is_weight_file
from hf_minitron.source_cards import CARD

_UPLOADS = 2  # attempts with large files; within each, the Hub library tries six times
_PULL_REQUESTS = 20  # newest ones that are searched for one of ours
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class CommitPlan:
    """A repository as it is seen, and the files that it is to have."""

    repo_id: str
    revision: str
    create_pr: bool
    token: str | None
    stall_seconds: float
    files: dict[str, LocalFile]

    def __post_init__(self) -> None:
        self.api = HfApi(token=self.token)
        self.doing = f"pushing to {self.repo_id}"

    def prepare(self, private: bool) -> None:
        """Makes repository and branch as far as they are missing, after asking the Hub whether it takes the card."""
        if CARD in self.files:
            card = self.files[CARD].path.read_text(encoding="utf-8")
            try:
                self._persist(lambda: ModelCard(card).validate(repo_type="model"))
            except ValueError as error:
                raise ValueError(f"{CARD}: the Hub does not take its metadata: {error}. Nothing was sent.") from None
        if self.create_pr:
            return  # to a repository that exists, of anybody
        self._persist(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        if self.revision != constants.DEFAULT_REVISION and not self.revision.startswith("refs/"):
            self._persist(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))

    def publish(self, message: str) -> dict[str, Any]:
        """Uploads and commits what the repository lacks, then compares; the facts of a `PushResult`."""
        head = self._look(self.revision)
        if not head.private:
            logger.warning("%s is public: everybody can see what is pushed", self.repo_id)
        stale = _stale_weights(head, self.files)
        found = self._find(head)
        if committed := found is None:
            found = self._upload_and_commit(head, message, stale)
        revision, seen = found
        if wrong := _differing(seen, self.files):
            raise OSError(
                f"{self.repo_id} at {seen.sha} differs from the folder in {', '.join(wrong)}: were they written to "
                "during the push? Run the same command again."
            )
        page = f"{self.api.endpoint}/{self.repo_id}"
        number = revision.removeprefix("refs/pr/") if self.create_pr and revision.startswith("refs/pr/") else None
        return {
            "revision": revision,
            "commit": seen.sha,
            "url": f"{page}/commit/{seen.sha}",
            "pull_request": f"{page}/discussions/{number}" if number else None,
            "committed": committed,
            "private": seen.private,
            "deleted": stale if committed else [],
        }

    def _upload_and_commit(self, head: Any, message: str, stale: list[str]) -> tuple[str, Any]:
        """Large files first, then one commit; where it stands, and what stands there."""
        operations: list[Any] = [CommitOperationAdd(name, file.path) for name, file in self.files.items()]
        how = {"revision": self.revision, "create_pr": self.create_pr}
        self._persist(
            lambda: self.api.preupload_lfs_files(self.repo_id, operations, free_memory=False, **how), attempts=_UPLOADS
        )
        operations += [CommitOperationDelete(name) for name in stale]
        how |= {"commit_message": message, "parent_commit": head.sha}
        tried = False

        def commit_once() -> tuple[str, Any]:
            nonlocal tried
            if tried and (found := self._find(self._info(self.revision))) is not None:
                return found  # its answer was lost
            tried = True
            try:
                made = self.api.create_commit(self.repo_id, operations, **how)
            except HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    raise _Conflict from None
                raise
            return made.pr_revision or self.revision, made.oid

        try:
            revision, commit = self._persist(commit_once)
        except (_Conflict, ConnectionError) as error:
            now = self._look(self.revision)
            if (found := self._find(now)) is not None:
                return found
            if isinstance(error, ConnectionError):
                raise
            raise OSError(
                f"{self.doing}: somebody else committed to {self.revision} meanwhile ({head.sha[:12]} became "
                f"{now.sha[:12]}). Nothing was changed. Look at their commit, then push again."
            ) from None
        return revision, commit if not isinstance(commit, str) else self._look(commit)

    def _find(self, head: Any) -> tuple[str, Any] | None:
        """Where all of it stands already: at the head, or in a pull request (of a run whose answer got lost)."""
        if self._is_complete(head):
            return self.revision, head
        if not self.create_pr:
            return None
        refs = self._persist(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True))
        names = sorted((ref.ref for ref in refs.pull_requests or []), key=lambda ref: -int(ref.rpartition("/")[2]))
        for name in names[:_PULL_REQUESTS]:
            if self._is_complete(seen := self._look(name)):
                return name, seen
        return None

    def _is_complete(self, seen: Any) -> bool:
        return not _stale_weights(seen, self.files) and not _differing(seen, self.files)

    def _info(self, revision: str) -> Any:
        return self.api.model_info(self.repo_id, revision=revision, files_metadata=True, timeout=self.stall_seconds)

    def _look(self, revision: str) -> Any:
        return self._persist(lambda: self._info(revision))

    def _persist(self, call: Callable[[], T], attempts: int = 0) -> T:
        return persist(call, self.doing, token=self.token, attempts=attempts, stall_seconds=self.stall_seconds)


class _Conflict(Exception):
    """The branch moved since it was looked at."""


class LocalFile:
    """A file that is pushed, hashed when first compared."""

    def __init__(self, path: Path):
        self.path = path

    def equals(self, remote: Any) -> bool:
        """Whether the Hub's metadata (SHA-256, or git id outside of LFS) describe this file."""
        return self.sha256 == remote.lfs.sha256 if remote.lfs else self.blob_id == remote.blob_id

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)

    @cached_property
    def blob_id(self) -> str:
        return git_blob_id(self.path.read_bytes())


def _differing(seen: Any, files: dict[str, LocalFile]) -> list[str]:
    """Names of files that the repository has not, or with another content."""
    remote = {file.rfilename: file for file in seen.siblings}
    return [name for name, file in files.items() if name not in remote or not file.equals(remote[name])]


def _stale_weights(seen: Any, files: dict[str, LocalFile]) -> list[str]:
    """Weights of an earlier push that these do not replace by name: together they would be no checkpoint."""
    names = [file.rfilename for file in seen.siblings]
    return sorted(name for name in names if is_weight_file(name) and name not in files)
