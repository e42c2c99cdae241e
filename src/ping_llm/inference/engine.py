"""Prompts in, exact distributions of their results out: every forward pass of a query is made here or in search.py.

A prompt ends where its result comes next. One pass gives P(FAILED), P(RTT_START) and P(byte 1); a second runs the values of
byte 1 side by side over the same cache and gives P(byte 2 | byte 1). That is the probability of every possible result;
nothing is sampled. Values of byte 1 of hardly any probability are left out of the second pass, which the answer reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ping_llm.data import tokenization as tk
from ping_llm.data.measurement import IPV4_MAPPED_PREFIX
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.grammar import Grammar, follow
from ping_llm.inference.memory import Memory
from ping_llm.inference.prompt import DST_ROLES, SRC_ROLES, Prompt, byte_tokens
from ping_llm.model.gpt import GPT, KVCache, answering_at
from ping_llm.model.legal import ILLEGAL

LEAST_MASS = 1e-7
"""Values of byte 1 below this probability, among results, are not followed: their byte 2 is taken as uniform."""
FOCUS_MASS = 1e-3
"""Likewise where only some statistics are wanted, and the value does not decide any of them."""
MOST_PARTS = 32  # of one query, that are followed at a value of byte 1 for what is wanted: they speak for the others
TOKENS_OF_A_PASS = 2048  # after what was read before
PASS_TOKENS = 64  # that a pass costs beside those it reads
_LINES = 256  # token sequences read together
_BYTES = slice(tk.BYTE_0, tk.VOCAB_SIZE)
_RESULTS = (tk.RTT_START, tk.FAILED)
_TIMES = (tk.TIMESTAMP_ABS, tk.TIMESTAMP_DELTA1, tk.TIMESTAMP_DELTA4)
_KIND = np.arange(tk.VOCAB_SIZE)
for _tokens in (DST_ROLES, SRC_ROLES, _RESULTS, _TIMES, range(tk.BYTE_0, tk.VOCAB_SIZE)):
    _KIND[list(_tokens)] = _tokens[0]
SAME_KIND = _KIND[:, None] == _KIND
"""Which tokens could stand in place of each, (V, V): the roles of the same field, or the bytes."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A trained model and how to run it.

    Values of byte 1 of an RTT less likely than `least_mass` are not followed; 0 computes all 65,536 codes.
    """

    gpt: GPT
    device: torch.device
    calibration: Calibration = field(default_factory=Calibration)
    precision: Literal["fp32", "bf16"] = "fp32"
    least_mass: float = LEAST_MASS
    memory: Memory | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r} must be fp32 or bf16")

    @property
    def seq_len(self) -> int:
        """Tokens that the model reads at most."""
        return self.gpt.config.seq_len

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The precision of the forward passes, as a context; fp32 leaves that of the caller."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def pad(self, lines: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Token sequences as one (B, T) tensor, padded at the right, and their lengths (B,), on the device."""
        lengths = np.array([len(line) for line in lines])
        tokens = np.full((len(lines), max(int(lengths.max()), 1)), tk.PADDING, dtype=np.int64)
        for row, line in zip(tokens, lines, strict=True):
            row[: len(line)] = line
        return torch.from_numpy(tokens).to(self.device), torch.from_numpy(lengths).to(self.device)


@dataclass(frozen=True, eq=False)
class ReadContexts:
    """Beginnings of prompts, contexts and maybe more, that were read once, to be continued by any number of prompts."""

    cache: KVCache  # one prompt a beginning
    log_likelihood: np.ndarray  # (C,) nats, of their results to byte 1, each given what stands before it
    lengths: np.ndarray  # (C,) tokens of each


@torch.inference_mode()
def read_contexts(reader: Reader, contexts: Sequence[np.ndarray], likelihoods: bool = True) -> ReadContexts:
    """Reads C contexts, each (T,) tokens, together; one may be empty. Without `likelihoods` these are 0."""
    tokens, lengths = reader.pad(contexts)
    cache, nexts = KVCache(), tokens[:, 1:]
    results = torch.tensor(_RESULTS, device=nexts.device)
    is_result = torch.isin(nexts, results)  # (C, T−1)
    is_byte_1 = tokens[:, :-1] == tk.RTT_START
    wanted = (is_result | is_byte_1) & likelihoods
    most = max(1, int(wanted.sum(1).max()))
    places = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (C, P), those wanted first
    if not places.shape[1]:
        places = lengths[:, None] * 0
    with reader.autocast():
        states = answering_at(reader.gpt, places).states(tokens, cache)  # (C, P, D)
        log_likelihood = np.zeros(len(contexts))
        if wanted.any():
            logits = reader.gpt.logits(states).double()  # (C, P, V)
            coming = nexts.gather(1, places)  # (C, P)
            of_result = logits[..., results].log_softmax(-1).gather(-1, (coming == tk.FAILED).long()[..., None])[..., 0]
            byte_1 = (coming - tk.BYTE_0).clamp(0, 255)
            of_byte_1 = logits[..., _BYTES].log_softmax(-1).gather(-1, byte_1[..., None])[..., 0]
            of_each = of_result * is_result.gather(1, places) + of_byte_1 * is_byte_1.gather(1, places)
            log_likelihood = (of_each * wanted.gather(1, places)).sum(1).cpu().numpy()
    return ReadContexts(cache, log_likelihood, lengths.cpu().numpy())


@dataclass(frozen=True, eq=False)
class Focus:
    """What is wanted of distributions: values of byte 1 that neither hold it nor are likely are not followed.

    Beside P(answer), mean and CRPS, which a value of little probability hardly changes, those are the quantiles at `levels`
    (Q,), and what is said of results that were observed: `observed` (n, 256) holds their byte 1, for each of n queries.
    """

    levels: np.ndarray
    observed: np.ndarray | None = None

    @classmethod
    def on(cls, levels: np.ndarray, queries: int, query: np.ndarray, rtt_ms: np.ndarray) -> Focus:
        """With the results (m,) ms, −1 or NaN = no RTT, of the queries numbered (m,)."""
        observed, answered = np.zeros((queries, 256), dtype=bool), rtt_ms >= 0
        observed[query[answered], tk.encode_rtt(rtt_ms[answered]) >> 8] = True
        return cls(levels, observed)

    def take(self, rows: np.ndarray) -> Focus:
        """That of some queries."""
        return Focus(self.levels, None if self.observed is None else self.observed[rows])

    def values(self, byte_1: Tensor) -> Tensor:
        """Which values of byte 1 hold what is wanted, (n, 256) bool, where the values have the probabilities (n, 256)."""
        below = byte_1.cumsum(1) / byte_1.sum(1, keepdim=True)
        levels = torch.from_numpy(self.levels).to(below).expand(len(below), -1).contiguous()
        wanted = torch.zeros_like(byte_1, dtype=torch.bool)
        wanted.scatter_(1, torch.searchsorted(below.contiguous(), levels).clamp(max=255), True)
        return wanted if self.observed is None else wanted | torch.from_numpy(self.observed).to(wanted.device)


@torch.inference_mode()
def result_distributions(
    reader: Reader,
    prompts: Sequence[Prompt],
    read: ReadContexts | None = None,
    context_of: Sequence[int] | np.ndarray = (),
    owner: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    focus: Focus | None = None,
) -> RTTDistribution:
    """The distributions of the results that come after B prompts, normalised over all results.

    With `read`, prompt i begins with its `context_of[i]`-th, which is not read again. With `owner`, (B,) ascending from
    0 to n − 1, there are n mixtures of the distributions that belong together, whose `weights` (B,) sum to 1; with weights
    (M, B) there are M times n, those of the first weights first. `focus` says what is wanted of the n. `total_probability`
    is the mass that results had among all that the model could say but what is legal there and no result: a query is about
    its result now, not whether a timestamp comes first. `unresolved` is the probability of RTTs of which only byte 1 was
    computed, which bounds the error of any probability. Where the least mass of the reader is 0, all is computed.
    """
    also_legal = np.zeros((len(prompts), tk.VOCAB_SIZE), dtype=bool)
    for line, prompt in zip(also_legal, prompts, strict=True):
        line[prompt.also_legal] = True
    no_result = torch.from_numpy(also_legal).to(reader.device)
    role, first, groups = _first_bytes(reader, prompts, no_result, read, np.asarray(context_of, dtype=np.int64))
    device = role.device
    mass_1, failed = role[:, tk.RTT_START, None] * first, role[:, tk.FAILED]  # (B, 256), (B,)
    mixing = torch.arange(len(prompts)) if owner is None else torch.from_numpy(owner)
    weight = torch.ones(1, len(prompts)) if weights is None else torch.from_numpy(np.atleast_2d(weights))
    mixing, weight = mixing.to(device), weight.to(device, torch.float64)
    M, n = len(weight), int(mixing[-1]) + 1

    def mixed(columns: Tensor) -> Tensor:  # (M, B, …) to (M, n, …)
        return columns.new_zeros(M, n, *columns.shape[2:]).index_add_(1, mixing, columns)

    # Of a mixture, up to tokens that are no bytes, (M, B, 256).
    share = mass_1 * (weight / (mass_1.sum(1) + failed))[..., None]
    wanted = None
    if focus is not None and reader.least_mass:
        wanted = torch.stack([focus.values(values) for values in mixed(share)])[:, mixing]  # (M, B, 256)
    followed, spoken_for = _followed(share, wanted, reader.least_mass, parts=n == 1)
    codes = torch.zeros(M, n, 256, 256, device=device, dtype=reader.gpt.embedding.weight.dtype)
    mass, passes = (mass_1 * ~followed).sum(1) + failed, len(groups)  # mass: of all results of each prompt
    for group, cache in groups:
        for rows, (place, byte_1), second in _second_bytes(reader, cache, followed[group]):
            row = group[rows][place]  # (f,) of each value that is followed
            within = mass_1[row, byte_1, None] * second  # (f, 256)
            mass.index_add_(0, row, within.sum(1))
            for one, scale in zip(codes, (weight / mass)[:, row, None], strict=True):
                one.view(-1, 256).index_add_(0, mixing[row] * 256 + byte_1, (within * scale).to(one))
            passes += 1
    scale = weight / mass  # (M, B)
    unfollowed = mixed(mass_1 * ~followed * scale[..., None])  # (M, n, 256)
    resolved, alike = codes.sum(3, dtype=torch.float64), mixed(mass_1 * spoken_for * scale[..., None])
    codes *= torch.where(resolved > 0, 1 + alike / resolved, 1.0).to(codes)[..., None]
    codes += (torch.where(resolved > 0, unfollowed - alike, unfollowed) / 256).to(codes)[..., None]
    total = weight * (mass / (1 - role.masked_fill(~no_result, 0.0).sum(1))).clamp(max=1.0)
    context = torch.tensor([prompt.context_measurements for prompt in prompts], device=device)
    context = context.new_zeros(n).scatter_reduce(0, mixing, context, "amax").repeat(M)
    return RTTDistribution(
        codes.view(M * n, -1).cpu().numpy(),
        mixed(failed * scale).flatten().cpu().numpy(),
        total_probability=mixed(total).flatten().cpu().numpy(),
        forward_passes=passes + (read is not None),
        context_measurements=context.cpu().numpy(),
        unresolved=unfollowed.sum(2).flatten().cpu().numpy(),
    )


def _followed(share: Tensor, wanted: Tensor | None, least_mass: float, parts: bool) -> tuple[Tensor, Tensor]:
    """Which values of byte 1 are followed after B prompts, and which those of likelier parts speak for, (B, 256) bool.

    `share` (M, B, 256) is their probability in the mixtures. Where only values `wanted` (M, B, 256) must be resolved, others
    are followed from FOCUS_MASS on; if the prompts are `parts` of one query, only MOST_PARTS of them at each.
    """
    followed = (share >= (least_mass if wanted is None else max(FOCUS_MASS, least_mass))).any(0)
    spoken_for = torch.zeros_like(followed)
    if wanted is not None:
        chosen = (wanted & (share >= least_mass)).any(0)
        if parts and share.shape[1] > MOST_PARTS:
            likeliest = share.amax(0)
            spoken_for = chosen & ~followed & (likeliest < likeliest.topk(MOST_PARTS, dim=0).values[-1])
        followed |= chosen & ~spoken_for
    return followed, spoken_for


def _first_bytes(
    reader: Reader, prompts: Sequence[Prompt], no_result: Tensor, read: ReadContexts | None, context_of: np.ndarray
) -> tuple[Tensor, Tensor, list[tuple[Tensor, KVCache]]]:
    """P(token) after B prompts, (B, V), P(byte) after RTT_START, (B, 256), and what was read of some prompts (b,) at a time.

    `no_result` (B, V) is what the grammar allows besides results.
    Prompts of which about equally much is left to read are read together.
    """
    begun = np.zeros(len(prompts), dtype=np.int64) if read is None else read.lengths[context_of]
    own = [np.append(prompt.tokens[first:], tk.RTT_START) for prompt, first in zip(prompts, begun, strict=True)]
    left = np.array([len(line) for line in own])
    order, groups = np.argsort(left, kind="stable"), []
    role = torch.empty(len(prompts), tk.VOCAB_SIZE, dtype=torch.float64, device=reader.device)
    first = torch.empty(len(prompts), 256, dtype=torch.float64, device=reader.device)
    result = torch.zeros(tk.VOCAB_SIZE, dtype=torch.bool, device=reader.device)
    result[list(_RESULTS)] = True
    for some in _alike(left[order]):
        rows = np.sort(order[some])
        tokens, lengths = reader.pad([own[i] for i in rows])
        group = torch.from_numpy(rows).to(reader.device)
        cache = KVCache() if read is None else read.cache.select(torch.from_numpy(context_of[rows]).to(reader.device))
        with reader.autocast():
            ends = torch.stack([lengths - 2, lengths - 1], dim=1)  # (b, 2)
            logits = reader.gpt.logits(answering_at(reader.gpt, ends).states(tokens, cache))  # (b, 2, V)
        of_role = logits[:, 0]
        if reader.gpt.config.grammar:
            of_role = of_role.masked_fill(~(result | no_result[group]), ILLEGAL)
        role[group], first[group] = of_role.double().softmax(-1), _of_bytes(reader.gpt, logits[:, 1])
        groups.append((group, cache))
    return role, first, groups


def _second_bytes(
    reader: Reader, cache: KVCache, followed: Tensor
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
    """P(byte 2 | byte 1) of the values of byte 1 that are `followed`, (B, 256) bool, some prompts at a time.

    Of each pass: the rows (b,) of its prompts; of each of f values the place among these rows and byte 1, (f,) both; and
    P(byte 2), (f, 256). Prompts that follow about equally many stand together: they are padded to the most.
    """
    counts = followed.sum(1)
    order = counts.argsort(stable=True)
    for some in _alike(counts[order].cpu().numpy()):
        rows = order[some]
        width = max(1, int(counts[rows].max()))
        byte_1 = followed[rows].int().argsort(dim=1, descending=True, stable=True)[:, :width]  # followed ones first
        used = torch.arange(width, device=rows.device) < counts[rows, None]  # (b, width)
        tokens = torch.where(used, byte_1 + tk.BYTE_0, tk.PADDING)
        everything = torch.equal(rows, torch.arange(len(order), device=rows.device))
        row, place = used.nonzero(as_tuple=True)
        with reader.autocast():
            own = cache.fork() if everything else cache.select(rows)
            states = reader.gpt.states(tokens, own, branches=width)  # (b, width, D)
            second = _of_bytes(reader.gpt, reader.gpt.logits(states[row, place]))
        yield rows, (row, byte_1[row, place]), second


def _of_bytes(gpt: GPT, logits: Tensor) -> Tensor:
    """Probabilities of the bytes, (…, 256), where only bytes are legal, of logits (…, V)."""
    if gpt.config.grammar:
        return logits[..., _BYTES].double().softmax(-1)
    return logits.double().softmax(-1)[..., _BYTES]


def _alike(counts: np.ndarray) -> list[slice]:
    """Stretches of `counts` (B,), which ascend: those that cost least, where each is padded to its largest one."""
    widths = np.maximum(counts, 1)
    cost, begin = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=np.int64)
    for end, width in enumerate(widths, start=1):
        tokens = width * np.arange(end, 0, -1)  # of a stretch from each place up to `end`
        total = cost[:end] + tokens + PASS_TOKENS
        total[:-1][tokens[:-1] > TOKENS_OF_A_PASS] = np.inf
        begin[end] = total.argmin()
        cost[end] = total[begin[end]]
    stretches, end = [], len(widths)
    while end:
        stretches.append(slice(int(begin[end]), end))
        end = int(begin[end])
    return stretches[::-1]


@torch.inference_mode()
def line_log_prob(reader: Reader, lines: Sequence[np.ndarray], context: np.ndarray) -> np.ndarray:
    """Log-probability in nats of each of n measurements (T,) after the same context (tokens), (n,).

    Each token counts among the legal ones of its kind: roles of the same field, or bytes.
    """
    start, read, log_p = Grammar(1), KVCache(), np.empty(len(lines))
    follow(start, context)
    if len(context):
        with reader.autocast():
            reader.gpt(reader.pad([context])[0], read)
    longest_first = np.argsort([-len(line) for line in lines], kind="stable")
    for first in range(0, len(lines), _LINES):
        rows = longest_first[first : first + _LINES]
        given = reader.gpt.as_read(reader.pad([lines[i] for i in rows])[0])  # (B, T)
        same = torch.zeros(len(rows), dtype=torch.int64, device=reader.device)
        with reader.autocast():
            logits = reader.gpt(given[:, :-1], read.select(same) if len(context) else None).double()  # (B, T−1, V)
        grammar, legal = start.select(np.zeros(len(rows), dtype=np.int64)), []
        for token, coming in pairwise(given.cpu().numpy().T):
            grammar.advance(np.where(token == tk.PADDING, tk.MEASUREMENT_START, token))
            legal.append(grammar.legal() & SAME_KIND[coming])
        masked = logits.masked_fill(~torch.from_numpy(np.stack(legal, axis=1)).to(reader.device), -torch.inf)
        of_tokens = masked.log_softmax(-1).gather(-1, given[:, 1:].clamp(min=0)[..., None])[..., 0]
        log_p[rows] = torch.where(given[:, 1:] >= 0, of_tokens, 0.0).sum(1).cpu().numpy()
    return log_p


@dataclass(frozen=True, eq=False)
class Beginnings:
    """M beginnings of a measurement that were read."""

    cache: KVCache  # one beginning a row
    logits: Tensor  # (M, V) float64, after the last token
    log_evidence: np.ndarray  # (M,) nats: of the tokens that were given, each among the others of its kind


@torch.inference_mode()
def read_beginnings(reader: Reader, lines: Sequence[np.ndarray], given: Sequence[int]) -> Beginnings:
    """Reads M token sequences (T,); those of the i-th from place `given[i]` on are evidence, whose probability counts."""
    (tokens, lengths), cache = reader.pad(lines), KVCache()
    with reader.autocast():
        logits = reader.gpt(tokens, cache)  # (M, T, V)
    log_evidence = []
    for row, line, first, length in zip(logits, tokens, given, lengths.tolist(), strict=True):
        evidence = line[first:length]
        competing = torch.from_numpy(SAME_KIND).to(evidence.device)[evidence]  # (n, V)
        log_p = row[first - 1 : length - 1].double().masked_fill(~competing, -torch.inf).log_softmax(-1)
        log_evidence.append(float(log_p.gather(1, evidence[:, None]).sum()))
    return Beginnings(
        cache, logits[torch.arange(len(lines), device=lengths.device), lengths - 1].double(), np.array(log_evidence)
    )


def next_byte_log_p(logits: Tensor, beginnings: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Log-probability of each byte next in a whole address, (…, N, 256), of logits (…, N, V) after N roles and bytes."""
    legal = torch.from_numpy(np.stack([legal_bytes(tokens) for tokens in beginnings])).to(logits.device)  # (N, 256)
    return logits[..., _BYTES].double().masked_fill(~legal, -torch.inf).log_softmax(-1).cpu().numpy()


def legal_bytes(tokens: tuple[int, ...]) -> np.ndarray:
    """Which bytes may follow a role and bytes, (256,): IPv6 addresses are never IPv4-mapped."""
    legal = np.ones(256, dtype=bool)
    *lead, last = IPV4_MAPPED_PREFIX
    legal[last] = tokens not in [(role, *byte_tokens(bytes(lead))) for role in (tk.SRC_IPV6, tk.DST_IPV6)]
    return legal
