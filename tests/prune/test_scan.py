"""Scans: every candidate is measured as if it had been built, and no layer runs more often than it must."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from hf_minitron.prune import scan as scan_module
from hf_minitron.prune.depth import read_removal, removal_key
from hf_minitron.prune.multiple_choice import Question, Request
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.replay import LayerReplay
from hf_minitron.prune.scan import count_layer_evaluations, scan_questions, scan_rows
from hf_minitron.prune.scores import ImportanceScores
from hf_minitron.prune.target import PruneConfig


def scores_of(moments: dict) -> ImportanceScores:
    return ImportanceScores(("l2", "mean"), 8, moments)


@torch.no_grad()
def loss_of_rows(model, rows: torch.Tensor) -> torch.Tensor:
    """The mean loss of each row."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("num_dropped", [1, 2])
def test_a_scan_measures_the_models_that_pruning_builds(build_model, family_name, rows, num_dropped):
    """Every family: the loss without each block is that of the pruned model, and its error that over rows."""
    source = build_model(family_name)
    moments = scan_rows(source, rows, num_dropped=num_dropped, batch_size=3, progress=False)
    removal = read_removal(scores_of(moments), "lm_loss", num_dropped)
    intact = loss_of_rows(source, rows)
    assert removal.intact == pytest.approx(intact.mean().item(), abs=1e-6)
    assert len(removal.damage) == 3 - num_dropped + 1
    for start, (damage, error) in enumerate(zip(removal.damage, removal.standard_error, strict=True)):
        prune = PruneConfig(drop_layers=list(range(start, start + num_dropped)))
        differences = loss_of_rows(PrunerForCausalLM(source).prune(prune), rows) - intact
        assert damage == pytest.approx(differences.mean().item(), abs=1e-5)
        assert error == pytest.approx(differences.std().item() / math.sqrt(len(rows)), abs=1e-5)


def test_the_result_does_not_depend_on_the_batches(build_model, rows):
    model = build_model()
    whole = scan_rows(model, rows, num_dropped=[1, 2], batch_size=7, progress=False)
    for batch_size in (1, 2, 100):
        split = scan_rows(model, rows, num_dropped=[1, 2], batch_size=batch_size, progress=False)
        for key, moments in whole.items():
            torch.testing.assert_close(split[key].mean, moments.mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(split[key].deviation, moments.deviation, rtol=1e-4, atol=1e-7)


def test_logits_are_made_in_pieces(build_model, rows, monkeypatch):
    model = build_model("gemma2")
    whole = scan_rows(model, rows, num_dropped=1, progress=False)
    monkeypatch.setattr("hf_minitron.prune.replay.LOGIT_BYTES", 61 * 4 * 5)  # five positions of 61 tokens
    pieces = scan_rows(model, rows, num_dropped=1, progress=False)
    torch.testing.assert_close(pieces["removal.lm_loss.1"].mean, whole["removal.lm_loss.1"].mean)


@pytest.mark.parametrize("lengths", [[1], [2], [4], [1, 3], [5]])
def test_layers_run_no_more_often_than_counted(build_model, rows, monkeypatch, lengths):
    model, calls = build_model(num_hidden_layers=6), []
    run = LayerReplay.run
    monkeypatch.setattr(
        LayerReplay, "run", lambda self, layer, states: (calls.append(layer), run(self, layer, states))[1]
    )
    scan_rows(model, rows, num_dropped=lengths, batch_size=100, progress=False)
    shared, alone = count_layer_evaluations(6, lengths)
    assert len(calls) == shared < alone


def test_the_cost_of_the_papers_scan():
    """32 layers, blocks of 16: Σ_s (32 − s − 16) + 32 evaluations instead of 17 · 16 and the intact model's 32."""
    assert count_layer_evaluations(32, [16]) == (136 + 32, 17 * 16 + 32)


def test_the_cost_is_said(build_model, rows, caplog):
    with caplog.at_level(logging.INFO):
        scan_rows(build_model(num_hidden_layers=6), rows, num_dropped=2, progress=False)
    assert "16 layer evaluations per batch for blocks of 2 among 6 layers; each candidate on its own takes 26" in (
        caplog.text
    )


def test_the_model_is_as_before(build_model, rows, logits):
    model = build_model().train()
    before = logits(model)
    scan_rows(model, rows, num_dropped=1, progress=False)
    assert model.training
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert torch.equal(logits(model), before)


def test_the_model_is_as_before_after_an_error_too(build_model, rows, monkeypatch):
    model = build_model().train()
    own = model.model.layers[1].forward = model.model.layers[1].forward  # as accelerate's hooks set one
    monkeypatch.setattr(scan_module, "_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scan_rows(model, rows, num_dropped=1, progress=False)
    assert model.training
    assert model.model.layers[1].__dict__["forward"] is own
    assert "forward" not in model.model.layers[0].__dict__


# Block importance


@torch.no_grad()
def test_block_importance_is_zero_for_an_identity_and_two_for_a_negation(build_model, rows):
    model = build_model(num_hidden_layers=4)
    model.model.layers[1].forward = lambda hidden_states, *_, **__: hidden_states
    model.model.layers[2].forward = lambda hidden_states, *_, **__: -hidden_states
    removal = read_removal(
        scores_of(scan_rows(model, rows, num_dropped=[1, 2], metric="block_importance", progress=False)),
        "block_importance",
        1,
    )
    assert removal.damage[1] == pytest.approx(0, abs=1e-6)
    assert removal.damage[2] == pytest.approx(2, abs=1e-6)
    assert removal.intact == 0


@torch.no_grad()
def test_block_importance_is_the_cosine_across_the_block(build_model, family_name, rows):
    model = build_model(family_name)
    moments = scan_rows(model, rows, num_dropped=[1, 2], metric="block_importance", batch_size=2, progress=False)
    entering, after = [], []

    def keep(module, args, kwargs, output) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])
        after.append(output)

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
    model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    for n in (1, 2):
        expected = [1 - torch.cosine_similarity(entering[s], after[s + n - 1], dim=-1).mean() for s in range(3 - n + 1)]
        found = read_removal(scores_of(moments), "block_importance", n).damage
        torch.testing.assert_close(found.float(), torch.stack(expected), rtol=1e-5, atol=1e-6)


# Accuracy


def make_questions(count: int = 5) -> list[Question]:
    """Questions of unequal length; judged right when the first choice is likelier than the second."""
    generator = torch.Generator().manual_seed(2)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, 61, (length,), generator=generator).tolist()

    found = []
    for _ in range(count):
        context = tokens(3, 12)
        requests = tuple(Request(context, tokens(1, 4)) for _ in range(2))
        found.append(Question(requests, lambda log_probs, greedy: float(log_probs[0] > log_probs[1])))
    return found


@torch.no_grad()
def answer(model, request: Request) -> tuple[float, bool]:
    """Log-probability of one continuation by a plain forward pass."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(request.context) - 1 : -1].double()
    wanted = torch.tensor(request.continuation)
    picked = logits.log_softmax(1)[torch.arange(len(wanted)), wanted]
    return picked.sum().item(), bool((logits.argmax(1) == wanted).all())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_is_that_of_the_pruned_models(build_model, family_name, batch_size):
    model, questions = build_model(family_name), make_questions()
    seen: list = []
    spying = [Question(q.requests, lambda p, g, q=q: (seen.append((*p, *g)), q.judge(p, g))[1]) for q in questions]
    moments = scan_questions(model, spying, num_dropped=[1, 2], batch_size=batch_size, progress=False)
    assert set(moments) == {removal_key("accuracy", n) for n in (1, 2)}
    candidates = {(): model} | {
        tuple(drop): PrunerForCausalLM(model).prune(PruneConfig(drop_layers=drop))
        for drop in ([0], [1], [2], [0, 1], [1, 2])
    }
    answers = {drop: [[answer(m, r) for r in q.requests] for q in questions] for drop, m in candidates.items()}
    right = {drop: [float(a[0][0] > a[1][0]) for a in found] for drop, found in answers.items()}
    for n in (1, 2):
        removal = read_removal(scores_of(moments), "accuracy", n)
        assert removal.intact == sum(right[()]) / 5
        for start, damage in enumerate(removal.damage.tolist()):
            fallen = [a - b for a, b in zip(right[()], right[tuple(range(start, start + n))], strict=True)]
            assert damage == pytest.approx(sum(fallen) / 5)
    expected = [(a[0][0], a[1][0], a[0][1], a[1][1]) for found in answers.values() for a in found]
    for numbers in expected:
        assert any(other == pytest.approx(numbers, abs=1e-4) for other in seen), "a log-probability is off"


# Bad input


@torch.no_grad()
def test_a_model_that_gives_nan_is_refused(build_model, rows):
    model = build_model()
    model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="log-probabilities are NaN or Inf"):
        scan_rows(model, rows, num_dropped=1, progress=False)
    with pytest.raises(ValueError, match="log-probabilities are NaN or Inf"):
        scan_questions(model, make_questions(), num_dropped=1, progress=False)


def test_what_is_refused(build_model, rows):
    model = build_model()
    for wrong in (0, 3, -1, [], [1, 3], 1.5, True):
        with pytest.raises((ValueError, TypeError), match=r"of 3 layers between 1 and 2 can go|not iterable"):
            scan_rows(model, rows, num_dropped=wrong, progress=False)
    with pytest.raises(ValueError, match=r"metric='accuracy' is unknown here\. Use one of block_importance, lm_loss"):
        scan_rows(model, rows, num_dropped=1, metric="accuracy", progress=False)
    with pytest.raises(ValueError, match="at least one row of two tokens"):
        scan_rows(model, rows[:, :1], num_dropped=1, progress=False)
    with pytest.raises(ValueError, match="there are 0 questions"):
        scan_questions(model, [], num_dropped=1, progress=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        scan_rows(model, rows, num_dropped=1, batch_size=0, progress=False)
