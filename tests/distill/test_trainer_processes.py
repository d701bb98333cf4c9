"""Two processes (gloo) compute what one computes under DDP, ZeRO-1, 2, 3 and FSDP2: gradient, train log, evaluation.

The evaluation comes first, as in the stage, and must not change the training that follows.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)  # the first test of the file waits for all processes
FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[1] / "src"
# The engine's name in accelerate, and how the student's and the teacher's parameters lie in a process.
ENGINES = {
    "ddp": ("MULTI_CPU", "whole", "whole"),
    "zero1": ("DEEPSPEED", "whole", "whole"),
    "zero2": ("DEEPSPEED", "whole", "whole"),
    "zero3": ("DEEPSPEED", "ds_id", "ds_id"),
    "fsdp2": ("FSDP", "DTensor", "DTensor"),
}
CASES = [(engine, f"{head}-{count}") for engine in ENGINES for head in ("tied", "untied") for count in (1, 4)]
CASES += [("ddp", "cached-4"), *((engine, "states-4") for engine in ENGINES)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """4 rows a process, in one batch or in four that are accumulated."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, FOLDER / "two_processes.py", "steps", folder]
    run = subprocess.run(command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {engine: json.loads((folder / f"{engine}.json").read_text()) for engine in ENGINES}


@pytest.fixture(scope="module")
def one_process():
    helpers = runpy.run_path(str(FOLDER / "distillation_run.py"))
    one_step = helpers["one_step"]
    results = {head: one_step(head == "tied", rows_per_device=8, accumulation=1) for head in ("tied", "untied")}
    results["states"] = one_step(False, rows_per_device=8, accumulation=1, **helpers["WITH_STATES"])
    return results | {"cached": results["untied"]}  # whoever learns from a cache learns what the live teacher teaches


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_gradient_of_two_processes(one_process, two_processes, engine, case):
    one, two = one_process[case.split("-")[0]], two_processes[engine][case]
    assert (one["processes"], two["processes"]) == (1, 2)
    kind, student, teacher = ENGINES[engine]
    teacher = "cached" if case == "cached-4" else teacher
    assert (two["type"], two["sharding"]["student"], two["sharding"]["teacher"]) == (kind, student, teacher)
    assert one["gradient"].keys() == two["gradient"].keys()
    for name, values in one["gradient"].items():
        reference = torch.tensor(values)
        assert reference.norm() > 0
        assert (torch.tensor(two["gradient"][name]) - reference).norm() < 1e-5 * reference.norm(), name


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_log_and_metrics_of_two_processes(one_process, two_processes, engine, case):
    """The 7 rows of the evaluation do not divide by 2 processes of 2 rows: accelerate repeats one."""
    for source, known in (("log", "num_tokens_seen"), ("metrics", "eval_top1_agreement")):
        one, two = one_process[case.split("-")[0]][source], two_processes[engine][case][source]
        names = {name for name in one if not name.endswith(("runtime", "per_second", "preparation_time"))}
        assert names <= two.keys() and known in names
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
