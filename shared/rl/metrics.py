"""What a step of policy optimisation is measured by; formulas in docs/metrics.md, names as logged.

Token metrics are (sum, count) pairs over valid tokens, so that they add up over micro-batches and ranks; the ratio's
quantile is taken over all tokens of a rollout, before any truncation.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


def entropy_and_surplus(logp_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy (..., ) and surplus (..., V) of softmaxes given by their log-probabilities, in nats.

    surplus_a = pi_a (ln pi_a + H) - C with C = sum_b pi_b^2 (ln pi_b + H): for the step
    z += eta * w * (onehot_a - pi), w = F * A, the entropy of that softmax changes by -eta * w * surplus_a to first
    order. A token is improbable in the exact sense iff its surplus is negative. rl-core, one-step entropy identity.
    """
    p_NV = logp_NV.exp()
    entropy_N = -(p_NV * logp_NV).sum(-1)
    tilted_NV = p_NV * (logp_NV + entropy_N[..., None])
    return entropy_N, tilted_NV - (p_NV * tilted_NV).sum(-1, keepdim=True)


class Meter:
    """Sums (sum, count) pairs; `means()` divides. A name with count 0 is left out."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        pair = self._pairs[name]
        pair[0] += float(total)
        pair[1] += float(count)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._pairs.items() if count}


def clip_metrics(
    meter: Meter, ratio_N: Tensor, adv_N: Tensor, surplus_N: Tensor, logp_old_N: Tensor, eps_low: float, eps_high: float
) -> None:
    """Add one mini-batch's branch metrics; all inputs hold valid tokens only, shape (N,).

    `clip_low` = share with r < 1 - eps_low and A < 0 (where PPO drops the gradient), `clip_high` = share with
    r > 1 + eps_high and A > 0; `out_low_pos`, `out_high_neg` = outside the range with the other sign of A, where PPO
    keeps it. `lp_low`, `lp_high` = share of the clipped tokens that are improbable in the exact sense.
    `first_order_low/high/all` = sum over the branch of -w * surplus / N with w = F A, F = 1 - eps_low, 1 + eps_high
    (unit betas) or r: nats per unit step, averaged over mini-batches.
    """
    low, high = 1 - eps_low, 1 + eps_high
    n = ratio_N.numel()
    low_N, high_N = (ratio_N < low) & (adv_N < 0), (ratio_N > high) & (adv_N > 0)
    meter.add("clip_low", low_N.sum(), n)
    meter.add("clip_high", high_N.sum(), n)
    meter.add("out_low_pos", ((ratio_N < low) & (adv_N > 0)).sum(), n)
    meter.add("out_high_neg", ((ratio_N > high) & (adv_N < 0)).sum(), n)
    improbable_N = surplus_N < 0
    meter.add("lp_low", (low_N & improbable_N).sum(), low_N.sum())
    meter.add("lp_high", (high_N & improbable_N).sum(), high_N.sum())
    meter.add("p_old_low", (logp_old_N.exp() * low_N).sum(), low_N.sum())
    meter.add("p_old_high", (logp_old_N.exp() * high_N).sum(), high_N.sum())
    change_N = -adv_N * surplus_N / n
    meter.add("first_order_low", low * (change_N * low_N).sum(), 1)
    meter.add("first_order_high", high * (change_N * high_N).sum(), 1)
    unit_N = torch.where(low_N, low, torch.where(high_N, high, ratio_N))
    meter.add("first_order_all", (unit_N * change_N).sum(), 1)
    meter.add("positive_share", (adv_N > 0).sum(), n)


def quantile(values_N: Tensor, q: float) -> float:
    """`torch.quantile` (linear interpolation), which refuses more than 2^24 values: a rollout of a real model's."""
    sorted_N = values_N.sort().values
    rank = q * (len(sorted_N) - 1)
    below = int(rank)
    above = min(below + 1, len(sorted_N) - 1)
    return float(torch.lerp(sorted_N[below], sorted_N[above], rank - below))


def ratio_summary(ratio_N: Tensor) -> dict[str, float]:
    """ratio_min/mean/p95/max over all valid tokens of a rollout's updates."""
    if not ratio_N.numel():
        return {}
    return {
        "ratio_min": float(ratio_N.min()),
        "ratio_mean": float(ratio_N.mean()),
        "ratio_p95": quantile(ratio_N.double(), 0.95),
        "ratio_max": float(ratio_N.max()),
    }


def gap_summary(logp_N: Tensor, logp_rollout_N: Tensor) -> dict[str, float]:
    """Trainer against engine: gap_mean/p95/max of |logp - logp_rollout| over sampled tokens, nats."""
    gap_N = (logp_N - logp_rollout_N).abs().double()
    return {
        "gap_mean": float(gap_N.mean()),
        "gap_p95": quantile(gap_N, 0.95),
        "gap_max": float(gap_N.max()),
    }
