"""The search: the paper's spaces, counts that equal the built models', what fits, what is left out and why."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from hf_minitron.architectures import get_head_dim
from hf_minitron.prune import counting
from hf_minitron.prune.counting import SizeCounter, cache_bytes, cache_tokens
from hf_minitron.prune.search import Budget, SearchSpace, list_candidates
from hf_minitron.prune.target import PruneConfig, count_parameters, source_sizes, target_config, target_sizes

NEMOTRON_15B = {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
FACTORS = [2.5, 3, 3.5, 4]
SPACE_4B = {"hidden_size": [2560, 3072, 3584, 4096, 4608], "num_attention_heads": [24, 32, 48]}
SPACE_8B = {"hidden_size": [4096, 4608, 5120, 5632, 6144], "num_attention_heads": [32, 48]}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(("space", "parameters"), [(SPACE_4B, 4e9), (SPACE_8B, 8e9)], ids=["4B", "8B"])
def test_the_papers_spaces_have_eighteen_candidates(space, parameters):
    """P1 2.3: layers 29-32, feed-forward 2.5 to 4 times the hidden size, within 5 % of the budget."""
    config = CONFIG_MAPPING["nemotron"](**NEMOTRON_15B)
    space = SearchSpace(num_hidden_layers=[29, 30, 31, 32], intermediate_factor=FACTORS, **space)
    listing = list_candidates(config, space, Budget(parameters))
    assert len(listing.candidates) == 18
    assert all(abs(c.total - parameters) <= 0.05 * parameters for c in listing.candidates)
    one = listing.candidates[len(listing.candidates) // 2]
    built = count_parameters(target_config(config, one.sizes))
    assert (one.total, one.non_embedding) == (built["total"], built["non_embedding"])


def test_counts_equal_those_of_the_built_model(source, half_of):
    config, counter = source.config, SizeCounter(source.config)
    for prune in (
        PruneConfig(),
        PruneConfig(num_hidden_layers=2),
        half_of(config),
        half_of(config, num_hidden_layers=1),
    ):
        sizes = target_sizes(config, prune)
        built = count_parameters(target_config(config, sizes))
        assert (counter.total(sizes), counter.non_embedding(sizes)) == (built["total"], built["non_embedding"])


def test_cache_bytes_equal_those_of_a_real_cache(source, rows):
    """Rows are 16 tokens, sliding windows 8."""
    check_cache(source, rows)


def test_cache_bytes_of_a_window_without_layer_types(build_model, rows):
    model = build_model("mistral", sliding_window=8)
    assert cache_tokens(model.config, 16) == [7, 7, 7] and cache_tokens(model.config, 5) == [5, 5, 5]
    check_cache(model, rows)


def check_cache(model, rows):
    config, cache = model.config, DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=rows, past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    tokens = cache_tokens(config, rows.shape[1])
    assert cache_bytes(source_sizes(config), tokens, len(rows), get_head_dim(config), torch.float32) == held


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_cache_bytes_of_fewer_layers_are_the_most_that_any_choice_of_them_takes(build_config, family):
    config = build_config(family)
    tokens = cache_tokens(config, 16)
    assert len(set(tokens)) == 2
    sizes = source_sizes(config) | {"num_hidden_layers": 2}
    most = max(
        sum(cache_tokens(target_config(config, sizes, kept), 16)) for kept in itertools.combinations(range(3), 2)
    )
    assert cache_bytes(sizes, tokens, 1, 8, torch.bfloat16) == 2 * config.num_key_value_heads * 8 * 2 * most


def test_memory_is_weights_and_cache_in_the_asked_dtype_and_a_limit(build_config):
    config = build_config("mistral", sliding_window=None)
    space, request = SearchSpace(hidden_size=[8, 12, 16, 20]), {"budget_batch_size": 3, "budget_context_length": 50}
    everything = list_candidates(config, space, Budget(1e9, "memory", 1.0, budget_dtype="float32", **request))
    costs = {c.sizes["hidden_size"]: c.cost for c in everything.candidates}
    assert costs[16] == 4 * everything.candidates[2].total + 3 * 50 * 3 * 2 * 2 * 8 * 4  # layers, k and v, groups
    half = list_candidates(config, space, Budget(1e9, "memory", 1.0, budget_dtype="bfloat16", **request))
    assert [2 * c.cost for c in half.candidates] == [c.cost for c in everything.candidates]
    limit = Budget(costs[16], "memory", 0.5, budget_dtype="float32", **request)
    fitting = list_candidates(config, space, limit).candidates
    assert max(c.cost for c in fitting) == costs[16] and min(c.cost for c in fitting) >= 0.5 * costs[16]


def test_non_embedding_budgets_leave_embedding_and_head_out(build_config):
    config = build_config("llama")
    wanted = count_parameters(target_config(config, target_sizes(config, PruneConfig(12))))["non_embedding"]
    listing = list_candidates(config, SearchSpace(hidden_size=[8, 12, 16]), Budget(wanted, "non_embedding", 1e-6))
    assert [c.sizes["hidden_size"] for c in listing.candidates] == [12]


def test_latency_is_measured_on_what_can_be_built_and_a_limit():
    config, asked = CONFIG_MAPPING["llama"](**LLAMA_8B), []

    def latency(target):
        asked.append(target.hidden_size)
        return target.hidden_size / 1000

    space = SearchSpace(hidden_size=[1000, 2048, 3072, 4096, 5000])
    listing = list_candidates(config, space, Budget(3.1, "latency", 0.2), latency=latency)
    assert asked == [2048, 3072]  # 1000 is no multiple of 32 heads, 4096 the source, 5000 too big
    assert [(c.sizes["hidden_size"], c.cost) for c in listing.candidates] == [(3072, 3.072)]
    with pytest.raises(ValueError, match="latency="):
        list_candidates(config, space, Budget(3.1, "latency"))


def test_axes_left_out_keep_the_sources_sizes(build_config):
    config = build_config("llama")
    (one,) = list_candidates(config, SearchSpace(intermediate_size=[16]), Budget(1e4, tolerance=0.9)).candidates
    assert one.sizes == {**source_sizes(config), "intermediate_size": 16}
    assert one.name == "layers3-hidden24-ffn16-heads6-kv2"


def test_factors_are_rounded_and_given_once(build_config):
    space = SearchSpace(hidden_size=[10, 24], intermediate_factor=[1.34, 1.26, 1.26, 1.3])
    budget = Budget(1e4, tolerance=0.95)
    listing = list_candidates(build_config("mistral"), space, budget)
    found = [(c.sizes["hidden_size"], c.sizes["intermediate_size"]) for c in listing.candidates]
    assert found == [(10, 13), (24, 30), (24, 31), (24, 32)]


def test_the_order_does_not_depend_on_the_order_of_choices(build_config):
    budget = Budget(1e4, tolerance=0.9)
    one = SearchSpace(num_hidden_layers=[1, 2, 3], hidden_size=[8, 16, 24], intermediate_size=[10, 20])
    other = SearchSpace(num_hidden_layers=[3, 1, 2, 2], hidden_size=[24, 8, 16], intermediate_size=[20, 10])
    listings = [list_candidates(build_config("llama"), space, budget) for space in (one, other)]
    assert listings[0] == listings[1]
    names = [c.name for c in listings[0].candidates]
    assert len(names) == len(set(names)) > 5
    sizes = [tuple(c.sizes.values()) for c in listings[0].candidates]
    assert sizes == sorted(sizes)


def test_what_cannot_be_made_is_left_out_with_reasons_grouped():
    config = CONFIG_MAPPING["llama"](**LLAMA_8B)
    space = SearchSpace(
        num_hidden_layers=[31, 32],
        hidden_size=[3000, 3040, 3072, 4096, 8192],
        num_attention_heads=[12, 20, 32],
    )
    listing = list_candidates(config, space, Budget(5e9, tolerance=0.9))
    assert (
        listing.num_combinations == 30 and len(listing.candidates) == 5
    )  # 31 or 32 layers, 3040, 3072 or 4096; one less
    found = {group.example.split(":")[0]: group.count for group in listing.left_out}
    assert found == {
        "num_attention_heads=12 does not fit num_key_value_heads=8": 20 - 4,
        "hidden_size=8192": 6,
        "the source itself": 1,
        "LlamaConfig cannot represent num_hidden_layers=31, hidden_size=3000": 2,
    }
    assert sum(found.values()) + len(listing.candidates) == listing.num_combinations


def test_what_a_family_fixes_is_left_out(build_config):
    config = build_config("olmo2")
    listing = list_candidates(
        config, SearchSpace(hidden_size=[12, 24], num_attention_heads=[4, 6]), Budget(1e4, tolerance=0.9)
    )
    assert [c.sizes["num_attention_heads"] for c in listing.candidates] == [6]
    assert any(group.count == 2 and "olmo2 keeps its 6" in group.example for group in listing.left_out)


def test_how_candidates_are_pruned_is_checked_too(build_config):
    space, budget = SearchSpace(num_attention_heads=[2, 4]), Budget(1e4, tolerance=0.9)
    kept = {
        residual: [
            c.sizes["num_attention_heads"]
            for c in list_candidates(
                build_config("llama"), space, budget, prune=PruneConfig(head_residual=residual)
            ).candidates
        ]
        for residual in (False, True)
    }
    assert kept == {False: [2, 4], True: [4]}  # of three heads in a group one cannot take on two


def test_no_candidate_is_an_error_with_the_nearest():
    config = CONFIG_MAPPING["llama"](**LLAMA_8B)
    space = SearchSpace(hidden_size=[2048, 3000, 3072], intermediate_factor=[2.5, 3])
    with pytest.raises(ValueError) as error:
        list_candidates(config, space, Budget(4e9, tolerance=0.001))
    lines = str(error.value).splitlines()
    assert lines[0] == "none of 6 combinations fits total: 4,000,000,000 parameters within 0.1 %."
    assert lines[2].startswith("  layers32-hidden3072-ffn7680-heads32-kv8: 4,0")
    assert [line.split("-")[1] for line in lines[2:6]] == ["hidden3072", "hidden3072", "hidden2048", "hidden2048"]
    assert "--tolerance" in lines[-1]


def test_thousands_of_combinations_build_one_model(monkeypatch):
    built, build = [], counting.build_empty
    monkeypatch.setattr(counting, "build_empty", lambda config: built.append(config) or build(config))
    space = SearchSpace(
        num_hidden_layers=list(range(20, 33)),
        hidden_size=list(range(2048, 4097, 128)),
        intermediate_factor=FACTORS,
        num_attention_heads=[8, 16, 32],
    )
    listing = list_candidates(CONFIG_MAPPING["llama"](**LLAMA_8B), space, Budget(4e9, tolerance=0.01))
    assert listing.num_combinations == 2652 and len(listing.candidates) > 20 and len(built) == 1


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"hidden_size": []}, r"hidden_size=\[\]: an axis needs positive sizes"),
        ({"num_hidden_layers": [2, 0]}, r"num_hidden_layers=\[2, 0\]"),
        ({"num_attention_heads": [2.5]}, r"num_attention_heads=\[2.5\]"),
        ({"intermediate_factor": [-1.0]}, r"intermediate_factor=\[-1.0\]"),
        ({"intermediate_size": [16], "intermediate_factor": [2.0]}, "Give one"),
    ],
)
def test_axes_without_sense_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**space)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"budget": 0}, "budget=0: it must be above 0, in parameters"),
        ({"budget": float("nan"), "budget_on": "memory"}, "in bytes"),
        ({"budget": 1, "tolerance": 0}, "tolerance=0: it is a share"),
        ({"budget": 1, "tolerance": -0.05}, "tolerance=-0.05"),
        ({"budget": 1, "budget_on": "flops"}, "budget_on='flops' is unknown. Use one of total, non_embedding, memory"),
        ({"budget": 1, "budget_context_length": 0}, "budget_context_length=0"),
        ({"budget": 1, "budget_dtype": "int4"}, "dtype='int4'"),
    ],
)
def test_budgets_without_sense_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget(**budget)
