"""Bytes that one rank needs to train in bfloat16 under a layout, term by term, and bytes of a key-value cache.

    rank = rank_memory(model, layout, counts.stages[0], sequence_length=20_480, micro_batch=1, microbatches=16)
    rank.weights, rank.activations["full"], rank.total("full")

Activations follow Korthikanti et al. (arXiv:2205.05198, section 4: what each operation keeps for its backward pass, and
equations 4 to 6 for tensor, sequence and pipeline parallelism), with the terms of this project's layer in the place of
theirs: fused attention keeps no scores, SwiGLU keeps four widths, there is no dropout. Tests compare them with what
autograd keeps. Standard library only. What is left out: docs/dryrun.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from shared.dryrun.count import StageCount
from shared.megatron.config import ModelConfig, MoEConfig
from shared.megatron.layout import Layout

BF16, FP32, INT64 = 2, 4, 8
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage.

    gradients: Megatron's float32 buffer. optimizer: float32 weights and both moments of Adam.
    activations: for every choice of recomputation, what is kept when most micro-batches are under way, and what the
        recomputed layer needs on top. head: logits and their gradient (last stage only).
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: Mapping[str, int]
    head: int

    def total(self, recompute: str) -> int:
        """Sum, as if all peaks came at once."""
        return self.weights + self.gradients + self.optimizer + self.activations[recompute] + self.head


def rank_memory(
    model: ModelConfig, layout: Layout, count: StageCount, *, sequence_length: int, micro_batch: int, microbatches: int
) -> RankMemory:
    """Memory of each rank of the stage that `count` describes.

    `micro_batch` sequences of `sequence_length` tokens are one micro-batch, `microbatches` of them one step of each
    data-parallel rank.
    """
    sharded = layout.distributed_optimizer
    dense_ranks = layout.dp * layout.cp if sharded else 1
    expert_ranks = layout.tp * layout.cp * layout.dp // layout.ep if sharded else 1
    last = count.stage == layout.pp - 1
    shape = (model, layout, sequence_length, micro_batch)
    layers = layers_in_flight(count, layout, microbatches)
    return RankMemory(
        stage=count.stage,
        weights=BF16 * count.parameters,
        gradients=FP32 * count.parameters,
        optimizer=3 * FP32 * (ceil(count.dense / dense_ranks) + ceil(count.experts / expert_ranks)),
        activations={
            "none": layers * kept_by_layer(*shape),
            "selective": layers * kept_by_layer(*shape, recompute="selective"),
            "full": layers * kept_by_layer(*shape, recompute="full") + kept_by_layer(*shape),
        },
        head=kept_by_head(*shape) + _logits(*shape) * BF16 if last else 0,
    )


def layers_in_flight(count: StageCount, layout: Layout, microbatches: int) -> int:
    """Layers x micro-batches whose activations a stage holds at once (Korthikanti et al., section 4.2.3).

    1F1B: stage i of p holds p - i micro-batches. Interleaved with m chunks: 2 (p - i - 1) + (m - 1) p + 1 chunks.
    """
    behind, chunks = layout.pp - count.stage - 1, layout.virtual_pp
    warm = behind + 1 if chunks == 1 else 2 * behind + (chunks - 1) * layout.pp + 1
    return min(warm, microbatches * chunks) * count.layers // chunks


def kept_by_layer(
    model: ModelConfig,
    layout: Layout,
    sequence_length: int,
    micro_batch: int,
    recompute: str = "none",
    width: int = BF16,
) -> int:
    """Bytes that one layer keeps of one micro-batch for its backward pass; `width` is that of an activation."""
    tokens = sequence_length * micro_batch // layout.cp
    outside = tokens // layout.tp if layout.sequence_parallel else tokens
    if recompute == "full":
        return outside * model.hidden_size * width
    norms = 2 * outside * (model.hidden_size * width + FP32)  # input, and one reciprocal root mean square a token
    mlp = _moe(model, model.moe, layout, outside, width) if model.moe else _dense_mlp(model, layout, tokens, width)
    into_mlp = 0 if model.moe else outside * model.hidden_size * width
    into_qkv = outside * model.hidden_size * width
    attention = _attention(model, layout, sequence_length, micro_batch, recompute, width)
    return norms + into_qkv + attention + into_mlp + mlp


def _attention(
    model: ModelConfig, layout: Layout, sequence_length: int, micro_batch: int, recompute: str, width: int
) -> int:
    tokens = sequence_length * micro_batch // layout.cp
    heads, groups = model.num_attention_heads // layout.tp, model.num_query_groups // layout.tp
    gathers = layout.cp > 1 and recompute != "selective"
    held = heads + heads if gathers else (heads + 2 * groups) + heads  # rotated queries and keys, values, the output
    if not gathers and (model.qk_layernorm or recompute == "selective"):
        held += heads + groups  # values are then a view of the whole projection, which therefore stays
    scalars = 0 if recompute == "selective" else heads  # log-sum-exp of the scores
    if model.qk_layernorm:
        # Queries are copied out of the projection, keys are a view of it.
        held += (heads if heads > groups else 0) + (heads + 2 * groups if gathers else 0)
        scalars += heads + groups
    kept = tokens * (held * model.head_dim * width + scalars * FP32)
    kept += _gathered(model, layout, sequence_length, tokens, width) if gathers else 0
    angles = sequence_length // layout.cp * model.head_dim * width
    return kept + (4 if recompute == "selective" else 2) * angles


def _gathered(model: ModelConfig, layout: Layout, sequence_length: int, tokens: int, width: int) -> int:
    """Keys and values of the whole sequence, both chunks' outputs before they are joined, and both chunks' masks."""
    heads, groups = model.num_attention_heads // layout.tp, model.num_query_groups // layout.tp
    chunk = sequence_length // (2 * layout.cp)
    seen = (2 * layout.cp + 1) * chunk  # by both chunks of a rank together
    return (tokens * (2 * layout.cp * groups + heads) * model.head_dim + chunk * seen) * width


def _dense_mlp(model: ModelConfig, layout: Layout, tokens: int, width: int) -> int:
    """Gate and up, SiLU of the gate, and its product with up."""
    return tokens * 4 * (model.ffn_hidden_size // layout.tp) * width


def _moe(model: ModelConfig, moe: MoEConfig, layout: Layout, tokens: int, width: int) -> int:
    """Router in float32 and experts, tokens spread evenly over the experts."""
    rows = tokens * moe.top_k
    router = ((tokens + moe.num_experts) * model.hidden_size + tokens * moe.num_experts) * FP32
    sorting = rows * INT64 * (5 if layout.ep > 1 else 3)
    weights = rows * (FP32 + width)
    return router + sorting + weights + rows * (2 * model.hidden_size + 4 * moe.moe_ffn_hidden_size) * width


def _logits(model: ModelConfig, layout: Layout, sequence_length: int, micro_batch: int) -> int:
    return sequence_length * micro_batch // layout.cp * (model.vocab_size // layout.tp)


def kept_by_head(model: ModelConfig, layout: Layout, sequence_length: int, micro_batch: int, width: int = BF16) -> int:
    """Bytes that the final norm, the output head and a vocabulary-parallel cross-entropy keep of one micro-batch."""
    tokens = sequence_length * micro_batch // layout.cp
    outside = tokens // layout.tp if layout.sequence_parallel else tokens
    norm = outside * (2 * model.hidden_size * width + FP32)
    return norm + _logits(model, layout, sequence_length, micro_batch) * FP32


def kv_cache_per_token(model: ModelConfig) -> int:
    """Bytes of keys and values, in bfloat16, of one token in all layers of an engine that is not split."""
    return 2 * model.num_layers * model.num_query_groups * model.head_dim * BF16
