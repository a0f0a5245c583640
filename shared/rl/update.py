"""One optimiser step from a scalar loss: on the whole model in this process, or on this rank's part of it.

loss, norm = update.step(loss, scale=1.0)     # the step is not taken if either is not finite
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from shared.rl.config import OptimizerConfig

if TYPE_CHECKING:
    pass


class Update(Protocol):
    """Who takes the optimiser's steps."""

    def step(self, loss: Tensor | None, scale: float) -> tuple[float, float]:
        """Backward, clip, step at `scale` times the peak learning rates -> (loss, gradient norm before clipping).

        `loss` is this rank's share of the mini-batch's loss, None if it has no rows; the shares add up over the
        data-parallel ranks, and what is returned is equal on all. Nothing is updated if one of them is not finite.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LocalUpdate:
    """AdamW on a whole model in this process."""

    def __init__(self, config: OptimizerConfig, model: torch.nn.Module) -> None:
        named = dict(model.named_parameters())
        head = [p for name, p in named.items() if name.startswith("output_layer")]
        if config.head_lr is None:
            groups = [{"params": list(named.values()), "lr": config.body_lr}]
        else:
            _require_head(bool(head))
            body = [p for name, p in named.items() if not name.startswith("output_layer")]
            groups = [{"params": body, "lr": config.body_lr}, {"params": head, "lr": config.head_lr}]
        self.config = config
        self._parameters = list(named.values())
        self.adamw = torch.optim.AdamW(
            groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self._peak = [group["lr"] for group in groups]

    def step(self, loss: Tensor | None, scale: float) -> tuple[float, float]:
        """See `Update.step`."""
        assert loss is not None, "one process has all rows"
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        total = float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip))
        if math.isfinite(total) and math.isfinite(norm):
            for group, peak in zip(self.adamw.param_groups, self._peak, strict=True):
                group["lr"] = peak * scale
            self.adamw.step()
        return total, norm

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state)


def _require_head(present: bool) -> None:
    if not present:
        raise ValueError("head_lr needs a policy with its own output head: set untie_head=True")
