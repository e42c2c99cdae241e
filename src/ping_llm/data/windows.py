"""Probe rows in, measurement windows out: which measurements, in which order, and how much of each is shown.

A window is a random look at one probe's history, or at a row of several probes (mesh.py) or of a synthetic Internet, drawn
by `sample_window` as a pure function of the row and an rng:

- its span is log-uniform between just enough measurements to fill the sequence and the whole row, its middle uniform (a
  span that would stick out is pushed in: without that, the edges of a row would hardly ever be shown); of the span a
  random subset is kept, so that one window may hold a minute or a month;
- its timestamps are full (time order), partial (10–90 % of the measurements lose theirs; those are shuffled among the
  others) or none (all shuffled);
- its source is whole, or cut to a prefix of one length for the whole window, from 0 bytes to all but one: of several sources
  each to the same share, as queries cut them; each destination is whole or cut on its own, to at least 1 byte;
- the fields of its measurements stand in one order, source, destination, time, result, or each in an order of its own;
- it may tell of pseudonyms and of shifted pairs: see augmentation.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ping_llm.config import DataConfig
from ping_llm.data.augmentation import pseudonyms, shift_pairs
from ping_llm.data.rows import ProbeRow
from ping_llm.data.tokenization import DELTA1_MAX_S, PADDING, RESULT_LAST, Fields, encode

TIME_MODES = ("full", "partial", "none")
MAX_WINDOWS_PER_ROW = 16
_TOKENS_UNTIMED = 1 + 1 + 1 + 3  # start, source role, destination role, result
_DELTA_TOKENS = 2  # of a timestamp at least; where most take 5, more is left out
_MARGIN = 1.12  # measurements drawn beyond the expected number, so that windows fill; the surplus is left out again
_LENGTH_SAMPLE = 64


@dataclass(frozen=True)
class Window:
    """k measurements of a row, in sequence order, and what is shown of each."""

    index: np.ndarray  # (k,) into the row
    src: np.ndarray  # (k, 16) uint8, packed
    dst: np.ndarray  # (k, 16) uint8, packed
    src_bytes: np.ndarray  # (k,) known bytes of the source
    dst_bytes: np.ndarray  # (k,) known bytes of the destination
    rtt_ms: np.ndarray  # (k,) −1 = failed
    time_s: np.ndarray  # (k,) int64
    timed: np.ndarray  # (k,) bool
    order: np.ndarray  # (k, 4) sort keys of src, dst, result, time
    muted: np.ndarray  # (k,) bool: the RTT is no target
    mode: str  # one of TIME_MODES


def sample_window(row: ProbeRow, config: DataConfig, tokens: int, rng: np.random.Generator) -> Window:
    """Draws a window that fills `tokens` tokens, if the row has enough measurements."""
    mode = TIME_MODES[np.searchsorted(np.cumsum([config.full_time, config.partial_time]), rng.random(), "right")]
    src_share = rng.random() if rng.random() < config.src_prefix_dropout else 1.0
    timed_share = {"full": 1.0, "partial": rng.uniform(0.1, 0.9), "none": 0.0}[mode]
    index = _sample_span(row, tokens, src_share, timed_share, rng)
    index, timed = _arrange(index, timed_share, rng)
    count = len(index)

    src_bytes = (src_share * np.where(row.src_is_ipv4, 4, 16)[row.src[index]]).astype(np.int64)
    dst_width = np.where(row.dst_is_ipv4, 4, 16)[row.dst[index]]
    cut = rng.random(count) < config.dst_prefix_dropout
    dst_bytes = np.where(cut, 1 + (rng.random(count) * (dst_width - 1)).astype(np.int64), dst_width)
    kept = _fitting(_token_lengths(row, index, timed, src_bytes + dst_bytes), tokens, rng)
    order = rng.random((len(kept), 4), dtype=np.float32)
    index = index[kept]
    src, dst, rtt_ms = row.src_addresses[row.src[index]], row.dst_addresses[row.dst[index]], row.rtt_ms[index]
    muted = np.zeros(len(index), dtype=bool)
    canonical, shifted, hidden = rng.random(3) < (config.canonical_order, config.shifted_pairs, config.pseudonyms)
    if canonical or shifted:  # what comes after a shifted RTT would be learned from it
        order = np.tile(RESULT_LAST, (len(index), 1))
    if shifted:
        pair = row.src[index].astype(np.int64) << 32 | row.dst[index]
        rtt_ms, muted = shift_pairs(pair, rtt_ms, mode == "full", rng)
    if hidden:
        src, dst = pseudonyms(src, dst, rng)
    times = row.times(index)
    return Window(index, src, dst, src_bytes[kept], dst_bytes[kept], rtt_ms, times, timed[kept], order, muted, mode)


def encode_windows(windows: Sequence[Window], tokens: int) -> np.ndarray:
    """Tokens of W windows: (W, tokens) int16, cut after the last measurement that fits, then PADDING.

    All are encoded in one call: its fixed cost is that of some ten windows.
    """
    encoded, starts = encode(window_fields(windows))
    out = np.full((len(windows), tokens), PADDING, dtype=np.int16)
    last = 0
    for line, window in zip(out, windows, strict=True):
        first, last = last, last + len(window.index)
        borders = starts[first : last + 1]
        end = borders[np.searchsorted(borders, borders[0] + tokens, "right") - 1]
        line[: end - borders[0]] = encoded[borders[0] : end]
    return out


def window_fields(windows: Sequence[Window]) -> Fields:
    """The fields of W windows, one after the other."""
    names = ("src", "dst", "src_bytes", "dst_bytes", "rtt_ms", "time_s", "timed", "order", "muted")
    columns = {name: np.concatenate([getattr(window, name) for window in windows]) for name in names}
    number = np.repeat(np.arange(len(windows)), [len(window.index) for window in windows])
    return Fields(**columns, window=number)


def windows_per_row(measurements: np.ndarray, ipv6_measurements: np.ndarray, tokens: int) -> np.ndarray:
    """How many windows of `tokens` tokens rows hold, up to 16: the weights they are drawn by. (rows,) in and out.

    Not rounded: a row that fills a third of a window is drawn a third as often as one that fills it. Rounded up, short
    rows made 9 % of all tokens padding; so it is 3 %.
    """
    ipv4_measurements = measurements - ipv6_measurements
    expected = ipv4_measurements * _expected_tokens(8, 1) + ipv6_measurements * _expected_tokens(32, 1)
    return np.minimum(expected / tokens, MAX_WINDOWS_PER_ROW)


def _expected_tokens(address_bytes: float, timed_share: float) -> float:
    """Tokens of a measurement with `address_bytes` known bytes of its two addresses together."""
    return _TOKENS_UNTIMED + address_bytes + timed_share * _DELTA_TOKENS


def most_measurements(tokens: int) -> int:
    """The most measurements that are drawn for a window of `tokens` tokens: of IPv4, without sources and times."""
    return _measurements_drawn(tokens, 4, 0.0)


def _measurements_drawn(tokens: int, address_bytes: float, timed_share: float) -> int:
    """Measurements that fill a window, and some more."""
    return math.ceil(tokens / _expected_tokens(address_bytes, timed_share) * _MARGIN) + 1


def random_span(count: int, least: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where a span of `count` measurements begins, and its length: log-uniform between `least` and all of them."""
    span = min(count, round(least * (count / least) ** rng.random()))
    return min(max(rng.integers(count) - span // 2, 0), count - span), span


def _sample_span(
    row: ProbeRow, tokens: int, src_share: float, timed_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Indices, ascending, of a random subset of a random span of the row."""
    count = len(row)
    look = np.arange(count) if count <= _LENGTH_SAMPLE else rng.integers(count, size=_LENGTH_SAMPLE)
    width = np.where(row.dst_is_ipv4, 4, 16)[row.dst[look]].mean()
    filling = min(count, _measurements_drawn(tokens, (1 + src_share) * width, timed_share))
    offset, span = random_span(count, filling, rng)
    return offset + np.sort(rng.choice(span, filling, replace=False, shuffle=False))


def _token_lengths(row: ProbeRow, index: np.ndarray, timed: np.ndarray, address_bytes: np.ndarray) -> np.ndarray:
    """Tokens (k,) of each of k measurements in sequence order."""
    length = _TOKENS_UNTIMED + address_bytes - 2 * (row.rtt_ms[index] < 0)
    times = row.times(index[timed])
    if len(times):
        delta_tokens = np.where(np.diff(times) <= DELTA1_MAX_S, 2, 5)
        length[timed] += np.concatenate([[9], delta_tokens])
    return length


def _fitting(length: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Places, ascending, of measurements that together take at most `tokens` tokens: random ones are left out.

    Were the last ones cut off instead, windows in time order would hardly ever show the end of a row.
    """
    if length.sum() <= tokens:
        return np.arange(len(length))
    candidates = rng.permutation(len(length))
    return np.sort(candidates[: np.searchsorted(np.cumsum(length[candidates]), tokens, "right")])


def _arrange(index: np.ndarray, timed_share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Puts time-ordered indices into sequence order; (k,) bool says which keep their timestamp."""
    if timed_share == 1:
        return index, np.ones(len(index), dtype=bool)
    index = rng.permutation(index)
    timed = rng.random(len(index)) < timed_share
    index[timed] = np.sort(index[timed])
    return index, timed
