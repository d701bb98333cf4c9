"""The quickstart's data: the source of the Python standard library, split by module name.

Every machine that can run the quickstart has this text, so nothing is downloaded and nothing is shipped. A module goes
to the held-out part when the hash of its dotted name says so: a module that is held out under Python 3.11 is held out
under every other version, although its text may differ there.

    python recipes/quickstart/stdlib_corpus.py --output-dir DIR    # writes train.jsonl, held_out.jsonl, tests.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PERCENT = 8
NOT_OURS = {"site-packages", "dist-packages"}
TABLES = {"encodings", "pydoc_data"}  # generated tables of code points and help topics, not code
TESTS = {"test", "tests", "idle_test"}  # left out by many distributions


def is_held_out(module: str) -> bool:
    """Whether a module, by its dotted name, belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def stdlib_modules(root: Path | None = None) -> Iterator[tuple[str, bool, str]]:
    """Yields (dotted name, is a test, source) in order of the name, for every readable UTF-8 module."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_OURS & set(parts) or parts[0] in TABLES or parts[-1].startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
        if source.strip():
            yield ".".join(parts), bool(TESTS & set(parts)), source


def write_corpus(output_dir: Path, root: Path | None = None) -> dict[str, Path]:
    """Writes one JSON line ``{"module", "text"}`` per module: ``train``, ``held_out`` (no tests in either), ``tests``.

    Tests of held-out modules stay out of ``tests`` only if their own name is held out as well.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "held_out": [], "tests": []}
    for module, is_test, source in stdlib_modules(root):
        line = json.dumps({"module": module, "text": source})
        if is_held_out(module):
            if not is_test:
                rows["held_out"].append(line)
        else:
            rows["tests" if is_test else "train"].append(line)
    paths = {}
    for part, lines in rows.items():
        paths[part] = output_dir / f"{part}.jsonl"
        paths[part].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the standard library's source as JSON lines.")
    parser.add_argument("--output-dir", type=Path, required=True)
    for part, path in write_corpus(parser.parse_args().output_dir).items():
        print(f"{part}: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
