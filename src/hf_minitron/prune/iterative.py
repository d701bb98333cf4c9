"""Pruning in several steps with scoring in between (P1 2.2, "Iterative"); one step is the papers' choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from transformers import PreTrainedConfig

from hf_minitron.prune.plan import PrunePlan
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import SIZES, PruneConfig, source_sizes, target_config, target_sizes

Measure = Callable[[PrunerForCausalLM, PruneConfig], None]


def plan_iteratively(pruner: PrunerForCausalLM, prune: PruneConfig, measure: Measure) -> PrunePlan:
    """The plan for ``prune.iterations`` steps, from the source straight to the target.

    Before each step ``measure`` gets the model as pruned so far, and the sizes of the step, and is to score it and scan
    its layers as far as those sizes need. The models between are built in memory and dropped.
    """
    plan, current = None, pruner
    steps = step_sizes(pruner.config, prune)
    for sizes in steps:
        step = dataclasses.replace(prune, iterations=1, **sizes)
        measure(current, step)
        latest = current.plan(step)
        plan = latest if plan is None else compose_plans(plan, latest)
        if sizes is not steps[-1]:
            current = pruner.prune_in_memory(plan)
    plan.info["iterations"] = steps
    return plan


def compose_plans(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """The plan that does at once what ``second`` does to the result of ``first``; its ``info`` is the second's."""
    kept_layers = [first.kept_layers[i] for i in second.kept_layers]

    def through(name: str) -> list[list[int]]:
        before = getattr(first, name)
        return [[before[i][j] for j in kept] for i, kept in zip(second.kept_layers, getattr(second, name), strict=True)]

    return PrunePlan(
        sizes=second.sizes,
        source_sizes=first.source_sizes,
        kept_layers=kept_layers,
        kept_hidden=[first.kept_hidden[i] for i in second.kept_hidden],
        kept_neurons=through("kept_neurons"),
        kept_heads=through("kept_heads"),
        kept_key_value_heads=through("kept_key_value_heads"),
        info=second.info,
    )


def step_sizes(config: PreTrainedConfig, prune: PruneConfig) -> list[dict[str, int]]:
    """The sizes after each step, evenly spaced; hidden sizes that the config class refuses go up to the next it takes.

    Steps that change nothing are left out, so there may be fewer than ``prune.iterations``.
    """
    source, target = source_sizes(config), target_sizes(config, prune)
    found = [source]
    for number in range(1, prune.iterations + 1):
        sizes = {key: _between(source[key], target[key], number, prune.iterations) for key in SIZES}
        per_group = [size["num_attention_heads"] // size["num_key_value_heads"] for size in (source, target)]
        repeats = _between(*per_group, number, prune.iterations)
        sizes["num_attention_heads"] = sizes["num_key_value_heads"] * repeats
        while number < prune.iterations and not _is_taken(config, sizes):
            sizes["hidden_size"] += 1
        if sizes != found[-1]:
            found.append(sizes)
    return found[1:]


def _between(source: int, target: int, number: int, count: int) -> int:
    return source - (source - target) * number // count


def _is_taken(config: PreTrainedConfig, sizes: dict[str, int]) -> bool:
    """Whether the config class takes these sizes; the source's hidden size is the end of the search."""
    if sizes["hidden_size"] >= config.hidden_size:
        return True
    try:
        target_config(config, sizes)
    except ValueError:
        return False
    return True
