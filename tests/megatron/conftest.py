"""Tiny models, built once. `randomise` gives the norms values that a mistake would not survive."""

import pytest
import torch

from shared.megatron.model import GPTModel, ModelConfig, build_model

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
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(scope="session")
def llama() -> GPTModel:
    return randomise(build_model(LLAMA, seed=1, device="cpu"))


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, LLAMA.vocab_size, (3, 11), generator=torch.Generator().manual_seed(2))
