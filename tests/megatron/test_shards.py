"""Whole weights cut for tensor-parallel ranks."""

import pytest
import torch

from shared.megatron.layout import Layout
from shared.megatron.model import build_model, forward_logits
from shared.megatron.shards import WholeWeightsDoNotFit, load_whole
from tests.megatron.models import LLAMA, randomise
from tests.ranks import run_ranks


def _logits(rank: int, whole: dict[str, torch.Tensor], tokens_BT: torch.Tensor) -> torch.Tensor:
    model = build_model(LLAMA, seed=9, device="cpu")
    load_whole(model, whole)
    return forward_logits(model, tokens_BT).detach()


def test_ranks_with_their_slices_compute_what_one_process_computes(llama, tokens_BT):
    whole = {name: parameter.detach() for name, parameter in llama.named_parameters()}
    expected_BTV = forward_logits(llama, tokens_BT)
    for layout in (Layout(tp=2), Layout(tp=2, sequence_parallel=True), Layout()):
        for logits_BTV in run_ranks(_logits, layout, whole, tokens_BT):
            torch.testing.assert_close(logits_BTV, expected_BTV, atol=1e-5, rtol=0)


def test_foreign_weights_are_refused_and_nothing_is_copied():
    model = randomise(build_model(LLAMA, seed=1, device="cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first, *others = before
    with pytest.raises(WholeWeightsDoNotFit, match=f"missing \\['{first}'\\], unknown \\['x'\\]"):
        load_whole(model, {**{name: before[name] + 1 for name in others}, "x": torch.ones(1)})
    with pytest.raises(WholeWeightsDoNotFit, match=f"{first} has shape \\(3, 5\\)"):
        load_whole(model, {**{name: before[name] + 1 for name in others}, first: torch.ones(3, 5)})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
