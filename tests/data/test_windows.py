"""Windows are pure functions of (row, rng), fill the sequence, and hold what the design says."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SCRIPTS
from reference_decoder import decode

from ping_llm.config import DataConfig
from ping_llm.data.tokenization import MEASUREMENT_START, PADDING
from ping_llm.data.windows import TIME_MODES, encode_windows, sample_window, windows_per_row

CONFIG = DataConfig()
TOKENS = 1025


def draw(row, count, config=CONFIG, tokens=TOKENS):
    return [sample_window(row, config, tokens, np.random.default_rng((1, i))) for i in range(count)]


def test_window_is_a_pure_function_of_row_and_rng(long_row):
    a, b = (sample_window(long_row, CONFIG, TOKENS, np.random.default_rng(5)) for _ in range(2))
    assert (a.index == b.index).all() and (a.order == b.order).all() and (a.dst_bytes == b.dst_bytes).all()
    other = sample_window(long_row, CONFIG, TOKENS, np.random.default_rng(6))
    assert len(a.index) != len(other.index) or (a.index != other.index).any()


def test_modes_occur_in_their_shares_and_order_time_as_they_say(long_row):
    windows = draw(long_row, 1500)
    shares = [np.mean([w.mode == mode for w in windows]) for mode in TIME_MODES]
    assert np.abs(np.array(shares) - [0.4, 0.3, 0.3]).max() < 0.04
    for window in windows:
        time_s = long_row.time_s[window.index]
        assert (np.diff(time_s[window.timed]) >= 0).all()
        assert len(np.unique(window.index)) == len(window.index)
        if window.mode == "full":
            assert window.timed.all()
        elif window.mode == "none":
            assert not window.timed.any() and (np.diff(time_s) < 0).any()
    lost = [1 - w.timed.mean() for w in windows if w.mode == "partial"]
    assert min(lost) > 0.02 and max(lost) < 0.98 and abs(np.mean(lost) - 0.5) < 0.05


def test_source_is_cut_once_a_window_and_destinations_one_by_one():
    row = make_row(5000, ipv6_share=0)
    windows = draw(row, 1500)
    src = [np.unique(w.src_bytes) for w in windows]
    assert all(len(lengths) == 1 for lengths in src)
    shares = np.bincount([lengths[0] for lengths in src], minlength=5) / len(src)
    assert np.abs(shares - [0.125, 0.125, 0.125, 0.125, 0.5]).max() < 0.04
    dst = np.concatenate([w.dst_bytes for w in windows])
    shares = np.bincount(dst, minlength=5) / len(dst)
    assert np.abs(shares - [0, 0.1 / 3, 0.1 / 3, 0.1 / 3, 0.9]).max() < 0.01


def test_no_dropout_shows_every_address_whole(long_row):
    config = DataConfig(src_prefix_dropout=0, dst_prefix_dropout=0)
    for window in draw(long_row, 20, config):
        width = np.where(long_row.dst_is_ipv4, 4, 16)[long_row.dst[window.index]]
        assert (window.src_bytes == width).all() and (window.dst_bytes == width).all()


def test_spans_are_log_uniform_from_filling_to_the_whole_row(long_row):
    spans = np.array([np.ptp(w.index) + 1 for w in draw(long_row, 1500, DataConfig(full_time=1, partial_time=0))])
    position = np.log(spans / spans.min()) / np.log(len(long_row) / spans.min())
    assert np.abs(np.quantile(position, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.06


@pytest.mark.parametrize("ipv6_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [385, 1025])
def test_windows_of_long_rows_are_padded_less_than_5_percent(ipv6_share, tokens):
    row = make_row(3000, ipv6_share=ipv6_share)
    padding = (encode_windows(draw(row, 300, tokens=tokens), tokens) == PADDING).mean()
    assert padding < (0.05 if tokens > 1000 or not ipv6_share else 0.08)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 10_000), st.floats(0, 1), st.integers(64, 700))
def test_encoded_windows_hold_whole_measurements_of_the_row(count, seed, ipv6_share, tokens):
    row = make_row(count, seed, ipv6_share)
    windows = [sample_window(row, CONFIG, tokens, np.random.default_rng((seed, i))) for i in range(3)]
    encoded = encode_windows(windows, tokens)
    assert encoded.shape == (3, tokens)
    for line, window in zip(encoded, windows, strict=True):
        known = line[line != PADDING]
        assert (line[len(known) :] == PADDING).all()
        decoded = decode(known)
        assert len(decoded) >= 1
        for measurement, i, timed in zip(decoded, window.index, window.timed, strict=False):
            expected = float(row.rtt_ms[i])
            assert measurement.rtt_ms == expected == -1 or abs(measurement.rtt_ms / expected - 1) < 2**-12 + 1e-6
            assert measurement.time_s == (row.time_s[i] if timed else None)


@pytest.mark.parametrize("mode", [{"full_time": 1, "partial_time": 0}, {"full_time": 0, "partial_time": 1}])
def test_windows_in_time_order_show_the_end_of_a_row_as_often_as_its_beginning(mode):
    row = make_row(300, ipv6_share=0)
    drawn = draw(row, 1500, DataConfig(**mode))
    shown = np.zeros(300)
    for line, window in zip(encode_windows(drawn, TOKENS), drawn, strict=True):
        np.add.at(shown, window.index[: (line == MEASUREMENT_START).sum()], 1)
    tenths = shown.reshape(10, 30).mean(axis=1)
    assert 0.8 < tenths[-1] / tenths[0] < 1.25
    assert tenths.min() > 0.4 * tenths.max()


def test_rows_weigh_as_many_windows_as_they_hold_up_to_16():
    measurements = np.array([1, 50, 100, 100_000])
    assert windows_per_row(measurements, np.zeros(4, int), 1000).tolist() == [0.016, 0.8, 1.6, 16]
    assert windows_per_row(measurements, measurements, 1000).tolist() == [0.04, 2.0, 4.0, 16]


def test_windows_of_several_rows_encode_as_each_does_alone():
    drawn = [window for seed in range(4) for window in draw(make_row(30 + 400 * seed, seed), 2)]
    alone = np.concatenate([encode_windows([window], TOKENS) for window in drawn])
    assert (encode_windows(drawn, TOKENS) == alone).all()


def test_the_report_adds_up_and_fits_the_terminal(rows_folder, tmp_path):
    script = SCRIPTS / "report_windows.py"
    options = ["--windows", "512", "--seq-len", "512", "--json", str(tmp_path / "report.json")]
    done = subprocess.run([sys.executable, script, rows_folder, *options], capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    report = json.loads((tmp_path / "report.json").read_text())
    together = report.pop("all")
    assert sum(mode["windows"] for mode in report.values()) == together["windows"] >= 512
    assert together["padding, rows too short"] <= together["padding"]
    for name, mode in report.items():
        filled = (1 - mode["padding"]) * 513
        assert mode["tokens a measurement"] * mode["measurements a window"] == pytest.approx(filled)
        assert bool(mode["1-byte deltas, all"]) == (name != "none")
