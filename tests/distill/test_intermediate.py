"""P1's losses between intermediate states: against their formulas, any batch split, checkpoints, what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from hf_minitron import cli
from hf_minitron.architectures import FAMILIES, get_family
from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, write_cache
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.intermediate import PROJECTION, PROJECTION_FILE
from hf_minitron.distill.layer_pairs import StudentOrigin, read_origin
from hf_minitron.distill.layer_states import StateRecorder
from hf_minitron.distill.state_losses import relation_distance, state_distance
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.prune.arguments import CalibrationArguments, PruneOutput
from hf_minitron.prune.preview import ModelArguments
from hf_minitron.prune.stage import prune_checkpoint
from hf_minitron.prune.target import PruneConfig
from hf_minitron.whole_weights import save_whole

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
uneven_rows, one_step = helpers["uneven_rows"], helpers["one_step"]
ALL = ["emb", "att", "i", "o"]


def llama(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_trainer(folder, student=None, teacher=None, rows=None, origin=None, **options) -> DistillationTrainer:
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "warmup_steps": 0}
    settings |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "intermediate_losses": ALL, "output_dir": str(folder)}
    rows = rows or uneven_rows(8)
    return DistillationTrainer(
        student or llama(16, 4, seed=1),
        teacher or llama(24, 6, seed=2),
        DistillationConfig(**(settings | options)),
        train_dataset=rows,
        eval_dataset=rows,
        student_origin=origin,
    )


def train_logs(trainer) -> list[dict[str, float]]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in logs]


# --- the formulas


def states_of(model, ids) -> dict:
    """The states of one row by the model's own outputs and weights: no hooks, no code of the project's."""
    outputs = model(ids, output_hidden_states=True)
    *stream, final = outputs.hidden_states  # before every layer; the last is after the final norm
    layers, found = model.model.layers, {}
    reads = [layer.input_layernorm(x) for layer, x in zip(layers, stream, strict=True)]
    found["emb", 0] = reads[0]
    for k, layer in enumerate(layers):
        found["o", k] = [*reads[1:], final][k]
        attention = layer.self_attn
        found["att", k] = [p(reads[k]) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        positions = model.model.rotary_emb(stream[k], torch.arange(ids.shape[1])[None])
        mask = torch.full((ids.shape[1],) * 2, -1e9, dtype=reads[k].dtype).triu(1)[None, None]
        attended = attention(reads[k], position_embeddings=positions, attention_mask=mask)[0]
        found["i", k] = layer.post_attention_layernorm(stream[k] + attended)
    return found


def naive_relations(student, teacher, heads) -> torch.Tensor:
    """[length]: KL between rows of softmax(x x^T / sqrt(d)), token by token and head by head."""
    total = []
    for i in range(student[0].shape[1]):
        value = 0.0
        for s, t, count in zip(student, teacher, heads, strict=True):
            for head_s, head_t in zip(s[0].chunk(count, -1), t[0].chunk(count, -1), strict=True):
                p, q = ((x[: i + 1] @ x[i] / math.sqrt(x.shape[-1])).softmax(-1) for x in (head_t, head_s))
                value = value + (p * (p.log() - q.log())).sum() / count
        total.append(value)
    return torch.stack(total)


def reference_losses(student, teacher, rows, pairs, metric, projection) -> dict[str, torch.Tensor]:
    """Means over all targets, with gradient: row by row, no padding."""
    sums, count = dict.fromkeys(ALL, 0.0), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            taught = states_of(teacher, ids)
        own = states_of(student, ids)
        count += ids.shape[1] - 1
        for name in ALL:
            for s, t in [(0, 0)] if name == "emb" else pairs:
                a, b = own[name, s], taught[name, t]
                if name == "att":
                    each = naive_relations(a, b, (4, 2, 2))[:-1]
                elif metric == "cosine":
                    a, b = (projection(a) if projection else a)[0, :-1], b[0, :-1]
                    each = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                else:
                    each = ((projection(a) if projection else a) - b)[0, :-1].pow(2).sum(-1) / b.shape[-1]
                sums[name] = sums[name] + each.sum()
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("metric", ["cosine", "mse"])
@pytest.mark.parametrize("width", [16, 24])
def test_losses_are_those_of_the_formulas(tmp_path, metric, width):
    """In fp64, batches with padding; with and without a projection; two pairs, one of them the last layers."""
    student, teacher, rows = llama(width, 4, seed=1).double(), llama(24, 6, seed=2).double(), uneven_rows(6)
    options = {"intermediate_metric": metric, "intermediate_layers": "1:3,3:5"}
    trainer = make_trainer(tmp_path, student, teacher, rows, **options)
    projection = getattr(student, PROJECTION, None)
    assert (projection is None) == (width == 24)
    expected = reference_losses(student.eval(), teacher, rows, [(1, 3), (3, 5)], metric, projection)
    metrics = trainer.evaluate()
    for name in ALL:
        assert metrics[f"eval_intermediate_{name}"] == pytest.approx(expected[name].item(), rel=1e-9), name
        assert expected[name].item() > 0.1
    assert metrics["eval_loss"] == metrics["eval_kl"]  # evaluation keeps them apart


@pytest.mark.parametrize("width", [16, 24])
def test_gradients_are_those_of_the_formulas(tmp_path, width):
    student, teacher, rows = llama(width, 4, seed=1).double(), llama(24, 6, seed=2).double(), uneven_rows(6)
    gradients = {}
    for weight in (0.0, 0.7):
        trainer = make_trainer(tmp_path, student, teacher, rows, intermediate_weight=str(weight), ce_weight=0.5)
        student.train().zero_grad()
        trainer.compute_loss(student, CausalLMCollator()(rows)).backward()
        gradients[weight] = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    pairs = [(1, 3)]
    projection = getattr(student, PROJECTION, None)
    sum(reference_losses(student, teacher, rows, pairs, "cosine", projection).values()).backward()
    moved = 0
    for name, parameter in student.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else 0.7 * parameter.grad
        moved += bool(expected.any())
        difference = gradients[0.7][name] - gradients[0.0][name]
        assert (difference - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name  # Llama's norms are in fp32
    assert moved > 10 and (width == 24 or gradients[0.7][f"{PROJECTION}.weight"].any())


def test_the_relations_gradient_and_blocks_of_queries(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def states(width):
        return [
            torch.randn(2, 5, n, dtype=torch.float64, generator=generator) for n in (4 * width, 2 * width, 2 * width)
        ]

    student, teacher, mask = states(3), states(5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for state in student:
        state.requires_grad_()

    def loss(*states):
        return relation_distance(states, teacher, (4, 2, 2), (4, 2, 2), mask)[mask.bool()]

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)
    whole = loss(*student)
    monkeypatch.setattr("hf_minitron.distill.state_losses.QUERIES_AT_A_TIME", 2)
    assert torch.allclose(loss(*student), whole, rtol=1e-12)
    assert torch.allclose(whole[:5], naive_relations([s[:1] for s in student], [t[:1] for t in teacher], (4, 2, 2)))
    assert relation_distance(teacher, teacher, (4, 2, 2), (2, 2, 2)).abs().max() < 1e-12


def test_states_of_half_precision_are_compared_in_full():
    a, b = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for metric in ("cosine", "mse"):
        assert state_distance(a, b, metric).dtype == torch.float32
        assert torch.allclose(state_distance(a, b, metric), state_distance(a.double(), b.double(), metric).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_every_family_are_what_its_layers_read(family):
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "pad_token_id": None}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    row, norms, layers = get_family(model.config), {}, model.model.layers
    for index, layer in enumerate(layers):
        for half, norm in enumerate(row.read_norms):
            if norm is not None:
                getattr(layer, norm).register_forward_hook(
                    lambda m, a, out, key=(index, half): norms.update({key: out})
                )
    recorder = StateRecorder(model, ALL, [0, 2])
    with torch.no_grad(), recorder.recording() as states:
        stream = model(torch.arange(9)[None], output_hidden_states=True).hidden_states
    assert set(states) == {("emb", 0), *((name, k) for name in ("att", "i", "o") for k in (0, 2))}
    assert torch.equal(states["o", 2][0], stream[-1])
    reads = [norms[k, 0] if row.read_norms[0] else stream[k] for k in range(3)]
    assert torch.equal(states["emb", 0][0], reads[0]) and torch.equal(states["o", 0][0], reads[1])
    if row.read_norms[1]:
        assert torch.equal(states["i", 2][0], norms[2, 1])
    assert [state.shape[-1] for state in states["att", 2]] == [48, 16, 16]
    attention = layers[2].self_attn
    stacked = getattr(attention, "qkv_proj", None)
    projections = [stacked] if stacked else [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        expected = torch.cat([projection(reads[2]) for projection in projections], dim=-1)
    assert torch.equal(torch.cat(states["att", 2], dim=-1), expected)


# --- the weight


def test_auto_weighs_by_the_losses_of_the_step_before(tmp_path):
    trainer = make_trainer(tmp_path, ce_weight=0.5)
    trainer.train()
    logs = train_logs(trainer)
    assert logs[0]["intermediate_weight"] == 0
    for before, log in itertools.pairwise(logs):
        states = sum(before[f"intermediate_{name}"] for name in ALL)
        assert log["intermediate_weight"] == pytest.approx(before["kl"] / states, rel=1e-5)
    for log in logs:
        added = log["intermediate_weight"] * sum(log[f"intermediate_{name}"] for name in ALL)
        assert log["loss"] == pytest.approx(log["kl"] + 0.5 * log["lm_loss"] + added, rel=1e-5)


def test_auto_has_the_gradient_of_a_fixed_weight(tmp_path):
    """With learning rate 0 the second step is the first again, but for its weight."""
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.0}
    auto = make_trainer(tmp_path, **options)
    auto.train()
    weight = train_logs(auto)[1]["intermediate_weight"]
    fixed = make_trainer(tmp_path, intermediate_weight=weight, **options)
    fixed.train()
    assert train_logs(fixed)[1]["grad_norm"] == pytest.approx(train_logs(auto)[1]["grad_norm"], rel=1e-6)
    assert train_logs(fixed)[1]["grad_norm"] != pytest.approx(train_logs(auto)[0]["grad_norm"], rel=0.01)


def test_states_that_agree_already_do_not_blow_the_weight_up(tmp_path):
    """A student that kept the teacher's first layers as they are has its embeddings exactly."""
    teacher = llama(16, 6, seed=2)
    student = copy.deepcopy(teacher)
    del student.model.layers[3:5]
    student.config.num_hidden_layers = 4
    student.model.layers[3].self_attn.layer_idx = 3
    trainer = make_trainer(tmp_path, student, teacher, intermediate_losses=["emb"])
    trainer.train()
    first, second = train_logs(trainer)[:2]
    assert first["intermediate_emb"] == pytest.approx(0, abs=1e-6)
    assert second["intermediate_weight"] == pytest.approx(first["kl"] / 1e-3, rel=1e-5)


def test_states_come_closer_in_training(tmp_path):
    """Both the layers and the projection learn; by the logits alone the states stay apart."""
    found = {}
    for weight in ("0", "5"):
        options = {"max_steps": 30, "intermediate_losses": ["emb", "o"], "logging_steps": 30}
        trainer = make_trainer(tmp_path, intermediate_weight=weight, **options)
        before, _, found[weight] = trainer.evaluate(), trainer.train(), trainer.evaluate()
    for name in ("emb", "o"):
        assert found["5"][f"eval_intermediate_{name}"] < 0.7 * found["0"][f"eval_intermediate_{name}"]
    assert found["5"]["eval_kl"] < before["eval_kl"]


# --- how a batch is split, and how layers are run


def test_accumulation_changes_nothing():
    options = helpers["WITH_STATES"]
    whole, split = (one_step(False, 8 // n, n, **options) for n in (1, 4))
    assert f"{PROJECTION}.weight" in whole["gradient"]
    for name, values in whole["gradient"].items():
        expected = torch.tensor(values)
        assert (torch.tensor(split["gradient"][name]) - expected).norm() < 1e-5 * expected.norm(), name
    for name in ("loss", "kl", "intermediate_weight", *(f"intermediate_{name}" for name in ALL)):
        assert split["log"][name] == pytest.approx(whole["log"][name], rel=1e-5) and whole["log"][name] > 0, name


def test_checkpointed_layers_give_the_same(tmp_path):
    """Compiled ones are in test_trainer_options.py."""
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, activation_checkpointing=checkpointing)
        trainer.train()
        runs.append(train_logs(trainer))
    for plain, other in zip(*runs, strict=True):
        assert other == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("where", ["options", "model"])
def test_reentrant_checkpointing_is_refused(tmp_path, where):
    student = llama(16, 4, seed=1)
    options = {}
    if where == "model":
        student.gradient_checkpointing_enable({"use_reentrant": True})
    else:
        options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"Reentrant activation checkpointing.*use_reentrant"):
        make_trainer(tmp_path, student, **options).train()


def test_without_them_nothing_is_hooked_or_added(tmp_path):
    student, teacher = llama(16, 4, seed=1), llama(24, 6, seed=2)
    seen = []

    def count(module, args):
        seen.append(
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for s in (student, teacher) for m in s.modules())
        )

    student.model.register_forward_pre_hook(count)
    for losses, hooks in ((None, 0), (["o"], 1)):
        trainer = make_trainer(tmp_path, student, teacher, intermediate_losses=losses, max_steps=1)
        assert hasattr(student, PROJECTION) == (losses is not None)
        trainer.train()
        assert seen[-1] == 1 + hooks  # its own, and the student's; the teacher's are gone by then
    count(None, None)
    assert seen[-1] == 1 and not hasattr(student, PROJECTION)
    assert set(student.state_dict()) == set(llama(16, 4, seed=1).state_dict())


def test_a_lora_student_trains_adapters_and_projection(tmp_path):
    student = get_peft_model(llama(16, 4, seed=1), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(tmp_path, student, save_strategy="steps", save_steps=3)
    start = trainer._states.projection.weight.clone()
    trainer.train()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert not torch.equal(trainer._states.projection.weight, start)
    folder = tmp_path / "checkpoint-3"
    assert {path.name for path in folder.glob("*.safetensors")} == {"adapter_model.safetensors", PROJECTION_FILE}
    save_whole(trainer, str(tmp_path / "merged"))
    assert tensor_names(tmp_path / "merged") == set(llama(16, 4, seed=1).state_dict())


# --- checkpoints


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return set(weights.keys())


def test_resuming_continues_bit_for_bit(tmp_path, caplog):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", seed=42, **options)
    with torch.no_grad():
        resumed._states.projection.weight.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert train_logs(resumed) == train_logs(straight)
    assert torch.equal(resumed._states.projection.weight, straight._states.projection.weight)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert PROJECTION not in caplog.text  # no warning of missing weights


def test_checkpoints_hold_the_student_alone(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    names = set(llama(16, 4, seed=1).state_dict())
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    assert {path.name for path in folder.glob("*.safetensors")} == {"model.safetensors", PROJECTION_FILE}
    trainer.model.save_pretrained(tmp_path / "by-hand")
    save_whole(trainer, str(tmp_path / "whole"))
    for saved in (folder, tmp_path / "by-hand", tmp_path / "whole"):
        assert tensor_names(saved) == names
        model, problems = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
        assert not any(problems.values())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
    (folder / PROJECTION_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {PROJECTION_FILE}"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_trainer_can_train_twice(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    once = trainer._states.projection.weight.clone()
    trainer.train()
    assert not torch.equal(trainer._states.projection.weight, once)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"intermediate_losses": ["emb", "out"]},
            r"intermediate_losses=\['emb', 'out'\]: each is one of emb, att, i, o",
        ),
        ({"intermediate_losses": ["o", "o"]}, "at most once"),
        ({"intermediate_losses": []}, "Name at least one"),
        ({"intermediate_metric": "l1"}, "intermediate_metric='l1' is unknown. Use cosine or mse"),
        ({"intermediate_weight": "much"}, "intermediate_weight=much is not a finite number"),
        ({"intermediate_weight": -1.0}, "intermediate_weight=-1.0"),
        ({"intermediate_weight": math.nan}, "intermediate_weight=nan"),
        ({"intermediate_layers": "1-3"}, "'1-3' is no list of student:teacher layers"),
        ({"intermediate_layers": "-1:3"}, "is no list of student:teacher layers"),
        ({"intermediate_layers": "1:4,2:3"}, "does not ascend in both models: after 1:4 comes 2:3"),
        ({"intermediate_layers": "1:3,1:4"}, "does not ascend"),
        ({"intermediate_layers": "4:5"}, "the student has no layer 4. It has 4.*use at most 3"),
        ({"intermediate_layers": "3:6"}, "the teacher has no layer 6. It has 6.*use at most 5"),
        ({"intermediate_layers": "1:3", "intermediate_losses": None}, "no effect with intermediate_losses=None"),
        ({"intermediate_layers": "1:3", "intermediate_losses": ["emb"]}, "Add one of these"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_cached_teacher_has_no_states(tmp_path, pruned_twice, tiny_text, capsys):
    rows, form = uneven_rows(8), CacheFormat("exact", dtype=torch.float32)
    cache = write_cache(llama(24, 6, seed=2), rows, tmp_path / "cache", form, TeacherFacts({}))
    with pytest.raises(ValueError, match="a teacher without the hidden states a mapping asks for"):
        make_trainer(tmp_path, teacher=cache, rows=rows)
    assert make_trainer(tmp_path, teacher=cache, rows=rows, intermediate_losses=None)
    words = [str(pruned_twice / "narrow"), f"--teacher-cache={tmp_path / 'cache'}", f"--dataset={tiny_text}"]
    words += [f"--output-dir={tmp_path / 'out'}", "--intermediate-losses", "o", "--use-cpu=true"]
    assert cli.main(["distill", *words]) == 2
    assert "a teacher without the hidden states a mapping asks for" in capsys.readouterr().err


def test_a_family_outside_the_table_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=64, **sizes))
    with pytest.raises(ValueError, match="model_type='gpt_neox' is not supported"):
        make_trainer(tmp_path, teacher=teacher)


def test_adapters_under_fsdp_are_refused_with_a_projection(tmp_path):
    """Told from the trainer's own flag: FSDP itself is in test_stage_processes.py."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, get_peft_model(llama(16, 4, seed=1), lora))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="adapters under FSDP leave it out"):
        trainer._states.join(trainer)
    same_width = make_trainer(tmp_path, get_peft_model(llama(24, 4, seed=1), lora))
    same_width.is_fsdp_enabled = True
    same_width._states.join(same_width)


# --- where the student was cut from


@pytest.mark.parametrize(
    ("origin", "pair"),
    [
        (None, "1:3"),
        (StudentOrigin([0, 3, 4, 5]), "1:3"),
        (StudentOrigin([1, 2, 3, 5]), "1:2"),
        (StudentOrigin([0, 1, 2, 5]), "1:3"),  # the student's first three layers have nothing to learn
    ],
)
def test_the_default_pair(tmp_path, caplog, origin, pair):
    with caplog.at_level(logging.INFO, "hf_minitron"):
        make_trainer(tmp_path, origin=origin, intermediate_losses=["emb", "o"])
    assert (
        f"losses emb, o between layers {pair} of student and teacher, through a projection from 16 to 24" in caplog.text
    )


def test_the_projection_starts_with_the_kept_channels(tmp_path):
    kept = [0, 1, 2, 3, 5, 6, 8, 9, 10, 12, 14, 15, 17, 19, 20, 23]
    weight = make_trainer(tmp_path, origin=StudentOrigin(None, kept))._states.projection.weight
    assert torch.equal(weight, torch.eye(24)[:, kept])
    weight = make_trainer(tmp_path)._states.projection.weight
    assert torch.allclose(weight.T @ weight, torch.eye(16), atol=1e-5)


@pytest.fixture(scope="module")
def pruned_twice(tmp_path_factory, tiny_llama_config, tiny_tokenizer):
    """A checkpoint of six layers, the same without layers 0 and 2, and that without a half of its channels."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig.from_dict(tiny_llama_config.to_dict() | {"num_hidden_layers": 6})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "six")
    tiny_tokenizer.save_pretrained(folder / "six")
    for source, target, sizes in (
        ("six", "four", {"drop_layers": [0, 2]}),
        ("four", "narrow", {"hidden_size": 16, "method": "random"}),
    ):
        prune_checkpoint(
            ModelArguments(str(folder / source)),
            CalibrationArguments(),
            PruneConfig(**sizes),
            PruneOutput(str(folder / target)),
        )
    return folder


def test_the_lineage_tells_where_a_student_was_cut_from(pruned_twice):
    config = {name: AutoConfig.from_pretrained(pruned_twice / name) for name in ("six", "four", "narrow")}

    def origin(student, teacher):
        return read_origin(pruned_twice / student, config[student], config[teacher])

    assert origin("four", "six") == ([1, 3, 4, 5], [*range(32)])
    assert origin("narrow", "four").kept_layers == [0, 1, 2, 3]
    layers, channels = origin("narrow", "six")
    assert layers == [1, 3, 4, 5] and len(channels) == 16 == len(set(channels))
    assert origin("six", "six") == (None, None)
    other = LlamaConfig(num_hidden_layers=7, hidden_size=64)
    assert read_origin(pruned_twice / "narrow", config["narrow"], other) == (None, None)


def test_the_command_line_maps_layers_by_the_lineage(pruned_twice, tiny_text, held_out_text, tmp_path, caplog):
    words = [str(pruned_twice / "narrow"), f"--teacher-model={pruned_twice / 'six'}", f"--dataset={tiny_text}"]
    words += [f"--eval-dataset={held_out_text}", f"--output-dir={tmp_path / 'out'}", "--max-length=32", "--max-steps=2"]
    words += ["--intermediate-losses", "emb", "o", "--use-cpu=true", "--report-to=none", "--logging-steps=1"]
    with caplog.at_level(logging.INFO, "hf_minitron"):
        assert cli.main(["distill", *words, "--teacher-dtype=float32"]) == 0
    assert "Intermediate losses emb, o between layers 1:3 of student and teacher, through" in caplog.text
    stage = json.loads((tmp_path / "out" / "minitron.json").read_text())["stages"][-1]
    assert stage["settings"]["intermediate_losses"] == ["emb", "o"]
    assert set(stage["metrics"]["after"]) >= {"kl", "intermediate_emb", "intermediate_o"}
    assert tensor_names(tmp_path / "out") == tensor_names(pruned_twice / "narrow")
