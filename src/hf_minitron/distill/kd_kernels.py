"""The row math of `divergences.py` as one Triton kernel: a program per token, all in fp32, nothing but sums in between.

Logits are read twice, for the softmaxes and for loss and gradient; the divergences whose gradient needs their value
first read them a third time. Imported only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_minitron.distill.divergences import SMALLEST_NORM, TokenLoss, TokenValues

BLOCK = 4096  # columns that a program holds at a time
WARPS = 16
LOWEST = tl.constexpr(-1e30)  # the logit of a column beyond the vocabulary


def token_losses_(
    settings: TokenLoss,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    grad: Tensor | None,
) -> TokenValues:
    """`divergences.token_losses_` for fp32 logits whose columns are contiguous."""
    count, vocab_size = student.shape
    values = student.new_zeros(5, count)
    student_transform, teacher_transform = settings.student_transform, settings.teacher_transform
    with torch.cuda.device_of(student):
        _token_losses[(count,)](
            student,
            teacher,
            labels,
            weight,
            grad,
            values,
            student.stride(0),
            teacher.stride(0),
            0 if grad is None else grad.stride(0),
            count,
            vocab_size,
            1.0 / settings.temperature,
            settings.scale,
            settings.ce_weight,
            settings.js_beta,
            student_transform.scale,
            student_transform.softcap or 0.0,
            teacher_transform.scale,
            teacher_transform.softcap or 0.0,
            SMALLEST_NORM,
            DIVERGENCE=settings.divergence,
            NEEDS_GRAD=grad is not None,
            HAS_LABELS=labels is not None,
            HAS_CE=settings.ce_weight != 0,
            HAS_TEMPERATURE=settings.temperature != 1,
            STUDENT_CAPPED=student_transform.softcap is not None,
            TEACHER_CAPPED=teacher_transform.softcap is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return TokenValues(*values[:4], values[4] != 0)


@triton.jit
def _token_losses(
    students,
    teachers,
    labels,
    weights,
    grads,
    values,
    student_stride,
    teacher_stride,
    grad_stride,
    count,
    vocab_size,
    inverse_temperature,
    divergence_scale,
    ce_weight,
    beta,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    smallest_norm,
    DIVERGENCE: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GRAD_FROM_VALUE: tl.constexpr = DIVERGENCE == "reverse_kl" or DIVERGENCE == "js" or DIVERGENCE == "cosine"
    token = tl.program_id(0).to(tl.int64)
    student, teacher, grad = students + token * student_stride, teachers + token * teacher_stride, grads
    if NEEDS_GRAD:
        grad += token * grad_stride
    weight = tl.load(weights + token)
    label = -1
    if HAS_LABELS:  # read before the gradient is written in its place
        label = tl.load(labels + token)
        s_label = _load_logits(student, label, True, student_scale, student_cap, STUDENT_CAPPED)
        t_label = _load_logits(teacher, label, True, teacher_scale, teacher_cap, TEACHER_CAPPED)
    lanes = tl.arange(0, BLOCK)

    # The softmaxes: in every lane the highest logit so far, and sums relative to it.
    s_top = tl.full((BLOCK,), LOWEST, tl.float32)
    t_top = tl.full((BLOCK,), LOWEST, tl.float32)
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    s_plain_sum = tl.zeros((BLOCK,), tl.float32)  # at temperature 1
    t_plain_sum = tl.zeros((BLOCK,), tl.float32)
    s_square = tl.zeros((BLOCK,), tl.float32)
    t_square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + lanes < vocab_size
        s = _load_logits(student, start + lanes, inside, student_scale, student_cap, STUDENT_CAPPED)
        t = _load_logits(teacher, start + lanes, inside, teacher_scale, teacher_cap, TEACHER_CAPPED)
        s_top, s_sum, s_plain_sum = _add(s, s_top, s_sum, s_plain_sum, inverse_temperature, HAS_TEMPERATURE)
        t_top, t_sum, t_plain_sum = _add(t, t_top, t_sum, t_plain_sum, inverse_temperature, HAS_TEMPERATURE)
        if DIVERGENCE == "cosine":
            s_square += tl.where(inside, s * s, 0.0)
            t_square += tl.where(inside, t * t, 0.0)
    s_top, s_sum, s_plain_sum = _join(s_top, s_sum, s_plain_sum, inverse_temperature, HAS_TEMPERATURE)
    t_top, t_sum, t_plain_sum = _join(t_top, t_sum, t_plain_sum, inverse_temperature, HAS_TEMPERATURE)
    s_norm = tl.maximum(tl.sqrt(tl.sum(s_square, axis=0)), smallest_norm)
    t_norm = tl.maximum(tl.sqrt(tl.sum(t_square, axis=0)), smallest_norm)

    # The values; in the same pass the gradients that do not need them.
    kl = tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK,), tl.float32)
    center = tl.zeros((BLOCK,), tl.float32)  # the student's KL from the mixture, for the gradient of js
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    by_temperature = divergence_scale * inverse_temperature
    for start in range(0, vocab_size, BLOCK):
        inside = start + lanes < vocab_size
        s = _load_logits(student, start + lanes, inside, student_scale, student_cap, STUDENT_CAPPED)
        t = _load_logits(teacher, start + lanes, inside, teacher_scale, teacher_cap, TEACHER_CAPPED)
        p, q, gap = _compare(s, t, inside, s_top, t_top, s_sum, t_sum, inverse_temperature)
        kl += q * gap
        best = tl.maximum(best, (s - s_top) + (t - t_top))
        if DIVERGENCE == "reverse_kl":
            value -= p * gap
        elif DIVERGENCE == "js":
            to_mixture = _to_mixture(gap, beta)
            center += p * to_mixture
            value += (1 - beta) * p * to_mixture + beta * q * (gap + to_mixture)
        elif DIVERGENCE == "mse":
            value += tl.where(inside, (s - t) * (s - t), 0.0) / vocab_size
        elif DIVERGENCE == "cosine":
            difference = tl.where(inside, s / s_norm - t / t_norm, 0.0)
            value += 0.5 * difference * difference
        if NEEDS_GRAD and not GRAD_FROM_VALUE:
            by_logits = (p - q) * by_temperature
            if DIVERGENCE == "mse":
                by_logits = 2 * (s - t) / vocab_size
            if HAS_CE:
                by_logits += ce_weight * _ce_gradient(s, s_top, s_plain_sum, start + lanes, label)
            by_output = _through_transform(by_logits * weight, s, student_scale, student_cap, STUDENT_CAPPED)
            tl.store(grad + start + lanes, by_output.to(grad.dtype.element_ty), mask=inside)
    total_kl, total = tl.sum(kl, axis=0), tl.sum(value, axis=0)
    if DIVERGENCE == "forward_kl":
        total = total_kl

    if NEEDS_GRAD and GRAD_FROM_VALUE:
        student_kl = tl.sum(center, axis=0)
        for start in range(0, vocab_size, BLOCK):
            inside = start + lanes < vocab_size
            s = _load_logits(student, start + lanes, inside, student_scale, student_cap, STUDENT_CAPPED)
            t = _load_logits(teacher, start + lanes, inside, teacher_scale, teacher_cap, TEACHER_CAPPED)
            p, q, gap = _compare(s, t, inside, s_top, t_top, s_sum, t_sum, inverse_temperature)
            by_logits = -p * (gap + total) * by_temperature
            if DIVERGENCE == "js":
                by_logits = (1 - beta) * p * (_to_mixture(gap, beta) - student_kl) * by_temperature
            elif DIVERGENCE == "cosine":
                by_logits = ((s / s_norm - t / t_norm) - total * (s / s_norm)) / s_norm
            if HAS_CE:
                by_logits += ce_weight * _ce_gradient(s, s_top, s_plain_sum, start + lanes, label)
            by_output = _through_transform(by_logits * weight, s, student_scale, student_cap, STUDENT_CAPPED)
            tl.store(grad + start + lanes, by_output.to(grad.dtype.element_ty), mask=inside)

    loss = divergence_scale * total
    if HAS_LABELS:
        ce = tl.log(s_plain_sum) - (s_label - s_top)
        tl.store(values + 2 * count + token, ce)
        tl.store(values + 3 * count + token, tl.log(t_plain_sum) - (t_label - t_top))
        if HAS_CE:
            loss += ce_weight * ce
    tl.store(values + token, loss)
    tl.store(values + count + token, total_kl)
    tl.store(values + 4 * count + token, (tl.max(best, axis=0) == 0).to(tl.float32))


@triton.jit
def _load_logits(row, columns, inside, scale, softcap, CAPPED: tl.constexpr):
    """The model's logits in some columns of the row that its head gave."""
    logits = tl.load(row + columns, mask=inside, other=0.0) * scale
    if CAPPED:
        decay = tl.exp(-2 * tl.abs(logits) / softcap)
        tanh = (1 - decay) / (1 + decay)
        logits = softcap * tl.where(logits < 0, -tanh, tanh)
    return tl.where(inside, logits, LOWEST)


@triton.jit
def _add(logits, top, total, plain_total, inverse_temperature, HAS_TEMPERATURE: tl.constexpr):
    """The running maximum, and sums of exp((z - top) / T) and exp(z - top), with one more block of logits."""
    higher = tl.maximum(top, logits)
    fall, rise = top - higher, logits - higher
    total = total * tl.exp(fall * inverse_temperature) + tl.exp(rise * inverse_temperature)
    if HAS_TEMPERATURE:
        plain_total = plain_total * tl.exp(fall) + tl.exp(rise)
    return higher, total, plain_total


@triton.jit
def _join(top, total, plain_total, inverse_temperature, HAS_TEMPERATURE: tl.constexpr):
    """The same of all lanes together."""
    highest = tl.max(top, axis=0)
    whole = tl.sum(total * tl.exp((top - highest) * inverse_temperature), axis=0)
    plain_whole = whole
    if HAS_TEMPERATURE:
        plain_whole = tl.sum(plain_total * tl.exp(top - highest), axis=0)
    return highest, whole, plain_whole


@triton.jit
def _compare(s, t, inside, s_top, t_top, s_sum, t_sum, inverse_temperature):
    """p, q and gap = log(q / p); 0 beyond the vocabulary."""
    s_shifted, t_shifted = s - s_top, t - t_top
    gap = (t_shifted - s_shifted) * inverse_temperature + (tl.log(s_sum) - tl.log(t_sum))
    p, q = tl.exp(s_shifted * inverse_temperature) / s_sum, tl.exp(t_shifted * inverse_temperature) / t_sum
    return p, q, tl.where(inside, gap, 0.0)


@triton.jit
def _to_mixture(gap, beta):
    """log(p / m), m = beta q + (1 - beta) p; linear in the gap beyond e^50."""
    near = tl.minimum(gap, 50.0)
    return -(tl.log(1 + beta * (tl.exp(near) - 1)) + (gap - near))


@triton.jit
def _ce_gradient(s, s_top, s_plain_sum, columns, label):
    return tl.exp(s - s_top) / s_plain_sum - tl.where(columns == label, 1.0, 0.0)


@triton.jit
def _through_transform(by_logits, logits, scale, softcap, CAPPED: tl.constexpr):
    """The gradient by the head's output, from that by the logits."""
    if CAPPED:
        tanh = logits / softcap
        by_logits *= 1 - tanh * tanh
    return by_logits * scale
