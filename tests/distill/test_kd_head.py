"""The fused head against full logits and autograd: values, gradients, skipping and memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill import divergences, kd_products
from hf_minitron.distill.divergences import TokenLoss, token_losses
from hf_minitron.distill.kd_head import KDOutput, fused_linear_kd
from hf_minitron.distill.kd_inputs import CPU_BUDGET, CPU_CHUNK, tokens_per_chunk

N, V, HS, HT = 37, 101, 8, 12
NAMES = ("forward_kl", "reverse_kl", "js", "mse", "cosine")
CAPPED, SCALED = LogitTransform(softcap=3.0), LogitTransform(scale=1 / 4)


def make_inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = torch.rand(N, generator=generator, dtype=torch.float64) + 0.1
    weight[::5] = 0.0
    return {
        "student_hidden": normal(N, HS).requires_grad_(),
        "student_weight": normal(V, HS).requires_grad_(),
        "teacher_hidden": normal(N, HT),
        "teacher_weight": normal(V, HT),
        "token_weight": weight.to(dtype),
        "labels": torch.randint(0, V, (N,), generator=generator),
    }


def make_biases(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, V, generator=generator, dtype=torch.float64).to(dtype)
    return {"student_bias": student.clone().requires_grad_(), "teacher_bias": teacher.clone().requires_grad_()}


def full_logits_losses(inputs, temperature=1.0, ce_weight=0.0, vocab_limit=None):
    """Per-token KL, CE, teacher CE and the loss, from whole logits, by autograd."""
    student = inputs["student_hidden"] @ inputs["student_weight"][:vocab_limit].t()
    teacher = inputs["teacher_hidden"] @ inputs["teacher_weight"][:vocab_limit].t()
    log_student, log_teacher = (logits.div(temperature).log_softmax(-1) for logits in (student, teacher))
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    ce = torch.nn.functional.cross_entropy(student, inputs["labels"], reduction="none")
    teacher_ce = torch.nn.functional.cross_entropy(teacher, inputs["labels"], reduction="none")
    loss = (inputs["token_weight"] * (temperature**2 * kl + ce_weight * ce)).sum()
    return kl, ce, teacher_ce, loss


def gradients(loss: torch.Tensor, inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_weight"]))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
@pytest.mark.parametrize("vocab_limit", [None, 90])
def test_matches_autograd_through_full_logits(temperature, ce_weight, vocab_limit):
    inputs = make_inputs()
    inputs["labels"] %= vocab_limit or V
    options = {"temperature": temperature, "ce_weight": ce_weight, "vocab_limit": vocab_limit}
    kl, ce, teacher_ce, loss = full_logits_losses(inputs, **options)
    output = fused_linear_kd(**inputs, **options, chunk_size=7)

    used = inputs["token_weight"] != 0
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=1e-12)
    for fused, reference in (
        (output.token_kl, kl),
        (output.token_ce, ce),
        (output.teacher_token_ce, teacher_ce),
    ):
        torch.testing.assert_close(fused, reference.detach() * used, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(output.kl_sum, kl[used].sum().detach())
    torch.testing.assert_close(output.ce_sum, ce[used].sum().detach())
    torch.testing.assert_close(output.teacher_ce_sum, teacher_ce[used].sum())
    assert output.num_tokens == int(used.sum())
    assert torch.equal(output.token_mask, used)
    for fused, reference in zip(gradients(output.loss, inputs), gradients(loss, inputs), strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocab_limit", [None, 90])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_every_divergence_with_every_option(name, vocab_limit, ce_weight):
    """Biases, transforms, labels, weights and limits together; the loss of a token has tests of its own."""
    inputs = make_inputs() | make_biases()
    inputs["labels"] %= vocab_limit or V
    temperature = 1.0 if name in ("mse", "cosine") else 1.5
    settings = TokenLoss(name, temperature, ce_weight, 0.3, CAPPED, SCALED)
    heads = [[inputs[f"{role}_{part}"] for part in ("hidden", "weight", "bias")] for role in ("student", "teacher")]
    student, teacher = (hidden @ weight[:vocab_limit].t() + bias[:vocab_limit] for hidden, weight, bias in heads)
    values, by_logits = token_losses(settings, student.detach(), teacher.detach(), inputs["labels"], True)
    weight = inputs["token_weight"]
    expected = torch.autograd.grad(student, heads[0], weight[:, None] * by_logits)

    output = fused_linear_kd(
        **inputs, divergence=name, js_beta=0.3, temperature=temperature, ce_weight=ce_weight, chunk_size=7,
        student_transform=CAPPED, teacher_transform=SCALED, vocab_limit=vocab_limit,
    )  # fmt: skip
    used = weight != 0
    torch.testing.assert_close(output.loss, (weight * values.loss).sum(), rtol=1e-12, atol=1e-12)
    found = (output.token_loss, output.token_kl, output.token_ce, output.teacher_token_ce, output.top1_agreement)
    for one, other in zip(found, values, strict=True):
        torch.testing.assert_close(one, other * used, rtol=1e-11, atol=1e-12)
    for one, other in zip(torch.autograd.grad(output.loss, heads[0]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_gradient_by_logits_is_the_difference_of_probabilities():
    student_logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    teacher_logits = torch.randn(N, V, dtype=torch.float64)
    identity = torch.eye(V, dtype=torch.float64)  # a head that makes the hidden states the logits
    output = fused_linear_kd(student_logits, identity, teacher_logits, identity, torch.full((N,), 1 / N).double())
    output.loss.backward()
    expected = (student_logits.detach().softmax(-1) - teacher_logits.softmax(-1)) / N
    torch.testing.assert_close(student_logits.grad, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_identical_models_have_loss_and_gradient_exactly_zero(name, dtype):
    inputs = make_inputs(dtype)
    inputs["teacher_hidden"], inputs["teacher_weight"] = inputs["student_hidden"], inputs["student_weight"]
    output = fused_linear_kd(**inputs, divergence=name, temperature=1.0 if name in ("mse", "cosine") else 2.0)
    assert output.loss.item() == 0.0 and output.kl_sum == 0.0
    assert all(gradient.abs().max() == 0 for gradient in gradients(output.loss, inputs))
    assert torch.equal(output.top1_agreement, output.token_mask)


@pytest.mark.parametrize("name", NAMES)
def test_chunk_sizes_agree(name):
    inputs = make_inputs()
    reference = fused_linear_kd(**inputs, divergence=name, ce_weight=0.3, chunk_size=N)
    reference_gradients = gradients(reference.loss, inputs)
    for chunk_size in (1, 5, N + 100, "auto"):
        output = fused_linear_kd(**inputs, divergence=name, ce_weight=0.3, chunk_size=chunk_size)
        torch.testing.assert_close(output.loss, reference.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(output.token_kl, reference.token_kl, rtol=1e-12, atol=1e-14)
        for one, other in zip(gradients(output.loss, inputs), reference_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_backward_multiplies_by_the_incoming_gradient_every_time():
    inputs = make_inputs()
    loss = fused_linear_kd(**inputs).loss
    leaves = (inputs["student_hidden"], inputs["student_weight"])
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * -3.0, leaves)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, -3.0 * one)


def test_backward_scales_in_place_unless_another_may_follow(monkeypatch):
    """The gradient of an fp32 head exists once, also while it is multiplied by what comes in."""
    results = []

    def scaled(grad, *rest):
        results.append((grad, _scaled(grad, *rest)))
        return results[-1][1]

    _scaled = kd_products._scaled
    monkeypatch.setattr(kd_products, "_scaled", scaled)
    inputs = make_inputs()
    for keep in (True, False):
        loss = fused_linear_kd(**inputs).loss
        (3 * loss).backward(retain_graph=keep)
        assert [after is before for before, after in results[:2]] == [not keep] * 2
        results.clear()
    torch.testing.assert_close(inputs["student_weight"].grad, 6 * gradients(fused_linear_kd(**inputs).loss, inputs)[1])


def test_a_second_derivative_is_refused():
    inputs = make_inputs()
    factor = torch.ones((), requires_grad=True)
    loss = fused_linear_kd(**inputs).loss * factor
    (first,) = torch.autograd.grad(loss, inputs["student_hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_top1_agreement():
    identity = torch.eye(3)
    student = torch.tensor([[5.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    output = fused_linear_kd(student, identity, teacher, identity, torch.tensor([1.0, 1.0, 0.0]))
    assert output.top1_agreement.tolist() == [True, False, False]
    assert output.token_ce is None and output.teacher_ce_sum is None


def test_skipped_tokens_may_hold_anything():
    inputs = make_inputs()
    skipped = inputs["token_weight"] == 0
    skipped[3] = True
    inputs["labels"][3] = -100  # a label of -100 skips its token although its weight is not 0
    kept = {name: value[~skipped] if len(value) == N else value for name, value in inputs.items()}
    reference = fused_linear_kd(**kept, ce_weight=1.0)
    with torch.no_grad():
        inputs["student_hidden"][skipped] = torch.nan
        inputs["teacher_hidden"][skipped] = torch.inf
    inputs["labels"][skipped & (inputs["token_weight"] == 0)] = 10**6
    output = fused_linear_kd(**inputs, ce_weight=1.0)
    grad_hidden, grad_weight = gradients(output.loss, inputs)
    assert output.num_tokens == reference.num_tokens == int((~skipped).sum())
    torch.testing.assert_close(output.loss, reference.loss)
    assert grad_hidden[skipped].abs().max() == 0 and output.token_kl[skipped].abs().max() == 0
    torch.testing.assert_close(grad_weight, gradients(reference.loss, inputs)[1])


def test_no_tokens_at_all_give_a_zero_that_can_be_differentiated():
    inputs = make_inputs()
    inputs["token_weight"] = torch.zeros(N)
    output = fused_linear_kd(**inputs)
    assert output.loss == 0 and output.num_tokens == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(output.loss, inputs))


def test_tied_head_collects_the_gradient_of_both_uses():
    inputs = make_inputs()
    embeddings = inputs["student_weight"]
    tokens = torch.arange(N)
    tied = {**inputs, "student_hidden": embeddings[tokens].tanh()}
    (fused,) = torch.autograd.grad(fused_linear_kd(**tied, chunk_size=8).loss, embeddings, retain_graph=True)
    (reference,) = torch.autograd.grad(full_logits_losses(tied)[-1], embeddings)
    torch.testing.assert_close(fused, reference, rtol=1e-9, atol=1e-11)


class Recorder(TorchDispatchMode):
    """Remembers what operations ran, the shapes of what they made, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.copied: list[tuple[int, ...]] = []
        self.made: list[weakref.ref] = []
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.names.append(func.overloadpacket.__name__)
        self.shapes += [tuple(tensor.shape) for tensor in tensors]
        self.copied += [tuple(tensor.shape) for tensor in tensors if self.names[-1] == "_to_copy"]
        self.made = [ref for ref in self.made if ref() is not None] + [weakref.ref(tensor) for tensor in tensors]
        storages = [tensor.untyped_storage() for ref in self.made if (tensor := ref()) is not None]
        self.peak_bytes = max(self.peak_bytes, sum({one.data_ptr(): one.nbytes() for one in storages}.values()))
        return result


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_tokens(monkeypatch, name):
    """A chunk of both models' logits, a few of its rows, and the gradients: however many tokens there are."""
    vocab, chunk, rows, hidden_size = 200, 8, 2, 4
    monkeypatch.setattr(divergences, "CPU_BLOCK", rows * vocab)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def peak(count: int) -> int:
        hidden = torch.randn(count, hidden_size, requires_grad=True)
        weight = torch.randn(vocab, hidden_size, requires_grad=True)
        labels = torch.zeros(count, dtype=torch.long)
        with Recorder() as recorder:
            fused_linear_kd(
                hidden, weight, hidden, weight, torch.ones(count), labels=labels, ce_weight=0.5, chunk_size=chunk,
                divergence=name, student_transform=CAPPED,
            ).loss.backward()  # fmt: skip
        return recorder.peak_bytes

    few, many = peak(chunk), peak(4 * chunk)
    logits, gradients = 2 * chunk * vocab * 4, (vocab + chunk) * hidden_size * 4
    assert logits + gradients < few < logits + gradients + 14 * rows * vocab * 4
    assert many - few < 4 * chunk * 100  # bytes of what there is per token: the gradient of its hidden state, numbers


@pytest.mark.parametrize("frozen", [(), ("student_weight",), ("student_hidden",), ("student_weight", "student_bias")])
def test_only_the_gradients_needed_are_made(frozen):
    reference = make_inputs() | make_biases()
    fused_linear_kd(**reference).loss.backward()
    inputs = make_inputs() | make_biases()
    for name in frozen:
        inputs[name].requires_grad_(False)
    with Recorder() as recorder:
        fused_linear_kd(**inputs, chunk_size=N).loss.backward()
    # The products: each head once, dH and dW.
    assert recorder.names.count("addmm") == 2 + ("student_hidden" not in frozen) + ("student_weight" not in frozen)
    assert recorder.names.count("mul_") == 3 - len(frozen)  # each gradient is scaled in place
    for name in ("student_hidden", "student_weight", "student_bias"):
        if name in frozen:
            assert inputs[name].grad is None
        else:
            torch.testing.assert_close(inputs[name].grad, reference[name].grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_no_gradient_work_in_evaluation(how, name):
    inputs = make_inputs()
    with Recorder() as needed:
        reference = fused_linear_kd(**inputs, divergence=name, chunk_size=N).loss.detach()
    if how == "frozen":
        inputs["student_hidden"].requires_grad_(False)
        inputs["student_weight"].requires_grad_(False)
    with torch.set_grad_enabled(how == "frozen"), Recorder() as recorder:
        output = fused_linear_kd(**inputs, divergence=name, chunk_size=N)
    assert not output.loss.requires_grad
    assert torch.equal(output.loss, reference)
    assert needed.names.count("addmm") == 4 and recorder.names.count("addmm") == 2
    logits = (output.num_tokens, V)
    assert recorder.shapes.count(logits) < needed.shapes.count(logits)


def test_the_teacher_gets_no_gradient():
    inputs = make_inputs()
    inputs["teacher_hidden"].requires_grad_()
    inputs["teacher_weight"].requires_grad_()
    fused_linear_kd(**inputs).loss.backward()
    assert inputs["teacher_hidden"].grad is None and inputs["teacher_weight"].grad is None
    assert inputs["student_hidden"].grad is not None


def half_precision_inputs(dtype, kl, vocab=512, count=64):
    """A student whose KL from its teacher is about `kl`, in half precision, and the same numbers in fp64."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, 32, generator=generator)
    weight = torch.randn(vocab, 32, generator=generator) * 0.7  # logits spread by 4
    noise = torch.randn(vocab, 32, generator=generator) * (2 * kl / 32) ** 0.5
    half = {
        "student_hidden": hidden.to(dtype).requires_grad_(),
        "student_weight": (weight + noise).to(dtype).requires_grad_(),
        "teacher_hidden": hidden.to(dtype),
        "teacher_weight": weight.to(dtype),
        "token_weight": torch.full((count,), 1 / 3000),  # as of a mean over a batch
        "labels": torch.randint(0, vocab, (count,), generator=generator),
    }
    exact = {name: value.detach().double() for name, value in half.items() if name != "labels"}
    for name in ("student_hidden", "student_weight"):
        exact[name].requires_grad_()
    return half, exact | {"labels": half["labels"]}


@pytest.fixture
def half_operands(monkeypatch):
    """Half-precision operands and fp32 results, as the products have them on CUDA."""

    def multiply_(out, left, right, beta):
        assert left.dtype == right.dtype
        multiply_exactly_(out, left.to(out.dtype), right.to(out.dtype), beta)

    def operand_dtype(model, precise):
        return model.weight.dtype if precise == torch.float32 else precise

    multiply_exactly_ = kd_products.multiply_
    monkeypatch.setattr(kd_products, "_operand_dtype", operand_dtype)
    monkeypatch.setattr(kd_products, "multiply_", multiply_)


def relative_errors(half, exact, **options):
    fused, reference = fused_linear_kd(**half, **options), fused_linear_kd(**exact, **options)
    scale = 2.0**12  # as fp16 needs it, or the result itself falls below its range
    pairs = zip(gradients(scale * fused.loss, half), gradients(scale * reference.loss, exact), strict=True)
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]
    assert fused.loss.dtype == torch.float32
    return reference, (fused.loss.double() / reference.loss - 1).abs().item(), errors


@pytest.mark.parametrize("kl", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_the_gradient_precise(dtype, kl):
    """Logits rounded to bf16 put the error at 4, 13 and 37 %; of ours, most is the rounding of the result itself."""
    reference, loss_error, errors = relative_errors(*half_precision_inputs(dtype, kl))
    assert reference.kl_sum / reference.num_tokens == pytest.approx(kl, rel=0.4)
    assert loss_error < 1e-3 and max(errors) < 0.003


@pytest.mark.parametrize("kl", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"divergence": name} for name in NAMES] + [{"ce_weight": 2.0, "temperature": 3.0}])
def test_gradient_matrices_may_be_rounded(half_operands, dtype, kl, options):
    """Rounded for the products only, after weights and in a unit that suits fp16: below 0.3 % for every divergence."""
    inputs = half_precision_inputs(dtype, kl, vocab=2048, count=32)
    _, loss_error, errors = relative_errors(*inputs, **options)
    assert loss_error < 2e-3 and max(errors) < 0.003


def test_fp16_entries_are_moved_into_its_range(half_operands, monkeypatch):
    """Neither lost at 6e-8 nor infinite, although a mean over tokens and a mean over the vocabulary divide them."""
    largest = []

    def add(self, tokens, rows, grad):
        largest.append(grad.abs().max().item())

    monkeypatch.setattr(kd_products.HeadGradients, "add", add)
    for name in NAMES:
        for token_weight in (1.0, 1e-6):
            half, _ = half_precision_inputs(torch.float16, kl=0.5)
            half["token_weight"] = torch.full((64,), token_weight)
            fused_linear_kd(**half, divergence=name)
    assert min(largest) > 16 and max(largest) < 60_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_is_upcast_by_blocks(monkeypatch, dtype):
    half = make_inputs(dtype) | make_biases(dtype)
    expected = fused_linear_kd(**half)
    monkeypatch.setattr(kd_products, "VOCABULARY_BLOCK", 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a block is so many rows for every thread
    with Recorder() as recorder:
        output = fused_linear_kd(**half, chunk_size=10)
        found = gradients(output.loss, half)
    torch.testing.assert_close(output.loss, expected.loss)
    for one, other in zip(found, gradients(expected.loss, half), strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert {(30, HS), (30, HT)} <= set(recorder.copied) and not {(V, HS), (V, HT)} & set(recorder.copied)


def test_autocast_outside_does_not_round_the_logits_on_cpu():
    inputs = make_inputs(torch.float32)
    reference = fused_linear_kd(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused_linear_kd(**inputs)
    assert torch.equal(output.loss, reference.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_weight": torch.zeros(V + 27, HT).double()}, r"101 rows and the teacher's 128.*at most 101"),
        ({"vocab_limit": V + 1}, "vocab_limit=102 is not between 1 and 101"),
        ({"vocab_limit": 0}, "vocab_limit=0"),
        ({"temperature": 0.0}, "temperature=0.0 is not a finite number above 0"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0 is not a finite weight"),
        ({"divergence": "kl"}, "divergence='kl' is unknown"),
        ({"divergence": "js", "js_beta": 1.0}, "js_beta=1.0 is not between 0 and 1"),
        ({"student_bias": torch.zeros(V - 1)}, r"student_bias has shape \(100,\), but student_weight has 101 rows"),
        ({"ce_weight": 1.0, "labels": None}, "needs labels"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"labels": torch.full((N,), V)}, "labels range from 101 to 101"),
        ({"token_weight": torch.ones(N - 1)}, r"token_weight has shape \(36,\), but student_hidden has 37"),
        ({"student_hidden": torch.zeros(2, N, HS)}, "Flatten"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_kd(**{**make_inputs(), **change})


def test_automatic_chunks():
    assert tokens_per_chunk("auto", 128_256, torch.device("cpu")) == CPU_CHUNK
    assert tokens_per_chunk(17, 128_256, torch.device("cpu")) == 17
    big = tokens_per_chunk("auto", 1_000_000, torch.device("cpu"))
    assert big == 128 and 2 * 4 * big * 1_000_000 <= CPU_BUDGET


def test_different_paddings_meet_at_the_vocabulary_limit():
    inputs = make_inputs()
    padded = {**inputs, "teacher_weight": torch.cat([inputs["teacher_weight"], torch.full((27, HT), 9.0).double()])}
    one: KDOutput = fused_linear_kd(**padded, vocab_limit=V)
    other = fused_linear_kd(**inputs)
    torch.testing.assert_close(one.loss, other.loss)
