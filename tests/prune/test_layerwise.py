"""A model run layer by layer, half by half, is the model: every family, bit for bit or to rounding."""

from __future__ import annotations

import torch

from hf_minitron.checkpoint import ModelTensors
from hf_minitron.prune.layerwise import LayerwiseModel


def lay_out(model) -> LayerwiseModel:
    tensors = ModelTensors(model)
    return LayerwiseModel(model.config, tensors.read)


@torch.no_grad()
def test_halves_make_up_the_model(source, rows):
    layerwise = lay_out(source)
    states = layerwise.embed(rows)
    for index in range(layerwise.num_layers):
        with layerwise.layer(index) as layer:
            states = layer.run(states)
    expected = source.base_model(input_ids=rows, use_cache=False).last_hidden_state
    torch.testing.assert_close(layerwise.normalize(states), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_loss_is_the_models(source, rows, logits):
    layerwise = lay_out(source)
    states = layerwise.embed(rows)
    for index in range(layerwise.num_layers):
        with layerwise.layer(index) as layer:
            states = layer.run(states)
    expected = torch.nn.functional.cross_entropy(logits(source)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    found = layerwise.loss(states, rows).sum() / rows[:, 1:].numel()
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batches_of_other_shapes_do_not_mix(build_model, rows):
    model = build_model("gemma2")
    layerwise = lay_out(model)
    for batch in (rows[:1, :1], rows[:1], rows[:, :9]):
        states = layerwise.embed(batch)
        for index in range(layerwise.num_layers):
            with layerwise.layer(index) as layer:
                states = layer.run(states)
        expected = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(layerwise.normalize(states), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_the_layer_in_use_holds_weights(build_model, rows):
    layerwise = lay_out(build_model("llama"))
    layerwise.embed(rows)

    def loaded() -> set[str]:
        return {n.split(".")[2] for n, p in layerwise.model.named_parameters() if ".layers." in n and not p.is_meta}

    with layerwise.layer(1):
        assert loaded() == {"1"}
    assert loaded() == set()
