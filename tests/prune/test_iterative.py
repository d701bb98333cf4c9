"""Pruning in steps: the sizes between, one plan at the end, and that one step is one shot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_minitron.prune.importance import score_model
from hf_minitron.prune.iterative import compose_plans, plan_iteratively, step_sizes
from hf_minitron.prune.plan import make_plan
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig, source_sizes, target_sizes

HALF = PruneConfig(hidden_size=12, intermediate_size=16, num_attention_heads=4)


def measure_with(rows: torch.Tensor, seen: list | None = None):
    """Scores the model at hand on ``rows``, and scans its layers where they shrink; notes the models it saw."""

    def measure(pruner: PrunerForCausalLM, prune: PruneConfig) -> None:
        pruner.score(rows, progress=False)
        num_dropped = pruner.config.num_hidden_layers - prune.num_hidden_layers
        if num_dropped:
            pruner.scan_layers(rows, num_dropped=num_dropped, progress=False)
        if seen is not None:
            seen.append(source_sizes(pruner.config))

    return measure


def test_one_step_is_one_shot(source_of_heads, rows):
    pruner = PrunerForCausalLM(source_of_heads)
    plan = plan_iteratively(pruner, dataclasses.replace(HALF, iterations=1), measure_with(rows))
    pruner.score(rows, progress=False)
    once = pruner.plan(HALF)
    assert dataclasses.replace(plan, info={}) == dataclasses.replace(once, info={})


def test_every_step_scores_what_is_left(build_model, rows, logits):
    """Two steps equal pruning twice by hand, and the model between is really scored."""
    model, seen = build_model(), []
    prune = dataclasses.replace(HALF, iterations=2)
    plan = plan_iteratively(PrunerForCausalLM(model), prune, measure_with(rows, seen))
    assert [sizes["intermediate_size"] for sizes in seen] == [40, 28]
    between = PruneConfig(**step_sizes(model.config, prune)[0])
    half_way = PrunerForCausalLM(model).prune(make_plan(model.config, between, score_model(model, rows)))
    by_hand = PrunerForCausalLM(half_way).prune(
        make_plan(half_way.config, HALF, score_model(half_way, rows, progress=False))
    )
    pruned = PrunerForCausalLM(model).prune(plan)
    assert torch.equal(logits(pruned), logits(by_hand))
    assert plan.info["iterations"] == step_sizes(model.config, prune)
    once = make_plan(model.config, HALF, score_model(model, rows, progress=False))
    assert plan.kept_neurons != once.kept_neurons, "this source cannot tell one step from two"


def test_layers_go_in_steps_too(build_model, rows):
    model, seen = build_model(num_hidden_layers=6), []
    prune = PruneConfig(num_hidden_layers=2, intermediate_size=20, iterations=2)
    plan = plan_iteratively(PrunerForCausalLM(model), prune, measure_with(rows, seen))
    assert [sizes["num_hidden_layers"] for sizes in seen] == [6, 4]
    assert plan.sizes["num_hidden_layers"] == len(plan.kept_layers) == len(plan.kept_neurons) == 2
    pruned = PrunerForCausalLM(model).prune(plan)
    first = plan.kept_layers[0]
    kept = model.model.layers[first].mlp.up_proj.weight[plan.kept_neurons[0]]
    assert torch.equal(pruned.model.layers[0].mlp.up_proj.weight, kept)


def test_plans_compose(build_model, rows, logits):
    model = build_model(num_hidden_layers=4)
    first = make_plan(model.config, PruneConfig(method="random", seed=1, num_hidden_layers=3, hidden_size=18))
    middle = PrunerForCausalLM(model).prune(first)
    second = make_plan(middle.config, PruneConfig(method="random", seed=2, num_hidden_layers=2, num_key_value_heads=1))
    twice = PrunerForCausalLM(middle).prune(second)
    once = PrunerForCausalLM(model).prune(compose_plans(first, second))
    assert torch.equal(logits(once), logits(twice))


def test_sizes_between_are_even_and_allowed(build_config):
    config = build_config("llama", num_hidden_layers=6)
    steps = step_sizes(config, PruneConfig(hidden_size=12, intermediate_size=10, num_hidden_layers=3, iterations=3))
    assert [sizes["intermediate_size"] for sizes in steps] == [30, 20, 10]
    assert [sizes["num_hidden_layers"] for sizes in steps] == [5, 4, 3]
    assert [sizes["hidden_size"] for sizes in steps] == [24, 18, 12]  # 20 and 16 are no multiples of Llama's 6 heads
    free = build_config("mistral", num_hidden_layers=6)
    assert [s["hidden_size"] for s in step_sizes(free, PruneConfig(hidden_size=12, iterations=3))] == [20, 16, 12]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_the_last_step_is_the_target_and_heads_fit_their_groups(build_config, family, iterations):
    config = build_config(family)
    prune = PruneConfig(num_attention_heads=1, num_key_value_heads=1, hidden_size=6, iterations=iterations)
    steps = step_sizes(config, prune)
    assert steps[-1] == target_sizes(config, prune)
    for sizes in steps:
        assert sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0
        target_sizes(config, PruneConfig(**sizes))
    assert len({tuple(sizes.values()) for sizes in steps}) == len(steps)


@pytest.mark.parametrize("other", [{"drop_layers": [1]}, {"head_residual": True}, {"method": "random"}])
def test_what_does_not_go_with_steps(other: dict):
    with pytest.raises(ValueError, match="iterations=2 scores again before each step"):
        PruneConfig(iterations=2, **other)


def test_wrong_numbers(build_model):
    with pytest.raises(ValueError, match="iterations=0: pruning takes at least one step"):
        PruneConfig(iterations=0)
    with pytest.raises(ValueError, match=r"iterations=2 scores between the steps: call plan_iteratively\(\)"):
        PrunerForCausalLM(build_model()).plan(dataclasses.replace(HALF, iterations=2))
