"""A model and a prompt in, whole measurements out: sampled token by token, each token legal under the grammar."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ping_llm.data import tokenization as tk
from ping_llm.data.times import LAST_TIME_S, parse_time
from ping_llm.inference.engine import Reader
from ping_llm.inference.grammar import Grammar, follow
from ping_llm.inference.prompt import DST_ROLES, SRC_ROLES, address_tokens, time_tokens
from ping_llm.inference.query import Endpoint
from ping_llm.model.gpt import KVCache

GENERATED_SCHEMA = pa.schema(
    [
        ("src_addr", pa.string()),  # an address, or a prefix like 192.0.2.0/24
        ("dst_addr", pa.string()),
        ("event_time", pa.timestamp("s", "UTC")),  # null if it has none
        ("rtt", pa.float64()),  # ms, −1 = failed
        ("log_prob", pa.float64()),  # nats
        ("sequence", pa.int64()),  # 0 to count − 1; its measurements follow one another
    ]
)
_BATCH = 256  # sequences generated side by side: their keys and values lie in memory together


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution: temperature, then top-k, top-p and min-p, each of what is left."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, the lowest of equals."""
    top_k: int = 0
    """Keeps the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest likeliest tokens that hold this probability."""
    min_p: float = 0.0
    """Keeps the tokens that have this share of the probability of the likeliest."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be the number of tokens to keep, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (keeps all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 (keeps all) and 1")

    def distribution(self, log_p: Tensor) -> Tensor:
        """The probabilities (B, V) that tokens are drawn with, from log-probabilities (B, V)."""
        ordered, token = log_p.sort(dim=-1, descending=True, stable=True)  # (B, V)
        likeliest = ordered[:, :1]
        if self.temperature == 0:
            p = (torch.arange(ordered.shape[1], device=ordered.device) == 0).to(ordered.dtype).expand_as(ordered)
        else:
            p = ((ordered - likeliest) / self.temperature).softmax(-1)
        if self.top_k:
            p = _kept(p, torch.arange(p.shape[1], device=p.device) < self.top_k)
        if self.top_p < 1:
            p = _kept(p, p.cumsum(-1) - p < self.top_p)
        if self.min_p:
            p = _kept(p, p >= self.min_p * p[:, :1])
        return torch.zeros_like(p).scatter(1, token, p)


def generate(
    reader: Reader,
    count: int,
    *,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    prompt_tokens: Sequence[int] | np.ndarray | None = None,
    measurements: int = 1,
    whole_addresses: bool = True,
) -> pa.Table:
    """Draws `count` sequences of `measurements` measurements each: a table of GENERATED_SCHEMA.

    `prompt_tokens` (T,) is the beginning of a window, which every sequence continues: the measurement it breaks off in
    is completed first and counts; to begin a new one, end it with MEASUREMENT_START. `log_prob` is the probability of
    the tokens of a measurement that follow the prompt, and that it ends there, under the model restricted to legal
    tokens, at temperature 1 and unfiltered. Sequence i depends on the seed and i, not on `count`; without a seed every call
    draws anew.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    for name, value in (("count", count), ("measurements", measurements)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    seed = secrets.randbits(63) if seed is None else seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2^63 − 1")
    prompt = [] if prompt_tokens is None else [int(token) for token in prompt_tokens]
    prompt = prompt or [tk.MEASUREMENT_START]
    grammar, longest = _follow_prompt(prompt, whole_addresses, measurements, reader.seq_len)
    generator = torch.Generator().manual_seed(seed)  # on the CPU whatever the device: the same numbers everywhere
    drawn = []
    for first in range(0, count, _BATCH):
        noise = torch.rand(min(_BATCH, count - first), longest, generator=generator, dtype=torch.float64)
        with reader.autocast():
            drawn.append(_generate_batch(reader, prompt, grammar, noise, sampling, measurements))
    tokens, log_prob = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return _table(prompt, tokens, log_prob)


def prompt_of(src: str, dst: str, at: str) -> list[int]:
    """The tokens of a measurement of which some is known, each "" if not, to be completed.

    A prefix comes last: its other bytes follow. ValueError where that is impossible.
    """
    ends = [(Endpoint.parse(text), roles) for text, roles in ((src, SRC_ROLES), (dst, DST_ROLES)) if text]
    for end, _ in ends:
        if end.extra_bits:
            whole = f"/{8 * end.known_bytes} or /{8 * end.known_bytes + 8}"
            raise ValueError(f"{end} does not end on a byte, and samples complete whole bytes; give one like {whole}")
    if sum(end.is_prefix for end, _ in ends) > 1:
        raise ValueError(f"{src} and {dst} are both prefixes, and only one can be completed; give the other one whole")
    fields = [(end.is_prefix, address_tokens(roles, end).tolist()) for end, roles in ends]
    fields += [(False, time_tokens(parse_time(at)))] if at else []
    fields.sort(key=lambda field: field[0])
    return [tk.MEASUREMENT_START, *(token for _, tokens in fields for token in tokens)]


def format_measurements(table: pa.Table) -> str:
    """One aligned line for each measurement of a table of GENERATED_SCHEMA."""
    rows = [
        (
            row["src_addr"],
            f"→ {row['dst_addr']}",
            f"{row['event_time']:%Y-%m-%dT%H:%M:%SZ}" if row["event_time"] else "no time",
            "no answer" if row["rtt"] < 0 else f"{row['rtt']:.3f} ms",
            f"{row['log_prob']:.1f} nats",
        )
        for row in table.to_pylist()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<<<>>"
    return "\n".join("  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, aligns, widths, strict=True)) for row in rows)


def _kept(p: Tensor, keep: Tensor) -> Tensor:
    """Probabilities (B, V) of which only some are kept, normalised again."""
    p = torch.where(keep, p, 0.0)
    return p / p.sum(-1, keepdim=True)


def _follow_prompt(prompt: list[int], whole_addresses: bool, measurements: int, seq_len: int) -> tuple[Grammar, int]:
    """Where a window stands after the prompt, and how many tokens may be drawn then at most.

    ValueError where it cannot be continued, or what is drawn would not fit.
    """
    grammar = Grammar(1, whole_addresses=whole_addresses, last_time_s=LAST_TIME_S)
    try:
        follow(grammar, prompt)
    except ValueError as error:
        prefixes = "; for prefixes of addresses pass whole_addresses=False" if whole_addresses else ""
        raise ValueError(f"the prompt breaks the grammar at {error}{prefixes}") from None
    if grammar.ended()[0]:
        raise ValueError("the prompt ends with a whole measurement; append MEASUREMENT_START to begin the next one")
    room = seq_len + 1 - len(prompt)  # the last token is drawn but not read
    first, second, longest = (int(grammar.longest(count)[0]) for count in (1, 2, measurements))
    if longest > room:
        fits = (room - first) // (second - first) + 1 if room >= first else 0
        todo = f"pass measurements={fits} at most" if fits else "shorten the prompt"
        raise ValueError(
            f"measurements={measurements} may take {longest} tokens after a prompt of {len(prompt)}, "
            f"and the model reads {seq_len}: {fits} fit; {todo}"
        )
    return grammar, longest


@torch.inference_mode()
def _generate_batch(
    reader: Reader, prompt: list[int], grammar: Grammar, noise: Tensor, sampling: Sampling, measurements: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens after the prompt, (B, N) int64 and PADDING, and nats of each measurement, (B, measurements).

    `noise` (B, N) decides the draws. Sequences that are complete leave the batch.
    """
    (B, N), gpt, device = noise.shape, reader.gpt, reader.device
    tokens = np.full((B, N), tk.PADDING, dtype=np.int64)
    log_prob, ended = np.zeros((B, measurements)), np.zeros(B, dtype=np.int64)
    cache = KVCache()
    logits = gpt(torch.tensor([prompt], device=device), cache)[:, -1].expand(B, -1)  # (B, V): the prompt is read once
    cache, grammar = cache.select(torch.zeros(B, dtype=torch.int64, device=device)), grammar.select(np.zeros(B, int))
    going = np.arange(B)
    for step in range(N):
        legal = torch.from_numpy(grammar.legal()).to(device)
        token, log_p = _draw(logits, legal, noise[going, step].to(device), sampling)
        drawn = token.cpu().numpy()
        log_prob[going, ended[going]] += log_p.cpu().numpy()
        ended[going] += drawn == tk.MEASUREMENT_START
        grammar.advance(drawn)
        goes_on = ended[going] < measurements
        tokens[going[goes_on], step] = drawn[goes_on]
        goes_on &= (ended[going] < measurements - 1) | ~grammar.ended()
        if not goes_on.any():
            break
        if not goes_on.all():
            rows = torch.from_numpy(np.flatnonzero(goes_on)).to(device)
            cache, token = cache.select(rows), token[rows]
            grammar, going = grammar.select(goes_on), going[goes_on]
        logits = gpt(token[:, None], cache)[:, -1]  # (b, V)
    return tokens, log_prob


def _draw(logits: Tensor, legal: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A legal token for each of B rows, (B,), and its unfiltered log-probability, (B,); `noise` (B,) is from [0, 1)."""
    log_p = logits.double().masked_fill(~legal, -torch.inf).log_softmax(-1)  # (B, V)
    cdf = sampling.distribution(log_p).cumsum(-1)
    total = cdf[:, -1]
    below = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))  # a product may round up
    token = (cdf <= below[:, None]).sum(-1)
    return token, log_p.gather(1, token[:, None])[:, 0]


def _table(prompt: list[int], tokens: np.ndarray, log_prob: np.ndarray) -> pa.Table:
    """The last measurements of each sequence, as many as log_prob (count, measurements) has; tokens are (count, N)."""
    count, measurements = log_prob.shape
    windows = ([*prompt, *line[line != tk.PADDING].tolist()] for line in tokens)
    decoded = [measurement for window in windows for measurement in tk.decode(window)[-measurements:]]
    columns = {
        "src_addr": [_address(m.src, m.src_bits) for m in decoded],
        "dst_addr": [_address(m.dst, m.dst_bits) for m in decoded],
        "event_time": [m.time_s for m in decoded],
        "rtt": [m.rtt_ms for m in decoded],
        "log_prob": log_prob.ravel(),
        "sequence": np.repeat(np.arange(count), measurements),
    }
    return pa.table(columns, schema=GENERATED_SCHEMA)


def _address(text: str, bits: int) -> str:
    return text if bits == (128 if ":" in text else 32) else f"{text}/{bits}"
