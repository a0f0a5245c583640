"""The baseline mixture of experts as a Megatron module: softmax router in float32, SwiGLU experts, balancing loss.

    ModuleSpec(module=MoELayer, params={"moe": MoEConfig(num_experts=8, top_k=2, moe_ffn_hidden_size=1024)})

goes where a layer's `mlp` would. Experts are dealt out over Megatron's expert-parallel group; tokens travel. Under
tensor parallelism, sequence parallelism must be on, so that every rank routes tokens of its own (`Layout.check`).

The balancing loss joins in the backward pass, which must know how the language-model loss weighs a token:

    with token_weight(1 / tokens_in_batch):            # all tokens, those that the loss masks out too
        loss.backward()
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shared.experiment.contracts import AssayError
from shared.megatron.config import MoEConfig
from shared.megatron.init import quiet_imports
from shared.moe.dispatch import apply_experts
from shared.moe.experts import Experts
from shared.moe.router import count_assignments, load_balancing_loss, top_k_route

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig


# transformer_layer.py:366 warns of every MLP that it has no process groups for; this one finds its own.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: "Unknown MLP type" not in record.getMessage()
)

_token_weight: float | None = None


class UnknownTokenWeight(AssayError):
    """A backward pass through experts outside `token_weight`."""


@contextmanager
def token_weight(weight: float) -> Iterator[None]:
    """Inside, backward passes take `weight` for the factor of one token in the balancing loss.

    The balancing loss of a micro-batch of T tokens, masked ones and padding included, is weighted T * `weight`. With
    1 / n for a batch of n such tokens, a loss that is final when it is differentiated gets `aux_loss_coeff` times the
    mean over all tokens, however the batch is cut. Where gradients are divided by c counted tokens later, that is
    c / n (`ParallelModel.train_step`): the mask then does not change the coefficient. A dense model does not care.
    """
    global _token_weight
    before, _token_weight = _token_weight, weight
    try:
        yield
    finally:
        _token_weight = before


class _Attach(torch.autograd.Function):
    """The identity on `x`, whose backward pass also differentiates `loss`; Megatron's MoEAuxLossAutoScaler.

    Megatron's takes 1 for a weight that nobody set, which is thousands of times too much for a mean over tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if _token_weight is None:
            raise UnknownTokenWeight(
                "experts with aux_loss_coeff > 0 need to know how much one token weighs in the loss: call backward() "
                "inside `with token_weight(1 / tokens)` of shared.moe.layer, train with ParallelModel, or set "
                "aux_loss_coeff=0"
            )
        (loss,) = ctx.saved_tensors
        return grads[0], torch.full_like(loss, _token_weight)


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

    In training, the balancing loss of each micro-batch, taken over its tensor- and context-parallel ranks and over all
    its tokens (padding included), is attached to the routing weights: see `token_weight` and `take_aux_loss`.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, **_: Any):
        super().__init__(config)
        self.moe = moe
        self.router = Router(config, moe.num_experts)
        self.experts = Experts(config, moe)
        self.aux_loss_sum: torch.Tensor | None = None

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
        self.aux_loss_sum = loss.detach() + (0 if self.aux_loss_sum is None else self.aux_loss_sum)
        if self.moe.aux_loss_coeff == 0:
            return weights_TK
        return cast(torch.Tensor, _Attach.apply(weights_TK, self.moe.aux_loss_coeff * total_tokens * loss))


def take_aux_loss(chunks: Iterable[torch.nn.Module], microbatches: int) -> float | None:
    """Balancing loss of the training passes since the last call, without its coefficient; None for a dense model.

    Summed over layers (so: the number of layers at perfect balance), averaged over the `microbatches` of each
    data-parallel rank. Equal on all ranks, which must all call it.
    """
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    if not layers:
        return None
    total = layers[0].router.weight.new_zeros((), dtype=torch.float32)
    for layer in layers:
        total += 0 if layer.aux_loss_sum is None else layer.aux_loss_sum
        layer.aux_loss_sum = None
    dist.all_reduce(total)
    return total.item() / (microbatches * parallel_state.get_data_parallel_world_size())
