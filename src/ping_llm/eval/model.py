"""A trained model and queries in, its scores out; the true distribution of a synthetic Internet is one more predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.measurement import is_ipv4
from ping_llm.data.synthetic.truth import Truth, shifted_log_logistic
from ping_llm.eval.baselines.base import Prediction
from ping_llm.eval.columns import Measurements, Queries, QueryView, address_texts
from ping_llm.eval.distribution import LEAST_CHANCE, QuantileDistributions, between_ends
from ping_llm.eval.metrics import QUANTILE_LEVELS, Scores
from ping_llm.eval.options import EvalOptions, PartOptions
from ping_llm.eval.queries import FAMILIES, Seen, SplitQueries, learned_from
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Focus
from ping_llm.inference.evidence import recalled
from ping_llm.inference.mixture import distributions_under
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import fitting_places
from ping_llm.inference.query import Endpoint, Query

TRUE_DISTRIBUTION = "true distribution"
LARGEST_NLL = 100.0  # nats; a result that a model holds for impossible costs no more, so that a mean stays finite
LEAST_MASS = 1e-5  # of a value of byte 1 that is looked into: scores do not feel the rest, and the model answers faster

MEASUREMENT_TOKENS = (19, 43)  # of a measurement between IPv4 addresses, and between any, at most
EXTRA_TOKENS = 8  # that the first time of a prompt and its opening take more

_TRUE_LEVELS = np.r_[0, 10.0 ** np.arange(-7, -2), np.linspace(0.005, 0.995, 397), 1 - 10.0 ** np.arange(-3, -8, -1), 1]


@dataclass(frozen=True)
class ModelMethods:
    """The model, given as much of the source as each of `src_known` says: a method each, by name."""

    model: PingModel
    src_known: tuple[str, ...]

    @classmethod
    def load(cls, options: EvalOptions, memory: Path | None) -> ModelMethods:
        """The model of the run under each of `src_known`, with the rows `memory` to look up, if any."""
        model = PingModel.load(options.trained, options.device, options.precision, memory)
        return cls(replace(model, least_mass=LEAST_MASS), options.src_known)

    @property
    def names(self) -> list[str]:
        """One for each of `src_known`."""
        return [f"ping-llm, source {known}" for known in self.src_known]

    def scores(
        self, queries: Queries, rng: np.random.Generator, advance: Callable[[float], None] = lambda n: None
    ) -> dict[str, Scores]:
        """The scores of q queries, of each method, from one set of passes."""
        # neighbours share their context
        order = np.lexsort((queries.measurements.time_s[queries.rows], queries.src_id))
        sorted_ = queries.take(order)
        asked = recalled(self.model.memory, model_queries(sorted_), self.model.seq_len)
        every = score_answers(self.model, asked, sorted_.rtt_ms, self.src_known, rng, advance)
        scores = {}
        for name, found in zip(self.names, every, strict=True):
            found = Scores(*(column[np.argsort(order)] for column in vars(found).values()))
            failed = -np.log(np.maximum(found.p_fail, LEAST_CHANCE))
            scores[name] = replace(found, nll_nats=np.where(found.rtt_ms < 0, failed, found.nll_nats))
        return scores


def score_answers(
    model: PingModel,
    queries: Sequence[Query],
    rtt_ms: np.ndarray,
    every: Sequence[str] = ("auto",),
    rng: np.random.Generator | None = None,
    advance: Callable[[float], None] = lambda n: None,
) -> list[Scores]:
    """The scores of the model's answers to q queries with these results (q,), −1 = failed, under each of `every`.

    With `rng` the PIT is randomised within a code: RTTs are reported in steps.
    """
    answers, done, levels = [], 0, np.array(QUANTILE_LEVELS)
    focus = Focus.on(levels, len(queries), np.arange(len(queries)), rtt_ms)
    for under in distributions_under(model, queries, every, focus):
        observed = rtt_ms[done : done + len(under[0])].astype(np.float64)
        answers.append([_columns(found, observed, levels, rng) for found in under])
        done += len(observed)
        advance(len(observed))
    return [Scores(rtt_ms, *map(np.concatenate, zip(*own, strict=True))) for own in zip(*answers, strict=True)]


def _columns(
    found: RTTDistribution, observed: np.ndarray, levels: np.ndarray, rng: np.random.Generator | None
) -> tuple[np.ndarray, ...]:
    """Of answers to queries with these results, all columns of `Scores` but the first."""
    with np.errstate(invalid="ignore"):
        nll_nats = np.minimum(-found.log_density(observed), LARGEST_NLL)
    return found.p_fail, nll_nats, found.crps(observed), found.pit(observed, rng), found.quantile(levels)


def model_queries(queries: Queries) -> list[Query]:
    """The queries as the model takes them: both addresses and the time given, the context in time order."""
    table, taken = queries.measurements, []
    width = np.where(is_ipv4(table.addresses), 4, 16).tolist()
    for row, places in zip(queries.rows, queries.context, strict=True):
        given = places[places >= 0][::-1]
        columns = (table.addresses[table.src_id[given]], table.addresses[table.dst_id[given]])
        context = Context(*columns, table.rtt_ms[given].astype(np.float64), table.time_s[given] if len(given) else None)
        src, dst = (Endpoint(table.addresses[i].tobytes(), width[i]) for i in (table.src_id[row], table.dst_id[row]))
        taken.append(Query(src, dst, int(table.time_s[row]), context))
    return taken


def fitted(queries: Queries, seq_len: int) -> Queries:
    """The queries with what of their contexts fits in a prompt of so many tokens, all of the source known."""
    context = queries.context.copy()
    table, count = queries.measurements, (context >= 0).sum(axis=1)
    either = is_ipv4(table.addresses)[queries.src_id] & is_ipv4(table.addresses)[queries.dst_id]
    long = np.flatnonzero((count + 1) * np.where(either, *MEASUREMENT_TOKENS) + EXTRA_TOKENS > seq_len)
    for row, query in zip(long, model_queries(queries.take(long)), strict=True):
        newest_first = count[row] - 1 - fitting_places(query, seq_len)
        dropped = np.setdiff1d(np.arange(count[row]), newest_first)
        kept = np.delete(context[row], dropped)
        context[row] = np.pad(kept, (0, len(dropped)), constant_values=-1)
    return replace(queries, context=context)


def records(queries: Queries) -> list[dict[str, Any]]:
    """The queried measurements, as `PingModel` takes them."""
    table, rows = queries.measurements, queries.rows
    texts = (address_texts(table.addresses, ids[rows]) for ids in (table.src_id, table.dst_id))
    lines = zip(*texts, table.time_s[rows].tolist(), table.rtt_ms[rows].tolist(), strict=True)
    return [dict(zip(("src_addr", "dst_addr", "event_time", "rtt"), line, strict=True)) for line in lines]


def open_queries(options: PartOptions, count: int) -> tuple[PingModel, SplitQueries]:
    """A model, and at most `count` queries of one part of a folder of rows; ValueError if either is missing."""
    model, parts = PingModel.load(options.trained, options.device), dict.fromkeys(("train", "val", options.part))
    table = Measurements.from_rows(options.rows, tuple(parts))
    seen, count = Seen(learned_from(table)), options.queries or count
    return model, SplitQueries.draw(table, seen, FAMILIES[0], options.part, count, options.seed)


@dataclass(frozen=True)
class TrueDistribution:
    """What the pings of a synthetic Internet were drawn from: no predictor can beat it but by chance."""

    truth: Truth
    name: str = TRUE_DISTRIBUTION

    def predict(self, view: QueryView) -> Prediction:
        """Its quantiles, so fine that nothing depends on them; ValueError names an address of no network."""
        paths = self.truth.paths(*(address_texts(view.addresses, ids) for ids in (view.src_id, view.dst_id)))
        p_fail, *parameters = paths.at(view.time_s.astype(np.float64))
        inner = np.log(shifted_log_logistic(_TRUE_LEVELS[1:-1], *(column[:, None] for column in parameters)))
        return Prediction(QuantileDistributions(between_ends(inner), _TRUE_LEVELS), p_fail)
