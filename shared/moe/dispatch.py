"""Bring each token to its experts, on whichever rank they live, and the results back.

Tokens are sorted by expert, then exchanged between the expert-parallel ranks with one all-to-all each way. No token is
dropped or padded. Sorting and unsorting are inverse permutations, so gradients flow through gathers alone: no
atomics, the same result every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shared.megatron.init import quiet_imports

with quiet_imports():
    from megatron.core.tensor_parallel.mappings import all_to_all

# (rows [N, H] sorted by expert, counts int64 [E]) -> [N, H]
ExpertFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Permute(torch.autograd.Function):
    """Rows of `x`, each repeated `copies` times, in the order of a permutation whose inverse is known."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.copies = copies
        return x.index_select(0, order_N if copies == 1 else order_N // copies)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        grad_NH = grads[0].index_select(0, inverse_N)
        return grad_NH if ctx.copies == 1 else grad_NH.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def apply_experts(
    tokens_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    counts_E: torch.Tensor,
    run: ExpertFunction,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """sum_k weights[t, k] * expert_k(token t) -> [T, H], with all experts dealt out over `group` in order of rank.

    `counts_E` counts the assignments of this rank's tokens to all experts; `run` computes the experts of this rank.
    Ranks may hold different numbers of tokens, none included.
    """
    order_N, inverse_N = _sorting(experts_TK.flatten())
    rows_NH = _Permute.apply(tokens_TH, order_N, inverse_N, experts_TK.shape[1])
    rows_NH = run(rows_NH, counts_E) if group.size() == 1 else _exchange(rows_NH, counts_E, run, group)
    rows_TKH = _Permute.apply(rows_NH, inverse_N, order_N, 1).unflatten(0, experts_TK.shape)
    return torch.bmm(weights_TK.to(rows_TKH.dtype).unsqueeze(1), rows_TKH).squeeze(1)


def _sorting(keys_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order_N = keys_N.argsort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return order_N, inverse_N


def _exchange(
    rows_NH: torch.Tensor, counts_E: torch.Tensor, run: ExpertFunction, group: dist.ProcessGroup
) -> torch.Tensor:
    sent_RE = counts_E.view(group.size(), -1)
    received_RE = torch.empty_like(sent_RE)
    dist.all_to_all_single(received_RE, sent_RE, group=group)
    sent, received = torch.stack((sent_RE.sum(1), received_RE.sum(1))).tolist()
    rows_MH = all_to_all(group, rows_NH, received, sent)
    # Rows arrive sorted by sending rank, then by expert.
    local_E = torch.arange(sent_RE.shape[1], device=rows_NH.device)
    order_M, inverse_M = _sorting(local_E.repeat(group.size()).repeat_interleave(received_RE.flatten()))
    rows_MH = run(_Permute.apply(rows_MH, order_M, inverse_M, 1), received_RE.sum(0))
    return all_to_all(group, _Permute.apply(rows_MH, inverse_M, order_M, 1), sent, received)
