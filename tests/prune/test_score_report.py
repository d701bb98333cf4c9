"""What score files say in numbers: against direct computation, for whole, partial and merged scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hf_minitron.prune.importance import score_model
from hf_minitron.prune.score_report import ScoreFileArguments, energy_share, inspect_scores, summarize_scores
from hf_minitron.prune.scores import ImportanceScores, Moments


@pytest.fixture
def files(build_model, rows, tmp_path: Path) -> list[Path]:
    """Scores of one model over three shards of the rows, and a scan of blocks of two on each."""
    paths = []
    for number, part in enumerate((rows[:2], rows[2:3], rows[3:])):
        scores = score_model(build_model(), part, progress=False)
        scores.info |= {"model": {"path": "tiny"}, "fingerprint": f"part {number}"}
        scores.moments["removal.lm_loss.2"] = _scan([[2.0, 1.0, 3.0]] * len(part))
        scores.save(tmp_path / f"{number}.safetensors")
        paths.append(tmp_path / f"{number}.safetensors")
    return paths


def test_layers_are_summed_up_from_their_scores(build_model, rows):
    scores = score_model(build_model(), rows, progress=False)
    report = summarize_scores(scores)
    assert len(report.layers) == 3
    for index, layer in enumerate(report.layers):
        neurons = sorted((value * value for value in scores.neurons[index].tolist()), reverse=True)
        assert layer.best_neurons == pytest.approx(sum(neurons[:20]) / sum(neurons))
        assert layer.block_importance == scores.layers[index].item()
        assert (layer.least_head, layer.greatest_head) == (min(scores.heads[index]), max(scores.heads[index]))


def test_hidden_energy_is_that_of_the_best_channels(build_model, rows):
    scores = score_model(build_model(), rows, progress=False)
    energy = sorted((value * value for value in scores.hidden.tolist()), reverse=True)
    expected = {kept: sum(energy[:kept]) / sum(energy) for kept in (6, 12, 15, 18, 21)}
    assert summarize_scores(scores).hidden_energy == pytest.approx(expected)


def test_energy_share():
    scores = torch.tensor([1.0, 3.0, 0.0, 2.0])
    assert [energy_share(scores, kept) for kept in range(5)] == pytest.approx([0, 9 / 14, 13 / 14, 1, 1])
    assert energy_share(torch.zeros(4), 2) is None


@pytest.mark.parametrize("axes", [("hidden",), ("layers",), ("heads", "neurons")])
def test_axes_that_were_not_scored_are_left_out(build_model, rows, axes):
    report = summarize_scores(score_model(build_model(), rows, axes=axes, progress=False))
    assert bool(report.hidden_energy) == ("hidden" in axes)
    assert len(report.layers) == (0 if axes == ("hidden",) else 3)
    for layer in report.layers:
        assert (layer.block_importance is None) == ("layers" not in axes)
        assert (layer.best_neurons is None) == (layer.least_head is None) == ("heads" not in axes)


def test_removals_are_reported_with_what_the_intact_model_has():
    scores = ImportanceScores(("l2", "mean"), 8, {"removal.accuracy.2": _scan([[0.5, 0.0, 1.0], [0.25, 0.5, 0.5]])})
    (removal,) = summarize_scores(scores).as_dict()["removals"]
    assert (removal["metric"], removal["num_dropped"], removal["best_start"], removal["intact"]) == (
        *("accuracy", 2, 1),
        0.75,
    )
    assert removal["damage"] == [0.375, 0.25]
    assert removal["standard_error"] == pytest.approx([0.125, 0.25])


def test_json_has_no_nan():
    scores = ImportanceScores(("l2", "mean"), 8, {"removal.lm_loss.1": _scan([[0.5, 0.0, 1.0]])})
    text = json.dumps(summarize_scores(scores).as_dict(), allow_nan=False)
    assert json.loads(text)["removals"][0]["standard_error"] == [None, None]


def test_several_files_are_merged_and_written(files, build_model, rows, tmp_path):
    output = tmp_path / "deep" / "merged.safetensors"
    report = inspect_scores(ScoreFileArguments([str(path) for path in files], output_file=str(output)))
    whole = summarize_scores(score_model(build_model(), rows, progress=False))
    for found, expected in zip(report.layers, whole.layers, strict=True):
        assert vars(found) == pytest.approx(vars(expected), rel=1e-5)
    assert report.hidden_energy == pytest.approx(whole.hidden_energy, rel=1e-5)
    assert report.removals[0].best_start == 1 and report.scores.moments["removal.lm_loss.2"].count == 7
    written = inspect_scores(ScoreFileArguments([str(output)]))
    assert written.as_dict() == report.as_dict()
    assert written.scores.info["num_samples"] == 7


def test_an_output_may_replace_an_input(files):
    report = inspect_scores(ScoreFileArguments([str(path) for path in files], output_file=str(files[0])))
    assert ImportanceScores.load(files[0]).info == report.scores.info


def test_what_does_not_fit_is_named_and_nothing_is_written(files, build_model, rows, tmp_path):
    output = tmp_path / "merged.safetensors"
    other = score_model(build_model(), rows[3:], aggregation=("mean", "mean"), progress=False)
    other.info |= {"model": {"path": "tiny"}}
    other.save(tmp_path / "other.safetensors")
    for names, message in (
        ([files[0], tmp_path / "other.safetensors"], r"other\.safetensors: scores cannot be merged: aggregation is"),
        ([files[0], files[1], files[0]], r"0\.safetensors: scores cannot be merged: both hold the rows.*part 0"),
        ([files[0], tmp_path / "none.safetensors"], r"none\.safetensors"),
        ([tmp_path], "is a folder: give a file written by"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            inspect_scores(ScoreFileArguments([str(name) for name in names], output_file=str(output)))
    assert not output.exists()


def test_outputs_of_the_wrong_kind_are_refused_at_once(files, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"):
        ScoreFileArguments([str(files[0])], output_file=str(tmp_path))
    with pytest.raises(NotADirectoryError, match="is a file: give the name of a folder"):
        ScoreFileArguments([str(files[0])], plot_dir=str(files[1]))


def _scan(samples: list[list[float]]) -> Moments:
    moments = Moments()
    moments.add(torch.tensor(samples))
    assert not math.isnan(moments.mean.sum())
    return moments
