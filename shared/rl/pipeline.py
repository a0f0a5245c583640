"""The one way from logits to a scalar policy loss, the same for every rule.

per_token -> rollout weight -> gradient mask -> aggregate -> + entropy bonus, + positive-example NLL

result = policy_loss(inputs, PPOClip(), Terms(), Denominators.of(mask_BT))
result.loss.backward()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.rl.aggregate import Aggregation, Denominators, aggregate
from shared.rl.inputs import LossInputs, TokenLoss
from shared.rl.losses import PolicyLoss


@dataclass(frozen=True)
class Terms:
    """What is added around the per-token loss.

    entropy_coef: loss -= coef * agg(entropy), needs inputs.entropy_BT with gradient.
    positive_coef: loss += coef * token-mean NLL over the responses in `positive_B` (Klear-Reasoner's alpha; 0.1 in
    the released CE-GPPO scripts). Exactly 0, without gradient, when the mini-batch holds no such response.
    """

    aggregation: Aggregation = "token-mean"
    entropy_coef: float = 0.0
    positive_coef: float = 0.0


@dataclass(frozen=True)
class PolicyLossResult:
    """loss: scalar with gradient. token: the per-token result before weights and masks."""

    loss: Tensor
    token: TokenLoss


def policy_loss(
    inputs: LossInputs,
    rule: PolicyLoss,
    terms: Terms,
    denominators: Denominators,
    *,
    rollout_weight_BT: Tensor | None = None,
    gradient_mask_BT: Tensor | None = None,
    positive_B: Tensor | None = None,
    positive_tokens: float | None = None,
) -> PolicyLossResult:
    """Loss of one micro-batch; the micro-batches of a mini-batch add up when given the same global counts.

    Args:
        rollout_weight_BT: importance weight of trainer against engine, detached, multiplied after clipping.
        gradient_mask_BT: 0 keeps a token's value and drops its gradient (ERC).
        positive_B: bool, responses whose summed reward equals exactly 1.0.
        positive_tokens: valid tokens of such responses in the whole mini-batch; this batch's own when None.

    Raises:
        ValueError: entropy_coef without entropy_BT, positive_coef without positive_B.
    """
    token = rule.per_token(inputs)
    loss_BT = token.loss_BT
    if rollout_weight_BT is not None:
        loss_BT = loss_BT * rollout_weight_BT
    if gradient_mask_BT is not None:
        loss_BT = torch.where(gradient_mask_BT.bool(), loss_BT, loss_BT.detach())
    loss = aggregate(loss_BT, inputs.mask_BT, terms.aggregation, denominators)
    if terms.entropy_coef:
        if inputs.entropy_BT is None:
            raise ValueError("entropy_coef needs LossInputs.entropy_BT, computed with gradient")
        loss = loss - terms.entropy_coef * aggregate(inputs.entropy_BT, inputs.mask_BT, terms.aggregation, denominators)
    if terms.positive_coef:
        if positive_B is None:
            raise ValueError("positive_coef needs positive_B, the responses with reward 1.0")
        mask_BT = inputs.mask_BT * positive_B[:, None]
        count = float(mask_BT.sum()) if positive_tokens is None else positive_tokens
        if count:
            loss = loss - terms.positive_coef * (inputs.logp_BT * mask_BT).sum() / count
    return PolicyLossResult(loss, token)
