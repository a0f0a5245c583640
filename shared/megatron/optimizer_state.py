"""Optimizer state as tensors in the shapes of the parameters, in one form for Megatron's three kinds of optimizer.

Megatron names the same state differently in a float32, a bfloat16 and a distributed optimizer. Here all three save

    optimizer.state.exp_avg.NAME, optimizer.state.exp_avg_sq.NAME       and, for bfloat16 weights,
    optimizer.state.fp32_param.NAME

and one step count; so a checkpoint written with a distributed optimizer loads without one, and the other way round.
Settings such as betas are those of the optimizer that loads.
"""

from __future__ import annotations

from typing import Any

from shared.megatron.init import quiet_imports
from shared.megatron.shim import construction

with quiet_imports():
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_optimizer_state(optimizer: Any, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
    """State of Megatron's ChainedOptimizer as ShardedTensors, for a model whose sharded state is `model_state`."""
    with construction():  # distrib_optimizer.py:1089 gathers by way of the GPU
        state = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=_METADATA)
    parts = optimizer.chained_optimizers
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    steps = [group.get("step", 0) for group in optimizer.param_groups]
    return {
        "step": max(steps, default=0),
        "parts": {
            str(index): _common_form(part, own) for index, (part, own) in enumerate(zip(parts, states, strict=True))
        },
    }


def _common_form(part: Any, state: dict[str, Any]) -> dict[str, Any]:
    if isinstance(part, DistributedOptimizer):
        for entry in state["param_state"].values():
            main = {"fp32_param": entry.pop("param")}
            if part.config.bf16:
                replace_prefix_for_sharding(main, "optimizer.state.param.", "optimizer.state.fp32_param.")
                entry |= main
        return {"param_state": state["param_state"]}
    if isinstance(part, FP32Optimizer):
        return {"state": state["state"]}
    return {"state": state["optimizer"]["state"], "fp32_from_fp16_params": state["fp32_from_fp16_params"]}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Take over a loaded `sharded_optimizer_state`; the model's weights must have been loaded before."""
    for index, part in enumerate(optimizer.chained_optimizers):
        groups = part.optimizer.state_dict()["param_groups"]
        for group in groups:
            group["step"] = state["step"]
        part.load_state_dict(_own_form(part, state["parts"][str(index)], groups))


def _own_form(part: Any, state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(part, DistributedOptimizer):
        entries = state["param_state"]
        if not part.config.bf16:
            # The weights are their own main parameters, and were not saved twice.
            weights = [weight for buffer in part.buffers for weight in buffer.param_index_map]
            entries = {index: entry | {"fp32_param": weights[index].detach()} for index, entry in entries.items()}
        return {
            "optimizer": {"param_groups": groups},
            "param_state": entries,
            "param_state_sharding_type": _METADATA["distrib_optim_sharding_type"],
        }
    inner = {"state": state["state"], "param_groups": groups}
    if isinstance(part, FP32Optimizer):
        return inner
    return {"optimizer": inner, "fp32_from_fp16_params": state["fp32_from_fp16_params"]}
