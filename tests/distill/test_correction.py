"""Teacher correction: what is trained, the loss, adapters, the guard, resumption, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import math
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_minitron import cli
from hf_minitron.adapters import LoraArguments
from hf_minitron.architectures import FAMILIES
from hf_minitron.distill.correction import CorrectTeacherArguments, correct_teacher, judge
from hf_minitron.distill.correction_trainer import CorrectionTrainer, TeacherCorrectionConfig
from hf_minitron.distill.trained_weights import choose_trained, norm_parameters

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama, uneven_rows = helpers["tiny_llama"], helpers["uneven_rows"]
families = runpy.run_path(str(Path(__file__).parents[1] / "prune" / "conftest.py"))


def settings(folder: Path, **changes) -> TeacherCorrectionConfig:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 0, "seed": 3}
    defaults |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    return TeacherCorrectionConfig(output_dir=str(folder), **(defaults | changes))


@pytest.fixture
def arguments(tiny_checkpoint, tiny_text, held_out_text):
    def build(**changes) -> CorrectTeacherArguments:
        options = {"teacher_model": tiny_checkpoint, "dataset": tiny_text, "max_length": 32}
        options |= {"eval_dataset": held_out_text} | changes
        return CorrectTeacherArguments(**{k: str(v) if hasattr(v, "parts") else v for k, v in options.items()})

    return build


def losses(report) -> list[float]:
    return [entry["loss"] for entry in report.log_history if "loss" in entry]


# --- what is trained


@pytest.mark.parametrize("method", ["full", "lora", "norm"])
def test_exactly_its_own_weights_change(tmp_path, arguments, tiny_checkpoint, method):
    report = correct_teacher(arguments(), settings(tmp_path / method, method=method))
    assert report.after["held_out"]["lm_loss"] < report.before["held_out"]["lm_loss"]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / method))
    assert before.keys() == after.keys()
    wanted = {"full": lambda name: True, "lora": lambda name: "_proj" in name, "norm": lambda name: "norm" in name}
    for name, value in after.items():
        assert value.dtype == before[name].dtype == torch.bfloat16
        assert torch.equal(value, before[name]) != wanted[method](name), name
    trained = [value.numel() for name, value in before.items() if wanted[method](name)]
    assert method == "lora" or report.num_trained == sum(trained)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norm_parameters_are_all_that_the_table_calls_norms(family):
    config = CONFIG_MAPPING[family](**families["TINY"] | families["PECULIAR"].get(family, {}))
    model = AutoModelForCausalLM.from_config(config)
    found = set(norm_parameters(model))
    expected = {name for name, _ in model.named_parameters() if "norm" in name}
    assert found == expected and len(found) > 4
    assert all(model.get_parameter(name).dim() == 1 for name in found)


def test_a_merged_teacher_says_what_the_adapted_one_says(tmp_path):
    model = tiny_llama(16, seed=1)
    adapted = choose_trained(model, "lora", LoraArguments(lora_r=4, use_dora=True), seed=0)
    config = settings(tmp_path, method="lora")
    CorrectionTrainer(adapted, config, uneven_rows(16)).train()
    ids = torch.arange(20)[None]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 1e-2
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-5)


def test_the_loss_and_its_gradient_are_those_of_whole_logits(tmp_path):
    """A mean over the targets of both accumulated batches, which have unequal padding."""
    model = tiny_llama(16, seed=1)
    reference = copy.deepcopy(model)
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
    rows = uneven_rows(8)
    trainer = CorrectionTrainer(model, settings(tmp_path, learning_rate=0.1, **options), rows, rows)
    evaluated = trainer.evaluate()
    trainer.train()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logits = reference(ids[None]).logits[0, :-1]
        total, count = total + nn.functional.cross_entropy(logits, ids[1:], reduction="sum"), count + len(ids) - 1
    (total / count).backward()
    log = next(entry for entry in trainer.state.log_history if "lm_loss" in entry)
    mean = total.item() / count
    assert (log["loss"], log["lm_loss"]) == (pytest.approx(mean, rel=1e-5),) * 2
    assert (evaluated["eval_lm_loss"], evaluated["eval_num_tokens"]) == (pytest.approx(mean, rel=1e-5), count)
    assert evaluated["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    for (name, one), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.1 * other.grad, rtol=1e-4, atol=1e-6, msg=name)


# --- the stage


def test_the_lineage_tells_of_the_correction(tmp_path, arguments, held_out_text):
    report = correct_teacher(arguments(general_dataset=held_out_text), settings(tmp_path / "out", method="norm"))
    (stage,) = json.loads((tmp_path / "out" / "minitron.json").read_text())["stages"]
    assert (stage["stage"], stage["tokens"], report.num_tokens) == ("correct", 6 * 4 * 31, 6 * 4 * 31)
    assert stage["settings"]["method"] == "norm" and stage["settings"]["warmup_steps"] == 0
    assert set(stage["data"]) == {"max_length", "train", "held_out", "general"}
    assert stage["metrics"]["after"]["general"]["lm_loss"] == report.after["general"]["lm_loss"]
    assert "lora_r" not in stage["settings"] and str(tmp_path) not in json.dumps(stage)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("minitron.json", "correction_log.json"),
    }


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, arguments, method):
    whole = correct_teacher(arguments(), settings(tmp_path / "whole", method=method))
    saved = {"save_strategy": "steps", "save_steps": 3, "method": method}
    correct_teacher(arguments(), settings(tmp_path / "parts", **saved))
    for name in ("model.safetensors", "minitron.json"):
        (tmp_path / "parts" / name).unlink()
    (tmp_path / "parts" / "checkpoint-6" / "trainer_state.json").unlink()  # as if it was cut off while it was written
    with pytest.raises(FileExistsError, match="resume-from-checkpoint"):
        correct_teacher(arguments(), settings(tmp_path / "parts", **saved))
    resumed = correct_teacher(arguments(), settings(tmp_path / "parts", resume_from_checkpoint="true", **saved))
    assert losses(resumed) == losses(whole) and (resumed.before, resumed.after) == (whole.before, whole.after)
    first, second = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert first == second


def test_adapters_alone_are_a_folder_of_pefts(tmp_path, arguments, tiny_checkpoint):
    config = settings(tmp_path / "out", method="lora")
    correct_teacher(arguments(adapter_only=True), config, LoraArguments(lora_r=4))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "minitron.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    correct_teacher(arguments(), settings(tmp_path / "merged", method="lora"), LoraArguments(lora_r=4))
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for (name, one), (_, other) in zip(adapted.named_parameters(), merged.named_parameters(), strict=True):
        torch.testing.assert_close(one.bfloat16(), other.bfloat16(), rtol=0.02, atol=1e-4, msg=name)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_on_a_quantized_teacher_are_merged_into_plain_weights(tmp_path, arguments, tiny_checkpoint, bits):
    """What is written is what was measured: the quantized weights as they were used, plus the adapters."""
    pytest.importorskip("bitsandbytes")
    source = tmp_path / "fp32"
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / name, source / name)
    quantized = arguments(teacher_model=source, teacher_quantization=bits)
    report = correct_teacher(quantized, settings(tmp_path / "out", method="lora"))
    assert report.after["held_out"]["lm_loss"] < report.before["held_out"]["lm_loss"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    weights, old = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    assert {name: value.dtype for name, value in weights.items()} == {name: value.dtype for name, value in old.items()}
    assert torch.equal(weights["lm_head.weight"], old["lm_head.weight"])
    again = correct_teacher(arguments(teacher_model=tmp_path / "out"), settings(tmp_path / "more", max_steps=1))
    after = report.after["held_out"]["lm_loss"]
    assert again.before["held_out"]["lm_loss"] == pytest.approx(after, abs=1e-4 if bits == "4bit" else 0.02)


def test_a_correction_that_makes_it_worse_is_told(tmp_path, arguments, caplog):
    source = correct_teacher(arguments(), settings(tmp_path / "teacher", max_steps=12)).output_dir
    before = (source / "model.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING, "hf_minitron"):
        report = correct_teacher(arguments(teacher_model=source), settings(tmp_path / "out", learning_rate=0.9))
    (warning,) = report.warnings
    old, new = report.before["held_out"]["lm_loss"], report.after["held_out"]["lm_loss"]
    assert f"from {old:.4f} to {new:.4f}" in warning and new > old and "original teacher is untouched" in warning
    assert warning in caplog.text
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (source / "model.safetensors").read_bytes() == before


def test_forgetting_more_than_was_learnt_is_told():
    before = {"held_out": {"lm_loss": 3.0}, "general": {"lm_loss": 2.0}}
    (warning,) = judge(before, {"held_out": {"lm_loss": 2.9}, "general": {"lm_loss": 2.5}}, 1e-4)
    assert "rose from 2.0000 to 2.5000, by 0.5000 and won only 0.1000 on the new one" in warning
    assert judge(before, {"held_out": {"lm_loss": 2.0}, "general": {"lm_loss": 2.5}}, 1e-4) == []
    assert judge({}, {}, 1e-4) == []


def test_the_command_prints_what_was_learnt_and_forgotten(tmp_path, capsys, tiny_checkpoint, tiny_text, held_out_text):
    words = ["correct-teacher", tiny_checkpoint, "--dataset", tiny_text, "--eval-dataset", held_out_text]
    words += ["--general-dataset", held_out_text, "--max-length", 32, "--max-steps", 2, "--report-to", "none"]
    words += ["--use-cpu", "true", "--output-dir", tmp_path / "out", "--method", "lora", "--lora-r", 2]
    assert cli.main([str(word) for word in [*words, "--adapter-only", "true"]]) == 0
    text = capsys.readouterr().out
    assert "| held-out text like that trained on |" in text and "| general text " in text
    assert "merge_and_unload()" in text
    assert cli.main([str(word) for word in [*words, "--method", "norm"]]) == 2
    assert "lora_r=2 with method=norm: only lora has adapters" in capsys.readouterr().err


# --- settings and what is refused


def test_the_papers_settings_are_the_defaults(tmp_path):
    config = TeacherCorrectionConfig(str(tmp_path), use_cpu=True)
    assert (config.method, config.warmup_steps, config.lr_scheduler_type) == ("full", 120, "cosine")
    assert config.learning_rate == pytest.approx(3e-4 / 5)
    for given in ({}, {"learning_rate": 4e-5}):
        config = TeacherCorrectionConfig(str(tmp_path), use_cpu=True, original_learning_rate=2e-4, **given)
        assert config.learning_rate == pytest.approx(4e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "some"}, "method='some' is unknown. Use one of full, lora, norm"),
        ({"original_learning_rate": 2e-4, "learning_rate": 1e-3}, "a fifth of which is 4e-05: give one of the two"),
        ({"original_learning_rate": 30.0}, "original_learning_rate=30.0 is not between 0 and 1"),
        ({"kd_chunk_size": 0}, "kd_chunk_size=0"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TeacherCorrectionConfig(str(tmp_path), use_cpu=True, **options)


def test_bad_input_is_refused_before_any_training(tmp_path, arguments, tiny_checkpoint, tiny_text):
    output = settings(tmp_path / "out")
    bare = shutil.copytree(tiny_checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"has no tokenizer: .* Copy its tokenizer.json"):
        correct_teacher(arguments(teacher_model=bare), output)
    with pytest.raises(ValueError, match="general_dataset and dataset are both"):
        correct_teacher(arguments(general_dataset=tiny_text), output)
    with pytest.raises(ValueError, match=r"A quantized teacher corrected by the method full: .* Use the method lora"):
        correct_teacher(arguments(teacher_quantization="4bit"), output)
    with pytest.raises(ValueError, match="A teacher in bfloat16 corrected by the method full"):
        correct_teacher(arguments(teacher_dtype="bfloat16"), output)
    with pytest.raises(ValueError, match="adapter_only with method=full: only lora has adapters"):
        correct_teacher(arguments(adapter_only=True), output)
    with pytest.raises(ValueError, match=r"'query' is the name of no linear layer. There are \['down_proj'"):
        lora = LoraArguments(lora_r=2, lora_target_modules=["query"])
        correct_teacher(arguments(), settings(tmp_path / "out", method="lora"), lora)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_nothing_left_to_train_is_refused(tmp_path):
    frozen = tiny_llama(16, seed=1).requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the teacher requires a gradient"):
        CorrectionTrainer(frozen, settings(tmp_path), uneven_rows(4))
    for module in list(frozen.modules()):
        for name, child in list(module.named_children()):
            if "Norm" in type(child).__name__:
                setattr(module, name, nn.Identity())
    with pytest.raises(
        ValueError, match=r"no normalization layers, so that no parameter is left to train. Its modules"
    ):
        choose_trained(frozen, "norm", LoraArguments(), seed=0)


def test_rows_of_another_tokenizer_are_refused(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 70, 5]}])
    with pytest.raises(ValueError, match="eval_dataset has token ids from 1 to 70, and the teacher knows 64"):
        CorrectionTrainer(tiny_llama(16, seed=1), settings(tmp_path), uneven_rows(4), rows)
