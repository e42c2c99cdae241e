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
from ping_llm.inference.engine import Beginnings, Reader, legal_bytes, next_byte_log_p
from ping_llm.inference.prompt import address_tokens
from ping_llm.inference.query import Endpoint

BATCH = 16  # prefixes expanded in one pass
EXPANSIONS = 4096  # of prefixes, at most: each keeps 256 × M probabilities, 2 KB × M

_Item = tuple[float, int, int]  # −log mass, number of its family, rank in it
_IPV4_ROLES = (tk.SRC_IPV4, tk.DST_IPV4)


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
    and the whole bytes of that prefix, and only addresses in it are searched. The weights of the beginnings are
    `log_weights` (M,) and their evidence, made to sum to 1: so do the probabilities of all addresses.
    """

    def __init__(
        self,
        reader: Reader,
        read: Beginnings,
        log_weights: np.ndarray,
        roles: Sequence[int],
        inside: Endpoint | None = None,
        batch: int = BATCH,
        limit: int = EXPANSIONS,
    ) -> None:
        self.expansions = 0
        self._reader, self._read, self._batch, self._limit = reader, read, batch, limit
        self._families: list[_Family] = []
        self._open: list[_Item] = []  # heap: the likeliest of each family
        self._complete: list[_Item] = []  # heap: addresses that came up before their turn
        log_weights = log_weights + read.log_evidence
        log_weights = log_weights - np.logaddexp.reduce(log_weights)
        lead = () if inside is None else tuple(address_tokens(roles, inside).tolist())
        self._read_tokens = len(lead)  # of an address, within the beginnings
        if inside is None:
            log_p = read.logits[:, list(roles)].log_softmax(-1).cpu().numpy()
            self._add((), np.array(roles), log_p.T + log_weights)
        elif inside.is_prefix:
            values = [value for value in inside.next_bytes if legal_bytes(lead)[value]]
            log_p = next_byte_log_p(read.logits[:, None], [lead])[:, 0, values].T + log_weights  # (n, M)
            self._add(lead, np.array(values) + tk.BYTE_0, log_p - np.logaddexp.reduce(log_p, axis=None))
        else:
            self._add(lead[:-1], np.array(lead[-1:]), log_weights[None])

    @property
    def bound(self) -> float:
        """No address that was not given yet is likelier than this."""
        best = min((heap[0][0] for heap in (self._open, self._complete) if heap), default=np.inf)
        return float(np.exp(-best))

    def __next__(self) -> Found:
        while not self._complete or (self._open and self._open[0] < self._complete[0]):
            if self._open and self._is_whole(self._open[0]):
                heapq.heappush(self._complete, self._pop())
            elif self._open and self.expansions < self._limit:
                self._expand(self._likeliest_open(min(self._batch, self._limit - self.expansions)))
            else:
                raise StopIteration
        return self._found(heapq.heappop(self._complete))

    def unproven(self, count: int) -> list[Found]:
        """The likeliest addresses that can be given once the limit is hit, to end the search: others may be as likely.

        They are those that were met and not given, and those that `count` of the likeliest prefixes lead to, of which the
        likeliest `count` are kept byte by byte.
        """

        def untaken(first: int, whole: bool) -> list[_Item]:
            return [
                (-family.log_mass[rank], index, rank)
                for index, family in enumerate(self._families[first:], start=first)
                if self._is_whole((0.0, index, 0)) == whole
                for rank in range(family.taken, len(family.tokens))
            ]

        items = self._likeliest_open(count)
        while items:
            first = len(self._families)
            self._expand(items)
            items = heapq.nsmallest(count, untaken(first, whole=False))
        return [self._found(item) for item in heapq.nsmallest(count, self._complete + untaken(0, whole=True))]

    def _likeliest_open(self, count: int) -> list[_Item]:
        """Takes the likeliest prefixes, `count` at most, off the heap."""
        chosen: list[_Item] = []
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
            legal = legal_bytes(node)
            own = self._families[family].log_p[rank]
            self._add(node, np.flatnonzero(legal) + tk.BYTE_0, log_p[:, place, legal].T + own)
        self.expansions += len(items)

    def _logits(self, branches: list[tuple[int, ...]]) -> Tensor:
        """Logits after each of N branches that continue every beginning, (M, N, V)."""
        cache, device = self._read.cache, self._read.logits.device
        M, N, T = len(cache.lengths()), len(branches), max(map(len, branches))
        tokens = torch.tensor([[*branch, *[tk.PADDING] * (T - len(branch))] for branch in branches], device=device)
        side_by_side = tokens.view(1, -1).expand(M, -1)  # (M, N·T)
        logits = self._reader.gpt(side_by_side, cache.fork(), branches=N).view(M, N, T, -1)
        ends = torch.tensor([len(branch) - 1 for branch in branches], device=device)
        return logits[:, torch.arange(N, device=device), ends]

    def _add(self, lead: tuple[int, ...], tokens: np.ndarray, log_p: np.ndarray) -> None:
        """Adds the n `tokens` that may follow `lead`, with log_p (n, M)."""
        log_mass = np.logaddexp.reduce(log_p, axis=1)
        order = np.argsort(-log_mass, kind="stable")
        self._families.append(_Family(lead, tokens[order], log_p[order], log_mass[order]))
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
        return (*family.lead, int(family.tokens[item[2]]))

    def _is_whole(self, item: _Item) -> bool:
        lead = self._families[item[1]].lead  # the role and all bytes but the last
        return bool(lead) and len(lead) == (4 if lead[0] in _IPV4_ROLES else ADDRESS_BYTES)

    def _found(self, item: _Item) -> Found:
        role, *values = self._node(item)
        address = bytes(token - tk.BYTE_0 for token in values)
        packed = (IPV4_MAPPED_PREFIX if role in _IPV4_ROLES else b"") + address
        return Found(Endpoint.whole(packed), self._families[item[1]].log_p[item[2]])


@dataclass(eq=False)
class _Family:
    """The n tokens that may follow `lead`, the likeliest first; the first `taken` are off the heap."""

    lead: tuple[int, ...]
    tokens: np.ndarray  # (n,)
    log_p: np.ndarray  # (n, M)
    log_mass: np.ndarray  # (n,)
    taken: int = 0
