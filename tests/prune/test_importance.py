"""Scores against their definition over stacked activations, their invariances, and planted rankings."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from hf_minitron.architectures import get_family
from hf_minitron.prune.importance import check_aggregation, check_axes, check_neuron_signal, score_model
from hf_minitron.prune.scores import AXES, NEURON_SIGNALS, STATISTICS, ImportanceScores

PAIRS = list(itertools.product(STATISTICS, STATISTICS))
REDUCE = {  # over the first axis, straight from the definition
    "l2": lambda x: x.square().sum(0).sqrt(),
    "mean": lambda x: x.mean(0),
    "var": lambda x: (x - x.mean(0)).square().mean(0),
}


# Against the definition


@pytest.mark.parametrize("aggregation", PAIRS, ids="-".join)
def test_scores_equal_the_definition_over_stacked_activations(build_model, rows, family_name, aggregation):
    model = build_model(family_name)
    seen = _activations(model, rows)
    scores = _score(model, rows, aggregation=aggregation, batch_size=3)
    layers = range(model.config.num_hidden_layers)
    family = get_family(model.config)

    neurons = torch.stack([_reduce(seen[f"{i}.{family.neuron_site}"], aggregation) for i in layers])
    assert_close(scores.neurons, neurons)
    assert scores.neuron_signal == "down_proj_input"

    channels = torch.stack([_reduce(seen[f"{i}.{family.head_site}"], aggregation) for i in layers])
    assert_close(scores.heads, torch.stack([part.square().sum(1).sqrt() for part in channels.split(8, dim=1)], 1))

    norms = [_reduce(seen[f"{i}.{site}"], aggregation) for i in layers for site in family.norm_sites]
    assert_close(scores.hidden, torch.stack(norms).sum(0))

    streams = [seen[f"{i}.in"].double() for i in layers] + [seen["out"].double()]
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(streams)]
    torch.testing.assert_close(scores.layers.double(), 1 - torch.stack(cosines), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", PAIRS, ids="-".join)
def test_neurons_by_their_first_projection_equal_the_definition(
    build_model, rows, family_name, aggregation, projections
):
    """X·W1ᵀ of P1 2.2 from what enters the feed-forward block; of a gated block W1 is what the activation is on."""
    model = build_model(family_name)
    scores = _score(model, rows, aggregation=aggregation, neuron_signal="first_projection", batch_size=3)
    seen, expected = _activations(model, rows), []
    for index, layer in enumerate(model.model.layers):
        projected = [
            torch.nn.functional.linear(seen[f"{index}.mlp"], part["weight"], part.get("bias"))
            for part in projections(model, index, "ffn")
        ]
        activation = getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn
        passed_on = activation(projected[0]) * (projected[1] if len(projected) > 1 else 1)
        assert_close(seen[f"{index}.mlp.down_proj"], passed_on, rtol=1e-5)  # so projected[0] is W1
        expected.append(_reduce(projected[0], aggregation))
    assert_close(scores.neurons, torch.stack(expected))
    assert scores.neuron_signal == scores.as_dict()["neuron_signal"] == "first_projection"


def test_the_first_projection_is_read_with_its_bias(build_model, rows):
    model = build_model(mlp_bias=True)
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data.zero_()
    scores = _score(model, rows, aggregation=("mean", "mean"), neuron_signal="first_projection")
    biases = torch.stack([layer.mlp.gate_proj.bias.data.abs() for layer in model.model.layers])
    assert_close(scores.neurons, biases)


@pytest.mark.parametrize("signal", NEURON_SIGNALS)
def test_the_signal_concerns_neurons_alone(build_model, rows, family_name, signal):
    model = build_model(family_name)
    default, scores = _score(model, rows), _score(model, rows, neuron_signal=signal)
    for axis in ("heads", "hidden", "layers"):
        assert torch.equal(getattr(scores, axis), getattr(default, axis))
    assert torch.equal(scores.neurons, default.neurons) == (signal == "down_proj_input")
    without = _score(model, rows, axes=("hidden",), neuron_signal=signal)
    assert without.neuron_signal is None and "neuron_signal" not in without.as_dict()


def test_shapes_and_what_was_seen(build_model, rows):
    scores = _score(build_model(), rows)
    assert scores.neurons.shape == (3, 40)
    assert scores.heads.shape == (3, 6)
    assert scores.hidden.shape == (24,)
    assert scores.layers.shape == (3,)
    assert scores.axes == AXES
    assert (scores.aggregation, scores.head_dim) == (("l2", "mean"), 8)
    assert (scores.info["num_samples"], scores.info["num_tokens"]) == (7, 112)


def test_the_mean_over_tokens_is_of_absolute_values(build_model, rows):
    """With down_proj's input negated nothing changes: importance has no sign."""
    model, flipped = build_model(), build_model()
    for layer in flipped.model.layers:
        layer.mlp.up_proj.weight.data.neg_()
        layer.mlp.down_proj.weight.data.neg_()
    assert torch.equal(_score(model, rows).neurons, _score(flipped, rows).neurons)


def test_layers_are_numbers_not_names(build_model, rows):
    """Layer 10 comes after layer 9, not after layer 1."""
    model = build_model(num_hidden_layers=12)
    for index, layer in enumerate(model.model.layers):
        torch.nn.init.constant_(layer.mlp.up_proj.weight, 0.01 * (index + 1))
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.ones_(layer.post_attention_layernorm.weight)
        layer.mlp.gate_proj.weight.data.copy_(model.model.layers[0].mlp.gate_proj.weight)
    assert _score(model, rows).neurons.sum(1).argsort().tolist() == list(range(12))


def test_scores_of_a_bf16_model_are_accumulated_wider(build_model, rows):
    model = build_model(dtype=torch.bfloat16)
    scores = _score(model, rows[:, :4])
    assert scores.neurons.dtype == torch.float32
    assert all(moments.mean.dtype == torch.float64 for moments in scores.moments.values())
    assert_close(scores.hidden, _score(build_model(), rows[:, :4]).hidden, rtol=0.05)


# Invariances


@pytest.mark.parametrize("aggregation", PAIRS, ids="-".join)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_any_batch_split_gives_the_same_scores(build_model, rows, aggregation, batch_size):
    model = build_model()
    whole, split = (_score(model, rows, aggregation=aggregation, batch_size=size) for size in (7, batch_size))
    for axis in AXES:
        assert_close(getattr(split, axis), getattr(whole, axis))


@pytest.mark.parametrize("aggregation", PAIRS, ids="-".join)
def test_merging_two_parts_equals_scoring_the_whole(build_model, rows, aggregation):
    model = build_model()
    whole, first, second = (_score(model, part, aggregation=aggregation) for part in (rows, rows[:3], rows[3:]))
    before = first.neurons
    for merged in (first.merge(second), second.merge(first)):
        for axis in AXES:
            assert_close(getattr(merged, axis), getattr(whole, axis))
        assert (merged.info["num_samples"], merged.info["num_tokens"]) == (7, 112)
    assert torch.equal(first.neurons, before)


# The model is left as it was


@pytest.mark.parametrize("training", [False, True])
def test_hooks_and_mode_are_put_back(build_model, rows, training):
    model = build_model().train(training)
    _score(model, rows)
    assert not _hooks(model)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_and_mode_are_put_back_after_an_error(build_model, rows):
    model = build_model().train()
    with pytest.raises(IndexError):
        _score(model, rows + 61)
    assert not _hooks(model)
    assert model.training


def test_scoring_is_done_without_dropout(build_model, rows):
    model = build_model(attention_dropout=0.5).train()
    assert torch.equal(_score(model, rows).heads, _score(model, rows).heads)


def test_only_the_axes_asked_for_are_hooked_and_kept(build_model, rows):
    scores = _score(build_model(), rows, axes=("layers", "neurons"))
    assert scores.axes == ("neurons", "layers")
    with pytest.raises(ValueError, match="axis 'hidden' was not scored, only neurons, layers"):
        scores.hidden  # noqa: B018


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_an_error_that_names_the_site(build_model, rows, value):
    model = build_model()
    model.model.layers[2].post_attention_layernorm.weight.data[5] = value
    with pytest.raises(ValueError, match=r"activations at (neurons\.2|hidden\.2\.post_attention_layernorm) are NaN"):
        _score(model, rows)
    with pytest.raises(ValueError, match=r"activations at hidden\.2\.post_attention_layernorm are NaN or Inf"):
        _score(model, rows, axes=("hidden",))
    assert not _hooks(model)


@pytest.mark.parametrize("axes", ["width", ("neurons", "kv"), ()])
def test_unknown_axes(axes):
    with pytest.raises(ValueError, match="importance is defined for neurons, heads, hidden, layers"):
        check_axes(axes)


@pytest.mark.parametrize("aggregation", [("l2",), ("l2", "max"), ("l2", "mean", "var"), "l2"])
def test_unknown_aggregations(aggregation):
    with pytest.raises(ValueError, match=r"pair \(over samples, over tokens\) of l2, mean, var"):
        check_aggregation(aggregation)


@pytest.mark.parametrize("signal", ["up_proj", "", None])
def test_unknown_neuron_signals(signal):
    with pytest.raises(ValueError, match=r"neurons are scored by down_proj_input or first_projection\. Use one"):
        check_neuron_signal(signal)


def test_settings_are_checked_before_the_forward_pass(build_model, rows):
    model = build_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran the model"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("ran the model"))
    wrong = {"axes": ("x",), "aggregation": ("x", "l2"), "neuron_signal": "x", "batch_size": 0}
    for settings in (*({key: value} for key, value in wrong.items()), {"batch_size": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
            _score(model, rows, **settings)
    with pytest.raises(ValueError, match="0 rows"):
        _score(model, rows[:0])


# Planted rankings


def test_planted_neurons_are_recovered(build_model, rows, family_name, projections):
    """Neurons that are equal but for the size of their row in up_proj."""
    model = build_model(family_name)
    planted = [_shuffled(40, seed=index) for index in range(3)]
    for index, order in enumerate(planted):
        *gate, up = projections(model, index, "ffn")
        for rows_of in (*gate, up):
            rows_of["weight"][:] = rows_of["weight"][0].clone()
        up["weight"] *= (1 + 0.1 * order.argsort())[:, None]
    scores = _score(model, rows)
    assert [row.argsort().tolist() for row in scores.neurons] == [order.tolist() for order in planted]


def test_planted_heads_are_recovered(build_model, rows, family_name, projections):
    """Heads that differ in the size of their values; without grouping each has its own."""
    model = build_model(family_name, num_key_value_heads=6)
    planted = [_shuffled(6, seed=index) for index in range(3)]
    for index, order in enumerate(planted):
        _, values = projections(model, index, "kv")
        factors = (10.0 ** order.argsort()).repeat_interleave(8)
        for part in values.values():
            part *= factors.view(-1, *[1] * (part.dim() - 1))
    scores = _score(model, rows)
    assert [row.argsort().tolist() for row in scores.heads] == [order.tolist() for order in planted]


def test_planted_query_heads_of_a_group_are_recovered(build_model, rows, family_name):
    """Heads that share values and differ in what enters o_proj."""
    model = build_model(family_name)
    planted = [_shuffled(6, seed=index) for index in range(3)]
    for layer, order in zip(model.model.layers, planted, strict=True):
        factors = (10.0 ** order.argsort()).repeat_interleave(8)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, factors=factors: (args[0] * factors,))
    scores = _score(model, rows)
    assert [row.argsort().tolist() for row in scores.heads] == [order.tolist() for order in planted]


def test_planted_channels_are_recovered(build_model, rows, family_name, set_gain):
    """A stream of ±1 in every channel: importance is then the sum of the norms' gains, which are planted.

    What the layers write is ±1 in every channel too, times something, for the norms on that side; and it is far too
    small to be seen beside the embeddings.
    """
    model = build_model(family_name)
    order = _shuffled(24, seed=0)
    embedding = model.model.embed_tokens.weight.data
    embedding[:] = 1e5 * _balanced_signs(embedding)
    _write_signs(model)
    for index, layer in enumerate(model.model.layers):
        for turn, site in enumerate(get_family(model.config).norm_sites):
            gain = 1 + 0.1 * order.argsort()
            set_gain(layer.get_submodule(site), -gain if turn else gain + index)
    assert _score(model, rows).hidden.argsort().tolist() == order.tolist()


def test_every_norm_counts_for_the_channels(build_model, rows):
    """A channel that only one norm of one layer lets through strongly is still the most important."""
    for site in ("input_layernorm", "post_attention_layernorm"):
        for index in range(3):
            model = build_model()
            model.model.layers[index].get_submodule(site).weight.data[5] = 100.0
            assert _score(model, rows).hidden.argmax() == 5


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_layer_that_does_nothing_has_block_importance_zero(build_model, rows, family_name, idle):
    model = build_model(family_name)
    layer = model.model.layers[idle]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(projection.weight)
    layers = _score(model, rows).layers
    assert layers[idle].item() == pytest.approx(0, abs=1e-6)
    assert all(layers[other] > 0.01 for other in range(3) if other != idle)


def test_a_layer_that_turns_the_stream_around_has_block_importance_two(build_model, rows):
    model = build_model(num_hidden_layers=1)
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _, args, output: -args[0])
    assert _score(model, rows).layers.item() == pytest.approx(2, abs=1e-6)


def _score(model: PreTrainedModel, rows: torch.Tensor, **settings) -> ImportanceScores:
    return score_model(model, rows, progress=False, **settings)


@torch.no_grad()
def _activations(model: PreTrainedModel, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What goes into the sites and comes out of the norms, of all rows at once, by hooks of our own."""
    family, seen, hooks = get_family(model.config), {}, []

    def keep_input(key: str, module: torch.nn.Module) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _, args: seen.__setitem__(key, args[0].clone())))

    def keep_output(key: str, module: torch.nn.Module) -> None:
        hooks.append(module.register_forward_hook(lambda _, args, output: seen.__setitem__(key, output.clone())))

    for index, layer in enumerate(model.get_submodule(family.layers)):
        keep_input(f"{index}.in", layer)
        keep_input(f"{index}.mlp", layer.mlp)
        for site in (family.neuron_site, family.head_site):
            keep_input(f"{index}.{site}", layer.get_submodule(site))
        for site in family.norm_sites:
            keep_output(f"{index}.{site}", layer.get_submodule(site))
    keep_output("out", layer)
    model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _reduce(activation: torch.Tensor, aggregation: tuple[str, str]) -> torch.Tensor:
    """(rows, tokens, channels) → (channels,), in float64 from the definition."""
    over_samples, over_tokens = aggregation
    activation = activation.double()
    per_row = torch.stack([REDUCE[over_tokens](row.abs() if over_tokens == "mean" else row) for row in activation])
    return REDUCE[over_samples](per_row)


def assert_close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-6) -> None:
    """Relative to the largest score: what differs by less ranks nothing."""
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= rtol * expected.abs().max() + 1e-12


def _shuffled(count: int, seed: int) -> torch.Tensor:
    """The indices from the least to the most important; its argsort is each one's rank."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _balanced_signs(tensor: torch.Tensor) -> torch.Tensor:
    """±1 by row, as many of each: a layer norm, which subtracts the mean, leaves them as they are."""
    return torch.where(tensor > tensor.median(dim=-1, keepdim=True).values, 1.0, -1.0)


def _write_signs(model: PreTrainedModel) -> None:
    """Layers write one and the same pattern of ±1, times what they compute."""
    pattern = _balanced_signs(torch.randn(24, generator=torch.Generator().manual_seed(2)))
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data = pattern[:, None] * projection.weight.data[0]


def _hooks(model: PreTrainedModel) -> list:
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
