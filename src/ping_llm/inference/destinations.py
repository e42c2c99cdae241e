"""What is told of a ping but one address in, the likeliest addresses out: exact, found by best-first search.

P(dst | src, RTT = x) puts the RTT before the destination, and the search gives the posterior itself. For RTT ≤ x the
destination comes first, as in a question for the RTT: P(dst | src) · P(RTT ≤ x | src, dst), whose first factor bounds the
product, so that the likeliest are known for sure once no address that is left could reach them.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from ping_llm.data.tokenization import rtt_code_edges_ms
from ping_llm.inference.context import Context, parse_time
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.distributions import RTTDistributions
from ping_llm.inference.prefixes import mixed_law, whole_byte_queries
from ping_llm.inference.query import Endpoint, Query, SrcKnown
from ping_llm.inference.search import (
    DST_ROLES,
    EXPANSIONS,
    SRC_ROLES,
    AddressSearch,
    Found,
    address_tokens,
    opening,
    read_beginnings,
)

if TYPE_CHECKING:
    from ping_llm.inference.predictor import PingModel

FAMILIES = ("ipv4", "ipv6")
MOST_LAWS = 1000  # addresses whose law is computed, at most, to find those of RTT ≤ x
_LAWS_AT_ONCE = 64
_UNPROVEN = 10  # addresses that stand for a prefix in which the search found none


@dataclass(frozen=True)
class FoundAddresses:
    """The likeliest addresses, the likeliest first.

    `table` has the columns dst_addr, or src_addr, and probability; where RTT ≤ x was asked also p_within, P(RTT ≤ x | src,
    dst), and median_ms (null where a ping fails with certainty). `covered` is the sum of the probabilities. No address
    that is not in the table is likelier than `bound`. `proven` says that none is likelier than the last in it.
    `p_within` is P(RTT ≤ x) of all destinations that were searched, by which the probabilities are normalised.
    """

    table: pa.Table
    covered: float
    bound: float
    proven: bool
    expansions: int
    p_within: float | None = None


class CompletionAverage(NamedTuple):
    """The law of a ping to a prefix, averaged over its likeliest addresses, and how many these are and what they hold."""

    law: RTTDistribution
    covered: float  # share of the prefix's probability
    addresses: int


def destinations(
    model: PingModel,
    src: str,
    rtt: float | None = None,
    rtt_max: float | None = None,
    at: dt.datetime | str | float | None = None,
    context: pa.Table | Sequence[dict] | None = None,
    prefix: str | None = None,
    families: Sequence[str] = FAMILIES,
    top: int = 10,
    src_known: SrcKnown = "auto",
    expansions: int = EXPANSIONS,
) -> FoundAddresses:
    """The `top` likeliest destinations of pings from `src`: P(dst | src), or given an RTT of `rtt` or within `rtt_max` ms.

    With `prefix` only those in it are meant, and their probabilities within it. After so many `expansions` of prefixes the
    answer is what was found, and not proven. `at`, `context` and `src_known`: see `PingModel.rtt`.
    """
    _check_numbers(rtt, rtt_max, top, expansions)
    if not src:
        raise ValueError("tell the source whose destinations are asked for, an address or a prefix")
    inside, roles = _searched(prefix, families)
    query = Query.parse(src, None, at, Context.parse(context))
    variants, search = _search(model, query, rtt, inside, roles, src_known, expansions)
    if rtt_max is None:
        return _likeliest(search, top, "dst_addr")
    return _likeliest_within(model, search, variants, rtt_max, top, query, inside, src_known)


def complete(
    model: PingModel,
    prefix: str,
    role: str = "dst",
    src: str | None = None,
    dst: str | None = None,
    rtt: float | None = None,
    at: dt.datetime | str | float | None = None,
    context: pa.Table | Sequence[dict] | None = None,
    top: int = 10,
    src_known: SrcKnown = "auto",
    expansions: int = EXPANSIONS,
) -> FoundAddresses:
    """The `top` likeliest whole addresses of a partial one, and the probability of each within it.

    `role` says which end of a ping it is, dst or src; the other end, the RTT (ms) and the time may be told.
    """
    _check_numbers(rtt, None, top, expansions)
    if role not in ("dst", "src"):
        raise ValueError(f"role={role!r} must be dst or src, the end of the ping that is completed")
    if (dst if role == "dst" else src) is not None:
        raise ValueError(f"{prefix!r} is the {role} that is completed; tell the other end only")
    roles = DST_ROLES if role == "dst" else SRC_ROLES
    inside = Endpoint.parse(prefix)
    if not inside.is_prefix:
        raise ValueError(f"{prefix!r} is a whole address; give a prefix like {prefix}/{4 * inside.width}")
    if src is None and dst is None:
        if context is not None and len(context):
            raise ValueError("a context is of one source; tell which one it is")
        query = Query(None, None, None if at is None else parse_time(at), Context.parse(None))
    else:
        query = Query.parse(src, dst, at, Context.parse(context))
    _, search = _search(model, query, rtt, inside, roles, src_known, expansions)
    return _likeliest(search, top, f"{role}_addr")


def rtt_by_completion(
    model: PingModel,
    src: str | None,
    dst: str,
    at: dt.datetime | str | float | None = None,
    context: pa.Table | Sequence[dict] | None = None,
    mass: float = 0.95,
    most: int = MOST_LAWS,
    src_known: SrcKnown = "auto",
    expansions: int = EXPANSIONS,
) -> CompletionAverage:
    """The law of a ping to the prefix `dst` by another way: the average over the likeliest addresses in it.

    They are weighted by their probabilities; the likeliest that hold a share `mass` are taken, `most` at most.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass} must be a share above 0, at most 1")
    if most < 1:
        raise ValueError(f"most={most} must be at least 1 address")
    query = Query.parse(src, dst, at, Context.parse(context))
    if not query.dst.is_prefix:
        raise ValueError(f"{dst!r} is a whole address; give a prefix, or ask for the law itself")
    without_dst = dataclasses.replace(query, dst=None)
    variants, search = _search(model, without_dst, None, query.dst, DST_ROLES, src_known, expansions)
    found, covered = [], 0.0
    for address in islice(search, most):
        found.append(address)
        covered += address.probability
        if covered >= mass:
            break
    if not found:
        found = search.unproven(min(most, _UNPROVEN))
        covered = sum(address.probability for address in found)
    queries = [dataclasses.replace(variant, dst=address.end) for address in found for variant in variants]
    weights = np.exp(np.concatenate([address.log_p for address in found]))
    return CompletionAverage(mixed_law(model, queries, weights), min(covered, 1.0), len(found))


def _check_numbers(rtt: float | None, rtt_max: float | None, top: int, expansions: int) -> None:
    if rtt is not None and rtt_max is not None:
        raise ValueError("give rtt, the RTT in ms, or rtt_max, its bound, not both")
    for name, value in (("rtt", rtt), ("rtt_max", rtt_max)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number of ms from 0 up")
    least_ms = rtt_code_edges_ms()[0]
    if rtt_max is not None and rtt_max <= least_ms:
        raise ValueError(f"rtt_max={rtt_max}: no RTT is told below {least_ms:.4f} ms; give more")
    for name, value in (("top", top), ("expansions", expansions)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _searched(prefix: str | None, families: Sequence[str]) -> tuple[Endpoint | None, list[int]]:
    """The prefix, if any, and the roles under which destinations are searched."""
    families = (families,) if isinstance(families, str) else tuple(families)
    if not families or not set(families) <= set(FAMILIES):
        raise ValueError(f"families={families} must be one or both of {', '.join(FAMILIES)}")
    roles = [role for family, role in zip(FAMILIES, DST_ROLES, strict=True) if family in families]
    if prefix is None:
        return None, roles
    inside = Endpoint.parse(prefix)
    family = FAMILIES[inside.width == 16]
    if family not in families:
        raise ValueError(f"no address of {', '.join(families)} lies in {prefix}; leave out families, or add {family}")
    return inside, roles


def _search(
    model: PingModel,
    query: Query,
    rtt_ms: float | None,
    inside: Endpoint | None,
    roles: Sequence[int],
    src_known: SrcKnown,
    expansions: int,
) -> tuple[list[Query], AddressSearch]:
    """The M questions that are mixed, and the search for the end that they do not tell, by its `roles`."""
    variants, weights = whole_byte_queries(model, query, src_known)
    seq_len = model.gpt.config.seq_len
    before = [opening(variant, seq_len) for variant in variants]
    lines = [opening(variant, seq_len, rtt_ms) for variant in variants]
    if inside is not None:
        both = SRC_ROLES if set(roles) <= set(SRC_ROLES) else DST_ROLES
        lines = [np.append(line, address_tokens(both, inside)) for line in lines]
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    with model.autocast():
        read = read_beginnings(model.gpt, lines, [len(line) for line in before])
    search = AddressSearch(model.gpt, read, log_weights, roles, inside, limit=expansions)
    return variants, search


def _likeliest(search: AddressSearch, top: int, column: str) -> FoundAddresses:
    found = list(islice(search, top))
    proven = len(found) == top or not search.bound
    found += [] if proven else search.unproven(top - len(found))
    probability = np.array([address.probability for address in found])
    addresses = pa.array([str(address.end) for address in found], pa.string())
    table = pa.table({column: addresses, "probability": probability})
    return FoundAddresses(table, min(float(probability.sum()), 1.0), search.bound, proven, search.expansions)


def _likeliest_within(
    model: PingModel,
    search: AddressSearch,
    variants: Sequence[Query],
    rtt_max: float,
    top: int,
    query: Query,
    inside: Endpoint | None,
    src_known: SrcKnown,
) -> FoundAddresses:
    """Those of P(dst | src, RTT ≤ rtt_max); `query` and `inside` say what is told of all destinations together."""
    met: list[Found] = []
    columns = np.zeros((0, 3))  # P(dst | src), P(RTT ≤ rtt_max | src, dst), median ms
    more = True
    while more:
        some = list(islice(search, max(1, _LAWS_AT_ONCE // len(variants))))
        more = bool(some) and len(met) + len(some) < MOST_LAWS
        some = some or search.unproven(max(top - len(met), 0))
        met += some
        columns = np.concatenate([columns, _within(model, some, variants, rtt_max)]) if some else columns
        joint = columns[:, 0] * columns[:, 1]
        proven = not search.bound or (len(joint) >= top and bool(np.partition(joint, -top)[-top] >= search.bound))
        more = more and not proven
    told, within = columns[:, 0], columns[:, 1]
    asked = dataclasses.replace(query, dst=inside if inside is not None and inside.told_bits else None)
    law = model.rtt_many([asked], src_known)[0]
    of_all = law.cdf(rtt_max) * (1 - law.p_fail) if law.p_fail < 1 else 0.0
    total = float(np.clip(of_all, joint.sum(), joint.sum() + max(1 - told.sum(), 0.0)))  # what was found bounds it
    if not total > 0:
        raise ValueError(f"the model gives no chance to an RTT within rtt_max={rtt_max} ms; give more")
    order = np.argsort(-joint, kind="stable")
    best, rest = order[:top], order[top:]
    table = pa.table(
        {
            "dst_addr": [str(met[i].end) for i in best],
            "probability": joint[best] / total,
            "p_within": within[best],
            "median_ms": pa.array(columns[best, 2], from_pandas=True),
        }
    )
    bound = max([search.bound, *joint[rest[:1]]]) / total
    return FoundAddresses(table, float(joint[best].sum() / total), bound, proven, search.expansions, total)


def _within(model: PingModel, found: Sequence[Found], variants: Sequence[Query], rtt_max: float) -> np.ndarray:
    """P(dst | src), P(RTT ≤ rtt_max | src, dst) and the median in ms (NaN if none) of n addresses, (n, 3)."""
    queries = [dataclasses.replace(variant, dst=address.end) for address in found for variant in variants]
    told = np.exp(np.stack([address.log_p for address in found]))  # (n, M)
    probability = told.sum(axis=1)
    laws = RTTDistributions.concatenate(list(model.laws(queries, "all"))).mixture(told / probability[:, None])
    return np.stack([probability, np.nan_to_num(laws.cdf(rtt_max) * laws.p_answer), laws.median], axis=1)
