"""What a window tells is changed so that the model learns to infer rather than to remember; all drawn from an rng.

- Pseudonyms: the model meets addresses that nobody has seen, beside true RTTs, and learns what a prefix is worth.
- Shifted pairs: the RTTs of a pair differ from all that the model may remember of it by a factor that only the window
  tells, and learns to believe its context; where the factor changes on the way, as after a change of route, its latest.
  A result that nothing foretells is an input, but no target.
"""

from __future__ import annotations

import numpy as np

from ping_llm.data.measurement import is_ipv4

_SHIFT_DEVIATION, _SHIFT_MOST = 0.7, 2.0  # of the logarithm of the factor
_DRIFTING = 0.3  # of the shifted pairs of a window in time order change their factor
_IPV6_NETWORK_BITS = 64
_IPV6_GLOBAL_BITS = 3  # 2000::/3


def pseudonyms(src: np.ndarray, dst: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sources and destinations (k, 16) uint8, of which those of all networks, or of some, have others instead.

    The networks are those of sources, of destinations or of both. Below their random length, of 32 bits or of the 64 of an
    IPv6 network, every bit is that of the address or its opposite, as the one mask of the window says: equal addresses stay
    equal, and two that share n bits share n bits afterwards (the property of Crypto-PAn; Xu et al., Prefix-preserving IP
    address anonymization, 2002).
    """
    which = rng.integers(3)  # networks of sources, of destinations, of both
    share = 1.0 if rng.random() < 0.5 else rng.uniform(0.2, 0.8)
    kept, mask = rng.random(), rng.integers(256, size=16, dtype=np.uint8)
    both = np.concatenate([src, dst])
    first_bit = np.where(is_ipv4(both), 96 + int(kept * 32), int(kept * _IPV6_NETWORK_BITS))  # (2k,)
    below = np.packbits(np.arange(128) >= first_bit[:, None], axis=1)  # (2k, 16)
    networks, network = np.unique(both & ~below, axis=0, return_inverse=True)
    named = np.unique(network.ravel()[(len(src) if which == 1 else 0) : (len(src) if which == 0 else None)])
    chosen = np.zeros(len(networks), dtype=bool)
    if len(named):
        chosen[named] = rng.random(len(named)) < share
        chosen[rng.choice(named)] = True
    both = both ^ (mask & below & np.where(chosen, np.uint8(255), np.uint8(0))[network.ravel(), None])
    return both[: len(src)], both[len(src) :]


def fresh_addresses(src: np.ndarray, dst: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sources and destinations, (…, 16) uint8 each, all by pseudonyms: every bit of IPv4, all but the first 3 of IPv6.

    Two that share n bits share n bits afterwards.
    """
    mask = rng.integers(256, size=16, dtype=np.uint8)
    ipv4_mask, ipv6_mask = mask.copy(), mask.copy()
    ipv4_mask[:12] = 0
    ipv6_mask[0] &= 0xFF >> _IPV6_GLOBAL_BITS
    renamed = [ends ^ np.where(is_ipv4(ends)[..., None], ipv4_mask, ipv6_mask) for ends in (src, dst)]
    return renamed[0], renamed[1]


def shift_pairs(
    pair: np.ndarray, rtt_ms: np.ndarray, in_time: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """RTTs (k,) of which those of some pairs are multiplied by a factor each, and which of them nothing foretells, (k,).

    `pair` (k,) numbers the pairs of measurements in sequence order; −1 ms, a failure, stays one. If that is the order of
    time, `in_time`, some pairs have another factor from a random place on. The first RTT under a factor is not foretold.
    """
    distinct, number = np.unique(pair, return_inverse=True)
    shifted = rng.random(len(distinct)) < rng.uniform(0.3, 1.0)
    log_factor = np.clip(rng.normal(0.0, _SHIFT_DEVIATION, (2, len(distinct))), -_SHIFT_MOST, _SHIFT_MOST)
    drifting = rng.random(len(distinct)) < (_DRIFTING if in_time else 0.0)
    changes = np.where(drifting, rng.integers(len(pair) + 1, size=len(distinct)), len(pair))  # places, (distinct,)
    later = (np.arange(len(pair)) >= changes[number]).astype(np.int64)
    factor = np.where(shifted[number], np.exp(log_factor[later, number]), 1.0)
    answered = np.flatnonzero(rtt_ms > 0)
    unforetold = np.zeros(len(pair), dtype=bool)
    _, first = np.unique(2 * number[answered] + later[answered], return_index=True)
    unforetold[answered[first]] = True
    return np.where(rtt_ms > 0, rtt_ms * factor, rtt_ms).astype(rtt_ms.dtype), unforetold & shifted[number]
