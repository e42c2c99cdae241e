"""Beginnings of a measurement in, the whole addresses that come next out: the likeliest first, with exact probabilities.

A beginning is the tokens of a window up to where an address comes next; M of them, each with a weight, are a mixture. An
address has in each the probability P(role | a role of an address) × Π P(byte | what comes before), where only what may
stand in a whole address counts. A prefix is at least as likely as anything it begins, so the open prefix that is likeliest
bounds all that was not found yet. N prefixes are expanded in one pass, side by side over the cache of the beginnings.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import ADDRESS_BYTES, IPV4_MAPPED_PREFIX
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import Endpoint, Query
from ping_llm.model.gpt import GPT, KVCache

DST_ROLES, SRC_ROLES = (tk.DST_IPV4, tk.DST_IPV6), (tk.SRC_IPV4, tk.SRC_IPV6)
BATCH = 16  # prefixes expanded in one pass
EXPANSIONS = 4096  # of prefixes, at most: each keeps 256 × M probabilities, 2 KB × M

_Item = tuple[float, int, int]  # −log mass, number of its family, rank in it
_IPV4_ROLES = (tk.SRC_IPV4, tk.DST_IPV4)
_LONGEST = 3 + 1 + ADDRESS_BYTES  # tokens that may follow an opening: a result and an address
_BYTES = slice(tk.BYTE_0, tk.VOCAB_SIZE)


def opening(query: Query, seq_len: int, rtt_ms: float | None = None) -> np.ndarray:
    """Tokens up to where an end that is not told comes next: context, the end and the time that are told, RTT (ms); (T,)."""
    if query.src is None and query.dst is None:
        tokens = [tk.MEASUREMENT_START]
        if query.time_s is not None:
            tokens += [tk.TIMESTAMP_ABS, *_byte_tokens(query.time_s.to_bytes(8, "big"))]
    else:
        tokens = build_prompt(query, seq_len - _LONGEST).tokens.tolist()
    if rtt_ms is not None:
        code = int(tk.encode_rtt(np.array(rtt_ms)))
        tokens += [tk.RTT_START, *_byte_tokens(code.to_bytes(2, "big"))]
    return np.array(tokens, dtype=np.int64)


def address_tokens(roles: Sequence[int], end: Endpoint) -> np.ndarray:
    """The role, of those for IPv4 and for IPv6, and the whole bytes that are told of an end."""
    return np.array([roles[end.width == ADDRESS_BYTES], *_byte_tokens(end.told)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Beginnings:
    """M beginnings that were read."""

    cache: KVCache  # one beginning a row
    logits: Tensor  # (M, V) float64, after the last token
    log_evidence: np.ndarray  # (M,) nats: of the tokens that were given, each among the others of its kind


@torch.inference_mode()
def read_beginnings(gpt: GPT, lines: Sequence[np.ndarray], given: Sequence[int]) -> Beginnings:
    """Reads M token sequences (T,); those from place `given[i]` on are what the i-th is told for sure."""
    lengths = [len(line) for line in lines]
    padded = np.full((len(lines), max(lengths)), tk.PADDING, dtype=np.int64)
    for row, line in zip(padded, lines, strict=True):
        row[: len(line)] = line
    tokens, cache = torch.from_numpy(padded).to(gpt.head.weight.device), KVCache()
    logits = gpt(tokens, cache)  # (M, T, V)
    log_evidence = []
    for row, line, first, length in zip(logits, tokens, given, lengths, strict=True):
        told = line[first:length]
        legal = _same_kind().to(told.device)[told]  # (n, V)
        log_p = row[first - 1 : length - 1].double().masked_fill(~legal, -torch.inf).log_softmax(-1)
        log_evidence.append(float(log_p.gather(1, told[:, None]).sum()))
    last = logits[torch.arange(len(lines)), torch.tensor(lengths) - 1].double()
    return Beginnings(cache, last, np.array(log_evidence))


def next_byte_log_p(logits: Tensor, told: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Log-probability of each byte next in a whole address, (…, N, 256), of logits (…, N, V) after N roles and bytes."""
    legal = torch.from_numpy(np.stack([_legal_bytes(node) for node in told])).to(logits.device)  # (N, 256)
    return logits[..., _BYTES].double().masked_fill(~legal, -torch.inf).log_softmax(-1).cpu().numpy()


@dataclass(frozen=True, eq=False)
class Found:
    """An address, and the logarithm of its probability in each beginning times the weight of that beginning, (M,)."""

    end: Endpoint
    log_p: np.ndarray

    @property
    def probability(self) -> float:
        """That of the mixture."""
        return float(np.exp(np.logaddexp.reduce(self.log_p)))


class AddressSearch(Iterator[Found]):
    """The addresses that may come next, the likeliest first, until all are given or `limit` prefixes were expanded.

    Without `inside`, the beginnings end where one of `roles` comes next. With it they end with the role, one of `roles`,
    and the whole bytes of that prefix, and only addresses in it are searched. `log_weights` (M,), of the beginnings before
    what they are given, are made to sum to 1 with it: so do the probabilities of all addresses.
    """

    def __init__(
        self,
        gpt: GPT,
        read: Beginnings,
        log_weights: np.ndarray,
        roles: Sequence[int],
        inside: Endpoint | None = None,
        batch: int = BATCH,
        limit: int = EXPANSIONS,
    ) -> None:
        self.expansions = 0
        self._gpt, self._read, self._batch, self._limit = gpt, read, batch, limit
        self._families: list[_Family] = []
        self._open: list[_Item] = []  # heap: the likeliest of each family
        self._complete: list[_Item] = []  # heap: addresses that came up before their turn
        log_weights = log_weights + read.log_evidence
        log_weights = log_weights - np.logaddexp.reduce(log_weights)
        self._read_tokens = 0  # of an address, within the beginnings
        if inside is None:
            log_p = read.logits[:, list(roles)].log_softmax(-1).cpu().numpy()
            self._add((), np.array(roles), log_p.T + log_weights)
            return
        told = tuple(address_tokens(roles, inside).tolist())
        self._read_tokens = len(told)
        if inside.is_prefix:
            values = [value for value in inside.next_bytes if _legal_bytes(told)[value]]
            log_p = next_byte_log_p(read.logits[:, None], [told])[:, 0, values].T + log_weights  # (n, M)
            self._add(told, np.array(values) + tk.BYTE_0, log_p - np.logaddexp.reduce(log_p, axis=None))
        else:
            self._add(told[:-1], np.array(told[-1:]), log_weights[None])

    @property
    def bound(self) -> float:
        """No address that was not given yet is likelier than this."""
        best = min((heap[0][0] for heap in (self._open, self._complete) if heap), default=np.inf)
        return float(np.exp(-best))

    def __next__(self) -> Found:
        while True:
            if self._complete and (not self._open or self._complete[0] <= self._open[0]):
                return self._found(heapq.heappop(self._complete))
            if not self._open:
                raise StopIteration
            if self._is_whole(self._open[0]):
                return self._found(self._pop())
            if self.expansions >= self._limit:
                raise StopIteration
            self._expand(self._likeliest_open(min(self._batch, self._limit - self.expansions)))

    def unproven(self, count: int) -> list[Found]:
        """The likeliest addresses that can be told once the limit is hit, to end the search: others may be as likely.

        They are those that were met and not given, and those that `count` of the likeliest prefixes lead to, of which the
        likeliest `count` are kept byte by byte.
        """
        items = self._likeliest_open(count)
        while items:
            first = len(self._families)
            self._expand(items)
            items = heapq.nsmallest(count, self._untaken(first, whole=False))
        return [self._found(item) for item in heapq.nsmallest(count, self._complete + self._untaken(0, whole=True))]

    def _untaken(self, first: int, whole: bool) -> list[_Item]:
        """What was not taken off the heap of the families from `first` on: whole addresses, or prefixes."""
        return [
            (-family.log_mass[rank], index, rank)
            for index, family in enumerate(self._families[first:], start=first)
            if self._is_whole((0.0, index, 0)) == whole
            for rank in range(family.taken, len(family.tokens))
        ]

    def _likeliest_open(self, count: int) -> list[_Item]:
        """Takes the likeliest prefixes, `count` at most, off the heap."""
        chosen = []
        while self._open and len(chosen) < count:
            item = self._pop()
            if self._is_whole(item):
                heapq.heappush(self._complete, item)
            else:
                chosen.append(item)
        return chosen

    @torch.inference_mode()
    def _expand(self, items: list[_Item]) -> None:
        """Adds what may follow N prefixes: one pass in which each sees the beginning and itself."""
        nodes = [self._node(item) for item in items]
        log_p = next_byte_log_p(self._logits([node[self._read_tokens :] for node in nodes]), nodes)  # (M, N, 256)
        for place, ((_, family, rank), node) in enumerate(zip(items, nodes, strict=True)):
            legal = _legal_bytes(node)
            own = self._families[family].log_p[rank]
            self._add(node, np.flatnonzero(legal) + tk.BYTE_0, log_p[:, place, legal].T + own)
        self.expansions += len(items)

    def _logits(self, branches: list[tuple[int, ...]]) -> Tensor:
        """Logits after each of N branches that continue every beginning, (M, N, V)."""
        cache, device = self._read.cache, self._read.logits.device
        M, N, T = len(cache.valid), len(branches), max(map(len, branches))
        tokens = torch.tensor([[*branch, *[tk.PADDING] * (T - len(branch))] for branch in branches], device=device)
        positions = cache.lengths()[:, None] + torch.arange(T, device=device).repeat(N)  # (M, N·T)
        own = torch.kron(torch.eye(N, device=device), torch.ones(T, T, device=device).tril()).bool()  # (N·T, N·T)
        mask = torch.cat([own.new_ones(N * T, cache.size), own], dim=1)[None, None]
        logits = self._gpt(tokens.view(1, -1).expand(M, -1), cache.fork(), positions, mask).view(M, N, T, -1)
        ends = torch.tensor([len(branch) - 1 for branch in branches], device=device)
        return logits[:, torch.arange(N, device=device), ends]

    def _add(self, told: tuple[int, ...], tokens: np.ndarray, log_p: np.ndarray) -> None:
        """Adds the n `tokens` that may follow `told`, with log_p (n, M)."""
        log_mass = np.logaddexp.reduce(log_p, axis=1)
        order = np.argsort(-log_mass, kind="stable")
        self._families.append(_Family(told, tokens[order], log_p[order], log_mass[order]))
        heapq.heappush(self._open, (-log_mass[order[0]], len(self._families) - 1, 0))

    def _pop(self) -> _Item:
        """Takes the likeliest off the heap; the next of its family takes its place."""
        item = _, index, rank = self._open[0]
        family = self._families[index]
        family.taken = rank + 1
        if family.taken < len(family.tokens):
            heapq.heapreplace(self._open, (-family.log_mass[rank + 1], index, rank + 1))
        else:
            heapq.heappop(self._open)
        return item

    def _node(self, item: _Item) -> tuple[int, ...]:
        family = self._families[item[1]]
        return (*family.told, int(family.tokens[item[2]]))

    def _is_whole(self, item: _Item) -> bool:
        family = self._families[item[1]]
        return len(family.told) > 0 and len(family.told) == _width(family.told[0])

    def _found(self, item: _Item) -> Found:
        role, *told = self._node(item)
        address = bytes(token - tk.BYTE_0 for token in told)
        packed = (IPV4_MAPPED_PREFIX if role in _IPV4_ROLES else b"") + address
        return Found(Endpoint(packed, len(address)), self._families[item[1]].log_p[item[2]])


@dataclass(eq=False)
class _Family:
    """The n tokens that may follow `told`, the likeliest first; the first `taken` are off the heap."""

    told: tuple[int, ...]
    tokens: np.ndarray  # (n,)
    log_p: np.ndarray  # (n, M)
    log_mass: np.ndarray  # (n,)
    taken: int = 0


def _width(role: int) -> int:
    return 4 if role in _IPV4_ROLES else ADDRESS_BYTES


def _legal_bytes(told: tuple[int, ...]) -> np.ndarray:
    """Which bytes may follow a role and bytes, (256,): IPv6 addresses are never IPv4-mapped."""
    legal = np.ones(256, dtype=bool)
    role, *before = told
    lead = _byte_tokens(IPV4_MAPPED_PREFIX)
    legal[IPV4_MAPPED_PREFIX[-1]] = role in _IPV4_ROLES or before != lead[:-1]
    return legal


def _byte_tokens(value: bytes) -> list[int]:
    return [tk.BYTE_0 + byte for byte in value]


def _same_kind() -> Tensor:
    """Which tokens could stand in place of each, (V, V) bool: roles of the same field, or bytes."""
    kind = torch.arange(tk.VOCAB_SIZE)
    for group in (DST_ROLES, SRC_ROLES, (tk.RTT_START, tk.FAILED), range(tk.BYTE_0, tk.VOCAB_SIZE)):
        kind[list(group)] = group[0]
    return kind[:, None] == kind
