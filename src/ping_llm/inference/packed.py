"""Measurements in, how probable each result was given the ones before it out: one pass reads a window of many.

A window is a sequence of measurements of one source in time order, the result last in each. Read once, it gives for every
measurement k in it

    P(failed), P(byte 1), P(byte 2 | byte 1)    given the measurements before k in the window,

and so the probability of the result of k and of all that are faster or slower than it: no second pass, no 65,536 codes.
Windows overlap, so that each measurement has its history before it. One whose predecessor is of the same second must not
see that one: it is read again, over the cache of what is strictly earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import ADDRESS_BYTES, is_ipv4
from ping_llm.inference.blend import Blend
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution, code_widths, log_edges
from ping_llm.inference.engine import Reader
from ping_llm.inference.mixture import weighted_lengths
from ping_llm.inference.query import Endpoint, Query, SrcKnown
from ping_llm.model.gpt import KVCache, answering_at

READ_TOGETHER = 8  # windows: more do not fit the cache of a core
LARGEST_OVERLAP = 2 / 3  # of a window, where the history does not fit
_SIBLINGS = 64  # measurements of one second that are read over one window, where it does not hold them
_RESULT_TOKENS = 3
_TIME_TOKENS = 9  # of the first of a window
_BYTES = slice(tk.BYTE_0, tk.VOCAB_SIZE)


@dataclass(frozen=True, eq=False)
class Foreseen:
    """What was foreseen of n results that were then observed; each column is (n,) float64.

    Of an answer, `faster`, `same` and `slower` are the probabilities of an RTT of a lower code, of its own and of a higher
    one; with p_fail they sum to 1. Of a failure they are NaN.
    """

    rtt_ms: np.ndarray  # observed, −1 = failed
    p_fail: np.ndarray
    faster: np.ndarray
    same: np.ndarray
    slower: np.ndarray

    @classmethod
    def of_distributions(cls, foreseen: RTTDistribution, rtt_ms: np.ndarray) -> Foreseen:
        """From a batch of whole distributions."""
        code = tk.encode_rtt(np.maximum(rtt_ms, 0))
        at = np.arange(len(code))
        below = np.cumsum(foreseen.code_probability, axis=1, dtype=np.float64)
        above = np.cumsum(foreseen.code_probability[:, ::-1], axis=1, dtype=np.float64)[:, ::-1]
        same = foreseen.code_probability[at, code].astype(np.float64)
        columns = below[at, code] - same, same, np.append(above, np.zeros((len(at), 1)), axis=1)[at, code + 1]
        return cls(rtt_ms, foreseen.p_fail, *(np.where(rtt_ms < 0, np.nan, column) for column in columns))

    @property
    def nll_nats(self) -> np.ndarray:
        """−log of the density per log-ms times P(answer), or −log p_fail; (n,)."""
        width = code_widths()[tk.encode_rtt(np.maximum(self.rtt_ms, 0))]
        with np.errstate(divide="ignore", invalid="ignore"):
            return -np.log(np.where(self.rtt_ms < 0, self.p_fail, self.same / width))

    @property
    def pit(self) -> np.ndarray:
        """P(RTT ≤ observed | answered), uniform in log-ms within a code; NaN of a failure; (n,)."""
        code, edges = tk.encode_rtt(np.maximum(self.rtt_ms, 0)), log_edges()
        log_rtt = np.log(np.clip(self.rtt_ms, *np.exp(edges[[0, -1]])))
        share = np.clip((log_rtt - edges[code]) / code_widths()[code], 0, 1)
        with np.errstate(invalid="ignore"):
            return np.minimum((self.faster + share * self.same) / (self.faster + self.same + self.slower), 1.0)

    @property
    def p_value(self) -> np.ndarray:
        """P(a result at least as surprising) under what was foreseen, (n,), which is uniform if that is right.

        An answer is as surprising as the lesser of its two tails is thin: s = 2 min(u, 1 − u), where u is its mid-PIT given
        an answer, the tail below it and half of its own code; a failure is by its probability, s = p_fail. Of an atom half
        is counted: of the code, for RTTs are reported in steps, and of p_fail. That needs no random numbers, so the same
        measurements have the same p-values (Lancaster, Significance tests in discrete distributions, JASA 1961; for the PIT:
        Czado, Gneiting and Held, Predictive model assessment for count data, Biometrics 2009).
        """
        failed = self.rtt_ms < 0
        tail = 2 * np.minimum(self.faster + self.same / 2, self.slower + self.same / 2)  # s times P(answer)
        answer = np.maximum(1 - self.p_fail, np.finfo(float).tiny)
        of_answer = tail + self.p_fail * (self.p_fail <= tail / answer)
        return np.minimum(np.where(failed, self.p_fail * (answer + 0.5), of_answer), 1.0)


@dataclass(frozen=True)
class Window:
    """Places, in the order of `Windows`: it holds those from `first` to `end`, and answers for `answered`, ascending.

    Of these some may stand at or beyond `end`: they are of the second that follows it.
    """

    first: int
    end: int
    answered: np.ndarray  # (n,) whose sources are all of one family


class Windows:
    """Measurements of many sources, cut into windows that together answer for each wanted one once.

    Before each measurement its window has at least its last `history` strictly earlier ones of the same source, if there
    are so many and they fit into `seq_len` tokens; with history 0 it has none. Where no times are known, earlier is what
    stands before. Measurements of one host (see `Context`) are of one source.
    """

    def __init__(self, measured: Context, history: int, seq_len: int, wanted: np.ndarray | None = None) -> None:
        count, time_s = len(measured), measured.time_s
        src = np.zeros(count, dtype=np.int64)
        if not measured.one_host and count:
            src = np.unique(measured.src.view(f"V{ADDRESS_BYTES}").ravel(), return_inverse=True)[1].ravel()
        self.measured, self.history = measured, history
        self.room = seq_len - 2  # tokens up to a result, of which two are read
        self.order = np.lexsort((np.zeros(count) if time_s is None else time_s, src))  # (n,) rows by source, then time
        ordered, src = measured.take(self.order), src[self.order]
        gap_s = np.ones(count) if ordered.time_s is None else np.diff(ordered.time_s, prepend=0)
        new_source = np.diff(src, prepend=-1) != 0
        self.earlier = np.maximum.accumulate(np.where(new_source | (gap_s > 0), np.arange(count), 0))  # (n,) its end
        self.source = np.searchsorted(src, src), np.searchsorted(src, src, "right")  # (n,) first and end of its source
        addresses = [np.where(is_ipv4(end), 4, 16) for end in (ordered.src, ordered.dst)]
        self.time_tokens = np.where(gap_s <= tk.DELTA1_MAX_S, 2, 5) * (time_s is not None)
        self.asked = 3 + sum(addresses) + self.time_tokens  # (n,) tokens up to the result
        length = self.asked + np.where(ordered.rtt_ms < 0, 1, 3)
        self.starts = np.append(0, np.cumsum(length))  # (n + 1,) in tokens, were all in one window
        wanted = np.ones(count, bool) if wanted is None else wanted[self.order]
        self.windows: list[Window] = []
        self.window_of = np.full(count, -1, dtype=np.int64)  # by place
        for width in (4, 16):
            for window in self._cut(np.flatnonzero(wanted & (addresses[0] == width))):
                self.window_of[window.answered] = len(self.windows)
                self.windows.append(window)

    def context(self, place: int) -> slice:
        """The places that are before a measurement in its window, and strictly earlier."""
        first = self.windows[self.window_of[place]].first
        return slice(first, max(first, int(self.earlier[place])))

    def queries(self, rows: Sequence[int] | np.ndarray) -> list[Query]:
        """The queries for the results of the measurements `rows`, each with what is before it in its window as context."""
        place_of, found, measured = np.argsort(self.order), [], self.measured
        for row in rows:
            src, dst = (Endpoint.whole(end[row].tobytes()) for end in (measured.src, measured.dst))
            time_s = None if measured.time_s is None else int(measured.time_s[row])
            found.append(Query(src, dst, time_s, measured.take(self.order[self.context(int(place_of[row]))])))
        return found

    def _cut(self, places: np.ndarray) -> Iterator[Window]:
        """Windows that answer for `places`, ascending, of sources of one family."""
        upto, done = self.starts[:-1] + self.asked, 0  # (n,) ascending
        while done < len(places):
            place = int(places[done])
            first, end = self._stretch(place, upto)
            last = end
            if end <= place:  # there are too many of one second
                earlier = int(self.earlier[place])
                end, last = earlier, min(int(np.searchsorted(self.earlier, earlier, "right")), place + _SIBLINGS)
                if first == end:
                    first, end, last = place, place + 1, place + 1
            next_one = int(np.searchsorted(places, last))
            yield Window(first, end, places[done:next_one])
            done = next_one

    def _stretch(self, place: int, upto: np.ndarray) -> tuple[int, int]:
        """First and end of the longest window that begins with the history of a place."""
        if not self.history:
            return place, place + 1
        earlier = int(self.earlier[place])
        first = max(int(self.source[0][place]), earlier - self.history)
        room = self.room - int(self.asked[place]) - 2 * _TIME_TOKENS  # for the history
        if self.starts[earlier] - self.starts[first] > room:
            first = int(np.searchsorted(self.starts, self.starts[earlier] - LARGEST_OVERLAP * room))
        absolute = _TIME_TOKENS - self.time_tokens[first] if self.time_tokens[first] else 0
        end = int(np.searchsorted(upto, self.starts[first] + self.room - absolute, "right"))
        return first, min(max(end, first + 1), int(self.source[1][place]))


def foresee(
    reader: Reader,
    windows: Windows,
    src_known: SrcKnown = "auto",
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, Foreseen]:
    """The rows of the measurements that the windows answer for, (n,), and what was foreseen of their results."""
    priors = _Priors(reader, windows, src_known)
    by_length = sorted(windows.windows, key=lambda window: window.end - window.first)
    batches: dict[tuple[float, ...], list[list[Window]]] = {}  # by the shares of the sources' bytes that are known
    for window in by_length:
        alike = batches.setdefault(priors.shares(int(window.answered[0])), [])
        if not alike or len(alike[-1]) == READ_TOGETHER:
            alike.append([])
        alike[-1].append(window)
    places, found = [np.zeros(0, dtype=np.int64)], [np.zeros((4, 0))]
    for shares, some in ((shares, some) for shares, alike in batches.items() for some in alike):
        answered = np.concatenate([window.answered for window in some])
        read = [_read(reader, windows, some, share, mixed=len(shares) > 1) for share in shares]
        evidence, columns = (np.stack(parts) for parts in zip(*read, strict=True))  # (L, n), (L, 4, n)
        log_weight = evidence + priors.log_weights(answered)
        weight = np.exp(log_weight - log_weight.max(axis=0))
        found.append(np.einsum("ln,lcn->cn", weight / weight.sum(axis=0), columns))
        places.append(answered)
        advance(len(answered))
    rows = windows.order[np.concatenate(places)]
    rtt_ms, columns = windows.measured.rtt_ms[rows], np.concatenate(found, axis=1)
    columns[1:, rtt_ms < 0] = np.nan
    if src_known == "auto" and reader.calibration.experts is not None:
        columns = _with_experts(reader, windows.queries(rows), rtt_ms, columns)
    return rows, Foreseen(rtt_ms, *columns)


def _with_experts(reader: Reader, queries: list[Query], rtt_ms: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """P(failed), P(faster), P(same), P(slower), (4, n), of the model, mixed with those of the experts.

    A window is read with all of its destinations, so what the model says given less of one has no part here.
    """
    blend = Blend.of(reader, queries, cut=False)
    assert blend is not None
    code = tk.encode_rtt(np.maximum(rtt_ms, 0))
    answer, mixed = 1 - columns[0], columns.copy()
    mixed[1:] *= blend.of_model
    for weight, kind in zip(blend.of_experts, blend.experts.experts, strict=True):
        rows = np.flatnonzero(weight)
        borders = np.stack([log_edges()[code[rows]], log_edges()[code[rows] + 1]], axis=1)
        below, upto = blend.experts.experts[kind].cdf(blend.pasts[kind].take(rows), borders).T
        mixed[1:, rows] += (weight * answer)[rows] * np.stack([below, upto - below, 1 - upto])
    return mixed


class _Priors:
    """How much of the sources is known, and the weight of each such length before any context is read."""

    def __init__(self, reader: Reader, windows: Windows, src_known: SrcKnown) -> None:
        self.reader, self.windows, self.src_known = reader, windows, src_known
        self.of_source: dict[Endpoint, np.ndarray] = {}

    def source(self, place: int) -> Endpoint:
        """Of a measurement."""
        return Endpoint.whole(self.windows.measured.src[self.windows.order[place]].tobytes())

    def shares(self, place: int) -> tuple[float, ...]:
        """Of the bytes of a source those that are known, ascending."""
        source = self.source(place)
        return tuple(n / source.width for n in weighted_lengths(self.reader.calibration, self.src_known, source))

    def log_weights(self, places: np.ndarray) -> np.ndarray:
        """(L, n), of each known length of the source of each measurement."""
        sources = [self.source(int(place)) for place in places]
        for source in set(sources) - self.of_source.keys():
            lengths = weighted_lengths(self.reader.calibration, self.src_known, source)
            known = [source.cut(length) for length in lengths]
            self.of_source[source] = self.reader.calibration.log_weights(known) if len(known) > 1 else np.zeros(1)
        return np.stack([self.of_source[source] for source in sources], axis=1)


@torch.inference_mode()
def _read(
    reader: Reader, windows: Windows, some: Sequence[Window], share: float, mixed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of the n results that some windows answer for, with a share of the bytes of the sources known: the log-likelihood of
    what is before each, to byte 1, (n,), if `mixed`; and P(failed), P(faster), P(same), P(slower), (4, n)."""
    places = np.concatenate([np.arange(window.first, window.end) for window in some])  # (m,) of all windows
    number = np.repeat(np.arange(len(some)), [window.end - window.first for window in some])
    tokens, starts = _encode(windows, places, number, share)
    begins = starts[np.searchsorted(number, np.arange(len(some) + 1))]
    lines = [tokens[a:b][: reader.seq_len] for a, b in pairwise(begins)]
    offset = np.append(0, np.cumsum([window.end - window.first for window in some]))  # of the windows in `places`

    answered = np.concatenate([window.answered for window in some])
    window_of = np.repeat(np.arange(len(some)), [len(window.answered) for window in some])
    first = np.array([window.first for window in some])[window_of]
    context_end = np.maximum(first, windows.earlier[answered])
    inside = context_end == answered  # the others are read over what is strictly earlier
    at = offset[window_of] + answered - first  # where those inside stand in `places`
    wanted = np.arange(len(places)) if mixed else at[inside]
    cache = None if inside.all() else KVCache()
    chosen = _Results(windows, places[wanted], number[wanted], starts[wanted + 1] - begins[number[wanted]])
    evidence, columns = chosen.read(reader, lines, cache)

    found = np.empty((4, len(answered)))
    found[:, inside] = columns[:, np.searchsorted(wanted, at[inside])]
    if cache is not None:
        rows = np.flatnonzero(~inside)
        prefix = starts[offset[window_of[rows]] + context_end[rows] - first[rows]] - begins[window_of[rows]]
        apart = _Apart(answered[rows], context_end[rows], context_end[rows] > first[rows], window_of[rows], prefix)
        found[:, rows] = apart.read(reader, windows, share, cache)
    if not mixed:
        return np.zeros(len(answered)), found
    total = np.append(0, np.cumsum(evidence))
    return total[offset[window_of] + context_end - first] - total[offset[window_of]], found


@dataclass(frozen=True, eq=False)
class _Apart:
    """Measurements that continue the beginnings of windows that were read; each column is (n,)."""

    places: np.ndarray
    context_end: np.ndarray  # place
    has_context: np.ndarray
    window: np.ndarray  # number of its window among those read
    prefix: np.ndarray  # tokens of its context

    def read(self, reader: Reader, windows: Windows, share: float, cache: KVCache) -> np.ndarray:
        """P(failed), P(faster), P(same), P(slower), (4, n)."""
        # The time is given from the last one before: both are encoded, and the first is left out again.
        pairs = np.stack([np.where(self.has_context, self.context_end - 1, -1), self.places], axis=1).ravel()
        number = np.repeat(np.arange(len(self.places)), 2)[pairs >= 0]
        tokens, starts = _encode(windows, pairs[pairs >= 0], number, share)
        ends = np.searchsorted(number, np.arange(len(self.places)), "right")
        lines = [tokens[starts[end - 1] : starts[end]] for end in ends]
        found = []
        for begin in range(0, len(lines), READ_TOGETHER):
            rows = slice(begin, begin + READ_TOGETHER)
            window, prefix = (torch.from_numpy(column[rows]).to(reader.device) for column in (self.window, self.prefix))
            own = cache.select(window).cut(prefix)
            lengths = np.array([len(line) for line in lines[rows]])
            chosen = _Results(windows, self.places[rows], np.arange(len(lengths)), lengths)
            found.append(chosen.read(reader, lines[rows], own)[1])
        return np.concatenate(found, axis=1)


class _Results:
    """Results that stand in lines of tokens."""

    def __init__(self, windows: Windows, places: np.ndarray, line: np.ndarray, end: np.ndarray) -> None:
        """n places, the line of each, ascending, and where its result ends there."""
        rtt_ms = windows.measured.rtt_ms[windows.order[places]]
        self.failed, self.line = rtt_ms < 0, line
        self.code = tk.encode_rtt(np.maximum(rtt_ms, 0))
        self.begin = end - np.where(self.failed, 1, 3) - 1  # of the token after which the result comes

    def read(self, reader: Reader, lines: Sequence[np.ndarray], cache: KVCache | None) -> tuple[np.ndarray, np.ndarray]:
        """log P to byte 1, (n,), and P(failed), P(faster), P(same), P(slower), (4, n)."""
        tokens, _ = reader.pad(lines)
        within = np.arange(len(self.line)) - np.searchsorted(self.line, self.line)  # number of each in its line
        most = int(within.max(initial=0)) + 1
        places = np.zeros((len(lines), most, 3), dtype=np.int64)
        places[self.line, within] = self.begin[:, None] + np.arange(3)
        flat = places.clip(max=tokens.shape[1] - 1).reshape(len(lines), -1)
        with reader.autocast():
            logits = answering_at(reader.gpt, torch.from_numpy(flat).to(tokens.device))(tokens, cache)
        logits = logits.view(len(lines), most, 3, -1)[self.line, within].double()  # (n, 3, V)
        failed, answer = logits[:, 0, [tk.FAILED, tk.RTT_START]].softmax(-1).T.cpu().numpy()
        of_byte = logits[:, 1:, _BYTES].softmax(-1).cpu().numpy()  # (n, 2, 256)
        bytes_1 = (logits[:, 1, _BYTES].logsumexp(-1) - logits[:, 1].logsumexp(-1)).exp().cpu().numpy()
        n, byte = np.arange(len(self.line)), np.stack(np.divmod(self.code, 256), axis=1)  # (n, 2)
        same_1, same_2 = (of_byte[n, i, byte[:, i]] for i in range(2))
        below, above = (np.arange(256) < byte[..., None], np.arange(256) > byte[..., None])
        less, more = ((of_byte * some).sum(-1) for some in (below, above))  # (n, 2)
        evidence = np.log(np.where(self.failed, failed, answer * same_1))
        # Results are made to sum to 1 all together, so what is no byte after RTT_START takes from answers. Of a failure no
        # RTT_START is read: there it counts as nothing.
        bytes_1[self.failed] = 1
        p_fail = failed / (failed + answer * bytes_1)
        answer = 1 - p_fail
        faster, slower = (answer * (part[:, 0] + same_1 * part[:, 1]) for part in (less, more))
        return evidence, np.stack([p_fail, faster, answer * same_1 * same_2, slower])


def _encode(windows: Windows, places: np.ndarray, number: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of measurements, the result last, in windows with ascending numbers, and where each begins (m + 1,)."""
    measured = windows.measured.take(windows.order[places])
    count = len(places)
    fields = tk.Fields(
        src=measured.src,
        dst=measured.dst,
        src_bytes=(share * np.where(is_ipv4(measured.src), 4, 16)).astype(np.int64),
        dst_bytes=np.where(is_ipv4(measured.dst), 4, 16),
        rtt_ms=measured.rtt_ms,
        time_s=np.zeros(count, dtype=np.int64) if measured.time_s is None else measured.time_s,
        timed=np.full(count, measured.time_s is not None),
        order=np.tile(tk.RESULT_LAST, (count, 1)),
        window=number,
    )
    tokens, starts = tk.encode(fields)
    return tokens.astype(np.int64), starts
