"""Tokens in, what they mean within their field out: the place, the address prefix so far, the RTT so far.

To a byte-level model all bytes look alike: that the third byte of a familiar prefix stands here, or the lower half of an
RTT, is left to attention to find out. These parts of the input say it outright. They are exact functions of the tokens so
far, the same in training, over a cache and for the continuations of a prompt that stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ping_llm.config import ModelConfig

VOCAB_SIZE = 267  # ROLES and bytes
ROLES = 11  # tokens below are roles, the others bytes; the model's tests hold these numbers against the vocabulary's
SRC_ROLES, DST_ROLES, TIME_ROLES = [1, 2], [3, 4], [5, 6, 7]
_ADDRESSES = (*SRC_ROLES, *DST_ROLES)
START, RTT_START, FAILED = 0, 8, 10
WIDTH = 18  # the role at index 0, up to 16 bytes, and one index for what is too long for any field
PLACES = ROLES * WIDTH
WHOLE = (4, 16)  # bytes of an address
SEEN_STATES = 1 << 5  # bits: source, destination, result and time of this measurement; a time anywhere in the window
_COUNTER = 15  # bits that count the sources of a window, its destinations, results and times
_OCTAVES = 14
VALUE_FEATURES = 2 * _OCTAVES
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio; its powers weigh the bytes of a prefix, modulo 2^64


@dataclass(frozen=True)
class FieldState:
    """The field that a prompt is in after its last token: what the embedding of the next one depends on."""

    role: Tensor  # (B,) int64
    index: Tensor  # (B,) int64, bytes since the role
    prefix: Tensor  # (B,) int64, sum over the bytes so far
    code: Tensor  # (B,) int64, sum of the first two bytes, the first 256-fold
    seen: Tensor  # (B,) int64, below SEEN_STATES

    def map(self, function: Callable[[Tensor], Tensor]) -> FieldState:
        """The state of other prompts: each tensor is replaced."""
        return FieldState(*map(function, (self.role, self.index, self.prefix, self.code, self.seen)))


@dataclass(frozen=True)
class FieldFeatures:
    """What the tokens (B, T) mean; padding means something, and nothing of it is used."""

    tokens: Tensor  # (B, T) int64, as they are read: see `coarse`
    place: Tensor  # (B, T) int64, below PLACES
    prefix: Tensor  # (B, T) int64, a 63-bit hash of the role and the bytes so far; 0 where the token is no address byte
    half_codes: Tensor  # (B, T) int64, of the RTT so far, twice its code; −1 where the token is no byte of an RTT
    seen: Tensor  # (B, T) int64, below SEEN_STATES


def read_fields(
    tokens: Tensor, state: FieldState | None = None, src_bytes: tuple[int, int] = WHOLE
) -> tuple[FieldFeatures, FieldState]:
    """Features of tokens (B, T), −1 = padding at the right, that come after `state`; and the state after them.

    Of IPv4 and IPv6 sources `src_bytes` are read, and the others as 0.
    """
    B, T = tokens.shape
    if state is None:  # a window begins with a role, so this one is never read
        zero = tokens.new_zeros(B)
        state = FieldState(zero, zero, zero, zero, zero)
    place = torch.arange(T, device=tokens.device).expand(B, T)
    is_role = (tokens >= 0) & (tokens < ROLES)
    last = last_place(is_role)
    begun = last >= 0
    at = last.clamp(min=0)
    role = torch.where(begun, tokens.gather(1, at), state.role[:, None])
    index = torch.where(begun, place - last, state.index[:, None] + 1 + place).clamp(max=WIDTH - 1)
    tokens = _coarse(tokens, role, index, src_bytes)
    byte = torch.where(tokens >= ROLES, tokens - ROLES, 0)
    weights = _byte_weights(tokens.device)[index]  # (B, T)
    prefix = _since(torch.where(tokens >= ROLES, (byte + 1) * weights, 0), at, begun, state.prefix)
    code = _since(byte * ((index == 1) * 256 + (index == 2)), at, begun, state.code)
    seen = _seen(tokens, is_role, state.seen)

    of_address = (role >= _ADDRESSES[0]) & (role <= _ADDRESSES[-1]) & (index > 0)
    half_codes = 2 * code + (index == 1) * 255  # the middle of the codes that begin with byte 1
    of_rtt = (role == RTT_START) & ((index == 1) | (index == 2))
    features = FieldFeatures(
        tokens,
        role.clamp(0, ROLES - 1) * WIDTH + index,
        torch.where(of_address, mix(prefix + role * ODD), 0),
        torch.where(of_rtt, half_codes, -1),
        seen,
    )
    real = (tokens >= 0).sum(dim=1)  # (B,)
    after = (real - 1).clamp(min=0)[:, None]
    return features, FieldState(
        *(
            torch.where(real > 0, new.gather(1, after)[:, 0], old)
            for new, old in (
                (role, state.role),
                (index, state.index),
                (prefix, state.prefix),
                (code, state.code),
                (seen, state.seen),
            )
        )
    )


class FieldEmbedding(nn.Module):
    """The parts of a token's embedding that its field decides, one table or matrix each; (B, T, D) fp32, their sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.places = nn.Embedding(PLACES, config.n_embd)
        self.prefixes = nn.Embedding(config.prefix_rows, config.n_embd)
        self.values = nn.Linear(VALUE_FEATURES, config.n_embd, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal: the tables with deviation 1, as the tokens' own is, and so is the product with the value's matrix."""
        nn.init.normal_(self.places.weight, std=1.0, generator=generator)
        nn.init.normal_(self.prefixes.weight, std=1.0, generator=generator)
        nn.init.normal_(self.values.weight, std=_OCTAVES**-0.5, generator=generator)

    def forward(self, features: FieldFeatures) -> Tensor:
        """The sum of the parts, (B, T, D)."""
        rows = self.prefixes.num_embeddings
        of_address, of_rtt = (features.prefix != 0)[..., None], (features.half_codes >= 0)[..., None]
        prefix = torch.where(of_address, self.prefixes(features.prefix & (rows - 1)), 0.0)
        octave = torch.arange(_OCTAVES, device=features.half_codes.device)
        # Half a turn over all codes to 2^13 half turns, (B, T, 14); whole turns are dropped before anything is rounded.
        part = (features.half_codes[..., None] << octave) & ((1 << 18) - 1)
        angle = part.to(torch.promote_types(self.values.weight.dtype, torch.float32)) * (math.pi / (1 << 17))
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.values.weight.dtype)
        value = torch.where(of_rtt, self.values(waves), 0.0)
        return self.places(features.place) + prefix + value


def mix(value: Tensor) -> Tensor:
    """A 63-bit hash above 0 whose low bits depend on all bits of the value: the finaliser of SplitMix64.

    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    value = (value ^ _shifted(value, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ _shifted(value, 27)) * (0x94D049BB133111EB - (1 << 64))
    return ((value ^ _shifted(value, 31)) & ((1 << 63) - 1)).clamp(min=1)


def last_place(wanted: Tensor) -> Tensor:
    """Of each token the place of the last one up to it that is `wanted`, (B, T) bool; −1 before the first: (B, T) int64."""
    place = torch.arange(wanted.shape[1], device=wanted.device).expand(wanted.shape)
    return place.masked_fill(~wanted, -1).cummax(dim=1).values


def coarse(tokens: Tensor, src_bytes: tuple[int, int]) -> Tensor:
    """Windows (B, T) with only so many bytes of IPv4 and IPv6 sources, the others 0; negative tokens stay as they are."""
    if src_bytes == WHOLE:
        return tokens
    last = last_place((tokens >= 0) & (tokens < ROLES)).clamp(min=0)
    index = torch.arange(tokens.shape[1], device=tokens.device) - last
    return _coarse(tokens, tokens.gather(1, last), index, src_bytes)


def _coarse(tokens: Tensor, role: Tensor, index: Tensor, src_bytes: tuple[int, int]) -> Tensor:
    """Tokens (B, T) that stand at `index` of the field of `role`, both (B, T), as they are read."""
    if src_bytes == WHOLE:
        return tokens
    unread = (role == SRC_ROLES[0]) & (index > src_bytes[0]) | (role == SRC_ROLES[1]) & (index > src_bytes[1])
    return torch.where(unread & (tokens >= ROLES), ROLES, tokens)


def _since(amounts: Tensor, at: Tensor, begun: Tensor, before: Tensor) -> Tensor:
    """Sums (B, T) of `amounts` since the last role at place `at`, whose own amount is 0; `before` counts where none was."""
    total = amounts.cumsum(dim=1)
    return total - torch.where(begun, total.gather(1, at), -before[:, None])


def _seen(tokens: Tensor, is_role: Tensor, before: Tensor) -> Tensor:
    """Which fields of its measurement came up to each token, and whether a time ever did, (B, T); `before`: (B,), so far."""
    amounts = torch.zeros(ROLES, dtype=torch.int64, device=tokens.device)
    for kind, roles in enumerate((SRC_ROLES, DST_ROLES, [RTT_START, FAILED], TIME_ROLES)):
        amounts[roles] = 1 << _COUNTER * kind
    counts = torch.where(is_role, amounts[tokens.clamp(0, ROLES - 1)], 0).cumsum(dim=1)  # of each kind, in one number
    start = last_place(tokens == START)
    begun, at = start >= 0, start.clamp(min=0)
    within = counts - torch.where(begun, counts.gather(1, at), 0)
    seen = torch.where(begun, 0, before[:, None]) & (SEEN_STATES // 2 - 1)
    for kind in range(4):
        seen = seen | ((within >> _COUNTER * kind & (1 << _COUNTER) - 1 > 0) * (1 << kind))
    timed = (counts >> _COUNTER * 3 > 0) | (before[:, None] >= SEEN_STATES // 2)
    return seen | timed * (SEEN_STATES // 2)


def _byte_weights(device: torch.device) -> Tensor:
    """What a byte at each index of a field is multiplied by in the sum of a prefix, (18,) int64, modulo 2^64; all odd."""
    weights, value = [], 1
    for _ in range(WIDTH):
        weights.append(value - (1 << 64) if value >= 1 << 63 else value)
        value = value * (ODD % (1 << 64)) % (1 << 64)
    return torch.tensor(weights, device=device)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """int64 shifted right as if it were unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
