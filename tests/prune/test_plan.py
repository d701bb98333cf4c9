"""From sizes and scores to kept indices: what is kept, in what order, and which sizes are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, MistralConfig, Phi3Config

from hf_minitron.architectures import FAMILIES
from hf_minitron.prune.importance import ImportanceScores, Moments
from hf_minitron.prune.plan import PrunePlan, make_plan
from hf_minitron.prune.target import SIZES, PruneConfig, source_sizes, target_config, target_sizes

SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIG = LlamaConfig(**SETTINGS)
HALF = PruneConfig(hidden_size=12, intermediate_size=16, num_attention_heads=4)
REAL = {"llama": (32, 8), "mistral": (32, 8)}


# What is kept


def test_the_best_are_kept_in_ascending_order():
    scores = _scores(seed=0)
    plan = make_plan(CONFIG, HALF, scores)
    assert plan.kept_hidden == _best(scores.hidden, 12)
    assert plan.kept_neurons == [_best(row, 16) for row in scores.neurons]
    for row, heads in zip(scores.heads, plan.kept_heads, strict=True):
        first, second = _best(row[:3], 2), _best(row[3:], 2)
        assert heads == first + [3 + head for head in second]
    assert plan.kept_key_value_heads == [[0, 1]] * 3
    for kept in (plan.kept_hidden, *plan.kept_neurons, *plan.kept_heads, *plan.kept_key_value_heads):
        assert kept == sorted(set(kept))


def test_every_group_keeps_as_many_heads_even_if_one_is_better_throughout():
    scores = _scores(heads=torch.tensor([[9.0, 8.0, 7.0, 3.0, 1.0, 2.0]] * 3))
    plan = make_plan(CONFIG, PruneConfig(num_attention_heads=4), scores)
    assert plan.kept_heads == [[0, 1, 3, 5]] * 3


def test_groups_go_by_the_norm_of_their_heads_and_take_them_along():
    scores = _scores(heads=torch.tensor([[3.0, 3.0, 3.0, 5.0, 0.0, 0.0], [0.0, 9.0, 0.0, 1.0, 2.0, 3.0], [0.0] * 6]))
    plan = make_plan(CONFIG, PruneConfig(num_key_value_heads=1), scores)
    assert plan.sizes["num_attention_heads"] == 3
    assert plan.kept_key_value_heads == [[0], [0], [0]]
    assert plan.kept_heads == [[0, 1, 2]] * 3
    scores = _scores(heads=torch.tensor([[3.0, 3.0, 3.0, 5.3, 0.0, 0.0]] * 3))
    plan = make_plan(CONFIG, PruneConfig(num_key_value_heads=1, num_attention_heads=2), scores)
    assert plan.kept_key_value_heads == [[1]] * 3
    assert plan.kept_heads == [[3, 4]] * 3


def test_without_grouping_every_head_goes_with_its_own_keys_and_values():
    config = LlamaConfig(**SETTINGS | {"num_key_value_heads": 6})
    scores = _scores(heads=torch.tensor([[1.0, 6.0, 2.0, 5.0, 3.0, 4.0]] * 3))
    plan = make_plan(config, PruneConfig(num_attention_heads=4), scores)
    assert plan.kept_heads == plan.kept_key_value_heads == [[1, 3, 4, 5]] * 3
    assert (plan.sizes["num_attention_heads"], plan.sizes["num_key_value_heads"]) == (4, 4)
    assert plan == make_plan(config, PruneConfig(num_key_value_heads=4), scores)


def test_ties_go_to_the_lower_index():
    scores = _scores(neurons=torch.ones(3, 40), hidden=torch.ones(24), heads=torch.ones(3, 6))
    plan = make_plan(CONFIG, HALF, scores)
    assert plan.kept_hidden == list(range(12))
    assert plan.kept_neurons == [list(range(16))] * 3
    assert plan.kept_heads == [[0, 1, 3, 4]] * 3
    hidden = torch.ones(24)
    hidden[20] = 2
    assert make_plan(CONFIG, HALF, _scores(hidden=hidden)).kept_hidden == [*range(11), 20]


def test_the_plan_is_deterministic():
    assert make_plan(CONFIG, HALF, _scores(seed=3)) == make_plan(CONFIG, HALF, _scores(seed=3))
    assert make_plan(CONFIG, HALF, _scores(seed=3)) != make_plan(CONFIG, HALF, _scores(seed=4))


def test_what_does_not_shrink_needs_no_scores():
    plan = make_plan(CONFIG, PruneConfig())
    assert plan.sizes == plan.source_sizes == source_sizes(CONFIG)
    assert plan.kept_hidden == list(range(24))
    assert plan.kept_neurons == [list(range(40))] * 3
    assert plan.kept_heads == [list(range(6))] * 3
    assert plan.kept_key_value_heads == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("prune", "axis"),
    [
        (PruneConfig(hidden_size=12), "hidden"),
        (PruneConfig(intermediate_size=12), "neurons"),
        (PruneConfig(num_attention_heads=4), "heads"),
        (PruneConfig(num_key_value_heads=1), "heads"),
    ],
)
def test_what_shrinks_needs_its_scores(prune: PruneConfig, axis: str):
    with pytest.raises(ValueError, match=rf"shrinks, which needs importance scores of '{axis}'. Call score\(\) first"):
        make_plan(CONFIG, prune)
    others = _scores()
    others.moments = {key: value for key, value in others.moments.items() if not key.startswith(axis)}
    with pytest.raises(ValueError, match=rf"axis '{axis}' was not scored"):
        make_plan(CONFIG, prune, others)
    assert make_plan(CONFIG, prune, _scores()).sizes == target_sizes(CONFIG, prune)


def test_scores_of_a_model_of_another_shape_are_refused():
    for settings in ({"hidden_size": 48}, {"intermediate_size": 80}, {"num_attention_heads": 12}):
        config = LlamaConfig(**SETTINGS | settings)
        with pytest.raises(ValueError, match="belong to another model"):
            make_plan(config, HALF, _scores())


def test_scores_of_a_model_with_more_or_fewer_layers_are_refused():
    for layers in (2, 4):
        with pytest.raises(ValueError, match="belong to another model"):
            make_plan(LlamaConfig(**SETTINGS | {"num_hidden_layers": layers}), HALF, _scores())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_with_nan_or_inf_are_refused(value: float):
    hidden = torch.ones(24)
    hidden[3] = value
    with pytest.raises(ValueError, match="scores of 'hidden' hold NaN or Inf"):
        make_plan(CONFIG, HALF, _scores(hidden=hidden))


# Head residual (P1 2.3)


@pytest.mark.parametrize(
    ("keep", "pairs"),
    [
        (3, [[5, 0]]),  # L = 4, K = 3: only the third takes on the fourth
        (2, [[2, 0], [1, 5]]),  # the most important of the removed goes to the least important of the kept
        (4, []),
    ],
)
def test_pairs_of_kept_and_removed_heads(keep: int, pairs: list):
    """Heads in the order of importance are 2, 1, 5, 0 of a group of four (3 and 4 are another's)."""
    config = LlamaConfig(**SETTINGS | {"num_attention_heads": 4, "num_key_value_heads": 1})
    order = {2: 0, 1: 1, 5: 2, 0: 3}
    scores = _scores(heads=torch.tensor([[9.0, 8.0, 7.0, 6.0]] * 3))
    plan = make_plan(config, PruneConfig(num_attention_heads=keep, head_residual=True), scores)
    expected = sorted([order[kept], order[removed]] for kept, removed in pairs)
    assert [sorted(layer) for layer in plan.head_residuals] == [expected] * 3
    assert make_plan(config, PruneConfig(num_attention_heads=keep), scores).head_residuals == []
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_pairs_stay_inside_their_group():
    scores = _scores(heads=torch.tensor([[1.0, 3.0, 2.0, 6.0, 4.0, 5.0]] * 3))
    plan = make_plan(CONFIG, PruneConfig(num_attention_heads=4, head_residual=True), scores)
    assert plan.kept_heads == [[1, 2, 3, 5]] * 3
    assert plan.head_residuals == [[[2, 0], [5, 4]]] * 3


def test_without_grouping_all_heads_of_a_layer_are_paired():
    config = LlamaConfig(**SETTINGS | {"num_key_value_heads": 6})
    scores = _scores(heads=torch.tensor([[1.0, 6.0, 2.0, 5.0, 3.0, 4.0]] * 3))
    plan = make_plan(config, PruneConfig(num_attention_heads=4, head_residual=True), scores)
    assert plan.kept_heads == [[1, 3, 4, 5]] * 3
    assert [sorted(pairs) for pairs in plan.head_residuals] == [[[4, 2], [5, 0]]] * 3


def test_more_removed_than_kept_heads_cannot_be_paired():
    with pytest.raises(ValueError, match=r"1 of 3 query heads of each key/value group stay\. Keep at least 2"):
        target_sizes(CONFIG, PruneConfig(num_attention_heads=2, head_residual=True))
    config = LlamaConfig(**SETTINGS | {"num_key_value_heads": 6})
    with pytest.raises(ValueError, match=r"2 of 6 query heads of each layer stay\. Keep at least 3"):
        target_sizes(config, PruneConfig(num_attention_heads=2, head_residual=True))
    assert target_sizes(config, PruneConfig(num_attention_heads=3, head_residual=True))["num_attention_heads"] == 3


@pytest.mark.parametrize("pairs", [[[[0, 2]], [[1, 2]], [[2, 0]]], [[[0, 2]]], [[[0, 9]]] * 3])
def test_pairs_that_do_not_go_with_the_plan(pairs: list):
    scores = _scores(heads=torch.tensor([[9.0, 8.0, 7.0, 9.0, 8.0, 7.0]] * 3))
    plan = make_plan(CONFIG, PruneConfig(num_attention_heads=4), scores)
    with pytest.raises(ValueError, match=r"head_residuals=|shorter|longer"):
        dataclasses.replace(plan, head_residuals=pairs)


# Random


def test_random_is_reproducible_and_needs_no_scores():
    plans = [make_plan(CONFIG, dataclasses.replace(HALF, method="random", seed=seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].info == {"method": "random", "seed": 0}
    for axis in ("kept_hidden", "kept_neurons", "kept_heads"):
        assert getattr(plans[0], axis) != getattr(plans[2], axis)
    assert plans[0].kept_neurons[0] != plans[0].kept_neurons[1]
    assert plans[0] == make_plan(CONFIG, dataclasses.replace(HALF, method="random"), _scores())


def test_random_keeps_everything_equally_often():
    counts = torch.zeros(24)
    for seed in range(400):
        plan = make_plan(CONFIG, PruneConfig(hidden_size=12, method="random", seed=seed))
        counts[plan.kept_hidden] += 1
    assert counts.min() > 150 and counts.max() < 250  # 200 ± 5 standard deviations


@pytest.mark.parametrize("method", ["l2", "", None, "Random"])
def test_unknown_method(method):
    with pytest.raises(ValueError, match=r"is unknown. Use one of minitron, refit, random"):
        PruneConfig(method=method)


# JSON


def test_json_round_trip(tmp_path: Path):
    plan = make_plan(CONFIG, HALF, _scores())
    plan.info["model"] = {"id": "a/b", "commit": "c"}
    assert PrunePlan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["kept_hidden"] == plan.kept_hidden


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kept_hidden": [1]}'])
def test_what_is_no_plan(text: str):
    with pytest.raises(ValueError, match="this is no plan"):
        PrunePlan.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kept_hidden", [1, 0, *range(2, 12)]),
        ("kept_hidden", [0, 0, *range(2, 12)]),
        ("kept_hidden", [-1, *range(11)]),
        ("kept_hidden", [*range(11), 24]),
        ("kept_hidden", [*range(11)]),
        ("kept_neurons", [[*range(16)], [*range(16)], [*range(15), 40]]),
        ("kept_heads", [[0, 1, 2, 3]] * 3),
        ("kept_heads", [[0, 1, 3, 6]] * 3),
        ("kept_key_value_heads", [[0, 2]] * 3),
        ("kept_key_value_heads", [[1, 0]] * 3),
    ],
)
def test_a_plan_that_was_edited_badly(key: str, value: list):
    values = json.loads(make_plan(CONFIG, HALF, _scores()).to_json())
    with pytest.raises(ValueError, match=rf"{key}.*Plan again|kept_heads.*Plan again"):
        PrunePlan.from_json(json.dumps(values | {key: value}))


# Sizes


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, "source + 1", 2.5, "8", True])
def test_sizes_out_of_range_name_the_size_that_was_given(key: str, value):
    if value == "source + 1":
        value = SETTINGS[key] + 1
    pattern = rf"^{key}={value!r}: pruning keeps between 1 and the source's {SETTINGS[key]}\."
    with pytest.raises(ValueError, match=pattern):
        target_sizes(CONFIG, PruneConfig(**{key: value}))


@pytest.mark.parametrize("key", SIZES)
def test_the_ends_of_the_range_are_allowed(key: str):
    assert target_sizes(CONFIG, PruneConfig(**{key: SETTINGS[key]})) == source_sizes(CONFIG)
    smallest = {key: 2 if key == "num_attention_heads" else 1}
    assert target_sizes(CONFIG, PruneConfig(**smallest))[key] == smallest[key]


@pytest.mark.parametrize("name", REAL)
def test_heads_that_are_no_multiple_of_the_groups_list_what_is(name: str):
    heads, groups = REAL[name]
    config = CONFIG_MAPPING[name](num_attention_heads=heads, num_key_value_heads=groups)
    with pytest.raises(ValueError, match=r"num_attention_heads=20 .*num_key_value_heads=8.*Use one of 8, 16, 24, 32\."):
        target_sizes(config, PruneConfig(num_attention_heads=20))
    with pytest.raises(ValueError, match=r"num_attention_heads=4 .*Use one of 8, 16, 24, 32\."):
        target_sizes(config, PruneConfig(num_attention_heads=4))


def test_groups_cannot_take_more_heads_than_they_have():
    with pytest.raises(
        ValueError, match=r"num_attention_heads=6 does not fit num_key_value_heads=1.*Use one of 1, 2, 3\."
    ):
        target_sizes(CONFIG, PruneConfig(num_attention_heads=6, num_key_value_heads=1))


def test_hidden_sizes_that_the_config_class_refuses():
    """Llama wants a multiple of its heads, even though head_dim is set; Mistral does not."""
    prune = PruneConfig(hidden_size=14)
    with pytest.raises(
        ValueError, match=r"LlamaConfig cannot represent hidden_size=14.*multiples of 6 heads: 12, 18\."
    ):
        target_config(CONFIG, target_sizes(CONFIG, prune))
    config = MistralConfig(**SETTINGS)
    assert target_config(config, target_sizes(config, prune)).hidden_size == 14


def test_rotary_factors_that_the_config_class_counts_by_the_hidden_size():
    """Phi-3 with long rope wants as many factors as hidden_size / num_attention_heads / 2, whatever head_dim says."""
    factors = [1.0, 2.0]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    sizes = SETTINGS | {"head_dim": 4, "num_key_value_heads": 6, "pad_token_id": None}
    config = Phi3Config(**sizes, rope_parameters=rope | {"original_max_position_embeddings": 4096, "factor": 2.0})
    for prune in (PruneConfig(hidden_size=12), PruneConfig(num_attention_heads=3)):
        with pytest.raises(ValueError, match=r"Phi3Config cannot .*short_factor.*source's 4 channels per head"):
            target_config(config, target_sizes(config, prune))
    for prune in (PruneConfig(intermediate_size=16), PruneConfig(hidden_size=12, num_attention_heads=3)):
        assert target_config(config, target_sizes(config, prune)).head_dim == 4


@pytest.mark.parametrize(
    ("name", "key", "reason"),
    [(name, key, reason) for name, family in FAMILIES.items() for key, reason in family.fixed.items()],
)
def test_what_a_family_cannot_drop_is_refused_with_the_reason(name: str, key: str, reason: str):
    config = CONFIG_MAPPING[name](**SETTINGS | {"num_key_value_heads": 6, "pad_token_id": None})
    assert reason.rstrip(".") and len(reason) > 40
    with pytest.raises(ValueError, match=rf"=3: {name} keeps its 6, for {re.escape(reason)}\.$"):
        target_sizes(config, PruneConfig(**{key: 3}))
    assert target_sizes(config, PruneConfig(hidden_size=12, intermediate_size=16, **{key: 6}))["hidden_size"] == 12


def test_norms_over_all_heads_are_named():
    """OLMo 2 cannot lose heads exactly; were the row to forget it, the models would be wrong without a word."""
    assert set(FAMILIES["olmo2"].fixed) == {"num_attention_heads", "num_key_value_heads"}


def test_what_a_family_has_beyond_sizes_stays(build_config, half_of, family_name):
    """Windows, layer types, layers without rotary embedding, factors and caps of every family."""
    config = build_config(family_name)
    prune = half_of(config)
    before, after = config.to_dict(), target_config(config, target_sizes(config, prune)).to_dict()
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {key for key in SIZES if getattr(prune, key) is not None}
    assert after["head_dim"] == 8


def test_everything_else_in_the_config_stays():
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    config = LlamaConfig(**SETTINGS, rope_parameters=rope, rms_norm_eps=3e-5, hidden_act="gelu", own_setting=7)
    config.dtype = torch.bfloat16
    target = target_config(config, target_sizes(config, HALF))
    changed = {key for key, value in target.to_dict().items() if value != config.to_dict().get(key)}
    assert changed == {"hidden_size", "intermediate_size", "num_attention_heads"}
    assert (target.rope_parameters, target.head_dim, target.own_setting) == (rope, 8, 7)
    assert target.dtype == torch.bfloat16
    assert config.hidden_size == 24


def _scores(seed: int = 0, **axes: torch.Tensor) -> ImportanceScores:
    """Scores as given, random where not."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"neurons": (3, 40), "heads": (3, 6), "hidden": (24,)}
    values = {axis: axes.get(axis, torch.rand(shape, generator=generator)) for axis, shape in shapes.items()}
    scores = ImportanceScores(("mean", "mean"), head_dim=1)
    for index in range(3):
        scores.moments[f"neurons.{index}"] = _moments(values["neurons"][index])
        scores.moments[f"heads.{index}"] = _moments(values["heads"][index])
    scores.moments["hidden.0.input_layernorm"] = _moments(values["hidden"])
    return scores


def _moments(values: torch.Tensor) -> Moments:
    return Moments(1, values.double(), torch.zeros_like(values).double())


def _best(values: torch.Tensor, keep: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda index: (-values[index].item(), index))[:keep])
