"""stats_memory: what the moments take is known before any work, kept to, and refused where it does not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.refit_memory import moment_bytes, stream_bytes
from hf_minitron.prune.target import PruneConfig

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
WIDTH_4B = LLAMA_8B | {"hidden_size": 3072, "intermediate_size": 9216}
MEASURE = """
import torch
from hf_minitron.prune.refit_choice import eliminate
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
torch.set_num_threads(1)
eliminate(torch.eye(300, dtype=torch.float64), torch.ones(8, 300), 200)  # libraries warm up
covariance = torch.eye(SIZE, dtype=torch.float64)
covariance[0, 1:] = covariance[1:, 0] = 1e-3
before = peak()
eliminate(covariance, torch.ones(8, SIZE), SIZE - 20)
print((peak() - before) / (8 * SIZE * SIZE))
"""


def test_an_8b_model_fits_the_default():
    needed = moment_bytes(WIDTH_4B, LLAMA_8B, 128)
    largest = max(needed, key=needed.get)
    assert largest == "the choice of neurons"
    assert 3 * 8 * 14336**2 < needed[largest] < 7e9
    assert stream_bytes(8.0, WIDTH_4B, LLAMA_8B, 128) == 8e9 - needed[largest]
    assert "the choice of heads" not in needed


def test_less_memory_than_the_moments_take_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"stats_memory=4 GB is less .* 6\.48 GB for the choice of neurons.*Use --stats-memory 6\.8"
    ):
        stream_bytes(4.0, WIDTH_4B, LLAMA_8B, 128)


def test_it_is_refused_before_the_walk(build_model, rows, monkeypatch):
    def walked(*arguments):
        raise AssertionError("the walk began")

    monkeypatch.setattr("hf_minitron.prune.refit._Refitter.run", walked)
    config = PruneConfig(hidden_size=12, method="refit", stats_memory=1e-6)
    with pytest.raises(ValueError, match="stats_memory=1e-06 GB is less"):
        PrunerForCausalLM(build_model("llama")).prune(config, rows.tolist(), progress=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_choosing_takes_two_more_matrices_than_it_is_given():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("SIZE", "2048")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert 1.5 < float(done.stdout) < 2.4
