"""Decoding with split heads, MLPs and vocabulary gives the tokens and log-probabilities of one process."""

from dataclasses import replace

import pytest
import torch

from shared.engines.contracts import Sampling
from shared.engines.native import NativeEngine
from shared.megatron.layout import Layout
from shared.megatron.model import build_model
from shared.megatron.shards import load_whole
from shared.rl.ranks import Rows, SharedEngine
from tests.megatron.models import LLAMA
from tests.ranks import run_ranks

PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [5, 6, 7, 8], [9, 10]]
SAMPLING = Sampling(max_new_tokens=12)


QWEN2 = replace(LLAMA, qkv_bias=True)


def _sample(rank: int, shared: bool):
    """A model with biases that are not zero, as those of a fresh model are."""
    whole = whole_weights()
    model = build_model(QWEN2, seed=1, device="cpu")
    load_whole(model, whole)
    engine = NativeEngine(model, eos_id=0, pad_id=0)
    engine.self_check()
    engine = SharedEngine(engine, Rows(), pad_id=0) if shared else engine
    rollouts = engine.generate(PROMPTS, SAMPLING, n=3, seed=7)
    return rollouts.tokens_NT.tolist(), rollouts.logprobs_NT.tolist(), rollouts.finish_reason_N


def whole_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "embedding.word_embeddings.weight": (50, 32),
        "decoder.final_layernorm.weight": (32,),
    }
    for layer in range(2):
        prefix = f"decoder.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (32,),
            f"{prefix}.self_attention.linear_qkv.weight": (64, 32),
            f"{prefix}.self_attention.linear_qkv.bias": (64,),
            f"{prefix}.self_attention.linear_proj.weight": (32, 32),
            f"{prefix}.pre_mlp_layernorm.weight": (32,),
            f"{prefix}.mlp.linear_fc1.weight": (96, 32),
            f"{prefix}.mlp.linear_fc2.weight": (32, 48),
        }
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(("layout", "shared"), [(Layout(tp=2), False), (Layout(dp=2), True), (Layout(dp=3), True)])
def test_several_ranks_sample_what_one_samples(layout, shared):
    expected = _sample(0, shared=False)
    for tokens, logprobs, reasons in run_ranks(_sample, layout, shared):
        assert tokens == expected[0]
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected[1]), atol=1e-5, rtol=0)
        assert reasons == expected[2]
