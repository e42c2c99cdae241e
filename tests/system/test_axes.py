"""Ticks of log axes are numbers that a reader can tell apart."""

import pytest
from matplotlib.figure import Figure

from ping_llm.system.axes import label_log_ticks


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (10, 30, ["12", "15", "18", "21", "24", "27", "30"]),
        (1, 100, ["1", "2", "5", "10", "20", "50", "100"]),
        (0.1, 2e6, ["0.1", "1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
    ],
)
def test_ticks_are_plain_numbers_and_no_more_than_there_is_room_for(low, high, labels):
    axes = Figure(figsize=(8, 4)).subplots()
    axes.set(xscale="log", xlim=(low, high))
    label_log_ticks(axes.xaxis, low, high)
    axes.figure.draw_without_rendering()
    inside = [t.get_text() for t, x in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True) if low <= x <= high]
    assert inside == labels
