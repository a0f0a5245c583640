"""Learning-rate schedules: factors in (0, 1] of the peak rate, for steps 0, 1, ..., total - 1. No torch.

All rise linearly over `warmup` steps, (step + 1) / warmup, so the first step already learns; the first step after the
warm-up is at the peak. Decays reach `final` exactly at the last step.
"""

from __future__ import annotations

import math


def constant(step: int, warmup: int) -> float:
    """Linear warm-up, then 1."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def linear(step: int, warmup: int, total: int, final: float) -> float:
    """Linear warm-up, then a line from 1 down to `final` at step total - 1."""
    return constant(step, warmup) if step < warmup else 1.0 - (1.0 - final) * _progress(step, warmup, total)


def cosine(step: int, warmup: int, total: int, final: float) -> float:
    """Linear warm-up, then half a cosine from 1 down to `final` (Loshchilov & Hutter 2017, without restarts)."""
    if step < warmup:
        return constant(step, warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, total)))


def wsd(step: int, warmup: int, decay: int, total: int, final: float) -> float:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): 1 until the last `decay` steps, then a line to `final`."""
    start = total - decay
    return constant(step, warmup) if step < start else 1.0 - (1.0 - final) * (step - start + 1) / decay


def _progress(step: int, warmup: int, total: int) -> float:
    """0 at the first step after the warm-up, 1 at the last step and beyond."""
    return min(1.0, (step - warmup) / max(1, total - 1 - warmup))
