"""A trained model and queries in, exact answers out: every function of this folder as a method of one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ping_llm.inference import batch, mixture
from ping_llm.inference import destinations as search
from ping_llm.inference import generate as generation
from ping_llm.inference import rank as ranking
from ping_llm.inference import score as scoring
from ping_llm.inference.context import Context, Records
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.engine import Reader
from ping_llm.inference.evidence import recalled
from ping_llm.inference.memory import Memory
from ping_llm.inference.query import Query, SrcKnown, Time
from ping_llm.inference.sources import Source, load
from ping_llm.system.hardware import pick_device


@dataclass(frozen=True, eq=False)
class PingModel(Reader):
    """A trained model that answers queries about pings."""

    distributions = mixture.distributions
    log_prob = scoring.log_prob
    order_consistency = scoring.order_consistency
    score = scoring.score
    expected = scoring.expected
    rank = ranking.rank
    generate = generation.generate
    destinations = search.destinations
    complete = search.complete

    @classmethod
    def load(
        cls,
        source: Source = None,
        device: str = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        memory: Path | str | None = None,
    ) -> PingModel:
        """Loads a model; ValueError, one line, if there is none.

        `source` is a run folder, whose best checkpoint answers; one checkpoint, RUN/checkpoints/step-…; a folder that
        `ping-llm export` wrote; OWNER/NAME of the Hugging Face hub, which is downloaded once; or None for the model that
        comes with the package. See sources.py.

        `memory` is a folder of rows: `rtt` and `rtt_many` add to a context that is short what its part train holds of the
        pair and of the source before the query and, if the model learned from windows of several probes, of other sources
        to the same destinations (see evidence.py).

        A calibration is taken only by the checkpoint that it was fitted for; any other answers without, with a warning.

        In bf16 answers come faster: no event was seen to differ in probability from fp32 by more than 0.02, nor a median of
        a trained model by more than 1 %.
        """
        chosen = pick_device(device)
        loaded = load(source, chosen)
        several = loaded.config.data.mesh > 0
        held = None if memory is None else replace(Memory.open(memory), other_sources=several)
        return cls(loaded.gpt, chosen, loaded.calibration, precision, memory=held)

    def rtt(
        self,
        src: str | None,
        dst: str | None,
        at: Time = None,
        context: Records | None = None,
        src_known: SrcKnown = "auto",
        *,
        one_host: bool = False,
        any_source: bool = False,
    ) -> RTTDistribution:
        """The distribution of the result of a ping from `src` to `dst`, each an address, a prefix, or None for any.

        `at` is a time (ISO 8601, UTC unless it says otherwise; a datetime; Unix seconds) or None for any time.
        `context` holds earlier measurements of the same source: columns src_addr, dst_addr, rtt (ms, −1 = failed) and,
        optionally, event_time. Earlier is from a second before `at`, where both times are known; ValueError otherwise. With
        `one_host` its sources may differ from `src`: all are addresses of one host, of any family. With `any_source` they
        may be other hosts, whose pings are evidence of the destination; a model learns to read these from windows of
        several probes. Of what does not fit the sequence the most recent, and those of the same destination, stay. A memory
        adds to a context that is short (see `load`).
        `src_known` is how much of the source is known: all, none, a prefix length, or auto: the mixture of the answers
        under several lengths, weighted by how likely each makes the context (see `src_weights` of the answer).
        """
        query = Query.parse(src, dst, at, Context.parse(context, one_host, any_source))
        return next(self.distributions(recalled(self.memory, [query], self.seq_len), src_known))[0]

    def rtt_many(
        self,
        queries: Sequence[Query] | Records,
        src_known: SrcKnown = "auto",
        context: Records | None = None,
        *,
        one_host: bool = False,
        any_source: bool = False,
    ) -> Any:
        """The distribution of each query's result; queries that share a context read it once.

        Of a list of Query the answer is a list of RTTDistribution. Of a table of queries (Arrow, pandas, polars, a list of
        records, a dict of columns), with or without a table of context, it is a table of the same kind, which holds
        statistics: see `batch.answer_table`.
        """
        listed = isinstance(queries, Sequence) and all(isinstance(query, Query) for query in queries)
        if not listed or isinstance(queries, str):
            return batch.answer_table(self, queries, context, src_known, one_host=one_host, any_source=any_source)
        if context is not None or one_host or any_source:
            raise ValueError(
                "a Query holds its own context; pass a table of queries, or neither context, one_host nor any_source"
            )
        given = recalled(self.memory, queries, self.seq_len)
        return [one for some in self.distributions(given, src_known) for one in some]
