"""Refit as a whole: identities that hold for every family, planted structure, chunking, depth, the fall-back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from hf_minitron.architectures import FAMILIES, get_family
from hf_minitron.checkpoint import ModelTensors
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.refit import refit
from hf_minitron.prune.refit_basis import rotation_basis
from hf_minitron.prune.target import PruneConfig

ROTATING = [name for name, family in FAMILIES.items() if family.can_rotate]
EQUAL = {"rtol": 1e-4, "atol": 1e-4}


def prune(model, rows, *, sizes=None, mode="teacher_forced", **settings):
    pruner = PrunerForCausalLM(model)
    settings = {"refit_without": ["guard"]} | settings  # losses of random models on random rows judge nothing
    config = PruneConfig(**(sizes or {}), method="refit", refit_mode=mode, **settings)
    return pruner.prune(config, rows.tolist(), progress=False), pruner.planned


def error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()


def layers_of(model):
    return model.get_submodule(get_family(model.config).layers)


def test_families_that_rotate():
    assert ROTATING == ["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "phi3"]


def test_keeping_everything_is_the_identity(source, rows, logits):
    found, _ = prune(source, rows, mode="sequential")
    torch.testing.assert_close(logits(found), logits(source), **EQUAL)


def test_keeping_everything_is_the_identity_teacher_forced(build_model, rows, logits, family_name):
    model = build_model(family_name)
    found, _ = prune(model, rows)
    torch.testing.assert_close(logits(found), logits(model), **EQUAL)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ROTATING)
def test_rotation_by_every_direction_is_exact(build_model, rows, logits, family, tied):
    model = build_model(family, tie_word_embeddings=tied)
    gain = model.get_submodule(get_family(model.config).final_norm).weight.detach()
    if tied:
        gain.fill_(1.3)  # a gain that differs by channel ties only up to the tokens' norms
    generator = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    basis = rotation_basis(directions, torch.eye(24, dtype=torch.float64), gain.sqrt() if tied else None)
    found = refit(
        ModelTensors(model),
        model.config,
        PruneConfig(method="refit", refit_without=["guard"]),
        rows.tolist(),
        [0, 1, 2],
        basis=basis,
        progress=False,
    )
    rotated = copy.deepcopy(model)
    missing = rotated.load_state_dict(found.tensors, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not torch.equal(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert error(logits(rotated), logits(model)) < 1e-4


@pytest.mark.parametrize("family", ROTATING)
def test_planted_low_rank_stream_is_kept_whole(build_model, rows, logits, family):
    model = build_model(family, hidden_size=24)
    directions = torch.linalg.qr(torch.randn(24, 12, generator=torch.Generator().manual_seed(5)))[0]
    projector = directions @ directions.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(5 * model.model.embed_tokens.weight @ projector)
        for layer in layers_of(model):
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(projector @ writer.weight)
    found, plan = prune(model, rows, sizes={"hidden_size": 12})
    assert plan.info["basis"] == "rotated"
    assert plan.kept_hidden == []
    assert plan.info["energy_kept"] > 0.9999
    assert error(logits(found), logits(model)) < 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_planted_zero_channels_go_where_channels_are_selected(build_model, rows, logits, family):
    model = build_model(family)
    kept = sorted(torch.randperm(24, generator=torch.Generator().manual_seed(6))[:12].tolist())
    gone = [channel for channel in range(24) if channel not in kept]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0
        for layer in layers_of(model):
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[gone] = 0
    found, plan = prune(model, rows, sizes={"hidden_size": 12})
    assert plan.kept_hidden == kept
    assert error(logits(found), logits(model)) < 3e-3  # norms' epsilon weighs more over fewer channels


@pytest.mark.parametrize("biased", [False, True])
def test_dead_neurons_go_without_loss(build_model, rows, logits, family_name, biased):
    source = build_model(family_name, **({"attention_bias": True, "mlp_bias": True} if biased else {}))
    if biased and not any(name.endswith("_proj.bias") for name, _ in source.named_parameters()):
        pytest.skip("the family has no biases")
    with torch.no_grad():
        for layer in layers_of(source):
            layer.mlp.down_proj.weight[:, ::2] = 0
    found, plan = prune(source, rows, sizes={"intermediate_size": 20})
    assert plan.kept_neurons == [list(range(1, 40, 2))] * 3
    torch.testing.assert_close(logits(found), logits(source), **EQUAL)


@pytest.mark.parametrize("groups", [2, 6])
def test_dead_heads_go_without_loss(build_model, rows, logits, family_of_heads, groups):
    source_of_heads = build_model(family_of_heads, num_key_value_heads=groups)
    config = source_of_heads.config
    per_group = config.num_attention_heads // config.num_key_value_heads
    gone = max(2, per_group)
    with torch.no_grad():
        for layer in layers_of(source_of_heads):
            layer.self_attn.o_proj.weight[:, : gone * 8] = 0  # the first group, or the first two without grouping
    sizes = {"num_attention_heads": 6 - gone, "num_key_value_heads": config.num_key_value_heads - gone // per_group}
    found, plan = prune(source_of_heads, rows, sizes=sizes)
    assert plan.kept_heads == [list(range(gone, 6))] * 3
    torch.testing.assert_close(logits(found), logits(source_of_heads), **EQUAL)


def test_every_family_shrinks_everything(source, half_of, rows, logits):
    config = half_of(
        source.config, method="refit", refit_mode="sequential", refit_without=["guard"], drop_layers=[0, 2]
    )
    found = PrunerForCausalLM(source).prune(config, rows.tolist(), progress=False)
    assert (found.config.hidden_size, found.config.num_hidden_layers) == (12, 1)
    assert type(found) is type(source)
    assert torch.isfinite(logits(found)).all()
    tied = source.config.tie_word_embeddings
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(("family", "bound"), [("llama", 0.6), ("gemma2", 0.75)])
def test_refit_is_closer_to_the_source_than_slicing(build_model, family, bound):
    """On text that the model itself wrote, so that held-out losses mean something and the guards can be on."""
    model = build_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2 if family == "llama" else 1)
    torch.manual_seed(0)
    starts = torch.arange(96)[:, None] % 58 + 3
    rows = model.generate(starts, do_sample=True, top_k=0, max_new_tokens=15, min_new_tokens=15, pad_token_id=0)
    probe, rows = rows[:16], rows[16:]
    sizes = {"hidden_size": 18, "intermediate_size": 32}
    pruner = PrunerForCausalLM(model)
    pruner.score(rows.tolist(), progress=False)
    sliced = divergence(model, pruner.prune(PruneConfig(**sizes)), probe)
    for mode in ("teacher_forced", "sequential"):
        found = pruner.prune(PruneConfig(**sizes, method="refit", refit_mode=mode), rows.tolist(), progress=False)
        info = pruner.planned.info
        assert divergence(model, found, probe) < bound * sliced
        assert "fell_back" not in info
        assert info["held_out_loss"]["source"] < info["held_out_loss"]["refit"] < info["held_out_loss"]["sliced"]
        assert info["final_gain"]["after"] < info["final_gain"]["before"]


@torch.no_grad()
def divergence(source, small, rows) -> float:
    """Mean KL(source ‖ small) in nats."""
    wanted, found = (model(input_ids=rows).logits.log_softmax(-1) for model in (source, small))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_batches_and_disk_change_nothing(build_model, half_of, rows, logits, family):
    model, results = build_model(family), []
    for batch_size, memory in ((7, 8.0), (2, 9e-5)):  # 90 kB: hardly more than the moments take
        config = half_of(model.config, method="refit", refit_without=["guard"], stats_memory=memory)
        pruner = PrunerForCausalLM(model)
        found = pruner.prune(config, rows.tolist(), batch_size=batch_size, progress=False)
        results.append(logits(found))  # directions themselves may come out with either sign
    assert (results[0] - results[1]).norm() < 1e-5 * results[0].norm()


def test_first_layer_that_depends_on_tokens_alone_goes_into_the_embedding(build_model, logits):
    model = build_model("llama", vocab_size=11)
    with torch.no_grad():
        layers_of(model)[0].self_attn.o_proj.weight.zero_()
    rows = torch.randint(0, 11, (200, 16), generator=torch.Generator().manual_seed(4))
    errors = {}
    for without in ([], ["embedding"]):
        found, _ = prune(
            model, rows, sizes={"drop_layers": [0]}, refit_without=[*without, "guard", "readers", "writers"]
        )
        probe = rows[:20]
        with torch.no_grad():
            errors[len(without)] = (found(probe).logits - model(probe).logits).square().mean() / model(
                probe
            ).logits.var()
    assert errors[0] < 1e-3 < 0.05 < errors[1]


def test_dropped_layers_are_compensated(build_model, rows, logits):
    model = build_model("qwen2", num_hidden_layers=3)
    reference = logits(model)
    rows = torch.cat([rows, torch.randint(0, 61, (57, 16), generator=torch.Generator().manual_seed(9))])
    plain = PrunerForCausalLM(model).prune(PruneConfig(drop_layers=[1]))
    found, plan = prune(model, rows, sizes={"drop_layers": [1]})
    assert plan.kept_layers == [0, 2]
    assert (logits(found) - reference).square().mean() < 0.5 * (logits(plain) - reference).square().mean()


def test_rank_deficiency_survives(build_model, half_of, family_name):
    model = build_model(family_name)
    rows = torch.full((3, 4), 7)  # one token: everything has the rank of four positions at most
    config = half_of(model.config, method="refit", refit_without=["guard"])
    found = PrunerForCausalLM(model).prune(config, rows.tolist(), progress=False)
    assert all(torch.isfinite(parameter).all() for parameter in found.parameters())


def test_few_tokens_draw_a_warning(build_model, rows, caplog):
    model = build_model("llama")
    with caplog.at_level(logging.WARNING):
        prune(model, rows, sizes={"intermediate_size": 20})
    assert "96 calibration tokens for a width of 40: 2.4 each" in caplog.text
    assert "at least 800 tokens" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prune(model, rows.repeat(10, 1), sizes={"intermediate_size": 20})
    assert "calibration tokens" not in caplog.text


@pytest.mark.parametrize("guard", [True, False])
def test_whole_model_falls_back_to_slicing(build_model, guard, caplog):
    """Slicing is lossless here, while the rows that are fitted hold one token and say nothing of the others."""
    model = build_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 12:] = 0
        model.lm_head.weight.mul_(5)
        for layer in layers_of(model):
            layer.self_attn.o_proj.weight[12:] = 0
            layer.mlp.down_proj.weight[12:] = 0
    typical = model.generate(torch.arange(3, 13)[:, None], max_new_tokens=15, min_new_tokens=15, do_sample=False)
    rows = torch.full((20, 16), 7)
    rows[1::8] = typical[:3]
    pruner = PrunerForCausalLM(model)
    pruner.score(typical.tolist(), progress=False)
    sizes = {"hidden_size": 12}
    settings = {"refit_without": [] if guard else ["guard"]}
    with caplog.at_level(logging.WARNING):
        found = pruner.prune(PruneConfig(**sizes, method="refit", **settings), rows.tolist(), progress=False)
    sliced = pruner.planned.info.get("fell_back", False)
    assert sliced is guard
    if guard:
        losses = pruner.planned.info["held_out_loss"]
        assert losses["sliced"] < losses["refit"]
    assert ("plain slicing" in caplog.text) is guard
    expected = PrunerForCausalLM(model)
    expected.scores = pruner.scores
    same = expected.prune(PruneConfig(**sizes)).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in found.state_dict().items()) is guard
