"""The baseline mixture of experts as a Megatron module: softmax router in float32, SwiGLU experts, balancing loss.

    ModuleSpec(module=MoELayer, params={"moe": MoEConfig(num_experts=8, top_k=2, moe_ffn_hidden_size=1024)})

goes where a layer's `mlp` would. Experts are dealt out over Megatron's expert-parallel group; tokens travel. Under
tensor parallelism, sequence parallelism must be on, so that every rank routes tokens of its own (`Layout.check`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shared.megatron.config import MoEConfig
from shared.megatron.init import quiet_imports
from shared.moe.dispatch import apply_experts
from shared.moe.experts import Experts
from shared.moe.router import count_assignments, load_balancing_loss, top_k_route

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.transformer_config import TransformerConfig


class Router(torch.nn.Module):
    """Logits of all experts, computed in float32 from a weight [E, H] without bias."""

    def __init__(self, config: TransformerConfig, num_experts: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=config.params_dtype))
        if config.perform_initialization:
            with torch.no_grad():
                self.weight.copy_(config.init_method(torch.empty(self.weight.shape)))  # pyright: ignore[reportOptionalCall]
        # Megatron sums the gradients of parameters marked so over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> float32 logits [T, E]."""
        return F.linear(tokens_TH.float(), self.weight.float())


class MoELayer(MegatronModule):
    """Router and experts in the place of the MLP; every token reaches its `top_k` experts, none is dropped.

    In training, the load-balancing loss of the micro-batch (over its tensor- and context-parallel ranks, padding
    included) is attached to the routing weights: the backward pass of the language-model loss also adds the gradient of
    `aux_loss_coeff` times it, per layer. How it weighs against the language-model loss follows
    `config.calculate_per_token_loss`, as in Megatron's own router:

    - off: the loss of a backward pass is a mean over tokens, and the balancing loss joins it as it is;
    - on: the loss is a sum over tokens that is divided later, so the balancing loss is multiplied by the micro-batch's
      number of tokens. Where the loss was already divided, `set_aux_loss_scale(1 / denominator)` says so.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, **_: Any):
        super().__init__(config)
        self.moe = moe
        self.router = Router(config, moe.num_experts)
        self.experts = Experts(config, moe)
        self._aux_loss_sum: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias)."""
        tokens_TH = hidden_states.flatten(0, -2)
        logits_TE = self.router(tokens_TH)
        weights_TK, experts_TK = top_k_route(logits_TE, self.moe.top_k, self.moe.norm_topk_prob)
        counts_E = count_assignments(experts_TK, self.moe.num_experts)
        # Recomputation runs the first forward pass without gradients: the loss is then taken once, in the second.
        if self.training and torch.is_grad_enabled():
            weights_TK = self._attach_aux_loss(weights_TK, logits_TE, counts_E)
        group = cast(dist.ProcessGroup, parallel_state.get_expert_model_parallel_group())
        out_TH = apply_experts(tokens_TH, weights_TK, experts_TK, counts_E, self.experts, group)
        return out_TH.view_as(hidden_states), None

    def _attach_aux_loss(
        self, weights_TK: torch.Tensor, logits_TE: torch.Tensor, counts_E: torch.Tensor
    ) -> torch.Tensor:
        group = cast(dist.ProcessGroup, parallel_state.get_tensor_and_context_parallel_group())
        total_tokens = logits_TE.shape[0] * group.size()
        if group.size() > 1:
            counts_E = counts_E.clone()
            dist.all_reduce(counts_E, group=group)
        loss = load_balancing_loss(logits_TE, counts_E, total_tokens)
        self._aux_loss_sum = loss.detach() + (0 if self._aux_loss_sum is None else self._aux_loss_sum)
        if MoEAuxLossAutoScaler.main_loss_backward_scale is None:
            # Left alone, the first backward pass makes it a scalar, which Megatron's schedules then fail to overwrite.
            set_aux_loss_scale(1.0, loss.device)
        scale = self.moe.aux_loss_coeff * (total_tokens if self.config.calculate_per_token_loss else 1)
        return MoEAuxLossAutoScaler.apply(weights_TK, loss * scale)  # pyright: ignore[reportReturnType]


def set_aux_loss_scale(scale: float, device: torch.device | str | None = None) -> None:
    """Multiply the gradients of balancing losses by `scale` in backward passes from now on; 1 at first.

    Megatron's schedules set it in every step; who calls `backward()` without them does it here.
    """
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([scale], device=device)


def take_aux_loss(chunks: Iterable[torch.nn.Module], microbatches: int) -> float | None:
    """Balancing loss of the training passes since the last call, without its coefficient; None for a dense model.

    Summed over layers (so: the number of layers at perfect balance), averaged over the `microbatches` of each
    data-parallel rank. Equal on all ranks, which must all call it.
    """
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    if not layers:
        return None
    sums = [layer._aux_loss_sum for layer in layers if layer._aux_loss_sum is not None]
    for layer in layers:
        layer._aux_loss_sum = None
    total = torch.stack(sums).sum() if sums else layers[0].router.weight.new_zeros((), dtype=torch.float32)
    dist.all_reduce(total)
    return total.item() / (microbatches * parallel_state.get_data_parallel_world_size())
