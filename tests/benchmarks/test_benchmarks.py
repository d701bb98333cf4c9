"""Every benchmark runs at a tiny size and gives finite figures. Times are not judged: machines differ."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "refit": "--steps 2 --eval-every 1 --rows-per-step 1 --calibration-rows 9 --eval-rows 1 --removed 66",
    "scoring": "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 4 "
    "--num-key-value-heads 2 --vocab-size 61 --rows 5 --tokens 16 --batch-size 2 --repeats 2",
    "kd_head": "--tokens 1024 --vocab 4096 --hidden-student 32 --hidden-teacher 48 --repeats 2 "
    "--check-tokens 16 --check-vocab 512",
}


def run(name: str, *words: str) -> str:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *TINY[name].split(), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(facts: Any) -> Iterator[float]:
    if isinstance(facts, int | float):
        yield facts
    for value in facts.values() if isinstance(facts, dict) else facts if isinstance(facts, list) else ():
        yield from numbers(value)


def test_every_benchmark_is_run_here():
    assert {path.stem for path in BENCHMARKS.glob("[!_]*.py")} == set(TINY)


def test_refit():
    facts = json.loads(run("refit", "--json"))
    assert [record["method"] for record in facts["found"]] == ["minitron", "refit"]
    for record in facts["found"]:
        assert record["removed"] == pytest.approx(0.66, abs=0.02)
        curves = record["curves"].values()
        assert all(len(curve) == 3 and curve[0] == [0, pytest.approx(record["pruned"], rel=1e-4)] for curve in curves)


def test_scoring():
    facts = json.loads(run("scoring", "--json"))
    found = list(numbers(facts))
    assert len(found) > 20 and all(map(math.isfinite, found))
    assert facts["largest_rank"] == 1
    # Two float64 vectors a site; a layer has neurons, attention channels, two norms and one cosine.
    assert facts["held_bytes"] == 2 * (64 + 32 + 2 * 32 + 1) * 2 * 8
    assert facts["ratio"]["wall"]["min"] <= facts["ratio"]["wall"]["median"] <= facts["ratio"]["wall"]["max"]
    assert facts["seconds"]["scoring"]["wall"] > 0


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.9, 1.1, "holds"), (1.0, 1.2, "undecided"), (1.11, 1.2, "does NOT hold")]
)
def test_scoring_judges_by_all_turns(monkeypatch, low, high, verdict):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scoring

    assert verdict in scoring.judge({"median": 1.05, "min": low, "max": high})


def test_kd_head():
    facts = json.loads(run("kd_head", "--json"))
    found = list(numbers(facts))
    assert len(found) > 30 and all(map(math.isfinite, found))
    assert set(facts["methods"]) == {"naive", "hf-minitron"} and not facts["missing"]
    naive, ours = facts["methods"]["naive"], facts["methods"]["hf-minitron"]
    logits = 1024 * 4096 * 4
    assert naive["peak_bytes"] > 3 * logits  # whole logits of both, and a gradient
    assert ours["peak_bytes"] < naive["peak_bytes"]
    for errors in (naive, ours):
        assert errors["loss_error"] < 1e-4
        assert errors["hidden_gradient_error"] < 1e-4 and errors["weight_gradient_error"] < 1e-4
    assert facts["gradient_bytes"] == (1024 + 4096) * 32 * 4


def test_kd_head_prints_a_table_and_names_methods_that_are_missing(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kd_head

    def load():
        import no_such_peer

        return no_such_peer.loss

    monkeypatch.setitem(kd_head.METHODS, "peer", load)
    monkeypatch.setattr(sys, "argv", ["kd_head.py", *TINY["kd_head"].split()])
    kd_head.main()
    printed = capsys.readouterr().out
    assert "| naive " in printed and "| hf-minitron " in printed and "| peer " not in printed
    assert "missing: peer (No module named 'no_such_peer')" in printed


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_opens_with_its_claim(name):
    assert (BENCHMARKS / f"{name}.py").read_text(encoding="utf-8").startswith('"""Claim: ')
