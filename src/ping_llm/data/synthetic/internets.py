"""A seed in, a small synthetic Internet out that draws rows of its measurements, each with an address plan of its own.

They are a prior for inference from a context: nothing of a row can be remembered, but sources and destinations have places,
share networks and lose packets as the truth model says. Half of the rows are of one source, the others of up to 12.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ping_llm.data.augmentation import fresh_addresses
from ping_llm.data.measurement import pack_addresses
from ping_llm.data.rows import ProbeRow
from ping_llm.data.synthetic.truth import Truth, draw_packets
from ping_llm.data.synthetic.world import build_world

PROBES, TARGETS = 32, 32
MOST_SOURCES = 12
_FIRST_SHARE = 0.2, 0.6  # of the measurements, where there are several sources
_SHORTEST_S = 60.0
_PACKETS = (1, 1, 3)  # of a result, which have one time; of an Atlas ping there are three


class Internet:
    """The Internet of a seed: a row takes a hundredth of the time that it takes."""

    def __init__(self, seed: int) -> None:
        world = build_world(seed, PROBES, TARGETS)
        sources = [(probe["ipv4"], probe["ipv6"]) for probe in world["probes"]]
        targets = [(m["dst_addr"], m["ip_version"] == 6) for m in world["measurements"]]
        pairs = {
            (i, j): (own[ipv6], dst)
            for i, own in enumerate(sources)
            for j, (dst, ipv6) in enumerate(targets)
            if own[ipv6] and dst not in own
        }
        src, dst = ([pair[end] for pair in pairs.values()] for end in (0, 1))
        self.pair = np.full((len(sources), len(targets)), -1)  # number of the path, −1 where there is none
        self.pair[tuple(np.array(list(pairs)).T)] = np.arange(len(pairs))
        self.src, self.dst = pack_addresses(src)[0], pack_addresses(dst)[0]  # (P, 16) of each path
        self.paths = Truth(world).paths(src, dst)

    def row(self, first_s: int, last_s: int, size: int, rng: np.random.Generator) -> ProbeRow:
        """`size` measurements or up to two more, between two times, in time order."""
        packets = int(rng.choice(_PACKETS))
        results = -(-size // packets)
        pair = np.repeat(self._pairs(results, rng), packets)
        most_s = max(_SHORTEST_S, float(last_s - first_s))
        span_s = _SHORTEST_S * (most_s / _SHORTEST_S) ** rng.random()
        begin_s = first_s + (most_s - span_s) * rng.random()
        time_s = np.repeat(np.sort(begin_s + span_s * rng.random(results)).astype(np.int64), packets)
        rtt_ms = draw_packets(*self.paths.take(pair).at(time_s), rng).astype(np.float32)
        src, dst = fresh_addresses(self.src[pair], self.dst[pair], rng)
        nothing = np.zeros(len(pair), dtype=np.int64)
        return ProbeRow.from_addresses(-1, time_s, nothing, src, dst, rtt_ms, nothing.astype(np.uint8))

    def _pairs(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """The paths (count,) of measurements of a few sources to a few destinations that the first of them can reach."""
        sources = 1 if rng.random() < 0.5 else 1 + int(MOST_SOURCES ** rng.random())
        chosen = rng.choice(len(self.pair), sources, replace=False)
        reached = np.flatnonzero(self.pair[chosen[0]] >= 0)
        targets = rng.choice(reached, int((len(reached) + 1) ** rng.random()), replace=False)
        of_first = rng.random(count) < (rng.uniform(*_FIRST_SHARE) if sources > 1 else 1.0)
        source = np.where(of_first, chosen[0], chosen[rng.integers(min(1, sources - 1), sources, count)])
        target = rng.choice(targets, count)
        pair = self.pair[source, target]
        return np.where(pair < 0, self.pair[chosen[0], target], pair)


@lru_cache(maxsize=4)
def internet(*entropy: int) -> Internet:
    """The Internet that some whole numbers choose; the last ones are kept."""
    return Internet(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))
