"""Tiny models for the tests of the model and of the engines."""

import torch

from shared.megatron.model import GPTModel, ModelConfig

LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=50,
    max_sequence_length=40,
    init_std=0.2,
)


def randomise(model: GPTModel, seed: int = 0) -> GPTModel:
    """Give the norms random weights: at one, as initialised, they would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model
