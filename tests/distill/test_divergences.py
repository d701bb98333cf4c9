"""The loss of a token against naive formulas in fp64 and autograd; limits, identities, extremes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hf_minitron.architectures import LogitTransform
from hf_minitron.distill import divergences
from hf_minitron.distill.divergences import TokenLoss, token_losses, token_losses_

N, V = 9, 41
NAMES = ("forward_kl", "reverse_kl", "js", "mse", "cosine")
OF_DISTRIBUTIONS = NAMES[:3]
CAPPED = LogitTransform(scale=0.5, softcap=2.0)
SCALED = LogitTransform(scale=3.0)
PLAIN = LogitTransform()


def make_logits(dtype=torch.float64, spread=2.0, distance=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(N, V, generator=generator, dtype=torch.float64)
    student = teacher + distance * torch.randn(N, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=generator)
    return student.to(dtype), teacher.to(dtype), labels


def naive_divergence(settings: TokenLoss, student, teacher):
    """scale * divergence [N] of the models' logits, by torch's own losses."""
    name, temperature, beta = settings.divergence, settings.temperature, settings.js_beta
    if name == "mse":
        return F.mse_loss(student, teacher, reduction="none").mean(-1)
    if name == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)

    def kl(log_first, log_second):
        return F.kl_div(log_second, log_first, reduction="none", log_target=True).sum(-1)

    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    if name == "forward_kl":
        return temperature**2 * kl(log_q, log_p)
    if name == "reverse_kl":
        return temperature**2 * kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return temperature**2 * (beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m))


def of_model(head_output, transform: LogitTransform):
    """As Granite (logits_scaling = 1 / scale) and Gemma 2 have it in transformers."""
    logits = head_output * transform.scale
    return logits if transform.softcap is None else torch.tanh(logits / transform.softcap) * transform.softcap


def naive(settings: TokenLoss, student, teacher, labels):
    """Loss, KL, both cross-entropies and agreement, and the gradient of the summed loss by the student's logits."""
    leaf = student.detach().double().requires_grad_()
    z_s = of_model(leaf, settings.student_transform)
    z_t = of_model(teacher.double(), settings.teacher_transform)
    ce, teacher_ce = (F.cross_entropy(logits, labels, reduction="none") for logits in (z_s, z_t))
    loss = naive_divergence(settings, z_s, z_t) + settings.ce_weight * ce
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    forward_kl = TokenLoss("forward_kl", temperature=settings.temperature)
    kl = naive_divergence(forward_kl, z_s, z_t) / settings.temperature**2
    values = (loss.detach(), kl.detach(), ce.detach(), teacher_ce, z_s.argmax(-1) == z_t.argmax(-1))
    return values, gradient


def every_setting():
    for name, temperature, ce_weight, student, teacher in itertools.product(
        NAMES, (1.0, 0.5, 3.0), (0.0, 0.7), (PLAIN, CAPPED, SCALED), (PLAIN, CAPPED)
    ):
        if temperature == 1 or name in OF_DISTRIBUTIONS:
            yield TokenLoss(name, temperature, ce_weight, 0.3, student, teacher)


@pytest.mark.parametrize("settings", list(every_setting()), ids=repr)
def test_values_and_gradient_equal_the_naive_ones(settings):
    student, teacher, labels = make_logits()
    expected, expected_gradient = naive(settings, student, teacher, labels)
    untouched = student.clone(), teacher.clone()
    values, gradient = token_losses(settings, student, teacher, labels, needs_grad=True)
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(student, untouched[0]) and torch.equal(teacher, untouched[1])
    again, nothing = token_losses(settings, student, teacher, labels, needs_grad=False)
    assert nothing is None and all(map(torch.equal, again, values))


@pytest.mark.parametrize("name", OF_DISTRIBUTIONS)
def test_at_high_temperature_the_loss_compares_centred_logits(name):
    """Hinton et al. 2015, section 2.1: T^2 keeps the gradient's size; it tends to the difference of logits over V."""
    student, teacher, _ = make_logits()
    values, gradient = token_losses(TokenLoss(name, temperature=3000.0), student, teacher, None, True)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    share = 0.25 if name == "js" else 1.0  # b (1 - b)
    torch.testing.assert_close(gradient, share * difference / V, rtol=0, atol=3e-4)
    torch.testing.assert_close(values.loss, share * difference.square().mean(-1) / 2, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("beta", "factor", "limit"), [(1e-6, 1e6, "forward_kl"), (1 - 1e-6, 1e6, "reverse_kl")], ids=("to 0", "to 1")
)
def test_jensen_shannon_tends_to_the_kls(beta, factor, limit):
    student, teacher, _ = make_logits()
    values, gradient = token_losses(TokenLoss("js", js_beta=beta), student, teacher, None, True)
    expected, expected_gradient = token_losses(TokenLoss(limit), student, teacher, None, True)
    torch.testing.assert_close(factor * values.loss, expected.loss, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(factor * gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def test_jensen_shannon_is_symmetric_and_bounded_at_one_half():
    student, teacher, _ = make_logits(spread=100.0, distance=200.0)
    one = token_losses(TokenLoss("js"), student, teacher, None, False)[0].loss
    other = token_losses(TokenLoss("js"), teacher, student, None, False)[0].loss
    torch.testing.assert_close(one, other)
    assert one.max() <= math.log(2) + 1e-12 and one.max() > 0.69


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_have_loss_and_gradient_exactly_zero(name, temperature, dtype):
    if name not in OF_DISTRIBUTIONS:
        temperature = 1.0
    teacher = make_logits(dtype)[1]
    values, gradient = token_losses(TokenLoss(name, temperature), teacher, teacher.clone(), None, True)
    assert values.loss.abs().max() == 0 and values.kl.abs().max() == 0 and gradient.abs().max() == 0
    assert values.agreement.all() and values.ce.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_impossible_tokens_and_certain_ones(name, dtype):
    """Probabilities of 0 and 1: everything stays finite, and right where fp64 can say what is right."""
    student, teacher, labels = make_logits(dtype, spread=300.0, distance=300.0)
    settings = TokenLoss(name, ce_weight=0.5)
    values, gradient = token_losses(settings, student, teacher, labels, True)
    expected, expected_gradient = naive(settings, student, teacher, labels)
    for value, reference in zip(values[:4], expected[:4], strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-4)
    assert (gradient.double() - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
def test_fp32_is_exact_however_close_the_models_are(name, distance):
    student, teacher, labels = make_logits(torch.float32, spread=4.0, distance=distance)
    values, gradient = token_losses(TokenLoss(name), student, teacher, labels, True)
    expected, expected_gradient = naive(TokenLoss(name), student, teacher, labels)
    torch.testing.assert_close(values.loss.double(), expected[0], rtol=1e-3, atol=2e-7)
    assert (gradient.double() - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_agreement_counts_shared_winners():
    student = torch.tensor([[5.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [2.0, 2.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0], [0.0, 4.0, 0.0], [0.0, 0.0, 9.0]])
    for settings in (TokenLoss(), TokenLoss(temperature=2.0)):
        agreement = token_losses(settings, student, teacher, None, False)[0].agreement
        assert agreement.tolist() == [True, False, True, False]  # a tie counts as either


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_change_nothing(monkeypatch, name):
    student, teacher, labels = make_logits()
    weight = torch.rand(N, dtype=torch.float64)
    settings = TokenLoss(name, ce_weight=0.2)
    expected, by_logits = token_losses(settings, student, teacher, labels, True)
    monkeypatch.setattr(divergences, "CPU_BLOCK", 2 * V)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert divergences.rows_per_block(student) == 2
    values = token_losses_(settings, student, teacher, labels, weight, grad=student)  # in place of the logits
    for value, reference in zip(values, expected, strict=True):
        assert torch.equal(value, reference)
    torch.testing.assert_close(student, weight[:, None] * by_logits, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' is unknown.*forward_kl, reverse_kl, js, mse, cosine"),
        ({"temperature": 0.0}, "temperature=0.0 is not a finite number above 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"divergence": "mse", "temperature": 2.0}, "temperature=2.0 has no effect on divergence='mse'"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0 is not a finite weight"),
        ({"ce_weight": math.nan}, "ce_weight=nan"),
        ({"js_beta": 0.0}, "js_beta=0.0 is not between 0 and 1.*forward_kl"),
        ({"js_beta": 1.0}, "js_beta=1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenLoss(**options)
