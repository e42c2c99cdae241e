"""Probabilities of the 65,536 RTT codes and of failure in, statistics of the RTT out, in closed form.

B = distributions, X = points where each is evaluated (any shape, or a single number), 256 = values of one byte of a code.
Within a code the density is uniform in log-RTT; a code is 0.05 % wide. Sums over byte 1 are computed once and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.measurement import FAILED_RTT_MS
from ping_llm.data.tokenization import RTT_CODES, encode_rtt, rtt_code_edges_ms
from ping_llm.inference.plots import Drawable, plot_rtt

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
Values = Any
"""Of one distribution a number, or an array (*X) for points (*X); of B distributions an array (B,), or (B, *X)."""
_POINTS = 1024  # looked up at once: 2 MB
_AT_ONCE = 16  # distributions whose moments are computed at once: 8 MB


@dataclass(frozen=True, eq=False)
class RTTDistribution:
    """The distribution of the result of one ping, or of each of B pings.

    `code_probability` is the probability that a ping is answered with an RTT of each code, (65,536,) or (B, 65,536), float32
    or float64 as given (0.26 or 0.52 MB a distribution; all sums are float64), and `p_fail` that it is not answered, one
    number or (B,); together they sum to 1. `total_probability` is the mass that the raw model put on valid results before
    they were made to. `unresolved` is the probability of RTTs that were computed to byte 1 only (within 9 %) and are taken
    as uniform there: no probability is off by more. `src_weights` are the shares of a mixture over how much of the source
    is known. These columns are one number, or (B,); one number for all is repeated.

    `batch[i]` is the i-th distribution, `batch[2:5]` and `batch[[4, 0]]` are some of them. Statistics of the RTT are given
    an answer. Where a ping fails with certainty they are NaN in a batch, and a ValueError of one distribution.
    """

    code_probability: np.ndarray = field(repr=False)
    p_fail: Values
    total_probability: Values = 1.0
    forward_passes: Values = 0
    context_measurements: Values = 0
    unresolved: Values = 0.0
    src_weights: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        codes = np.asarray(self.code_probability)
        if codes.ndim not in (1, 2) or codes.shape[-1] != RTT_CODES:
            raise ValueError(f"each distribution needs {RTT_CODES} finite numbers; code_probability is {codes.shape}")
        codes = np.ascontiguousarray(codes if codes.dtype in (np.float32, np.float64) else codes.astype(np.float64))
        object.__setattr__(self, "code_probability", codes)
        shape, kinds = codes.shape[:-1], (float, float, int, int, float, object)
        for column, kind in zip(fields(self)[1:], kinds, strict=True):
            value: np.ndarray = np.asarray(getattr(self, column.name), dtype=kind)
            if value.shape not in ((), shape):
                raise ValueError(f"{column.name} must be one number for each of {len(codes)} pings, not {value.shape}")
            value = np.broadcast_to(value, shape)
            object.__setattr__(self, column.name, value if shape else value.item())
        total = self._moments[..., 0].sum(axis=1) + self.p_fail  # (B,)
        least = np.minimum(self._codes.min(axis=1), self.p_fail)
        valid = (np.abs(total - 1) <= 1e-6) & (least >= 0)
        if not valid.all():
            worst = int(valid.argmin())
            raise ValueError(
                "the probabilities of all results must be finite, non-negative and sum to 1; "
                f"those of distribution {worst} sum to {total[worst]}, and the least is {least[worst]}"
            )

    @classmethod
    def concatenate(cls, parts: Sequence[RTTDistribution]) -> RTTDistribution:
        """One batch of several distributions, or batches of them, one after the other."""
        if not parts:
            raise ValueError("no distributions to put together")
        names = [column.name for column in fields(cls)]
        batches = [
            [getattr(part, name) if part.is_batch else [getattr(part, name)] for part in parts] for name in names
        ]
        return cls(*map(np.concatenate, batches))

    @property
    def is_batch(self) -> bool:
        """Whether this is of B pings, B ≥ 0, not of one."""
        return self.code_probability.ndim == 2

    def __len__(self) -> int:
        if not self.is_batch:
            raise TypeError("the distribution of one ping has no length")
        return len(self.code_probability)

    def __getitem__(self, index: int | slice | np.ndarray | Sequence[int]) -> RTTDistribution:
        if not self.is_batch:
            raise TypeError("the distribution of one ping has no parts")
        return RTTDistribution(*(getattr(self, column.name)[index] for column in fields(self)))

    def __iter__(self) -> Iterator[RTTDistribution]:
        return (self[i] for i in range(len(self)))

    def mixture(
        self, weights: Sequence[float] | np.ndarray, owner: np.ndarray | None = None, names: Sequence[str] = ()
    ) -> RTTDistribution:
        """The distribution of a result that comes from the i-th of the batch with probability `weights[i]`, (B,).

        Mixed are distributions of all results, so an answer counts in proportion to how likely each makes it. Of
        `forward_passes` and `context_measurements` the largest is kept: what is mixed comes from one batch. With `owner`,
        (B,) ascending from 0 to M − 1, there are M mixtures, and the weights are made to sum to 1 in each. With `names`
        (B,) they are kept as its `src_weights`.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(self),) or not len(self):
            raise ValueError(f"{len(self)} distributions need as many weights, at least one, not {weights.shape}")
        if not (weights >= 0).all() or (owner is None and not abs(weights.sum() - 1) <= 1e-6):
            raise ValueError(f"the weights of a mixture must be non-negative and sum to 1, not {weights}")
        if owner is None:
            return self.mixture(weights, np.zeros(len(self), dtype=np.int64), names)[0]
        weights = weights / np.bincount(owner, weights)[owner]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        parts = (np.split(array, starts[1:]) for array in (weights, self.code_probability))
        codes = np.stack([shares @ own for shares, own in zip(*parts, strict=True)])
        p_fail, total, unresolved = (
            np.bincount(owner, weights * column) for column in (self.p_fail, self.total_probability, self.unresolved)
        )
        passes, context = (np.maximum.reduceat(c, starts) for c in (self.forward_passes, self.context_measurements))
        named = np.array([{} for _ in starts], dtype=object)
        for place, name, weight in zip(owner, names, map(float, weights), strict=False):
            named[place][name] = weight
        return RTTDistribution(codes, p_fail, total, passes, context, unresolved, named)

    @property
    def p_answer(self) -> Values:
        """P(answer), the sum of the codes."""
        return self._each(self._p_answer)

    def cdf(self, rtt_ms: float | np.ndarray) -> Values:
        """P(RTT ≤ rtt_ms | answered)."""
        self._check_answer_possible()
        which, log_rtt = self._at_each(_log_or_edge(rtt_ms))
        mass = self._cdf_and_moment(which, log_rtt)[0]
        with np.errstate(invalid="ignore"):
            return self._each(np.minimum(mass / self._p_answer[which], 1.0))  # rounding may pass 1

    def pdf(self, rtt_ms: float | np.ndarray) -> Values:
        """Density per ms of the RTT at rtt_ms given an answer, 0 outside the codes: the derivative of `cdf`."""
        self._check_answer_possible()
        which, x = self._at_each(np.asarray(rtt_ms, dtype=np.float64))
        code = _code(_log_or_edge(x))
        inside = (x >= _edges()[0]) & (x < _edges()[-1])
        per_log_ms = np.where(inside, self._codes[which, code] / code_widths()[code], 0.0)
        with np.errstate(invalid="ignore"):
            return self._each(per_log_ms / np.where(inside, x, 1.0) / self._p_answer[which])

    def log_pdf(self, rtt_ms: float | np.ndarray) -> Values:
        """Logarithm of `pdf`, the density per ms given an answer; −∞ where it is 0. `log_density` scores any result."""
        with np.errstate(divide="ignore"):
            return np.log(self.pdf(rtt_ms))

    def quantile(self, q: float | np.ndarray) -> Values:
        """RTT in ms below which a share q (0 to 1) of the answers lies."""
        self._check_answer_possible()
        q = np.asarray(q, dtype=np.float64)
        if not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"a quantile is that of a share between 0 and 1, not {q}")
        which, share = self._at_each(q)
        rtt_ms = np.empty(which.shape)
        for points in _slices(which.size, _POINTS):
            rtt_ms.flat[points] = self._quantile(which.flat[points], share.flat[points])
        return self._each(rtt_ms)

    @property
    def median(self) -> Values:
        """Median RTT of an answer, ms."""
        return self.quantile(0.5)

    @property
    def mean(self) -> Values:
        """Mean RTT of an answer, ms."""
        self._check_answer_possible()
        with np.errstate(invalid="ignore"):
            return self._each(self._moments[..., 2].sum(axis=1) / self._p_answer)

    def log_density(self, observed_ms: float | np.ndarray) -> Values:
        """Log-density in nats of one observed result of each ping, −1 = failed; −∞ where it has no chance.

        Of an answer, the log of its density per log-ms, not per ms as `log_pdf`, times P(answer); of a failure, log p_fail.
        Minus this is `nll_nats`.
        """
        observed_ms, failed = self._observed(observed_ms)
        code = encode_rtt(observed_ms)  # of an RTT between two codes the one that the model has learned it as
        density = self._codes[np.arange(len(code)), code] / code_widths()[code]
        with np.errstate(divide="ignore"):
            return self._each(np.log(np.where(failed, self.p_fail, density)))

    def crps(self, observed_ms: float | np.ndarray) -> Values:
        """Continuous ranked probability score in log-ms of one observed RTT of each ping; NaN in a batch where it failed.

        ∫ (F(x) − [x ≥ y])² dx over x = log-RTT given an answer, exact: E|X − y| − ½ E|X − X′|.
        """
        observed_ms, failed = self._observed(observed_ms, "CRPS")
        log_rtt = _log_or_edge(observed_ms)
        mass, moment = self._cdf_and_moment(np.arange(len(log_rtt)), log_rtt)
        with np.errstate(invalid="ignore"):
            below = (log_rtt * mass - moment) / self._p_answer  # E max(y − X, 0)
            log_mean = self._moments[..., 1].sum(axis=1) / self._p_answer
        return self._each(np.where(failed, np.nan, 2 * below + log_mean - log_rtt - self._half_spread))

    def pit(self, observed_ms: float | np.ndarray, rng: np.random.Generator | None = None) -> Values:
        """Probability integral transform of one observed RTT of each ping; NaN in a batch where it failed.

        F(y | answered), uniform on 0 to 1 if the distributions are right. With `rng` the place of y within its code is drawn
        anew: the randomised transform of the distribution of codes, which does not mind that RTTs are reported in steps.
        """
        observed_ms, failed = self._observed(observed_ms, "PIT")
        log_rtt = _log_or_edge(observed_ms)
        if rng is not None:
            code = _code(log_rtt)
            log_rtt = log_edges()[code] + rng.random(len(code)) * code_widths()[code]
        mass = self._cdf_and_moment(np.arange(len(log_rtt)), log_rtt)[0]
        with np.errstate(invalid="ignore"):
            return self._each(np.where(failed, np.nan, np.minimum(mass / self._p_answer, 1.0)))

    def sample(self, count: int, seed: int | None = None) -> np.ndarray:
        """`count` independent results of one ping in ms, −1 = failed; (count,) float64. Without a seed they are new ones."""
        rng = np.random.default_rng(seed)
        failed = rng.random(count) < self.p_fail
        if not self.p_answer > 0:
            return np.full(count, FAILED_RTT_MS)
        return np.where(failed, FAILED_RTT_MS, self.quantile(rng.random(count)))

    def to_dict(self) -> dict[str, Any]:
        """What `rtt --json` prints of one ping."""
        answered = self.p_answer > 0
        return {
            "p_fail": self.p_fail,
            "median_ms": self.median if answered else None,
            "mean_ms": self.mean if answered else None,
            "quantiles": {f"{q:g}": self.quantile(q) if answered else None for q in QUANTILES},
            "total_probability": self.total_probability,
            "forward_passes": self.forward_passes,
            "context_measurements": self.context_measurements,
            "unresolved_probability": self.unresolved,
            "src_weights": dict(self.src_weights),
        }

    def plot(self, path: Path | str, title: str = "", truth: Drawable | None = None) -> None:
        """Draws the density of one ping to an image file, with `truth` beside it; see `plot_rtt`."""
        plot_rtt({"model": self}, Path(path), title, truth)

    @property
    def _codes(self) -> np.ndarray:
        """Code probabilities, (B, 65,536); of one ping B = 1, here and in all that follows."""
        return self.code_probability.reshape(-1, RTT_CODES)

    @property
    def _p_answer(self) -> np.ndarray:
        return self._below[0, :, -1]  # (B,)

    def _each(self, values: np.ndarray) -> Values:
        """(B, *X) as the caller wants it: for one ping (*X), or a number."""
        if self.is_batch:
            return values
        return values[0] if values.ndim > 1 else float(values[0])

    def _check_answer_possible(self) -> None:
        if not self.is_batch and not self._p_answer[0] > 0:
            raise ValueError("the ping fails with certainty: its RTT has no distribution")

    @cached_property
    def _moments(self) -> np.ndarray:
        """Sums over the codes of each byte 1 of probability, × mean log-ms, × mean ms, of an answer; (B, 256, 3)."""
        moments = np.empty((len(self._codes), 256, 3))
        for some in _slices(len(moments), _AT_ONCE):
            codes = self._codes[some].astype(np.float64, copy=False).reshape(-1, 256, 256)
            with np.errstate(invalid="ignore"):
                moments[some] = np.matmul(codes.swapaxes(0, 1), _code_moments()).swapaxes(0, 1)
        return moments

    @cached_property
    def _below(self) -> np.ndarray:
        """Probability, and its sum × log-ms, of an answer below each byte 1 and below the end; (2, B, 257)."""
        sums = np.cumsum(self._moments[..., :2], axis=1)  # (B, 256, 2)
        return np.concatenate([np.zeros((2, len(sums), 1)), np.moveaxis(sums, 2, 0)], axis=2)

    @cached_property
    def _half_spread(self) -> np.ndarray:
        """½ E|X − X′| = ∫ F (1 − F) of log-ms given an answer; (B,). The one statistic that needs F at every code.

        F at the edges by the trapezoid rule, and what a straight F within each code adds to it.
        """
        widths = code_widths()
        trapezoid = (widths + np.append(widths[1:], 0.0)) / 2
        spread = np.empty(len(self._codes))
        for one in _slices(len(spread), 1):  # one distribution fits the cache of a core
            codes = self._codes[one].astype(np.float64, copy=False)
            below = np.cumsum(codes, axis=1)
            total = below[:, -1]
            with np.errstate(invalid="ignore"):
                # Not by BLAS, whose threads spin between calls of some microseconds.
                area = np.einsum("bc,bc,c->b", below, total[:, None] - below, trapezoid)
                area += np.einsum("bc,bc,c->b", codes, codes, widths) / 6
                spread[one] = area / total**2
        return spread

    def _at_each(self, points: np.ndarray) -> tuple[np.ndarray, ...]:
        """Every distribution with every point: indices of distributions, and points, both (B, *X)."""
        return tuple(np.broadcast_arrays(np.arange(len(self._codes)).reshape(-1, *[1] * points.ndim), points))

    def _cdf_and_moment(self, which: np.ndarray, log_rtt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(answered below log_rtt), and the integral of log-ms over it, of the distributions `which`; any shape."""
        mass, moment = np.empty(which.shape), np.empty(which.shape)
        edges, middles = log_edges(), _code_moments()[..., 1]
        codes = self._codes.reshape(-1, 256, 256)
        for points in _slices(which.size, _POINTS):
            some, x = which.flat[points], log_rtt.flat[points]
            code = _code(x)
            high, low = np.divmod(code, 256)
            siblings = codes[some, high].astype(np.float64, copy=False)  # (n, 256)
            part = siblings[np.arange(len(low)), low] * ((x - edges[code]) / code_widths()[code])
            siblings = np.where(np.arange(256) < low[:, None], siblings, 0.0)
            mass.flat[points] = self._below[0, some, high] + siblings.sum(axis=1) + part
            within = np.einsum("nc,nc->n", siblings, middles[high]) + part * (edges[code] + x) / 2
            moment.flat[points] = self._below[1, some, high] + within
        return mass, moment

    def _quantile(self, which: np.ndarray, q: np.ndarray) -> np.ndarray:
        """RTT in ms at the shares q of the answers of the distributions `which`; all (n,)."""
        tiny, edges = np.finfo(np.float64).tiny, log_edges()
        below = self._below[0, which]  # (n, 257)
        target = np.clip(q * below[:, -1], tiny, below[:, -1])  # above 0: codes without probability are never chosen
        high = (below[:, 1:-1] < target[:, None]).sum(axis=1)
        siblings = self._codes.reshape(-1, 256, 256)[which, high].astype(np.float64, copy=False)
        within = np.cumsum(siblings, axis=1)  # (n, 256)
        target = np.clip(target - below[np.arange(len(which)), high], tiny, within[:, -1])
        low = (within[:, :-1] < target[:, None]).sum(axis=1)
        mass, end = siblings[np.arange(len(which)), low], within[np.arange(len(which)), low]
        code = high * 256 + low
        with np.errstate(invalid="ignore"):
            share = np.clip(1 - (end - target) / mass, 0, 1)  # NaN where no answer is possible
        return np.exp(edges[code] + share * code_widths()[code])

    def _observed(self, observed_ms: np.ndarray | float, score: str = "") -> tuple[np.ndarray, np.ndarray]:
        """One result of each ping, (B,) ms, and where it failed; ValueError names one that is no result, or of one ping a
        failure that has no `score`."""
        observed_ms, count = np.asarray(observed_ms, dtype=np.float64), len(self._codes)
        if observed_ms.shape not in ((), (count,)):
            raise ValueError(f"each of {count} distributions takes one observed RTT, not {observed_ms.shape}")
        observed_ms = np.broadcast_to(observed_ms, count)
        failed = observed_ms == FAILED_RTT_MS
        wrong = ~(failed | ((observed_ms >= 0) & np.isfinite(observed_ms)))
        if wrong.any():
            raise ValueError(f"{observed_ms[wrong.argmax()]} is no RTT: give ms from 0 up, or −1 for a failed ping")
        if score and not self.is_batch and failed[0]:
            raise ValueError(
                f"the {score} is of an answered ping, and this one failed; log_density scores failures too"
            )
        if score:
            self._check_answer_possible()
        return observed_ms, failed


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, count, size))


def _log_or_edge(rtt_ms: float | np.ndarray) -> np.ndarray:
    """Log-RTT, and for what lies outside the codes, the edge of the nearest; ValueError on NaN."""
    rtt_ms = np.asarray(rtt_ms, dtype=np.float64)
    if np.isnan(rtt_ms).any():
        raise ValueError("NaN is no RTT: give ms")
    return np.log(np.clip(rtt_ms, *_edges()[[0, -1]]))


def _code(log_rtt: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(log_edges(), log_rtt, "right") - 1, 0, RTT_CODES - 1)


_edges = cache(rtt_code_edges_ms)  # (65,537,) ms


@cache
def log_edges() -> np.ndarray:
    """Borders of the codes, (65,537,) log-ms."""
    return np.log(_edges())


@cache
def code_widths() -> np.ndarray:
    """Widths of the codes, (65,536,) log-ms."""
    return np.diff(log_edges())


@cache
def _code_moments() -> np.ndarray:
    """1, the mean log-ms and the mean ms of each code by its two bytes, uniform in log-ms; (256, 256, 3)."""
    edges = log_edges()
    mean_ms = np.diff(_edges()) / code_widths()
    return np.stack([np.ones(RTT_CODES), (edges[:-1] + edges[1:]) / 2, mean_ms], axis=-1).reshape(256, 256, 3)
