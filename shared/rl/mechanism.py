"""Does the entropy identity hold on real batches? First-order change per branch against finite differences.

A run trains under one rule, then logs `probes` rollouts. For every clipped token of their mini-batches the softmax
that token was scored by is moved by eta * w * (onehot - pi), w = F A with unit betas, and its entropy is measured
again in float64. The sums over the low branch (r < 1 - eps_low, A < 0) and the high branch (r > 1 + eps_high, A > 0)
say which way the gradients that PPO drops would move entropy if every token's logits were its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.experiment.contracts import RunContext
from shared.rl.metrics import entropy_and_surplus

Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Called before an update with the valid tokens of its mini-batch: logp_NV, action_N, ratio_N, advantage_N."""

ETA = 1e-6


@dataclass
class BranchSums:
    """Sums over the clipped tokens of one branch; `worst` is the largest relative error of a token."""

    tokens: int = 0
    improbable: int = 0
    first_order: float = 0.0
    finite_difference: float = 0.0
    worst: float = 0.0

    def add(self, logp_NV: Tensor, action_N: Tensor, weight_N: Tensor) -> None:
        """Add clipped tokens: log-probabilities of their softmax (N, V), the sampled token, w = F A."""
        if not len(action_N):
            return
        first_N, finite_N, improbable_N = entropy_changes(logp_NV, action_N, weight_N)
        self.tokens += len(action_N)
        self.improbable += int(improbable_N.sum())
        self.first_order += float(first_N.sum())
        self.finite_difference += float(finite_N.sum())
        scale = finite_N.abs().clamp_min(1e-3 * float(finite_N.abs().max()))
        self.worst = max(self.worst, float(((first_N - finite_N).abs() / scale).max()))


def entropy_changes(logp_NV: Tensor, action_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dH / eta of each softmax to first order and by central differences (float64), and the exact-sense LP flag."""
    z_NV = logp_NV.double()
    logp64_NV = z_NV.log_softmax(-1)
    _, surplus_NV = entropy_and_surplus(logp64_NV)
    surplus_N = surplus_NV.gather(-1, action_N[:, None]).squeeze(-1)
    weight_N = weight_N.double()
    step_NV = -logp64_NV.exp()
    step_NV.scatter_add_(-1, action_N[:, None], torch.ones_like(weight_N)[:, None])
    step_NV = ETA * weight_N[:, None] * step_NV
    up_N = entropy_and_surplus((z_NV + step_NV).log_softmax(-1))[0]
    down_N = entropy_and_surplus((z_NV - step_NV).log_softmax(-1))[0]
    return -weight_N * surplus_N, (up_N - down_N) / (2 * ETA), surplus_N < 0


class BranchObserver:
    """Collects both branches; hand `observe` to `Learner.update` or `TabularBandit.update`."""

    def __init__(self, eps_low: float, eps_high: float) -> None:
        self.low, self.high = 1 - eps_low, 1 + eps_high
        self.branches = {"low": BranchSums(), "high": BranchSums()}
        self.tokens = self.positive = 0

    def observe(self, logp_NV: Tensor, action_N: Tensor, ratio_N: Tensor, adv_N: Tensor) -> None:
        """Valid tokens of one mini-batch, before its update."""
        self.tokens += len(adv_N)
        self.positive += int((adv_N > 0).sum())
        picks = {
            "low": (self.low, (ratio_N < self.low) & (adv_N < 0)),
            "high": (self.high, (ratio_N > self.high) & (adv_N > 0)),
        }
        for name, (factor, pick_N) in picks.items():
            self.branches[name].add(logp_NV[pick_N], action_N[pick_N], factor * adv_N[pick_N] / len(adv_N))

    def row(self) -> dict[str, float]:
        """Metrics of everything observed since the last call: sums in nats per unit step, LP share, worst error."""
        row: dict[str, float] = {"tokens": float(self.tokens), "tokens_positive": float(self.positive)}
        self.tokens = self.positive = 0
        for name, sums in self.branches.items():
            row[f"tokens_{name}"] = float(sums.tokens)
            row[f"first_order_{name}"] = sums.first_order
            row[f"finite_difference_{name}"] = sums.finite_difference
            row[f"worst_error_{name}"] = sums.worst
            if sums.tokens:
                row[f"lp_{name}"] = sums.improbable / sums.tokens
            self.branches[name] = BranchSums()
        return row


def mechanism_summary(run: RunContext) -> dict[str, Any]:
    """Totals over the observed rollouts, and the same per rollout; shares and rates are weighted by tokens."""
    rows = run.rows()
    total = sum(row["tokens"] for row in rows)
    summary: dict[str, Any] = {
        "rollouts": len(rows),
        "reward": sum(row["reward"] for row in rows) / len(rows),
        "positive_share": sum(row["tokens_positive"] for row in rows) / total if total else None,
    }
    for name in ("low", "high"):
        tokens = sum(row[f"tokens_{name}"] for row in rows)
        summary[f"tokens_{name}"] = tokens
        summary[f"first_order_{name}"] = sum(row[f"first_order_{name}"] for row in rows)
        summary[f"finite_difference_{name}"] = sum(row[f"finite_difference_{name}"] for row in rows)
        for kind in ("first_order", "finite_difference"):
            summary[f"{kind}_{name}_per_rollout"] = summary[f"{kind}_{name}"] / len(rows)
        summary[f"clip_{name}"] = tokens / total if total else None
        summary[f"worst_error_{name}"] = max(row[f"worst_error_{name}"] for row in rows)
        lp = sum(row.get(f"lp_{name}", 0.0) * row[f"tokens_{name}"] for row in rows)
        summary[f"lp_{name}"] = lp / tokens if tokens else None
    return summary
