"""A trained model and rows of val in, its calibration out: fitted to its answers on val."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ping_llm.config import Config
from ping_llm.data import tokenization as tk
from ping_llm.data.rows import ProbeRow, RowReader
from ping_llm.inference.calibration import Calibration, Surprise
from ping_llm.inference.context import Context
from ping_llm.inference.engine import Reader, read_contexts
from ping_llm.inference.mixture import source_log_prob
from ping_llm.inference.packed import Windows, foresee
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Query, known_name
from ping_llm.inference.score import HISTORY
from ping_llm.inference.table import History
from ping_llm.model.gpt import GPT
from ping_llm.system.hardware import native_bf16
from ping_llm.system.progress import show_progress

UNFAMILIAR_SHARE = 0.05  # of the results of val are of sources as unfamiliar to the model as a new one may be
SURPRISES = 20_000  # results of val that p-values are fitted to: at 0.001 that leaves an error of about a fifth
LEAST_SURPRISES = 10_000
_STRETCH = 64  # results that are drawn together
_BACK = 256  # measurements of a probe that are searched for those of the same source
_BATCH = 64  # prompts read together

log = logging.getLogger(__name__)


def calibrate(gpt: GPT, config: Config, device: torch.device, results: int = 0) -> Calibration:
    """Fits to `results` pings of val, drawn evenly with a fixed seed; by default twice `train.eval_queries`."""
    results, rows = results or 2 * config.train.eval_queries, RowReader(config.data.rows, "val")
    queries, rtt_ms = sample_results(rows, results, np.random.default_rng(config.seed))
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
    precision: Literal["fp32", "bf16"] = "bf16" if native_bf16(device) else "fp32"
    reader = Reader(gpt, device, Calibration(src_weights, familiar=familiar), precision)
    return Calibration(src_weights, val_surprise(reader, rows, SURPRISES, np.random.default_rng(config.seed)), familiar)


def val_surprise(reader: Reader, rows: RowReader, results: int, rng: np.random.Generator) -> Surprise:
    """How surprising results of val are after their history: of at least so many of them or, if there are fewer, of all.

    They are drawn in stretches of a row, which is how windows hold them.
    """
    stretches = -(-rows.measurements // _STRETCH)  # (rows,) of each
    ends = np.cumsum(stretches)
    count = min(-(-results // _STRETCH) + len(rows), int(ends[-1]))  # the last one of a row is short
    chosen, own = np.sort(rng.choice(ends[-1], count, replace=False)), []
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
            measured = _measured(row, recent)
            queries += History(measured, HISTORY).queries([len(measured) - 1])
            rtt_ms.append(float(row.rtt_ms[place]))
    return queries, np.array(rtt_ms)


def _measured(row: ProbeRow, places: slice) -> Context:
    src, dst = row.src_addresses[row.src[places]], row.dst_addresses[row.dst[places]]
    return Context(src, dst, row.rtt_ms[places].astype(np.float64), row.times(places))


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
