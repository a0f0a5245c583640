"""Formulas of what a rank keeps, against what autograd keeps: every tensor saved for backward, each storage once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.dryrun.count import StageCount
from shared.dryrun.memory import kept_by_head, kept_by_layer, kv_cache_per_token, layers_in_flight, rank_memory
from shared.megatron.config import ModelConfig, MoEConfig
from shared.megatron.layout import Layout
from tests.ranks import run_ranks

QWEN2 = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    ffn_hidden_size=160,
    vocab_size=256,
    max_sequence_length=128,
    tie_embeddings=False,
    qkv_bias=True,
)
QWEN3 = replace(QWEN2, qkv_bias=False, qk_layernorm=True)
MOE = replace(QWEN3, moe=MoEConfig(num_experts=8, top_k=2, moe_ffn_hidden_size=64))
LENGTH = 128
TOLERANCE = 0.01
CASES = [
    (QWEN2, Layout(), 1),
    (QWEN2, Layout(recompute="selective"), 1),
    (QWEN2, Layout(recompute="full"), 2),
    (QWEN2, Layout(tp=2), 1),
    (QWEN2, Layout(tp=2, sequence_parallel=True), 2),
    (QWEN2, Layout(cp=2), 2),
    (QWEN3, Layout(), 2),
    (QWEN3, Layout(cp=2, recompute="selective"), 1),
    (MOE, Layout(), 1),
    (MOE, Layout(tp=2, sequence_parallel=True), 1),
    (MOE, Layout(dp=2, ep=2), 2),
]


class NormOfGPU(torch.autograd.Function):
    """What torch's fused kernel keeps on a GPU, input and reciprocal root; its CPU version keeps several copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x.float() * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError


def bytes_kept(rank: int, model: ModelConfig, layout: Layout, dtype: torch.dtype, micro_batch: int) -> int:
    from shared.megatron import spec
    from shared.megatron.model import build_chunks, run_layers, token_losses
    from shared.megatron.shim import install

    install()
    spec.F.rms_norm = lambda x, shape, weight, eps: NormOfGPU.apply(x, weight, eps)
    chunk = build_chunks(model, seed=rank, device="cpu", dtype=dtype)[0]
    permanent = {tensor.untyped_storage().data_ptr() for tensor in (*chunk.parameters(), *chunk.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent and tensor.dtype != torch.int64:  # token numbers belong to the batch
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BT = torch.randint(0, model.vocab_size, (micro_batch, LENGTH // layout.cp))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(chunk, run_layers(chunk, tokens_BT), tokens_BT).sum()
    return sum(kept.values())


@pytest.mark.parametrize(("model", "layout", "micro_batch"), CASES, ids=lambda value: str(value)[:24])
def test_formulas_meet_what_autograd_keeps(model: ModelConfig, layout: Layout, micro_batch: int) -> None:
    measured = run_ranks(bytes_kept, layout, model, layout, torch.bfloat16, micro_batch)
    shape = (model, layout, LENGTH, micro_batch)
    expected = model.num_layers * kept_by_layer(*shape, recompute=layout.recompute) + kept_by_head(*shape)
    if model.moe:  # int64 numbers that sort the tokens, which the measurement leaves out
        rows = LENGTH // layout.tp * micro_batch * model.moe.top_k
        expected -= model.num_layers * 8 * rows * (5 if layout.ep > 1 else 3)
    # The ranks share experts that get more and fewer tokens, and causal attention's chunks: their mean is meant.
    assert sum(measured) / len(measured) == pytest.approx(expected, rel=TOLERANCE)


def test_a_whole_rank_by_hand() -> None:
    """TP2, DP4 with the distributed optimizer, 1F1B over 2 stages; 10 dense scalars and 6 of experts per rank."""
    layout = Layout(tp=2, pp=2, dp=4, ep=2, sequence_parallel=True, distributed_optimizer=True)
    count = StageCount(stage=0, layers=1, dense=1000, experts=600)
    rank = rank_memory(MOE, layout, count, sequence_length=LENGTH, micro_batch=1, microbatches=8)
    assert (rank.weights, rank.gradients, rank.head) == (3200, 6400, 0)
    assert rank.optimizer == 12 * (1000 // 4 + 600 // 4)
    layer = kept_by_layer(MOE, layout, LENGTH, 1)
    inputs = LENGTH // 2 * MOE.hidden_size * 2
    assert rank.activations["none"] == 2 * layer
    assert rank.activations["full"] == 2 * inputs + layer
    assert rank.total("full") == 3200 + 6400 + rank.optimizer + rank.activations["full"]
    last = rank_memory(MOE, layout, replace(count, stage=1), sequence_length=LENGTH, micro_batch=1, microbatches=8)
    assert last.activations["none"] == layer
    assert last.head == kept_by_head(MOE, layout, LENGTH, 1) + LENGTH * MOE.vocab_size // 2 * 2


def test_interleaving_holds_more_on_the_first_stage() -> None:
    """Korthikanti et al., section 4.2.3: L (1 + (p - 1) / (p m)) layers on the first of p stages with m chunks."""
    layers, pp, chunks = 24, 4, 3
    count = StageCount(stage=0, layers=layers // pp, dense=0, experts=0)
    assert layers_in_flight(count, Layout(pp=pp), microbatches=8) == layers
    interleaved = layers_in_flight(count, Layout(pp=pp, virtual_pp=chunks), microbatches=8)
    assert interleaved == layers * (1 + (pp - 1) / (pp * chunks))
    assert layers_in_flight(count, Layout(pp=pp), microbatches=1) == layers // pp


def test_key_value_cache_of_qwen_7b() -> None:
    """28 layers x keys and values x 4 groups x 128 x 2 bytes = 56 KiB a token."""
    model = replace(QWEN2, num_layers=28, num_query_groups=4, head_dim=128)
    assert kv_cache_per_token(model) == 56 * 1024
