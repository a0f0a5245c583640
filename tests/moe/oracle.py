"""Mixture of experts as loops over tokens in float64, straight from the formulas. Far too slow for anything else."""

import math

import torch
import torch.nn.functional as F


def route(logits_E: list[float], top_k: int, norm_topk_prob: bool) -> dict[int, float]:
    """Expert -> weight of one token."""
    exponentials = [math.exp(logit - max(logits_E)) for logit in logits_E]
    probabilities = [value / sum(exponentials) for value in exponentials]
    chosen = sorted(range(len(logits_E)), key=lambda expert: -logits_E[expert])[:top_k]
    total = sum(probabilities[expert] for expert in chosen) if norm_topk_prob else 1.0
    return {expert: probabilities[expert] / total for expert in chosen}


def balancing_loss(logits_TE: torch.Tensor, top_k: int) -> float:
    """E * sum_i f_i P_i."""
    tokens, experts = logits_TE.shape
    chosen, probability = [0.0] * experts, [0.0] * experts
    for logits_E in logits_TE.tolist():
        for expert in route(logits_E, top_k, True):
            chosen[expert] += 1 / (tokens * top_k)
        for expert, weight in route(logits_E, experts, False).items():
            probability[expert] += weight / tokens
    return experts * sum(f * p for f, p in zip(chosen, probability, strict=True))


def moe_layer(
    tokens_TH: torch.Tensor,
    router_EH: torch.Tensor,
    fc1_EFH: torch.Tensor,
    fc2_EHI: torch.Tensor,
    top_k: int,
    norm_topk_prob: bool,
) -> torch.Tensor:
    """[T, H], differentiable: each token through each of its experts alone."""
    rows = []
    for token_H in tokens_TH:
        logits_E = router_EH @ token_H
        chosen = logits_E.topk(top_k).indices.tolist()
        weights_K = logits_E[chosen].softmax(0) if norm_topk_prob else logits_E.softmax(0)[chosen]
        out_H = torch.zeros_like(token_H)
        for weight, expert in zip(weights_K, chosen, strict=True):
            gate_I, up_I = (fc1_EFH[expert] @ token_H).chunk(2)
            out_H = out_H + weight * (fc2_EHI[expert] @ (F.silu(gate_I) * up_I))
        rows.append(out_H)
    return torch.stack(rows)
