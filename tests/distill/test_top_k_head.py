"""The top-k loss against a naive one in fp64, its identities, its gradient, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill.kd_head import fused_linear_kd
from hf_minitron.distill.top_k_head import fused_linear_topk_kd

N, V, H = 37, 101, 8


def make_inputs(k: int, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> dict:
    """Student tensors that take gradients, and what a random teacher's top k and tail are."""
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(N, V, generator=generator, dtype=torch.float64)
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    tail = teacher.softmax(-1).scatter(-1, ids, 0.0).sum(-1)
    weight = torch.rand(N, generator=generator, dtype=torch.float64) + 0.1
    weight[::5] = 0.0
    return {
        "student_hidden": torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "student_weight": torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "token_ids": ids,
        "log_probs": log_probs.to(dtype),
        "tail_mass": tail.to(dtype),
        "token_weight": weight.to(dtype),
        "labels": torch.randint(0, V, (N,), generator=generator),
        "teacher_logits": teacher,
    }


def call(inputs: dict, **options):
    return fused_linear_topk_kd(**{k: v for k, v in inputs.items() if k != "teacher_logits"}, **options)


def naive(inputs: dict, ce_weight: float = 0.0, vocab: int | None = None):
    """Per-token KL over k + 1 buckets and CE, from whole logits in fp64, by autograd."""
    logits = inputs["student_hidden"].double() @ inputs["student_weight"][:vocab].double().t()
    probabilities = logits.softmax(-1)
    ids = inputs["token_ids"].long()
    outside = torch.ones_like(probabilities).scatter(-1, ids, 0.0)
    p = torch.cat([inputs["log_probs"].double().exp(), inputs["tail_mass"].double().unsqueeze(-1)], -1)
    p = p / p.sum(-1, keepdim=True)
    rest = (probabilities * outside).sum(-1, keepdim=True)
    q = torch.cat([probabilities.gather(-1, ids), rest], -1)
    kl = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)
    ce = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
    return kl, ce, (inputs["token_weight"].double() * (kl + ce_weight * ce)).sum()


@pytest.mark.parametrize("transform", [LogitTransform(0.5), LogitTransform(2.0, 3.0), LogitTransform(softcap=1.5)])
@pytest.mark.parametrize("k", [4, V])
def test_biased_scaled_and_capped_heads(k, transform):
    inputs = make_inputs(k)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    head = {"student_bias": bias, "student_transform": transform}
    output = call(inputs, ce_weight=0.3, chunk_size=7, **head)
    logits = transform.scale * (inputs["student_hidden"] @ inputs["student_weight"].t() + bias)
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    whole = inputs | {"student_hidden": logits, "student_weight": torch.eye(V, dtype=torch.float64)}
    _, _, loss = naive(whole, 0.3)
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(output.token_loss, output.token_kl + 0.3 * output.token_ce)
    leaves = (inputs["student_hidden"], inputs["student_weight"], bias)
    pairs = zip(torch.autograd.grad(output.loss, leaves), torch.autograd.grad(loss, leaves), strict=True)
    for fused, reference in pairs:
        torch.testing.assert_close(fused, reference, rtol=1e-8, atol=1e-10)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_weight"]))


@pytest.mark.parametrize("k", [1, 7, V - 1, V])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_matches_autograd_through_whole_logits(k, ce_weight):
    inputs = make_inputs(k)
    kl, ce, loss = naive(inputs, ce_weight)
    output = call(inputs, ce_weight=ce_weight, chunk_size=7)
    used = inputs["token_weight"] != 0
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(output.token_kl, kl.detach() * used, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.token_ce, ce.detach() * used, rtol=1e-10, atol=1e-12)
    assert output.num_tokens == int(used.sum()) and torch.equal(output.token_mask, used)
    assert output.teacher_token_ce is None
    for fused, reference in zip(gradients(output.loss, inputs), gradients(loss, inputs), strict=True):
        assert reference.norm() > 0
        torch.testing.assert_close(fused, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [3, V])
def test_gradient_is_that_of_small_differences(k):
    inputs = make_inputs(k)
    inputs["labels"][::7] = -100

    def loss(hidden, weight):
        return call(inputs | {"student_hidden": hidden, "student_weight": weight}, ce_weight=0.3, chunk_size=5).loss

    assert torch.autograd.gradcheck(loss, (inputs["student_hidden"], inputs["student_weight"]), fast_mode=True)


def test_with_the_whole_vocabulary_it_is_the_full_kl():
    inputs = make_inputs(V)
    output = call(inputs, ce_weight=0.5)
    identity = torch.eye(V, dtype=torch.float64)
    names = ("student_hidden", "student_weight", "token_weight", "labels")
    full = fused_linear_kd(
        **{name: inputs[name] for name in names},
        teacher_hidden=inputs["teacher_logits"],
        teacher_weight=identity,
        ce_weight=0.5,
    )
    torch.testing.assert_close(output.loss, full.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.token_kl, full.token_kl, rtol=1e-10, atol=1e-13)
    assert torch.equal(output.top1_agreement, full.top1_agreement)
    for one, other in zip(gradients(output.loss, inputs), gradients(full.loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_more_kept_tokens_tell_more_and_never_more_than_all():
    values = [call(make_inputs(k)).token_kl for k in (1, 2, 5, 20, 60, V)]
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-12).all() and fewer.sum() < more.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 4, 64, V])
@pytest.mark.parametrize("spread", [0.1, 4.0, 30.0])
def test_it_is_never_negative_however_the_teacher_was_rounded(dtype, k, spread):
    """Students from far away down to the teacher itself, where rounding alone decides the sign."""
    inputs = make_inputs(k, spread=spread)
    inputs["log_probs"] = inputs["log_probs"].to(dtype)
    inputs["tail_mass"] = inputs["tail_mass"].float()
    inputs["student_weight"] = torch.eye(V)
    inputs["token_weight"] = torch.ones(N)
    for noise in (0.0, 1e-4, 1e-2, 1.0, 10.0):
        generator = torch.Generator().manual_seed(1)
        student = inputs["teacher_logits"] + noise * torch.randn(N, V, generator=generator, dtype=torch.float64)
        kl = call(inputs | {"student_hidden": student.float()}).token_kl
        assert (kl >= 0).all() and torch.isfinite(kl).all()
        if noise == 0.0 and dtype == torch.float32:
            assert kl.max() < 1e-6


def test_rounded_log_probabilities_are_normalised_with_the_tail():
    inputs = make_inputs(5, dtype=torch.float32)
    shifted = inputs | {"log_probs": inputs["log_probs"] + 0.3, "tail_mass": inputs["tail_mass"] * 2.718281828**0.3}
    torch.testing.assert_close(call(shifted).token_kl, call(inputs).token_kl, rtol=1e-5, atol=1e-6)


def test_agreement_is_with_the_first_kept_token():
    inputs = {"student_hidden": torch.tensor([[5.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), "student_weight": torch.eye(3)}
    teacher = {"token_ids": torch.tensor([[0], [0]]), "log_probs": torch.tensor([[-0.1], [-0.1]])}
    output = fused_linear_topk_kd(**inputs, **teacher, tail_mass=torch.tensor([0.1, 0.1]), token_weight=torch.ones(2))
    assert output.top1_agreement.tolist() == [True, False] and output.token_ce is None


def test_skipped_tokens_may_hold_anything_and_uint32_ids_do():
    inputs = make_inputs(6)
    reference = call(inputs, ce_weight=1.0)
    skipped = inputs["token_weight"] == 0
    with torch.no_grad():
        inputs["student_hidden"][skipped] = torch.nan
    inputs["log_probs"][skipped] = torch.nan
    inputs["token_ids"][skipped] = 10**6
    inputs["token_ids"] = inputs["token_ids"].to(torch.uint32)
    output = call(inputs, ce_weight=1.0)
    torch.testing.assert_close(output.loss, reference.loss)
    assert gradients(output.loss, inputs)[0][skipped].abs().max() == 0
    inputs["token_weight"] = torch.zeros(N, dtype=torch.float64)
    assert call(inputs).loss == 0


@pytest.mark.parametrize("chunk_size", [1, 5, N + 100, "auto"])
def test_chunk_sizes_agree(chunk_size):
    inputs = make_inputs(6)
    reference, output = call(inputs, ce_weight=0.3, chunk_size=N), call(inputs, ce_weight=0.3, chunk_size=chunk_size)
    torch.testing.assert_close(output.loss, reference.loss, rtol=1e-13, atol=0)
    for one, other in zip(gradients(output.loss, inputs), gradients(reference.loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_the_vocabulary_can_be_limited():
    inputs = make_inputs(6)
    inputs["token_ids"] %= 90
    inputs["token_ids"] = torch.stack(
        [torch.randperm(90, generator=torch.Generator().manual_seed(i))[:6] for i in range(N)]
    )
    inputs["labels"] %= 90
    _, _, loss = naive(inputs, 0.5, vocab=90)
    output = call(inputs, ce_weight=0.5, vocab_limit=90)
    torch.testing.assert_close(output.loss, loss, rtol=1e-11, atol=0)
    one, other = gradients(output.loss, inputs)[1], gradients(loss, inputs)[1]
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert one[90:].abs().max() == 0


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_never_more_than_a_chunk_of_logits():
    count, vocab, chunk = 64, 1000, 8
    hidden, weight = torch.randn(count, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    ids = torch.arange(5).expand(count, 5)
    with Largest() as largest:
        output = fused_linear_topk_kd(
            hidden, weight, ids, torch.full((count, 5), -2.0), torch.full((count,), 0.3), torch.ones(count),
            labels=torch.zeros(count, dtype=torch.long), ce_weight=0.5, chunk_size=chunk,
        )  # fmt: skip
        output.loss.backward()
    assert largest.elements == chunk * vocab


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 2.0}, r"temperature=2.0: a top-k cache holds the mass of the tail.*exact cache"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0"),
        ({"labels": None, "ce_weight": 1.0}, "needs labels"),
        ({"vocab_limit": V + 1}, "vocab_limit=102 is not between"),
        ({"vocab_limit": 50, "labels": None}, "token_ids range from .* outside the vocabulary of 50"),
        ({"tail_mass": torch.zeros(3)}, r"tail_mass has shape \(3,\).*\(37,\)"),
        ({"log_probs": torch.zeros(N, 5)}, "log_probs has shape"),
        ({"student_weight": torch.zeros(V, H + 1)}, "do not fit"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(make_inputs(6) | changes)
