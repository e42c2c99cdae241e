"""Distributions, rankings, addresses and scores in, what `--json` prints of them out; the service answers the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Focus, Reader
from ping_llm.inference.evidence import recalled
from ping_llm.inference.files import as_arrow, rows_json
from ping_llm.inference.mixture import distributions
from ping_llm.inference.plots import log_density
from ping_llm.inference.query import Query, SrcKnown

if TYPE_CHECKING:
    from ping_llm.inference.context import Records
    from ping_llm.inference.destinations import FoundAddresses
    from ping_llm.inference.model import PingModel
    from ping_llm.inference.rank import Ranking


def statistics(
    reader: Reader, queries: Sequence[Query], src_known: SrcKnown, levels: Sequence[float]
) -> Iterator[RTTDistribution]:
    """The distributions of the queries' results, in order, of which only P(answer), mean and the quantiles at `levels` are
    wanted, as `batch` computes them: some times faster than `rtt_many` of a list, see `unresolved`."""
    given = recalled(reader.memory, queries, reader.seq_len)
    for some in distributions(reader, given, src_known, Focus(np.array(levels))):
        yield from some


def rtt_answer(
    found: RTTDistribution, context_given: int, levels: Sequence[float] | None = None, density: bool = False
) -> dict[str, Any]:
    """Of one ping: what `to_dict` says, and how many measurements its context had.

    With `levels` (shares of the answers, 0 to 1) the quantiles are those. With `density`, that per log-ms at up to 80 RTTs
    in ms, null where a ping fails with certainty.
    """
    answer = found.to_dict() | {"context_given": context_given}
    answered = found.p_answer > 0
    if levels is not None:
        rtt_ms = found.quantile(np.array(levels)).tolist() if answered else [None] * len(levels)
        answer["quantiles"] = {f"{level:.10g}": value for level, value in zip(levels, rtt_ms, strict=True)}
    if density:
        columns = zip(("rtt_ms", "per_log_ms"), log_density(found), strict=True) if answered else ()
        answer["density"] = {name: column.tolist() for name, column in columns} or None
    return answer


def ranking_totals(ranking: Ranking) -> dict[str, Any]:
    """What `rank --json` says beside the rows."""
    return {"p_none": ranking.p_none}


def search_totals(found: FoundAddresses) -> dict[str, Any]:
    """What `dst --json` says beside the rows."""
    totals = {"covered": found.covered, "bound": found.bound, "proven": found.proven}
    return totals if found.p_within is None else totals | {"p_within": found.p_within}


def score_totals(scored: pa.Table) -> dict[str, Any]:
    """What `score --json` says beside the rows, of a table of `PingModel.score`."""
    totals = {"measurements": scored.num_rows, "mean_nll_nats": pc.mean(scored.column("nll_nats")).as_py()}
    if "anomaly" in scored.column_names:
        totals["anomalies"] = pc.sum(scored.column("anomaly")).as_py() or 0
    return totals


def most_surprising(
    model: PingModel, scored: pa.Table, top: int, history: int, src_known: SrcKnown, *, one_host: bool = False
) -> Records:
    """The `top` most surprising rows of a table of `PingModel.score`, with what was expected there."""
    likeliest_last = pc.sort_indices(scored, [("p_value", "ascending"), ("nll_nats", "descending")])
    return model.expected(scored, likeliest_last.slice(0, top), history, src_known, one_host=one_host)


def rank_json(ranking: Ranking) -> dict[str, Any]:
    """What `rank --json` prints."""
    return rows_json(ranking.table, **ranking_totals(ranking))


def destinations_json(found: FoundAddresses) -> dict[str, Any]:
    """What `dst --json` prints."""
    return rows_json(found.table, **search_totals(found))


def score_json(
    model: PingModel,
    measurements: Records,
    history: int,
    src_known: SrcKnown,
    anomaly_at: float | None,
    top: int,
    *,
    one_host: bool = False,
) -> dict[str, Any]:
    """What `score --json` prints."""
    scored = as_arrow(model.score(measurements, history, src_known, anomaly_at, one_host=one_host, quiet=True))
    listed = most_surprising(model, scored, top, history, src_known, one_host=one_host)
    return rows_json(listed, **score_totals(scored))
