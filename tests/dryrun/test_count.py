"""Counts of modules built on the meta device, against a formula, and against the published totals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from papers.cegppo.full import ARCHITECTURE, LAYOUT
from shared.dryrun.count import Counts, count
from shared.megatron.config import ModelConfig
from shared.megatron.init import current_layout
from shared.megatron.layout import Layout
from tests.dryrun.test_memory import MOE, QWEN2, QWEN3


def by_formula(model: ModelConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """(dense, experts) scalars of a rank of `stage`."""
    h, d, t = model.hidden_size, model.head_dim, layout.tp
    q, k = model.num_attention_heads * d, 2 * model.num_query_groups * d
    layer = 2 * h + h * (2 * q + k) // t
    layer += (q + k) // t if model.qkv_bias else 0
    layer += 2 * d if model.qk_layernorm else 0
    layer += model.moe.num_experts * h if model.moe else 3 * h * model.ffn_hidden_size // t
    experts = model.moe.num_experts // layout.ep * 3 * h * model.moe.moe_ffn_hidden_size if model.moe else 0
    layers, table = model.num_layers // layout.pp, model.vocab_size * h // t
    ends = (table if stage == 0 else 0) + (h if stage == layout.pp - 1 else 0)
    if stage == layout.pp - 1 and not (model.tie_embeddings and layout.pp == 1):
        ends += table
    return layers * layer + ends, layers * experts


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (QWEN2, Layout()),
        (replace(QWEN2, tie_embeddings=True), Layout(tp=2)),
        (replace(QWEN3, tie_embeddings=True), Layout(tp=4, pp=2, dp=8, sequence_parallel=True)),
        (replace(QWEN2, num_layers=8), Layout(tp=2, pp=2, cp=4, virtual_pp=2)),
        (MOE, Layout(tp=2, pp=2, dp=4, ep=8, sequence_parallel=True)),
    ],
    ids=str,
)
def test_built_modules_are_as_large_as_the_formula(model: ModelConfig, layout: Layout) -> None:
    found = count(model, layout)
    assert [(stage.dense, stage.experts) for stage in found.stages] == [
        by_formula(model, layout, stage) for stage in range(layout.pp)
    ]
    assert found.total == sum(by_formula(model, Layout(), 0))


def test_a_token_uses_top_k_experts_and_multiplies_no_norms() -> None:
    found = count(MOE, Layout())
    assert MOE.moe is not None
    dense, experts = by_formula(MOE, Layout(), 0)
    assert found.active == dense + experts * MOE.moe.top_k // MOE.moe.num_experts
    norms = MOE.num_layers * 2 * (MOE.hidden_size + MOE.head_dim) + MOE.hidden_size
    assert found.multiplied == found.active - norms - MOE.vocab_size * MOE.hidden_size
    tied = count(replace(QWEN2, tie_embeddings=True), Layout())
    assert tied.multiplied == count(QWEN2, Layout()).multiplied, "a tied table is the output head as well"


@pytest.mark.parametrize(("size", "total"), [("1.5b", 1_777_088_000), ("7b", 7_615_616_512)])
def test_cegppos_models_have_the_published_number_of_parameters(size: str, total: int) -> None:
    """The sizes of the model cards: 1.78 and 7.62 billion. The exact numbers are ours, to notice a change."""
    found = count(ARCHITECTURE[size], LAYOUT[size])
    assert found.total == total
    norms = 2 * 28 * ARCHITECTURE[size].hidden_size + ARCHITECTURE[size].hidden_size
    tp = LAYOUT[size].tp
    assert found.stages[0].parameters == (total - norms) // tp + norms


def test_counting_leaves_this_process_alone() -> None:
    before = torch.distributed.is_initialized(), current_layout()
    assert isinstance(count(QWEN2, Layout(dp=64)), Counts)
    assert (torch.distributed.is_initialized(), current_layout()) == before
