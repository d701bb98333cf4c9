"""Correction on two processes does what it does on one: before distillation under every engine, and in parallel."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_minitron.adapters import LoraArguments
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.correction import CorrectTeacherArguments, correct_teacher
from hf_minitron.distill.correction_trainer import TeacherCorrectionConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.parallel_correction import ParallelCorrection
from hf_minitron.distill.stage import distill_checkpoint

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)  # the first test of the file waits for all processes
FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[1] / "src"
SETTINGS = {"max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 0, "seed": 3, "report_to": "none", "use_cpu": True}
SETTINGS |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
TEACHING = {"teacher_learning_rate": 1e-3, "teacher_warmup_steps": 2}
CORRECTED = ["ddp-full", "zero3-full", "fsdp2-norm", "ddp-lora", "zero3-lora"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_checkpoint):
    """In fp32, so that saving does not round what is compared."""
    folder = tmp_path_factory.mktemp("teacher") / "fp32"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher, tiny_llama_config):
    """Another random model of the teacher's vocabulary."""
    folder = tmp_path_factory.mktemp("student") / "fp32"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = copy.deepcopy(tiny_llama_config)
    config.initializer_range = 0.3
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(teacher, tiny_text, held_out_text):
    paths = {"teacher_model": teacher, "dataset": tiny_text, "eval_dataset": held_out_text}
    return {name: str(path) for name, path in paths.items()} | {"teacher_dtype": "float32", "max_length": 32}


@pytest.fixture(scope="module")
def processes(tmp_path_factory, options, student):
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    words = [f"--{key}={value}" for key, value in (options | SETTINGS | {"per_device_train_batch_size": 2}).items()]
    words += ["--", f"--student-model={student}", *(f"--{key}={value}" for key, value in TEACHING.items())]
    command = [sys.executable, FOLDER / "two_processes.py", "corrections", folder, *words]
    run = subprocess.run(command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, options, student):
    """The uninterrupted runs of one process, with the two processes' rows in one batch."""
    folder = tmp_path_factory.mktemp("alone")
    settings = SETTINGS | {"per_device_train_batch_size": 4, "save_strategy": "no"}
    for method in ("full", "lora", "norm"):
        config = TeacherCorrectionConfig(output_dir=str(folder / method), method=method, **settings)
        lora = LoraArguments(lora_r=4) if method == "lora" else None
        correct_teacher(CorrectTeacherArguments(**options), config, lora)
    distill_checkpoint(
        DistillArguments(student_model=str(student), **options),
        DistillationConfig(output_dir=str(folder / "parallel"), **settings),
        correction=ParallelCorrection("full", corrected_teacher_dir=str(folder / "parallel-teacher"), **TEACHING),
    )
    return folder


def compare(folder: Path, expected: Path, log: str | None) -> None:
    weights, reference = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        assert (value - reference[name]).norm() < 1e-4 * reference[name].norm(), name
    if log is not None:
        losses = [
            {entry["step"]: entry["loss"] for entry in json.loads((each / log).read_text()) if "loss" in entry}
            for each in (folder, expected)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6
    metrics = [json.loads((each / "minitron.json").read_text())["stages"][-1]["metrics"] for each in (folder, expected)]
    assert (
        metrics[0]["after"] == pytest.approx(metrics[1]["after"], rel=1e-5)
        or {name: pytest.approx(values, rel=1e-5) for name, values in metrics[1]["after"].items()}
        == metrics[0]["after"]
    )


@pytest.mark.parametrize("name", CORRECTED)
def test_two_processes_correct_as_one_does(processes, alone, name):
    compare(processes / name, alone / name.partition("-")[2], "correction_log.json")


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_correct_in_parallel_as_one_does(processes, alone, teacher, engine):
    """Under DDP killed in its fifth step and resumed; student and teacher alike."""
    compare(processes / f"{engine}-parallel", alone / "parallel", "distill_log.json")
    compare(processes / f"{engine}-parallel-teacher", alone / "parallel-teacher", None)
    trained, before = (
        load_file(folder / "model.safetensors") for folder in (processes / f"{engine}-parallel-teacher", teacher)
    )
    assert all(not torch.equal(value, before[name]) for name, value in trained.items())


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_engines_that_shard_the_teacher_refuse_to_correct_it_in_parallel(processes, engine):
    log = (processes / f"{engine}-refused.log").read_text()
    assert "error: teacher_correction under ZeRO-3 or FSDP" in log and "Use DDP, ZeRO-1 or ZeRO-2" in log
