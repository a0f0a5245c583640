"""Tiny models with experts."""

from shared.megatron.config import ModelConfig, MoEConfig

MOE = MoEConfig(num_experts=4, top_k=2, moe_ffn_hidden_size=24, aux_loss_coeff=0.05)
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=48,
    max_sequence_length=16,
    tie_embeddings=False,
    init_std=0.1,
    moe=MOE,
)
