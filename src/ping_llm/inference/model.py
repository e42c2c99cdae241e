"""A run folder and queries in, exact answers out: every function of this folder as a method of one class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from ping_llm.inference import destinations as addresses
from ping_llm.inference import rank as ranking
from ping_llm.inference import score as scoring
from ping_llm.inference.batch import answer_table
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader
from ping_llm.inference.generate import generate
from ping_llm.inference.mixture import distributions
from ping_llm.inference.query import Query, SrcKnown, Time
from ping_llm.model.checkpoint import load_model
from ping_llm.system.hardware import pick_device

Records: TypeAlias = "pa.Table | Sequence[dict[str, Any]]"
"""A table of Arrow, of pandas, or of records."""


@dataclass(frozen=True, eq=False)
class PingModel(Reader):
    """A trained model that answers queries about pings."""

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", precision: Literal["fp32", "bf16"] = "fp32") -> PingModel:
        """Loads the best checkpoint of a run folder, or one checkpoint; ValueError if there is none.

        In bf16 answers come faster: no event was seen to differ in probability from fp32 by more than 0.02, nor a median of
        a trained model by more than 1 %.
        """
        chosen = pick_device(device)
        gpt, _, _ = load_model(Path(path), chosen)
        return cls(gpt, chosen, Calibration.load(Path(path)), precision)

    def rtt(
        self,
        src: str | None,
        dst: str | None,
        at: Time = None,
        context: Records | None = None,
        src_known: SrcKnown = "auto",
    ) -> RTTDistribution:
        """The distribution of the result of a ping from `src` to `dst`, each an address, a prefix, or None for any.

        `at` is a time (ISO 8601, UTC unless it says otherwise; a datetime; Unix seconds) or None for any time.
        `context` holds earlier measurements of the same source: columns src_addr, dst_addr, rtt (ms, −1 = failed) and,
        optionally, event_time. Of what does not fit the sequence the most recent, and those of the same destination, stay.
        `src_known` is how much of the source is known: all, none, a prefix length, or auto: the mixture of the answers
        under several lengths, weighted by how likely each makes the context (see `src_weights` of the answer).
        """
        return next(self.distributions([Query.parse(src, dst, at, Context.parse(context))], src_known))[0]

    def rtt_many(
        self, queries: Sequence[Query] | Records, src_known: SrcKnown = "auto", context: Records | None = None
    ) -> list[RTTDistribution] | pa.Table:
        """The distribution of each query's result; queries that share a context read it once.

        Of a table of queries (Arrow, pandas, or records), with or without a table of context, the answers are a table of
        statistics: see `batch.answer_table`.
        """
        listed = [query for query in queries if isinstance(query, Query)] if isinstance(queries, Sequence) else None
        if listed is None or len(listed) < len(queries):
            return answer_table(self, queries, context, src_known)
        if context is not None:
            raise ValueError("a Query holds its own context; pass a table of queries, or no context")
        return [one for some in self.distributions(listed, src_known) for one in some]

    def distributions(self, queries: Sequence[Query], src_known: SrcKnown = "auto") -> Iterator[RTTDistribution]:
        """The distributions of the queries' results, in order, in batches of at most `mixture.CHUNK`."""
        return distributions(self, queries, src_known)

    def log_prob(
        self, measurements: Records, order: Sequence[str] = scoring.ORDER, context: Records | None = None
    ) -> np.ndarray:
        """Log-probability in nats of each measurement, its fields in `order`; see `score.log_prob`."""
        return scoring.log_prob(self, measurements, order, context)

    def order_consistency(self, measurements: Records) -> scoring.OrderConsistency:
        """How far log p(src, dst, rtt) depends on the order of the fields; see `score.order_consistency`."""
        return scoring.order_consistency(self, measurements)

    def score(self, measurements: Records, **options: Any) -> pa.Table:
        """The measurements with how surprising each is after those before it; see `score.score`."""
        return scoring.score(self, measurements, **options)

    def rank(self, src: str | None, candidates: Sequence[str], **given: Any) -> ranking.Ranking:
        """Which candidate is nearest, and how sure that is; see `rank.rank`."""
        return ranking.rank(self, src, candidates, **given)

    def generate(self, count: int, **options: Any) -> pa.Table:
        """`count` measurements that the model makes up, or completes from a prompt; see `generate.generate`."""
        return generate(self, count, **options)

    def destinations(self, src: str, **given: Any) -> addresses.FoundAddresses:
        """The likeliest destinations of pings from `src`, given the RTT or not; see `destinations.destinations`."""
        return addresses.destinations(self, src, **given)

    def complete(self, prefix: str, **given: Any) -> addresses.FoundAddresses:
        """The likeliest whole addresses of a partial one, at either end of a ping; see `destinations.complete`."""
        return addresses.complete(self, prefix, **given)
