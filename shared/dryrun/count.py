"""Parameters of a model and of each pipeline stage, counted on modules that are really built, without their memory.

    counts = count(model_config, Layout(tp=4, dp=8, sequence_parallel=True))
    counts.total, [stage.dense for stage in counts.stages]

Special: one process stands in for ranks of a world that does not exist. torch's fake process group answers for the
others and the meta device holds shapes only, so the modules are those that a cluster builds, whatever its size.
Megatron keeps its groups in globals; a child process has them, and this one stays as it was.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from shared.megatron.config import ModelConfig
from shared.megatron.layout import Layout

PRELOAD = ("torch", "torch._dynamo", "shared.megatron.model")


@dataclass(frozen=True)
class StageCount:
    """Scalars that each rank of pipeline stage `stage` holds: experts of its own, and everything else (`dense`)."""

    stage: int
    layers: int
    dense: int
    experts: int

    @property
    def parameters(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Counts:
    """Scalars of the whole model, and of one rank of every pipeline stage.

    active: what one token uses, `top_k` of the experts.
    multiplied: the part of `active` that takes part in matrix products: no norms, no biases, and no embedding table
        unless it is the output head too. It is the N of 2N and 6N FLOPs per token.
    """

    total: int
    active: int
    multiplied: int
    stages: tuple[StageCount, ...]


def count(config: ModelConfig, layout: Layout) -> Counts:
    """Build the whole model and one rank of every pipeline stage, and count. Takes some seconds to import Megatron.

    Ranks of one stage hold equally much: `Layout.check` has refused what does not divide.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    with ProcessPoolExecutor(1, mp_context=context) as child:
        return child.submit(_count, config, layout).result()


def _count(config: ModelConfig, layout: Layout) -> Counts:
    whole = _sizes(config, Layout(), rank=0)
    experts = sum(size for kind, size, _ in whole if kind == "expert")
    share = config.moe.top_k / config.moe.num_experts if config.moe else 1.0
    multiplied = sum(size for kind, size, dimensions in whole if kind == "dense" and dimensions > 1)
    if config.tie_embeddings:
        multiplied += sum(size for kind, size, _ in whole if kind == "embedding")
    total = sum(size for _, size, _ in whole)
    return Counts(
        total=total,
        active=total - experts + round(experts * share),
        multiplied=multiplied + round(experts * share),
        stages=tuple(_stage(config, layout, stage) for stage in range(layout.pp)),
    )


def _stage(config: ModelConfig, layout: Layout, stage: int) -> StageCount:
    rank = stage * layout.world_size // layout.pp  # pipeline stages are the slowest dimension of Megatron's ranks
    sizes = _sizes(config, layout, rank)
    experts = sum(size for kind, size, _ in sizes if kind == "expert")
    return StageCount(stage, config.num_layers // layout.pp, sum(size for _, size, _ in sizes) - experts, experts)


def _sizes(config: ModelConfig, layout: Layout, rank: int) -> list[tuple[str, int, int]]:
    """(kind, scalars, dimensions) of every parameter of a rank; kind is embedding, expert or dense."""
    from shared.megatron.model import build_chunks

    with _fake_rank(layout, rank) as device:
        chunks = build_chunks(config, seed=0, device=device)
    return [(_kind(name), p.numel(), p.dim()) for chunk in chunks for name, p in chunk.named_parameters()]


def _kind(name: str) -> str:
    if "embedding.word_embeddings" in name:
        return "embedding"
    return "expert" if ".experts." in name else "dense"


@contextlib.contextmanager
def _fake_rank(layout: Layout, rank: int) -> Iterator[Any]:
    """The meta device, in a process that believes to be `rank` of `layout`."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from shared.megatron.init import initialize, quiet_imports

    with quiet_imports():
        from megatron.core import parallel_state
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    whole = parallel_state.initialize_model_parallel
    # gloo groups, which Megatron makes beside the default ones, would want to meet the others.
    parallel_state.initialize_model_parallel = functools.partial(whole, create_gloo_process_groups=False)
    try:
        with torch.device("meta"):
            yield initialize("meta", layout)
    finally:
        parallel_state.initialize_model_parallel = whole
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
