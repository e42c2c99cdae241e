"""A run folder and questions in, exact answers out."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from ping_llm.inference import destinations as searching
from ping_llm.inference import ranking, scoring
from ping_llm.inference.batch import answer_table
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.distributions import RTTDistributions
from ping_llm.inference.engine import LEAST_MASS, read_contexts, result_laws
from ping_llm.inference.generation import generate
from ping_llm.inference.prefixes import has_partial_byte, prefix_law
from ping_llm.inference.prompt import build_prompt, fitting_context
from ping_llm.inference.query import Query, SrcKnown, told_name
from ping_llm.model.checkpoint import load_model
from ping_llm.model.gpt import GPT
from ping_llm.system.hardware import pick_device

CHUNK = 64  # questions answered together: their laws take 33 MB
LEAST_WEIGHT = 1e-4  # of what is told of the source: lengths of less are not asked


@dataclass(frozen=True, eq=False)
class PingModel:
    """A trained model that answers questions about pings.

    Values of byte 1 of an RTT less likely than `least_mass` are not looked into; 0 computes all 65,536 codes.
    """

    gpt: GPT
    device: torch.device
    calibration: Calibration = field(default_factory=Calibration)
    precision: Literal["fp32", "bf16"] = "fp32"
    least_mass: float = LEAST_MASS

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r} must be fp32 or bf16")

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
        at: dt.datetime | str | float | None = None,
        context: pa.Table | Sequence[dict] | None = None,
        src_known: SrcKnown = "auto",
    ) -> RTTDistribution:
        """The law of the result of a ping from `src` to `dst`, each an address, a prefix, or None for any.

        `at` is a time (ISO 8601, UTC unless it says otherwise; a datetime; Unix seconds) or None for any time.
        `context` holds earlier measurements of the same source: columns src_addr, dst_addr, rtt (ms, −1 = failed) and,
        optionally, event_time. Of what does not fit the sequence the most recent, and those of the same destination, stay.
        `src_known` is how much of the source is told: all, none, a prefix length, or auto: the mixture of the answers
        under several lengths, weighted by how likely each makes the context (see `src_weights` of the answer).
        """
        query = Query.parse(src, dst, at, Context.parse(context))
        return self.rtt_many([query], src_known)[0]

    def rtt_many(
        self, queries: Sequence[Query] | pa.Table, src_known: SrcKnown = "auto", context: pa.Table | None = None
    ) -> list[RTTDistribution] | pa.Table:
        """The law of each query's result; questions that share a context read it once.

        Of a table of queries (Arrow, pandas, or records), with or without a table of context, the answers are a table of
        statistics: see `batch.answer_table`.
        """
        if isinstance(queries, Sequence) and all(isinstance(query, Query) for query in queries):
            if context is not None:
                raise ValueError("a Query holds its own context; pass a table of queries, or no context")
            return [law for laws in self.laws(queries, src_known) for law in laws]
        return answer_table(self, queries, context, src_known)

    def laws(self, queries: Sequence[Query], src_known: SrcKnown = "auto") -> Iterator[RTTDistributions]:
        """The laws of the queries' results, in order, CHUNK at a time."""
        for first in range(0, len(queries), CHUNK):
            some = queries[first : first + CHUNK]
            if any(map(has_partial_byte, some)):
                yield RTTDistributions.of([self._law(query, src_known) for query in some])
            else:
                yield self._laws(some, src_known)

    def log_prob(
        self,
        measurements: pa.Table | Sequence[dict],
        order: Sequence[str] = ("src", "dst", "rtt"),
        context: pa.Table | Sequence[dict] | None = None,
    ) -> np.ndarray:
        """Log-probability in nats of each measurement, its fields told in `order`; see `scoring.log_prob`."""
        return scoring.log_prob(self, measurements, order, context)

    def order_consistency(self, measurements: pa.Table | Sequence[dict]) -> scoring.OrderConsistency:
        """How far log p(src, dst, rtt) depends on the order of the fields; see `scoring.order_consistency`."""
        return scoring.order_consistency(self, measurements)

    def score(
        self,
        measurements: pa.Table | Sequence[dict],
        history: int = scoring.HISTORY,
        src_known: SrcKnown = "auto",
        anomaly_at: float | None = None,
    ) -> pa.Table:
        """The measurements with how surprising each is after those before it; see `scoring.score`."""
        return scoring.score(self, measurements, history, src_known, anomaly_at)

    def rank(
        self,
        src: str | None,
        candidates: Sequence[str],
        at: dt.datetime | str | float | None = None,
        context: pa.Table | Sequence[dict] | None = None,
        src_known: SrcKnown = "auto",
    ) -> ranking.Ranking:
        """Which candidate is nearest, and how sure that is; see `ranking.rank`."""
        return ranking.rank(self, src, candidates, at, context, src_known)

    def generate(self, count: int, **asked) -> pa.Table:
        """`count` measurements that the model makes up, or completes from a prompt; see `generation.generate`."""
        with self.autocast():
            return generate(self.gpt, self.device, count, **asked)

    def destinations(self, src: str, **asked) -> searching.FoundAddresses:
        """The likeliest destinations of pings from `src`, given the RTT or not; see `destinations.destinations`."""
        return searching.destinations(self, src, **asked)

    def complete(self, prefix: str, **asked) -> searching.FoundAddresses:
        """The likeliest whole addresses of a partial one, at either end of a ping; see `destinations.complete`."""
        return searching.complete(self, prefix, **asked)

    def rtt_by_completion(self, src: str | None, dst: str, **asked) -> searching.CompletionAverage:
        """The law of pings to a prefix, averaged over its likeliest addresses; see `destinations.rtt_by_completion`."""
        return searching.rtt_by_completion(self, src, dst, **asked)

    def weighted_variants(self, query: Query, src_known: SrcKnown) -> tuple[list[Query], np.ndarray]:
        """The question with as much of the source told as `src_known` says, and how much each counts; those that do."""
        variants = self._variants(query, src_known)
        evidence = np.zeros(len(variants))
        with self.autocast():
            if len(variants) > 1 and len(query.context):
                contexts = [build_prompt(variant, self.gpt.config.seq_len).context for variant in variants]
                evidence = read_contexts(self.gpt, contexts).log_likelihood
            prior, _ = self._log_priors([variants])
        weights = _weights(prior + evidence, np.zeros(len(variants), dtype=np.int64))
        asked = np.flatnonzero(weights >= LEAST_WEIGHT)
        return [variants[i] for i in asked], weights[asked] / weights[asked].sum()

    def autocast(self) -> torch.autocast | nullcontext:
        """The precision of the forward passes, as a context; fp32 leaves that of the caller."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _variants(self, query: Query, src_known: SrcKnown) -> list[Query]:
        """The question under each told length, least told first, all after the context that fits where most is told.

        So their likelihoods are of the same measurements: the length under which fewest fit would win by that alone.
        """
        variants = list(query.variants(src_known))
        if len(variants) == 1 or not len(query.context):
            return variants
        context = fitting_context(variants[-1], self.gpt.config.seq_len)
        return [dataclasses.replace(variant, context=context) for variant in variants]

    def _law(self, query: Query, src_known: SrcKnown) -> RTTDistribution:
        return prefix_law(self, query, src_known) if has_partial_byte(query) else self._laws([query], src_known)[0]

    def _laws(self, queries: Sequence[Query], src_known: SrcKnown) -> RTTDistributions:
        variants = [self._variants(query, src_known) for query in queries]
        owner = np.repeat(np.arange(len(queries)), [len(told) for told in variants])  # (B,) query of each prompt
        flat = [variant for told in variants for variant in told]
        prompts = [build_prompt(variant, self.gpt.config.seq_len) for variant in flat]
        contexts, context_of = _distinct([prompt.context for prompt in prompts])
        mixed = len(prompts) > len(queries)
        shared = len(contexts) < len(prompts) or (mixed and any(len(context) for context in contexts))
        with self.autocast():
            read = read_contexts(self.gpt, contexts) if shared and any(map(len, contexts)) else None
            if not mixed:
                return result_laws(self.gpt, prompts, read, context_of, self.least_mass)
            evidence = np.zeros(len(prompts)) if read is None else read.log_likelihood[context_of]
            prior, prior_passes = self._log_priors(variants)
            weights = _weights(prior + evidence, owner)
            asked = np.flatnonzero(weights >= LEAST_WEIGHT)
            laws = result_laws(self.gpt, [prompts[i] for i in asked], read, context_of[asked], self.least_mass)
        names = [told_name(variant.src) if variant.src else "all" for variant in flat]
        laws = laws.mixtures(owner[asked], weights[asked], [names[i] for i in asked])
        mixed_of = zip(laws.src_weights, variants, strict=True)
        named = np.array([shares if len(told) > 1 else {} for shares, told in mixed_of], dtype=object)
        return dataclasses.replace(laws, forward_passes=laws.forward_passes + prior_passes, src_weights=named)

    def _log_priors(self, variants: Sequence[Sequence[Query]]) -> tuple[np.ndarray, int]:
        """Logarithm of how much each variant of each query counts before its context is read, (B,), and passes it took.

        That is its share on val, if the source is as familiar to the model as those of val are.
        """
        longest = [told[-1].src for told in variants]
        whole = [i for i, src in enumerate(longest) if src is not None and not src.is_prefix]
        passes = int(bool(self.calibration.familiar) and bool(whole))
        novelty = np.zeros(len(variants))
        if passes:
            log_p = scoring.source_log_prob(self, [longest[i] for i in whole])
            novelty[whole] = [self.calibration.novelty(longest[i], p) for i, p in zip(whole, log_p, strict=True)]
        priors = [
            self.calibration.log_weights([query.src for query in told], new) if told[0].src else np.zeros(len(told))
            for told, new in zip(variants, novelty.tolist(), strict=True)
        ]
        return np.concatenate(priors), passes


def _weights(log_weight: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """How much each variant counts among those of its query, (B,)."""
    log_weight = log_weight - np.maximum.reduceat(log_weight, np.flatnonzero(np.diff(owner, prepend=-1)))[owner]
    weight = np.exp(log_weight)
    return weight / np.bincount(owner, weight)[owner]


def _distinct(contexts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The different ones among token sequences, and which of them each is, (n,)."""
    places: dict[bytes, int] = {}
    which = np.array([places.setdefault(context.tobytes(), len(places)) for context in contexts])
    return [np.frombuffer(key, dtype=np.int64) for key in places], which
