"""Sizes of the decoder. Standard library only, so that configurations load without torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.experiment.contracts import AssayError
from shared.experiment.files import added


class BadModelConfig(AssayError):
    """Sizes of a model that do not fit together."""


@dataclass(frozen=True)
class MoEConfig:
    """Baseline mixture of experts in every layer: softmax router without bias, `top_k` of `num_experts` SwiGLU experts.

    moe_ffn_hidden_size: inner width of one expert; `ModelConfig.ffn_hidden_size` is then unused.
    norm_topk_prob: divide the chosen probabilities by their sum (Mixtral; Qwen3-MoE has it as an option), else use them
        as they are.
    aux_loss_coeff: weight of the load-balancing loss E * sum_i f_i P_i (pretrain-core, section 2), a mean over all
        tokens, beside the mean loss over the counted ones: masks do not change it.
    """

    num_experts: int
    top_k: int
    moe_ffn_hidden_size: int
    norm_topk_prob: bool = True
    aux_loss_coeff: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise BadModelConfig(
                f"top_k={self.top_k} of num_experts={self.num_experts}: choose 1 to {self.num_experts}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no dropout.

    `qk_layernorm` adds Qwen3's norms of queries and keys, `qkv_bias` Qwen2's biases of queries, keys and values; there
    are no other biases. `moe` replaces every dense MLP by experts. `init_std` is the standard deviation of all matrices
    but the two that write into the residual stream, which get init_std / sqrt(2 * num_layers).
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_sequence_length: int
    rotary_base: float = 10000.0
    qk_layernorm: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    qkv_bias: bool = added(False)
    moe: MoEConfig | None = added(None)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise BadModelConfig(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}: every group serves the same number of heads"
            )
        if self.head_dim % 2:
            raise BadModelConfig(f"head_dim={self.head_dim} is odd: rotary positions turn pairs, choose an even one")
