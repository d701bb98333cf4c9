"""The stage ``cache-teacher``, and ``distill`` from what it wrote: processes, kills, lineage, the command line."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_minitron import cli
from hf_minitron.distill.cache_stage import CacheTeacherArguments, cache_teacher
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.stage import distill_checkpoint
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig

SCRIPT = Path(__file__).with_name("caching_run.py")
SOURCE = Path(__file__).parents[2] / "src"
cache_both = runpy.run_path(str(SCRIPT))["cache_both"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("pruned") / "half"
    pruner = PrunerForCausalLM.from_pretrained(tiny_checkpoint)
    pruner.prune(PruneConfig(hidden_size=16, intermediate_size=32, method="random"))
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, tiny_checkpoint, tiny_text, held_out_text):
    folder = tmp_path_factory.mktemp("caches") / "exact"
    cache_teacher(arguments_for(tiny_checkpoint, tiny_text, held_out_text, folder))
    return folder


def arguments_for(teacher, text, held_out, folder, **changes):
    given = {"teacher_model": teacher, "dataset": text, "eval_dataset": held_out, "output_dir": folder}
    given = {name: str(path) for name, path in given.items()} | {"max_length": 32, "max_shard_bytes": 100_000}
    return CacheTeacherArguments(**(given | {"dtype": "float32", "teacher_dtype": "float32"} | changes))


def distill(student, text, held_out, output, changes=None, **settings):
    given = {"student_model": str(student), "dataset": str(text), "eval_dataset": str(held_out)}
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "use_cpu": True, "seed": 3}
    defaults |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    config = DistillationConfig(output_dir=str(output), **(defaults | settings))
    return distill_checkpoint(DistillArguments(**(given | (changes or {}))), config)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(launcher: list[str], *words: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_checkpoint, tiny_text):
    """Both kinds of cache by one process; by two; and by one that was killed in the middle, and started again."""
    root = tmp_path_factory.mktemp("written")
    words = str(tiny_checkpoint), str(tiny_text)
    killed = start([], *words, root / "killed", 0.3)
    two = start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], *words, root / "two")
    deadline = time.monotonic() + 120
    while len(list(root.glob("killed/topk/rows-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = {path: path.stat().st_mtime_ns for path in sorted(root.glob("killed/topk/rows-*.safetensors"))}
    assert len(kept) >= 2 and not (root / "killed" / "topk" / "manifest.json").exists()
    for name in ("one", "killed"):
        cache_both(*words, str(root / name))
    output, _ = two.communicate(timeout=120)
    assert two.returncode == 0, output[-5000:]
    return root, kept


@pytest.mark.parametrize("kind", ["exact", "topk"])
def test_two_processes_write_what_one_writes(written, kind):
    root, _ = written
    expected = content(root / "one" / kind)
    assert sum(name.startswith("rows-") for name in expected) >= 5
    assert content(root / "two" / kind) == expected
    CachedTeacher.open(root / "two" / kind).verify()


def test_a_killed_run_goes_on_and_writes_what_an_uninterrupted_one_writes(written):
    root, kept = written
    assert content(root / "killed" / "topk") == content(root / "one" / "topk")
    finished = list(kept)[:2]
    assert [path.stat().st_mtime_ns for path in finished] == [kept[path] for path in finished]


def test_training_from_a_cache_needs_no_teacher_and_gives_its_student(
    tmp_path, pruned, tiny_checkpoint, tiny_text, held_out_text, cache_folder
):
    """The live run draws its rows with the cache's seed, and as many, so that both train on the same."""
    everything = json.loads((cache_folder / "manifest.json").read_text())["data"]["train"]["num_rows"]
    live = {"teacher_model": str(tiny_checkpoint), "teacher_dtype": "float32", "max_length": 32}
    cached = {"teacher_cache": str(cache_folder)}
    settings = {"data_seed": 42, "max_steps": -1, "num_train_epochs": 1}
    runs = [
        distill(pruned, tiny_text, held_out_text, tmp_path / "live", live, **settings),
        distill(pruned, tiny_text, held_out_text, tmp_path / "cached", cached, **settings),
    ]
    for name in ("kl", "lm_loss", "teacher_lm_loss", "top1_agreement", "num_tokens"):
        assert runs[1].metrics[name] == pytest.approx(runs[0].metrics[name], rel=1e-4), name
    assert runs[1].num_tokens == runs[0].num_tokens == 31 * everything
    losses = [[entry["loss"] for entry in run.log_history if "loss" in entry] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [
        load_file(tmp_path / name / "model.safetensors")["lm_head.weight"].float() for name in ("live", "cached")
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-2, atol=1e-3)

    record = json.loads((tmp_path / "cached" / "minitron.json").read_text())["stages"][-1]
    teacher, manifest = record["inputs"]["teacher"], cache_folder / "manifest.json"
    assert teacher["cache"]["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert teacher["cache"]["path"] == "exact" and teacher["cache"]["kind"] == "exact"
    of_live = json.loads((tmp_path / "live" / "minitron.json").read_text())["stages"][-1]["inputs"]["teacher"]
    assert teacher["sha256"] == of_live["sha256"] and teacher["dtype"] == "float32" and "cache" not in of_live
    assert "teacher_cache" not in record["settings"] and str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("changes", [{"max_steps": 2}, {"seed": 9}, {"per_device_train_batch_size": 3}])
def test_parts_of_the_cached_rows_are_found_whatever_seed_and_batch(
    tmp_path, pruned, tiny_text, held_out_text, cache_folder, changes
):
    """Packed rows depend on the order of documents, so the cache's own draw is made again."""
    arguments = {"teacher_cache": str(cache_folder), "max_train_rows": 9, "max_eval_rows": 5}
    report = distill(pruned, tiny_text, held_out_text, tmp_path / "student", arguments, **changes)
    assert report.metrics["num_tokens"] == 5 * 31
    facts = json.loads((tmp_path / "student" / "minitron.json").read_text())["stages"][-1]["data"]
    assert facts["max_length"] == 32  # the cache's


def test_runs_that_the_cache_does_not_fit_are_refused(tmp_path, pruned, tiny_text, held_out_text, cache_folder):
    def refuse(message, text=tiny_text, held_out=held_out_text, student=pruned, **arguments):
        arguments = {"teacher_cache": str(cache_folder)} | arguments
        with pytest.raises(ValueError, match=message):
            distill(student, text, held_out, tmp_path / "student", arguments)

    refuse(r"max_length=16, but the rows of the cache .* have 32 tokens \(packing wrapped\)", max_length=16)
    refuse("the student learns from one of the two", teacher_model="teacher")
    refuse("the student learns from one of the two", teacher_cache=None)
    refuse(r"11 of 12 rows of train_dataset are not in the cache", text=held_out_text, held_out=tiny_text)
    other = tmp_path / "other"
    shutil.copytree(pruned, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(AutoTokenizer.from_pretrained(other)) == 300
    refuse("was made with another tokenizer", student=other)
    assert not (tmp_path / "student" / "minitron.json").exists()


def test_the_command_line_caches_and_distils(tmp_path, capsys, pruned, tiny_checkpoint, tiny_text, held_out_text):
    cache, student = tmp_path / "cache", tmp_path / "student"
    words = ["cache-teacher", tiny_checkpoint, "--dataset", tiny_text, "--eval-dataset", held_out_text]
    words += ["--output-dir", cache, "--kind", "topk", "--top-k", 8, "--max-length", 32, "--max-train-rows", 20]
    assert cli.main([*map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "of which 52 a token" in printed and f"--teacher-cache {cache}" in printed
    assert cli.main([*map(str, words), "--json"]) == 0  # it is there already
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "topk" and report["num_tokens"] == 32 * report["num_rows"]
    assert report["bytes_per_token"] == 8 * 6 + 4 <= report["num_bytes"] / report["num_tokens"]
    words = ["distill", pruned, "--teacher-cache", cache, "--dataset", tiny_text, "--output-dir", student]
    words += ["--eval-dataset", held_out_text, "--max-steps", 2, "--per-device-train-batch-size", 4, "--report-to"]
    words += ["none", "--save-strategy", "no", "--use-cpu", "true"]
    assert cli.main([*map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "| kl " in printed and "teacher_lm_loss" not in printed
    stage = json.loads((student / "minitron.json").read_text())["stages"][-1]
    assert stage["inputs"]["teacher"]["cache"]["top_k"] == 8 and "teacher_lm_loss" not in stage["metrics"]["after"]
    assert cli.main([*map(str, words), "--overwrite", "--temperature", "2.0"]) == 2
    assert "temperature=2.0 needs the teacher's whole distribution" in capsys.readouterr().err
    assert (
        cli.main(["cache-teacher", str(tiny_checkpoint), "--dataset", str(tiny_text), "--output-dir", str(cache)]) == 2
    )
    assert "holds a cache that differs in" in capsys.readouterr().err
