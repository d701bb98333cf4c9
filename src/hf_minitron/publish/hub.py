"""``push_checkpoint``: a checkpoint folder with its card to the Hub, and nothing that must stay on the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id

from hf_minitron.hub_access import STALL_SECONDS, persist
from hf_minitron.lineage import read_lineage
from hf_minitron.publish.card import refresh_card
from hf_minitron.publish.commit import CommitPlan, LocalFile
from hf_minitron.publish.contents import check_secrets, choose_files
from hf_minitron.source_cards import CARD


@dataclass
class PushArguments:
    """What is pushed where."""

    folder: str = field(metadata={"help": "Checkpoint folder to push."})
    repo_id: str = field(metadata={"help": "NAME/MODEL on the Hub; made if it does not exist."})
    private: bool = field(
        default=True, metadata={"help": "Make a new repository private; one that exists stays as it is."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to, made if needed (default: main)."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit or pull request."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "License that the card states, instead of the source's. Needed where the source's forbids derived "
            "works: that you may publish is then your word."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Only list what would go; sends and writes nothing."})


@dataclass(frozen=True)
class PushResult:
    """What stands on the Hub now (or would: ``dry_run``). ``committed`` is False when all of it stood there already.

    ``files`` has bytes by path, ``left_out`` what stayed in the folder, ``deleted`` what was replaced by other weights;
    ``lineage`` is that of ``minitron.json``.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    left_out: list[str]
    lineage: list[dict[str, Any]]
    dry_run: bool = False
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None
    committed: bool = False
    private: bool | None = None
    deleted: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def push_folder(arguments: PushArguments) -> PushResult:
    """``push_checkpoint`` as the command line runs it; the token is that of ``hf auth login`` or HF_TOKEN."""
    options = asdict(arguments)
    return push_checkpoint(options.pop("folder"), options.pop("repo_id"), **options)


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    stall_seconds: float = STALL_SECONDS,
) -> PushResult:
    """Pushes what belongs of a checkpoint folder, with its card, as one commit, and compares checksums afterwards.

    The repository is made if needed; ``README.md`` is written from the lineage unless there is one by hand. A run that
    was killed is completed by the same call, which does nothing when all is there. Raises ValueError (contents,
    secrets, license), or one of the OSErrors of ``hub_access.persist``; the repository is then as it was before, or as
    complete as it was to be.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the checkpoint folder that is to be pushed.")
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"revision={revision!r} with create_pr: pull requests go to main. Leave one of them out.")
    if stall_seconds <= 0:
        raise ValueError(f"stall_seconds={stall_seconds} gives no time to answer. Use {STALL_SECONDS}, say.")
    card = refresh_card(folder, license=license, name=repo_id.split("/")[-1], write=not dry_run)
    contents = choose_files(folder)
    if card is not None:  # of a dry run it is not written
        contents.sizes[CARD] = len(card.encode())
    check_secrets(folder, [name for name in contents.sizes if (folder / name).is_file()], [token, get_token()])
    result = PushResult(
        repo_id=repo_id,
        revision=revision or constants.DEFAULT_REVISION,
        files=dict(sorted(contents.sizes.items())),
        left_out=contents.left_out,
        lineage=read_lineage(folder),
        dry_run=dry_run,
    )
    if dry_run:
        return result
    account = check_may_write(repo_id, token)
    repo_id = repo_id if "/" in repo_id else f"{account}/{repo_id}"
    files = {name: LocalFile(folder / name) for name in result.files}
    push = CommitPlan(repo_id, result.revision, create_pr, token, stall_seconds, files)
    push.prepare(private)
    made = push.publish(commit_message or f"Upload {folder.resolve().name} with hf-minitron")
    return replace(result, repo_id=repo_id, **made)


def check_may_write(repo_id: str, token: str | None = None) -> str:
    """The name of the token's account, after checking that it may write something at all.

    Called before long work that ends with a push. Raises PermissionError when there is no token, or only a reading one.
    """
    if token is None and get_token() is None:
        raise PermissionError(
            f"pushing to {repo_id} needs an access token and there is none. Run `hf auth login`, or set HF_TOKEN, with "
            f"a token that may write, from {constants.ENDPOINT}/settings/tokens."
        )
    account = persist(lambda: HfApi(token=token).whoami(), f"pushing to {repo_id}", token=token)
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"pushing to {repo_id}: the token of {account['name']} may only read. Make one with write permission at "
            f"{constants.ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    return account["name"]
