"""Markdown tables."""

from __future__ import annotations

import pytest

from hf_minitron.publish.tables import markdown_table


def test_columns_are_padded_and_numbers_stand_on_the_right():
    table = markdown_table(("model", "loss"), [("teacher", "1.5"), ("x", "12.25")])
    assert table.splitlines() == [
        "| model   |  loss |",
        "| ------- | ----: |",
        "| teacher |   1.5 |",
        "| x       | 12.25 |",
    ]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(("a", "b"), [("1",)])
