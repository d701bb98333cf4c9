"""`hf-minitron distill` on two processes: kill -9 in the middle, resume, and an ordinary checkpoint at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_minitron.adapters import LoraArguments
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.stage import distill_checkpoint

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)  # the first test of the file waits for all processes
FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[1] / "src"
ENGINES = {"ddp": ("MULTI_CPU", None), "fsdp2": ("FSDP", None)} | {f"zero{n}": ("DEEPSPEED", n) for n in (1, 2, 3)}
SETTINGS = {"max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 0, "seed": 3, "report_to": "none", "use_cpu": True}
SETTINGS |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
STATES = ["emb", "o"]  # intermediate losses of all but the adapters


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_llama_config, tiny_checkpoint):
    """A random, tied student in fp32, so that saving does not round what is compared."""
    folder = tmp_path_factory.mktemp("student") / "tied"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = tiny_llama_config.__class__.from_dict(tiny_llama_config.to_dict() | {"hidden_size": 16, "head_dim": 4})
    config.tie_word_embeddings, config.initializer_range = True, 0.3
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(student, tiny_checkpoint, tiny_text, held_out_text):
    paths = {"student_model": student, "teacher_model": tiny_checkpoint, "dataset": tiny_text}
    paths |= {"eval_dataset": held_out_text, "teacher_dtype": "float32"}  # auto is measured in every process anew
    return {name: str(path) for name, path in paths.items()} | {"max_length": 32}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, options):
    """The uninterrupted run of one process, with the two processes' rows in one batch."""
    folder = tmp_path_factory.mktemp("alone") / "student"
    settings = SETTINGS | {"per_device_train_batch_size": 4, "save_strategy": "no", "intermediate_losses": STATES}
    distill_checkpoint(DistillArguments(**options), DistillationConfig(output_dir=str(folder), **settings))
    return folder


@pytest.fixture(scope="module")
def alone_with_lora(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("alone") / "adapted"
    settings = SETTINGS | {"per_device_train_batch_size": 4, "save_strategy": "no"}
    lora = LoraArguments(lora_r=4, lora_target_modules=["q_proj", "down_proj"], use_dora=True)
    distill_checkpoint(DistillArguments(**options), DistillationConfig(output_dir=str(folder), **settings), lora)
    return folder


@pytest.fixture(scope="module")
def processes(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    words = [f"--{key}={value}" for key, value in (options | SETTINGS | {"per_device_train_batch_size": 2}).items()]
    command = [sys.executable, FOLDER / "two_processes.py", "stages", folder, *words]
    run = subprocess.run(command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def train_log(folder: Path) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry for entry in json.loads((folder / "distill_log.json").read_text()) if "loss" in entry}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_ends_like_one_that_was_not(processes, alone, engine):
    facts = json.loads((processes / f"{engine}-resumed.json").read_text())
    assert (facts["type"], facts["stage"]) == ENGINES[engine]
    expected, log = train_log(alone), train_log(processes / engine)
    assert log.keys() == expected.keys() == set(range(1, 7))
    for step, entry in expected.items():
        names = ("intermediate_o", "intermediate_emb", "intermediate_weight")
        for name in ("loss", "kl", "lm_loss", "grad_norm", "num_tokens_seen", *names):
            assert log[step][name] == pytest.approx(entry[name], rel=1e-5), (step, name)
    after = [
        json.loads((f / "minitron.json").read_text())["stages"][-1]["metrics"]["after"]
        for f in (alone, processes / engine)
    ]
    assert after[1] == pytest.approx(after[0], rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_saved_loads_in_plain_transformers(processes, alone, engine):
    expected = AutoModelForCausalLM.from_pretrained(alone)
    saved = [processes / engine, processes / engine / "checkpoint-6"]
    for folder in saved:
        model, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not problems["unexpected_keys"]  # such as a projection
        assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
        for (name, one), (_, other) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
            assert (one - other).norm() < 1e-4 * one.norm(), (folder, name)
    assert not list(processes.glob("*/.gathered.tmp"))


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_student_is_whole_and_exact_when_checkpoints_are_in_parts(processes, alone, engine):
    """Training in bf16: the weights come from the optimizer's fp32 copy, not from bf16 ones."""
    folder = processes / f"{engine}-parts"
    assert not list((folder / "checkpoint-6").glob("*.safetensors"))
    weights, reference = load_file(folder / "model.safetensors"), load_file(alone / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float()), name
        assert (value - reference[name]).norm() < 0.1 * reference[name].norm(), name


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_sharded_adapters_train_and_are_merged(processes, alone_with_lora, student, engine):
    """Under ZeRO-3 killed and resumed; what was not adapted is the source's, bit by bit."""
    facts = json.loads((processes / f"{engine}-lora.json").read_text())
    assert (facts["type"], facts["stage"]) == ENGINES[engine]
    expected, log = train_log(alone_with_lora), train_log(processes / f"{engine}-lora")
    assert [log[step]["loss"] for step in range(1, 7)] == pytest.approx(
        [expected[step]["loss"] for step in range(1, 7)], rel=1e-5
    )
    weights = load_file(processes / f"{engine}-lora" / "model.safetensors")
    reference, source = (load_file(f / "model.safetensors") for f in (alone_with_lora, student))
    assert weights.keys() == reference.keys() == source.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-4)
        assert torch.equal(value, source[name]) != name.endswith(("q_proj.weight", "down_proj.weight")), name
    assert AutoModelForCausalLM.from_pretrained(processes / f"{engine}-lora").dtype == torch.float32
