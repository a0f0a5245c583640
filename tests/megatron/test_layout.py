from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from shared.megatron.config import BadModelConfig, MoEConfig
from shared.megatron.init import initialize
from shared.megatron.layout import ImpossibleLayout, Layout
from tests.megatron.models import LLAMA
from tests.ranks import run_ranks

MOE = replace(LLAMA, moe=MoEConfig(num_experts=4, top_k=2, moe_ffn_hidden_size=24))


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"tp": 0}, "tp=0"),
        ({"sequence_parallel": True}, "set tp > 1"),
        ({"virtual_pp": 2}, "set pp > 1"),
        ({"dp": 3, "ep": 2}, "raise dp to a multiple"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(layout, says):
    with pytest.raises(ImpossibleLayout, match=says):
        Layout(**layout)


@pytest.mark.parametrize(
    ("layout", "model", "length", "microbatches", "says"),
    [
        (Layout(tp=4), LLAMA, 32, 1, "num_query_groups=2 is not a multiple of tp=4"),
        (Layout(tp=2), replace(LLAMA, vocab_size=51), 32, 1, "vocab_size=51"),
        (Layout(tp=2), replace(LLAMA, ffn_hidden_size=51), 32, 1, "ffn_hidden_size=51"),
        (Layout(pp=3), LLAMA, 32, 1, "num_layers=2 is not a multiple of pp"),
        (Layout(pp=2, virtual_pp=2), LLAMA, 32, 2, "pp \\* virtual_pp = 4"),
        (Layout(cp=2), LLAMA, 30, 1, "sequence_length=30"),
        (Layout(tp=2, sequence_parallel=True), LLAMA, 31, 1, "sequence_parallel needs"),
        (Layout(pp=2, virtual_pp=2), replace(LLAMA, num_layers=4), 32, 3, "multiple of pp=2 micro-batches"),
        (Layout(dp=2, ep=2), LLAMA, 32, 1, "this model is dense"),
        (Layout(dp=8, ep=8), MOE, 32, 1, "num_experts=4"),
        (Layout(tp=2), MOE, 32, 1, "need sequence_parallel=True"),
    ],
)
def test_what_cannot_run_is_refused_with_the_fix(layout, model, length, microbatches, says):
    with pytest.raises(ImpossibleLayout, match=says):
        layout.check(model, length, microbatches)


def test_what_can_run_passes():
    Layout(tp=2, cp=2, dp=2, sequence_parallel=True).check(LLAMA, 32)
    Layout(tp=2, ep=4, dp=2, sequence_parallel=True).check(MOE, 32)
    Layout(pp=2, virtual_pp=2).check(replace(LLAMA, num_layers=4), 32, microbatches=4)
    Layout(tp=2, sequence_parallel=True).check(replace(MOE, ffn_hidden_size=1), 32)  # unused beside experts


def test_layouts_read_well():
    assert str(Layout()) == "1"
    assert str(Layout(tp=2, pp=2, virtual_pp=2, sequence_parallel=True)) == "TP2xPP2+SP+VPP2"
    assert Layout(tp=2, pp=3, cp=5, dp=7, ep=2).world_size == 210


def test_several_processes_need_a_launcher():
    initialize("cpu")
    with pytest.raises(ImpossibleLayout, match="torchrun --nproc-per-node 2"):
        initialize("cpu", Layout(tp=2))


def test_the_gpu_of_this_process_is_the_current_one_whoever_made_the_groups(monkeypatch):
    initialize("cpu")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert initialize("cuda:3") == torch.device("cuda:3")
    initialize("cpu")
    assert chosen == [torch.device("cuda:3")]


def test_experts_have_a_sensible_top_k():
    with pytest.raises(BadModelConfig, match="top_k=5"):
        MoEConfig(num_experts=4, top_k=5, moe_ffn_hidden_size=8)


def _group_ranks(rank: int) -> tuple[list[int], list[int], list[int]]:
    from megatron.core import parallel_state

    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
    )
    tensor, pipeline, expert = (dist.get_process_group_ranks(group) for group in groups)
    return tensor, pipeline, expert


def test_ranks_are_ordered_tensor_parallel_first():
    assert run_ranks(_group_ranks, Layout(tp=2, pp=2))[1] == ([0, 1], [1, 3], [1])
    assert run_ranks(_group_ranks, Layout(dp=2, ep=2))[1] == ([1], [1], [0, 1])
