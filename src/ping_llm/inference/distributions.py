"""Probabilities of the RTT codes and of failure of many pings in, every statistic of each ping's RTT out, in closed form.

B = laws, X = what is asked of each law (any shape, or a single number), 256 = values of one byte of a code. Within a code
the density is uniform in log-RTT: a code is 0.05 % wide, so nothing that is asked depends on it. The sums over each value
of byte 1 are made once and kept; a point then costs the 256 codes of its byte 1 instead of all 65,536.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from ping_llm.data.measurement import FAILED_RTT_MS
from ping_llm.data.tokenization import RTT_CODES, rtt_code_edges_ms

if TYPE_CHECKING:
    from ping_llm.inference.distribution import RTTDistribution

_POINTS = 1024  # looked up at once: 2 MB
_LAWS = 16  # gone through at once: 8 MB


@dataclass(frozen=True, eq=False)
class RTTDistributions:
    """The laws of the results of B pings: what `RTTDistribution` says of one, for all of them at once.

    `code_probability` is (B, 65,536), float32 or float64 as given (0.26 or 0.52 MB a law; all sums are float64), and
    `p_fail` (B,); each law sums to 1. The other columns are (B,), or one number for all. Statistics of the RTT are of an
    answered ping: NaN where a ping fails with certainty. `laws[i]` is an RTTDistribution, `laws[2:5]` and `laws[[4, 0]]`
    are some of the laws.
    """

    code_probability: np.ndarray = field(repr=False)
    p_fail: np.ndarray
    total_probability: np.ndarray | float = 1.0
    forward_passes: np.ndarray | int = 0
    context_measurements: np.ndarray | int = 0
    unresolved: np.ndarray | float = 0.0
    src_weights: np.ndarray | Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        codes = np.asarray(self.code_probability)
        if codes.ndim != 2 or codes.shape[1] != RTT_CODES:
            raise ValueError(f"each law needs {RTT_CODES} finite numbers; code_probability is {codes.shape}")
        codes = codes if codes.dtype in (np.float32, np.float64) else codes.astype(np.float64)
        object.__setattr__(self, "code_probability", np.ascontiguousarray(codes))
        for column, kind in zip(fields(self)[1:], (float, float, int, int, float, object), strict=True):
            value = np.asarray(getattr(self, column.name), dtype=kind)
            if value.shape not in ((), (len(codes),)):
                raise ValueError(f"{column.name} must be one number for each of {len(codes)} laws, not {value.shape}")
            object.__setattr__(self, column.name, np.broadcast_to(value, len(codes)))
        total = self._moments[..., 0].sum(axis=1) + self.p_fail  # (B,)
        least = np.minimum(codes.min(axis=1), self.p_fail)
        valid = (np.abs(total - 1) <= 1e-6) & (least >= 0)
        if not valid.all():
            worst = int(valid.argmin())
            raise ValueError(
                "the probabilities of all results must be finite, non-negative and sum to 1; "
                f"those of law {worst} sum to {total[worst]}, and the least is {least[worst]}"
            )

    @classmethod
    def concatenate(cls, laws: Sequence[RTTDistributions]) -> RTTDistributions:
        """All laws of several batches, one after the other."""
        if not laws:
            raise ValueError("no laws to put together")
        return cls(*(np.concatenate([getattr(batch, column.name) for batch in laws]) for column in fields(cls)))

    @classmethod
    def of(cls, laws: Sequence[RTTDistribution]) -> RTTDistributions:
        """The batch of single laws."""
        if not laws:
            raise ValueError("no laws to put together")
        return cls(*(np.stack([getattr(law, column.name) for law in laws]) for column in fields(cls)))

    def __len__(self) -> int:
        return len(self.code_probability)

    def __getitem__(self, index: int | slice | np.ndarray | Sequence[int]) -> RTTDistribution | RTTDistributions:
        from ping_llm.inference.distribution import RTTDistribution

        columns = [getattr(self, column.name)[index] for column in fields(self)]
        if np.ndim(columns[1]):
            return RTTDistributions(*columns)
        return RTTDistribution(columns[0], *(c.item() if isinstance(c, np.generic) else c for c in columns[1:]))

    def mixture(self, weights: np.ndarray) -> RTTDistributions:
        """M laws, the m-th the mixture of laws m·K … m·K + K − 1 with `weights[m]`, which sum to 1; weights (M, K), B = M·K.

        Mixed are the laws of all results, so an answer counts in proportion to how likely each law makes it. Of
        `forward_passes` and `context_measurements` the largest is told: laws that are mixed come from one batch.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.ndim != 2 or weights.size != len(self) or not weights.size:
            raise ValueError(f"the weights of {len(self)} laws must be (mixtures, laws in each), not {weights.shape}")
        if not ((weights >= 0).all() and (np.abs(weights.sum(axis=1) - 1) <= 1e-6).all()):
            raise ValueError(f"the weights of a mixture must be non-negative and sum to 1, not {weights.tolist()}")
        owner = np.repeat(np.arange(len(weights)), weights.shape[1])
        return self.mixtures(owner, weights.ravel())

    def mixtures(self, owner: np.ndarray, weights: np.ndarray, names: Sequence[str] = ()) -> RTTDistributions:
        """M laws, the m-th the mixture of the laws whose `owner`, (B,) ascending from 0 to M − 1, is m; see `mixture`.

        `weights` (B,) are made to sum to 1 for each owner. With `names` (B,) they are kept as the `src_weights` of a law.
        """
        weights = weights / np.bincount(owner, weights)[owner]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        parts = (np.split(array, starts[1:]) for array in (weights, self.code_probability))
        codes = np.stack([shares @ laws for shares, laws in zip(*parts, strict=True)])
        p_fail, total, unresolved = (
            np.bincount(owner, weights * column) for column in (self.p_fail, self.total_probability, self.unresolved)
        )
        passes, told = (np.maximum.reduceat(c, starts) for c in (self.forward_passes, self.context_measurements))
        named = np.array([{} for _ in starts], dtype=object)
        for law, name, weight in zip(owner, names, weights.tolist(), strict=False):
            named[law][name] = weight
        return RTTDistributions(codes, p_fail, total, passes, told, unresolved, named)

    @property
    def p_answer(self) -> np.ndarray:
        """P(answer), the sum of the codes; (B,)."""
        return self._below[0, :, -1]

    def cdf(self, rtt_ms: float | np.ndarray) -> np.ndarray:
        """P(RTT ≤ rtt_ms | answered) of each law; (B, *X)."""
        mass = self._cdf_and_moment(*self._each(_log_or_edge(rtt_ms)))[0]
        with np.errstate(invalid="ignore"):
            return np.minimum(mass / self._column(self.p_answer, rtt_ms), 1.0)  # rounding may pass 1

    def pdf(self, rtt_ms: float | np.ndarray) -> np.ndarray:
        """Density per log-ms at rtt_ms, given an answer, of each law; (B, *X). Per ms it is this divided by rtt_ms."""
        log_rtt = _log_or_edge(rtt_ms)
        code, edges = _code(log_rtt), _edges()
        inside = (np.asarray(rtt_ms) >= edges[0]) & (np.asarray(rtt_ms) < edges[-1])
        density = self.code_probability[:, code] / _widths()[code]  # (B, *X)
        with np.errstate(invalid="ignore"):
            return np.where(inside, density, 0.0) / self._column(self.p_answer, rtt_ms)

    def quantile(self, q: float | np.ndarray) -> np.ndarray:
        """RTT in ms below which a share q (0 to 1) of the answers of each law lies; (B, *X)."""
        q = np.asarray(q, dtype=np.float64)
        if not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"a quantile is asked for a share between 0 and 1, not {q}")
        law, share = self._each(q)
        rtt_ms = np.empty(law.shape)
        for points in _slices(law.size, _POINTS):
            rtt_ms.flat[points] = self._quantile(law.flat[points], share.flat[points])
        return rtt_ms

    @property
    def median(self) -> np.ndarray:
        """Median RTT of an answer, ms; (B,)."""
        return self.quantile(0.5)

    def interval(self, level: float) -> np.ndarray:
        """The central interval of ms that holds a share `level` (0 to 1) of the answers of each law; (B, 2)."""
        if not 0 <= level <= 1:
            raise ValueError(f"an interval holds a share between 0 and 1, not {level}")
        return self.quantile(np.array([(1 - level) / 2, (1 + level) / 2]))

    @property
    def mean(self) -> np.ndarray:
        """Mean RTT of an answer, ms; (B,)."""
        with np.errstate(invalid="ignore"):
            return self._moments[..., 2].sum(axis=1) / self.p_answer

    @property
    def mode(self) -> np.ndarray:
        """The middle in ms of the code whose density per log-ms is highest, the lowest of equals; (B,).

        Nothing is smoothed: where the law is ragged from code to code (0.05 %), its highest spike is told.
        """
        edges = _log_edges()
        highest = self._by_laws(lambda codes: (codes / _widths()).argmax(axis=1)).astype(np.int64)
        return np.where(self.p_answer > 0, np.exp((edges[highest] + edges[highest + 1]) / 2), np.nan)

    @property
    def entropy(self) -> np.ndarray:
        """Entropy in nats of the result as one of 65,537: a code or failure; (B,), 0 to ln 65,537 = 11.09."""
        return self._by_laws(lambda codes: _minus_p_log_p(codes).sum(axis=1)) + _minus_p_log_p(self.p_fail)

    def log_density(self, observed_ms: np.ndarray | float) -> np.ndarray:
        """Log-density in nats of one observed result of each law, (B,), −1 = failed; (B,), −∞ where it has no chance.

        Of an answer, the log of its density per log-ms times P(answer); of a failure, log p_fail. Minus this is `nll_nats`.
        """
        observed_ms, failed = self._observed(observed_ms)
        code = _code(_log_or_edge(observed_ms))
        density = self.code_probability[np.arange(len(self)), code] / _widths()[code]
        with np.errstate(divide="ignore"):
            return np.log(np.where(failed, self.p_fail, density))

    def crps(self, observed_ms: np.ndarray | float) -> np.ndarray:
        """Continuous ranked probability score in log-ms of one observed RTT of each law, (B,); (B,), NaN where it failed.

        ∫ (F(x) − [x ≥ y])² dx over x = log-RTT given an answer, exact: E|X − y| − ½ E|X − X′|.
        """
        observed_ms, failed = self._observed(observed_ms)
        log_rtt = _log_or_edge(observed_ms)
        mass, moment = self._cdf_and_moment(np.arange(len(self)), log_rtt)
        with np.errstate(invalid="ignore"):
            below = (log_rtt * mass - moment) / self.p_answer  # E max(y − X, 0)
            log_mean = self._moments[..., 1].sum(axis=1) / self.p_answer
        return np.where(failed, np.nan, 2 * below + log_mean - log_rtt - self._half_spread)

    def pit(self, observed_ms: np.ndarray | float, rng: np.random.Generator | None = None) -> np.ndarray:
        """Probability integral transform of one observed RTT of each law, (B,); (B,), NaN where it failed.

        F(y | answered), uniform on 0 to 1 if the laws are right. With `rng` the place of y within its code is drawn anew:
        the randomised transform of the law of codes, which does not mind that RTTs are reported in steps.
        """
        observed_ms, failed = self._observed(observed_ms)
        log_rtt = _log_or_edge(observed_ms)
        if rng is not None:
            code, edges = _code(log_rtt), _log_edges()
            log_rtt = edges[code] + rng.random(len(self)) * _widths()[code]
        mass = self._cdf_and_moment(np.arange(len(self)), log_rtt)[0]
        with np.errstate(invalid="ignore"):
            return np.where(failed, np.nan, np.minimum(mass / self.p_answer, 1.0))

    def kl(self, other: RTTDistributions) -> np.ndarray:
        """Kullback–Leibler divergence in nats from each law to the law of `other` at its place; (B,), ∞ allowed.

        Of the result as one of 65,537: a code or failure.
        """
        self._check_as_many(other)

        def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)

        codes = self._by_laws(lambda p, q: divergence(p, q).sum(axis=1), other)
        return np.maximum(codes + divergence(self.p_fail, other.p_fail), 0.0)

    def wasserstein(self, other: RTTDistributions) -> np.ndarray:
        """Wasserstein-1 distance in log-ms to the law of `other` at its place, of RTTs given an answer; (B,).

        ∫ |F − G| over log-RTT, exact: the difference is linear within a code, and may cross zero there.
        """
        self._check_as_many(other)
        widths = _widths()

        def distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore"):
                p, q = (codes / codes.sum(axis=1, keepdims=True) for codes in (p, q))
            end = np.cumsum(p - q, axis=1)  # F − G at the upper edge of each code
            start = np.concatenate([np.zeros((len(end), 1)), end[:, :-1]], axis=1)
            size, crossing = np.abs(start) + np.abs(end), start * end < 0
            # Two triangles where the difference crosses zero, else a trapezoid.
            height = np.where(crossing, (start**2 + end**2) / np.where(size > 0, size, 1), size)
            return height @ widths / 2

        return self._by_laws(distance, other)

    @cached_property
    def _moments(self) -> np.ndarray:
        """Sums over the codes of each byte 1 of probability, × mean log-ms, × mean ms, of an answer; (B, 256, 3)."""
        moments = np.empty((len(self), 256, 3))
        for laws in _slices(len(self), _LAWS):
            codes = self.code_probability[laws].astype(np.float64, copy=False).reshape(-1, 256, 256)
            with np.errstate(invalid="ignore"):
                moments[laws] = np.matmul(codes.swapaxes(0, 1), _code_moments()).swapaxes(0, 1)
        return moments

    @cached_property
    def _below(self) -> np.ndarray:
        """Probability, and its sum × log-ms, of an answer below each byte 1 and below the end; (2, B, 257)."""
        sums = np.cumsum(self._moments[..., :2], axis=1)  # (B, 256, 2)
        return np.concatenate([np.zeros((2, len(self), 1)), np.moveaxis(sums, 2, 0)], axis=2)

    @cached_property
    def _half_spread(self) -> np.ndarray:
        """½ E|X − X′| = ∫ F (1 − F) of log-ms given an answer; (B,). The one statistic that needs F at every code.

        F at the edges by the trapezoid rule, and what a straight F within each code adds to it.
        """
        widths = _widths()
        trapezoid = (widths + np.append(widths[1:], 0.0)) / 2

        def area(codes: np.ndarray) -> np.ndarray:
            below = np.cumsum(codes, axis=1)
            total = below[:, -1]
            with np.errstate(invalid="ignore"):
                return ((below * (total[:, None] - below)) @ trapezoid + (codes * codes) @ widths / 6) / total**2

        return self._by_laws(area, laws_at_once=1)  # one law fits the cache of a core

    def _by_laws(self, function, *others: RTTDistributions, laws_at_once: int = _LAWS) -> np.ndarray:
        """What `function` makes of code probabilities (b, 65,536) float64, some laws at a time; (B,)."""
        result = np.empty(len(self))
        for laws in _slices(len(self), laws_at_once):
            codes = (batch.code_probability[laws].astype(np.float64, copy=False) for batch in (self, *others))
            result[laws] = function(*codes)
        return result

    def _each(self, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every law with everything that is asked: indices of laws, and what is asked, both (B, *X)."""
        shape = (len(self), *np.shape(asked))
        law = self._column(np.arange(len(self)), asked)
        return np.broadcast_to(law, shape), np.broadcast_to(asked, shape)

    @staticmethod
    def _column(values: np.ndarray, asked: float | np.ndarray) -> np.ndarray:
        """(B,) values of the laws, to be broadcast with what is asked of each; (B, 1, …)."""
        return values.reshape(-1, *[1] * np.ndim(asked))

    def _cdf_and_moment(self, law: np.ndarray, log_rtt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(answered below log_rtt), and the integral of log-ms over it, of the laws at the indices `law`; any shape."""
        mass, moment = np.empty(law.shape), np.empty(law.shape)
        edges, middles = _log_edges(), _code_moments()[..., 1]
        codes = self.code_probability.reshape(len(self), 256, 256)
        for points in _slices(law.size, _POINTS):
            which, x = law.flat[points], log_rtt.flat[points]
            code = _code(x)
            high, low = np.divmod(code, 256)
            siblings = codes[which, high].astype(np.float64, copy=False)  # (n, 256)
            part = siblings[np.arange(len(low)), low] * ((x - edges[code]) / _widths()[code])
            siblings = np.where(np.arange(256) < low[:, None], siblings, 0.0)
            mass.flat[points] = self._below[0, which, high] + siblings.sum(axis=1) + part
            within = np.einsum("nc,nc->n", siblings, middles[high]) + part * (edges[code] + x) / 2
            moment.flat[points] = self._below[1, which, high] + within
        return mass, moment

    def _quantile(self, law: np.ndarray, q: np.ndarray) -> np.ndarray:
        """RTT in ms at the shares q of the answers of the laws at the indices `law`; all (n,)."""
        tiny, edges = np.finfo(np.float64).tiny, _log_edges()
        below = self._below[0, law]  # (n, 257)
        target = np.clip(q * below[:, -1], tiny, below[:, -1])  # above 0: codes without probability are never chosen
        high = (below[:, 1:-1] < target[:, None]).sum(axis=1)
        siblings = self.code_probability.reshape(len(self), 256, 256)[law, high].astype(np.float64, copy=False)
        within = np.cumsum(siblings, axis=1)  # (n, 256)
        target = np.clip(target - below[np.arange(len(law)), high], tiny, within[:, -1])
        low = (within[:, :-1] < target[:, None]).sum(axis=1)
        mass, end = siblings[np.arange(len(law)), low], within[np.arange(len(law)), low]
        code = high * 256 + low
        with np.errstate(invalid="ignore"):
            share = np.clip(1 - (end - target) / mass, 0, 1)  # NaN where no answer is possible
        return np.exp(edges[code] + share * _widths()[code])

    def _observed(self, observed_ms: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """One result of each law, (B,) ms, and where it failed; ValueError names one that is no result."""
        observed_ms = np.asarray(observed_ms, dtype=np.float64)
        if observed_ms.shape not in ((), (len(self),)):
            raise ValueError(f"each of {len(self)} laws is asked for one observed RTT, not {observed_ms.shape}")
        observed_ms = np.broadcast_to(observed_ms, len(self))
        failed = observed_ms == FAILED_RTT_MS
        wrong = ~(failed | ((observed_ms >= 0) & np.isfinite(observed_ms)))
        if wrong.any():
            raise ValueError(f"{observed_ms[wrong.argmax()]} is no RTT: give ms from 0 up, or −1 for a failed ping")
        return observed_ms, failed

    def _check_as_many(self, other: RTTDistributions) -> None:
        if len(other) != len(self):
            raise ValueError(f"{len(self)} laws can be compared with {len(self)} others, not with {len(other)}")


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, count, size))


def _minus_p_log_p(p: np.ndarray) -> np.ndarray:
    return -p * np.log(np.where(p > 0, p, 1.0))


def _log_or_edge(rtt_ms: float | np.ndarray) -> np.ndarray:
    """Log-RTT, and for what lies outside the codes, the edge of the nearest; ValueError on NaN."""
    rtt_ms = np.asarray(rtt_ms, dtype=np.float64)
    if np.isnan(rtt_ms).any():
        raise ValueError("NaN is no RTT: give ms")
    edges = _edges()
    return np.log(np.clip(rtt_ms, edges[0], edges[-1]))


def _code(log_rtt: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(_log_edges(), log_rtt, "right") - 1, 0, RTT_CODES - 1)


@cache
def _edges() -> np.ndarray:
    return rtt_code_edges_ms()  # (65,537,) ms


@cache
def _log_edges() -> np.ndarray:
    return np.log(_edges())  # (65,537,) log-ms


@cache
def _widths() -> np.ndarray:
    return np.diff(_log_edges())  # (65,536,) log-ms


@cache
def _code_moments() -> np.ndarray:
    """1, the mean log-ms and the mean ms of each code by its two bytes, uniform in log-ms; (256, 256, 3)."""
    edges = _log_edges()
    mean_ms = np.diff(_edges()) / _widths()
    return np.stack([np.ones(RTT_CODES), (edges[:-1] + edges[1:]) / 2, mean_ms], axis=-1).reshape(256, 256, 3)
