"""What a model's own card says that whatever is made from it must carry on: license and language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language")
_METADATA = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def read_card_facts(folder: Path) -> dict[str, Any]:
    """License and language by the metadata of a folder's README.md; empty where there are none."""
    path = folder / CARD
    found = _METADATA.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: metadata[key] for key in _INHERITED if metadata.get(key)}
