"""Dispatch and experts on one process against the loop over tokens in float64: values and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from shared.megatron.config import BadModelConfig
from shared.megatron.init import initialize, quiet_imports
from shared.megatron.model import build_model
from shared.moe.dispatch import apply_experts
from shared.moe.experts import swiglu_experts
from shared.moe.router import count_assignments, top_k_route
from tests.moe import oracle
from tests.moe.models import MODEL

with quiet_imports():
    from megatron.core import parallel_state

HIDDEN, INNER, EXPERTS = 8, 12, 5


@pytest.fixture
def one_rank() -> dist.ProcessGroup:
    initialize("cpu")
    return parallel_state.get_expert_model_parallel_group()


def random_layer(tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def our_layer(
    tokens_TH: torch.Tensor,
    router_EH: torch.Tensor,
    fc1_EFH: torch.Tensor,
    fc2_EHI: torch.Tensor,
    top_k: int,
    norm_topk_prob: bool,
) -> torch.Tensor:
    weights_TK, experts_TK = top_k_route(tokens_TH @ router_EH.T, top_k, norm_topk_prob)
    return apply_experts(
        tokens_TH,
        weights_TK,
        experts_TK,
        count_assignments(experts_TK, EXPERTS),
        lambda rows_NH, counts_E: swiglu_experts(rows_NH, counts_E, fc1_EFH, fc2_EHI),
        parallel_state.get_expert_model_parallel_group(),
    )


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("tokens", "top_k", "norm_topk_prob"), [(17, 2, True), (17, 3, False), (2, 1, False)])
def test_layer_and_gradients_equal_the_loop(tokens: int, top_k: int, norm_topk_prob: bool) -> None:
    tensors = random_layer(tokens)  # with 2 tokens and top_k=1, at least three experts receive nothing
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.double().requires_grad_() for tensor in tensors]
    out_TH = our_layer(*ours, top_k=top_k, norm_topk_prob=norm_topk_prob)
    expected_TH = oracle.moe_layer(*theirs, top_k=top_k, norm_topk_prob=norm_topk_prob)
    torch.testing.assert_close(out_TH.double(), expected_TH, atol=1e-4, rtol=1e-5)
    out_TH.square().sum().backward()
    expected_TH.square().sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        largest = reference.grad.abs().max()
        torch.testing.assert_close(mine.grad.double() / largest, reference.grad / largest, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("one_rank")
def test_order_of_experts_does_not_matter() -> None:
    tokens_TH, router_EH, fc1_EFH, fc2_EHI = random_layer(17)
    order_E = torch.tensor([3, 0, 4, 2, 1])
    plain_TH = our_layer(tokens_TH, router_EH, fc1_EFH, fc2_EHI, 2, True)
    permuted_TH = our_layer(tokens_TH, router_EH[order_E], fc1_EFH[order_E], fc2_EHI[order_E], 2, True)
    torch.testing.assert_close(plain_TH, permuted_TH, atol=1e-5, rtol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_equal_experts_make_a_dense_mlp_whatever_the_routing() -> None:
    tokens_TH, router_EH, fc1_EFH, fc2_EHI = random_layer(17)
    same = fc1_EFH[:1].expand_as(fc1_EFH).contiguous(), fc2_EHI[:1].expand_as(fc2_EHI).contiguous()
    out_TH = our_layer(tokens_TH, router_EH, *same, top_k=3, norm_topk_prob=True)
    gate_TI, up_TI = (tokens_TH @ fc1_EFH[0].T).chunk(2, -1)
    dense_TH = (torch.nn.functional.silu(gate_TI) * up_TI) @ fc2_EHI[0].T
    torch.testing.assert_close(out_TH, dense_TH, atol=1e-4, rtol=1e-5)


def test_gradients_of_dispatch(one_rank: dist.ProcessGroup) -> None:
    tokens_TH, router_EH, *_ = (tensor.double() for tensor in random_layer(6))
    weights_TK, experts_TK = top_k_route(tokens_TH @ router_EH.T, 2, True)
    counts_E = count_assignments(experts_TK, EXPERTS)

    def scaled_by_expert(rows_NH: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return rows_NH.sin() * torch.arange(1, EXPERTS + 1).repeat_interleave(counts_E)[:, None]

    def dispatched(tokens_TH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return apply_experts(tokens_TH, weights_TK, experts_TK, counts_E, scaled_by_expert, one_rank)

    expected_TH = tokens_TH.sin() * (weights_TK * (experts_TK + 1)).sum(-1, keepdim=True)
    torch.testing.assert_close(dispatched(tokens_TH, weights_TK), expected_TH, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(dispatched, (tokens_TH.requires_grad_(), weights_TK.requires_grad_()))


def test_sizes_the_grouped_product_cannot_take_are_refused() -> None:
    config = replace(MODEL, moe=replace(MODEL.moe, moe_ffn_hidden_size=10))
    with pytest.raises(BadModelConfig, match="multiples of 4"):
        build_model(config, seed=0, device="cpu")
