"""What of a checkpoint folder belongs on the Hub: an allow-list, and a look for secrets in what it lets through."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hf_minitron.source_cards import CARD
from hf_minitron.weight_files import COMPANIONS, WEIGHTS, WEIGHTS_INDEX, index_tensors

ALLOWED = (  # paths inside the folder; weights are added by what the index names
    "config.json",
    *COMPANIONS,
    "vocab.txt",
    "additional_chat_templates/*.jinja",
    CARD,
    "LICENSE*",
    "NOTICE*",
    "minitron.json",
    "[a-z]*_log.json",  # the losses of a training stage
    "plots/*.png",
    "plots/*.svg",
)
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors")
_PICTURES = (".png",)
_SECRETS = (  # what it is, how it begins (looked for first, as texts may be large), and how it looks
    ("a Hugging Face token", ("hf_", "api_org_"), r"\b(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9]{30,}"),
    ("an OpenAI or Anthropic key", ("sk-",), r"\bsk-(?:ant-|proj-|svcacct-)?[A-Za-z0-9]{4,}[A-Za-z0-9_-]{28,}"),
    (
        "a GitHub token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    ),
    ("a GitLab token", ("glpat-",), r"\bglpat-[\w-]{20,}"),
    ("an AWS key", ("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("a Google key", ("AIza",), r"\bAIza[\w-]{35}\b"),
    ("an NVIDIA key", ("nvapi-",), r"\bnvapi-[\w-]{40,}"),
    ("a Slack token", ("xox",), r"\bxox[abpr]-[\w-]{10,}"),
    ("a private key", ("PRIVATE KEY",), r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
)


@dataclass(frozen=True)
class Contents:
    """Paths inside the folder: those that go, with their size in bytes, and those that stay."""

    sizes: dict[str, int]
    left_out: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


def choose_files(folder: Path) -> Contents:
    """What of a whole checkpoint folder goes to the Hub.

    Optimizer states, ``checkpoint-*``, caches, logs, notebooks and whatever else is not named in ``ALLOWED`` stays.
    Raises FileNotFoundError or ValueError for a folder that is no whole checkpoint, and for metadata that is no JSON.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: only checkpoint folders are pushed.")
    weights = set(index_tensors(folder).values())
    weights |= {WEIGHTS_INDEX} if WEIGHTS not in weights else set()
    found = sorted(path.relative_to(folder).as_posix() for path in _walk(folder))
    chosen = [name for name in found if name in weights or any(_matches(name, pattern) for pattern in ALLOWED)]
    for name in chosen:
        if name.endswith(".json"):
            _check_json(folder / name)
    return Contents({name: (folder / name).stat().st_size for name in chosen}, sorted({*found} - {*chosen}))


def is_weight_file(name: str) -> bool:
    """Whether a path in a repository is that of weights, or of their index, as transformers names them."""
    return any(_matches(name, pattern) for pattern in WEIGHT_FILES)


def check_secrets(folder: Path, names: Iterable[str], known: Iterable[str] = ()) -> None:
    """ValueError when a text file holds what looks like an access token, or one of the ``known`` ones."""
    known = [secret for secret in known if secret]
    for name in names:
        if name.endswith((".safetensors", *_PICTURES)):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        kind, position = _find_secret(text, known)
        if kind is not None:
            line = text.count("\n", 0, position) + 1
            raise ValueError(
                f"{name}, line {line}, holds what looks like {kind}: nothing was sent. Remove it, and revoke it if "
                "others may have seen the file."
            )


def _find_secret(text: str, known: Iterable[str]) -> tuple[str | None, int]:
    """What a text holds that must not leave, and where it begins."""
    for kind, beginnings, pattern in _SECRETS:
        if any(beginning in text for beginning in beginnings) and (match := re.search(pattern, text)):
            return kind, match.start()
    found = [text.index(secret) for secret in known if secret in text]
    return ("your own access token", found[0]) if found else (None, -1)


def _walk(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Restore it, or remove it.") from None
