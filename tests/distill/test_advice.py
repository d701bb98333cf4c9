"""What distillation says of a student that was refit."""

from __future__ import annotations

import logging

import pytest

from hf_minitron.distill.advice import gap_share, learning_rate_factor, log_advice
from hf_minitron.lineage import write_lineage

REFIT = {"method": "refit", "held_out_loss": {"source": 2.0, "refit": 2.25, "sliced": 3.0}}


def test_the_gap_is_a_share_of_slicings():
    assert gap_share(REFIT) == 0.25
    assert gap_share(REFIT | {"held_out_loss": {"source": 2.0, "refit": 1.9, "sliced": 3.0}}) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "minitron"},
        REFIT | {"fell_back": True},
        REFIT | {"held_out_loss": {"refit": 2.25, "sliced": 3.0}},
        REFIT | {"held_out_loss": {"source": 2.0, "refit": 2.0, "sliced": 2.0}},
    ],
)
def test_nothing_is_said_where_nothing_is_known(settings, tmp_path, caplog):
    assert gap_share(settings) is None
    write_lineage(tmp_path, [{"stage": "prune", "settings": settings}])
    with caplog.at_level(logging.INFO):
        log_advice(tmp_path, 1e-4)
    assert not caplog.records


def test_a_smaller_gap_wants_a_smaller_rate():
    assert learning_rate_factor(1.0) == 0.7
    assert learning_rate_factor(0.25) == 0.35
    assert learning_rate_factor(0.0) == 0.1


def test_the_rate_is_stated(tmp_path, caplog):
    write_lineage(tmp_path, [{"stage": "prune", "settings": REFIT}])
    with caplog.at_level(logging.INFO):
        log_advice(tmp_path, 1e-4)
    assert "its gap to the source is 0.25 of plain slicing's" in caplog.text
    assert "about 0.35 of the learning rate" in caplog.text
    assert "If learning_rate=0.0001 was chosen for sliced students, try 3.5e-05." in caplog.text


def test_a_student_that_was_trained_since_is_left_alone(tmp_path, caplog):
    write_lineage(tmp_path, [{"stage": "prune", "settings": REFIT}, {"stage": "distill", "settings": {}}])
    with caplog.at_level(logging.INFO):
        log_advice(tmp_path, 1e-4)
        log_advice(tmp_path / "none", 1e-4)
    assert not caplog.records
