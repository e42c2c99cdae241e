"""Measurements in, how probable and how surprising each is out.

`log_prob` is the probability of what a measurement says, its fields in any order: the role of each field is chosen among
the roles of that field, and bytes among those of a whole address, an RTT or a time, so the probabilities of all values of
a field sum to 1 and orders can be compared. `score` is how unexpected a result is after the measurements before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import pyarrow as pa

from ping_llm.data import tokenization as tk
from ping_llm.data.in_memory import extended, held, taken
from ping_llm.data.measurement import is_ipv4
from ping_llm.data.text_table import table_of
from ping_llm.inference.context import Context, Records, columns_of
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader, line_log_prob
from ping_llm.inference.mixture import distributions
from ping_llm.inference.packed import Windows, foresee
from ping_llm.inference.query import Endpoint, SrcKnown, check_context
from ping_llm.system.progress import show_progress

HISTORY = 8  # measurements of the same source before one that is scored, at least; about 11 on average in 256 tokens
ORDER = ("src", "dst", "rtt")
_FIELDS = {"src": tk.SRC, "dst": tk.DST, "rtt": tk.RESULT, "time": tk.TIME}


def log_prob(
    reader: Reader,
    measurements: Records,
    order: Sequence[str] = ORDER,
    context: Records | None = None,
    *,
    one_host: bool = False,
    any_source: bool = False,
) -> np.ndarray:
    """Log-probability in nats of what the fields of each measurement say, each given the ones before it in `order`; (n,).

    `order` holds some of src, dst, rtt and time, once each; time needs the column event_time. The RTT is one of 65,536
    codes, or failure. `context` holds measurements of the one source of all measurements, from seconds before them all;
    of what does not fit, the most recent stay. With `one_host` all sources are addresses of one host; with `any_source`
    those of the context may be other hosts.
    """
    if isinstance(order, str) or not order or not set(order) <= set(_FIELDS) or len(set(order)) != len(order):
        raise ValueError(f"order={order!r} must hold some of {', '.join(_FIELDS)}, each at most once")
    measured = columns_of(measurements, "the table of measurements")
    earlier = columns_of([] if context is None else context, "the context", "context row", one_host, any_source)
    if not len(measured):
        return np.zeros(0)
    if "time" in order and measured.time_s is None:
        raise ValueError(
            "the order holds time, but the measurements have no column event_time; add it, or leave out time"
        )
    if len(earlier):
        earlier = earlier.take(earlier.time_order())
        _check_context(earlier, measured)
    return line_log_prob(reader, *_encode(measured, earlier, order, reader.seq_len))


@dataclass(frozen=True)
class OrderConsistency:
    """How far the log-probability of the same measurement depends on the order of its fields.

    `std_nats` is the standard deviation over all orders, averaged over the measurements; a joint distribution has 0.
    """

    std_nats: float
    mean_log_prob: dict[str, float]  # of each order, like "src dst rtt", in nats
    log_prob: np.ndarray = field(repr=False)  # (n, 6)


def order_consistency(reader: Reader, measurements: Records) -> OrderConsistency:
    """log p(src, dst, rtt) of each measurement in all six orders."""
    orders = list(permutations(ORDER))
    log_p = np.stack([log_prob(reader, measurements, order) for order in orders], axis=1)  # (n, 6)
    if not len(log_p):
        raise ValueError("no measurements to compare orders on; give at least one")
    means = {" ".join(order): float(mean) for order, mean in zip(orders, log_p.mean(axis=0), strict=True)}
    return OrderConsistency(float(log_p.std(axis=1).mean()), means, log_p)


def score(
    reader: Reader,
    measurements: Records,
    history: int = HISTORY,
    src_known: SrcKnown = "auto",
    anomaly_at: float | None = None,
    *,
    one_host: bool = False,
    quiet: bool = False,
) -> Records:
    """The measurements, in their order, with how surprising each result is: columns nll_nats, pit and p_value.

    The answer is a table of the kind that was given, with all its columns as they are. The context of each are measurements
    of the same source from earlier seconds or, without the column event_time, from the rows before it: the last `history` at
    least, and at most what a sequence of the model holds (see `Windows`); with `history` 0 none. With `one_host` all sources
    are addresses of one host, and count as one. `nll_nats` is −log of the density per log-ms times P(answer), or −log
    p_fail; `pit` is null for a failure. `p_value` is the share of results at least as surprising: under the model's own
    distribution (see `Foreseen.p_value`), read against what that was on val, if the model is calibrated. With `anomaly_at`,
    `anomaly` says p_value ≤ anomaly_at. Progress is shown on standard error, unless `quiet`.
    """
    if history < 0:
        raise ValueError(f"history={history} must be the number of measurements before each, 0 or more")
    if anomaly_at is not None and not 0 < anomaly_at < 1:
        raise ValueError(f"anomaly_at={anomaly_at} must be a p-value between 0 and 1")
    measurements = held(measurements)
    table = table_of(measurements)
    measured = columns_of(table, "the table of measurements", one_host=one_host)
    shown = nullcontext(_no_progress) if quiet else show_progress("score", len(measured), "measurements")
    with shown as advance:
        rows, foreseen = foresee(reader, Windows(measured, history, reader.seq_len), src_known, advance)
    nll, pit, own = (np.empty(len(measured)) for _ in range(3))
    nll[rows], pit[rows], own[rows] = foreseen.nll_nats, foreseen.pit, foreseen.p_value
    p_value = reader.calibration.surprise.calibrated(own)
    columns = {"nll_nats": nll, "pit": pa.array(pit, mask=np.isnan(pit)), "p_value": p_value}
    columns |= {} if anomaly_at is None else {"anomaly": p_value <= anomaly_at}
    return extended(measurements, [name for name in table.names if name not in columns], pa.table(columns))


def _no_progress(measurements: float) -> None:
    pass


def expected(
    reader: Reader,
    measurements: Records,
    rows: Sequence[int] | np.ndarray,
    history: int = HISTORY,
    src_known: SrcKnown = "auto",
    *,
    one_host: bool = False,
) -> Records:
    """Some rows of the measurements with what was expected there: columns p_fail, and the quantiles q0.05, q0.5 and q0.95
    of an answer in ms, null where failure is certain.

    Whole distributions are computed, after the same history as in `score`.
    """
    measurements = held(measurements)
    measured = columns_of(table_of(measurements), "the table of measurements", one_host=one_host)
    windows = Windows(measured, history, reader.seq_len)
    chosen: list[int] = np.asarray(rows).tolist()
    some, batches = taken(measurements, chosen), list(distributions(reader, windows.queries(chosen), src_known))
    if not batches:
        return some
    foreseen = RTTDistribution.concatenate(batches)
    answers = {f"q{q:g}": foreseen.quantile(q) for q in (0.05, 0.5, 0.95)}
    answers = {name: pa.array(rtt_ms, mask=np.isnan(rtt_ms)) for name, rtt_ms in answers.items()}
    columns = {"p_fail": foreseen.p_fail, **answers}
    return extended(some, [name for name in table_of(some).names if name not in columns], pa.table(columns))


def _check_context(earlier: Context, measured: Context) -> None:
    """ValueError unless the context is of the one source of all measurements, or of one host, and earlier than each."""
    time_s = None if measured.time_s is None else int(measured.time_s.min())
    for source in np.unique(measured.src, axis=0):
        check_context(earlier, Endpoint.whole(source.tobytes()), time_s)


def _encode(
    measured: Context, earlier: Context, order: Sequence[str], seq_len: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens of each measurement up to its last field in `order`, and those of the context that fit before the longest."""
    n, timed = len(measured), "time" in order
    timed_context = timed and earlier.time_s is not None
    # A time is encoded as the delta to the last one of the context: each stands behind that, in a window of its own.
    before = earlier.take(np.full(n, -1)) if timed_context else measured
    names = ("src", "dst", "rtt_ms", "time_s") if timed else ("src", "dst", "rtt_ms")
    src, dst, rtt_ms, *time_s = (np.concatenate([getattr(part, name) for part in (before, measured)]) for name in names)
    both = Context(src, dst, rtt_ms, time_s[0] if timed else None).take(np.arange(2 * n).reshape(2, n).T.ravel())
    keys = np.array([order.index(name) if name in order else 9 + column for name, column in _FIELDS.items()])
    tokens, starts = _tokens(both, np.tile([timed_context, timed], n), keys, np.arange(2 * n) // 2)
    length = {name: 1 + np.where(is_ipv4(getattr(measured, name)), 4, 16) for name in ("src", "dst")}
    length["rtt"] = np.where(measured.rtt_ms < 0, 1, 3)
    last = starts[2::2] - sum(length[name] for name in length if name not in order)
    lines = [tokens[a:b].astype(np.int64) for a, b in zip(starts[1:-1:2], last, strict=True)]
    room = seq_len + 1 - max(map(len, lines), default=0)  # the last token is not read
    return lines, _context_tokens(earlier, timed_context, room)


def _context_tokens(earlier: Context, timed: bool, room: int) -> np.ndarray:
    """Tokens of the most recent measurements of a context that take at most `room` tokens, result last."""
    while n := len(earlier):
        tokens, starts = _tokens(earlier, np.full(n, timed), tk.RESULT_LAST, np.zeros(n, dtype=np.int64))
        if len(tokens) <= room:
            return tokens.astype(np.int64)
        fits = int(np.searchsorted(-(starts[-1] - starts), -room))  # the first measurement that may stay
        earlier = earlier.take(slice(max(fits, 1), None))  # what is first now may take longer: its time is absolute
    return np.zeros(0, dtype=np.int64)


def _tokens(columns: Context, timed: np.ndarray, keys: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`tokenization.encode` of measurements whose addresses are whole and whose fields have the same order."""
    src_bytes, dst_bytes = (np.where(is_ipv4(packed), 4, 16) for packed in (columns.src, columns.dst))
    time_s = np.zeros(len(columns), dtype=np.int64) if columns.time_s is None else columns.time_s
    fields = (columns.src, columns.dst, src_bytes, dst_bytes, columns.rtt_ms, time_s, timed)
    return tk.encode(tk.Fields(*fields, order=np.tile(keys, (len(columns), 1)), window=window))
