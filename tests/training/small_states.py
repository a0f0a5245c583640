"""Checkpoints of fifteen numbers, and what other processes do with them; imports little, so that they start fast."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import torch

from shared.megatron.config import ModelConfig
from shared.megatron.init import initialize
from shared.megatron.layout import Layout
from shared.training import torch_dist
from shared.training.checkpoint import CheckpointNotWritten
from shared.training.distributed_checkpoint import DistributedCheckpoints
from shared.training.manifest import Contents

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, num_query_groups=1, head_dim=8, ffn_hidden_size=32,
    vocab_size=32, max_sequence_length=16,
)  # fmt: skip
CONTENTS = Contents(MODEL, Layout(), optimizer=None, precision="fp32", data=None, seed=0, consumed_samples=0)


def state(value: float, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Twelve numbers split over `size` ranks, a replica on each rank, and a number that is no tensor."""
    from megatron.core.dist_checkpointing import ShardedTensor

    rows = torch.full((12 // size,), value)
    both = torch.full((3,), -value)
    return {
        "split": ShardedTensor.from_rank_offsets("split", rows, (0, rank, size)),
        "both": ShardedTensor.from_rank_offsets("both", both, replica_id=rank),
        "number": value,
    }


def save(checkpoints: DistributedCheckpoints, step: int, metric: float | None = None, **options: Any) -> None:
    initialize("cpu")
    checkpoints.save(step, state(float(step)), CONTENTS, metric=metric, **options)


def save_and_die(folder: Path, kill_at: int) -> None:
    calls = itertools.count()

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "chmod"):
        setattr(os, name, deadly(getattr(os, name)))
    torch_dist._write_item = deadly(torch_dist._write_item)
    checkpoints = DistributedCheckpoints(folder, keep=1)
    save(checkpoints, 2, asynchronous=True)
    checkpoints.wait()


def on_two_ranks(rank: int, folder: str) -> list[Any]:
    """What each rank sees while saves succeed, one rank fails to write, and a file is damaged."""
    checkpoints = DistributedCheckpoints(folder)
    seen: list[Any] = []
    for step in (1, 2):
        checkpoints.save(step, state(float(step), rank, 2), CONTENTS, asynchronous=True)
    checkpoints.wait()
    write = torch_dist.Share.write
    if rank == 1:
        torch_dist.Share.write = lambda self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    try:
        checkpoints.save(3, state(3.0, rank, 2), CONTENTS)
    except CheckpointNotWritten as error:
        seen.append(str(error))
    torch_dist.Share.write = write
    latest = checkpoints.latest()
    assert latest is not None
    seen.append(latest.step)
    seen.append(checkpoints.load(latest, state(0.0, rank, 2), model=MODEL, precision="fp32")["split"].tolist())
    if rank == 0:
        next(latest.path.glob("__1_*")).write_bytes(b"damaged")
    torch.distributed.barrier()
    fresh = DistributedCheckpoints(folder)
    earlier = fresh.latest()
    assert earlier is not None
    return [*seen, earlier.step, [type(error).__name__ for error in fresh.damaged.values()]]
