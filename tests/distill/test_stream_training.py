"""Distilling on a stream: exact resumption, alone, with workers and on two processes; streams that end; refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron.data import pack_rows
from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, write_cache
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.stage import distill_checkpoint
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.mixes import MixSource, open_mix

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[1] / "src"
SETTINGS = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3}
SETTINGS |= {"warmup_steps": 0, "seed": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
SETTINGS |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "ce_weight": 1.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def mix(tmp_path_factory, tiny_text, held_out_text):
    file = tmp_path_factory.mktemp("mix") / "mix.yaml"
    file.write_text(f"- {{source: {tiny_text}, weight: 0.75}}\n- {{source: {held_out_text}, weight: 0.25}}\n")
    return file


@pytest.fixture(scope="module")
def options(tiny_checkpoint, mix):
    paths = {"student_model": tiny_checkpoint, "teacher_model": tiny_checkpoint, "dataset_mix": mix}
    return {k: str(v) for k, v in paths.items()} | {"max_length": 32, "shuffle_buffer": 16, "teacher_dtype": "float32"}


def settings(folder, **changes):
    return DistillationConfig(output_dir=str(folder), **(SETTINGS | changes))


def two_models(folder):
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]


def record(folder):
    return json.loads((folder / "minitron.json").read_text())["stages"][-1]


def train_log(folder):
    log = [entry for entry in json.loads((folder / "distill_log.json").read_text()) if "loss" in entry]
    return [(entry["step"], entry["loss"], entry["epoch"], entry["num_tokens_seen"]) for entry in log]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(tmp_path, options, workers):
    arguments, how = DistillArguments(**options), {"dataloader_num_workers": workers}
    distill_checkpoint(arguments, settings(tmp_path / "run", **how))
    whole, log = record(tmp_path / "run"), train_log(tmp_path / "run")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    for step in (4,) if workers else (2, 4):
        again = settings(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"), **how)
        distill_checkpoint(arguments, again)
        assert record(tmp_path / "run")["data"] == whole["data"] and train_log(tmp_path / "run") == log
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    train = whole["data"]["train"]
    assert train["num_rows"] == 6 * 4 and train["num_readers"] == max(1, workers)
    tokens = [source["num_tokens"] for source in train["sources"]]
    assert sum(tokens) == 6 * 4 * 32 and abs(tokens[0] - 0.75 * sum(tokens)) < 60 * max(1, workers)
    assert [entry[2] for entry in log] == pytest.approx([step / 6 for step in range(1, 7)])


def test_a_finished_run_can_be_resumed_without_training_on(tmp_path, options):
    distill_checkpoint(DistillArguments(**options), settings(tmp_path / "run", max_steps=2))
    before = record(tmp_path / "run")
    again = distill_checkpoint(
        DistillArguments(**options), settings(tmp_path / "run", max_steps=2, resume_from_checkpoint="true")
    )
    assert again.num_tokens == before["tokens"] and record(tmp_path / "run")["data"] == before["data"]


def test_one_source_streamed_trains_on_the_rows_that_would_be_packed(tmp_path, tiny_checkpoint, tiny_text):
    """And a run may be resumed with another batch size, as rows are counted, not batches."""
    seen = {}

    def trainer(name, rows, **changes):
        trainer = DistillationTrainer(*two_models(tiny_checkpoint), settings(tmp_path / name, **changes), rows)
        step, seen[name] = trainer.training_step, []
        trainer.training_step = lambda model, inputs, *args: (
            seen[name].extend(inputs["input_ids"].tolist()) or step(model, inputs, *args)
        )
        return trainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    stream = open_mix([MixSource(str(tiny_text))], tokenizer, 32, shuffle_buffer=0)
    trainer("whole", stream).train()
    texts = [json.loads(line)["text"] for line in tiny_text.read_text().splitlines()]
    assert seen["whole"] == pack_rows(texts, tokenizer, 32, max_rows=24)["input_ids"][:]
    trainer("part", stream, max_steps=4).train()
    trainer("rest", stream, per_device_train_batch_size=4, gradient_accumulation_steps=1).train(
        resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4")
    )
    assert seen["part"] + seen["rest"] == seen["whole"]


def test_a_stream_that_ends_stops_the_run_after_its_last_whole_step(tmp_path, options):
    arguments = DistillArguments(**options, dataset_epochs=1, stopping="all")
    report = distill_checkpoint(arguments, settings(tmp_path / "run", max_steps=1000, save_strategy="no"))
    train, steps = record(tmp_path / "run")["data"]["train"], len(train_log(tmp_path / "run"))
    assert 10 < steps < 1000 and report.num_tokens == steps * 4 * 31
    assert train["num_rows"] == steps * 4 and (train["epochs"], train["stopping"]) == (1, "all")


def test_a_checkpoint_of_another_stream_is_refused_with_the_difference(tmp_path, options, tiny_text):
    def go_on(step, arguments=None, **changes):
        where = str(tmp_path / "run" / f"checkpoint-{step}")
        distill_checkpoint(DistillArguments(**(options | (arguments or {}))),
                           settings(tmp_path / "run", resume_from_checkpoint=where, **changes))  # fmt: skip

    distill_checkpoint(DistillArguments(**options), settings(tmp_path / "run", max_steps=2))
    with pytest.raises(ValueError, match="checkpoint-2 was written with stream shuffle_buffer 16, now it is 8"):
        go_on(2, {"shuffle_buffer": 8})
    with pytest.raises(ValueError, match="readers workers in each 1, now it is 2"):
        go_on(2, dataloader_num_workers=2)
    other = tmp_path / "mix.json"
    entries = [{"source": str(tiny_text), "weight": 3}, {"source": options["dataset_mix"], "text_column": "text"}]
    other.write_text(json.dumps(entries[:1]))
    with pytest.raises(ValueError, match="checkpoint-2 was written with stream sources"):
        go_on(2, {"dataset_mix": str(other)})
    (tmp_path / "run" / "checkpoint-2" / "stream_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2 has no stream_state.json"):
        go_on(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "x"}, "training reads one of the two"),
        ({"dataset_mix": None}, "dataset=None, dataset_mix=None"),
        ({"max_steps": -1}, "max_steps=-1: a stream has no length"),
        ({"max_train_rows": 5}, "max_train_rows=5 with a stream"),
        ({"stopping": "all"}, "stopping=all says"),
        ({"dataset_split": "test"}, "dataset_split=test is for --dataset"),
        ({"text_column": "body"}, "text_column=body is for --dataset"),
        (
            {"dataset_mix": None, "dataset": "x", "dataset_epochs": 2},
            "dataset_epochs=2, stopping=first are for streams",
        ),
        ({"eval_dataset": "HELD_OUT"}, "held-out text must not be trained on"),
    ],
)
def test_options_that_do_not_fit_a_stream(tmp_path, options, held_out_text, changes, message):
    changes = {k: str(held_out_text) if v == "HELD_OUT" else v for k, v in changes.items()}
    config = settings(tmp_path / "run", max_steps=changes.pop("max_steps", 6))
    with pytest.raises(ValueError, match=message):
        distill_checkpoint(DistillArguments(**(options | changes)), config)
    assert not (tmp_path / "run").exists()


def test_what_the_trainer_refuses(tmp_path, tiny_checkpoint, tiny_text):
    models = two_models(tiny_checkpoint)
    stream = open_mix([MixSource(str(tiny_text))], AutoTokenizer.from_pretrained(tiny_checkpoint), 32)
    with pytest.raises(ValueError, match="max_steps"):
        DistillationTrainer(*models, settings(tmp_path, max_steps=-1), train_dataset=stream)
    config = settings(tmp_path, accelerator_config={"split_batches": True})
    with pytest.raises(ValueError, match="split_batches has one process read for several"):
        DistillationTrainer(*models, config, train_dataset=stream).train()
    with pytest.raises(ValueError, match="a stream without end"):
        DistillationTrainer(*models, settings(tmp_path), eval_dataset=stream).evaluate()


def test_a_cached_teacher_serves_the_rows_it_holds_and_names_a_missing_one(tmp_path, tiny_checkpoint, tiny_text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    stream = open_mix([MixSource(str(tiny_text))], tokenizer, 32, shuffle_buffer=8)
    reader = stream.read()
    rows = [{"input_ids": next(reader)["input_ids"].tolist()} for _ in range(16)]
    cached = write_cache(model, rows, tmp_path / "cache", CacheFormat("exact", dtype=torch.float32), TeacherFacts({}))
    trainer = DistillationTrainer(model, cached, settings(tmp_path / "run"), train_dataset=stream)
    with pytest.raises(ValueError, match=r"lacks 2 of 2 rows of a batch.* those of a stream are only looked up"):
        trainer.train()
    assert trainer.state.global_step == 4  # of 4 rows each


@pytest.fixture(scope="module")
def processes(tmp_path_factory, options):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    words = [f"--{key}={value}" for key, value in (options | SETTINGS).items()]
    command = [sys.executable, FOLDER / "two_processes.py", "streams", folder, *words]
    run = subprocess.run(command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def test_two_processes_that_are_killed_end_as_if_they_had_not_been(processes):
    whole, killed = record(processes / "whole"), record(processes / "killed")
    assert whole["data"] == killed["data"] and train_log(processes / "killed") == train_log(processes / "whole")
    one, other = (load_file(processes / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    train = whole["data"]["train"]
    assert (train["num_readers"], train["num_rows"]) == (2, 6 * 8)
    saved = json.loads((processes / "whole" / "checkpoint-2" / "stream_state.json").read_text())
    assert saved["readers"][0]["fingerprint"] != saved["readers"][1]["fingerprint"]


def test_two_processes_stop_together_when_the_stream_of_one_ends(processes):
    steps = len(train_log(processes / "ended"))
    train = record(processes / "ended")["data"]["train"]
    assert 3 < steps < 60 and train["num_rows"] == steps * 8 and train["num_readers"] == 2
    assert all(source["epochs_begun"] == 1 for source in train["sources"])
