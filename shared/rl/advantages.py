"""Group advantages from outcome rewards. Source: verl core_algos.py (compute_grpo_outcome_advantage)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(reward_GN: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(reward - group mean) / (group std + eps), std with Bessel correction, as (G, N) float32.

    G groups (one prompt each) of N samples. `scale_by_std=False` is Dr.GRPO: the mean alone is removed. With N = 1
    the raw reward passes through (mean 0, std 1), as in verl. Papers often print the population std: at N = 8 the
    two differ by a factor of 0.935.
    """
    reward_GN = reward_GN.float()
    if reward_GN.shape[1] == 1:
        return reward_GN
    centred_GN = reward_GN - reward_GN.mean(1, keepdim=True)
    if not scale_by_std or not len(reward_GN):
        return centred_GN
    return centred_GN / (reward_GN.std(1, keepdim=True) + eps)


def mixed_groups(accuracy_GN: Tensor) -> Tensor:
    """Which groups dynamic sampling keeps, (G,) bool: those whose accuracy varies, and groups of one.

    Source: DAPO (2503.14476) section 3.2; groups of size 1 are kept as in verl.
    """
    if accuracy_GN.shape[1] == 1:
        return torch.ones(accuracy_GN.shape[0], dtype=torch.bool)
    return (accuracy_GN != accuracy_GN[:, :1]).any(1)
