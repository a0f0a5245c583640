"""A run that changes its layout every two steps, optimizer state and all, is the run that never did.

Each layout loads what the one before it wrote. One process loads what each of them wrote. docs/checkpoints.md has the
table of what is proven here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.megatron.layout import Layout
from shared.training.pretrain import PretrainConfig
from tests.ranks import run_ranks
from tests.training.resharding import DENSE, MOE, STEPS, build, leg, save, train

SHARDED = Layout(dp=2, distributed_optimizer=True)
CHAINS = {
    "dense": (DENSE, [Layout(tp=2, sequence_parallel=True), Layout(pp=2), SHARDED, Layout(tp=2, pp=2, virtual_pp=2)]),
    "experts": (MOE, [Layout(dp=2, ep=2), Layout(dp=2, ep=2, distributed_optimizer=True), Layout(pp=2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_two_steps_under_each_layout_and_one_process_after_each(tmp_path, name):
    config, layouts = CHAINS[name]
    uninterrupted = _uninterrupted(config, tmp_path, legs=len(layouts) + 2)
    source = str(tmp_path / "0")
    for number, layout in enumerate(layouts, start=1):
        target = str(tmp_path / str(layout))
        for values in run_ranks(leg, layout, config, source, number * STEPS, target):
            assert values == pytest.approx(uninterrupted[number], abs=1e-6), f"{source} -> {layout}"
        values = leg(0, config, target, (number + 1) * STEPS, str(tmp_path / "one" / str(layout)))
        assert values == pytest.approx(uninterrupted[number + 1], abs=1e-6), f"{layout} -> 1"
        source = target


def test_bfloat16_keeps_its_float32_weights_across_optimizers(tmp_path):
    """Under one layout to the bit, which needs the float32 weights; under another to bfloat16's rounding."""
    config = replace(DENSE, precision="bf16", model=replace(DENSE.model, num_layers=2))
    uninterrupted = _uninterrupted(config, tmp_path, legs=3)
    assert leg(0, config, str(tmp_path / "0"), STEPS, str(tmp_path / "again")) == uninterrupted[1]
    target = str(tmp_path / "sharded")
    for values in run_ranks(leg, SHARDED, config, str(tmp_path / "0"), STEPS, target):
        assert values == pytest.approx(uninterrupted[1], rel=1e-2)
    assert leg(0, config, target, 2 * STEPS, str(tmp_path / "one")) == pytest.approx(uninterrupted[2], rel=1e-2)


def test_synchronous_and_asynchronous_saves_go_on_alike(tmp_path):
    config = replace(DENSE, model=replace(DENSE.model, num_layers=2))
    model = build(config)
    train(model, config, 0)
    after = []
    for asynchronous in (False, True):
        target = str(tmp_path / str(asynchronous))
        save(model, config, STEPS, target, asynchronous)
        after.append(leg(0, config, target, STEPS, str(tmp_path / "next")))
    assert after[0] == after[1]


def _uninterrupted(config: PretrainConfig, folder: Path, legs: int) -> list[list[float]]:
    """Values of each leg under one process; a checkpoint in folder "0" is written after the first."""
    model = build(config)
    values = [train(model, config, 0)]
    save(model, config, STEPS, str(folder / "0"))
    return values + [train(model, config, number * STEPS) for number in range(1, legs)]
