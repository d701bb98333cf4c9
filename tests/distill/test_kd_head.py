"""The fused head against full logits and autograd: values, gradients, skipping and memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_minitron.distill.kd_head import LIVE_BUFFERS, KDOutput, fused_linear_kd

N, V, HS, HT = 37, 101, 8, 12


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


def test_gradient_by_logits_is_the_difference_of_probabilities():
    student_logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    teacher_logits = torch.randn(N, V, dtype=torch.float64)
    identity = torch.eye(V, dtype=torch.float64)  # a head that makes the hidden states the logits
    output = fused_linear_kd(student_logits, identity, teacher_logits, identity, torch.full((N,), 1 / N).double())
    output.loss.backward()
    expected = (student_logits.detach().softmax(-1) - teacher_logits.softmax(-1)) / N
    torch.testing.assert_close(student_logits.grad, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identical_models_have_loss_and_gradient_exactly_zero(dtype):
    inputs = make_inputs(dtype)
    inputs["teacher_hidden"], inputs["teacher_weight"] = inputs["student_hidden"], inputs["student_weight"]
    output = fused_linear_kd(**inputs, temperature=2.0)
    assert output.loss.item() == 0.0
    assert all(gradient.abs().max() == 0 for gradient in gradients(output.loss, inputs))
    assert torch.equal(output.top1_agreement, output.token_mask)


def test_chunk_sizes_agree():
    inputs = make_inputs()
    reference = fused_linear_kd(**inputs, ce_weight=0.3, chunk_size=N)
    reference_gradients = gradients(reference.loss, inputs)
    for chunk_size in (1, 5, N + 100, "auto"):
        output = fused_linear_kd(**inputs, ce_weight=0.3, chunk_size=chunk_size)
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


class TensorRecorder(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


def test_never_more_than_a_chunk_of_logits():
    count, vocab, chunk = 64, 1000, 8
    hidden = torch.randn(count, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    labels = torch.zeros(count, dtype=torch.long)
    with TensorRecorder() as recorder:
        output = fused_linear_kd(
            hidden, weight, hidden, weight, torch.ones(count), labels=labels, ce_weight=0.5, temperature=2.0,
            chunk_size=chunk,
        )  # fmt: skip
        output.loss.backward()
    assert recorder.largest() == chunk * vocab  # the recorder sees logits, and no larger tensor than one chunk


class LiveBuffers(TorchDispatchMode):
    """Counts how many buffers of one shape are alive at once, at the most."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.peak = shape, 0
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.made.append(weakref.ref(result))
        alive = [tensor for reference in self.made if (tensor := reference()) is not None]
        self.peak = max(self.peak, len({tensor.data_ptr() for tensor in alive}))
        return result


def test_a_chunk_is_dropped_before_the_next():
    chunk = 6
    with LiveBuffers((chunk, V)) as buffers:
        fused_linear_kd(**make_inputs(), ce_weight=0.5, temperature=2.0, chunk_size=chunk)
    assert len(buffers.made) > 20
    assert 2 <= buffers.peak < LIVE_BUFFERS  # one more is inside logsumexp, out of sight here


class OperationNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [(), ("student_weight",), ("student_hidden",)])
def test_only_the_gradients_needed_are_made(frozen):
    reference = make_inputs()
    fused_linear_kd(**reference).loss.backward()
    inputs = make_inputs()
    for name in frozen:
        inputs[name].requires_grad_(False)
    with OperationNames() as operations:
        fused_linear_kd(**inputs, chunk_size=N).loss.backward()
    assert operations.names.count("mm") == 2 + ("student_hidden" not in frozen)  # each head once, and dH
    assert operations.names.count("addmm_") == ("student_weight" not in frozen)  # dW
    for name in ("student_hidden", "student_weight"):
        if name in frozen:
            assert inputs[name].grad is None
        else:
            torch.testing.assert_close(inputs[name].grad, reference[name].grad)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_no_gradient_work_in_evaluation(how):
    inputs = make_inputs()
    reference = fused_linear_kd(**inputs).loss.detach()
    if how == "frozen":
        inputs["student_hidden"].requires_grad_(False)
        inputs["student_weight"].requires_grad_(False)
    with torch.set_grad_enabled(how == "frozen"), OperationNames() as operations:
        output = fused_linear_kd(**inputs, chunk_size=N)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, reference)
    assert operations.names.count("mm") == 2 and "addmm_" not in operations.names


def test_the_teacher_gets_no_gradient():
    inputs = make_inputs()
    inputs["teacher_hidden"].requires_grad_()
    inputs["teacher_weight"].requires_grad_()
    fused_linear_kd(**inputs).loss.backward()
    assert inputs["teacher_hidden"].grad is None and inputs["teacher_weight"].grad is None
    assert inputs["student_hidden"].grad is not None


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.03])
def test_bfloat16_inputs_keep_the_gradient_precise(distance):
    """Rounded logits would put the error at 37 % for the closest pair; fp32 logits keep it below 1 %."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 32, generator=generator)
    weight = torch.randn(512, 32, generator=generator) * 0.7
    noise = torch.randn(512, 32, generator=generator) * 0.7 * distance
    half = {
        "student_hidden": hidden.bfloat16().requires_grad_(),
        "student_weight": (weight + noise).bfloat16().requires_grad_(),
        "teacher_hidden": hidden.bfloat16(),
        "teacher_weight": weight.bfloat16(),
        "token_weight": torch.ones(64),
    }
    exact = {name: value.detach().double() for name, value in half.items()}
    for name in ("student_hidden", "student_weight"):
        exact[name].requires_grad_()
    fused = fused_linear_kd(**half)
    assert fused.loss.dtype == torch.float32
    reference = full_logits_losses({**exact, "labels": torch.zeros(64, dtype=torch.long)})[-1]
    torch.testing.assert_close(fused.loss.double(), reference, rtol=1e-4, atol=1e-6)
    for one, other in zip(gradients(fused.loss, half), gradients(reference, exact), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() / other.norm() < 0.01


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
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0 is negative"),
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


def test_different_paddings_meet_at_the_vocabulary_limit():
    inputs = make_inputs()
    padded = {**inputs, "teacher_weight": torch.cat([inputs["teacher_weight"], torch.full((27, HT), 9.0).double()])}
    one: KDOutput = fused_linear_kd(**padded, vocab_limit=V)
    other = fused_linear_kd(**inputs)
    torch.testing.assert_close(one.loss, other.loss)
