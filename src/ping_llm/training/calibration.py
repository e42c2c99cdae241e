"""A trained model and rows of val in, its calibration out: fitted to its answers on val."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ping_llm.config import Config
from ping_llm.data import tokenization as tk
from ping_llm.data.rows import RowReader
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.engine import Reader, read_contexts
from ping_llm.inference.mixture import distributions, source_log_prob
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Query, known_name
from ping_llm.inference.score import HISTORY, own_p_values
from ping_llm.inference.table import History
from ping_llm.model.gpt import GPT

UNFAMILIAR_SHARE = 0.05  # of the results of val are of sources as unfamiliar to the model as a new one may be
SURPRISE_SHARE = 5  # one in so many results is also queried with its history, which takes about twenty times as long
_BACK = 256  # measurements of a probe that are searched for those of the same source
_BATCH = 64  # prompts read together


def calibrate(gpt: GPT, config: Config, device: torch.device, results: int = 0) -> Calibration:
    """Fits to `results` pings of val, drawn evenly with a fixed seed; by default twice `train.eval_queries`."""
    results = results or 2 * config.train.eval_queries
    queries, rtt_ms = sample_results(RowReader(config.data.rows, "val"), results, np.random.default_rng(config.seed))
    sources = [query.src for query in queries if query.src is not None]  # all of them are known
    reader = Reader(gpt, device)
    src_weights, familiar = {}, {}
    for family, width in (("ipv4", 4), ("ipv6", 16)):
        chosen = [i for i, src in enumerate(sources) if src.width == width]
        if chosen:
            names, log_p = log_likelihoods(reader, [queries[i] for i in chosen], rtt_ms[chosen])
            src_weights[family] = dict(zip(names, mixture_weights(log_p).tolist(), strict=True))
            known = source_log_prob(reader, [sources[i] for i in chosen])
            familiar[family] = float(np.quantile(known, UNFAMILIAR_SHARE))
    some = np.arange(0, len(queries), SURPRISE_SHARE)
    reader = Reader(gpt, device, Calibration(src_weights, familiar=familiar))
    own, first = [], 0
    for batch in distributions(reader, [queries[i] for i in some]):
        own.append(own_p_values(batch, rtt_ms[some[first : first + len(batch)]]))
        first += len(batch)
    return Calibration(src_weights, tuple(np.sort(np.concatenate(own)).tolist()), familiar)


def sample_results(rows: RowReader, count: int, rng: np.random.Generator) -> tuple[list[Query], np.ndarray]:
    """Up to `count` results, in the order of the rows, as the queries of `score`, and the results, (n,) ms."""
    ends = np.cumsum(rows.measurements)
    places = np.sort(rng.choice(ends[-1], min(count, ends[-1]), replace=False))
    queries, rtt_ms = [], []
    numbers = np.searchsorted(ends, places, "right")
    for number in np.unique(numbers):
        row = rows[int(number)]
        for place in places[numbers == number] - (ends[number] - len(row)):
            recent = slice(max(0, place - _BACK), place + 1)
            src, dst = row.src_addresses[row.src[recent]], row.dst_addresses[row.dst[recent]]
            measured = Context(src, dst, row.rtt_ms[recent].astype(np.float64), row.times(recent))
            queries += History(measured, HISTORY).queries([len(measured) - 1])
            rtt_ms.append(float(row.rtt_ms[place]))
    return queries, np.array(rtt_ms)


def log_likelihoods(reader: Reader, queries: Sequence[Query], rtt_ms: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The known lengths that `auto` mixes, by name, and log P of each result, to byte 1, under each without context: (n, L).

    The sources are whole addresses of one family.
    """
    alone = [dataclasses.replace(query, context=Context.parse(None)) for query in queries]
    variants = [list(query.variants("auto")) for query in alone]
    lines = []
    for known, ms in zip(variants, rtt_ms, strict=True):
        result = [tk.FAILED] if ms < 0 else [tk.RTT_START, tk.BYTE_0 + int(tk.encode_rtt(np.array(ms))) // 256]
        lines += [np.append(build_prompt(variant, reader.seq_len).tokens, result) for variant in known]
    batches = range(0, len(lines), _BATCH)
    log_p = np.concatenate([read_contexts(reader, lines[first : first + _BATCH]).log_likelihood for first in batches])
    return [known_name(variant.src) for variant in variants[0] if variant.src], log_p.reshape(len(queries), -1)


def mixture_weights(log_p: np.ndarray, smoothing: float = 1.0, rounds: int = 200) -> np.ndarray:
    """The weights of L distributions whose mixture makes n results likeliest, (L,), from log P of each under each, (n, L).

    Expectation and maximisation, from equal weights; the problem is convex. `smoothing` results are added to each.
    """
    n, L = log_p.shape
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    weights = np.full(L, 1 / L)
    for _ in range(rounds):
        joint = p * weights
        counts = (joint / joint.sum(axis=1, keepdims=True)).sum(axis=0)
        weights = (counts + smoothing) / (n + L * smoothing)
    return weights
