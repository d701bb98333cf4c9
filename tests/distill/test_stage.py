"""The stage ``distill``: files it leaves, dtype, lineage, refusal, resumption."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_minitron.adapters import LoraArguments
from hf_minitron.distill import inputs as inputs_module
from hf_minitron.distill import stage
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments, load_inputs
from hf_minitron.distill.stage import distill_checkpoint
from hf_minitron.prune.arguments import CalibrationArguments, PruneOutput
from hf_minitron.prune.preview import ModelArguments
from hf_minitron.prune.stage import prune_checkpoint
from hf_minitron.prune.target import PruneConfig


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("pruned") / "half"
    config = PruneConfig(hidden_size=16, intermediate_size=32, method="random")
    prune_checkpoint(ModelArguments(str(tiny_checkpoint)), CalibrationArguments(), config, PruneOutput(str(folder)))
    return folder


@pytest.fixture
def arguments(pruned, tiny_checkpoint, tiny_text, held_out_text):
    def build(**changes):
        settings = {"student_model": pruned, "teacher_model": tiny_checkpoint, "dataset": tiny_text, "max_length": 32}
        settings |= {"eval_dataset": held_out_text} | changes
        return DistillArguments(**{k: str(v) if hasattr(v, "parts") else v for k, v in settings.items()})

    return build


def settings(output_dir, **changes):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "use_cpu": True, "seed": 3}
    defaults |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return DistillationConfig(output_dir=str(output_dir), **(defaults | changes))


def losses(report):
    return [entry["loss"] for entry in report.log_history if "loss" in entry]


def test_it_writes_an_ordinary_checkpoint_in_the_students_dtype(tmp_path, arguments, pruned):
    report = distill_checkpoint(arguments(), settings(tmp_path / "student"))
    assert report.metrics["kl"] < report.metrics_before["kl"]
    assert report.num_tokens == 4 * 4 * 31
    folder = tmp_path / "student"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("minitron.json", "prune_plan.json", "distill_log.json"),
    }
    with safe_open(folder / "model.safetensors", "pt") as weights, safe_open(pruned / "model.safetensors", "pt") as old:
        assert set(weights.keys()) == set(old.keys())
        assert {weights.get_tensor(name).dtype for name in list(weights.keys())} == {torch.bfloat16}
        assert not torch.equal(weights.get_tensor("lm_head.weight"), old.get_tensor("lm_head.weight"))
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 300


def test_the_lineage_tells_models_data_tokens_settings_and_metrics(tmp_path, arguments, tiny_checkpoint):
    distill_checkpoint(arguments(), settings(tmp_path / "student", ce_weight=0.5))
    prune, distill = json.loads((tmp_path / "student" / "minitron.json").read_text())["stages"]
    assert (prune["stage"], distill["stage"], distill["tokens"]) == ("prune", "distill", 4 * 4 * 31)
    assert prune["inputs"]["source"]["sha256"] == distill["inputs"]["teacher"]["sha256"]
    assert distill["data"]["train"]["files"] == ["train.jsonl"] and len(distill["data"]["train"]["fingerprint"]) == 64
    assert distill["settings"]["ce_weight"] == 0.5 and distill["settings"]["max_steps"] == 4
    assert "logging_dir" not in distill["settings"] and str(tmp_path) not in json.dumps(distill)
    assert distill["metrics"]["after"]["num_tokens"] > 0 and distill["seconds"] > 0


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, arguments):
    whole = distill_checkpoint(arguments(), settings(tmp_path / "whole", max_steps=6))
    saved = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    distill_checkpoint(arguments(), settings(tmp_path / "parts", **saved))
    for name in ("model.safetensors", "minitron.json"):
        (tmp_path / "parts" / name).unlink()
    (tmp_path / "parts" / "checkpoint-6" / "trainer_state.json").unlink()  # as if it was cut off while it was written
    with pytest.raises(FileExistsError, match="resume-from-checkpoint"):
        distill_checkpoint(arguments(), settings(tmp_path / "parts", **saved))
    resumed = distill_checkpoint(arguments(), settings(tmp_path / "parts", resume_from_checkpoint="true", **saved))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    assert resumed.metrics == whole.metrics and resumed.num_tokens == whole.num_tokens
    first, second = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert first == second


def test_training_rows_follow_the_seed_and_held_out_rows_do_not(tmp_path, arguments):
    facts = []
    for seed in (3, 4):
        distill_checkpoint(arguments(max_eval_rows=8), settings(tmp_path / str(seed), seed=seed))
        facts.append(json.loads((tmp_path / str(seed) / "minitron.json").read_text())["stages"][-1]["data"])
    assert facts[0]["train"]["fingerprint"] != facts[1]["train"]["fingerprint"]
    assert facts[0]["held_out"] == facts[1]["held_out"]


def test_a_folder_with_other_files_is_refused_or_replaced(tmp_path, arguments):
    output = tmp_path / "student"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="--overwrite"):
        distill_checkpoint(arguments(), settings(output))
    assert (output / "mine.txt").exists()
    distill_checkpoint(arguments(overwrite=True), settings(output))
    assert not (output / "mine.txt").exists() and (output / "minitron.json").exists()


def test_bad_input_is_refused_before_any_training(tmp_path, arguments, tiny_text, tiny_tokenizer):
    output = settings(tmp_path / "student")
    with pytest.raises(ValueError, match="max_length=65"):
        distill_checkpoint(arguments(max_length=65), output)
    with pytest.raises(ValueError, match="must not be trained on"):
        distill_checkpoint(arguments(eval_dataset=tiny_text, eval_split="train"), output)
    with pytest.raises(ValueError, match="fewer than one row"):
        (tmp_path / "short.txt").write_text("too short")
        distill_checkpoint(arguments(dataset=tmp_path / "short.txt"), output)
    with pytest.raises(ValueError, match="dtype='int8'"):
        distill_checkpoint(arguments(teacher_dtype="int8"), output)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        distill_checkpoint(arguments(), settings(tmp_path / "new", resume_from_checkpoint="true"))
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(vocab_size=310, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(other)  # fmt: skip
    with pytest.raises(ValueError, match="vocab_size=300, the teacher 310"):
        distill_checkpoint(arguments(teacher_model=other), output)
    assert not (tmp_path / "student").exists() or not any((tmp_path / "student").iterdir())


def test_a_teacher_whose_ids_mean_other_words_is_refused(tmp_path, arguments, tiny_checkpoint):
    """The vocabularies have one size, and two words have changed places."""
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"differ in 2 of 300 ids: \d+ is '[ab]' / '[ba]', "):
        distill_checkpoint(arguments(teacher_model=other), settings(tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_a_teacher_without_a_tokenizer_is_taken_at_its_word(tmp_path, arguments, tiny_checkpoint):
    bare = shutil.copytree(tiny_checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    report = distill_checkpoint(arguments(teacher_model=bare), settings(tmp_path / "student", max_steps=1))
    assert report.num_tokens == 4 * 31


def test_an_adapted_student_is_trained_merged_and_recorded(tmp_path, arguments, pruned):
    """What has no adapter comes back as the source has it, in the source's dtype."""
    lora = LoraArguments(lora_r=4, lora_target_modules=["q_proj"])
    report = distill_checkpoint(arguments(), settings(tmp_path / "student"), lora)
    assert report.metrics["kl"] < report.metrics_before["kl"]
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "student"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]) != name.endswith("q_proj.weight"), name
    told = json.loads((tmp_path / "student" / "minitron.json").read_text())["stages"][-1]["settings"]
    assert (told["lora_r"], told["lora_target_modules"]) == (4, ["q_proj"]) and "use_dora" not in told


def test_students_that_share_inputs_train_as_if_alone(tmp_path, arguments, monkeypatch):
    alone = distill_checkpoint(arguments(), settings(tmp_path / "alone"))
    loaded, load = [], inputs_module.load_checked
    for module in (stage, inputs_module):
        monkeypatch.setattr(
            module, "load_checked", lambda source, *rest: loaded.append(source.folder) or load(source, *rest)
        )
    inputs = load_inputs(arguments(), settings(tmp_path / "first"))
    assert loaded == []  # the teacher comes when it is needed
    reports = [
        distill_checkpoint(arguments(), settings(tmp_path / name), inputs=inputs) for name in ("first", "second")
    ]
    assert len(loaded) == 3  # two students, one teacher
    for report in reports:
        assert report.metrics == alone.metrics and losses(report) == losses(alone)
    first, second = (tmp_path / name / "model.safetensors" for name in ("alone", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_settings_leave_the_process_group_as_it_is(tmp_path, arguments, monkeypatch):
    """Another config made on the way would reset it: two processes would then train alone and write over each other."""
    config = settings(tmp_path / "student", average_tokens_across_devices=True, bf16_full_eval=False, adam_beta2=0.95)

    def fail(*arguments, **options):
        raise AssertionError("the state was reset")

    monkeypatch.setattr(PartialState, "_reset_state", fail)
    told = stage._settings(arguments(), config)
    assert told["max_steps"] == 4 and told["learning_rate"] == 5e-3 and told["warmup_steps"] == 40
    assert told["adam_beta2"] == 0.95
    assert not {"adam_beta1", "bf16_full_eval", "average_tokens_across_devices", "accelerator_config"} & set(told)
