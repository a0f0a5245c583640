"""All experts of one rank as two stacked weights, computed with grouped matrix products instead of a loop.

The grouped product of torch takes float32, bfloat16 and float16, on CPU and GPU; rows of a weight must be a multiple
of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from shared.megatron.config import BadModelConfig, MoEConfig
from shared.megatron.init import quiet_imports

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer.transformer_config import TransformerConfig


class Experts(torch.nn.Module):
    """This rank's share of the experts of a layer: SwiGLU without biases, no token dropped.

    fc1 [E, 2 * I, H]: gate first, then up; fc2 [E, H, I]. E counts the experts of this rank: number r of n
    expert-parallel ranks holds experts r * E to (r + 1) * E - 1. Weights depend on the random state alone, not on n.

    Raises `BadModelConfig` for sizes that the grouped matrix product does not take.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig):
        super().__init__()
        inner, hidden, dtype = moe.moe_ffn_hidden_size, config.hidden_size, config.params_dtype
        if inner * dtype.itemsize % 16 or hidden * dtype.itemsize % 16:
            raise BadModelConfig(
                f"hidden_size={hidden} and moe_ffn_hidden_size={inner} must be multiples of {16 // dtype.itemsize} for "
                f"experts in {dtype}: round them up"
            )
        self.ranks = parallel_state.get_expert_model_parallel_world_size()
        self.rank = parallel_state.get_expert_model_parallel_rank()
        self.num_experts, self.local_experts = moe.num_experts, moe.num_experts // self.ranks
        self.fc1 = _expert_parameter(self.local_experts, 2 * inner, hidden, dtype)
        self.fc2 = _expert_parameter(self.local_experts, hidden, inner, dtype)
        if config.perform_initialization:
            self._draw(self.fc1, config.init_method)
            self._draw(self.fc2, config.output_layer_init_method)

    def _draw(self, stack_EOI: torch.Tensor, init_method: Any) -> None:
        first = self.rank * self.local_experts
        with torch.no_grad():
            for expert in range(self.num_experts):
                # Every rank draws every expert and keeps its own, so that random states stay equal.
                weight_OI = init_method(torch.empty(stack_EOI.shape[1:]))
                if first <= expert < first + self.local_experts:
                    stack_EOI[expert - first] = weight_OI

    def forward(self, rows_NH: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Outputs [N, H] of rows sorted by expert, of which expert i takes `counts_E[i]`; zero is fine."""
        return swiglu_experts(rows_NH, counts_E, self.fc1, self.fc2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Both weights, split along the experts, so that any number of expert-parallel ranks loads them.

        Keys and global shapes are those of Megatron-core's own expert layers (SequentialMLP, TEGroupedMLP).
        """
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_{name}.weight",
                parameter,
                *sharded_offsets,
                (len(sharded_offsets), self.rank, self.ranks),
                replica_id=replica,
                prepend_axis_num=len(sharded_offsets),
            )
            for name, parameter in (("fc1", self.fc1), ("fc2", self.fc2))
        }


def swiglu_experts(
    rows_NH: torch.Tensor, counts_E: torch.Tensor, fc1_EFH: torch.Tensor, fc2_EHI: torch.Tensor
) -> torch.Tensor:
    """fc2 (silu(gate x) * up x) of rows sorted by expert; `fc1_EFH` stacks gate and up, so F = 2 * I."""
    ends_E = counts_E.cumsum(0).int()
    gate_NI, up_NI = F.grouped_mm(rows_NH, fc1_EFH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_NI) * up_NI, fc2_EHI.transpose(1, 2), offs=ends_E)


def _expert_parameter(*shape_and_dtype: Any) -> torch.nn.Parameter:
    *shape, dtype = shape_and_dtype
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
    # Without these two, training goes wrong without a word: gradients would be reduced over ranks that hold other
    # experts, and the gradient norm would leave out the experts of all tensor-parallel ranks but the first.
    parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter
