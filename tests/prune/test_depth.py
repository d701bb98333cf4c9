"""Layers: which are missed least, which are refused, and that dropping them is skipping them."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_minitron.architectures import PER_LAYER_KEYS
from hf_minitron.prune.depth import check_dropped_layers, choose_layers, list_removals, read_removal, removal_key
from hf_minitron.prune.importance import score_model
from hf_minitron.prune.plan import PrunePlan, make_plan
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.scores import ImportanceScores, Moments
from hf_minitron.prune.target import PruneConfig, target_config, target_sizes

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}


def config_of(num_layers: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=61, num_hidden_layers=num_layers, **SMALL)


def scan(metric: str, damage: list[float], num_dropped: int, intact: float = 1.0) -> ImportanceScores:
    """Scores that hold one scan."""
    values = torch.tensor([*damage, intact], dtype=torch.float64)
    moments = {removal_key(metric, num_dropped): Moments(4, values, torch.ones_like(values))}
    return ImportanceScores(("l2", "mean"), 8, moments)


# Which layers go


def test_the_papers_block_leaves_the_first_fifteen_and_the_last():
    """P2: 32 → 16 layers drops "16 to 31" counted from 1, where removing these hurts least."""
    damage = [abs(start - 15) + 0.5 for start in range(17)]
    plan = make_plan(
        config_of(32), PruneConfig(num_hidden_layers=16, depth_metric="accuracy"), scan("accuracy", damage, 16)
    )
    assert plan.kept_layers == [*range(15), 31]
    assert plan.sizes["num_hidden_layers"] == 16
    assert plan.info["depth"] == {"pattern": "contiguous", "metric": "accuracy"}
    assert len(plan.kept_neurons) == len(plan.kept_heads) == 16


def test_scattered_layers_go_one_by_one():
    scores = scan("lm_loss", [3.0, 0.1, 2.0, 0.3, 0.2, 5.0], 1)
    assert choose_layers(scores, "lm_loss", "scattered", 6, 3) == [0, 2, 5]
    prune = PruneConfig(num_hidden_layers=3, depth_pattern="scattered")
    assert make_plan(config_of(6), prune, scores).kept_layers == [0, 2, 5]


@pytest.mark.parametrize("pattern", ["contiguous", "scattered"])
def test_ties_keep_the_lower_layers(pattern: str):
    n = 2 if pattern == "contiguous" else 1
    scores = scan("accuracy", [0.5] * (6 - n + 1), n)
    assert choose_layers(scores, "accuracy", pattern, 6, 4) == [0, 1, 2, 3]


def test_single_layers_by_block_importance_come_with_every_scoring_pass(build_model, rows):
    model = build_model()
    scores = score_model(model, rows, axes=("layers",), progress=False)
    order = scores.layers.argsort()
    prune = PruneConfig(num_hidden_layers=1, depth_metric="block_importance", depth_pattern="scattered")
    assert make_plan(model.config, prune, scores).kept_layers == [int(order[-1])]
    removal = read_removal(scores, "block_importance", 1)
    assert removal.damage.tolist() == pytest.approx(scores.layers.tolist())
    assert (removal.standard_error > 0).all()
    one_less = dataclasses.replace(prune, num_hidden_layers=2, depth_pattern="contiguous")
    assert make_plan(model.config, one_less, scores).kept_layers == sorted(order[1:].tolist())


def test_a_removal_has_errors_over_samples_and_lists_by_metric():
    values = torch.tensor([[1.0, 4.0, 9.0], [3.0, 8.0, 9.0]]).double()
    moments = Moments()
    moments.add(values)
    scores = ImportanceScores(("l2", "mean"), 8, {removal_key("lm_loss", 2): moments})
    scores.moments[removal_key("block_importance", 12)] = scores.moments[removal_key("block_importance", 3)] = moments
    removal = read_removal(scores, "lm_loss", 2)
    assert removal.damage.tolist() == [2, 6]
    assert removal.standard_error.tolist() == [1, 2]
    assert removal.intact == 9
    assert [(r.metric, r.num_dropped) for r in list_removals(scores)] == [
        ("block_importance", 3),
        ("block_importance", 12),
        ("lm_loss", 2),
    ]
    single = ImportanceScores(("l2", "mean"), 8, {removal_key("lm_loss", 2): Moments(1, values[0], values[0] * 0)})
    assert all(math.isnan(error) for error in read_removal(single, "lm_loss", 2).standard_error)


def test_what_was_not_scanned_is_asked_for():
    prune = PruneConfig(num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"needs lm_loss without blocks of 2 layers. Call scan_layers\(..., num_dropp"):
        make_plan(config_of(6), prune)
    with pytest.raises(ValueError, match="without blocks of 2 layers"):
        make_plan(config_of(6), prune, scan("lm_loss", [1.0] * 4, 3))
    with pytest.raises(ValueError, match="needs accuracy without single layers"):
        prune = dataclasses.replace(prune, depth_metric="accuracy", depth_pattern="scattered")
        make_plan(config_of(6), prune, scan("accuracy", [1.0] * 5, 2))


def test_a_scan_of_another_model_is_refused():
    with pytest.raises(ValueError, match="saw a model of 6 layers, this one has 7"):
        make_plan(config_of(7), PruneConfig(num_hidden_layers=5), scan("lm_loss", [1.0] * 5, 2))


def test_random_layers():
    prune = PruneConfig(num_hidden_layers=3, method="random", depth_pattern="contiguous")
    plans = [make_plan(config_of(8), dataclasses.replace(prune, seed=seed)).kept_layers for seed in range(40)]
    assert plans[0] == make_plan(config_of(8), prune).kept_layers
    gone = [sorted(set(range(8)) - set(kept)) for kept in plans]
    assert all(layers == list(range(layers[0], layers[0] + 5)) for layers in gone)
    assert {layers[0] for layers in gone} == {0, 1, 2, 3}
    scattered = [
        make_plan(config_of(8), dataclasses.replace(prune, seed=seed, depth_pattern="scattered")).kept_layers
        for seed in range(40)
    ]
    assert len({tuple(kept) for kept in scattered}) > 20


# By hand


def test_layers_dropped_by_hand():
    plan = make_plan(config_of(6), PruneConfig(drop_layers=[4, 1]))
    assert plan.kept_layers == [0, 2, 3, 5]
    assert plan.info["depth"] == {"drop_layers": [1, 4]}
    assert make_plan(config_of(6), PruneConfig(drop_layers=[4, 1], num_hidden_layers=4)).kept_layers == [0, 2, 3, 5]
    assert make_plan(config_of(6), PruneConfig(drop_layers=[])).kept_layers == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ([6], r"drop_layers=\[6\]: 6 is no layer, they count from 0 to 5"),
        ([-1], r"-1 is no layer, they count from 0 to 5"),
        ([1.0], r"1.0 is no layer"),
        ([2, 1, 2], r"drop_layers=\[2, 1, 2\] names layer 2 more than once"),
        ([0, 1, 2, 3, 4, 5], "names all 6 layers: nothing would be left"),
    ],
)
def test_layers_that_cannot_be_dropped(drop: list, message: str):
    with pytest.raises(ValueError, match=message):
        check_dropped_layers(drop, 6)
    with pytest.raises(ValueError, match=message):
        target_sizes(config_of(6), PruneConfig(drop_layers=drop))


def test_numbers_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"num_hidden_layers=3, but drop_layers=\[1\] leaves 5 of 6"):
        target_sizes(config_of(6), PruneConfig(num_hidden_layers=3, drop_layers=[1]))


@pytest.mark.parametrize("key", ["depth_metric", "depth_pattern"])
def test_unknown_choices(key: str):
    with pytest.raises(ValueError, match=rf"{key}='perplexity' is unknown. Use one of"):
        PruneConfig(**{key: "perplexity"})


# Width and depth


def test_width_is_ranked_in_the_layers_that_stay(build_model, rows, caplog):
    model = build_model()
    scores = score_model(model, rows, progress=False)
    width = make_plan(model.config, PruneConfig(intermediate_size=16, num_attention_heads=4), scores)
    with caplog.at_level(logging.WARNING):
        both = make_plan(
            model.config, PruneConfig(intermediate_size=16, num_attention_heads=4, drop_layers=[1]), scores
        )
    assert both.kept_neurons == [width.kept_neurons[0], width.kept_neurons[2]]
    assert both.kept_heads == [width.kept_heads[0], width.kept_heads[2]]
    assert "P2 prunes width or depth, not both" in caplog.text
    caplog.clear()
    make_plan(model.config, PruneConfig(drop_layers=[1]))
    make_plan(model.config, PruneConfig(intermediate_size=16), scores)
    assert not caplog.text


# The pruned model


@pytest.mark.parametrize("drop", [[1], [0, 2]])
def test_dropping_is_skipping_bit_for_bit(source, logits, drop):
    pruned = PrunerForCausalLM(source).prune(PruneConfig(drop_layers=drop))
    hooks = [
        source.model.layers[layer].register_forward_hook(
            lambda module, args, kwargs, output: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
        for layer in drop
    ]
    skipped = logits(source)
    for hook in hooks:
        hook.remove()
    assert torch.equal(logits(pruned), skipped)
    assert not torch.equal(logits(source), skipped)
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 3 - len(drop)


def test_settings_of_each_layer_go_with_it(build_config, family_name):
    config = build_config(family_name)
    kept = [0, 2]
    sizes = target_sizes(config, PruneConfig(num_hidden_layers=2))
    target = target_config(config, sizes, kept)
    for key in PER_LAYER_KEYS:
        if getattr(config, key, None):
            assert getattr(target, key) == [getattr(config, key)[layer] for layer in kept]
    lists = {key for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == 3}
    assert lists <= set(PER_LAYER_KEYS) | {"architectures"}, "a list with one value per layer that nobody filters"


def test_layers_are_numbered_anew_and_the_cache_works(build_model, family_name, rows):
    """A layer that kept its old number would read another layer's cache, or none."""
    pruned = PrunerForCausalLM(build_model(family_name)).prune(PruneConfig(drop_layers=[0]))
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    prompt = rows[:2, :10]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = pruned.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, pruned.generate(prompt, use_cache=False, **settings))
    assert cached.shape == (2, 22)


def test_a_depth_plan_survives_json_and_is_checked():
    plan = make_plan(config_of(6), PruneConfig(drop_layers=[4, 1]))
    assert PrunePlan.from_json(plan.to_json()) == plan
    for kept in ([0, 2, 3], [2, 0, 3, 5], [0, 2, 3, 6], [0, 2, 2, 5]):
        with pytest.raises(ValueError, match="kept_layers must hold 4 different indices below 6, ascending"):
            dataclasses.replace(plan, kept_layers=kept)
    with pytest.raises(ValueError, match="kept_neurons must have a list for each of 4 kept layers"):
        dataclasses.replace(plan, kept_neurons=plan.kept_neurons[:3])


def test_width_and_depth_together_keep_rows_of_the_right_layers(build_model, rows):
    model = build_model("llama")
    scores = score_model(model, rows, progress=False)
    plan = make_plan(model.config, PruneConfig(intermediate_size=16, hidden_size=12, drop_layers=[0]), scores)
    pruned = PrunerForCausalLM(model).prune(plan)
    kept = model.model.layers[1].mlp.up_proj.weight[plan.kept_neurons[0]][:, plan.kept_hidden]
    assert torch.equal(pruned.model.layers[0].mlp.up_proj.weight, kept)
    assert isinstance(pruned, PreTrainedModel) and isinstance(pruned, LlamaForCausalLM)
