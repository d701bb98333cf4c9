"""The shift report: distances of known texts, samples, losses, the advice, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minitron import cli
from hf_minitron.distill.shift import OWN_SAMPLES, ShiftArguments, advise, report_shift, sample_rows
from hf_minitron.distill.token_distance import (
    Distance,
    compare_texts,
    divergence_by_token,
    jensen_shannon,
    token_shares,
)


def rows(seed: int, shares: list[float], count: int = 40, length: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(shares), p=shares, size=(count, length))


def test_the_divergence_of_known_distributions():
    a, b = np.array([0, 0, 1, 1]), np.array([2, 3])
    assert jensen_shannon(a, a) == 0
    assert jensen_shannon(a, b) == pytest.approx(1)  # nothing in common
    mixture = [0.75, 0.25]  # of (1, 0) and (1/2, 1/2)
    entropy = -sum(p * math.log2(p) for p in mixture)
    assert jensen_shannon(np.array([0]), np.array([0, 1])) == pytest.approx(entropy - 0.5)


def test_equal_texts_are_as_far_apart_as_chance_and_others_are_not():
    even, uneven = [0.25] * 4, [0.7, 0.1, 0.1, 0.1]
    same = compare_texts(rows(0, even), rows(1, even), 4, order=1)
    assert same.excess < 0.003 and 0 < same.floor < 0.01
    other = compare_texts(rows(0, even), rows(1, uneven), 4, order=1)
    expected = jensen_shannon(rows(2, even, 2000).ravel(), rows(3, uneven, 2000).ravel())
    assert other.divergence == pytest.approx(expected, abs=0.02) and other.excess > 0.1


def test_order_is_seen_by_pairs_alone():
    up, down = np.tile(np.arange(10), (20, 5)), np.tile(np.arange(10)[::-1], (20, 5))
    assert compare_texts(up, down, 10, order=1).divergence == pytest.approx(0)
    assert compare_texts(up, down, 10, order=2) == Distance(pytest.approx(1), pytest.approx(0))


def test_as_many_rows_are_used_of_both():
    """More text of one kind lowers neither its own floor nor the distance."""
    even = [0.25] * 4
    few, many = rows(0, even, count=10), rows(1, even, count=4000)
    assert compare_texts(few, many, 4, 1).divergence > 5 * compare_texts(rows(2, even, 4000), many, 4, 1).divergence
    with pytest.raises(ValueError, match="1 and 40 rows: both texts need at least two"):
        compare_texts(few[:1], rows(1, even), 4, 1)


def test_what_tokens_add_sums_to_the_divergence():
    new, reference = rows(0, [0.5, 0.5, 0.0]), rows(1, [0.2, 0.3, 0.5])
    shares = token_shares(new, 5), token_shares(reference, 5)
    parts = divergence_by_token(*shares)
    assert parts.sum() == pytest.approx(jensen_shannon(new.ravel(), reference.ravel()))
    assert parts.argmax() == 2 and not parts[3:].any() and shares[0].sum() == pytest.approx(1)


def test_samples_are_seeded_go_on_after_a_document_and_follow_the_model(tiny_checkpoint, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely, the end of a document too
    found = [sample_rows(model, tiny_tokenizer, 70, 40, 16, seed) for seed in (0, 0, 1)]
    assert found[0].shape == (70, 40) and (found[0][:, 0] == tiny_tokenizer.bos_token_id).all()
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    tokens, counts = np.unique(found[0][:, 1:], return_counts=True)
    assert len(tokens) > 295 and counts.max() < 30 and tiny_tokenizer.eos_token_id in tokens


@pytest.fixture
def arguments(tiny_checkpoint, tiny_text, held_out_text):
    def build(**changes) -> ShiftArguments:
        options = {"teacher_model": tiny_checkpoint, "dataset": tiny_text, "max_length": 16, "num_rows": 30} | changes
        return ShiftArguments(**{k: str(v) if hasattr(v, "parts") else v for k, v in options.items()})

    return build


def test_the_report_tells_losses_of_whole_logits(tmp_path, arguments, held_out_text, tiny_checkpoint):
    output = tmp_path / "shift.json"
    report = report_shift(arguments(reference_dataset=held_out_text, output_file=output, teacher_dtype="float32"))
    assert report.reference == str(held_out_text) and report.num_tokens == 30 * 16
    assert report.tokens_apart.excess < 0.1 and "the same kind" in report.advice
    assert json.loads(output.read_text()) == json.loads(json.dumps(report.as_dict()))
    from transformers import AutoTokenizer

    from hf_minitron.data import load_text, pack_rows

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = torch.tensor(pack_rows(load_text(str(held_out_text)), tokenizer, 16, max_rows=30, seed=0)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    assert report.reference_loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert report.reference_loss_error == pytest.approx(losses.std().item() / 30**0.5, rel=1e-4)


def test_the_command_compares_with_samples_and_draws(tmp_path, capsys, tiny_checkpoint, tiny_text):
    words = ["shift", tiny_checkpoint, "--dataset", tiny_text, "--num-rows", 8, "--max-length", 16]
    assert cli.main([str(word) for word in [*words, "--plot-file", tmp_path / "shift.png"]]) == 0
    text = capsys.readouterr().out
    assert OWN_SAMPLES in text and "bits above chance by single tokens" in text
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("excess", "gap", "error", "words"),
    [
        (0.01, 0.05, 0.1, "the same kind of text. Correction has little to give"),
        (0.01, 0.5, 0.1, "somewhat different text. Try a short correction"),
        (0.1, 0.0, 0.1, "somewhat different text"),
        (0.3, 1.5, 0.1, "another kind of text. Correct the teacher first"),
    ],
)
def test_the_advice_follows_distance_and_loss(excess, gap, error, words):
    advice = advise(Distance(0.2 + excess, 0.2), gap, error, "the reference")
    assert words in advice and f"{excess:.3f} bits" in advice and f"{gap:+.2f} ± 0.10 nats" in advice


def test_bad_input_is_refused(tmp_path, arguments, tiny_checkpoint, tiny_text):
    with pytest.raises(ValueError, match=r"num_rows=3, .* at least 4 rows"):
        report_shift(arguments(num_rows=3))
    with pytest.raises(ValueError, match="there is nothing to compare"):
        report_shift(arguments(reference_dataset=tiny_text))
    bare = shutil.copytree(tiny_checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        report_shift(arguments(teacher_model=bare))
