"""Measurements in, how probable and how surprising each is out.

`log_prob` is the probability of what a measurement says, told in any order of its fields: of each field the role is chosen
among the roles of that field, and bytes among those that tell a whole address, an RTT or a time, so the probabilities of
all that a field can say sum to 1 and orders can be compared. `score` is how unexpected a result is after the measurements
before it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import ADDRESS_BYTES, FAILED_RTT_MS, format_address, is_ipv4
from ping_llm.data.rows import MANIFEST_NAME, ProbeRow, RowReader, read_manifest
from ping_llm.inference.context import Context
from ping_llm.inference.distributions import RTTDistributions
from ping_llm.inference.grammar import Grammar, follow
from ping_llm.inference.history import History, columns_of
from ping_llm.inference.query import Endpoint, SrcKnown
from ping_llm.model.gpt import KVCache
from ping_llm.system.progress import show_progress

if TYPE_CHECKING:
    from ping_llm.inference.predictor import PingModel

HISTORY = 10  # measurements of the same source before one that is scored
ORDER = ("src", "dst", "rtt")
_FIELDS = {"src": tk.SRC, "dst": tk.DST, "rtt": tk.RESULT, "time": tk.TIME}
_COLUMNS = ("src", "dst", "rtt_ms", "time_s")
_ROLES = (
    (tk.SRC_IPV4, tk.SRC_IPV6),
    (tk.DST_IPV4, tk.DST_IPV6),
    (tk.RTT_START, tk.FAILED),
    (tk.TIMESTAMP_ABS, tk.TIMESTAMP_DELTA1, tk.TIMESTAMP_DELTA4),
)  # of each field
_SAME_FIELD = np.ones((tk.VOCAB_SIZE, tk.VOCAB_SIZE), dtype=bool)  # which tokens compete with each
for _roles in _ROLES:
    for _role in _roles:
        _SAME_FIELD[_role] = np.isin(np.arange(tk.VOCAB_SIZE), _roles)
_BATCH = 256  # measurements read together


def log_prob(
    model: PingModel,
    measurements: pa.Table | Sequence[dict],
    order: Sequence[str] = ORDER,
    context: pa.Table | Sequence[dict] | None = None,
) -> np.ndarray:
    """Log-probability in nats of what the fields of each measurement say, each given the ones before it in `order`; (n,).

    `order` holds some of src, dst, rtt and time, once each; time needs the column event_time. The RTT is one of 65,536
    codes, or failure. `context` holds earlier measurements of the one source of all measurements; of what does not fit,
    the most recent stay.
    """
    order, measured, earlier = _checked_order(order), columns_of(measurements), columns_of(context or [], "context row")
    if not len(measured):
        return np.zeros(0)
    if "time" in order and measured.time_s is None:
        raise ValueError(
            "the order holds time, but the measurements have no column event_time; add it, or leave out time"
        )
    if len(earlier):
        earlier = earlier if earlier.time_s is None else earlier.take(np.argsort(earlier.time_s, kind="stable"))
        _check_context(earlier, measured)
    return _log_probs(model, measured, earlier, order)


def source_log_prob(model: PingModel, sources: Sequence[Endpoint]) -> np.ndarray:
    """Log-probability in nats of whole source addresses at the beginning of a window, (n,): how familiar they are."""
    packed = np.frombuffer(b"".join(src.packed for src in sources), np.uint8).reshape(-1, ADDRESS_BYTES)
    distinct, which = np.unique(packed, axis=0, return_inverse=True)
    unsaid = np.full(len(distinct), FAILED_RTT_MS)  # as is the destination
    measured = Context(distinct, distinct, unsaid, None)
    return _log_probs(model, measured, Context.parse(None), ("src",))[which.ravel()]


def _log_probs(model: PingModel, measured: Context, earlier: Context, order: tuple[str, ...]) -> np.ndarray:
    lines, prefix = _encode(measured, earlier, order, model.gpt.config.seq_len)
    lengths = np.array([len(line) for line in lines])
    log_p = np.empty(len(lines))
    by_length = np.argsort(-lengths, kind="stable")
    with model.autocast():
        for first in range(0, len(lines), _BATCH):
            rows = by_length[first : first + _BATCH]
            log_p[rows] = _log_prob(model, [lines[i] for i in rows], prefix)
    return log_p


@dataclass(frozen=True)
class OrderConsistency:
    """How far the log-probability of the same measurement depends on the order in which its fields are told.

    `std_nats` is the standard deviation over all orders, averaged over the measurements; a joint distribution has 0.
    """

    std_nats: float
    mean_log_prob: dict[str, float]  # of each order, like "src dst rtt", in nats
    log_prob: np.ndarray = field(repr=False)  # (n, 6)


def order_consistency(model: PingModel, measurements: pa.Table | Sequence[dict]) -> OrderConsistency:
    """log p(src, dst, rtt) of each measurement in all six orders."""
    orders = list(permutations(ORDER))
    log_p = np.stack([log_prob(model, measurements, order) for order in orders], axis=1)  # (n, 6)
    if not len(log_p):
        raise ValueError("no measurements to compare orders on; give at least one")
    means = {" ".join(order): float(mean) for order, mean in zip(orders, log_p.mean(axis=0), strict=True)}
    return OrderConsistency(float(log_p.std(axis=1).mean()), means, log_p)


def score(
    model: PingModel,
    measurements: pa.Table | Sequence[dict],
    history: int = HISTORY,
    src_known: SrcKnown = "auto",
    anomaly_at: float | None = None,
) -> pa.Table:
    """The measurements, in their order, with how surprising each result is: columns nll_nats, pit and p_value.

    Asked is after the `history` measurements of the same source that stand before it by event_time, or in the table if it
    has no such column. `nll_nats` is −log of the density per log-ms times P(answer), or −log p_fail; `pit` is null for a
    failure. `p_value` is the share of results at least as surprising: under the model's own law (see `own_p_values`),
    read against what that was on val, if the model is calibrated. With `anomaly_at`, `anomaly` says p_value ≤ anomaly_at.
    """
    if history < 0:
        raise ValueError(f"history={history} must be the number of measurements before each, 0 or more")
    if anomaly_at is not None and not 0 < anomaly_at < 1:
        raise ValueError(f"anomaly_at={anomaly_at} must be a p-value between 0 and 1")
    table = measurements if isinstance(measurements, pa.Table) else pa.Table.from_pylist(list(measurements))
    past = History(columns_of(table), history)
    own, nll, pit = (np.empty(table.num_rows) for _ in range(3))
    with show_progress("score", table.num_rows, "measurements") as advance:
        for first in range(0, table.num_rows, _BATCH):
            rows = past.order[first : first + _BATCH]  # neighbours have contexts of about the same length
            laws_of = model.laws(past.queries(rows), src_known)
            for chosen, laws in _chunks(rows, laws_of):
                observed_ms = past.measured.rtt_ms[chosen]
                own[chosen] = own_p_values(laws, observed_ms)
                nll[chosen], pit[chosen] = -laws.log_density(observed_ms), laws.pit(observed_ms)
                advance(len(laws))
    p_value = calibrated_p_values(own, model.calibration.surprise)
    columns = {"nll_nats": nll, "pit": pa.array(pit, mask=np.isnan(pit)), "p_value": p_value}
    if anomaly_at is not None:
        columns["anomaly"] = p_value <= anomaly_at
    table = table.drop_columns([name for name in columns if name in table.column_names])
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return table


def own_p_values(laws: RTTDistributions, observed_ms: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """P(a result at least as surprising as the observed one) under each law: (B,) ms, −1 = failed, to (B,).

    Results are ordered as by nll_nats: an answer by its density per log-ms times P(answer), failure, an atom, by p_fail.
    Of results equally surprising half is counted; with `rng` a share drawn for each law: then p-values are uniform if the
    laws are right.
    """
    observed = np.exp(laws.log_density(observed_ms))  # (B,)
    # By way of the logarithm rounding makes a difference where there is none.
    low, high = observed * (1 - 1e-12), observed * (1 + 1e-12)
    less, equal = laws.p_fail * (laws.p_fail < low), laws.p_fail * ((laws.p_fail >= low) & (laws.p_fail <= high))
    for law, p in enumerate(laws.code_probability):
        density = p / _code_widths()
        below, upto = density < low[law], density <= high[law]
        less[law] += p[below].sum(dtype=np.float64)
        equal[law] += p[upto & ~below].sum(dtype=np.float64)
    share = 0.5 if rng is None else rng.random(len(laws))
    return np.minimum(less + share * equal, 1.0)


def calibrated_p_values(own: np.ndarray, surprise: Sequence[float]) -> np.ndarray:
    """(rank + 1) / (n + 1) of own p-values (m,) among the n ascending ones of val; as they are without any.

    Below the least of val there is nothing to rank: there it is 1 / (n + 1), times the share of that least value.
    """
    if not len(surprise):
        return own
    ranked = (np.searchsorted(np.asarray(surprise), own, "right") + 1) / (len(surprise) + 1)
    return ranked * np.minimum(1.0, own / max(surprise[0], np.finfo(float).tiny))


def dump_table(path: Path | str) -> pa.Table:
    """The measurements of an Atlas dump, a folder of dumps, or a folder of rows: src_addr, dst_addr, event_time, rtt."""
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return _rows_table(path)
    from ping_llm.data.ingest.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="ping-llm-") as scratch:
        prepare([str(path)], Path(scratch) / "rows", split="none", keep_going=True)
        return _rows_table(Path(scratch) / "rows")


def _rows_table(folder: Path) -> pa.Table:
    """All parts of a folder of rows, row by row."""
    parts = [part for part, count in read_manifest(folder)["parts"].items() if count]
    if not parts:
        raise ValueError(f"{folder} holds no measurements to score")
    return pa.concat_tables(_row_table(row) for part in parts for row in RowReader(folder, part))


def _row_table(row: ProbeRow) -> pa.Table:
    src, dst = (
        pa.array([format_address(address.tobytes()) for address in addresses], pa.string()).take(pa.array(index))
        for addresses, index in ((row.src_addresses, row.src), (row.dst_addresses, row.dst))
    )
    times = pa.array(row.time_s).cast(pa.timestamp("s", "UTC"))
    rtt_ms = pa.array(row.rtt_ms.astype(np.float64))
    return pa.table({"src_addr": src, "dst_addr": dst, "event_time": times, "rtt": rtt_ms})


@cache
def _code_widths() -> np.ndarray:
    """(65,536,) log-ms."""
    return np.diff(np.log(tk.rtt_code_edges_ms()))


def _chunks(rows: np.ndarray, laws_of: Iterator[RTTDistributions]) -> Iterator[tuple[np.ndarray, RTTDistributions]]:
    """Batches of laws, each with the rows it is of."""
    first = 0
    for laws in laws_of:
        yield rows[first : first + len(laws)], laws
        first += len(laws)


def _checked_order(order: Sequence[str]) -> tuple[str, ...]:
    wrong = [name for name in order if name not in _FIELDS]
    if isinstance(order, str) or wrong or len(set(order)) != len(order) or not order:
        raise ValueError(f"order={order!r} must hold some of {', '.join(_FIELDS)}, each at most once")
    return tuple(order)


def _check_context(earlier: Context, measured: Context) -> None:
    """ValueError unless the context is of the one source of all measurements, and not later than any."""
    both = np.concatenate([earlier.src, measured.src])
    for family in (True, False):  # a host may have an address of each family
        sources = np.unique(both[is_ipv4(both) == family], axis=0)
        if len(sources) > 1:
            one, other = (format_address(address.tobytes()) for address in sources[:2])
            raise ValueError(
                f"a context is of the one source of all measurements, but here are {one} and {other}; score each "
                "source with its own"
            )
    if earlier.time_s is not None and measured.time_s is not None and earlier.time_s.max() > measured.time_s.min():
        raise ValueError("the context holds measurements later than one to score; leave those out")


def _encode(
    measured: Context, earlier: Context, order: tuple[str, ...], seq_len: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens of each measurement up to its last told field, and those of the context that fit before the longest."""
    n, timed = len(measured), "time" in order
    keys = np.array([order.index(name) if name in order else 9 + column for name, column in _FIELDS.items()])
    timed_context = timed and earlier.time_s is not None
    if timed_context:  # a time is told as the delta to the last one of the context: encoded behind it, a window each
        pairs = np.stack([np.full(n, len(earlier) - 1), len(earlier) + np.arange(n)], axis=1).ravel()
        columns = [np.concatenate([getattr(c, name) for c in (earlier, measured)]) for name in _COLUMNS]
        tokens, starts = _tokens(Context(*columns).take(pairs), True, keys, np.arange(2 * n) // 2)
        first, last = starts[1:-1:2], starts[2::2]
    else:
        tokens, starts = _tokens(measured, timed, keys, np.arange(n))
        first, last = starts[:-1], starts[1:]
    length = {name: 1 + np.where(is_ipv4(getattr(measured, name)), 4, 16) for name in ("src", "dst")}
    length["rtt"] = np.where(measured.rtt_ms < 0, 1, 3)
    last = last - sum(length[name] for name in length if name not in order)
    lines = [tokens[a:b].astype(np.int64) for a, b in zip(first, last, strict=True)]
    room = seq_len + 1 - max(map(len, lines), default=0)  # the last token is not read
    return lines, _context_tokens(earlier, timed_context, room)


def _context_tokens(earlier: Context, timed: bool, room: int) -> np.ndarray:
    """Tokens of the most recent measurements of a context that take at most `room` tokens, result last."""
    while len(earlier):
        tokens, starts = _tokens(earlier, timed, tk.RESULT_LAST, np.zeros(len(earlier), dtype=np.int64))
        if len(tokens) <= room:
            return tokens.astype(np.int64)
        fits = np.searchsorted(-(starts[-1] - starts), -room)  # the first measurement that may stay
        earlier = earlier.take(
            slice(max(int(fits), 1), None)
        )  # what is first now may take longer: its time is absolute
    return np.zeros(0, dtype=np.int64)


def _tokens(columns: Context, timed: bool, keys: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`tokenization.encode` of measurements whose addresses are whole and whose fields have the same order."""
    n = len(columns)
    src_bytes, dst_bytes = (np.where(is_ipv4(packed), 4, 16) for packed in (columns.src, columns.dst))
    time_s = columns.time_s if timed else np.zeros(n, dtype=np.int64)
    fields = (columns.src, columns.dst, src_bytes, dst_bytes, columns.rtt_ms, time_s, np.full(n, timed))
    return tk.encode(tk.Fields(*fields, order=np.tile(keys, (n, 1)), window=window))


@torch.inference_mode()
def _log_prob(model: PingModel, lines: list[np.ndarray], prefix: np.ndarray) -> np.ndarray:
    """Log-probability of the legal choices in each of B measurements, the longest first, after the same context; (B,)."""
    B, T = len(lines), len(lines[0])
    tokens = np.full((B, T), tk.PADDING, dtype=np.int64)
    for row, line in zip(tokens, lines, strict=True):
        row[: len(line)] = line
    given = torch.from_numpy(tokens).to(model.device)
    cache = None
    if len(prefix):
        read = KVCache()
        model.gpt(torch.from_numpy(prefix).to(model.device)[None], read)
        cache = read.select(torch.zeros(B, dtype=torch.int64, device=model.device))
    logits = model.gpt(given[:, :-1], cache).double()  # (B, T−1, V)
    legal = torch.from_numpy(_legal(tokens, prefix)).to(model.device)  # (B, T−1, V)
    log_p = logits.masked_fill(~legal, -torch.inf).log_softmax(-1)
    told = log_p.gather(-1, given[:, 1:].clamp(min=0)[..., None])[..., 0]
    return torch.where(given[:, 1:] >= 0, told, 0.0).sum(1).cpu().numpy()


def _legal(tokens: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Of each token (B, T) but the first, what could stand there: bytes, or roles of its field; (B, T−1, V) bool."""
    B, T = tokens.shape
    grammar = Grammar(1)
    follow(grammar, prefix)
    grammar = grammar.select(np.zeros(B, dtype=np.int64))
    legal = np.ones((B, T - 1, tk.VOCAB_SIZE), dtype=bool)
    for at in range(1, T):
        count = int((tokens[:, at] != tk.PADDING).sum())  # the longest stand first
        grammar = grammar.select(np.arange(count)) if count < len(grammar) else grammar
        grammar.advance(tokens[:count, at - 1])
        legal[:count, at - 1] = grammar.legal() & _SAME_FIELD[tokens[:count, at]]
    return legal
