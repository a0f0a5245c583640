"""A toy whose ranks add up.

Every rank holds a part of ten numbers and all-reduces their sum; sums of small integers are the same in any layout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.experiment.contracts import Experiment, Grid, Interrupted, NonFinite, RunContext, Study
from shared.megatron.config import ModelConfig

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=2,
    ffn_hidden_size=8,
    vocab_size=16,
    max_sequence_length=8,
)


@dataclass(frozen=True)
class Adding:
    """`die` names a rank that SIGKILLs itself once, `fail` one that raises once, half-way; `diverge` those with NaN."""

    steps: int = 10
    sleep: float = 0.0
    die: int = -1
    fail: int = -1
    diverge: tuple[int, ...] = ()
    model: ModelConfig = MODEL


def add_up(run: RunContext) -> dict[str, Any]:
    """Running sum over steps and ranks; state in one file that rank 0 writes."""
    config: Adding = run.config
    rank, size, total = _group()
    state = run.checkpoints / "state.json"
    x, done = json.loads(state.read_text()) if state.exists() else (0, 0)
    run.rewind(done)
    for step in range(done + 1, config.steps + 1):
        x += total(sum(number * step for number in range(10) if number % size == rank))
        if rank in config.diverge:
            raise NonFinite(f"step {step}: x is nan")
        run.log(step, x=x)
        run.progress(step, config.steps)
        print(f"step {step}", file=sys.stderr if rank else sys.stdout)
        time.sleep(config.sleep)
        if rank in (config.die, config.fail) and step == config.steps // 2 and _once(run.dir / "done-once"):
            if rank == config.fail:
                raise ValueError("the toy was told to fail")
            os.kill(os.getpid(), signal.SIGKILL)
        stop = run.stop_requested()
        if (stop or step % 3 == 0) and rank == 0:
            state.with_suffix(".new").write_text(json.dumps([x, step]))
            state.with_suffix(".new").rename(state)
        if stop and step < config.steps:
            raise Interrupted(f"stopped after step {step}")
    return {"x": x, "rows": len(run.rows())}


def _group() -> tuple[int, int, Any]:
    if "RANK" not in os.environ:
        return 0, 1, lambda value: value
    import torch
    import torch.distributed as dist

    def total(value: int) -> int:
        sum_ = torch.tensor([value])
        dist.all_reduce(sum_)
        return int(sum_.item())

    return dist.get_rank(), dist.get_world_size(), total


def _once(mark: Path) -> bool:
    new = not mark.exists()
    mark.touch()
    return new


ADD = Study(
    name="add",
    question="Do the ranks agree?",
    arms={
        "nan": Adding(diverge=(0, 1)),
        "nan-on-one": Adding(diverge=(1,)),
        "plain": Adding(),
        "die": Adding(die=1),
        "fail": Adding(fail=1),
    },
    run=add_up,
    scales={"proxy": Grid((0,))},
    parallel=("tp", "dp"),
)
ALONE = Study("alone", "And one by itself?", {"plain": Adding()}, add_up, {"proxy": Grid((0,))})
EXPERIMENT = Experiment(paper="spread", artifacts=(), studies=(ADD, ALONE), claims=())
