"""What a window tells is changed so that the model learns to infer rather than to remember; all drawn from an rng.

- Pseudonyms: the model meets addresses that nobody has seen, beside true RTTs, and learns what a prefix is worth.
- Shifted pairs: the RTTs of a pair differ from all that the model may remember of it by a factor that only the window
  tells, and learns to believe its context. A result that nothing foretells is an input, but no target.
"""

from __future__ import annotations

import numpy as np

from ping_llm.data.measurement import is_ipv4

_SHIFT_DEVIATION, _SHIFT_MOST = 0.7, 2.0  # of the logarithm of the factor
_IPV6_NETWORK_BITS = 64


def pseudonyms(packed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Addresses (k, 16) uint8 of which all, or a random share, have others in their place.

    Below a random length, of 32 bits or of the 64 of an IPv6 network, every bit is that of the address or its opposite, as
    one random mask says: equal addresses stay equal, and two that share n bits share n bits afterwards (the property of
    Crypto-PAn; Xu et al., Prefix-preserving IP address anonymization, 2002).
    """
    distinct, number = np.unique(packed, axis=0, return_inverse=True)
    share = 1.0 if rng.random() < 0.5 else rng.uniform(0.2, 0.8)
    chosen = rng.random(len(distinct)) < share
    kept, mask = rng.random(), rng.integers(256, size=16, dtype=np.uint8)
    ipv4 = is_ipv4(distinct)
    first_bit = np.where(ipv4, 96 + int(kept * 32), int(kept * _IPV6_NETWORK_BITS))  # (distinct,)
    changed = np.packbits((np.arange(128) >= first_bit[:, None]) & chosen[:, None], axis=1)  # (distinct, 16)
    return (distinct ^ (mask & changed))[number.ravel()]


def shift_pairs(pair: np.ndarray, rtt_ms: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """RTTs (k,) of which those of some pairs are multiplied by a factor each, and which of them nothing foretells, (k,).

    `pair` (k,) numbers the pairs of measurements in sequence order; −1 ms, a failure, stays one. The first RTT of a pair
    that was shifted is not foretold.
    """
    distinct, number = np.unique(pair, return_inverse=True)
    shifted = rng.random(len(distinct)) < rng.uniform(0.3, 1.0)
    log_factor = np.clip(rng.normal(0.0, _SHIFT_DEVIATION, len(distinct)), -_SHIFT_MOST, _SHIFT_MOST)
    factor = np.where(shifted, np.exp(log_factor), 1.0)[number]
    answered = np.flatnonzero(rtt_ms > 0)
    unforetold = np.zeros(len(pair), dtype=bool)
    _, first = np.unique(number[answered], return_index=True)
    unforetold[answered[first]] = True
    return np.where(rtt_ms > 0, rtt_ms * factor, rtt_ms).astype(rtt_ms.dtype), unforetold & shifted[number]
