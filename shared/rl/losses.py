"""Published baseline policy losses, each a frozen config and a pure per-token function.

    config = PPOClip(eps_low=0.2, eps_high=0.28)          # DAPO's clip-higher
    out = config.per_token(inputs)                        # out.loss_BT, out.weight_BT

A paper registers its own loss the same way, from its experiment.py:

    @policy_loss("ce_gppo")
    @dataclass(frozen=True)
    class CEGPPO: ...                                     # fields, and per_token(self, inputs) -> TokenLoss

Formulas and gradient weights F are in the docstrings; everywhere r = exp(clamp(logp - logp_old, -20, 20)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shared.experiment.contracts import AssayError
from shared.rl.inputs import LossInputs, TokenLoss

MAX_LOG_RATIO = 20.0


class PolicyLoss(Protocol):
    """A frozen dataclass of hyper-parameters with a pure per-token function."""

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        """Loss and gradient weight of every token, both (B, T)."""
        ...


_REGISTRY: dict[str, type] = {}


def policy_loss(name: str):
    """Class decorator: make a loss config known by `name`. The same name twice is an error."""

    def register(cls):
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise AssayError(
                f"policy loss '{name}' is already {known.__module__}.{known.__qualname__}; choose a new name"
            )
        _REGISTRY[name] = cls
        return cls

    return register


def policy_losses() -> dict[str, type]:
    """Name -> config class of every loss registered so far."""
    return dict(_REGISTRY)


def ratio(inputs: LossInputs) -> Tensor:
    """r_BT = pi / pi_old with the log-ratio clamped to +-20 (outside, the gradient is 0, as in verl)."""
    return (inputs.logp_BT - inputs.logp_old_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _dual_clip(loss_BT: Tensor, weight_BT: Tensor, r_BT: Tensor, adv_BT: Tensor, c: float | None) -> TokenLoss:
    if c is None:
        return TokenLoss(loss_BT, weight_BT)
    over_BT = (adv_BT < 0) & (r_BT > c)
    return TokenLoss(torch.where(over_BT, -adv_BT * c, loss_BT), torch.where(over_BT, 0.0, weight_BT))


@policy_loss("ppo_clip")
@dataclass(frozen=True)
class PPOClip:
    """max(-A r, -A clamp(r, 1 - eps_low, 1 + eps_high)), dual clip at c where A < 0 (verl "vanilla").

    GRPO uses 0.2/0.2, DAPO (2503.14476) 0.2/0.28. `clip_ratio_c=None` switches the dual clip off; verl's default
    is 3.0, the Klear-family scripts pass 10.0.
    F = r, but 0 where (A > 0, r > 1 + eps_high), (A < 0, r < 1 - eps_low) or (A < 0, r > c).
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    clip_ratio_c: float | None = 3.0

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        ratio_BT, adv_BT = ratio(inputs), inputs.advantages_BT
        r_BT = ratio_BT.detach()
        low, high = 1 - self.eps_low, 1 + self.eps_high
        clipped_BT = ((adv_BT > 0) & (r_BT > high)) | ((adv_BT < 0) & (r_BT < low))
        loss_BT = -adv_BT * torch.where(clipped_BT, r_BT.clamp(low, high), ratio_BT)
        weight_BT = torch.where(clipped_BT, 0.0, r_BT)
        return _dual_clip(loss_BT, weight_BT, r_BT, adv_BT, self.clip_ratio_c)


@policy_loss("no_clip")
@dataclass(frozen=True)
class NoClip:
    """-A r: the importance-weighted policy gradient without a trust region; dual clip at c where A < 0. F = r."""

    clip_ratio_c: float | None = None

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        ratio_BT = ratio(inputs)
        r_BT, adv_BT = ratio_BT.detach(), inputs.advantages_BT
        return _dual_clip(-adv_BT * ratio_BT, r_BT, r_BT, adv_BT, self.clip_ratio_c)


@policy_loss("cispo")
@dataclass(frozen=True)
class CISPO:
    """-sg(clamp(r, 1 - eps_low, 1 + eps_high)) A logp, for both signs of A (verl's convention). F = the clamped r."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        weight_BT = ratio(inputs).detach().clamp(1 - self.eps_low, 1 + self.eps_high)
        return TokenLoss(-weight_BT * inputs.advantages_BT * inputs.logp_BT, weight_BT)


@policy_loss("cispo_cap")
@dataclass(frozen=True)
class CISPOCap:
    """-sg(min(r, cap)) A logp: TRL's convention, where epsilon_high is an absolute cap. F = min(r, cap)."""

    cap: float = 5.0

    def per_token(self, inputs: LossInputs) -> TokenLoss:
        weight_BT = ratio(inputs).detach().clamp(max=self.cap)
        return TokenLoss(-weight_BT * inputs.advantages_BT * inputs.logp_BT, weight_BT)
