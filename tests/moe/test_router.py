"""Routing and balancing loss against loops, Megatron's own functions and the limits that theory names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.megatron.init import quiet_imports
from shared.moe.router import count_assignments, load_balancing_loss, top_k_route
from tests.moe import oracle

with quiet_imports():
    from megatron.core.transformer.moe.moe_utils import (
        switch_load_balancing_loss_func,
        topk_routing_with_score_function,
    )


def random_logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


routings = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(0, 10**6)).flatmap(
    lambda sizes: st.tuples(st.just(random_logits(*sizes)), st.integers(1, sizes[1]), st.booleans())
)


@settings(max_examples=50, deadline=None)
@given(routings)
def test_routing_equals_the_loop_and_megatron(case: tuple[torch.Tensor, int, bool]) -> None:
    logits_TE, top_k, norm_topk_prob = case
    weights_TK, experts_TK = top_k_route(logits_TE, top_k, norm_topk_prob)
    for logits_E, weights_K, experts_K in zip(
        logits_TE.tolist(), weights_TK.tolist(), experts_TK.tolist(), strict=True
    ):
        expected = oracle.route(logits_E, top_k, norm_topk_prob)
        assert dict(zip(experts_K, weights_K, strict=True)) == pytest.approx(expected, abs=1e-9)
    single = logits_TE.float()
    theirs_TE, _ = topk_routing_with_score_function(single, top_k, use_pre_softmax=not norm_topk_prob)
    weights_TK, experts_TK = top_k_route(single, top_k, norm_topk_prob)
    ours_TE = torch.zeros_like(theirs_TE).scatter(1, experts_TK, weights_TK)
    torch.testing.assert_close(ours_TE, theirs_TE, atol=1e-7, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(routings)
def test_balancing_loss_equals_the_loop_and_megatron(case: tuple[torch.Tensor, int, bool]) -> None:
    logits_TE, top_k, _ = case
    tokens, experts = logits_TE.shape
    counts_E = count_assignments(top_k_route(logits_TE, top_k, True)[1], experts)
    loss = load_balancing_loss(logits_TE, counts_E)
    assert loss.item() == pytest.approx(oracle.balancing_loss(logits_TE, top_k), abs=1e-9)
    theirs = switch_load_balancing_loss_func(logits_TE.softmax(-1), counts_E, tokens, top_k, experts, 1.0)
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-9)


def test_normalised_weights_equal_softmax_then_division() -> None:
    logits_TE = random_logits(20, 6, seed=0)
    raw_TK, experts_TK = top_k_route(logits_TE, 3, False)
    normalised_TK, same_TK = top_k_route(logits_TE, 3, True)
    assert torch.equal(experts_TK, same_TK)
    torch.testing.assert_close(raw_TK / raw_TK.sum(-1, keepdim=True), normalised_TK, atol=1e-12, rtol=0)


def test_a_constant_on_all_logits_changes_nothing() -> None:
    logits_TE = random_logits(20, 6, seed=1)
    for norm_topk_prob in (True, False):
        ours, shifted = (top_k_route(logits_TE + shift, 2, norm_topk_prob) for shift in (0, 5))
        torch.testing.assert_close(ours, shifted, atol=1e-12, rtol=0)


def test_balancing_loss_is_one_at_balance_and_e_over_k_at_collapse() -> None:
    balanced = load_balancing_loss(torch.zeros(12, 6), torch.full((6,), 4))
    assert balanced.item() == pytest.approx(1.0)
    collapsed_TE = torch.full((12, 6), -50.0)
    collapsed_TE[:, :2] = 0
    collapsed = load_balancing_loss(collapsed_TE, count_assignments(top_k_route(collapsed_TE, 2, True)[1], 6))
    assert collapsed.item() == pytest.approx(6 / 2)


def test_parts_of_a_micro_batch_add_up() -> None:
    logits_TE = random_logits(10, 5, seed=2).requires_grad_()
    counts_E = count_assignments(top_k_route(logits_TE, 2, True)[1], 5)
    whole = load_balancing_loss(logits_TE, counts_E)
    parts = [load_balancing_loss(part, counts_E, total_tokens=10) for part in logits_TE.split((7, 3))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)
    whole_grad, parts_grad = (torch.autograd.grad(loss, logits_TE)[0] for loss in (whole, sum(parts)))
    torch.testing.assert_close(whole_grad, parts_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_gradients_of_weights_and_loss(norm_topk_prob: bool) -> None:
    logits_TE = random_logits(5, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: top_k_route(x, 2, norm_topk_prob)[0], logits_TE)
    counts_E = count_assignments(top_k_route(logits_TE, 2, True)[1], 4)
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(x, counts_E), logits_TE)
