"""Progress of the run in, learning rate, momentum and weight decay out. Pure functions."""

from __future__ import annotations

from ping_llm.config import OptimConfig, TrainConfig


def progress(step: int, elapsed_s: float, config: TrainConfig) -> float:
    """Share of the run that lies behind, by steps or by trained time, whichever is further; the run ends at 1.

    Without a time budget it depends on the step alone, so a resumed run repeats it to the bit.
    """
    share = step / config.total_steps
    return max(share, elapsed_s / (60 * config.max_minutes)) if config.max_minutes else share


def lr_scale(progress: float, config: OptimConfig) -> float:
    """Share of the peak rate: a linear rise, a plateau, a linear fall to `final_lr_share`; above 0 for every progress.

    The rise starts at `final_lr_share` too, so that the first step trains.
    """
    rise = progress / config.warmup_share if config.warmup_share else 1.0
    fall = (1 - progress) / config.cooldown_share if config.cooldown_share else 1.0
    return config.final_lr_share + (1 - config.final_lr_share) * max(0.0, min(1.0, rise, fall))


def momentum(step: int, config: OptimConfig) -> float:
    """Nesterov momentum of Muon: rises linearly, for the first gradients are soon out of date."""
    share = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    return config.momentum_start + share * (config.momentum_end - config.momentum_start)


def weight_decay(progress: float, config: OptimConfig) -> float:
    """Decoupled weight decay of Muon: falls linearly to 0 at the end of the run."""
    return config.weight_decay * max(0.0, 1 - progress)
