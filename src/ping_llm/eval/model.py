"""A trained model and queries in, its scores out; and the true law of a synthetic Internet as one more predictor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.data.measurement import format_address
from ping_llm.eval.baselines.base import Prediction
from ping_llm.eval.columns import Queries, QueryView
from ping_llm.eval.law import SUPPORT, QuantileLaws
from ping_llm.eval.metrics import LEAST_P_FAIL, QUANTILE_LEVELS, Scores

if TYPE_CHECKING:
    from ping_llm.data.synthetic.truth import Truth
    from ping_llm.inference.model import PingModel
    from ping_llm.inference.query import Query

SRC_KNOWN = ("auto", "all", "none")
TRUE_LAW = "true law"
LARGEST_NLL = 100.0
"""Nats; a result that a model holds for impossible costs no more, so that a mean stays finite."""

_TRUE_LEVELS = np.r_[0, 10.0 ** np.arange(-7, -2), np.linspace(0.005, 0.995, 397), 1 - 10.0 ** np.arange(-3, -8, -1), 1]


def method_name(src_known: str) -> str:
    """What a report calls the model, told so much of the source."""
    return f"ping-llm, source {src_known}"


@dataclass(frozen=True)
class ModelMethod:
    """The model, told the source as `src_known` says."""

    model: PingModel
    src_known: str

    @property
    def name(self) -> str:
        """As in the report."""
        return method_name(self.src_known)

    def scores(
        self, queries: Queries, rng: np.random.Generator, advance: Callable[[float], None] = lambda n: None
    ) -> Scores:
        """The scores of q queries. The PIT is randomised within a code: RTTs are reported in steps."""
        table, rtt_ms = queries.measurements, queries.rtt_ms.astype(np.float64)
        order = np.lexsort((table.time_s[queries.rows], queries.probe))  # neighbours share their context
        columns = {name: np.empty(len(queries)) for name in ("p_fail", "nll_nats", "crps_log", "pit")}
        quantiles_ms, done = np.empty((len(queries), len(QUANTILE_LEVELS))), 0
        for laws in self.model.distributions(model_queries(queries.take(order)), self.src_known):
            rows = order[done : done + len(laws)]
            with np.errstate(invalid="ignore"):
                columns["nll_nats"][rows] = np.minimum(-laws.log_density(rtt_ms[rows]), LARGEST_NLL)
            columns["crps_log"][rows], columns["pit"][rows] = laws.crps(rtt_ms[rows]), laws.pit(rtt_ms[rows], rng)
            columns["p_fail"][rows] = laws.p_fail
            quantiles_ms[rows] = laws.quantile(np.array(QUANTILE_LEVELS))
            done += len(laws)
            advance(len(laws))
        failed = rtt_ms < 0
        columns["nll_nats"][failed] = -np.log(np.maximum(columns["p_fail"][failed], LEAST_P_FAIL))
        return Scores(queries.rtt_ms, quantiles_ms=quantiles_ms, **columns)


def model_queries(queries: Queries) -> list[Query]:
    """The queries as the model is asked them: both addresses and the time told, the context in time order."""
    from ping_llm.inference.context import Context
    from ping_llm.inference.query import Endpoint, Query

    table, asked = queries.measurements, []

    def end(place: int) -> Endpoint:
        return Endpoint.whole(table.addresses[place].tobytes())

    for row, context in zip(queries.rows, queries.context, strict=True):
        told = context[context >= 0][::-1]
        columns = (table.addresses[table.src_id[told]], table.addresses[table.dst_id[told]])
        # A probe may have had several addresses: what is told of it all counts as its context.
        told = Context(*columns, table.rtt_ms[told].astype(np.float64), table.time_s[told] if len(told) else None)
        asked.append(Query(end(table.src_id[row]), end(table.dst_id[row]), int(table.time_s[row]), told))
    return asked


@dataclass(frozen=True)
class TrueLaw:
    """The law that the pings of a synthetic Internet were drawn from: no predictor can beat it but by chance."""

    truth: Truth
    name: str = TRUE_LAW

    @property
    def choices(self) -> dict[str, Any]:
        """Nothing was chosen."""
        return {}

    def predict(self, view: QueryView) -> Prediction:
        """Its quantiles, so fine that nothing depends on them; ValueError names an address of no network."""
        from ping_llm.data.synthetic.truth import shifted_log_logistic

        texts = {place: format_address(view.addresses[place].tobytes()) for place in {*view.src_id, *view.dst_id}}
        paths = self.truth.paths([texts[i] for i in view.src_id], [texts[i] for i in view.dst_id])
        p_fail, *law = paths.at(view.time_s.astype(np.float64))
        inner = np.log(shifted_log_logistic(_TRUE_LEVELS[1:-1], *(column[:, None] for column in law)))
        ends = np.ones((len(view), 1))
        return Prediction(
            QuantileLaws(np.concatenate([SUPPORT[0] * ends, inner, SUPPORT[1] * ends], 1), _TRUE_LEVELS), p_fail
        )
