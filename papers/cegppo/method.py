"""CE-GPPO: keep the gradients that PPO's clip throws away, and scale each side by its own coefficient.

PPO-clip gives a token zero gradient when its ratio r = pi / pi_old has left [1 - eps_low, 1 + eps_high] in the
direction its advantage pushes. CE-GPPO (arXiv 2509.20712) keeps a bounded gradient there:

    branch                          weight F on A * grad log pi       effect on entropy, if the token is improbable
    low:   r < 1 - eps_low,  A < 0  beta1 * (1 - eps_low)             lowers it  (exploitation)
    high:  r > 1 + eps_high, A > 0  beta2 * (1 + eps_high)            raises it  (exploration)
    else                            r                                 as usual

beta1 = beta2 = 0 has the gradient of PPO-clip, beta1 = beta2 = 1 is GPPO (arXiv 2508.07629).
This file needs torch alone; copy it into any trainer:

    loss_BT, weight_BT, low_BT, high_BT = ce_gppo_loss(logp_BT, logp_old_BT, advantages_BT, beta1=0.5, beta2=1.0)
    (loss_BT * mask_BT).sum() / mask_BT.sum()                      # token-mean, as the released scripts do
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


class CEGPPOLoss(NamedTuple):
    """Per-token results, all of shape (B, T)."""

    loss_BT: Tensor
    weight_BT: Tensor
    low_BT: Tensor
    high_BT: Tensor


def ce_gppo_loss(
    logp_BT: Tensor,
    logp_old_BT: Tensor,
    advantages_BT: Tensor,
    *,
    beta1: float = 0.5,
    beta2: float = 1.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    clip_ratio_c: float = 10.0,
) -> CEGPPOLoss:
    """Per-token CE-GPPO loss, to be minimised.

    Args:
        logp_BT: log-probability (nats) of each sampled token under the policy being trained; carries the gradient.
        logp_old_BT: the same before the first update on this batch; never differentiated.
        advantages_BT: advantage of each token; never differentiated.
        beta1: weight of the gradient below the lower bound. The paper uses 0.5 at 1.5B and 0.75 at 7B.
        beta2: weight of the gradient above the upper bound. The paper uses 1.0.
        eps_low, eps_high: clip range; the released scripts use 0.2 on both sides.
        clip_ratio_c: dual-clip bound for A < 0; the released scripts pass 10.0.

    Returns:
        loss_BT: forward value -beta1 (1 - eps_low) A, -beta2 (1 + eps_high) A or -r A, capped at -A c where A < 0.
            The value jumps at the bounds when a beta is not 1; only its gradient is meaningful.
        weight_BT: the detached F with -d loss / d logp = F * A.
        low_BT, high_BT: which tokens are in which branch (bool).

    Source: Kwai-Klear/CE-GPPO, verl/trainer/ppo/core_algos.py; general form in 2508.07629, appendix A.2.
    """
    log_ratio_BT = (logp_BT - logp_old_BT.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    r_BT = ratio_BT.detach()
    advantages_BT = advantages_BT.detach()

    low_BT = (r_BT < 1 - eps_low) & (advantages_BT < 0)
    high_BT = (r_BT > 1 + eps_high) & (advantages_BT > 0)
    weight_BT = torch.where(low_BT, beta1 * (1 - eps_low), torch.where(high_BT, beta2 * (1 + eps_high), r_BT))

    # ratio / sg(ratio) is 1 in the forward pass and grad log pi in the backward pass.
    loss_BT = -weight_BT * (ratio_BT / r_BT) * advantages_BT

    dual_BT = (advantages_BT < 0) & (r_BT > clip_ratio_c)
    loss_BT = torch.where(dual_BT, -advantages_BT * clip_ratio_c, loss_BT)
    weight_BT = torch.where(dual_BT, 0.0, weight_BT)
    return CEGPPOLoss(loss_BT, weight_BT, low_BT, high_BT)
