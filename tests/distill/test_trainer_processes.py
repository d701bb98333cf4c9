"""Two processes (gloo) compute what one computes: gradient, train log and evaluation."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distillation_run.py")
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """4 rows a process in 2 accumulated batches of 2, that is the 8 rows."""
    output = tmp_path_factory.mktemp("processes") / "results.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, output, "2", "2"]
    run = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def one_process():
    one_step = runpy.run_path(str(SCRIPT))["one_step"]
    results = {head: one_step(head == "tied", rows_per_device=8, accumulation=1) for head in ("tied", "untied")}
    return results | {"cached": results["untied"]}  # whoever learns from a cache learns what the live teacher teaches


@pytest.mark.parametrize("head", ["tied", "untied", "cached"])
def test_gradient_of_two_processes(one_process, two_processes, head):
    one, two = one_process[head], two_processes[head]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["gradient"].keys() == two["gradient"].keys()
    for name, values in one["gradient"].items():
        reference = torch.tensor(values)
        assert reference.norm() > 0
        assert (torch.tensor(two["gradient"][name]) - reference).norm() < 1e-5 * reference.norm(), name


@pytest.mark.parametrize("head", ["tied", "untied", "cached"])
@pytest.mark.parametrize("source", ["log", "metrics"])
def test_log_and_metrics_of_two_processes(one_process, two_processes, head, source):
    """The 7 rows of the evaluation do not divide by 2 processes of 2 rows: accelerate repeats one."""
    timings = ("runtime", "per_second", "preparation_time")
    one, two = one_process[head][source], two_processes[head][source]
    names = {name for name in one if not name.endswith(timings)}
    assert names == {name for name in two if not name.endswith(timings)}
    assert {"log": "num_tokens_seen", "metrics": "eval_top1_agreement"}[source] in names
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
