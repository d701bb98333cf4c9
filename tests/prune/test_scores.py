"""Score files: what is saved is what is loaded; merging is exact, for any number of parts, and refuses what differs."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_minitron.prune.importance import score_model
from hf_minitron.prune.scores import AXES, STATISTICS, ImportanceScores, Moments

PAIRS = list(itertools.product(STATISTICS, STATISTICS))
SCAN = "removal.lm_loss.2"  # two candidate blocks of the three layers, and the intact model


@pytest.fixture
def score(build_model, rows):
    """Scores of a tiny model over some of the rows."""

    def score(part: slice = slice(None), **settings) -> ImportanceScores:
        return score_model(build_model(), rows[part], progress=False, **settings)

    return score


# Moments


def test_moments_do_not_cancel():
    """The variance of big, close numbers: squares minus the square of the mean would lose it."""
    samples = 1e8 + torch.arange(6, dtype=torch.float64)[:, None]
    moments = Moments()
    for sample in samples:
        moments.add(sample[None])
    assert moments.aggregate("var").item() == pytest.approx(35 / 12, rel=1e-9)


# Saved and loaded


def test_save_and_load(score, tmp_path: Path):
    scores = score(aggregation=("var", "l2"), neuron_signal="first_projection")
    scores.info["model"] = {"path": "x"}
    scores.moments[SCAN] = _scan(torch.tensor([[0.5, 0.25, 3.0], [1.5, 0.75, 4.0]]))
    scores.save(tmp_path / "scores.safetensors")
    loaded = ImportanceScores.load(tmp_path / "scores.safetensors")
    for axis in AXES:
        assert torch.equal(getattr(loaded, axis), getattr(scores, axis))
    assert (loaded.aggregation, loaded.head_dim, loaded.info) == (scores.aggregation, scores.head_dim, scores.info)
    assert (loaded.neuron_signal, loaded.axes) == ("first_projection", AXES)
    assert loaded.moments[SCAN].count == 2 and loaded.moments[SCAN].mean.tolist() == [1.0, 0.5, 3.5]
    assert loaded.moments[SCAN].deviation.tolist() == [0.5, 0.125, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]
    merged = loaded.merge(scores)
    assert merged.info["num_samples"] == 14


def test_files_from_before_there_was_a_signal_have_the_default(score, tmp_path: Path):
    scores = score()
    del scores.info["neuron_signal"]
    scores.save(tmp_path / "old.safetensors")
    old = ImportanceScores.load(tmp_path / "old.safetensors")
    assert old.neuron_signal == "down_proj_input"
    assert old.merge(score()).neuron_signal == "down_proj_input"


def test_files_that_hold_no_scores(tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x10")
    for name in ("weights", "half"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors holds no importance scores"):
            ImportanceScores.load(tmp_path / f"{name}.safetensors")


def test_a_scan_is_no_axis(score):
    scores = score(axes=("layers",))
    scores.moments[SCAN] = _scan(torch.ones(2, 3))
    assert scores.axes == ("layers",) and scores.layers.shape == (3,)
    with pytest.raises(ValueError, match="axis 'heads' was not scored, only layers"):
        scores.heads  # noqa: B018


# Merged


@pytest.mark.parametrize("aggregation", PAIRS, ids="-".join)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merging_three_parts_equals_scoring_the_whole(score, tmp_path, aggregation, order):
    settings = {"aggregation": aggregation, "neuron_signal": "first_projection"}
    samples = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = score(**settings), []
    whole.moments[SCAN] = _scan(samples)
    for number, rows in enumerate((slice(0, 1), slice(1, 3), slice(3, 7))):
        part = score(rows, **settings)
        part.moments[SCAN] = _scan(samples[rows])
        part.info |= {"fingerprint": f"rows {number}", "model": {"path": "x"}}
        part.save(tmp_path / f"{number}.safetensors")
        parts.append(ImportanceScores.load(tmp_path / f"{number}.safetensors"))
    merged = functools.reduce(ImportanceScores.merge, [parts[index] for index in order])
    for axis in AXES:
        torch.testing.assert_close(getattr(merged, axis), getattr(whole, axis), rtol=1e-5, atol=1e-7)
    for found, expected in zip(_facts(merged.moments[SCAN]), _facts(whole.moments[SCAN]), strict=True):
        torch.testing.assert_close(found, expected)
    assert (merged.info["num_samples"], merged.info["num_tokens"]) == (7, 112)
    assert merged.info["fingerprint"] == "+".join(f"rows {index}" for index in order)
    assert merged.info["model"] == {"path": "x"} and merged.info["sequence_length"] == 16


def test_facts_that_hold_for_one_part_only_are_left_out(score):
    first, second, third = score(slice(3)), score(slice(3, 6)), score(slice(6, 7))
    first.info |= {"dtype": "float32", "fingerprint": "a"}
    second.info |= {"dtype": "bfloat16"}
    for number, part in enumerate((first, second, third)):
        part.info["calibration"] = {"path": "x", "seed": number}
    merged = first.merge(second).merge(third)
    assert "dtype" not in merged.info and "fingerprint" not in merged.info
    assert merged.info["calibration"] == {"parts": [{"path": "x", "seed": number} for number in range(3)]}
    assert first.info["calibration"] == {"path": "x", "seed": 0}
    second.info["calibration"] = dict(first.info["calibration"])
    assert first.merge(second).info["calibration"] == {"path": "x", "seed": 0}


@pytest.mark.parametrize(
    ("settings", "info", "difference"),
    [
        ({"aggregation": ("mean", "l2")}, {}, r"aggregation is \('l2', 'mean'\) in one, \('mean', 'l2'\) in the other"),
        (
            {"axes": ("neurons", "layers")},
            {},
            r"axes is \('neurons', 'heads', 'hidden', 'layers'\) in one, \('neurons',",
        ),
        ({"neuron_signal": "first_projection"}, {}, "neuron_signal is down_proj_input in one, first_projection"),
        (
            {},
            {"model": {"path": "y", "sha256": "1"}},
            r"model is None in one, {'path': 'y', 'sha256': '1'} in the other",
        ),
    ],
)
def test_scores_that_differ_in_kind_are_not_merged(score, settings, info, difference):
    first, second = score(slice(3)), score(slice(3, 7), **settings)
    second.info |= info
    with pytest.raises(ValueError, match=f"cannot be merged: {difference}.*Score all shards with the same model"):
        first.merge(second)


def test_scores_of_other_shapes_or_scans_are_not_merged(score, build_model, rows):
    first = score(slice(3))
    narrow = score_model(build_model(intermediate_size=32), rows[3:], progress=False)
    with pytest.raises(ValueError, match=r"number of channels at neurons\.0 is 40 in one, 32 in the other"):
        first.merge(narrow)
    deep = score_model(build_model(num_hidden_layers=4), rows[3:], progress=False)
    for one, other, numbers in ((first, deep, "None in one, 40"), (deep, first, "40 in one, None")):
        with pytest.raises(ValueError, match=rf"number of channels at neurons\.3 is {numbers}"):
            one.merge(other)
    second = score(slice(3, 7))
    first.moments[SCAN], second.moments[SCAN] = _scan(torch.ones(2, 3)), _scan(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"number of blocks in removal\.lm_loss\.2 is 2 in one, 3 in the other"):
        first.merge(second)


def test_one_model_may_have_another_folder_name_on_another_machine(score):
    first, second = score(slice(3)), score(slice(3, 7))
    first.info["model"], second.info["model"] = {"path": "x", "sha256": "1"}, {"path": "y", "sha256": "1"}
    assert first.merge(second).info["model"] == {"path": "x", "sha256": "1"}
    second.info["model"] = {"path": "x", "sha256": "2"}
    with pytest.raises(ValueError, match=r"model is \{'path': 'x', 'sha256': '1'} in one"):
        first.merge(second)
    first.info["model"], second.info["model"] = {"id": "a/b", "commit": "1"}, {"path": "b", "sha256": "1"}
    with pytest.raises(ValueError, match=r"model is \{'id': 'a/b'"):
        first.merge(second)


def test_rows_are_not_counted_twice(score):
    parts = [score(slice(n, n + 2)) for n in (0, 2, 4)]
    for name, part in zip("abc", parts, strict=True):
        part.info["fingerprint"] = 20 * name
    merged = parts[0].merge(parts[1])
    for again in (parts[1], parts[1].merge(parts[2])):
        with pytest.raises(
            ValueError, match=f"both hold the rows with fingerprint {12 * 'b'}, which would count twice"
        ):
            merged.merge(again)
    assert merged.merge(parts[2]).info["num_samples"] == 6


def test_scans_of_other_blocks_come_along(score):
    first, second = score(slice(3)), score(slice(3, 7))
    samples = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    first.moments[SCAN], first.info["scans"] = _scan(samples), {SCAN: {"fingerprint": "a"}}
    other = SCAN.replace("2", "1")
    second.moments[other], second.info["scans"] = _scan(samples + 1), {other: {"fingerprint": "b"}}
    for merged in (first.merge(second), second.merge(first)):
        assert all(map(torch.equal, _facts(merged.moments[SCAN]), _facts(first.moments[SCAN])))
        assert all(map(torch.equal, _facts(merged.moments[other]), _facts(second.moments[other])))
        assert merged.info["scans"] == {SCAN: {"fingerprint": "a"}, other: {"fingerprint": "b"}}


def test_a_scan_of_one_task_counts_once(score):
    """Every machine may have asked the same questions: that makes their number no larger."""
    first, second, key = score(slice(3)), score(slice(3, 7)), "removal.accuracy.2"
    for part in (first, second):
        part.moments[key] = _scan(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
        part.info["scans"] = {key: {"task": {"task": "winogrande", "fingerprint": "q"}}}
    merged = first.merge(second)
    assert merged.moments[key].count == 2 and torch.equal(merged.moments[key].mean, first.moments[key].mean)
    assert merged.info["scans"] == first.info["scans"] and merged.info["num_samples"] == 7
    second.info["scans"] = {key: {"task": {"task": "piqa", "fingerprint": "r"}}}
    with pytest.raises(
        ValueError, match=r"the task of removal\.accuracy\.2 is {'task': 'winogrande'.* in one, .*'piqa'"
    ):
        first.merge(second)


def test_scans_of_rows_add_up_but_not_twice(score):
    parts, samples = [], torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number in range(3):
        part, rows = score(slice(2 * number, 2 * number + 2)), slice(2 * number, 2 * number + 2)
        part.moments[SCAN] = _scan(samples[rows])
        facts = {"fingerprint": f"rows {number}", "num_samples": 2, "sequence_length": 16}
        part.info["scans"] = {SCAN: facts | {"calibration": {"seed": number}}}
        parts.append(part)
    merged = functools.reduce(ImportanceScores.merge, parts)
    for found, expected in zip(_facts(merged.moments[SCAN]), _facts(_scan(samples)), strict=True):
        torch.testing.assert_close(found, expected)
    facts = merged.info["scans"][SCAN]
    assert (facts["num_samples"], facts["sequence_length"]) == (6, 16)
    assert facts["calibration"] == {"parts": [{"seed": number} for number in range(3)]}
    with pytest.raises(ValueError, match="both hold the rows with fingerprint rows 1, which would count twice"):
        merged.merge(parts[1])


def _scan(samples: torch.Tensor) -> Moments:
    moments = Moments()
    moments.add(samples)
    return moments


def _facts(moments: Moments) -> tuple[torch.Tensor, ...]:
    """Mean and standard error per candidate."""
    error = (moments.deviation / (moments.count - 1)).sqrt() / math.sqrt(moments.count)
    return torch.tensor(moments.count), moments.mean, error
