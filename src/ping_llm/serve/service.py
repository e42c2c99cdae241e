"""A model in, jobs for it out: what each kind of request wants of the library, and how its answer is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ping_llm.inference import answers
from ping_llm.inference.distribution import QUANTILES, RTTDistribution
from ping_llm.inference.query import Endpoint, Query, SrcKnown
from ping_llm.model.gpt import parameter_count
from ping_llm.serve import bodies, maps
from ping_llm.serve.guard import json_bytes
from ping_llm.serve.limits import Limits
from ping_llm.serve.metrics import Metrics
from ping_llm.serve.rows import BEFORE, NO_ROWS_EXAMPLE, RowsFolder, anomalies
from ping_llm.serve.worker import Job, Kind, Watch, Worker

if TYPE_CHECKING:
    from ping_llm.inference.model import PingModel


class Service:
    """A model, the thread that has it, and what HTTP asks of them."""

    def __init__(self, model: PingModel, name: str, limits: Limits, rows: RowsFolder | None = None) -> None:
        self.model, self.name, self.limits, self.rows = model, name, limits, rows
        self.metrics = Metrics(lambda: self.worker.waiting)
        watch = Watch(self.metrics.called, self.metrics.drop)
        self.worker = Worker(limits.waiting, limits.waiting_queries, watch)

    def facts(self) -> dict[str, Any]:
        """What GET /v1/model says."""
        model = self.model
        return {
            "model": self.name,
            "parameters": parameter_count(model.gpt.config),
            "seq_len": model.seq_len,
            "config": dataclasses.asdict(model.gpt.config),
            "device": model.device.type,
            "precision": model.precision,
            "calibrated": bool(model.calibration.src_weights),
            "memory": model.memory is not None,
            "quantiles": QUANTILES,
            "rows": None if self.rows is None else {"parts": self.rows.parts},
            "limits": dataclasses.asdict(self.limits),
            "version": version("ping-llm"),
        }

    def rtt(self, body: bodies.RttBody, deadline: float) -> Job:
        """The job of a request; ValueError if it is wrong."""
        pings = body.pings()
        queries = bodies.queries_of(pings, self.limits)
        known = bodies.known_of(body.src_known)
        levels: tuple[float, ...] | None = None
        if body.quick:
            levels = tuple(sorted({level for ping in pings for level in ping.quantiles or QUANTILES}))
            if any(ping.density for ping in pings):
                raise ValueError("quick answers have no density; leave out quick, or density")

        def finish(found: list[RTTDistribution]) -> bytes:
            given = [
                answers.rtt_answer(one, len(query.context), ping.quantiles, ping.density)
                for one, query, ping in zip(found, queries, pings, strict=True)
            ]
            return json_bytes(given[0] if body.queries is None else {"answers": given})

        return self._together(queries, known, levels, finish, deadline)

    def map(self, body: bodies.MapBody, deadline: float) -> Job:
        """Likewise."""
        prefixes = maps.parts_of_space(body.within, body.first, body.count)
        shared = bodies.Ping.model_construct(**{name: getattr(body, name) for name in bodies.Situation.model_fields})
        pings = [shared.model_copy(update={"src": body.src, "dst": prefix}) for prefix in prefixes]
        queries = bodies.queries_of(pings, self.limits)
        known = bodies.known_of(body.src_known)
        return self._together(
            queries, known, maps.LEVELS, lambda found: json_bytes(maps.map_answer(prefixes, found)), deadline
        )

    def anomalies(self, body: bodies.AnomaliesBody, deadline: float) -> Job:
        """Likewise."""
        rows, most = self.shown_rows(), body.count + BEFORE
        if body.first >= (held := rows.measurements(body.part, body.row)):
            raise ValueError(
                f"row {body.row} of {body.part} has {held:,} measurements; first={body.first} must be less"
            )

        def call(model: PingModel) -> dict[str, Any]:
            return anomalies(model, rows.row(body.part, body.row), body.first, body.count, body.at)

        return self._alone(call, deadline, most)

    def shown_rows(self) -> RowsFolder:
        """Those that the service shows; ValueError if there are none."""
        if self.rows is None:
            raise ValueError("this service has no rows to look into; start it with --rows ROWS")
        return self.rows

    def example(self) -> dict[str, Any]:
        """A query that a page begins with."""
        return NO_ROWS_EXAMPLE if self.rows is None else self.rows.example()

    def rank(self, body: bodies.RankBody, deadline: float) -> Job:
        """Likewise."""
        if len(body.dst) > bodies.MOST_CANDIDATES:
            raise bodies.TooLarge(f"{len(body.dst):,} candidates, at most {bodies.MOST_CANDIDATES} are ranked")
        ends = [bodies.parts_of(Endpoint.parse(dst)) for dst in body.dst]
        cost = bodies.parts_of(Endpoint.parse(body.src)) * sum(ends)
        given = self._situation(body, cost)
        return self._alone(
            lambda model: answers.rank_json(model.rank(body.src, body.dst, **given)), deadline, max(cost, 1)
        )

    def destinations(self, body: bodies.DestinationsBody, deadline: float) -> Job:
        """Likewise."""
        given = self._situation(body, bodies.parts_of(Endpoint.parse(body.src)))
        given |= {"rtt": body.rtt, "rtt_max": body.rtt_max, "prefix": body.prefix, "top": body.top}
        return self._alone(lambda model: answers.destinations_json(model.destinations(body.src, **given)), deadline, 1)

    def score(self, body: bodies.ScoreBody, deadline: float) -> Job:
        """Likewise."""
        rows = body.measurements
        bodies.check_rows([rows], self.limits)
        if not rows:
            raise ValueError("no measurements to score; give at least one")
        table, known = bodies.columns_of(rows), bodies.known_of(body.src_known)
        options = (body.history, known, body.anomaly_at, min(body.top, len(rows)))
        return self._alone(
            lambda model: answers.score_json(model, table, *options, one_host=body.one_host), deadline, len(rows)
        )

    def _situation(self, body: bodies.RankBody | bodies.DestinationsBody, cost: int) -> dict[str, Any]:
        bodies.check_rows([body.context], self.limits)
        bodies.check_cost(cost, self.limits)
        known = bodies.known_of(body.src_known)
        given = {"at": body.at, "context": body.context, "src_known": known}
        return given | {"one_host": body.one_host, "any_source": body.any_source}

    def _together(
        self,
        queries: list[Query],
        known: SrcKnown,
        levels: tuple[float, ...] | None,
        finish: Callable[[list[RTTDistribution]], bytes],
        deadline: float,
    ) -> Job:
        """A job that goes with others of the same `known` and `levels`, the statistics that are wanted, None for all."""

        def answer(several: Sequence[list[Query]]) -> list[list[RTTDistribution]]:
            together = [query for own in several for query in own]
            if levels is None:
                found = iter(self.model.rtt_many(together, known))
            else:
                found = answers.statistics(self.model, together, known, levels)
            return [[next(found) for _ in own] for own in several]

        return Job(Kind(answer, (known, levels)), queries, finish, deadline, bodies.cost_of(queries))

    def _alone(self, call: Callable[[PingModel], dict[str, Any]], deadline: float, cost: int) -> Job:
        """A job that goes with no other."""
        return Job(Kind(lambda calls: [calls[0](self.model)]), call, json_bytes, deadline, cost)
