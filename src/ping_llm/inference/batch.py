"""A table of queries and one of earlier measurements in, a table of answers out, row for row.

A row that cannot be answered says why in the column `error`, and the others are answered. Queries are answered some at a
time, ordered so that those of one source and one context stand together; of their distributions only statistics are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from ping_llm.data.in_memory import extended, held
from ping_llm.data.measurement import FAILED_RTT_MS
from ping_llm.data.text_table import table_of
from ping_llm.inference.context import Records
from ping_llm.inference.distribution import QUANTILES, RTTDistribution
from ping_llm.inference.engine import Focus, Reader
from ping_llm.inference.evidence import recalled
from ping_llm.inference.mixture import CHUNK, distributions
from ping_llm.inference.prompt import LEAST_TOKENS
from ping_llm.inference.query import Endpoint, SrcKnown, known_lengths
from ping_llm.inference.table import ContextTable, QueryTable

ANSWER_COLUMNS = ("p_fail", "mean_ms", *(f"q{q:g}" for q in QUANTILES))
SCORE_COLUMNS = ("nll_nats", "crps_log", "pit")

log = logging.getLogger(__name__)


def answer_table(
    reader: Reader,
    queries: Records,
    context: Records | None = None,
    src_known: SrcKnown = "auto",
    advance: Callable[[float], None] = lambda rows: None,
    *,
    one_host: bool = False,
    any_source: bool = False,
) -> Records:
    """The distribution of the result of each query, in the order of the queries: a table of the kind that was given.

    `queries` has the columns src_addr and dst_addr (an address, a prefix, or null for any), optionally query_id,
    event_time, and rtt (ms, −1 = failed), by which the answer is scored. `context` has src_addr, dst_addr, rtt and,
    optionally, event_time and query_id: a row with a query_id is context of that query, and one without is context of
    every query of its source, if it is from an earlier second. With `one_host` all sources of the context are addresses of
    one host, with `any_source` they may be other hosts: then a row without a query_id is context of every later query that
    names a source. A memory of the reader adds to contexts that are short. A query_id is any text, and
    compared as it is written (for numbers see data.as_text). Columns out: query_id as it was given (the number of the row,
    if none was), ANSWER_COLUMNS; SCORE_COLUMNS, if there is an rtt; and error, if some row is bad. `advance` is called with
    rows done.
    """
    queries = held(queries)
    given = table_of(queries)
    table = QueryTable.parse(given)
    known_lengths(src_known, Endpoint.parse("::1"))  # what is invalid for every source is not the error of a row
    named = "query_id" in given.names
    measured = None if context is None else table_of(held(context))
    if measured is not None and not measured.num_rows:
        log.warning("the context has no rows: it is a context of nothing")
        measured = None
    contexts = (
        None if measured is None else ContextTable.parse(measured, table.rows if named else (), one_host, any_source)
    )
    most = reader.seq_len // LEAST_TOKENS + 1
    columns = np.full((len(table.rows), len(ANSWER_COLUMNS) + len(SCORE_COLUMNS)), np.nan)
    order, used = table.order(), contexts is None
    for first in range(0, len(order), CHUNK):
        rows = order[first : first + CHUNK]
        valid, distinct, place = table.distinct(rows, contexts, most, src_known)
        used |= any(len(query.context) for query in distinct)
        distinct = recalled(reader.memory, distinct, reader.seq_len)
        done = 0
        focus = Focus.on(np.array(QUANTILES), len(distinct), place, table.rtt_ms[valid])
        for found in distributions(reader, distinct, src_known, focus):
            here = (place >= done) & (place < done + len(found))
            which = valid[here]
            columns[which] = _statistics(found, place[here] - done, table.rtt_ms[which])
            done += len(found)
        advance(len(rows))
    if not used:
        log.warning("no query is of a source of the context, at a later time; the context was not used")
    answers = {} if named else {"query_id": pa.array(np.arange(len(table.rows)))}
    names = ANSWER_COLUMNS + (SCORE_COLUMNS if "rtt" in given.names else ())
    answers |= {
        name: pa.array(values, from_pandas=True) for name, values in zip(names, columns.T, strict=False)
    }  # NaN is null
    if table.errors:
        answers["error"] = pa.array([table.errors.get(row) for row in range(len(table.rows))], pa.string())
    return extended(queries, ["query_id"] if named else [], pa.table(answers))


def _statistics(found: RTTDistribution, which: np.ndarray, rtt_ms: np.ndarray) -> np.ndarray:
    """ANSWER_COLUMNS and SCORE_COLUMNS of the distributions at `which` (b,) with the observed `rtt_ms` (b,), NaN = none;
    (b, 12)."""
    answers = np.column_stack([found.p_fail, found.mean, found.quantile(np.array(QUANTILES))])[which]
    given = ~np.isnan(rtt_ms)
    scores = np.full((len(which), len(SCORE_COLUMNS)), np.nan)
    if given.any():
        own = found if np.array_equal(which, np.arange(len(found))) else found[which]  # a copy only where some repeat
        observed = np.where(given, rtt_ms, FAILED_RTT_MS)
        scores = np.column_stack([-own.log_density(observed), own.crps(observed), own.pit(observed)])
        scores[~given] = np.nan
    return np.column_stack([answers, scores])
