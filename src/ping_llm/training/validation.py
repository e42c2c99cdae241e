"""Rows of val in, metrics of a model in training out: fixed windows, fixed queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ping_llm.config import Config
from ping_llm.data.measurement import format_address
from ping_llm.data.rows import RowReader
from ping_llm.inference.context import Context
from ping_llm.inference.generate import format_measurements
from ping_llm.inference.model import PingModel
from ping_llm.inference.query import Endpoint, Query
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective

SAMPLES = 4  # made-up measurements
BATCH = 32  # queries in one pass: 256 values of byte 1 each


@dataclass(frozen=True)
class ValQueries:
    """Pings of val that were answered: both addresses and the time are given, no context."""

    queries: list[Query]
    rtt_ms: np.ndarray  # (n,)

    @classmethod
    def load(cls, config: Config) -> ValQueries | None:
        """`train.eval_queries` of them, evenly spaced over probes and time; None if none are wanted or answered."""
        count, rows = config.train.eval_queries, RowReader(config.data.rows, "val")
        ends = np.cumsum(rows.measurements)
        # Twice as many as needed, as some pings fail.
        places = np.unique(np.linspace(0, ends[-1] - 1, 2 * count).astype(np.int64))
        found: list[tuple[Query, float]] = []
        for number in np.unique(np.searchsorted(ends, places, "right")) if count else ():
            row, first = rows[int(number)], ends[number] - rows.measurements[number]
            inside = places[(places >= first) & (places < ends[number])] - first
            for place in inside[row.rtt_ms[inside] > 0]:
                src, dst = row.src_addresses[row.src[place]].tobytes(), row.dst_addresses[row.dst[place]].tobytes()
                time_s = int(row.times(np.array([place]))[0])
                query = Query(Endpoint.whole(src), Endpoint.whole(dst), time_s, Context.parse(None))
                found.append((query, float(row.rtt_ms[place])))
        if not found:
            return None
        kept = [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]
        return cls([query for query, _ in kept], np.array([rtt_ms for _, rtt_ms in kept]))

    def median_rel_error(self, objective: Objective, ranks: Ranks) -> float:
        """Median of |predicted median − actual| / actual over all queries, which the processes share."""
        model = PingModel(objective.model, ranks.device)
        each = -(-len(self.queries) // ranks.world)
        errors = torch.full((each,), torch.nan, dtype=torch.float64)
        places = range(ranks.rank, len(self.queries), ranks.world)
        for start in range(0, len(places), BATCH):
            chosen = places[start : start + BATCH]
            with objective.autocast():
                distributions = model.rtt_many([self.queries[i] for i in chosen], src_known="all")
            medians = np.array([distribution.median for distribution in distributions])
            error = np.abs(medians - self.rtt_ms[chosen]) / self.rtt_ms[chosen]
            errors[start : start + len(chosen)] = torch.from_numpy(error)
        return ranks.gather(errors.to(ranks.device)).nanmedian().item()


def describe(gpt: GPT, val: ValQueries | None, seed: int) -> str:
    """Samples of a model: a few measurements that it generates, and the RTT of one ping of val beside the real one."""
    model = PingModel(gpt, next(gpt.parameters()).device)
    lines = [format_measurements(model.generate(SAMPLES, seed=seed))]
    if val is not None:
        query, rtt_ms = val.queries[0], val.rtt_ms[0]
        distribution = model.rtt_many([query], src_known="all")[0]
        src, dst = (format_address(end.packed) for end in (query.src, query.dst) if end)
        low, median, high = distribution.quantile(np.array([0.05, 0.5, 0.95]))
        said = f"{median:.4g} ms (5–95 % {low:.4g}–{high:.4g}, no answer {distribution.p_fail:.1%})"
        lines.append(f"{src} → {dst}: {said}; it was {rtt_ms:.4g} ms")
    return "\n".join(lines)
