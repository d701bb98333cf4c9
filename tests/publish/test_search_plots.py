"""Plots of a search: what is drawn, and that many candidates stay readable."""

from __future__ import annotations

import pytest
from matplotlib import pyplot

from hf_minitron.publish import search_plots
from hf_minitron.publish.search_plots import plot_candidate_losses, plot_loss_by_parameters


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every picture, kept open until the test ends."""
    seen, finish = [], search_plots._finish
    monkeypatch.setattr(
        search_plots, "_finish", lambda figure, axes, path: seen.append(axes) or finish(figure, axes, path)
    )
    yield seen
    pyplot.close("all")


def labels(axes):
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


def test_every_candidate_is_a_line_and_the_teacher_a_level(tmp_path, drawn):
    curves = {"small": [(0, 5.0), (10, 2.0)], "large": [(0, 6.0), (10, 2.5)]}
    path = plot_candidate_losses(tmp_path / "losses.png", curves, 1.5)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn
    assert labels(axes) == ["1. small", "2. large", "teacher: 1.500"]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[5.0, 2.0], [6.0, 2.5], [1.5, 1.5]]
    assert axes.get_yscale() == "log"


def test_of_many_candidates_the_best_are_coloured_and_named(tmp_path, drawn):
    names = [f"c{i}" for i in range(18)]
    plot_candidate_losses(tmp_path / "losses.png", {name: [(0, 2.0), (1, 1.5)] for name in names}, None)
    plot_loss_by_parameters(
        tmp_path / "sizes.png", {name: (4_000_000_000 + i, 1.5, None) for i, name in enumerate(names)}
    )
    expected = [f"{i + 1}. c{i}" for i in range(6)] + ["12 others"]
    assert [labels(axes) for axes in drawn] == [expected, expected]
    assert drawn[0].get_yscale() == "linear"


def test_losses_have_their_error_over_parameters(tmp_path, drawn):
    plot_loss_by_parameters(tmp_path / "sizes.png", {"best": (100, 2.0, 0.0), "second": (120, 2.2, 0.1)})
    (axes,) = drawn
    bars = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axes.containers]
    assert bars == [[2.0, 2.0], pytest.approx([2.1, 2.3])]
