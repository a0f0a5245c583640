"""ParallelModel in one process against a training loop of plain torch, which shares nothing with it but the layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from shared.megatron.config import ModelConfig, MoEConfig
from shared.megatron.layout import Layout
from tests.megatron.parity import DENSE, LENGTH
from tests.ranks import run_ranks

STEPS, ROWS, MICRO_ROWS, LR, DECAY, COEFF, CLIP = 3, 4, 2, 1e-3, 1.0, 0.5, 0.5
SMALL = replace(DENSE, num_layers=2)
MOE = MoEConfig(num_experts=4, top_k=2, moe_ffn_hidden_size=24, aux_loss_coeff=COEFF)
MODELS = {"dense": replace(SMALL, qkv_bias=True), "experts": replace(SMALL, moe=MOE)}

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _parts(step: int) -> list[Part]:
    """Micro-batches of tokens, labels and mask [MICRO_ROWS, LENGTH]; the second counts fewer labels than the first."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, 64, (ROWS, LENGTH + 1), generator=generator)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < torch.tensor([0.9, 0.9, 0.4, 0.4])[:, None]
    parts = zip(text.split(MICRO_ROWS), mask.split(MICRO_ROWS), strict=True)
    return [(rows[:, :-1], rows[:, 1:], counted.float()) for rows, counted in parts]


def _plain_loop(config: ModelConfig) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """(loss, gradient norm, balancing loss) of each step and the weights after the last."""
    from shared.megatron.model import build_model, forward_logits

    moe = config.moe
    model = build_model(replace(config, moe=moe and replace(moe, aux_loss_coeff=0.0)), seed=3, device="cpu")
    routed: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(lambda _module, _inputs, logits_NE: routed.append(logits_NE))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    results = []
    for step in range(STEPS):
        parts = _parts(step)
        counted = sum(float(mask.sum()) for _, _, mask in parts)
        adamw.zero_grad()
        total, balance = torch.zeros(()), torch.zeros(())
        for tokens, labels, mask in parts:
            routed.clear()
            logits_BTV = forward_logits(model, tokens)
            losses_BT = logits_BTV.logsumexp(-1) - logits_BTV.gather(-1, labels[..., None])[..., 0]
            total = total + (losses_BT * mask).sum() / counted
            for logits_NE in routed:
                chosen_NE = torch.zeros_like(logits_NE).scatter(1, logits_NE.topk(2).indices, 1.0)
                balance = balance + 4 * (chosen_NE.mean(0) / 2 * logits_NE.softmax(-1).mean(0)).sum() / len(parts)
        (total + COEFF * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        results.append((float(total), float(norm), float(balance)))
    return results, {name: p.detach() for name, p in model.named_parameters()}


def _both(rank: int, config: ModelConfig) -> Any:
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    model = ParallelModel(config, AdamWConfig(lr=LR, weight_decay=DECAY, grad_clip=CLIP), seed=3, device="cpu")
    results = []
    for step in range(STEPS):
        result = model.train_step([Microbatch(*part) for part in _parts(step)], LR)
        results.append((result.loss, result.grad_norm, result.aux_loss or 0.0))
    return (results, {name: p.detach() for name, p in model.chunks[0].named_parameters()}), _plain_loop(config)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_a_plain_torch_loop(name):
    """Decay of matrices alone, clipping, masks, micro-batches, and the balancing loss times its coefficient."""
    ((results, weights), (expected, expected_weights)) = run_ranks(_both, Layout(), MODELS[name])[0]
    for got, wanted in zip(results, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert all(norm > CLIP for _, norm, _ in expected)
    assert weights.keys() == expected_weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(
            weight, expected_weights[key], rtol=0, atol=2e-5, msg=lambda text, k=key: f"{k}: {text}"
        )


def _gradient_dtypes(rank: int) -> set[torch.dtype]:
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import ParallelModel

    model = ParallelModel(MODELS["experts"], AdamWConfig(lr=LR), seed=3, precision="bf16", device="cpu")
    assert {p.dtype for p in model.chunks[0].parameters()} == {torch.bfloat16}
    return {p.main_grad.dtype for p in model.chunks[0].parameters()}


def test_gradients_of_a_bfloat16_model_are_summed_in_float32():
    assert run_ranks(_gradient_dtypes, Layout())[0] == {torch.float32}


def _router_gradients(rank: int, coeff: float) -> list[torch.Tensor]:
    """Gradient of a router under a mask of 1, 1/4 and 1/16 of the labels, then 0; half as many on the second rank."""
    from shared.megatron.optimizer import AdamWConfig
    from shared.megatron.parallel import Microbatch, ParallelModel

    config = replace(SMALL, moe=replace(MOE, aux_loss_coeff=coeff))
    model = ParallelModel(config, AdamWConfig(lr=LR, grad_clip=0.0), seed=3, device="cpu")
    rows = slice(2 * rank, 2 * rank + 2)
    text = torch.randint(0, 64, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0))[rows]
    gradients = []
    for counted in (LENGTH, LENGTH // 4, LENGTH // 16, 0):
        mask = torch.zeros(2, LENGTH)
        mask[:, : counted // (rank + 1)] = 1
        model.train_step([Microbatch(text[:, :-1], text[:, 1:], mask)], 0.0)
        gradients.append(model.chunks[0].decoder.layers[0].mlp.router.weight.main_grad.clone())
    return gradients


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2)], ids=str)
def test_masked_labels_do_not_change_the_weight_of_the_balancing_loss(layout):
    with_loss, without = (run_ranks(_router_gradients, layout, coeff)[0] for coeff in (1.0, 0.0))
    *shares, nothing = [a - b for a, b in zip(with_loss, without, strict=True)]
    assert shares[0].norm() > 1e-3
    for first, second in pairwise(shares):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert nothing.norm() == 0
