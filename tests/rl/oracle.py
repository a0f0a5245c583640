"""Naive per-token references in float64, written from the sheets' tables: one token at a time, no tensors."""

import math


def ppo_clip(r: float, a: float, eps_low: float, eps_high: float, c: float) -> tuple[float, float]:
    """(loss, F) of PPO-clip with dual clip."""
    low, high = 1 - eps_low, 1 + eps_high
    loss = max(-a * r, -a * min(max(r, low), high))
    weight = 0.0 if (a > 0 and r > high) or (a < 0 and r < low) else r
    if a < 0 and r > c:
        return -a * c, 0.0
    return loss, weight


def ce_gppo(r: float, a: float, b1: float, b2: float, eps_low: float, eps_high: float, c: float) -> tuple[float, float]:
    """(loss, F) of CE-GPPO with dual clip."""
    if a < 0 and r > c:
        return -a * c, 0.0
    if r < 1 - eps_low and a < 0:
        return -b1 * (1 - eps_low) * a, b1 * (1 - eps_low)
    if r > 1 + eps_high and a > 0:
        return -b2 * (1 + eps_high) * a, b2 * (1 + eps_high)
    return -r * a, r


def cispo(r: float, a: float, logp: float, eps_low: float, eps_high: float) -> tuple[float, float]:
    """(loss, F) of CISPO in verl's convention."""
    weight = min(max(r, 1 - eps_low), 1 + eps_high)
    return -weight * a * logp, weight


def entropy(p: list[float]) -> float:
    """Entropy of a distribution in nats."""
    return -sum(x * math.log(x) for x in p if x > 0)


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(x - top) for x in z]
    return [x / sum(e) for x in e]
