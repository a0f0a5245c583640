"""Decoding with split heads, MLPs and vocabulary gives the tokens and log-probabilities of one process."""

import pytest
import torch

from shared.engines.contracts import Sampling
from shared.engines.native import NativeEngine
from shared.megatron.layout import Layout
from shared.megatron.model import build_model
from shared.rl.ranks import Rows, SharedEngine
from tests.megatron.models import LLAMA
from tests.ranks import run_ranks

PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [5, 6, 7, 8], [9, 10]]
SAMPLING = Sampling(max_new_tokens=12)


def _sample(rank: int, shared: bool):
    engine = NativeEngine(build_model(LLAMA, seed=1, device="cpu"), eos_id=0, pad_id=0)
    engine = SharedEngine(engine, Rows(), pad_id=0) if shared else engine
    rollouts = engine.generate(PROMPTS, SAMPLING, n=3, seed=7)
    return rollouts.tokens_NT.tolist(), rollouts.logprobs_NT.tolist(), rollouts.finish_reason_N


@pytest.mark.parametrize(("layout", "shared"), [(Layout(tp=2), False), (Layout(dp=2), True), (Layout(dp=3), True)])
def test_several_ranks_sample_what_one_samples(layout, shared):
    expected = _sample(0, shared=False)
    for tokens, logprobs, reasons in run_ranks(_sample, layout, shared):
        assert tokens == expected[0]
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected[1]), atol=1e-5, rtol=0)
        assert reasons == expected[2]
