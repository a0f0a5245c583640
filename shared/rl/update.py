"""One optimiser step from a scalar loss: on the whole model in this process, or on this rank's part of it.

loss, norm = update.step(loss, scale=1.0)     # the step is not taken if either is not finite
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shared.megatron.config import ModelConfig
from shared.megatron.optimizer import AdamWConfig
from shared.rl.config import OptimizerConfig


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
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip or math.inf))
        if math.isfinite(total) and math.isfinite(norm):
            for group, peak in zip(self.adamw.param_groups, self._peak, strict=True):
                group["lr"] = peak * scale
            self.adamw.step()
        return total, norm

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state)


class ParallelUpdate:
    """Megatron's gradient reduction and optimizer, on this rank's part of the model (`parallel.chunks[0]`)."""

    def __init__(self, config: OptimizerConfig, model: ModelConfig) -> None:
        from shared.megatron.parallel import ParallelModel

        if config.head_lr is not None:
            _require_head(not model.tie_embeddings)
        self.config = config
        self.parallel = ParallelModel(model, adamw(config), seed=0)

    def step(self, loss: Tensor | None, scale: float) -> tuple[float, float]:
        """See `Update.step`."""
        from megatron.core import parallel_state

        self.parallel.zero_grad()
        if loss is not None:
            loss.backward()
        total = loss.detach().clone() if loss is not None else torch.zeros((), device=self.parallel.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        self.parallel.reduce_gradients()
        if not math.isfinite(float(total)):
            return float(total), math.nan
        return float(total), self.parallel.step(self.config.body_lr * scale)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, sharded, for `DistributedCheckpoints.save`."""
        return self.parallel.sharded_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `DistributedCheckpoints.load` returned."""
        self.parallel.load_sharded_state(state)


def adamw(config: OptimizerConfig) -> AdamWConfig:
    """The same settings for Megatron's optimizer."""
    scale = {} if config.head_lr is None else {"output_layer.": config.head_lr / config.body_lr}
    return AdamWConfig(
        lr=config.body_lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        decay_vectors=True,
        grad_clip=config.grad_clip,
        lr_scale=scale,
    )


def _require_head(present: bool) -> None:
    if not present:
        raise ValueError("head_lr needs a policy with its own output head: set untie_head=True")
