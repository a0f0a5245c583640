"""GPPO: PPO-clip whose clip ends keep a gradient (Klear-Reasoner, arXiv 2508.07629).

PPO-clip writes min(r A, clip(r, 1 - eps_low, 1 + eps_high) A); the clip ends are constants, so a clipped token has
no gradient. GPPO multiplies the ends by r / sg(r), which is 1 in the forward pass: the value is PPO-clip's, and
a clipped token keeps the weight of the bound it crossed,

    F = 1 - eps_low   where r < 1 - eps_low  and A < 0
    F = 1 + eps_high  where r > 1 + eps_high and A > 0
    F = r             elsewhere (A < 0 and r > c: 0, the dual clip)

This file needs torch alone; copy it into any trainer. CE-GPPO (papers/cegppo) scales the two sides separately.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


class GPPOLoss(NamedTuple):
    """Per-token results, all of shape (B, T)."""

    loss_BT: Tensor
    weight_BT: Tensor


def gppo_loss(
    logp_BT: Tensor,
    logp_old_BT: Tensor,
    advantages_BT: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    clip_ratio_c: float = 10.0,
    only_high: bool = False,
) -> GPPOLoss:
    """Per-token GPPO loss, to be minimised.

    Args:
        logp_BT: log-probability (nats) of each sampled token under the policy being trained; carries the gradient.
        logp_old_BT, advantages_BT: never differentiated.
        eps_low, eps_high: clip range; the released scripts use 0.2 and 0.28.
        clip_ratio_c: dual-clip bound for A < 0; the released scripts pass 10.0.
        only_high: keep the gradient above the upper bound only; the lower branch is PPO's.

    Returns:
        loss_BT: equal to PPO-clip's value with dual clip.
        weight_BT: the detached F with -d loss / d logp = F * A.

    Source: 2508.07629 section 3; Kwai-Klear/KlearReasoner README and core_algos.py (as shipped, the only-high flag
    reads an undefined name; its README version is followed here).
    """
    lower, upper = 1 - eps_low, 1 + eps_high
    advantages_BT = advantages_BT.detach()
    ratio_BT = (logp_BT - logp_old_BT.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    r_BT = ratio_BT.detach()
    kept_BT = ratio_BT / r_BT

    low_end_BT = torch.full_like(r_BT, lower) if only_high else lower * kept_BT
    clipped_BT = torch.where(r_BT < lower, low_end_BT, torch.where(r_BT > upper, upper * kept_BT, ratio_BT))
    pessimistic_BT = torch.maximum(-ratio_BT * advantages_BT, -clipped_BT * advantages_BT)
    dual_BT = (advantages_BT < 0) & (r_BT > clip_ratio_c)
    loss_BT = torch.where(dual_BT, -advantages_BT * clip_ratio_c, pessimistic_BT)

    low_BT = (r_BT < lower) & (advantages_BT < 0)
    high_BT = (r_BT > upper) & (advantages_BT > 0)
    weight_BT = torch.where(high_BT, upper, r_BT)
    weight_BT = torch.where(low_BT, 0.0 if only_high else lower, weight_BT)
    return GPPOLoss(loss_BT, torch.where(dual_BT, 0.0, weight_BT))
