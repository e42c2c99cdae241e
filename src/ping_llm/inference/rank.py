"""A source and candidates in, which of them is nearest out: exact, under independent pings given the model.

Of n candidates that are pinged once each, the winner has the least RTT; a ping that fails is slower than any answer, and if
none answers nobody wins. Within a code an RTT is uniform in log-ms, so ties have no chance: candidate i wins with

    Σ over codes c of p_i(c) · ∫₀¹ Π over j ≠ i of (S_j(c) + p_j(c) · (1 − u)) du

with p_j(c) the probability of the code and S_j(c) that of a slower result, failure included. The integral, a polynomial of
degree n − 1, is taken at 4 points of Gauss and Legendre, exact for up to 8 candidates; in every code the sum over all
candidates is then made to be what it is, Π (S_j + p_j) − Π S_j. So the probabilities of all outcomes sum to 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ping_llm.inference.context import Context, Records
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader
from ping_llm.inference.mixture import distributions, weighted_variants
from ping_llm.inference.query import Query, SrcKnown, Time

_POINTS, _SHARES = np.polynomial.legendre.leggauss(4)
_POINTS, _SHARES = (_POINTS + 1) / 2, _SHARES / 2  # of an integral over 0 to 1
_CODES_AT_ONCE = 512
_LEAST_CHANCE = 1e-20  # that all but one are slower: codes with less are left out


@dataclass(frozen=True)
class Ranking:
    """The candidates, the likeliest winner first; equals by their median.

    `table` has the columns dst_addr, p_fastest, expected_rank (1 to n), median_ms (null where a ping fails with certainty)
    and p_fail. `p_none` is the probability that no candidate answers; with it p_fastest sums to 1.
    """

    table: pa.Table
    p_none: float


def rank(
    reader: Reader,
    src: str | None,
    candidates: Sequence[str],
    at: Time = None,
    context: Records | None = None,
    src_known: SrcKnown = "auto",
    *,
    one_host: bool = False,
    any_source: bool = False,
) -> Ranking:
    """Which of the candidates, addresses or prefixes, is nearest to `src`; the rest of what is given: see `PingModel.rtt`.

    ValueError where there is no candidate, one is no address or one is named twice.
    """
    if isinstance(candidates, str):
        raise ValueError(f"candidates={candidates!r} must be a list of addresses")
    if not len(candidates):
        raise ValueError("no candidates to rank; give at least one address")
    earlier = Context.parse(context, one_host, any_source)
    queries = [Query.parse(src, candidate or None, at, earlier) for candidate in candidates]
    named = [query.dst for query in queries]
    for place, endpoint in enumerate(named):
        if endpoint is None:
            raise ValueError(f"candidate {place + 1} is empty; give an address")
        if endpoint in named[:place]:
            raise ValueError(f"candidate {candidates[place]!r} is named twice; leave one out")
    about_src = queries[0] if src is None else dataclasses.replace(queries[0], dst=None)
    races = []
    # The known length of the source is the same for all candidates: each length is a race of its own.
    for variant, weight in zip(*weighted_variants(reader, about_src, src_known), strict=True):
        own = [dataclasses.replace(query, src=variant.src) for query in queries]
        found = [(some.code_probability.astype(np.float32), some.p_fail) for some in distributions(reader, own, "all")]
        codes, p_fail = (np.concatenate(column) for column in zip(*found, strict=True))
        races.append((weight, codes, p_fail, *fastest(codes, p_fail), p_fail.prod()))
    weights, *columns = zip(*races, strict=True)
    codes, p_fail, p_fastest, expected_rank, p_none = (
        sum(weight * values for weight, values in zip(weights, column, strict=True)) for column in columns
    )
    median_ms = RTTDistribution(codes / (codes.sum(axis=1) + p_fail)[:, None], p_fail).median
    order = np.lexsort((median_ms, -p_fastest))
    ranked = {
        "dst_addr": [str(queries[i].dst) for i in order],
        "p_fastest": p_fastest[order],
        "expected_rank": expected_rank[order],
        "median_ms": pa.array(median_ms[order], mask=np.isnan(median_ms[order])),
        "p_fail": p_fail[order],
    }
    return Ranking(pa.table(ranked), float(p_none))


def fastest(codes: np.ndarray, p_fail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(candidate wins) and its expected rank, (n,) each, of distributions (n, 65,536) and (n,).

    The rank counts who is faster; of two that fail each is so with 1/2.
    """
    n = len(codes)
    p_fail = np.asarray(p_fail, dtype=np.float64)
    wins, beaten = np.zeros(n), np.zeros(n)
    slower = p_fail.copy()  # (n,) P(result beyond the codes so far); from the slowest on, small ones stay exact
    for end in range(codes.shape[1], 0, -_CODES_AT_ONCE):
        p = codes[:, max(end - _CODES_AT_ONCE, 0) : end].astype(np.float64)  # (n, c)
        beyond = slower[:, None] + np.cumsum(p[:, ::-1], axis=1)[:, ::-1]  # P(code ≥ c)
        S = np.concatenate([beyond[:, 1:], slower[:, None]], axis=1)  # P(slower than code c)
        factors = S + p
        least = factors.min(axis=0)
        open_codes = factors.prod(axis=0) > _LEAST_CHANCE * least  # (c,) never where the least is 0: the race is over
        wins += _wins(p[:, open_codes], S[:, open_codes])
        half = S + p / 2
        beaten += ((n - 1) * p - p * (half.sum(axis=0) - half)).sum(axis=1)  # Σ_j≠i P(j faster, i of these codes)
        slower = beyond[:, 0]
    answers = slower - p_fail
    others_answer, others_fail = answers.sum() - answers, p_fail.sum() - p_fail
    return wins, 1 + beaten + p_fail * (others_answer + others_fail / 2)


def _wins(p: np.ndarray, slower: np.ndarray) -> np.ndarray:
    """P(candidate wins with one of c codes), (n,), from probabilities of the codes and of slower results, both (n, c)."""
    shares = np.zeros_like(p)
    for u, share in zip(_POINTS, _SHARES, strict=True):
        factors = slower + p * (1 - u)
        above, below = np.ones_like(factors), np.ones_like(factors)
        np.cumprod(factors[:-1], axis=0, out=above[1:])
        below[:-1] = np.cumprod(factors[:0:-1], axis=0)[::-1]
        shares += share * p * (above * below)  # the product of all other rows, so that zeros do no harm
    exact = (slower + p).prod(axis=0) - slower.prod(axis=0)  # (c,)
    total = shares.sum(axis=0)
    return (shares * np.divide(exact, total, out=np.zeros_like(total), where=total > 0)).sum(axis=1)
