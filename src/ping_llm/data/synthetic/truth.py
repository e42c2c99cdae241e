"""The truth.json of a synthetic dump in, the exact distribution of loss and RTT given source, destination and time out.

A packet sent at t gets no reply with probability p_fail(t); otherwise its RTT is floor(t) + J, all in ms, with

    floor(t) = fibre + access at both endpoints + congestion(t)    fibre = 2 · great circle / (200 km/ms) · path inflation
    J        ~ log-logistic(scale(t), shape)                   P(J ≤ x) = 1 / (1 + (x / scale)^−shape), positive, skewed
    scale(t) = a share of the uncongested floor + CONGESTION_JITTER · congestion(t)

Congestion and loss rise in the evening at either endpoint. What belongs to a network is stored; what belongs to a pair of
networks, a subnet (/24 or /48) or a host is a hash of the seed, so every address of every network has its distribution.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.measurement import FAILED_RTT_MS, is_ipv4, pack_address, pack_addresses

FORMAT_VERSION = 1  # to be raised with any change to the constants below: they are part of the distribution
TRUTH_NAME = "truth.json"
ANYCAST = "anycast"
DAY_S = 86_400
DAY_POINTS = 96  # of the mixture over a day: one part a quarter of an hour, at its middle

_EARTH_RADIUS_KM = 6371.0
_METRO_KM = 20.0  # the least a path is long: no two hosts share a cable
_FIBRE_KM_PER_MS = 100.0  # of one-way distance per ms of RTT
_REGION_SPREAD = 0.15  # standard deviation of log path inflation between two regions: transit detours
_NETWORK_SPREAD = 0.04  # the same between two networks: peering
_CATCHMENT_SPREAD = 0.3  # how often anycast routing misses the nearest site
_SUBNET_SHARE, _HOST_SHARE = 0.15, 0.10  # of the access delay, at most, that a subnet and a host add
_PEAK_HOUR, _PEAK_SHARPNESS = 21.0, 2.0  # local solar time; von Mises concentration
CONGESTION_JITTER = 0.3
_CONGESTION_LOSS = 3.0  # at the peak hour a network loses 1 + this times what it loses when idle
_DARK_SHARE, _DARK_LOSS = 0.04, 0.98  # destinations that hardly ever reply

# One word for each use of the hash, so that no two uses agree.
_REGION, _NETWORK, _CATCHMENT, _SUBNET, _HOST, _DARK = range(1, 7)


@dataclass(frozen=True)
class TrueRTT:
    """The distribution of one packet: K shifted log-logistic ones mixed, K = 1 at a given time; each column is (K,).

    `p_fail` is the probability of no reply; cdf, pdf, quantile, median and mean are of the RTT in ms given a reply.
    """

    loss: np.ndarray  # probability of no reply
    floor_ms: np.ndarray
    scale_ms: np.ndarray
    shape: np.ndarray

    @property
    def p_fail(self) -> float:
        return float(self.loss.mean())

    @property
    def weights(self) -> np.ndarray:
        """(K,) share of each part among the packets with a reply."""
        return (1 - self.loss) / (1 - self.loss).sum()

    def cdf(self, rtt_ms: np.ndarray | float) -> np.ndarray:
        """P(RTT ≤ rtt_ms), of the shape of rtt_ms."""
        odds = (self._excess_ms(rtt_ms) / self.scale_ms) ** self.shape
        return (odds / (1 + odds)) @ self.weights

    def pdf(self, rtt_ms: np.ndarray | float) -> np.ndarray:
        """Density per ms, of the shape of rtt_ms."""
        excess_ms = self._excess_ms(rtt_ms)
        odds = (excess_ms / self.scale_ms) ** self.shape
        return (self.shape / np.maximum(excess_ms, 1e-300) * odds / (1 + odds) ** 2) @ self.weights

    def quantile(self, q: np.ndarray | float) -> np.ndarray:
        """The RTT in ms that a share q of the replies stays below, 0 ≤ q < 1; by bisection where K > 1."""
        q = np.asarray(q, float)
        if not ((q >= 0) & (q < 1)).all():
            raise ValueError(f"a quantile must be at least 0 and below 1, not {q}")
        parts = shifted_log_logistic(q[..., None], self.floor_ms, self.scale_ms, self.shape)  # (…, K)
        low, high = parts.min(axis=-1), parts.max(axis=-1)
        for _ in range(60 if len(self.shape) > 1 else 0):
            middle = (low + high) / 2
            below = self.cdf(middle) < q
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    @property
    def median(self) -> float:
        return float(self.quantile(0.5))

    @property
    def mean(self) -> float:
        angle = np.pi / self.shape
        return float((self.floor_ms + self.scale_ms * angle / np.sin(angle)) @ self.weights)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n,) RTTs in ms of n packets, −1 for those without a reply."""
        part = rng.integers(len(self.shape), size=n)
        return draw_packets(self.loss[part], self.floor_ms[part], self.scale_ms[part], self.shape[part], rng)

    def _excess_ms(self, rtt_ms: np.ndarray | float) -> np.ndarray:
        """(…, K) of an RTT over the floor, not below 0."""
        return np.maximum(np.asarray(rtt_ms, float)[..., None] - self.floor_ms, 0)


@dataclass(frozen=True)
class Paths:
    """The parameters of P (source, destination) pairs, each column (P,); `at` puts in the time."""

    idle_floor_ms: np.ndarray
    idle_scale_ms: np.ndarray
    shape: np.ndarray
    src_congestion_ms: np.ndarray  # at the peak hour
    dst_congestion_ms: np.ndarray
    src_loss: np.ndarray  # when idle
    dst_loss: np.ndarray
    dark_loss: np.ndarray
    src_longitude: np.ndarray  # degrees
    dst_longitude: np.ndarray

    def take(self, index: np.ndarray) -> Paths:
        """The paths at `index`, in its order."""
        return Paths(*(getattr(self, f.name)[index] for f in fields(Paths)))

    def at(self, time_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """p_fail, floor_ms, scale_ms and shape at Unix seconds that broadcast with the pairs."""
        src_evening, dst_evening = _evening(time_s, self.src_longitude), _evening(time_s, self.dst_longitude)
        congestion_ms = self.src_congestion_ms * src_evening + self.dst_congestion_ms * dst_evening
        src_kept = 1 - self.src_loss * (1 + _CONGESTION_LOSS * src_evening)
        dst_kept = 1 - self.dst_loss * (1 + _CONGESTION_LOSS * dst_evening)
        p_fail = 1 - src_kept * dst_kept * (1 - self.dark_loss)
        scale_ms = self.idle_scale_ms + CONGESTION_JITTER * congestion_ms
        return p_fail, self.idle_floor_ms + congestion_ms, scale_ms, np.broadcast_to(self.shape, p_fail.shape)


class Truth:
    """The synthetic Internet of a truth.json: `rtt_distribution` for one pair, `paths(…).at(…)` for many at once."""

    def __init__(self, world: dict[str, Any]) -> None:
        if world.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"the truth is of format {world.get('format_version')}, this program reads {FORMAT_VERSION}; "
                'run "ping-llm synth" again'
            )
        self.world, self.seed, networks = world, int(world["seed"]), world["networks"]
        if not networks:
            raise KeyError("networks")
        names = ("access_ms", "detour", "congestion_ms", "jitter_share", "jitter_shape", "loss", "ipv6_extra_ms")
        self._columns = {name: np.array([network[name] for network in networks], dtype=float) for name in names}
        self._is_anycast = np.array([network["kind"] == ANYCAST for network in networks])
        counts = np.array([len(network["sites"]) for network in networks])  # several of anycast networks, one of others
        self._has_site = np.arange(counts.max()) < counts[:, None]  # (N, sites) bool
        regions = {name: i for i, name in enumerate(world["regions"])}
        self._region = self._site_column("region", regions.__getitem__).astype(np.int64)
        self._longitude = self._site_column("longitude")
        latitude, longitude = np.radians(self._site_column("latitude")), np.radians(self._longitude)
        flat = np.cos(latitude)
        # (N, sites, 3) unit vectors from the centre of the Earth
        self._position = np.stack([flat * np.cos(longitude), flat * np.sin(longitude), np.sin(latitude)], axis=-1)
        owned = [(ip_network(p), i) for i, network in enumerate(networks) for p in network["prefixes"]]
        borders = [_lookup_key(_pack([str(net[0]), str(net[-1])])) for net, _ in owned]
        first, last = np.array(borders, dtype=np.uint64).T
        order = np.argsort(first)
        self._prefixes = first[order], last[order], np.array([i for _, i in owned])[order]

    @classmethod
    def load(cls, path: Path | str) -> Truth:
        """Reads truth.json, or the one in a folder."""
        path = Path(path)
        path = path / TRUTH_NAME if path.is_dir() else path
        try:
            return cls(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(f'no {path}; run "ping-llm synth --out {path.parent}" first') from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} is damaged ({error}); run "ping-llm synth" again') from None

    def rtt_distribution(self, src: str, dst: str, time_s: float | None = None) -> TrueRTT:
        """Of a packet from `src` to `dst` at Unix seconds.

        None = sent at a time uniform over the day: the mixture over DAY_POINTS equally spaced times (the midpoint rule,
        which on a smooth periodic function is as good as exact). ValueError names an address of no network.
        """
        path = self.paths([src], [dst])
        times = (np.arange(DAY_POINTS) + 0.5) * (DAY_S / DAY_POINTS) if time_s is None else np.array([float(time_s)])
        return TrueRTT(*path.at(times))

    def paths(self, src: Sequence[str], dst: Sequence[str]) -> Paths:
        """The paths of P pairs of addresses; ValueError names one that is in no network, or a source that is anycast."""
        src_packed, dst_packed = _pack(src), _pack(dst)
        src_network, dst_network = self._network_of(src_packed, src), self._network_of(dst_packed, dst)
        if self._is_anycast[src_network].any():
            i = int(self._is_anycast[src_network].argmax())
            raise ValueError(f"{src[i]} is anycast: it replies to pings but sends none; swap source and destination")
        families = is_ipv4(src_packed), is_ipv4(dst_packed)
        if (families[0] != families[1]).any():
            i = int((families[0] != families[1]).argmax())
            raise ValueError(f"{src[i]} and {dst[i]} are of different IP versions; no packet goes between them")
        count = len(self.world["networks"])
        networks, which = np.unique(src_network * count + dst_network, return_inverse=True)
        fibre_ms, site = (column[which] for column in self._fibre(*np.divmod(networks, count)))
        src_ms = self._access_ms(src_network, src_packed, families[0])
        floor_ms = fibre_ms + src_ms + self._access_ms(dst_network, dst_packed, families[0])
        column = self._columns
        return Paths(
            idle_floor_ms=floor_ms,
            idle_scale_ms=floor_ms * (column["jitter_share"][src_network] + column["jitter_share"][dst_network]),
            shape=(column["jitter_shape"][src_network] + column["jitter_shape"][dst_network]) / 2,
            src_congestion_ms=column["congestion_ms"][src_network],
            dst_congestion_ms=column["congestion_ms"][dst_network],
            src_loss=column["loss"][src_network],
            dst_loss=column["loss"][dst_network],
            dark_loss=_DARK_LOSS * (hash_uniform(self.seed, _DARK, *_words(dst_packed)) < _DARK_SHARE),
            src_longitude=self._longitude[src_network, 0],
            dst_longitude=self._longitude[dst_network, site],
        )

    def _fibre(self, src: np.ndarray, dst: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Propagation RTT in ms between (P,) networks, and the (P,) site of `dst` that routing chose."""
        cosine = (self._position[src, 0][:, None] * self._position[dst]).sum(-1).clip(-1, 1)  # (P, sites)
        km = np.maximum(_EARTH_RADIUS_KM * np.arccos(cosine), _METRO_KM)
        sites = np.broadcast_to(np.arange(km.shape[1]), km.shape)
        luck = _normal(self.seed, _CATCHMENT, src[:, None], dst[:, None], sites)
        site = np.where(self._has_site[dst], np.log(km) + _CATCHMENT_SPREAD * luck, np.inf).argmin(-1)
        src_region, dst_region = self._region[src, 0], self._region[dst, site]
        # In ascending order: the path inflation is the same both ways.
        region_detour = _normal(self.seed, _REGION, *np.sort([src_region, dst_region], axis=0))
        network_detour = _normal(self.seed, _NETWORK, *np.sort([src, dst], axis=0))
        log_inflation = self._columns["detour"][src] + self._columns["detour"][dst]
        log_inflation = log_inflation + _REGION_SPREAD * region_detour + _NETWORK_SPREAD * network_detour
        inflation = np.exp(np.maximum(log_inflation, 0))  # never faster than the straight fibre
        return np.take_along_axis(km, site[:, None], 1)[:, 0] / _FIBRE_KM_PER_MS * inflation, site

    def _access_ms(self, network: np.ndarray, packed: np.ndarray, ipv4: np.ndarray) -> np.ndarray:
        """(P,) ms that an endpoint adds: its network's access, and what its subnet and host add to it."""
        high, low = _words(packed)
        subnet = np.where(ipv4, low >> np.uint64(8), high >> np.uint64(16))
        share = _SUBNET_SHARE * hash_uniform(self.seed, _SUBNET, subnet)
        share = share + _HOST_SHARE * hash_uniform(self.seed, _HOST, high, low)
        access_ms = self._columns["access_ms"][network] * (1 + share)
        return access_ms + np.where(ipv4, 0, self._columns["ipv6_extra_ms"][network])

    def _network_of(self, packed: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """(P,) index of the network that owns each address."""
        first, last, owner = self._prefixes  # lookup keys, sorted
        key = _lookup_key(packed)
        at = np.maximum(np.searchsorted(first, key, side="right") - 1, 0)
        missing = (key < first[at]) | (key > last[at])
        if missing.any():
            raise ValueError(
                f"{texts[int(missing.argmax())]} is in no network of this truth; its probes and measurements are listed in "
                f"{TRUTH_NAME}"
            )
        return owner[at]

    def _site_column(self, name: str, convert: Callable[[Any], float] = float) -> np.ndarray:
        """(N, sites) of one field of the sites, 0 where a network has fewer."""
        column = np.zeros(self._has_site.shape)
        sites = (site for network in self.world["networks"] for site in network["sites"])
        column[self._has_site] = [convert(site[name]) for site in sites]
        return column


def shifted_log_logistic(u: np.ndarray, floor_ms: np.ndarray, scale_ms: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The RTT in ms at probability u: what a uniform number is turned into."""
    return floor_ms + scale_ms * (u / (1 - u)) ** (1 / shape)


def draw_packets(
    p_fail: np.ndarray, floor_ms: np.ndarray, scale_ms: np.ndarray, shape: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """One packet of each distribution that the four columns broadcast to: RTTs in ms, −1 without a reply."""
    lost = rng.random(p_fail.shape) < p_fail
    return np.where(lost, FAILED_RTT_MS, shifted_log_logistic(rng.random(p_fail.shape), floor_ms, scale_ms, shape))


def hash_uniform(seed: int, *words: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed and on integer columns, and look independent."""
    return (_hash(seed, *words) >> np.uint64(11)) * 2.0**-53


def _normal(seed: int, *words: np.ndarray | int) -> np.ndarray:
    """Standard normal numbers that depend on the seed and on integer columns (Box–Muller)."""
    radius = np.sqrt(-2 * np.log1p(-hash_uniform(seed, *words, 0)))
    return radius * np.cos(2 * np.pi * hash_uniform(seed, *words, 1))


def _hash(seed: int, *words: np.ndarray | int) -> np.ndarray:
    """uint64 of the seed and of integer columns that broadcast; the finaliser of splitmix64 after every word."""
    state = np.atleast_1d(np.uint64(seed))
    for word in words:
        state = state ^ np.asarray(word).astype(np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _evening(time_s: np.ndarray | float, longitude: np.ndarray) -> np.ndarray:
    """How busy a network is, 0 to 1: a von Mises bump over local solar time that is 1 at the peak hour."""
    hour = np.asarray(time_s, float) % DAY_S / 3600 + longitude / 15
    return np.exp(_PEAK_SHARPNESS * (np.cos((hour - _PEAK_HOUR) * (2 * np.pi / 24)) - 1))


def _pack(texts: Sequence[str]) -> np.ndarray:
    """(n, 16) packed addresses; ValueError names a text that is none."""
    distinct, index = np.unique(texts, return_inverse=True)  # each is parsed once
    packed, valid = pack_addresses(distinct.tolist())
    if not valid.all():
        pack_address(str(distinct[valid.argmin()]))
    return packed[index]


def _words(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and low 64 bits of (n, 16) packed addresses."""
    words = np.ascontiguousarray(packed).view(">u8").astype(np.uint64)
    return words[:, 0], words[:, 1]


def _lookup_key(packed: np.ndarray) -> np.ndarray:
    """(n,) uint64 that orders addresses: the 32 bits of IPv4, else the high half (prefixes are /64 or shorter)."""
    high, low = _words(packed)
    return np.where(is_ipv4(packed), low & np.uint64(0xFFFFFFFF), high)
