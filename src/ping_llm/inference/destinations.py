"""A ping without one of its addresses in, the likeliest addresses out: exact, found by best-first search.

P(dst | src, RTT = x) puts the RTT before the destination, and the search gives the posterior itself. For RTT ≤ x the
destination comes first, as in a query for the RTT: P(dst | src) · P(RTT ≤ x | src, dst), whose first factor bounds the
product, so that the likeliest are proven once no address that is left could reach them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from ping_llm.data.times import parse_time
from ping_llm.data.tokenization import rtt_code_edges_ms
from ping_llm.inference.context import Context, Records
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader, read_beginnings
from ping_llm.inference.mixture import distributions, whole_byte_queries
from ping_llm.inference.prompt import DST_ROLES, SRC_ROLES, address_tokens, opening
from ping_llm.inference.query import Endpoint, Query, SrcKnown, Time
from ping_llm.inference.search import EXPANSIONS, AddressSearch, Found

FAMILIES = ("ipv4", "ipv6")
MOST_WITHIN = 1000  # addresses whose RTT distribution is computed, at most, to find those of RTT ≤ x
_AT_ONCE = 64


@dataclass(frozen=True)
class FoundAddresses:
    """The likeliest addresses, the likeliest first.

    `table` has the columns dst_addr, or src_addr, and probability; for RTT ≤ x also p_within, P(RTT ≤ x | src,
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


def destinations(
    reader: Reader,
    src: str,
    rtt: float | None = None,
    rtt_max: float | None = None,
    at: Time = None,
    context: Records | None = None,
    prefix: str | None = None,
    families: Sequence[str] = FAMILIES,
    top: int = 10,
    src_known: SrcKnown = "auto",
    expansions: int = EXPANSIONS,
    *,
    one_host: bool = False,
    any_source: bool = False,
) -> FoundAddresses:
    """The `top` likeliest destinations of pings from `src`: P(dst | src), or given an RTT of `rtt` or within `rtt_max` ms.

    With `prefix` only those in it, with their probabilities within it. After so many `expansions` of prefixes the
    answer is what was found, and not proven. `at`, `context`, `src_known`, `one_host` and `any_source`: see `PingModel.rtt`.
    """
    _check_numbers(rtt, rtt_max, top, expansions)
    if not src:
        raise ValueError("give the source whose destinations are wanted, an address or a prefix")
    families = (families,) if isinstance(families, str) else tuple(families)
    if not families or not set(families) <= set(FAMILIES):
        raise ValueError(f"families={families} must be one or both of {', '.join(FAMILIES)}")
    inside = None if prefix is None else Endpoint.parse(prefix)
    if inside is not None and inside.family not in families:
        raise ValueError(
            f"no address of {', '.join(families)} lies in {prefix}; leave out families, or add {inside.family}"
        )
    roles = [role for family, role in zip(FAMILIES, DST_ROLES, strict=True) if family in families]
    query = Query.parse(src, None, at, Context.parse(context, one_host, any_source))
    variants, search = _search(reader, query, rtt, inside, roles, src_known, expansions)
    if rtt_max is None:
        return _likeliest(search, top, "dst_addr")
    return _likeliest_within(reader, search, variants, rtt_max, top, query, inside, src_known)


def complete(
    reader: Reader,
    prefix: str,
    role: str = "dst",
    src: str | None = None,
    dst: str | None = None,
    rtt: float | None = None,
    at: Time = None,
    context: Records | None = None,
    top: int = 10,
    src_known: SrcKnown = "auto",
    expansions: int = EXPANSIONS,
    *,
    one_host: bool = False,
    any_source: bool = False,
) -> FoundAddresses:
    """The `top` likeliest whole addresses of a partial one, and the probability of each within it.

    `role` says which address of a ping it is, dst or src; the other address, the RTT (ms) and the time may be given,
    and `context`, `src_known`, `one_host` and `any_source`: see `PingModel.rtt`.
    """
    _check_numbers(rtt, None, top, expansions)
    if role not in ("dst", "src"):
        raise ValueError(f"role={role!r} must be dst or src, the address of the ping that is completed")
    if (dst if role == "dst" else src) is not None:
        raise ValueError(f"{prefix!r} is the {role} that is completed; give the other one only")
    roles = DST_ROLES if role == "dst" else SRC_ROLES
    inside = Endpoint.parse(prefix)
    if not inside.is_prefix:
        raise ValueError(f"{prefix!r} is a whole address; give a prefix like {prefix}/{4 * inside.width}")
    if src is None and dst is None:
        if context is not None and len(context):
            raise ValueError("a context is of one source; give that source")
        query = Query(None, None, None if at is None else parse_time(at), Context.parse(None))
    else:
        query = Query.parse(src, dst, at, Context.parse(context, one_host, any_source))
    _, search = _search(reader, query, rtt, inside, roles, src_known, expansions)
    return _likeliest(search, top, f"{role}_addr")


def _check_numbers(rtt: float | None, rtt_max: float | None, top: int, expansions: int) -> None:
    if rtt is not None and rtt_max is not None:
        raise ValueError("give rtt, the RTT in ms, or rtt_max, its bound, not both")
    for name, value in (("rtt", rtt), ("rtt_max", rtt_max)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number of ms from 0 up")
    least_ms = rtt_code_edges_ms()[0]
    if rtt_max is not None and rtt_max <= least_ms:
        raise ValueError(f"rtt_max={rtt_max}: the model knows no RTT below {least_ms:.4f} ms; give more")
    for name, value in (("top", top), ("expansions", expansions)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _search(
    reader: Reader,
    query: Query,
    rtt_ms: float | None,
    inside: Endpoint | None,
    roles: Sequence[int],
    src_known: SrcKnown,
    expansions: int,
) -> tuple[list[Query], AddressSearch]:
    """The M queries that are mixed, and the search for the address that they lack, by its `roles`."""
    variants, weights, _ = whole_byte_queries(reader, query, src_known)
    given = [len(opening(variant, reader.seq_len)) for variant in variants]
    lines = [opening(variant, reader.seq_len, rtt_ms) for variant in variants]
    if inside is not None:
        both = SRC_ROLES if set(roles) <= set(SRC_ROLES) else DST_ROLES
        lines = [np.append(line, address_tokens(both, inside)) for line in lines]
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    read = read_beginnings(reader, lines, given)
    return variants, AddressSearch(reader, read, log_weights, roles, inside, limit=expansions)


def _likeliest(search: AddressSearch, top: int, column: str) -> FoundAddresses:
    found = list(islice(search, top))
    proven = len(found) == top or not search.bound
    found += [] if proven else search.unproven(top - len(found))
    probability = np.array([address.probability for address in found])
    addresses = pa.array([str(address.end) for address in found], pa.string())
    table = pa.table({column: addresses, "probability": probability})
    return FoundAddresses(table, min(float(probability.sum()), 1.0), search.bound, proven, search.expansions)


def _likeliest_within(
    reader: Reader,
    search: AddressSearch,
    variants: Sequence[Query],
    rtt_max: float,
    top: int,
    query: Query,
    inside: Endpoint | None,
    src_known: SrcKnown,
) -> FoundAddresses:
    """Those of P(dst | src, RTT ≤ rtt_max); `query` and `inside` say what all destinations have in common."""
    met: list[Found] = []
    columns = np.zeros((0, 3))  # P(dst | src), P(RTT ≤ rtt_max | src, dst), median ms (NaN if none)
    more = True
    while more:
        some = list(islice(search, max(1, _AT_ONCE // len(variants))))
        more = bool(some) and len(met) + len(some) < MOST_WITHIN
        some = some or search.unproven(max(top - len(met), 0))
        met += some
        if some:
            weights = np.exp(np.stack([address.log_p for address in some]))  # (n, M)
            probability = weights.sum(axis=1)
            queries = [dataclasses.replace(variant, dst=address.end) for address in some for variant in variants]
            each = RTTDistribution.concatenate(list(distributions(reader, queries, "all")))
            owner = np.repeat(np.arange(len(some)), len(variants))
            mixed = each.mixture((weights / probability[:, None]).ravel(), owner)
            within = np.nan_to_num(mixed.cdf(rtt_max) * mixed.p_answer)
            columns = np.concatenate([columns, np.stack([probability, within, mixed.median], axis=1)])
        joint = columns[:, 0] * columns[:, 1]
        proven = not search.bound or (len(joint) >= top and bool(np.partition(joint, -top)[-top] >= search.bound))
        more = more and not proven
    of_dst, within = columns[:, 0], columns[:, 1]
    together = dataclasses.replace(query, dst=inside if inside is not None and inside.known_bits else None)
    whole = next(distributions(reader, [together], src_known))[0]
    of_all = whole.cdf(rtt_max) * (1 - whole.p_fail) if whole.p_fail < 1 else 0.0
    total = float(np.clip(of_all, joint.sum(), joint.sum() + max(1 - of_dst.sum(), 0.0)))  # what was found bounds it
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
