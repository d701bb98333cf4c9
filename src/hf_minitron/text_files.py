"""Text files on this machine: which ones a path, folder or glob names, of which split, their rows, their hashes."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

NUM_NAMED_FILES = 20  # in a lineage record; the others are counted and hashed

_SUFFIXES = {  # the builder in `datasets` -> suffixes
    "json": "json|jsonl|ndjson",
    "parquet": "parquet",
    "csv": "csv",
    "text": "txt|text|raw|md|rst|tex|c|cc|cpp|cs|cu|cuh|el|f90|go|h|hpp|hs|java|jl|js|jsx|kt|lisp|lua|ml|php|pl|py|pyi|"
    "r|rb|rs|scala|sh|sql|swift|ts|tsx",
}
_BUILDERS = {
    builder: re.compile(rf"\.({suffixes})(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
    for builder, suffixes in _SUFFIXES.items()
}
_NOT_DATA = re.compile(r"(readme|licen[sc]e|notice|(config|state|dataset_infos?|dataset_dict)\.json$)", re.IGNORECASE)
_SPLITS = {
    split: re.compile(rf"(^|[-._ /])({words})([-._ /\d]|$)")
    for split, words in {
        "train": "train|training",
        "validation": "validation|valid|dev|val",
        "test": "test|testing|eval|evaluation",
    }.items()
}


class TextFiles(NamedTuple):
    """Files of one kind: the builder of `datasets` that reads them, and the files of each split."""

    source: str | os.PathLike
    builder: str
    by_split: dict[str, list[Path]]

    def of_split(self, split: str) -> list[Path]:
        """The files that ``split`` draws on; it may be cut and summed as in `datasets`: "train[:1%]+test"."""
        parts = [part.split("[")[0].strip() for part in split.split("+")]
        if unknown := [part for part in parts if part not in self.by_split]:
            has = ", ".join(map(repr, self.by_split))
            raise ValueError(f"split={split!r}: {self.source} has no {unknown[0]!r}, only {has}. Use one of these.")
        return [path for part, paths in self.by_split.items() if part in parts for path in paths]


def find_text_files(source: str | os.PathLike) -> TextFiles | None:
    """The files that ``source`` names: a file, a folder or a glob; None if it can only be a Hub id.

    Raises FileNotFoundError for what looks like a path but is not there, ValueError for kinds of files that are mixed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return TextFiles(path, _builder_of(path) or "text", {"train": [path]})
    if path.is_dir():
        return _folder_files(path)
    is_glob = glob.has_magic(str(path))
    found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()] if is_glob else []
    if found:
        builder, paths = _one_kind({p: _builder_of(p) or "text" for p in found if _is_data(p.name)}, source)
        return TextFiles(path, builder, {"train": paths})
    looks_like_path = isinstance(source, os.PathLike) or str(source).startswith((".", "/", "~", "\\"))
    if looks_like_path or is_glob or _builder_of(path):
        raise FileNotFoundError(f"{source}: no such file, folder or match. A Hub data set is given as 'owner/name'.")
    return None


def load_text_files(files: TextFiles, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Rows of the files: a document a row for plain text, else as stored, with all columns.

    Raises ValueError for a split that is not there and for files that cannot be read, of which it names one.
    """
    paths = files.of_split(split)
    patterns = {part: [glob.escape(str(path.absolute())) for path in files.by_split[part]] for part in files.by_split}
    options = {"sample_by": "document"} if files.builder == "text" else {}
    if all(map(_is_blank, paths)):
        raise ValueError(f"{files.source} is empty: there is no text in it. Give a source with text.")
    try:
        return load_dataset(files.builder, data_files=patterns, split=split, streaming=streaming, **options)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UnicodeDecodeError) and files.builder == "text":
            raise ValueError(f"{_first_not_utf8(paths)} is not UTF-8 text: convert it or leave it out.") from error
        raise ValueError(f"{files.source} cannot be read as {files.builder}: {error.__cause__ or error}") from error


def describe_text_files(files: TextFiles, split: str, max_hashed_bytes: int | None = None) -> dict[str, Any]:
    """Names relative to the common folder, count, bytes and sha256 of the files of ``split``.

    The sha256 of one file is that of its content, of several that of the listing which ``sha256sum`` prints for them;
    it is left out for more than ``max_hashed_bytes``, whose reading would take long.
    """
    paths = [path.absolute() for path in files.of_split(split)]
    common = os.path.commonpath([path.parent for path in paths])
    named = sorted((path.relative_to(common).as_posix(), path) for path in paths)
    facts = {
        "kind": "files",
        "files": [name for name, _ in named[:NUM_NAMED_FILES]],
        "num_files": len(named),
        "num_bytes": sum(path.stat().st_size for path in paths),
    }
    if max_hashed_bytes is None or facts["num_bytes"] <= max_hashed_bytes:
        facts["sha256"] = _hash_files(named)
    return facts


def _hash_files(named: list[tuple[str, Path]]) -> str:
    hashes = {}
    for name, path in named:
        with path.open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    listing = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest() if len(hashes) > 1 else next(iter(hashes.values()))


def _folder_files(folder: Path) -> TextFiles:
    names = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    builders = {path: _builder_of(path) for path, name in names.items() if _is_data(name)}
    builder, paths = _one_kind({path: builder for path, builder in builders.items() if builder}, folder)
    by_split: dict[str, list[Path]] = {}
    for path in paths if builder != "text" else ():
        if split := _split_of(names[path]):
            by_split.setdefault(split, []).append(path)
    return TextFiles(folder, builder, by_split or {"train": paths})


def _split_of(name: str) -> str | None:
    """The split that a path names: its file name first, then its folders."""
    folders, _, file = name.lower().rpartition("/")
    return next((split for part in (file, folders) for split, words in _SPLITS.items() if words.search(part)), None)


def _builder_of(path: Path) -> str | None:
    return next((builder for builder, suffix in _BUILDERS.items() if suffix.search(path.name)), None)


def _is_data(name: str) -> bool:
    """Not hidden, not in a hidden or cache folder, not a README, a licence or the like; ``name`` is relative."""
    parts = name.split("/")
    return not any(part.startswith((".", "__pycache__")) for part in parts) and not _NOT_DATA.match(parts[-1])


def _one_kind(builders: dict[Path, str], source: str | os.PathLike) -> tuple[str, list[Path]]:
    kinds = sorted(set(builders.values()))
    if not kinds:
        raise ValueError(f"{source} has no text, JSON, Parquet or CSV files. Name the file itself if it is plain text.")
    if len(kinds) > 1:
        examples = [f"{kind} (such as {min(p.name for p, b in builders.items() if b == kind)})" for kind in kinds]
        raise ValueError(f"{source} mixes kinds of files: {', '.join(examples)}. Use a glob such as '*.jsonl'.")
    return kinds[0], sorted(builders)


def _is_blank(path: Path) -> bool:
    return path.stat().st_size < 1 << 20 and not path.read_bytes().strip()


def _first_not_utf8(paths: list[Path]) -> Path | None:
    for path in paths:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return path
    return None
