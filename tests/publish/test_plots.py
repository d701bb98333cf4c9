"""Plots are whole pictures with something on them."""

from __future__ import annotations

import torch
from matplotlib import image

from hf_minitron.publish.plots import plot_importance, plot_losses


def colours(path):
    pixels = image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 500
    return {tuple((255 * pixel[:3]).astype(int)) for pixel in pixels.reshape(-1, pixels.shape[2])}


def test_every_curve_is_drawn_in_its_own_colour(tmp_path):
    curves = {"a": [(0, 3.0), (1000, 2.0)], "b": [(0, 4.0), (1000, 2.5)]}
    one = colours(plot_losses(tmp_path / "1.png", {"a": curves["a"]}, {}, "loss"))
    two = colours(plot_losses(tmp_path / "2.png", curves, {"teacher": 1.5}, "loss"))
    assert (0, 114, 178) in one and (213, 94, 0) not in one
    assert {(0, 114, 178), (213, 94, 0)} <= two


def test_importance_has_its_four_panels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator) for shape in ((3, 20), (3, 4), (16,), (3,))]
    path = plot_importance(tmp_path / "i.png", *scores, {"intermediate_size": 10, "hidden_size": 8})
    assert {(0, 158, 115), (213, 94, 0), (0, 114, 178)} <= colours(path)
