"""A run folder and queries in, exact RTT distributions out: two forward passes for any number of queries.

A query is a measurement whose result comes last and is not told. One pass over context, source, destination and time
gives P(FAILED), P(RTT_START) and P(byte 1); a second pass runs all 256 values of byte 1 side by side over the same cache
and gives P(byte 2 | byte 1). That is the probability of every possible result; nothing is sampled.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ping_llm.checkpoint import load_model
from ping_llm.data import tokenization as tk
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.query import Context, Prompt, Query, build_prompt
from ping_llm.model import GPT, KVCache, pick_device, sibling_mask

_BYTES = slice(tk.BYTE_0, tk.VOCAB_SIZE)


@dataclass(frozen=True)
class PingModel:
    """A trained model that answers questions about pings."""

    gpt: GPT
    device: torch.device

    @classmethod
    def load(cls, path: Path | str, device: str = "auto") -> PingModel:
        """Loads the best checkpoint of a run folder; ValueError if there is none."""
        chosen = pick_device(device)
        gpt, _, _ = load_model(Path(path), chosen)
        return cls(gpt, chosen)

    def rtt(
        self,
        src: str,
        dst: str,
        at: dt.datetime | str | float | None = None,
        context: pa.Table | Sequence[dict] | None = None,
    ) -> RTTDistribution:
        """The law of the result of a ping from `src` to `dst`, each an address or a prefix of whole bytes.

        `at` is a time (ISO 8601, UTC unless it says otherwise; a datetime; Unix seconds) or None for any time.
        `context` holds earlier measurements of the same source: columns src_addr, dst_addr, rtt (ms, −1 = failed) and,
        optionally, event_time. What does not fit the sequence is left out, oldest first.
        """
        return self.rtt_many([Query.parse(src, dst, at, Context.parse(context))])[0]

    def rtt_many(self, queries: Sequence[Query]) -> list[RTTDistribution]:
        """The law of each query's result, in two forward passes over all of them together."""
        if not queries:
            return []
        prompts = [build_prompt(query, self.gpt.config.seq_len) for query in queries]
        codes, p_fail, total = self._results(prompts)
        return [
            RTTDistribution(codes[i], float(p_fail[i]), float(total[i]), 2, prompt.context_measurements)
            for i, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def _results(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P(code) (B, 65,536), P(failed) (B,), normalised, and the mass (B,) they had, of results after B prompts.

        The mass is a share of all that the model could say but what is legal there and no result: a query asks for its
        result now, not whether a timestamp comes first.
        """
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        tokens = np.full((len(prompts), lengths.max() + 1), tk.PADDING, dtype=np.int64)
        for line, prompt in zip(tokens, prompts, strict=True):
            line[: len(prompt.tokens)] = prompt.tokens
            line[len(prompt.tokens)] = tk.RTT_START
        cache = KVCache()
        logits = self.gpt(torch.from_numpy(tokens).to(self.device), cache)  # (B, T, V)
        batch = torch.arange(len(prompts), device=self.device)
        end = torch.from_numpy(lengths).to(self.device)
        role = logits[batch, end - 1].double().softmax(-1)  # (B, V) after the last told field
        first = logits[batch, end].double().softmax(-1)[:, _BYTES]  # (B, 256) after RTT_START

        siblings = torch.arange(tk.BYTE_0, tk.VOCAB_SIZE, device=self.device).expand(len(prompts), 256)
        positions = (end + 1)[:, None].expand(-1, 256)
        logits = self.gpt(siblings, cache.fork(), positions, sibling_mask(cache, 256))  # (B, 256, V)
        second = logits.double().softmax(-1)[..., _BYTES]  # (B, byte 1, byte 2)

        codes = (role[:, tk.RTT_START, None, None] * first[..., None] * second).flatten(1)  # (B, 65,536)
        failed = role[:, tk.FAILED]
        mass = codes.sum(1) + failed
        no_result = torch.stack([role[i, prompt.also_legal].sum() for i, prompt in enumerate(prompts)])
        total = mass / (1 - no_result)
        codes, failed = codes / mass[:, None], failed / mass
        return codes.cpu().numpy(), failed.cpu().numpy(), total.clamp(max=1.0).cpu().numpy()
