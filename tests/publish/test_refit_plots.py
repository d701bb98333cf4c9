"""Pictures of a refit."""

from __future__ import annotations

import pytest
from matplotlib import pyplot

from hf_minitron.publish import refit_plots

FIT = {"before": 0.2, "after": 0.1, "effective_rank": 5.0}
SETTINGS = {
    "sizes": {"hidden_size": 4},
    "source_sizes": {"hidden_size": 8},
    "spectrum": [[0, 0.6], [2, 0.3], [4, 0.1]],
    "effective_rank": 2.2,
    "energy_kept": 0.97,
    "layers": {"0": {"self_attn.q_proj": FIT, "mlp.down_proj": FIT}, "2": {"mlp.down_proj": FIT | {"after": 0.05}}},
}


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are when they would be written."""
    kept = {}

    def keep(figure, path):
        kept[path.name] = figure
        return path

    monkeypatch.setattr(refit_plots, "save_figure", keep)
    yield kept
    pyplot.close("all")


def test_spectrum_and_what_is_kept(figures, tmp_path):
    refit_plots.plot_refit(tmp_path, SETTINGS)
    (axes,) = figures["spectrum.png"].axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.6], [3, 0.3], [5, 0.1]]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["principal directions", "kept: 4 of 8", "effective rank: 2"]
    assert "97.00 %" in axes.get_title()


def test_errors_of_slicing_and_refit_by_layer(figures, tmp_path):
    refit_plots.plot_refit(tmp_path, SETTINGS)
    attention, feed_forward = figures["errors.png"].axes
    assert (attention.get_title(), feed_forward.get_title()) == ("attention", "feed-forward")
    sliced, refit = (line.get_xydata().tolist() for line in feed_forward.lines)
    assert sliced == [[0, 0.2], [2, 0.2]]
    assert refit == [[0, 0.1], [2, 0.05]]


def test_what_is_not_known_is_not_drawn(tmp_path):
    settings = {"layers": {"0": {"mlp.down_proj": {"before": None, "after": None}}, "1": {}}}
    assert refit_plots.plot_refit(tmp_path / "none", settings) == []
    paths = refit_plots.plot_refit(tmp_path / "plots", {"layers": {"0": {"mlp.down_proj": FIT}}})
    assert [path.name for path in paths] == ["errors.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
