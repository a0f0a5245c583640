"""What every policy loss is given and what it returns.

Shapes: B sequences, T padded response length. Everything but `logp_BT` (and `entropy_BT`, where a loss uses it) is
without gradient. Alignment: position t holds the log-probability of response token t; a response includes its EOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """Tensors of one micro-batch, all (B, T) float32 unless said.

    logp_BT: under the policy being trained; carries the gradient.
    logp_old_BT: trainer's own recomputation before the first update on this batch.
    advantages_BT: constant along a sequence for outcome rewards.
    mask_BT: 1 on response tokens, 0 on padding.
    entropy_BT, entropy_old_BT: nats, full vocabulary, at the rollout temperature; None unless a loss asks for them.
    logp_ref_BT: frozen reference policy. logp_rollout_BT: what the sampling engine reported.
    task_id_B: int64 task labels for task-wise losses.
    """

    logp_BT: Tensor
    logp_old_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor
    entropy_BT: Tensor | None = None
    entropy_old_BT: Tensor | None = None
    logp_ref_BT: Tensor | None = None
    logp_rollout_BT: Tensor | None = None
    task_id_B: Tensor | None = None


@dataclass(frozen=True)
class TokenLoss:
    """Result of a per-token loss, before aggregation.

    loss_BT: to be minimised. weight_BT: detached F with -d loss / d logp = F * A.
    metrics: name -> (sum, count); pairs add up over micro-batches and ranks.
    """

    loss_BT: Tensor
    weight_BT: Tensor
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
