"""Progress of the run in, learning rate, momentum, weight decay and the size of the batch out. Pure functions."""

from __future__ import annotations

import math

from ping_llm.config import OptimConfig, TrainConfig


def progress(step: int, tokens: int, elapsed_s: float, config: TrainConfig) -> float:
    """Share of the run that is done, by the limit that is nearest: steps, tokens or trained time. The run ends at 1.

    Without a limit of time it depends on steps and tokens alone, so a resumed run repeats it to the bit.
    """
    done = ((step, config.total_steps), (tokens, config.target_tokens), (elapsed_s, 60 * config.max_minutes))
    return max(value / limit for value, limit in done if limit)


def batch_size(step: int, config: TrainConfig) -> int:
    """Windows of step 0, 1, …, over all processes: `first_batch_size`, doubled after each stage, up to `batch_size`."""
    for steps, pieces in _stages(config):
        if step < steps:
            return config.batch_size // pieces
        step -= steps
    return config.batch_size


def windows_before(step: int, config: TrainConfig) -> int:
    """Windows that steps 0 to `step` − 1 have taken together: step `step` begins with the window of this number."""
    taken = 0
    for steps, pieces in _stages(config):
        taken += min(step, steps) * (config.batch_size // pieces)
        step = max(0, step - steps)
    return taken + step * config.batch_size


def growth_steps(config: TrainConfig) -> int:
    """Steps until the batch is as large as `batch_size`."""
    return sum(steps for steps, _ in _stages(config))


def _stages(config: TrainConfig) -> list[tuple[int, int]]:
    """Steps of each size below `batch_size`, and into how many such steps a whole batch is cut: they take whole batches."""
    if not config.first_batch_size:
        return []
    doublings = (config.batch_size // config.first_batch_size).bit_length() - 1
    pieces = [1 << halvings for halvings in range(doublings, 0, -1)]
    return [(max(1, round(config.batch_warmup_steps / doublings / count)) * count, count) for count in pieces]


def lr_scale(progress: float, config: OptimConfig) -> float:
    """Share of the peak rate, from `final_lr_share` to 1, so above 0 for every progress.

    A linear rise over `warmup_share`; then a plateau and a linear fall over `cooldown_share` (wsd), or a fall over all of
    the rest, half a period of a cosine (cosine) or linear (linear). The rise starts, and the fall ends, at `final_lr_share`.
    """
    rise = progress / config.warmup_share if config.warmup_share else 1.0
    after = (progress - config.warmup_share) / (1 - config.warmup_share) if config.warmup_share < 1 else 0.0
    if config.schedule == "cosine":
        fall = (1 + math.cos(math.pi * min(1.0, max(0.0, after)))) / 2
    elif config.schedule == "linear":
        fall = 1 - after
    else:
        fall = (1 - progress) / config.cooldown_share if config.cooldown_share else 1.0
    return config.final_lr_share + (1 - config.final_lr_share) * max(0.0, min(1.0, rise, fall))


def momentum(step: int, config: OptimConfig) -> float:
    """Nesterov momentum of Muon: rises linearly, for the first gradients are soon out of date."""
    share = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    return config.momentum_start + share * (config.momentum_end - config.momentum_start)


def weight_decay(progress: float, config: OptimConfig) -> float:
    """Decoupled weight decay of the matrices: falls to 0 at the end of the run, linearly or as half a period of a cosine, or
    stays."""
    if config.weight_decay_schedule == "constant":
        return config.weight_decay
    if config.weight_decay_schedule == "cosine":
        return config.weight_decay * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.weight_decay * max(0.0, 1 - progress)
