"""One tiny model for all tests of this folder."""

import pytest
import torch

from shared.megatron.model import GPTModel, build_model
from tests.megatron.models import LLAMA, randomise


@pytest.fixture(scope="session")
def llama() -> GPTModel:
    return randomise(build_model(LLAMA, seed=1, device="cpu"))


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, LLAMA.vocab_size, (3, 11), generator=torch.Generator().manual_seed(2))
