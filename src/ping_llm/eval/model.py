"""A trained model and queries in, its scores out; the true distribution of a synthetic Internet is one more predictor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ping_llm.data.measurement import format_address, is_ipv4
from ping_llm.data.synthetic.truth import Truth, shifted_log_logistic
from ping_llm.eval.baselines.base import Prediction
from ping_llm.eval.columns import Measurements, Queries, QueryView
from ping_llm.eval.distribution import LEAST_CHANCE, QuantileDistributions, between_ends
from ping_llm.eval.metrics import QUANTILE_LEVELS, Scores
from ping_llm.eval.options import EvalOptions, PartOptions
from ping_llm.eval.queries import SplitQueries
from ping_llm.inference.context import Context
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Endpoint, Query

TRUE_DISTRIBUTION = "true distribution"
LARGEST_NLL = 100.0
"""Nats; a result that a model holds for impossible costs no more, so that a mean stays finite."""

LEAST_MASS = 1e-5
"""Of a value of byte 1 that is looked into: scores do not feel the rest, and the model answers faster."""

_TRUE_LEVELS = np.r_[0, 10.0 ** np.arange(-7, -2), np.linspace(0.005, 0.995, 397), 1 - 10.0 ** np.arange(-3, -8, -1), 1]


@dataclass(frozen=True)
class ModelMethod:
    """The model, given as much of the source as `src_known` says."""

    model: PingModel
    src_known: str

    @classmethod
    def load(cls, options: EvalOptions) -> list[ModelMethod]:
        """The model of the run under each of `src_known`."""
        model = PingModel.load(options.trained, options.device, options.precision)
        return [cls(replace(model, least_mass=LEAST_MASS), known) for known in options.src_known]

    @property
    def name(self) -> str:
        """As in the report."""
        return f"ping-llm, source {self.src_known}"

    def scores(
        self, queries: Queries, rng: np.random.Generator, advance: Callable[[float], None] = lambda n: None
    ) -> Scores:
        """The scores of q queries. The PIT is randomised within a code: RTTs are reported in steps."""
        table, rtt_ms = queries.measurements, queries.rtt_ms.astype(np.float64)
        order = np.lexsort((table.time_s[queries.rows], queries.probe))  # neighbours share their context
        columns = {name: np.empty(len(queries)) for name in ("p_fail", "nll_nats", "crps_log", "pit")}
        quantiles_ms, done = np.empty((len(queries), len(QUANTILE_LEVELS))), 0
        for found in self.model.distributions(model_queries(queries.take(order)), self.src_known):
            rows = order[done : done + len(found)]
            with np.errstate(invalid="ignore"):
                columns["nll_nats"][rows] = np.minimum(-found.log_density(rtt_ms[rows]), LARGEST_NLL)
            columns["crps_log"][rows], columns["pit"][rows] = found.crps(rtt_ms[rows]), found.pit(rtt_ms[rows], rng)
            columns["p_fail"][rows] = found.p_fail
            quantiles_ms[rows] = found.quantile(np.array(QUANTILE_LEVELS))
            done += len(found)
            advance(len(found))
        failed = rtt_ms < 0
        columns["nll_nats"][failed] = -np.log(np.maximum(columns["p_fail"][failed], LEAST_CHANCE))
        return Scores(queries.rtt_ms, quantiles_ms=quantiles_ms, **columns)


def model_queries(queries: Queries) -> list[Query]:
    """The queries as the model takes them: both addresses and the time given, the context in time order."""
    table, taken = queries.measurements, []
    width = np.where(is_ipv4(table.addresses), 4, 16)

    def endpoint(place: int) -> Endpoint:
        return Endpoint(table.addresses[place].tobytes(), int(width[place]))

    for row, places in zip(queries.rows, queries.context, strict=True):
        given = places[places >= 0][::-1]
        columns = (table.addresses[table.src_id[given]], table.addresses[table.dst_id[given]])
        # A probe may have had several addresses: what is given of it all counts as its context.
        context = Context(*columns, table.rtt_ms[given].astype(np.float64), table.time_s[given] if len(given) else None)
        taken.append(Query(endpoint(table.src_id[row]), endpoint(table.dst_id[row]), int(table.time_s[row]), context))
    return taken


def records(queries: Queries) -> list[dict[str, Any]]:
    """The queried measurements, as `PingModel` takes them."""
    table = queries.measurements
    return [
        {
            "src_addr": format_address(table.addresses[table.src_id[row]].tobytes()),
            "dst_addr": format_address(table.addresses[table.dst_id[row]].tobytes()),
            "event_time": int(table.time_s[row]),
            "rtt": float(table.rtt_ms[row]),
        }
        for row in queries.rows
    ]


def open_queries(options: PartOptions, count: int) -> tuple[PingModel, SplitQueries]:
    """A model, and at most `count` queries of one part of a folder of rows; ValueError if either is missing."""
    model, parts = PingModel.load(options.trained, options.device), dict.fromkeys(("train", "val", options.part))
    table = Measurements.from_rows(options.rows, tuple(parts))
    return model, SplitQueries.draw(table, options.part, options.queries or count, options.seed)


@dataclass(frozen=True)
class TrueDistribution:
    """What the pings of a synthetic Internet were drawn from: no predictor can beat it but by chance."""

    truth: Truth
    name: str = TRUE_DISTRIBUTION

    def predict(self, view: QueryView) -> Prediction:
        """Its quantiles, so fine that nothing depends on them; ValueError names an address of no network."""
        texts = {place: format_address(view.addresses[place].tobytes()) for place in {*view.src_id, *view.dst_id}}
        paths = self.truth.paths([texts[i] for i in view.src_id], [texts[i] for i in view.dst_id])
        p_fail, *parameters = paths.at(view.time_s.astype(np.float64))
        inner = np.log(shifted_log_logistic(_TRUE_LEVELS[1:-1], *(column[:, None] for column in parameters)))
        return Prediction(QuantileDistributions(between_ends(inner), _TRUE_LEVELS), p_fail)
