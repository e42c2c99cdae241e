"""A trained model and rows of val in, its calibration out: fitted to its answers on val."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ping_llm.config import Config
from ping_llm.data.measurement import log_rtt, network_of
from ping_llm.data.rows import ProbeRow, RowReader
from ping_llm.inference.blend import situations
from ping_llm.inference.calibration import Calibration, Surprise
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution, log_edges
from ping_llm.inference.engine import Reader, result_distributions
from ping_llm.inference.evidence import recalled
from ping_llm.inference.experts import CUTS, LEAST_WEIGHT, Experts
from ping_llm.inference.memory import Memory
from ping_llm.inference.mixture import CHUNK, distributions, read_prompts, source_variants
from ping_llm.inference.packed import Windows, foresee
from ping_llm.inference.past import pasts
from ping_llm.inference.query import Query, known_name
from ping_llm.inference.score import HISTORY
from ping_llm.inference.table import History
from ping_llm.model.gpt import GPT
from ping_llm.system.hardware import native_bf16
from ping_llm.system.progress import show_progress
from ping_llm.training.base import met
from ping_llm.training.experts import GRID, LEAST_RESULTS, crps_gram, fit_expert, fit_odds, fit_shares

CONTEXT = 10  # measurements before a result
LEAST_MASS = 1e-3  # of the values of byte 1 that are looked into: what is fitted does not feel the rest
SURPRISES = 20_000  # results of val that p-values are fitted to: at 0.001 that leaves an error of about a fifth
LEAST_SURPRISES = 10_000
_STRETCH = 64  # results that are drawn together
_BACK = 256  # measurements of a probe that are searched for those of the same source
_TOGETHER = 16  # queries that are answered together under all known lengths

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Results:
    """n answered results of val, and what is known before each."""

    queries: list[Query]
    log_ms: np.ndarray  # (n,)
    part: np.ndarray  # (n,) number of the part of val

    def take(self, rows: np.ndarray) -> Results:
        """Some of them."""
        return Results([self.queries[i] for i in rows], self.log_ms[rows], self.part[rows])


def calibrate(gpt: GPT, config: Config, device: torch.device, results: int = 0) -> Calibration:
    """Fits to `results` pings of val, by default twice `train.eval_queries`, drawn with a fixed seed, as many of each part.

    What training has met is looked up in its rows, and known of the run that it began with.
    """
    results, rows = results or 2 * config.train.eval_queries, config.data.rows
    familiar = met(config, gpt.src_bytes)
    precision: Literal["fp32", "bf16"] = "bf16" if native_bf16(device) else "fp32"
    reader = Reader(gpt, device, Calibration(familiar=familiar), precision, LEAST_MASS)
    found = draw_results(rows, results, np.random.default_rng(config.seed))
    calibration = Calibration(*fit_src_weights(reader, found), familiar)
    memory = dataclasses.replace(Memory.open(rows), other_sources=config.data.mesh > 0)
    reader = dataclasses.replace(reader, calibration=calibration, memory=memory)
    found = dataclasses.replace(found, queries=recalled(memory, found.queries, reader.seq_len))
    calibration = dataclasses.replace(calibration, experts=fit_experts(reader, found))
    reader = Reader(gpt, device, calibration, precision)
    surprise = val_surprise(reader, RowReader(rows, "val"), SURPRISES, np.random.default_rng(config.seed))
    return dataclasses.replace(calibration, surprise=surprise)


def draw_results(rows: Path, count: int, rng: np.random.Generator) -> Results:
    """Up to `count` answered results, as many of each part of val; a third each without context, after the latest CONTEXT
    measurements of the source, and after the latest to other networks."""
    parts = RowReader(rows, "val").parts
    queries: list[Query] = []
    log_ms, part = [], []
    for number, name in enumerate(parts):
        own, rtt_ms = sample_results(RowReader(rows, name), -(-count // len(parts)), rng, 3 * CONTEXT)
        for i, query in enumerate(own):
            if rtt_ms[i] >= 0:
                queries.append(dataclasses.replace(query, context=_shown(query, i % 3)))
                log_ms.append(float(log_rtt(rtt_ms[i])))
                part.append(number)
    return Results(queries, np.array(log_ms), np.array(part))


def _shown(query: Query, form: int) -> Context:
    """Nothing of the context (0), the latest of it (1), or the latest to networks other than the destination's (2)."""
    if form == 2 and query.dst is not None:
        own = network_of(np.frombuffer(query.dst.packed, np.uint8)[None])
        query = dataclasses.replace(
            query, context=query.context.take((network_of(query.context.dst) != own).any(axis=1))
        )
    return query.context.take(slice(max(0, len(query.context) - CONTEXT), None) if form else slice(0))


SrcWeights = dict[str, dict[str, float]]


def fit_src_weights(reader: Reader, found: Results) -> tuple[SrcWeights, SrcWeights]:
    """The shares of the known lengths of sources that training has met, and of new ones, by family and name.

    Those that make the CRPS least; a share below LEAST_WEIGHT is none. Of too few results there are no shares.
    """
    weights: tuple[SrcWeights, SrcWeights] = ({}, {})
    of_group: dict[tuple[bool, str], list[int]] = {}
    for i, query in enumerate(found.queries):
        if query.src is not None:
            of_group.setdefault((reader.calibration.is_new(query.src), query.src.family), []).append(i)
    for (new, family), rows in of_group.items():
        if len(rows) < LEAST_RESULTS:
            continue
        some = found.take(np.array(rows))
        names, gram, evidence = under_known_lengths(reader, some)
        shares = fit_shares(gram, evidence, some.part)
        shares = np.where(shares < LEAST_WEIGHT, 0.0, shares)
        kept = zip(names, (shares / shares.sum()).tolist(), strict=True)
        weights[new][family] = {name: share for name, share in kept if share}
    return weights


def under_known_lengths(reader: Reader, found: Results) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The known lengths that `auto` mixes, by name; of each result of sources of one family the Gram matrix of the answers
    under each, (n, L, L), see `crps_gram`, and the log-likelihood of its context, (n, L)."""
    coarse, grams, evidence = dataclasses.replace(reader, least_mass=1.0), [], []
    x = log_edges()[GRID]
    for first in range(0, len(found.queries), _TOGETHER):
        some = found.take(np.arange(first, min(first + _TOGETHER, len(found.queries))))
        variants = [source_variants(coarse, query, ["auto"]) for query in some.queries]
        prompts, read, context_of = read_prompts(coarse, [one for own in variants for one in own], likelihoods=True)
        answers = result_distributions(coarse, prompts, read, context_of)
        shape = len(variants), len(variants[0])
        grams.append(crps_gram(_cdfs(answers).reshape(*shape, -1), x, some.log_ms))
        evidence.append((np.zeros(len(prompts)) if read is None else read.log_likelihood[context_of]).reshape(shape))
    names = [known_name(variant.src) for variant in variants[0]]
    return names, np.concatenate(grams), np.concatenate(evidence)


def fit_experts(reader: Reader, found: Results) -> Experts | None:
    """The rules of the experts that have enough past results, and how much each part of an answer counts.

    The reader has a memory of what training has met.
    """
    past = {
        kind: own
        for kind, own in pasts(found.queries, reader.memory).items()
        if np.count_nonzero(own.count) >= LEAST_RESULTS
    }
    if not past:
        return None
    experts = {}
    for kind, own in past.items():
        rows = np.flatnonzero(own.count)
        experts[kind] = fit_expert(own.take(rows), found.log_ms[rows])
    situation, cuts = situations(reader.calibration.familiar, found.queries)
    grams, x = [], log_edges()[GRID]
    with show_progress("calibrate", len(found.queries), "results of val") as advance:
        for first in range(0, len(found.queries), CHUNK):
            rows = np.arange(first, min(first + CHUNK, len(found.queries)))
            some = found.take(rows)
            cdfs = np.zeros((len(rows), 1 + len(CUTS) + len(experts), len(x)))
            cdfs[:, 0] = _cdfs(_answers(reader, some.queries))
            for number, kept in enumerate(cuts[rows].T, 1):
                which = np.flatnonzero(kept)
                if len(which):
                    less = [_cut_destination(some.queries[i], int(kept[i])) for i in which]
                    cdfs[which, number] = _cdfs(_answers(reader, less))
            for number, (kind, expert) in enumerate(experts.items(), 1 + len(CUTS)):
                which = np.flatnonzero(past[kind].count[rows])
                cdfs[which, number] = expert.cdf(past[kind].take(rows[which]), np.tile(x, (len(which), 1)))
            grams.append(crps_gram(cdfs, x, some.log_ms))
            advance(len(rows))
    return fit_odds(experts, np.concatenate(grams), past, situation, cuts > 0, found.part)


def _answers(reader: Reader, queries: Sequence[Query]) -> RTTDistribution:
    return RTTDistribution.concatenate(list(distributions(reader, queries)))


def _cut_destination(query: Query, known_bytes: int) -> Query:
    assert query.dst is not None
    return dataclasses.replace(query, dst=query.dst.cut(known_bytes))


def _cdfs(answers: RTTDistribution) -> np.ndarray:
    """(B, X) P(log-RTT ≤ border | answered) at the borders of GRID."""
    below = np.cumsum(answers.code_probability, axis=1, dtype=np.float64)
    return np.concatenate([np.zeros((len(below), 1)), below], axis=1)[:, GRID] / below[:, -1:]


def val_surprise(reader: Reader, rows: RowReader, results: int, rng: np.random.Generator) -> Surprise:
    """How surprising results of val are after their history: of at least so many of them or, if there are fewer, of all.

    They are drawn in stretches of a row, which is how windows hold them.
    """
    stretches = -(-rows.measurements // _STRETCH)  # (rows,) of each
    ends = np.cumsum(stretches)
    length = np.full(ends[-1], _STRETCH)
    length[ends - 1] = rows.measurements - (stretches - 1) * _STRETCH  # the last one of a row is short
    drawn = rng.permutation(ends[-1])
    count = min(int(np.searchsorted(np.cumsum(length[drawn]), results)) + 1, len(drawn))
    chosen, own = np.sort(drawn[:count]), []
    numbers = np.searchsorted(ends, chosen, "right")
    with show_progress("calibrate", count, "stretches of val") as advance:
        for number in np.unique(numbers):
            row = rows[int(number)]
            for first in (chosen[numbers == number] - (ends[number] - stretches[number])) * _STRETCH:
                begin, end = max(0, first - _BACK), min(first + _STRETCH, len(row))
                wanted = np.arange(begin, end) >= first
                windows = Windows(_measured(row, slice(begin, end)), HISTORY, reader.seq_len, wanted)
                own.append(foresee(reader, windows)[1].p_value)
                advance(1)
    found = np.concatenate(own)
    if len(found) < LEAST_SURPRISES:
        log.warning(
            "p-values are fitted to all %s results of val; below %.2g they are a guess",
            f"{len(found):,}",
            10 / len(found),
        )
    return Surprise.fit(found)


def sample_results(
    rows: RowReader, count: int, rng: np.random.Generator, history: int = HISTORY
) -> tuple[list[Query], np.ndarray]:
    """Up to `count` results, in the order of the rows, as queries after the last `history` measurements of the same source,
    and the results, (n,) ms."""
    ends = np.cumsum(rows.measurements)
    places = np.sort(rng.choice(ends[-1], min(count, ends[-1]), replace=False))
    queries, rtt_ms = [], []
    numbers = np.searchsorted(ends, places, "right")
    for number in np.unique(numbers):
        row = rows[int(number)]
        for place in places[numbers == number] - (ends[number] - len(row)):
            recent = slice(max(0, place - _BACK), place + 1)
            measured = _measured(row, recent)
            queries += History(measured, history).queries([len(measured) - 1])
            rtt_ms.append(float(row.rtt_ms[place]))
    return queries, np.array(rtt_ms)


def _measured(row: ProbeRow, places: slice) -> Context:
    src, dst = row.src_addresses[row.src[places]], row.dst_addresses[row.dst[places]]
    return Context(src, dst, row.rtt_ms[places].astype(np.float64), row.times(places))
