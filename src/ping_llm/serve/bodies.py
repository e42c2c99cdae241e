"""Bodies of requests in, checked queries and options out; what is wrong is one line, as on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from ping_llm.inference.context import Context
from ping_llm.inference.query import Endpoint, Query, SrcKnown
from ping_llm.serve.limits import Limits

SRC, DST, NEAR = "192.0.2.1", "198.51.100.7", "203.0.113.9"
EARLIER = [{"src_addr": SRC, "dst_addr": NEAR, "rtt": 12.5, "event_time": "2026-01-31T11:58:00Z"}]
MOST_CANDIDATES = 64
_EITHER = ("str", "int", "float")  # as pydantic names the kinds of which a value may be any
Time: TypeAlias = StrictStr | StrictInt | StrictFloat | None
Known: TypeAlias = StrictStr | StrictInt
Level: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class TooLarge(ValueError):
    """A request that is more than is taken; its text says of what."""


class Body(BaseModel):
    """An object of JSON, whose fields all have a meaning."""

    model_config = ConfigDict(extra="forbid")


class Situation(Body):
    """What is known beside source and destination of a ping."""

    at: Time = Field(
        None,
        description="Time of the ping: ISO 8601 (UTC if it names no zone) or Unix seconds. If absent, any time, and those "
        "of the context are left out.",
    )
    context: list[dict[str, Any]] | None = Field(
        None,
        description="Earlier measurements of the source: src_addr, dst_addr, rtt (ms, −1 = failed) and, if wanted, "
        "event_time. Earlier is from a second before `at`.",
    )
    one_host: StrictBool = Field(False, description="All sources of the context are addresses of one host.")
    any_source: StrictBool = Field(False, description="The context may hold pings of other hosts, as evidence.")


class Ping(Situation):
    """A ping whose result is wanted."""

    src: StrictStr | None = Field(None, description="Address, or a prefix such as 192.0.2.0/24; any if absent.")
    dst: StrictStr | None = Field(None, description="Likewise.")
    quantiles: list[Level] | None = Field(None, description="Shares of the answers whose quantiles are wanted.")
    density: StrictBool = Field(
        False, description="Also the density per log-ms, given an answer, at up to 80 RTTs: rtt_ms, per_log_ms."
    )


class RttBody(Ping):
    """A ping, or several `queries`: what stands beside them holds for each that does not say otherwise."""

    queries: list[Ping] | None = Field(None, min_length=1, description="Pings, each like this object.")
    src_known: Known = Field(
        "auto",
        description="How much of the source is known: all, none, a prefix length, or auto: several, weighted by how well "
        "each explains the context.",
    )
    quick: StrictBool = Field(
        False,
        description="Answer as `batch` does, some times faster: RTTs that hardly change P(answer), mean and the wanted "
        "quantiles are computed to 9 % only; unresolved_probability says how much that is.",
    )

    def pings(self) -> list[Ping]:
        """What is asked for, in order, each with all of its fields."""
        if self.queries is None:
            return [self]
        shared = {name: getattr(self, name) for name in Ping.model_fields}
        own = [{name: getattr(one, name) for name in one.model_fields_set} for one in self.queries]
        return [Ping.model_construct(**(shared | fields)) for fields in own]


class RankBody(Situation):
    """Candidates, of which the nearest is wanted."""

    src: StrictStr = Field(description="Address, or a prefix.")
    dst: list[StrictStr] = Field(description=f"The candidates, up to {MOST_CANDIDATES}.")
    src_known: Known = "auto"


class DestinationsBody(Situation):
    """A source whose likeliest destinations are wanted."""

    src: StrictStr = Field(description="Address, or a prefix.")
    rtt: float | None = Field(None, description="ms that the ping took.")
    rtt_max: float | None = Field(None, description="ms that the ping took at most.")
    prefix: StrictStr | None = Field(None, description="Only destinations in it.")
    top: Annotated[int, Field(ge=1, le=100)] = 10
    src_known: Known = "auto"


class MapBody(Situation):
    """A source from which a part of the IPv4 space is seen."""

    src: StrictStr = Field(description="Address, or a prefix.")
    within: StrictStr = Field("0.0.0.0/0", description="IPv4 prefix of 0, 8 or 16 bits, whose parts are wanted.")
    first: Annotated[int, Field(ge=0, le=255)] = Field(0, description="The byte of the first part.")
    count: Annotated[int, Field(ge=1, le=256)] = Field(256, description="Parts, from the first on, at most.")
    src_known: Known = "auto"


class AnomaliesBody(Body):
    """Measurements of the service's rows of which it is wanted how surprising each is."""

    part: StrictStr = Field(description="Of the rows, as GET /v1/rows names it.")
    row: Annotated[int, Field(ge=0)] = Field(description="Of the part.")
    first: Annotated[int, Field(ge=0)] = Field(0, description="Place of the first measurement in the row.")
    count: Annotated[int, Field(ge=1, le=512)] = Field(128, description="Measurements from there on, at most.")
    at: Annotated[float, Field(gt=0, lt=1)] = Field(0.001, description="Those whose p-value is at most this are told.")


class ScoreBody(Body):
    """Measurements of which it is wanted how surprising each is."""

    measurements: list[dict[str, Any]] = Field(
        description="Rows of src_addr, dst_addr, rtt (ms, −1 = failed), and event_time."
    )
    history: Annotated[int, Field(ge=0, le=1000)] = Field(
        8, description="Measurements of the same source, from earlier seconds, that are the context of each, at least."
    )
    anomaly_at: float | None = Field(None, description="Mark those whose p-value is at most this.")
    src_known: Known = "auto"
    one_host: StrictBool = False
    top: Annotated[int, Field(ge=1)] = Field(10, description="So many of the most surprising are listed.")


def queries_of(pings: Sequence[Ping], limits: Limits) -> list[Query]:
    """The queries; those that share a context share one object. ValueError names the one that is wrong, if there are
    several."""
    if len(pings) > limits.queries:
        raise TooLarge(f"{len(pings):,} queries in a request, at most {limits.queries:,} are taken; send several")
    contexts: dict[tuple[int, bool, bool], Context] = {}
    found = []
    check_rows({id(one.context): one.context for one in pings}.values(), limits)
    for place, ping in enumerate(pings):
        try:
            key = (id(ping.context), ping.one_host, ping.any_source)
            if key not in contexts:
                contexts[key] = Context.parse(ping.context, ping.one_host, ping.any_source)
            found.append(Query.parse(ping.src, ping.dst, ping.at, contexts[key]))
            if len(ping.quantiles or ()) > limits.quantiles:
                raise TooLarge(f"{len(ping.quantiles or ()):,} quantiles, at most {limits.quantiles:,} are given")
        except ValueError as error:
            if len(pings) == 1:
                raise
            kind = TooLarge if isinstance(error, TooLarge) else ValueError
            raise kind(f"query {place + 1}: {error}") from None
    check_cost(cost_of(found), limits)
    return found


def check_rows(tables: Any, limits: Limits) -> None:
    """TooLarge if they have too many rows together; None has none."""
    rows = sum(len(table) for table in tables if table is not None)
    if rows > limits.measurements:
        raise TooLarge(f"{rows:,} rows in a request, at most {limits.measurements:,} are taken; leave out the oldest")


def check_cost(cost: int, limits: Limits) -> None:
    """TooLarge if prefixes stand for too many."""
    if cost > limits.queries:
        raise TooLarge(
            f"prefixes that end within a byte stand for {cost:,} of whole bytes, at most {limits.queries:,} are taken; "
            "give longer ones, or prefixes of whole bytes"
        )


def cost_of(queries: Sequence[Query]) -> int:
    """Queries of whole bytes that these are answered by, for one known length of the source."""
    return sum(parts_of(query.src) * parts_of(query.dst) for query in queries)


def parts_of(end: Endpoint | None) -> int:
    """Prefixes one byte longer that a prefix stands for, if it ends within a byte."""
    return len(end.next_bytes) if end is not None and end.extra_bits else 1


def known_of(src_known: SrcKnown) -> SrcKnown:
    """One spelling of each, so that 24 and "24" go together."""
    return str(src_known)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as a table of JSON is read from a file."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def one_line(errors: Sequence[Mapping[str, Any]], route: str) -> str:
    """The first of pydantic's errors in a body of a route as one line."""
    fields = list(BODIES[route].model_fields) if route in BODIES else []
    error = errors[0]
    place = [
        str(part + 1) if isinstance(part, int) else part
        for part in error["loc"]
        if part not in ("body", "query", *_EITHER)
    ]
    kind, name = error["type"], " ".join(place)
    if kind == "json_invalid":
        return f"the body is no JSON ({error['ctx']['error']} at character {error['loc'][-1]})"
    if kind == "extra_forbidden":
        if len(place) > 1:  # of one of the queries
            name, fields = f"{place[-1]} in {' '.join(place[:-1])}", list(Ping.model_fields)
        near = difflib.get_close_matches(place[-1], fields, 1)
        return f"no field {name!r}" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(fields)}")
    if not name:
        return "the body must be an object of JSON; send it with Content-Type: application/json"
    if kind == "missing":
        return f"{name} is missing"
    message = "input should be text or a number" if error["loc"][-1] in _EITHER else error["msg"]
    return f"{name}: {message[:1].lower()}{message[1:]}"


BODIES: dict[str, type[Body]] = {
    "rtt": RttBody,
    "rank": RankBody,
    "score": ScoreBody,
    "destinations": DestinationsBody,
    "map": MapBody,
    "anomalies": AnomaliesBody,
}
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "rtt": {
        "a ping": {"src": SRC, "dst": DST, "at": "2026-01-31T12:00:00Z", "context": EARLIER},
        "several": {"src": SRC, "queries": [{"dst": DST}, {"dst": NEAR, "density": True}]},
    },
    "rank": {"two candidates": {"src": SRC, "dst": [DST, NEAR]}},
    "destinations": {"in a prefix": {"src": SRC, "prefix": "198.51.100.0/24", "top": 3}},
    "map": {"the /16 of a /8": {"src": SRC, "within": "198.0.0.0/8", "first": 48, "count": 8}},
    "score": {
        "two pings": {
            "measurements": [*EARLIER, EARLIER[0] | {"rtt": 250.0, "event_time": "2026-01-31T12:02:00Z"}],
            "anomaly_at": 0.01,
        }
    },
}
"""By route and name."""
