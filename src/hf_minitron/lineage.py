"""``minitron.json``: how a checkpoint was made, one record per stage, carried along from folder to folder.

A stage reads the lineage of the folder it starts from, appends its own record and writes the whole into its output
folder. Cards, recipes and resumption read nothing else. A fact that is unknown is left out, never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

LINEAGE_FILE = "minitron.json"
FORMAT_VERSION = 1
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_(?:jwt_)?|api_org_|sk-)(?=[\w-]*\d)[A-Za-z0-9-]{20,}")  # hf_minitron is none


@dataclass
class Stage:
    """One step of the pipeline, as facts; made when the step starts, written when it ends.

    ``inputs`` name the models that went in (role → id and commit, or folder name and content hash); ``data`` the text
    (source, fingerprint); ``tokens`` how many were read; ``files`` what lies beside the lineage (name → meaning).
    """

    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    tokens: int | None = None
    metrics: dict[str, Any] | None = None
    files: dict[str, str] | None = None
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    hardware: dict[str, Any] = field(default_factory=lambda: _hardware())

    def __post_init__(self) -> None:
        self._clock = time.monotonic()
        self.settings = settings_dict(self.settings)

    def as_dict(self) -> dict[str, Any]:
        """What is known, ready for JSON, with the seconds since the record was made; no unknown facts, no secrets."""
        facts = dataclasses.asdict(self) | {"seconds": round(time.monotonic() - self._clock, 3)}
        return {key: value for key, value in publishable(facts).items() if value != {}}


def read_lineage(folder: str | Path | None) -> list[dict[str, Any]]:
    """The stages recorded in a folder, oldest first; none when it has no lineage (an original model)."""
    path = Path(folder) / LINEAGE_FILE if folder is not None else None
    if path is None or not path.is_file():
        return []
    try:
        lineage = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). Restore it, or remove it to start a new lineage."
        ) from None
    format_version = lineage.get("format_version") if isinstance(lineage, dict) else None
    if format_version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has {format_version=}: this hf-minitron reads {FORMAT_VERSION}. "
            f"Use the version of hf-minitron that wrote it."
        )
    if not isinstance(lineage.get("stages"), list):
        raise ValueError(f"{path} has no list of stages. Restore it, or remove it to start a new lineage.")
    return lineage["stages"]


def write_lineage(folder: str | Path, stages: list[dict[str, Any]]) -> Path:
    """Writes ``minitron.json`` in one step; a reader never sees half a file."""
    path = Path(folder) / LINEAGE_FILE
    temporary = path.with_suffix(".tmp")
    text = json.dumps({"format_version": FORMAT_VERSION, "stages": stages}, indent=2, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def append_stage(stage: Stage, output_dir: str | Path, source_dir: str | Path | None = None) -> Path:
    """Adds a stage to what ``source_dir`` records and writes it to ``output_dir``."""
    return write_lineage(output_dir, [*read_lineage(source_dir), stage.as_dict()])


def settings_dict(settings: Any) -> dict[str, Any]:
    """A dataclass (or mapping) of settings as plain JSON values, without those left at None."""
    if settings is None:
        return {}
    values = (
        settings
        if isinstance(settings, dict)
        else {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    )
    return publishable(values)


def publishable(value: Any) -> Any:
    """The same structure as plain JSON values, without what is unknown (None, NaN) and without secrets.

    Entries named like a secret are left out, and strings that look like an access token are masked.
    """
    if isinstance(value, Enum):
        return publishable(value.value)
    if isinstance(value, dict):
        kept = {str(key): publishable(item) for key, item in value.items() if not _SECRET_KEY.search(str(key))}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list | tuple | set):
        return [publishable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) or value is None:
        return value
    return _SECRET_VALUE.sub(r"\1***", str(value))


def _versions() -> dict[str, str]:  # imported late: their module needs torch, which reading a lineage does not
    from hf_minitron.hardware import versions

    return versions()


def _hardware() -> dict[str, Any]:
    from hf_minitron.hardware import describe_hardware

    return describe_hardware()
