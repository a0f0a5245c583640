"""From per-token losses to one number, with the denominators of the whole mini-batch.

A mini-batch may be processed in micro-batches and on several ranks; the sums of the parts equal the whole only if
each part divides by the global counts. So every mode takes them explicitly:

    aggregate(loss_BT, mask_BT, "token-mean", Denominators.of(mask_BT))

Source: verl core_algos.py (agg_loss); TRL grpo_trainer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class Denominators:
    """Counts over the global mini-batch: valid tokens, and sequences with at least one valid token.

    `norm` is the divisor of seq-mean-token-sum-norm: verl's loss_scale_factor (T when unset there); TRL's dr_grpo
    has batch size x maximum completion length. It has no default here, since the two differ.
    """

    tokens: float
    sequences: float
    norm: float | None = None

    @staticmethod
    def of(mask_BT: Tensor, norm: float | None = None) -> Denominators:
        """Counts of one batch that is the whole mini-batch."""
        return Denominators(float(mask_BT.sum()), float((mask_BT.sum(-1) > 0).sum()), norm)


def aggregate(loss_BT: Tensor, mask_BT: Tensor, mode: Aggregation, denominators: Denominators) -> Tensor:
    """Scalar loss of this part of the mini-batch; parts add up to the mini-batch's loss.

    token-mean: sum(l m) / tokens (DAPO). seq-mean-token-sum: sum_t(l m) averaged over non-empty sequences.
    seq-mean-token-mean: sum_t(l m) / (len + 1e-8) averaged likewise (original GRPO).
    seq-mean-token-sum-norm: sum(l m) / norm (Dr.GRPO). An empty mini-batch gives 0.

    Raises:
        ValueError: unknown mode, or no `norm` where the mode needs it.
    """
    masked_BT = loss_BT * mask_BT
    if mode == "token-mean":
        return masked_BT.sum() / max(denominators.tokens, 1.0)
    if mode == "seq-mean-token-sum":
        return masked_BT.sum() / max(denominators.sequences, 1.0)
    if mode == "seq-mean-token-mean":
        return (masked_BT.sum(-1) / (mask_BT.sum(-1) + 1e-8)).sum() / max(denominators.sequences, 1.0)
    if mode == "seq-mean-token-sum-norm":
        if denominators.norm is None:
            raise ValueError("seq-mean-token-sum-norm needs Denominators(norm=...): T for verl, B * T_max for TRL")
        return masked_BT.sum() / denominators.norm
    raise ValueError(f"unknown aggregation '{mode}'")
