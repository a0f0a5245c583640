"""Sizes of the dense decoder. Standard library only, so that configurations load without torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.experiment.contracts import AssayError


class BadModelConfig(AssayError):
    """Sizes of a model that do not fit together."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a dense decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, no dropout.

    `qk_layernorm` adds Qwen3's norms of queries and keys. `init_std` is the standard deviation of all matrices but
    the two that write into the residual stream, which get init_std / sqrt(2 * num_layers).
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

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise BadModelConfig(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}: every group serves the same number of heads"
            )
        if self.head_dim % 2:
            raise BadModelConfig(f"head_dim={self.head_dim} is odd: rotary positions turn pairs, choose an even one")
