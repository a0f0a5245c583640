"""Top-k softmax routing and the load-balancing loss, as functions of plain tensors.

weights_TK, experts_TK = top_k_route(logits_TE, top_k=2, norm_topk_prob=True)
loss = load_balancing_loss(logits_TE, count_assignments(experts_TK, num_experts=8))

Both keep the dtype of the logits: pass float32, whatever the model computes in.
"""

from __future__ import annotations

import torch


def top_k_route(logits_TE: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` experts of each token, most probable first: weights [T, K] and int64 expert numbers [T, K].

    The weights are softmax probabilities over all experts; `norm_topk_prob` divides them by their sum, which equals the
    softmax over the chosen logits (Megatron-core's default and Mixtral). With top_k=1 a normalised weight is always 1
    and the router learns from the load-balancing loss alone. Source: megatron-core 0.16.1, moe_utils.py,
    topk_routing_with_score_function (use_pre_softmax is `not norm_topk_prob`).
    """
    chosen_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
    if norm_topk_prob:
        return chosen_TK.softmax(dim=-1), experts_TK
    return logits_TE.softmax(dim=-1).gather(-1, experts_TK), experts_TK


def count_assignments(experts_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert was chosen, int64 [E]."""
    return experts_TK.flatten().bincount(minlength=num_experts)


def load_balancing_loss(
    logits_TE: torch.Tensor, counts_E: torch.Tensor, total_tokens: int | None = None
) -> torch.Tensor:
    """E * sum_i f_i P_i without a coefficient: 1 at perfect balance, E / K if all tokens choose the same K experts.

    f_i is the share of assignments that went to expert i (no gradient), P_i the mean probability of expert i. Where the
    tokens of a micro-batch are spread over ranks, pass the `counts_E` of all of them and their number `total_tokens`:
    the results then add up, over the ranks, to the loss of the whole micro-batch.
    Source: Switch Transformers (arXiv:2101.03961, eq. 4 to 6); megatron-core 0.16.1, switch_load_balancing_loss_func.
    """
    num_tokens, num_experts = logits_TE.shape
    fraction_E = counts_E.to(logits_TE.dtype) / counts_E.sum()
    probability_E = logits_TE.softmax(dim=-1).sum(dim=0) / (total_tokens or num_tokens)
    return num_experts * (fraction_E * probability_E).sum()
