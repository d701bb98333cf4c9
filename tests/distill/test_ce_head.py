"""fused_linear_ce: loss and gradients of whole logits, in chunks, for every head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill import ce_head
from hf_minitron.distill.ce_head import fused_linear_ce
from hf_minitron.distill.kd_head import fused_linear_kd

N, H, V = 37, 12, 53
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(softcap=2.0), LogitTransform(0.5, 3.0)]


def make_inputs(dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=dtype) for n in (N, V))
    bias = torch.randn(V, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::7] = -100
    token_weight = torch.rand(N, generator=generator, dtype=dtype)
    token_weight[3] = 0
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    return {name: value.requires_grad_() for name, value in leaves.items()} | {
        "labels": labels,
        "token_weight": token_weight,
    }


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [inputs[name] for name in ("hidden", "weight", "bias")])


def of_whole_logits(inputs, transform, vocab=V):
    logits = (inputs["hidden"] @ inputs["weight"][:vocab].t() + inputs["bias"][:vocab]) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none", ignore_index=-100)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk_size", [1, 5, N, "auto"])
def test_it_is_the_cross_entropy_of_whole_logits(transform, chunk_size):
    inputs = make_inputs()
    expected = of_whole_logits(inputs, transform)
    loss = (expected * inputs["token_weight"]).sum()
    found = fused_linear_ce(**inputs, transform=transform, chunk_size=chunk_size)
    torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=0)
    used = (inputs["labels"] != -100) & (inputs["token_weight"] != 0)
    assert torch.equal(found.token_mask, used) and found.num_tokens == int(used.sum())
    torch.testing.assert_close(found.token_ce, expected * used, rtol=1e-12, atol=1e-14)
    for one, other in zip(gradients(3 * found.loss, inputs), gradients(3 * loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_blocks_of_rows_agree(monkeypatch):
    inputs = make_inputs()
    whole = fused_linear_ce(**inputs)
    monkeypatch.setattr(ce_head, "rows_per_block", lambda output: 3)
    blocks = fused_linear_ce(**inputs)
    torch.testing.assert_close(blocks.loss, whole.loss, rtol=1e-13, atol=0)
    for one, other in zip(gradients(blocks.loss, inputs), gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_it_is_what_the_distillation_loss_mixes_in():
    inputs = make_inputs()
    kd = fused_linear_kd(
        inputs["hidden"], inputs["weight"], inputs["hidden"], inputs["weight"], inputs["token_weight"],
        labels=inputs["labels"], ce_weight=1.0, student_bias=inputs["bias"], teacher_bias=inputs["bias"],
    )  # fmt: skip
    found = fused_linear_ce(**inputs)
    torch.testing.assert_close(found.loss, kd.loss, rtol=1e-12, atol=0)  # of identical heads the divergence is 0
    torch.testing.assert_close(found.token_ce, kd.token_ce)


def test_only_what_needs_a_gradient_gets_one():
    """A frozen head, as with adapters and norms, makes no gradient of its size."""
    inputs = make_inputs()
    inputs["weight"].requires_grad_(False)
    inputs["bias"].requires_grad_(False)
    loss = fused_linear_ce(**inputs).loss
    assert [None if saved is None else tuple(saved.shape) for saved in loss.grad_fn.saved_tensors] == [
        (N, H),
        None,
        None,
        (),
    ]
    loss.backward()
    assert inputs["weight"].grad is None and inputs["hidden"].grad is not None
    with torch.no_grad():
        assert not fused_linear_ce(**inputs).loss.requires_grad


def test_a_half_precision_head_gives_fp32_losses():
    half = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in make_inputs().items()}
    upcast = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    found, expected = fused_linear_ce(**half), fused_linear_ce(**upcast)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)


def test_no_targets_and_wrong_ones():
    inputs = make_inputs()
    nothing = fused_linear_ce(**inputs | {"labels": torch.full((N,), -100)})
    nothing.loss.backward()
    assert nothing.loss == 0 and nothing.num_tokens == 0 and not inputs["hidden"].grad.any()
    with pytest.raises(ValueError, match=f"labels range from 0 to {V + 4}, outside the vocabulary of {V}"):
        fused_linear_ce(**inputs | {"labels": torch.arange(N) % 2 * (V + 4)})
    limited = fused_linear_ce(**inputs | {"labels": inputs["labels"].clamp(max=40)}, vocab_limit=41)
    expected = of_whole_logits(inputs | {"labels": inputs["labels"].clamp(max=40)}, LogitTransform(), 41)
    torch.testing.assert_close(limited.loss, (expected * inputs["token_weight"]).sum())
    with pytest.raises(ValueError, match="do not fit"):
        fused_linear_ce(**inputs | {"hidden": inputs["hidden"][:, 1:]})
