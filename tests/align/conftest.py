"""Tiny lessons, pairs and settings that the tests of alignment share."""

from __future__ import annotations

import json

import pytest
import torch

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "owls", "watch"]


def text_of(generator: torch.Generator, count: int) -> str:
    """So many words at random."""
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())


@pytest.fixture(scope="session")
def talks() -> list[dict]:
    """Twenty conversations of one or two turns, in `messages`; each fits 128 tokens of the plain template."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(20):
        turns = [(text_of(generator, 1 + i % 3), text_of(generator, 1 + i % 2)) for _ in range(1 + i % 2)]
        rows.append({"messages": [{"role": role, "content": content} for turn in turns
                                  for role, content in zip(("user", "assistant"), turn, strict=True)]})  # fmt: skip
    return rows


@pytest.fixture(scope="session")
def lessons() -> list[dict]:
    """Twenty prompts and completions as texts."""
    generator = torch.Generator().manual_seed(8)
    return [{"prompt": text_of(generator, 2 + i % 5), "completion": " " + text_of(generator, 1 + i % 4)}
            for i in range(20)]  # fmt: skip


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as a file of JSON lines and returns its path."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
