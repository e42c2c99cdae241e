"""Prompts in, exact laws of their results out: a pass over the prompts, and one over the first bytes that matter.

A prompt ends where its result comes next. One pass gives P(FAILED), P(RTT_START) and P(byte 1); a second runs the values of
byte 1 side by side over the same cache and gives P(byte 2 | byte 1). That is the probability of every possible result;
nothing is sampled. Values of byte 1 of hardly any probability are left out of the second pass, and told so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ping_llm.data import tokenization as tk
from ping_llm.inference.distributions import RTTDistributions
from ping_llm.inference.prompt import Prompt
from ping_llm.model.gpt import GPT, KVCache, sibling_mask

LEAST_MASS = 1e-7
"""Values of byte 1 below this probability, among results, are not followed: their byte 2 is taken as uniform."""
SECOND_PASS_PROMPTS = 16  # prompts whose second bytes are computed together: they follow about as many values of byte 1
_BYTES = slice(tk.BYTE_0, tk.VOCAB_SIZE)


@dataclass(frozen=True, eq=False)
class ReadContexts:
    """Contexts that were read once, to be continued by any number of prompts."""

    cache: KVCache  # one prompt a context
    log_likelihood: np.ndarray  # (C,) nats, of their results told to byte 1, each given what was told before it


@torch.inference_mode()
def read_contexts(gpt: GPT, contexts: Sequence[np.ndarray]) -> ReadContexts:
    """Reads C contexts, each (T,) tokens, together; one may be empty."""
    tokens, _ = _pad(contexts, gpt)
    cache = KVCache()
    logits = gpt(tokens, cache)[:, :-1].double()  # (C, T−1, V)
    nexts = tokens[:, 1:]
    results = torch.tensor([tk.RTT_START, tk.FAILED], device=nexts.device)
    is_result = torch.isin(nexts, results)  # (C, T−1)
    of_result = logits[..., results].log_softmax(-1).gather(-1, (nexts == tk.FAILED).long()[..., None])[..., 0]
    is_byte_1 = tokens[:, :-1] == tk.RTT_START
    byte_1 = (nexts - tk.BYTE_0).clamp(0, 255)
    of_byte_1 = logits[..., _BYTES].log_softmax(-1).gather(-1, byte_1[..., None])[..., 0]
    log_likelihood = (of_result * is_result + of_byte_1 * is_byte_1).sum(1)
    return ReadContexts(cache, log_likelihood.cpu().numpy())


@torch.inference_mode()
def result_laws(
    gpt: GPT,
    prompts: Sequence[Prompt],
    read: ReadContexts | None = None,
    context_of: Sequence[int] = (),
    least_mass: float = LEAST_MASS,
) -> RTTDistributions:
    """The laws of the results that come after B prompts, normalised over all results.

    With `read`, the context of prompt i is its `context_of[i]`-th and is not read again. `total_probability` is the mass
    that results had among all that the model could say but what is legal there and no result: a query asks for its result
    now, not whether a timestamp comes first. `unresolved` is the probability of RTTs of which only byte 1 was computed,
    which bounds the error of any probability.
    """
    told = [prompt.tokens if read is None else prompt.tokens[prompt.context_length :] for prompt in prompts]
    tokens, lengths = _pad([np.append(line, tk.RTT_START) for line in told], gpt)
    cache = KVCache() if read is None else read.cache.select(torch.tensor(list(context_of), device=tokens.device))
    logits = gpt(tokens, cache)  # (B, T, V)
    batch, end = torch.arange(len(prompts), device=tokens.device), lengths - 1  # end: place of RTT_START
    role = logits[batch, end - 1].double().softmax(-1)  # (B, V) after the last told field
    first = logits[batch, end].double().softmax(-1)[:, _BYTES]  # (B, 256) after RTT_START
    mass_1 = role[:, tk.RTT_START, None] * first  # (B, 256)
    followed = mass_1 >= least_mass * role[:, [tk.RTT_START, tk.FAILED]].sum(1, keepdim=True)
    second, passes = _second_bytes(gpt, cache, followed)  # (B, 256, 256)

    codes = mass_1[..., None] * second
    failed = role[:, tk.FAILED]
    mass = codes.sum((1, 2)) + failed
    no_result = torch.stack(
        [role[i, torch.from_numpy(p.also_legal).to(role.device)].sum() for i, p in enumerate(prompts)]
    )
    return RTTDistributions(
        (codes / mass[:, None, None]).flatten(1).cpu().numpy(),
        (failed / mass).cpu().numpy(),
        total_probability=(mass / (1 - no_result)).clamp(max=1.0).cpu().numpy(),
        forward_passes=1 + passes + (read is not None),
        context_measurements=np.array([prompt.context_measurements for prompt in prompts]),
        unresolved=((mass_1 * ~followed).sum(1) / mass).cpu().numpy(),
    )


def _second_bytes(gpt: GPT, cache: KVCache, followed: Tensor) -> tuple[Tensor, int]:
    """P(byte 2 | byte 1), (B, 256, 256), and the passes it took; uniform where byte 1 is not `followed`, (B, 256) bool."""
    B = len(followed)
    second = followed.new_full((B, 256, 256), 1 / 256, dtype=torch.float64)
    counts = followed.sum(1)
    order = counts.argsort()
    passes = 0
    for rows in order.split(SECOND_PASS_PROMPTS):  # prompts that follow about equally many stand together
        width = int(counts[rows].max())
        if not width:
            continue
        byte_1 = followed[rows].int().argsort(dim=1, descending=True, stable=True)[:, :width]  # followed ones first
        used = torch.arange(width, device=rows.device) < counts[rows, None]  # (b, width)
        tokens = torch.where(used, byte_1 + tk.BYTE_0, tk.PADDING)
        prompts = cache if B <= SECOND_PASS_PROMPTS and torch.equal(rows, order.sort().values) else cache.select(rows)
        positions = prompts.lengths()[:, None].expand(-1, width)
        logits = gpt(tokens, prompts.fork(), positions, sibling_mask(prompts, width))  # (b, width, V)
        p = logits.double().softmax(-1)[..., _BYTES]  # (b, width, 256)
        row, place = used.nonzero(as_tuple=True)
        second[rows[row], byte_1[row, place]] = p[row, place]
        passes += 1
    return second, passes


def _pad(lines: Sequence[np.ndarray], gpt: GPT) -> tuple[Tensor, Tensor]:
    """Token sequences as one (B, T) tensor, padded at the right, and their lengths (B,), on the model's device."""
    lengths = np.array([len(line) for line in lines])
    tokens = np.full((len(lines), max(int(lengths.max()), 1)), tk.PADDING, dtype=np.int64)
    for row, line in zip(tokens, lines, strict=True):
        row[: len(line)] = line
    device = gpt.head.weight.device
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)
