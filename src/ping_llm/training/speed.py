"""The times of training steps in, the rates of a log line out."""

from __future__ import annotations

import numpy as np

from ping_llm.config import Config
from ping_llm.model.counts import mean_flops_per_token
from ping_llm.system.hardware import peak_flops, peak_memory_gb
from ping_llm.training.distributed import Ranks


class Speed:
    """Sums of times and tokens since the last line of the log; a first step that compiles is left out."""

    def __init__(self, config: Config, ranks: Ranks, compiling: bool) -> None:
        self.device, self.peak = ranks.device, peak_flops(ranks.device)
        self.window_places, self.place_flops = config.place_tokens, mean_flops_per_token(config) / ranks.world
        self.compiling = compiling
        self.sums = np.zeros(4)
        self.held_s = 0.0  # by saves, which no step counts

    def add(self, step_s: float, wait_s: float, tokens: float, windows: int) -> None:
        """Seconds of a step, how many of them it waited for data, and targets trained on and windows of all processes."""
        if self.compiling:
            self.compiling = False
            return
        self.sums += (step_s, wait_s, tokens, windows * self.window_places)

    def rates(self) -> dict[str, float]:
        """Targets a second, the shares of padding and of the time spent for data and for saves, MFU, memory; starts anew.

        MFU is the share of the device's peak that the model's FLOPs take, padding included as it is computed too.
        """
        memory = {"peak_memory_gb": peak_memory_gb(self.device)}
        step_s, wait_s, tokens, places = self.sums.tolist()
        if not places:
            return memory
        rates = {
            "tokens_per_s": tokens / step_s,
            "padding": 1 - tokens / places,
            "data_wait_share": wait_s / step_s,
            "save_share": self.held_s / (step_s + self.held_s),
        }
        if self.peak:
            rates["mfu"] = places * self.place_flops / step_s / self.peak
        self.sums, self.held_s = np.zeros(4), 0.0
        return rates | memory
