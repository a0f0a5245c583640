"""One number per run from the rows of its rollouts; the names are what claims refer to."""

from __future__ import annotations

from typing import Any

import numpy as np

from shared.rl.config import RLConfig

Rows = list[dict[str, float]]

BRANCH_METRICS = (
    "clip_low",
    "clip_high",
    "out_low_pos",
    "out_high_neg",
    "lp_low",
    "lp_high",
    "first_order_low",
    "first_order_high",
    "positive_share",
)


def window_mean(rows: Rows, name: str, first: int, last: int) -> float | None:
    """Mean of a metric over rollouts first..last inclusive, rollouts without it left out; None when all lack it."""
    values = [row[name] for row in rows if first <= row["step"] <= last and name in row]
    return float(np.mean(values)) if values else None


def at_reward(rows: Rows, name: str, level: float, width: int = 5) -> tuple[int | None, float | None]:
    """First rollout whose trailing mean of `reward` over `width` rollouts reaches `level`, and `name` averaged there.

    The window of rollout k is k - width + 1 .. k. (None, None) when the level is never reached.
    """
    for k in range(width - 1, len(rows)):
        window = rows[k - width + 1 : k + 1]
        if np.mean([row["reward"] for row in window]) >= level:
            values = [row[name] for row in window if name in row]
            return k, float(np.mean(values)) if values else None
    return None, None


def lp_by_tokens(rows: Rows) -> dict[str, float | None]:
    """lp_low_tokens, lp_high_tokens: share of all clipped tokens of the run that are improbable.

    `lp_low` and `lp_high` of a summary are means over rollouts instead, in which a rollout with few clipped tokens
    counts as much as one with many. Needs `groups_kept`, to which the number of trained tokens is proportional.
    """
    shares: dict[str, float | None] = {}
    for branch in ("low", "high"):
        weights = [row["groups_kept"] * row[f"clip_{branch}"] for row in rows if f"lp_{branch}" in row]
        values = [row[f"lp_{branch}"] for row in rows if f"lp_{branch}" in row]
        shares[f"lp_{branch}_tokens"] = float(np.average(values, weights=weights)) if values else None
    return shares


def entropy_shape(start: float | None, end: float | None) -> dict[str, float | None]:
    """entropy_change = end - start (nats) and entropy_kept = end / start."""
    if start is None or end is None:
        return {"entropy_change": None, "entropy_kept": None}
    return {"entropy_change": end - start, "entropy_kept": end / start}


def log_spike(rows: Rows, name: str) -> float | None:
    """ln(largest / median) of a positive metric over the rollouts: 0 without any spike, 0.69 for one of twice."""
    values = [row[name] for row in rows if row.get(name, 0.0) > 0]
    return float(np.log(np.max(values) / np.median(values))) if values else None


def summarise(rows: Rows, config: RLConfig) -> dict[str, Any]:
    """Summary of an RL run: run means, an early window, the last ten rollouts, values at matched reward, evaluation."""
    last = config.rollouts - 1
    tail = max(0, last - 9)
    summary: dict[str, Any] = {
        "entropy_start": window_mean(rows, "entropy", 0, 0),
        "entropy_mean": window_mean(rows, "entropy", 0, last),
        "entropy_early": window_mean(rows, "entropy", *config.early),
        "entropy_end": window_mean(rows, "entropy", tail, last),
        "reward_mean": window_mean(rows, "reward", 0, last),
        "reward_end": window_mean(rows, "reward", tail, last),
    }
    summary |= entropy_shape(summary["entropy_start"], summary["entropy_end"])
    reached, entropy = at_reward(rows, "entropy", config.matched_reward)
    summary |= {"rollouts_to_reward": reached, "entropy_at_reward": entropy}
    summary |= {name: window_mean(rows, name, 0, last) for name in (*BRANCH_METRICS, "grad_norm", "ppo_kl")}
    summary["log_grad_norm_spike"] = log_spike(rows, "grad_norm_max")
    summary["log_ratio_spike"] = log_spike(rows, "ratio_max")
    for name in ("grad_norm_max", "ratio_max", "gap_max"):
        summary[name] = max((row[name] for row in rows if name in row), default=None)
    summary |= {f"start_{k[5:]}": v for k, v in rows[0].items() if k.startswith("eval_")}
    summary |= {k: v for k, v in rows[-1].items() if k.startswith("final_")}
    return summary
