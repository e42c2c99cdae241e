"""Tokens are told apart by field, measurement and name."""

import numpy as np
import pytest

from ping_llm.config import FIELDS
from ping_llm.data import tokenization as tk
from ping_llm.inside.layout import Layout

B = tk.BYTE_0
WINDOW = [
    *(tk.MEASUREMENT_START, tk.DST_IPV4, B + 198, B + 51, tk.RTT_START, B + 100, B + 7, tk.SRC_IPV4, B + 192),
    *(tk.MEASUREMENT_START, tk.SRC_IPV6, B + 32, B + 1, tk.TIMESTAMP_DELTA1, B + 60, tk.FAILED, tk.DST_IPV6, B + 254),
    *(tk.MEASUREMENT_START, tk.RTT_START, B + 1, tk.PADDING, tk.PADDING),
]


def test_each_token_has_its_field_measurement_and_name():
    layout = Layout.of(np.array(WINDOW, dtype=np.int16))
    assert len(layout) == 21 and layout.measurements == 3
    dst_rtt_src = ["structure", "structure", "dst", "dst", "structure", "rtt", "rtt", "structure", "src"]
    src_time_dst = ["structure", "structure", "src", "src", "structure", "time", "rtt", "structure", "dst"]
    dst_rtt_src = ["structure", "structure", "dst", "dst", "structure", "rtt", "rtt", "structure", "src"]
    src_time_dst = ["structure", "structure", "src", "src", "structure", "time", "rtt", "structure", "dst"]
    fields = [*dst_rtt_src, *src_time_dst, "structure", "structure", "rtt"]
    assert [FIELDS[field] for field in layout.field] == fields
    assert layout.measurement.tolist() == [0] * 9 + [1] * 9 + [2] * 3
    names = ["start", "dst", "198", "51", "RTT", "100", "7", "src", "192"]
    names += ["start", "src", "20", "01", "time", "60", "failed", "dst", "fe", "start", "RTT", "1"]
    assert [layout.name(place) for place in range(21)] == names


def test_an_rtt_counts_where_both_of_its_bytes_stand():
    layout = Layout.of(np.array(WINDOW))
    assert [layout.place_of_rtt(measurement) for measurement in range(3)] == [4, None, None]
    assert layout.destination(0) == (tk.DST_IPV4, B + 198, B + 51)
    assert layout.destination(1) == (tk.DST_IPV6, B + 254) and layout.destination(2) == ()


@pytest.mark.parametrize("window", [[], [tk.PADDING], [tk.SRC_IPV4, B]])
def test_what_does_not_begin_a_window_is_refused(window):
    with pytest.raises(ValueError, match="a window begins with MEASUREMENT_START"):
        Layout.of(np.array(window, dtype=np.int64))
